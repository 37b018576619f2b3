"""``limited.md``: one model beside the specialists, by size of the training data and by steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.ablation.gap import COLOURS
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


def gains(
    report: Mapping[str, Any], kind: str, budget: Budget, of: str = "accuracy"
) -> dict[str, dict[str, Any]]:
    """Return by count the accuracy of the one model minus that of the specialist, by seed."""
    general, specialists = KINDS[kind]
    return {
        count: difference(report, f"{general}-{budget.name}", f"{name}-{budget.name}", count, of)
        for count, name in zip(report["counts"], specialists, strict=True)
    }


def format_limited(report: Mapping[str, Any]) -> str:
    """Format the page of a report of :func:`experiments.ablation.results.collect`."""
    counts = report["counts"]
    at_counts = [f"at {count}" for count in counts]
    head = ["canvases", "steps", "views of a canvas", *at_counts]
    sections = [
        f"# One model beside the specialists on limited data, scale {report['scale']}",
        asked_and_seeds(report),
        "Every run of a row has the same canvases, order of data, number of steps and start, which "
        "was trained on the same canvases. Specialists are three models, each trained and asked "
        "at its own count. The encoder's warm-up, which stands in for pretrained weights, "
        "sees canvases of its own.",
    ]
    for kind in KINDS:
        rows = [
            [*_budget_cells(report, budget), *(points(gain, signed=True) for gain in row.values())]
            for budget in BUDGETS
            for row in [gains(report, kind, budget)]
        ]
        sections += [
            f"## One model minus the specialist, {kind}",
            "Questions about unseen canvases, paired by seed, in points.",
            markdown_table(head, rows),
            "\n".join(f"- {line}" for line in _verdicts(report, kind)),
        ]
    sections += [
        "![One model minus the specialist](limited.png)",
        "## Is it regularisation?",
        "Accuracy on canvases of the training data minus accuracy on unseen ones, in points: "
        "the mean over the three counts, specialists at their own. A regulariser makes this "
        "difference smaller.",
        markdown_table(
            ["canvases", "steps", *(f"{kind}, {who}" for kind in KINDS for who in WHO)],
            [
                [*_budget_cells(report, budget)[:2], *_gap_cells(report, budget)]
                for budget in BUDGETS
            ],
        ),
        _regularisation(report),
        "## Accuracies",
    ]
    for kind in KINDS:
        rows = [
            [*_budget_cells(report, budget)[:2], who, where, *cells]
            for budget in BUDGETS
            for who, where, cells in _accuracy_rows(report, kind, budget)
        ]
        sections += [
            f"### {kind.capitalize()}",
            markdown_table(["canvases", "steps", "model", "canvases asked", *at_counts], rows),
        ]
    return "\n\n".join(sections) + "\n"


def write_limited_figure(report: Mapping[str, Any], path: Path) -> None:
    """Draw the differences over the size of the data, a panel for each kind and number of steps."""
    factors = sorted({budget.factor for budget in BUDGETS})
    figure, grid = plt.subplots(
        len(KINDS), len(factors), figsize=(9.0, 6.0), sharey=True, layout="constrained"
    )
    for axes_of_kind, kind in zip(grid, KINDS, strict=True):
        for axes, factor in zip(axes_of_kind, factors, strict=True):
            budgets = [budget for budget in BUDGETS if budget.factor == factor]
            by_budget = [gains(report, kind, budget) for budget in budgets]
            for i, (count, colour) in enumerate(zip(report["counts"], COLOURS, strict=True)):
                row = [gain[count] for gain in by_budget]
                axes.errorbar(
                    [x + 0.08 * (i - 1) for x in range(len(budgets))],
                    [100 * gain["mean"] for gain in row],
                    yerr=[100 * (gain["spread"] or 0.0) for gain in row],
                    marker="o",
                    color=colour,
                    elinewidth=1,
                    label=f"at {count} tokens",
                )
            axes.axhline(0, color="#777777", linewidth=1)
            axes.set_xticks(range(len(budgets)), [budget.data for budget in budgets])
            steps = _row(report, KINDS[kind][0], budgets[0])["steps"]
            axes.set_title(f"{kind}, {steps:,} steps", loc="left", fontsize=10)
            finish(axes)
        axes_of_kind[0].set_ylabel("one model minus specialist, points")
    grid[0][0].legend(frameon=False)
    save_figure(figure, path)


WHO = ("one", "specialists")


def _row(report: Mapping[str, Any], name: str, budget: Budget) -> Mapping[str, Any]:
    return report["regimes"][f"{name}-{budget.name}"]


def _budget_cells(report: Mapping[str, Any], budget: Budget) -> list[str]:
    row = _row(report, "stochastic", budget)
    views = "1" if budget.canvases is None else f"{row['views'] / budget.canvases:.0f}"
    return [budget.data.removesuffix(" canvases"), f"{row['steps']:,}", views]


def _accuracy_rows(
    report: Mapping[str, Any], kind: str, budget: Budget
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield model, asked canvases and accuracies at the counts."""
    general, specialists = KINDS[kind]
    for who, names in zip(WHO, ([general] * len(specialists), specialists), strict=True):
        for where, of in (("unseen", "accuracy"), ("trained", "trained_accuracy")):
            yield (
                who,
                where,
                [
                    points(_row(report, name, budget)[of][count])
                    for name, count in zip(names, report["counts"], strict=True)
                ],
            )


