"""``limited.md``: one model beside the specialists, by size of the training data and by steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.ablation.figures import draw_gains
from experiments.ablation.regimes import BUDGETS, Budget
from experiments.ablation.results import difference, spread_of
from experiments.ablation.suites import SPECIALISTS
from experiments.ablation.tables import asked_and_seeds, markdown_table, points
from tokenflex.plots import finish, plt, save_figure

KINDS = {
    "as in the paper": ("stochastic", SPECIALISTS),
    "with positions": ("positions", tuple(f"{name}-positions" for name in SPECIALISTS)),
}
"""Names of the one model and of the specialists, without the budget's."""


def pairs_of(report: Mapping[str, Any], kind: str, budget: Budget) -> dict[str, tuple[str, str]]:
    """Return by count the names of the one model and of the specialist, where both were run."""
    general, specialists = KINDS[kind]
    pairs = {
        count: (f"{general}-{budget.name}", f"{name}-{budget.name}")
        for count, name in zip(report["counts"], specialists, strict=True)
    }
    return {count: pair for count, pair in pairs.items() if {*pair} <= {*report["regimes"]}}


def budgets_of(report: Mapping[str, Any]) -> list[Budget]:
    """Return the budgets of a report, in order."""
    return [b for b in BUDGETS if any(pairs_of(report, kind, b) for kind in KINDS)]


def kinds_of(report: Mapping[str, Any]) -> list[str]:
    """Return the kinds of a report, in order."""
    return [k for k in KINDS if any(pairs_of(report, k, budget) for budget in BUDGETS)]


def gains(
    report: Mapping[str, Any], kind: str, budget: Budget, of: str = "accuracy"
) -> dict[str, dict[str, Any]]:
    """Return by count the accuracy of the one model minus that of the specialist, by seed."""
    return {
        count: difference(report, one, specialist, count, of)
        for count, (one, specialist) in pairs_of(report, kind, budget).items()
    }


def format_limited(report: Mapping[str, Any]) -> str:
    """Format the page of a report of :func:`experiments.ablation.results.collect`."""
    budgets, kinds = budgets_of(report), kinds_of(report)
    at_counts = [f"at {count}" for count in report["counts"]]
    sections = [
        f"# One model beside the specialists on limited data, scale {report['scale']}",
        asked_and_seeds(report),
        "Every run of a row has the same canvases, order of data, number of steps and start, which "
        "was trained on the same canvases. Specialists are three models, each trained and asked "
        "at its own count. The encoder's warm-up, which stands in for pretrained weights, "
        "sees canvases of its own.",
    ]
    for kind in kinds:
        rows = [
            [
                *_budget_cells(report, budget),
                *_cells(report, gains(report, kind, budget), signed=True),
            ]
            for budget in budgets
        ]
        sections += [
            f"## One model minus the specialist, {kind}",
            "Questions about unseen canvases, paired by seed, in points.",
            markdown_table(["canvases", "steps", "views of a canvas", *at_counts], rows),
            "\n".join(f"- {line}" for line in _verdicts(report, kind)),
        ]
    sections += [
        "![One model minus the specialist](limited.png)",
        "## Is it regularisation?",
        "Accuracy on canvases of the training data minus accuracy on unseen ones, in points: "
        "the mean over the counts, specialists at their own. A regulariser makes this difference "
        "smaller; so does every change by which a model learns less. Hence the list below it, of "
        "the canvases that are seen again: only a model that knows its training canvases no better "
        "and unseen ones better shows regularisation.",
        markdown_table(
            ["canvases", "steps", *(f"{kind}, {who}" for kind in kinds for who in WHO)],
            [
                [
                    *_budget_cells(report, budget)[:2],
                    *(
                        points(_generalisation_gap(report, kind, budget, who), signed=True)
                        for kind in kinds
                        for who in WHO
                    ),
                ]
                for budget in budgets
            ],
        ),
        "\n".join(f"- {_regularisation(report, kind)}" for kind in kinds),
        "## Accuracies",
    ]
    for kind in kinds:
        rows = [
            [*_budget_cells(report, budget)[:2], who, where, *cells]
            for budget in budgets
            for who, where, cells in _accuracy_rows(report, kind, budget)
        ]
        sections += [
            f"### {kind.capitalize()}",
            markdown_table(["canvases", "steps", "model", "canvases asked", *at_counts], rows),
        ]
    return "\n\n".join(sections) + "\n"


