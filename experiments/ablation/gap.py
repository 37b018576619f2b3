"""``gap.md``: measures that bring one model up to the specialists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.ablation import paper
from experiments.ablation.figures import draw_gains
from experiments.ablation.results import PLACES_EXPLAINED, difference, places_of
from experiments.ablation.suites import LEVERS, Lever
from experiments.ablation.tables import asked_and_seeds, markdown_table, points
from tokenflex.plots import finish, plt, save_figure


def gains(report: Mapping[str, Any], lever: Lever) -> dict[str, dict[str, Any]]:
    """Return by count the accuracy of the one model minus that of the specialist, by seed."""
    # Where no specialist exists at larger counts, only the smaller counts are compared.
    pairs = zip(report["counts"], lever.specialists, strict=False)
    return {count: difference(report, lever.general, name, count) for count, name in pairs}


def format_gap(report: Mapping[str, Any]) -> str:
    """Format the page of a report of :func:`experiments.ablation.results.collect`."""
    counts, regimes = report["counts"], report["regimes"]
    head = ["what was done", *(f"at {count}" for count in counts)]
    by_lever = {lever.title: gains(report, lever) for lever in LEVERS}
    differences, accuracies = [], []
    for lever in LEVERS:
        shown = [points(gain, signed=True) for gain in by_lever[lever.title].values()]
        differences.append([lever.title, *_filled(shown, counts), _tokens(report, lever)])
        accuracy = regimes[lever.general]["accuracy"]
        specialists = [
            points(regimes[name]["accuracy"][count])
            for count, name in zip(counts, lever.specialists, strict=False)
        ]
        accuracies.append([lever.title, "one", *(points(accuracy[count]) for count in counts)])
        accuracies.append([lever.title, "specialists", *_filled(specialists, counts)])
    sections = [
        f"# One model beside the specialists, scale {report['scale']}",
        asked_and_seeds(report),
        "The paper has its one model ahead of each specialist at the specialist's own count, by "
        f"{', '.join(paper.gains())} points in its table (second-hand). Here, the one model minus "
        "the specialist, paired by seed, in points:",
        markdown_table([*head, "vision tokens, one : specialists"], differences),
        PLACES_EXPLAINED,
        "\n".join(f"- {title}: {places_of(gain)}." for title, gain in by_lever.items()),
        "![One model minus the specialist](gap.png)",
        "## Accuracies",
        markdown_table([*head[:1], "", *head[1:]], accuracies),
        "Specialists are three models, each trained and asked at its own count alone. Vision "
        "tokens are those of the regime's own stage, of the one model and of the specialists "
        "it is compared with together, those that a teacher sees (KL) included; steps and images "
        "shown are the same for both where nothing else is said.",
    ]
    return "\n\n".join(sections) + "\n"


def write_gap_figure(report: Mapping[str, Any], path: Path) -> None:
    """Draw the differences of every lever, with their standard deviations over seeds."""
    figure, axes = plt.subplots(figsize=(9.0, 0.55 * len(LEVERS) + 1.2), layout="constrained")
    by_lever = [gains(report, lever) for lever in LEVERS]
    draw_gains(axes, report["counts"], by_lever, sideways=True)
    axes.axvline(0, color="#777777", linewidth=1)
    axes.set_yticks(range(len(LEVERS)), [lever.title for lever in LEVERS])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy of the one model minus the specialist's, points")
    finish(axes, grid="x")
    axes.legend(frameon=False, loc="upper right")
    save_figure(figure, path)


def _filled(cells: Sequence[str], counts: Sequence[str]) -> list[str]:
    return [*cells, *["-"] * (len(counts) - len(cells))]


def _tokens(report: Mapping[str, Any], lever: Lever) -> str:
    tokens = {name: row["vision_tokens"]["mean"] for name, row in report["regimes"].items()}
    specialists = sum(tokens[name] for name in lever.specialists)
    return f"{tokens[lever.general] / 1000:,.0f}k : {specialists / 1000:,.0f}k"