def _generalisation_gap(
    report: Mapping[str, Any], kind: str, budget: Budget, who: str
) -> dict[str, Any]:
    """Return accuracy on training canvases minus that on unseen ones, the mean over counts."""
    general, specialists = KINDS[kind]
    names = [general] * len(specialists) if who == "one" else specialists
    by_count = []
    for name, count in zip(names, report["counts"], strict=True):
        row = _row(report, name, budget)
        trained, unseen = (row[of][count]["values"] for of in ("trained_accuracy", "accuracy"))
        by_count.append([a - b for a, b in zip(trained, unseen, strict=True)])
    return spread_of([sum(values) / len(values) for values in zip(*by_count, strict=True)])


def _gap_cells(report: Mapping[str, Any], budget: Budget) -> list[str]:
    return [
        points(_generalisation_gap(report, kind, budget, who), signed=True)
        for kind in KINDS
        for who in WHO
    ]


def _verdicts(report: Mapping[str, Any], kind: str) -> Iterator[str]:
    """Say for each budget at which counts the one model is ahead, level or behind.

    Level: the mean over seeds is no further from 0 than its standard error.
    """
    for budget in BUDGETS:
        words: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
        for count, gain in gains(report, kind, budget).items():
            error = (gain["spread"] or 0.0) / len(gain["values"]) ** 0.5
            word = "level" if abs(gain["mean"]) <= error else "behind"
            word = "ahead" if gain["mean"] > error else word
            words[word].append(f"{count} ({100 * gain['mean']:+.1f})")
        steps = _row(report, "stochastic", budget)["steps"]
        said = "; ".join(f"{word} at {', '.join(at)}" for word, at in words.items() if at)
        yield f"{budget.data}, {steps:,} steps: {said}."


def _regularisation(report: Mapping[str, Any]) -> str:
    """Say where the one model is better on unseen canvases although not on trained ones."""
    lines = []
    for kind in KINDS:
        ahead, not_on_trained = 0, 0
        smaller = 0
        for budget in BUDGETS:
            unseen = gains(report, kind, budget)
            trained = gains(report, kind, budget, "trained_accuracy")
            for count, gain in unseen.items():
                ahead += gain["mean"] > 0
                not_on_trained += gain["mean"] > 0 >= trained[count]["mean"]
            one, specialists = (
                _generalisation_gap(report, kind, budget, who)["mean"] for who in WHO
            )
            smaller += one < specialists
        lines.append(
            f"- {kind}: the one model's difference is the smaller one on {smaller} of "
            f"{len(BUDGETS)} budgets. It is ahead on unseen canvases in {ahead} of "
            f"{len(BUDGETS) * len(report['counts'])} comparisons, in {not_on_trained} of them "
            "although it is not ahead on the training canvases."
        )
    return "\n".join(lines)
