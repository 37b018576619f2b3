"""FSDP2: every process holds a share of each weight, of its gradient and of its optimiser state.

PyTorch's ``fully_shard`` is called here and not by accelerate, whose FSDP does not run on the CPU
(tests compare two processes there) and takes one model and one optimiser a run, where stages have
an optimiser each. Process groups, devices and precision are accelerate's as without sharding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenflex.training.layers import layers_of


def shard(model: Any, device: torch.device, precision: str) -> None:
    """Shard ``model`` in place over all processes, with the weights that the first one has.

    A layer's weights are gathered for its forward pass and again for its backward pass; those of
    embeddings, head and norms for both at once. In bfloat16 weights travel as such, and gradients
    in float32.
    """
    for tensor in model.state_dict().values():
        there = tensor.to(device)
        dist.broadcast(there, 0)
        tensor.copy_(there)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    dtypes: dict[str, Any] = {}
    if precision == "bf16":
        dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    inner = model.model
    units = [*layers_of(inner.vision_model), *layers_of(inner.language_model), inner.projector]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes))
    # The weights of targets are an input of the model, and stay float32.
    outer = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=outer)


def note_what_learns(model: Any) -> None:
    """Let the shards know that other weights learn than before; on every process.

    FSDP2 notes the type in which it adds up gradients when it first gathers a unit, and none where
    nothing learned then: gathered by name it looks again.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
            unit.reshard()


def is_sharded(model: Any) -> bool:
    """Whether :func:`shard` was here."""
    return isinstance(model, FSDPModule)


def whole(tensor: torch.Tensor, *, keep: bool = True) -> torch.Tensor | None:
    """``tensor`` on the host, put together from all shards; None where it is not to ``keep``.

    Every process must call this for the same tensors in the same order.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu() if keep else None


def like(parameter: torch.Tensor, tensor: torch.Tensor | None) -> torch.Tensor:
    """The first process's ``tensor``, of ``parameter``'s shape, placed and sharded as it is."""
    device = parameter.device
    if tensor is None:
        tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    tensor = tensor.to(device, parameter.dtype, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor
