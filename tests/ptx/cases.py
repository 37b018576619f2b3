"""Small calls of the ops that run every kernel, with every config that is shipped.

A case is one call of an op, forward and backward, whose kernels are executed. Its results are held
against PyTorch's in float64, and may be 1.2 times as far from it as PyTorch's in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.kernels.common import (
    MODES,
    eager_pool_norm,
    eager_project,
    parameters_of,
    rms,
    rms_error,
    rows_of,
    run,
    wide,
)
from tests.ptx.launching import executing
from tests.ptx.machine import Execution
from tokenflex_kernels import pool_norm, project_tokens
from tokenflex_kernels.checks import Grid
from tokenflex_kernels.launch_configs import (
    DTYPES,
    NAMES,
    PRODUCTS,
    STAGES,
    Config,
    overriding,
    parse_stage,
    read_table,
)

# A ragged batch: windows that overlap, more cells than patches, one patch, three cells on a patch.
FEW = ((5, 7), (4, 3), (1, 1), (1, 2)), ((3, 4), (5, 2), (1, 1), (2, 5))
# Rows of several tiles, or of a part of the largest.
MANY = ((9, 10), (7, 5)), ((7, 8), (6, 6))
REFERENCE_WIDTH = 1152  # whose rows take as many warps as a model's
# Vision, hidden and text: each more blocks of 64 than a pipeline has stages, which are used again.
TILED = (320, 384, 320)  # multiples of all tiles
RAGGED = (336, 336, 336)  # multiples of 16, but not of tiles
ODD = (75, 77, 45)  # multiples of nothing


@dataclass(frozen=True)
class Result:
    """One result of an op against float64, as root mean squares."""

    error: float
    allowed: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.allowed  # not so for NaN


@dataclass(frozen=True)
class Outcome:
    """The results of a case, and its executions."""

    results: dict[str, Result]
    executions: list[Execution]

    @property
    def faults(self) -> list[str]:
        wrong = [
            f"{name}: error {result.error:.3g}, allowed {result.allowed:.3g}"
            for name, result in self.results.items()
            if not result.is_right
        ]
        return wrong + [f"{e.kernel}: {race}" for e in self.executions for race in e.races]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: distinct among the cases of an architecture.
        architecture: that kernels are compiled for.
        op: "pool_norm" or "project_tokens".
        dtype: of all tensors.
        grids: of the images, before and after pooling.
        widths: of vision rows, hidden rows and text rows.
        configs: by stage, in place of the table's.
        missing: parameters that are None.
        wanted: inputs that require gradients; all by default, and for () no backward runs.
        options: of the op.
        change: a function of the inputs by name, that gives them other strides.
    """

    name: str
    architecture: str
    op: str
    dtype: torch.dtype
    grids: tuple[tuple[Grid, ...], tuple[Grid, ...]] = FEW
    widths: tuple[int, int, int] = RAGGED
    configs: dict[str, Config | None] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    wanted: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None

    def __str__(self) -> str:
        return f"{self.architecture}-{self.name}"

    def _op(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        ours, peer = {
            "pool_norm": (pool_norm, eager_pool_norm),
            "project_tokens": (project_tokens, eager_project),
        }[self.op]
        saved = {name: value for name, value in self.options.items() if name != "save"}
        return (
            lambda x, **inputs: ours(x, *self.grids, **inputs, **self.options),
            lambda x, **inputs: peer(x, *self.grids, **inputs, **saved),
        )

    def _inputs(self) -> tuple[dict[str, Any], torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(rows_of(self.grids[0]), self.widths[0]).to(self.dtype)
        parameters = parameters_of(*self.widths, self.dtype, missing=self.missing)
        if self.op == "pool_norm":
            names = ("norm_weight", "norm_bias")
            parameters = {name.removeprefix("norm_"): parameters[name] for name in names}
        inputs = {"x": x, **parameters}
        if self.change is not None:
            inputs = {
                name: tensor if tensor is None else self.change(name, tensor)
                for name, tensor in inputs.items()
            }
        columns = self.widths[0] if self.op == "pool_norm" else self.widths[2]
        return inputs, torch.randn(rows_of(self.grids[1]), columns).to(self.dtype)

    def run(self, edit: Callable[[str, str], str] | None = None) -> Outcome:
        """Run the op by its kernels and by PyTorch.

        Args:
            edit: a function of a kernel's name and PTX that returns the PTX to run instead.
        """
        inputs, gradient = self._inputs()
        ours, peer = self._op()
        # One descriptor may hold both weights, of which the kernel gets the first.
        pair = [inputs[name] for name in ("gate_weight", "up_weight") if name in inputs]
        with (
            overriding(**self.configs),
            executing(self.architecture, edit=edit, memory=pair) as executions,
        ):
            actual = self._call(ours, inputs, gradient)
        eager = self._call(peer, inputs, gradient)
        truth = self._call(peer, wide(inputs), gradient.double())
        results = {}
        for name, expected in truth.items():
            rounding = rms(expected.to(actual[name].dtype).double() - expected)
            last_bits = 4 * torch.finfo(torch.float32).eps * rms(expected)
            allowed = max(1.2 * max(rms_error(eager[name], expected), rounding), last_bits)
            results[name] = Result(rms_error(actual[name], expected), allowed)
        return Outcome(results, list(executions))

    def _call(
        self, op: Callable[..., Any], inputs: dict[str, Any], gradient: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self.wanted == ():
            with torch.no_grad():
                return {"out": op(**inputs)}
        return run(op, inputs, gradient, self.wanted)


def shipped(architecture: str, stage: str, dtype: torch.dtype) -> list[Config]:
    """Return the configs that the table has, but for the library's products."""
    buckets = parse_stage(read_table()[architecture]["stages"], stage)[NAMES[dtype]]
    return list(dict.fromkeys(config for _, config in buckets if config is not None))


def _of_all_stages(architecture: str, dtype: torch.dtype) -> Iterator[dict[str, Config | None]]:
    """Yield configs of all stages until each that is shipped was among them."""
    known = {stage: shipped(architecture, stage, dtype) for stage in STAGES}
    for index in range(max(map(len, known.values()))):
        yield {
            stage: configs[min(index, len(configs) - 1)] if configs else None
            for stage, configs in known.items()
        }


def _every_other_row(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers as rows of a wider matrix that begin off any alignment."""
    if tensor.dim() == 1:
        return torch.cat([tensor[:1], tensor])[1:]
    wider = tensor.new_zeros(len(tensor), tensor.shape[1] + 9)
    wider[:, 1 : 1 + tensor.shape[1]] = tensor
    return wider[:, 1 : 1 + tensor.shape[1]]


def cases_of(architecture: str) -> list[Case]:
    """Return all cases of an architecture of the table."""
    cases: list[Case] = []

    def add(name: str, op: str, dtype: str, **fields: Any) -> None:
        cases.append(Case(name, architecture, op, DTYPES[dtype], **fields))

    for dtype in DTYPES:
        for index, configs in enumerate(_of_all_stages(architecture, DTYPES[dtype])):
            both = {"dtype": dtype, "configs": configs}
            label = f"{dtype}-{index}"
            for mode in MODES:
                options = {"mode": mode}
                wide_rows = (REFERENCE_WIDTH, 1, 1)
                add(f"pool-{mode}-{label}", "pool_norm", widths=wide_rows, options=options, **both)
                add(
                    f"pool-{mode}-without-norm-{label}",
                    "pool_norm",
                    missing=("norm_weight", "norm_bias"),
                    options=options,
                    **both,
                )
            add(f"pool-odd-{label}", "pool_norm", widths=ODD, **both)
            add(f"pool-sums-{label}", "pool_norm", wanted=("weight", "bias"), **both)
            for widths, kind in ((TILED, "tiled"), (RAGGED, "ragged"), (ODD, "odd")):
                shape = {"grids": MANY, "widths": widths}
                add(f"project-{kind}-{label}", "project_tokens", **shape, **both)
            add(f"project-inference-{label}", "project_tokens", grids=MANY, wanted=(), **both)
            add(
                f"project-input-{label}",
                "project_tokens",
                grids=MANY,
                missing=("gate_bias", "up_bias"),
                options={"save": "input"},
                **both,
            )
            if architecture != "sm_80" and any(configs[stage] for stage in PRODUCTS):
                descriptors = {
                    stage: config._replace(tma=True) if stage in PRODUCTS and config else config
                    for stage, config in configs.items()
                }
                add(
                    f"project-tma-{label}",
                    "project_tokens",
                    dtype=dtype,
                    grids=MANY,
                    configs=descriptors,
                )
    add("pool-strided", "pool_norm", "bfloat16", change=_every_other_row)
    add("pool-wide-strided", "pool_norm", "float32", widths=(160, 1, 1), change=_every_other_row)
    return cases
