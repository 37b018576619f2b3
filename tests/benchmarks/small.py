"""Cases of a few rows, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cases import Batch, Case, Variant, run_cases
from benchmarks.harness import DTYPES, Deadline, Run
from benchmarks.results import NewRow


def run_of(device: str = "cpu", quick: bool = False, emit: Callable = print) -> Run:
    return Run(device, quick, Deadline(60), emit, dtype=DTYPES[device])


def rows_of(*cases: Case, dtype: torch.dtype = torch.float64, **options: object) -> list[NewRow]:
    rows: list[NewRow] = []
    fields = {"device": "cpu", "quick": True, "deadline": Deadline(60), "dtype": dtype}
    run_cases(cases, Run(**{**fields, **options}, emit=rows.extend))
    return rows


def square_case(*variants: Variant, **changes: object) -> Case:
    """y = a b, elementwise, a and b of 6 numbers."""

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        generator = torch.Generator(device).manual_seed(seed)
        a, b, grad = (
            torch.randn(6, generator=generator, dtype=dtype, device=device) for _ in range(3)
        )
        return Batch({"a": a, "b": b}, grad)

    fields = {"op": "product", "name": "six", "tokens": 6, "batch": batch, "truth": product}
    fields |= {"numbers": (18, 18), "flops": (6, 6)}
    return Case(**{**fields, "variants": variants, **changes})


def product(leaves: dict[str, torch.Tensor], _: object = None) -> torch.Tensor:
    return leaves["a"] * leaves["b"]
