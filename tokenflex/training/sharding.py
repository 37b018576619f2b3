"""Shard a model with FSDP2, and gather or restore whole weights and optimiser states.

PyTorch's ``fully_shard`` is called directly: accelerate's FSDP does not run on the CPU, where tests
compare two processes, and expects one optimiser a run, where every stage has its own. Process
groups, devices and precision are accelerate's, with and without sharding.

A saved state holds whole tensors under the names of parameters. So a run continues on any number of
processes, sharded or not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tokenflex.training.layers import sharded_units

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: Any, device: torch.device, precision: str) -> None:
    """Shard ``model`` in place over all processes, with the weights of the first one.

    The weights of a layer are gathered for its forward pass and again for its backward pass; those
    of embeddings, head and norms once for both. In bfloat16 weights are sent as bfloat16 and
    gradients as float32.
    """
    for tensor in model.state_dict().values():
        weights = tensor.to(device)
        dist.broadcast(weights, 0)
        tensor.copy_(weights)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    dtypes: dict[str, Any] = {}
    if precision == "bf16":
        dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    for unit in sharded_units(model):
        fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes))
    # The weights of targets are an input of the model and stay float32.
    outer = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=outer)


def is_sharded(model: Any) -> bool:
    """Return whether :func:`shard` has sharded ``model``."""
    return isinstance(model, FSDPModule)


def refresh_shards(model: Any) -> None:
    """Make the shards look again at which weights learn. Every process must call it.

    FSDP2 chooses the type in which a unit's gradients are added up when it first gathers the unit,
    and chooses none if nothing in it learns.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
            unit.reshard()


def model_weights(model: Any) -> dict[str, Any]:
    """Return name -> whole weight, on the host of the first process. Every process must call it.

    A weight with two names (of a head and an embedding) is one tensor. Other processes get nothing.
    """
    weights: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    first_names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first_name = first_names.setdefault(id(tensor), name)
        if weights:
            weights[name] = weights[first_name]
    return weights


def optimizer_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return the whole state of an optimiser, on the host of the first process.

    ``moments`` has what it knows of each parameter, by name, and ``groups`` the settings of each
    parameter group. Every process must call it; the others get nothing.
    """
    state: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in state.get("param_groups", [])
    ]
    return {"moments": state.get("state", {}), "groups": groups}


def restore_optimizer(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Restore what :func:`optimizer_state` returned. Every process must call it.

    On all processes but the first the names in ``moments`` are enough.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {**settings, "params": [names[parameter] for parameter in group["params"]]}
        for group, settings in zip(optimizer.param_groups, state["groups"], strict=True)
    ]
    several = dist.is_initialized()
    is_first = not several or dist.get_rank() == 0
    set_optimizer_state_dict(
        model,
        optimizer,
        {"state": state["moments"], "param_groups": groups} if is_first else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=False),
    )
    # PyTorch begins a state of every parameter, also of those that have had no gradient yet.
    for parameter, name in names.items():
        if not state["moments"].get(name):
            optimizer.state.pop(parameter, None)
