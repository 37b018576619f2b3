"""Other packages' way to compute the projector's stages: one adapter of a few lines each.

An adapter is a function that imports its package and returns the variants for each op. A package
that is not installed is skipped by name; a call that fails becomes a row with the reason.

To add one: write such a function, and name it in ``PEERS``. See README.md here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import Leaves, Variant
from benchmarks.projector_cases import (
    BIASES,
    EAGER,
    EPS,
    Grids,
    by_group,
    down,
    layer_norm,
    pool,
)

Variants = dict[str, Variant]
COMPILED = "torch.compile, max-autotune"


def compiled() -> Variants:
    """torch.compile of the eager functions, each shape on its own.

    The harness captures graphs itself, of all variants alike, hence "no-cudagraphs".
    """
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False  # backward is timed alone, many times
    mode = "max-autotune-no-cudagraphs"
    return {
        op: Variant(COMPILED, torch.compile(call, mode=mode, dynamic=False), slow_start=True)
        for op, call in EAGER.items()
    }


def liger() -> Variants:
    """Liger-Kernel: its LayerNorm, and its silu(gate) * up between PyTorch's products."""
    from liger_kernel.ops import LigerLayerNormFunction, LigerSiLUMulFunction

    def norm(x: torch.Tensor, leaves: Leaves) -> torch.Tensor:
        return LigerLayerNormFunction.apply(x, leaves["norm_weight"], leaves["norm_bias"], EPS)

    def gate_up(x: torch.Tensor, leaves: Leaves) -> torch.Tensor:
        gate = F.linear(x, leaves["gate_weight"], leaves["gate_bias"])
        return LigerSiLUMulFunction.apply(
            gate, F.linear(x, leaves["up_weight"], leaves["up_bias"]), 1.0, 1.0
        )

    def pool_norm(leaves: Leaves, grids: Grids) -> torch.Tensor:
        return by_group(leaves["x"], grids, lambda x, grid: norm(pool(x, grid), leaves))

    def project(leaves: Leaves, grids: Grids) -> torch.Tensor:
        return down(gate_up(pool_norm(leaves, grids), leaves), leaves)

    # Its backward of silu(gate) * up writes into the gate and up that were saved: no second one is
    # right, so it cannot be timed alone on a graph that is kept.
    once = ("forward", "forward+backward")
    return {
        "pool_norm": Variant("liger-kernel", pool_norm),
        "swiglu": Variant(
            "liger-kernel", lambda leaves, _: gate_up(leaves["x"], leaves), modes=once
        ),
        "project_tokens": Variant("liger-kernel", project, modes=once),
    }


def quack() -> Variants:
    """quack-kernels: its gated MLP. Gate and up are stored row by row in turns, as it wants them.

    ``tuned=False``: its default configurations, since it would tune at run time otherwise.
    """
    from quack.linear import linear_gated_func
    from quack.mlp import mlp_func

    def interleaved(leaves: Leaves) -> Leaves:
        rest = {name: leaf for name, leaf in leaves.items() if name[:3] not in ("gat", "up_")}
        for kind in ("weight", "bias"):
            pair = torch.stack([leaves[f"gate_{kind}"], leaves[f"up_{kind}"]], 1)
            rest[f"gate_up_{kind}"] = pair.flatten(0, 1)
        return rest

    def gate_up(leaves: Leaves, _: object) -> torch.Tensor:
        _, product = linear_gated_func(
            leaves["x"],
            leaves["gate_up_weight"],
            "swiglu",
            bias=leaves["gate_up_bias"],
            store_preact=False,
            tuned=False,
        )
        return product

    def project(leaves: Leaves, grids: Grids) -> torch.Tensor:
        pooled = by_group(leaves["x"], grids, pool)
        return mlp_func(
            layer_norm(pooled, leaves),
            leaves["gate_up_weight"],
            leaves["down_weight"],
            "swiglu",
            bias1=leaves["gate_up_bias"],
            bias2=leaves["down_bias"],
            tuned=False,
        )

    return {
        # Its product is differentiable only through the down projection that follows.
        "swiglu": Variant("quack-kernels", gate_up, prepare=interleaved, modes=("forward",)),
        "project_tokens": Variant("quack-kernels", project, prepare=interleaved),
    }


def flash_swiglu_mlp() -> Variants:
    """flash-swiglu-mlp: takes no biases; its backward takes an output as wide as the input only."""
    from flash_swiglu_mlp import flash_swiglu

    def project(leaves: Leaves, grids: Grids) -> torch.Tensor:
        tokens = layer_norm(by_group(leaves["x"], grids, pool), leaves)
        weights = (leaves[name] for name in ("gate_weight", "up_weight", "down_weight"))
        return flash_swiglu(tokens[None], *weights)[0]

    return {
        "project_tokens": Variant(
            "flash-swiglu-mlp, no biases",
            project,
            without=BIASES,
            modes=("forward",),
            slow_start=True,
        )
    }


PEERS: dict[str, Callable[[], Variants]] = {
    COMPILED: compiled,
    "liger-kernel": liger,
    "quack-kernels": quack,
    "flash-swiglu-mlp": flash_swiglu_mlp,
}


def load_peers(*, compiling: bool = True) -> tuple[list[Variants], dict[str, str]]:
    """The variants of each peer at hand, and why the others are not.

    Args:
        compiling: False for a run that has no time for torch.compile.
    """
    found, missing = [], {}
    for name, adapter in PEERS.items():
        if name == COMPILED and not compiling:
            missing[name] = "not run: a quick run compiles nothing"
            continue
        try:
            found.append(adapter())
        except ModuleNotFoundError as error:
            missing[name] = f"not installed: no module {error.name}"
        except Exception as error:  # a package that does not import on this machine
            missing[name] = f"does not import: {type(error).__name__}: {error}".splitlines()[0]
    return found, missing
