"""Cases of a few rows, on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness, projector_cases
from benchmarks.harness import Batch, Case, Deadline, Effort, Row, Variant, Work

ONCE = Effort(samples=3, seconds=0.0)


def rows_of(case: Case, dtype: torch.dtype = torch.float64) -> list[Row]:
    return list(harness.measure(case, dtype, "cpu", ONCE, Deadline(60)))


def square_case(*variants: Variant, **changes: object) -> Case:
    """y = a b, elementwise, a and b of 6 numbers."""

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        generator = torch.Generator(device).manual_seed(seed)
        a, b, grad = (
            torch.randn(6, generator=generator, dtype=dtype, device=device) for _ in range(3)
        )
        return Batch({"a": a, "b": b}, grad, None)

    def work(itemsize: int) -> dict[str, Work]:
        return dict.fromkeys(harness.MODES, Work(bytes=18 * itemsize, flops=6))

    fields = {"op": "product", "name": "six", "tokens": 6, "batch": batch, "truth": product}
    return Case(**{**fields, "variants": variants, "work": work, **changes})


def product(leaves: dict[str, torch.Tensor], _: object = None) -> torch.Tensor:
    return leaves["a"] * leaves["b"]


@pytest.fixture
def small_shapes(monkeypatch):
    """The projector's cases at 8 features, 16 hidden, 8 out."""
    for name, value in {"C": 8, "H": 16, "D": 8}.items():
        monkeypatch.setattr(projector_cases, name, value)
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 1)
