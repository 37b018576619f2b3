"""``limited.md``: one model beside the specialists, by size of the training data and by steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.ablation.figures import draw_gains
from experiments.ablation.regimes import BUDGETS, Budget
from experiments.ablation.results import (
    PLACES,
    PLACES_EXPLAINED,
    difference,
    half_width,
    place,
    places_of,
    spread_of,
)
from experiments.ablation.suites import POSITIONED, SPECIALISTS
from experiments.ablation.tables import asked_and_seeds, markdown_table, points
from tokenflex.plots import finish, plt, save_figure

KINDS = {
    "as in the paper": ("stochastic", SPECIALISTS),
    "with positions": ("positions", POSITIONED),
}
"""Names of the one model and of the specialists, without the budget's."""
CROSSED = "with positions for the one model alone"
"""A comparison across kinds: specialists without positions may be the better ones."""
_PAIRS = {**KINDS, CROSSED: (KINDS["with positions"][0], SPECIALISTS)}


def pairs_of(report: Mapping[str, Any], kind: str, budget: Budget) -> dict[str, tuple[str, str]]:
    """Return by count the names of the one model and of the specialist, where both were run."""
    general, specialists = _PAIRS[kind]
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
        PLACES_EXPLAINED,
    ]
    for kind in (*kinds, *([CROSSED] if len(kinds) == len(KINDS) else [])):
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
        "smaller; so does every change by which a model learns less. Hence the tables below it, of "
        "the budgets whose canvases are seen again: ahead on unseen canvases and not ahead on "
        "training ones is regularisation, behind on both is less learning. *Smaller by* is that of "
        "the specialists minus that of the one model, paired by seed, with its 95 % confidence "
        "interval.",
        markdown_table(
            [
                *("canvases", "steps"),
                *(f"{kind}, {what}" for kind in kinds for what in (*WHO, "smaller by")),
            ],
            [
                [
                    *_budget_cells(report, budget)[:2],
                    *(cell for kind in kinds for cell in _gap_cells(report, kind, budget)),
                ]
                for budget in budgets
            ],
        ),
        *(part for kind in kinds for part in _regularisation(report, kind)),
        "## Runs that did not learn",
        f"Each is more than {100 * FAILED:.0f} points behind its like of the other kind, with the "
        "same seed and data. A gain above that compares with one says little about counts.",
        "\n".join(f"- {line}" for line in _failures(report)) or "None.",
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
            names = [budget.data.removesuffix(" canvases") for budget in budgets]
            axes.set_xticks(range(len(budgets)), names)
            steps = _shape(report, budgets[0])["steps"]
            axes.set_title(f"{kind}, {steps:,} steps", loc="left", fontsize=10)
            finish(axes)
        axes_of_kind[0].set_ylabel("one model minus specialist, points")
    for axes in grid[-1]:
        axes.set_xlabel("canvases of the training data")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save_figure(figure, path)


WHO = ("one", "specialists")
FAILED = 0.15
"""Accuracy by which a run is behind its like that has learned."""


def _shape(report: Mapping[str, Any], budget: Budget) -> Mapping[str, Any]:
    """Return a row of a budget: all have the same steps and views."""
    pairs = (pairs_of(report, kind, budget) for kind in KINDS)
    return report["regimes"][next(one for of_kind in pairs for one, _ in of_kind.values())]


def _budget_cells(report: Mapping[str, Any], budget: Budget) -> list[str]:
    row = _shape(report, budget)
    views = "1" if budget.canvases is None else f"{row['views'] / budget.canvases:.2g}"
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


def _smaller_by(report: Mapping[str, Any], kind: str, budget: Budget) -> dict[str, Any]:
    """Return the specialists' :func:`_generalisation_gap` minus the one model's, by seed."""
    one, specialists = (_generalisation_gap(report, kind, budget, who)["values"] for who in WHO)
    return spread_of([b - a for a, b in zip(one, specialists, strict=True)])


def _gap_cells(report: Mapping[str, Any], kind: str, budget: Budget) -> Iterator[str]:
    for who in WHO:
        yield points(_generalisation_gap(report, kind, budget, who), signed=True)
    smaller = _smaller_by(report, kind, budget)
    half = half_width(smaller)
    interval = ""
    if half is not None:
        low, high = (100 * (smaller["mean"] + sign * half) for sign in (-1, 1))
        interval = f" ({low:+.1f} to {high:+.1f})"
    yield f"{100 * smaller['mean']:+.1f}{interval}"


def _verdicts(report: Mapping[str, Any], kind: str) -> Iterator[str]:
    """Say for each budget at which counts the one model is ahead, undecided or behind."""
    for budget in budgets_of(report):
        steps = _shape(report, budget)["steps"]
        yield f"{budget.data}, {steps:,} steps: {places_of(gains(report, kind, budget))}."


def _regularisation(report: Mapping[str, Any], kind: str) -> list[str]:
    """Return the number of comparisons by the one model's place on unseen and trained canvases."""
    number: Counter[tuple[str, str]] = Counter()
    again = [budget for budget in budgets_of(report) if budget.canvases is not None]
    for budget in again:
        trained = gains(report, kind, budget, "trained_accuracy")
        for count, gain in gains(report, kind, budget).items():
            number[place(gain), place(trained[count])] += 1
    smaller = Counter(place(_smaller_by(report, kind, budget)) for budget in again)
    rows = [[word, *(str(number[word, other]) for other in PLACES)] for word in PLACES]
    return [
        f"{kind.capitalize()}: the one model's difference is the smaller one on {smaller['ahead']} "
        f"of {len(again)} budgets, the larger one on {smaller['behind']}, and undecided on "
        f"{smaller['undecided']}. Of {number.total()} comparisons it is:",
        markdown_table(["on unseen canvases", *(f"{p} on training ones" for p in PLACES)], rows),
    ]


def _failures(report: Mapping[str, Any]) -> Iterator[str]:
    """Name runs that are far behind their like of the other kind: they did not learn."""
    first, second = KINDS
    for budget in budgets_of(report):
        pairs = [pairs_of(report, kind, budget) for kind in (first, second)]
        for count in [count for count in pairs[0] if count in pairs[1]]:
            for names in zip(pairs[0][count], pairs[1][count], strict=True):
                both = [report["regimes"][name]["accuracy"][count]["values"] for name in names]
                for seed, values in zip(report["seeds"], zip(*both, strict=True), strict=True):
                    worse = min(range(2), key=values.__getitem__)
                    if values[1 - worse] - values[worse] > FAILED:
                        title = report["regimes"][names[worse]]["title"]
                        yield (
                            f"{title}, seed {seed}: {100 * values[worse]:.1f} at {count} tokens, "
                            f"{(first, second)[1 - worse]} {100 * values[1 - worse]:.1f}."
                        )
