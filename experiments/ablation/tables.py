"""Parts of an ablation's pages: figures in points, tables, and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from tokenflex.terminal import text_table


def points(spread: Mapping[str, Any], *, signed: bool = False) -> str:
    """Format mean and standard deviation (if any) in percentage points."""
    mean = f"{100 * spread['mean']:{'+' if signed else ''}.1f}"
    return mean if spread["spread"] is None else f"{mean} ± {100 * spread['spread']:.1f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_rows(
    report: Mapping[str, Any], names: Sequence[str], counts: Sequence[str]
) -> list[list[str]]:
    """Return title and accuracies of each regime."""
    rows = [report["regimes"][name] for name in names]
    return [[row["title"], *(points(row["accuracy"][count]) for count in counts)] for row in rows]


def accuracy_table(report: Mapping[str, Any]) -> str:
    """Format the accuracy of every regime at every count for a terminal."""
    counts = [*report["counts"], *report["unseen"]]
    rows = [
        ["trained with, asked at", *counts],
        *accuracy_rows(report, [*report["regimes"]], counts),
    ]
    return text_table(rows)


def starts_of(report: Mapping[str, Any]) -> list[str]:
    """Return the names of the starts."""
    return [name for name, row in report["regimes"].items() if row["is_start"]]


def task_of(report: Mapping[str, Any]) -> str:
    """Return the name of the task; reports of earlier versions, all of digits, do not say."""
    return report.get("task", "digits")


def asked_and_seeds(report: Mapping[str, Any]) -> str:
    """Describe the questions, the seeds and the standard error in words."""
    seeds, kinds = report["seeds"], report["questions"]
    shown, samples = {
        "digits": ("canvases of scans", "canvases"),
        "reading": ("pages", "samples"),
    }[task_of(report)]
    spread = "mean ± sample standard deviation over them" if len(seeds) > 1 else "no spread"
    return (
        f"{task_of(report).capitalize()} task, {shown} that training never saw (split `test`): "
        f"{report['samples']} {samples}, {sum(kinds.values())} questions. Accuracy is in percent, "
        f"the mean over the {len(kinds)} kinds of question. {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)} ({spread}). The questions alone leave a standard error of "
        f"at most {100 * report['standard_error']:.2f} points for one model."
    )


def nearest_trained(report: Mapping[str, Any], label: str) -> str:
    """Return the trained count with the nearest number of tokens: ``"9"`` for ``"3x4"``."""
    tokens = prod(map(int, label.split("x")))
    return min(report["counts"], key=lambda count: abs(int(count) - tokens))


def below_nearest(report: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return by unseen count the accuracy minus that at the nearest trained count."""
    accuracy = report["regimes"][name]["accuracy"]
    return {
        label: accuracy[label]["mean"] - accuracy[nearest_trained(report, label)]["mean"]
        for label in report["unseen"]
    }


def beside_nearest(report: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Format :func:`below_nearest` of regimes: a sentence, a table in points, and a list."""
    head = [f"{count} (to {nearest_trained(report, count)})" for count in report["unseen"]]
    rows = [
        [
            report["regimes"][name]["title"],
            *(f"{100 * gain:+.1f}" for gain in below_nearest(report, name).values()),
        ]
        for name in names
    ]
    return [
        "Beside the trained count that has the most like tokens, in points (means over seeds):",
        markdown_table(["trained with", *head], rows),
        "\n".join(f"- {nearest_sentence(report, name)}" for name in names),
    ]


def nearest_sentence(report: Mapping[str, Any], name: str, bound: float = 0.05) -> str:
    """Say at which unseen counts a regime is within ``bound`` of the nearest trained one."""
    below = below_nearest(report, name)
    near = [f"{label} ({100 * gain:+.1f})" for label, gain in below.items() if gain >= -bound]
    far = [f"{label} ({100 * gain:+.1f})" for label, gain in below.items() if gain < -bound]
    title = report["regimes"][name]["title"]
    said = f"{title}: at {len(near)} of {len(below)} within {100 * bound:.0f} points below it"
    return f"{said}, {', '.join(near) or 'none'}" + (f"; not at {', '.join(far)}." if far else ".")
