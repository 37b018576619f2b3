"""``gap.md``: what brings one model up to the specialists, and what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.ablation import paper
from experiments.ablation.results import difference
from experiments.ablation.suites import LEVERS, Lever
from experiments.ablation.tables import asked_and_seeds, markdown_table, points
from tokenflex.plots import plt, save_figure

COLOURS = ("#e07b39", "#4c9f70", "#b5495b")  # at the small, middle and large count


def gains(report: Mapping[str, Any], lever: Lever) -> dict[str, dict[str, Any]]:
    """Count -> accuracy of the one model minus that of the count's specialist, paired by seed."""
    # A lever without a specialist at a count compares only at those before it.
    pairs = zip(report["counts"], lever.specialists, strict=False)
    return {count: difference(report, lever.one, name, count) for count, name in pairs}


def format_gap(report: Mapping[str, Any]) -> str:
    """The whole page, from what :func:`experiments.ablation.results.collect` returns."""
    counts = report["counts"]
    head = ["what was done", *(f"at {count}" for count in counts)]
    seen = "vision tokens, one : specialists"
    found = {lever.title: gains(report, lever) for lever in LEVERS}
    differences = [
        [
            lever.title,
            *_filled([points(gain, signed=True) for gain in found[lever.title].values()], counts),
            _tokens(report, lever),
        ]
        for lever in LEVERS
    ]
    accuracies = []
    for lever in LEVERS:
        one = report["regimes"][lever.one]["accuracy"]
        own = [
            points(report["regimes"][name]["accuracy"][count])
            for count, name in zip(counts, lever.specialists, strict=False)
        ]
        accuracies.append([lever.title, "one", *(points(one[count]) for count in counts)])
        accuracies.append([lever.title, "specialists", *_filled(own, counts)])
    sections = [
        f"# One model beside the specialists, scale {report['scale']}",
        asked_and_seeds(report),
        "The paper has its one model ahead of each specialist at the specialist's own count, by "
        f"{', '.join(paper.gains())} points in its table (second-hand). Here, the one model minus "
        "the specialist, paired by seed, in points:",
        markdown_table([*head, seen], differences),
        _verdict(found),
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
    """Every lever's differences, with their standard deviations over seeds."""
    counts = report["counts"]
    figure, axes = plt.subplots(figsize=(9.0, 0.55 * len(LEVERS) + 1.2), layout="constrained")
    for place, (count, colour) in enumerate(zip(counts, COLOURS, strict=True)):
        rows = [
            (row, gain)
            for row, lever in enumerate(LEVERS)
            for asked, gain in gains(report, lever).items()
            if asked == count
        ]
        axes.errorbar(
            [100 * gain["mean"] for _, gain in rows],
            [row + 0.2 * (place - 1) for row, _ in rows],
            xerr=[100 * (gain["spread"] or 0.0) for _, gain in rows],
            fmt="o",
            color=colour,
            elinewidth=1,
            label=f"at {count} tokens",
        )
    axes.axvline(0, color="#777777", linewidth=1)
    axes.set_yticks(range(len(LEVERS)), [lever.title for lever in LEVERS])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy of the one model minus the specialist's, points")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    save_figure(figure, path)


def _verdict(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """In words: where the one model is ahead, and how far behind it is at most."""
    lines = []
    for title, gain in found.items():
        means = {count: 100 * one["mean"] for count, one in gain.items()}
        ahead = [f"{count} ({mean:+.1f})" for count, mean in means.items() if mean > 0]
        worst = min(means, key=means.__getitem__)
        line = f"- {title}: "
        if means[worst] > 0:
            line += "ahead at every count that was compared"
        else:
            line += f"behind by at most {-means[worst]:.1f}, at {worst}"
            line += f"; ahead at {', '.join(ahead)}" if ahead else "; ahead at none"
        lines.append(line + ".")
    return "\n".join(lines)


def _filled(cells: Sequence[str], counts: Sequence[str]) -> list[str]:
    return [*cells, *["-"] * (len(counts) - len(cells))]


def _tokens(report: Mapping[str, Any], lever: Lever) -> str:
    one = report["regimes"][lever.one]["vision_tokens"]["mean"]
    several = sum(report["regimes"][name]["vision_tokens"]["mean"] for name in lever.specialists)
    return f"{one / 1000:,.0f}k : {several / 1000:,.0f}k"
