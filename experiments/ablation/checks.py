"""Checks of a quick ablation, which fail if something is broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.ablation.limited import budgets_of, gains, pairs_of
from experiments.ablation.scales import QUICK, QUICK_LIMITED, Scale

LIMITED_KIND = "with positions"
# At least 0.1 below the worst of three seeds in docs/results/ablate/quick-limited.json: gains of
# -0.05 to 0.05 on 300 canvases, -0.09 to -0.03 on fresh ones, and an accuracy of 0.49 or more.
LIMITED_GAIN = {"300-x1": -0.16, "fresh-x1": -0.19}
"""Bounds by budget: the one model's accuracy minus the specialist's, at the smallest count."""
LIMITED_LEARNED = 0.39
"""Bound of the one model's accuracy at the smallest count, on each budget."""


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


def quick_limited_checks(report: Mapping[str, Any]) -> list[Check]:
    """Check that one model learns from little data, no further behind the specialist than known.

    Args:
        report: Report of :func:`experiments.ablation.results.collect` of ``QUICK_LIMITED``.
    """
    checks, small = [], report["counts"][0]
    for budget in budgets_of(report):
        gain = gains(report, LIMITED_KIND, budget)[small]["mean"]
        one, _ = pairs_of(report, LIMITED_KIND, budget)[small]
        learned = report["regimes"][one]["accuracy"][small]["mean"]
        checks += [
            Check(
                f"accuracy at {small} on {budget.data}, one model minus the specialist",
                gain,
                LIMITED_GAIN[budget.name],
            ),
            Check(f"the one model at {small} on {budget.data}", learned, LIMITED_LEARNED),
        ]
    return checks


QUICK_CHECKS: dict[str, tuple[Scale, Callable[[Mapping[str, Any]], list[Check]]]] = {
    "paper": (QUICK, quick_checks),
    "limited": (QUICK_LIMITED, quick_limited_checks),
}
"""Scale and checks of the suites that have a quick form."""
