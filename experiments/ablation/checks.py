"""Checks of a quick ablation, which fail if something is broken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """A value that must exceed a bound."""

    claim: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value > self.bound

    def __str__(self) -> str:
        verdict = "ok" if self.holds else "FAILED"
        return f"{verdict}: {self.claim} must exceed {self.bound:.2f}, got {self.value:.3f}"


def quick_checks(report: Mapping[str, Any]) -> list[Check]:
    """Check the first half of the paper's claim, and that both models learned to read.

    The bounds are at least 0.1 below the worst of three seeds in docs/results/ablate/quick.json.

    Args:
        report: Report of :func:`experiments.ablation.results.collect` with the regimes
            "fixed-large" and "stochastic".
    """
    small, large = report["counts"][0], report["counts"][-1]
    stochastic, fixed = (report["regimes"][name] for name in ("stochastic", "fixed-large"))

    def at(row: Mapping[str, Any], count: str) -> float:
        return row["accuracy"][count]["mean"]

    def reading(row: Mapping[str, Any], count: str) -> float:
        return row["accuracy_by_kind"]["read"][count]["mean"]

    return [
        Check(
            f"accuracy at {small}, stochastic minus fixed {large}",
            at(stochastic, small) - at(fixed, small),
            0.15,
        ),
        Check(f"stochastic, `read` at {large}", reading(stochastic, large), 0.7),
        Check(f"fixed {large}, `read` at {large}", reading(fixed, large), 0.75),
    ]