def write_limited_figure(report: Mapping[str, Any], path: Path) -> None:
    """Draw the differences over the size of the data, a panel for each kind and number of steps."""
    kinds, factors = kinds_of(report), sorted({budget.factor for budget in budgets_of(report)})
    figure, grid = plt.subplots(
        len(kinds),
        len(factors),
        figsize=(9.0, 3.0 * len(kinds)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes_of_kind, kind in zip(grid, kinds, strict=True):
        for axes, factor in zip(axes_of_kind, factors, strict=True):
            budgets = [budget for budget in budgets_of(report) if budget.factor == factor]
            draw_gains(axes, report["counts"], [gains(report, kind, budget) for budget in budgets])
            axes.axhline(0, color="#777777", linewidth=1)
            axes.set_xticks(range(len(budgets)), [budget.data for budget in budgets])
            steps = _shape(report, budgets[0])["steps"]
            axes.set_title(f"{kind}, {steps:,} steps", loc="left", fontsize=10)
            finish(axes)
        axes_of_kind[0].set_ylabel("one model minus specialist, points")
    grid[0][0].legend(frameon=False)
    save_figure(figure, path)


WHO = ("one", "specialists")


def _shape(report: Mapping[str, Any], budget: Budget) -> Mapping[str, Any]:
    """Return a row of a budget: all have the same steps and views."""
    pairs = (pairs_of(report, kind, budget) for kind in KINDS)
    return report["regimes"][next(one for of_kind in pairs for one, _ in of_kind.values())]


def _budget_cells(report: Mapping[str, Any], budget: Budget) -> list[str]:
    row = _shape(report, budget)
    views = "1" if budget.canvases is None else f"{row['views'] / budget.canvases:.0f}"
    return [budget.data.removesuffix(" canvases"), f"{row['steps']:,}", views]


def _cells(
    report: Mapping[str, Any], by_count: Mapping[str, Mapping[str, Any]], *, signed: bool = False
) -> list[str]:
    """Return a cell for each count, "-" where nothing was run."""
    return [
        points(by_count[count], signed=signed) if count in by_count else "-"
        for count in report["counts"]
    ]


def _accuracy_rows(
    report: Mapping[str, Any], kind: str, budget: Budget
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield model, asked canvases and accuracies at the counts."""
    pairs = pairs_of(report, kind, budget)
    for i, who in enumerate(WHO):
        for where, of in (("unseen", "accuracy"), ("trained", "trained_accuracy")):
            accuracies = {
                count: report["regimes"][pair[i]][of][count] for count, pair in pairs.items()
            }
            yield who, where, _cells(report, accuracies)


def _generalisation_gap(
    report: Mapping[str, Any], kind: str, budget: Budget, who: str
) -> dict[str, Any]:
    """Return accuracy on training canvases minus that on unseen ones, the mean over counts."""
    by_count = []
    for count, pair in pairs_of(report, kind, budget).items():
        row = report["regimes"][pair[WHO.index(who)]]
        trained, unseen = (row[of][count]["values"] for of in ("trained_accuracy", "accuracy"))
        by_count.append([a - b for a, b in zip(trained, unseen, strict=True)])
    return spread_of([sum(values) / len(values) for values in zip(*by_count, strict=True)])


def _verdicts(report: Mapping[str, Any], kind: str) -> Iterator[str]:
    """Say for each budget at which counts the one model is ahead, level or behind.

    Level: the mean over seeds is no further from 0 than its standard error. One seed has none.
    """
    for budget in budgets_of(report):
        words: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
        for count, gain in gains(report, kind, budget).items():
            error = (gain["spread"] or 0.0) / len(gain["values"]) ** 0.5
            word = "level" if abs(gain["mean"]) <= error else "behind"
            word = "ahead" if gain["mean"] > error else word
            words[word].append(f"{count} ({100 * gain['mean']:+.1f})")
        steps = _shape(report, budget)["steps"]
        said = "; ".join(f"{word} at {', '.join(at)}" for word, at in words.items() if at)
        yield f"{budget.data}, {steps:,} steps: {said}."


def _is_ahead(gain: Mapping[str, Any]) -> bool:
    """Return whether a gain is positive as it is shown: models that know all are level."""
    return 100 * gain["mean"] >= 0.05


def _regularisation(report: Mapping[str, Any], kind: str) -> str:
    """Say how often the one model is ahead on unseen canvases, and on its training canvases."""
    again = [budget for budget in budgets_of(report) if budget.canvases is not None]
    number: Counter[tuple[bool, bool]] = Counter()
    smaller = 0
    for budget in again:
        trained = gains(report, kind, budget, "trained_accuracy")
        for count, gain in gains(report, kind, budget).items():
            number[_is_ahead(gain), _is_ahead(trained[count])] += 1
        one, specialists = (_generalisation_gap(report, kind, budget, who)["mean"] for who in WHO)
        smaller += one < specialists
    return (
        f"{kind}: the one model's difference is the smaller one on {smaller} of {len(again)} "
        f"budgets. Of {number.total()} comparisons it is ahead on unseen canvases in "
        f"{number[True, False] + number[True, True]}: in {number[True, False]} without being ahead "
        f"on the training canvases (regularisation), in {number[True, True]} ahead there as well "
        f"(it has learned more). It is behind on both in {number[False, False]} (it has learned "
        f"less), and behind on unseen ones alone in {number[False, True]}."
    )
