"""Reports of evaluations: a table in the terminal, and a folder with a page, JSON and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenflex.evaluation.baselines import OURS
from tokenflex.evaluation.scoring import FORCED
from tokenflex.files import check_replaceable, write_json, write_text
from tokenflex.terminal import text_table

_KEYS = ("accuracy", "questions")
NAME_WIDTH, CELL_WIDTH = 16, 6
"""Least characters of a row's name and of its numbers."""


def format_table(report: dict[str, Any]) -> str:
    """Format a report, of an evaluation or a training run, for the terminal."""
    labels = list(report["accuracy"])
    parts = [_table([("vision tokens", labels), *_rows(report, labels)])]
    if "questions" in report:
        parts.append(_questions(report))
    rows: list[tuple[str, list[str]]] = []
    for name, cells in [*_baseline_rows(report), ("", [])]:
        if cells:
            rows.append((name, cells))
            continue
        if rows:
            parts.append(_table(rows))
        if name:
            parts.append(f"\n{name}")
        rows = []
    return "\n".join(parts)


def format_markdown(report: dict[str, Any], title: str) -> str:
    """Format a report as a Markdown page."""
    labels = list(report["accuracy"])
    lines = [f"# {title}", "", f"| vision tokens | {' | '.join(labels)} |"]
    lines.append("|---" * (len(labels) + 1) + "|")
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in _rows(report, labels)]
    lines += ["", f"{_questions(report)}. {_EXPLANATION}"]
    if report["score"] == FORCED:
        lines.append("An answer is right when greedy generation would give exactly it.")
    else:
        lines.append(f"Answers are generated greedily and compared by the rule {report['score']}.")
    lines += ["", "![Accuracy against vision tokens per image](accuracy.png)", ""]
    if "baselines" in report:
        lines += _baseline_page(report)
    return "\n".join(lines)


def check_output(output: Path) -> None:
    """Check that :func:`write_report` replaces files of reports only.

    Raises:
        FileExistsError: A file of something else exists.
    """
    if output.suffix == ".json":
        check_replaceable(output, _KEYS)
    else:
        others = (output / "report.md", output / "accuracy.png", output / "baselines.png")
        check_replaceable(output / "report.json", _KEYS, others)


def write_report(output: Path, report: dict[str, Any], title: str) -> None:
    """Write a ``.json`` file, or ``report.json``, ``report.md`` and ``accuracy.png`` in a folder.

    Baselines have a plot of their own, ``baselines.png``. Each file is written atomically.

    Raises:
        OSError: The files cannot be written, or would replace a file of something else.
    """
    from tokenflex.plots import plot_accuracy, plot_baselines

    check_output(output)
    if output.suffix == ".json":
        write_json(output, report)
        return
    plot_accuracy(report, output / "accuracy.png")
    if "baselines" in report:
        plot_baselines(report, output / "baselines.png")
    else:  # that of a report before
        (output / "baselines.png").unlink(missing_ok=True)
    page = format_markdown(report, title)
    write_text(output / "report.md", page)
    write_json(output / "report.json", report)


_EXPLANATION = (
    "`mean` is the mean over kinds, and so are the tokens; its standard error allows for questions "
    "that share images. "
    "Seconds include encoding, as if each count were asked alone."
)
_MEASURES = (
    ("standard error", "standard_error", "{:.3f}"),
    ("tokens/image", "vision_tokens_per_image", "{:.1f}"),
    ("tokens/question", "vision_tokens_per_question", "{:.1f}"),
    ("seconds", "evaluation_seconds", "{:.1f}"),
)


def _rows(report: dict[str, Any], labels: list[str]) -> list[tuple[str, list[str]]]:
    rows = [
        (kind or "all", [f"{row[label]:.3f}" for label in labels])
        for kind, row in report["accuracy_by_kind"].items()
    ]
    rows.append(("mean", [f"{report['accuracy'][label]:.3f}" for label in labels]))
    for name, key, form in _MEASURES:
        if key in report:
            values = [report[key][label] for label in labels]
            rows.append((name, ["-" if value is None else form.format(value) for value in values]))
    return rows


def _baseline_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the rows of the baselines' tables; a row without cells is the title of the next."""
    baselines = report.get("baselines")
    if baselines is None:
        return []
    difficult = baselines["difficult"]
    labels = list(difficult["questions"])
    rows: list[tuple[str, list[str]]] = []
    if labels:
        rows += [("baselines, without training", []), ("vision tokens", labels)]
        rows += [(OURS, [f"{report['accuracy'][label]:.3f}" for label in labels])]
        rows += _shares(baselines, labels)
        rows += [(_title_of_difficult(baselines), []), ("vision tokens", labels)]
        rows += [("questions", [f"{difficult['questions'][label]}" for label in labels])]
        rows += _shares(difficult, labels)
    rows += [(f"left out: {name}: {why}", []) for name, why in baselines["left_out"].items()]
    return rows


def _shares(shares: dict[str, Any], labels: list[str]) -> list[tuple[str, list[str]]]:
    """Return a row of accuracies and one of their standard errors for each method."""
    rows = []
    for method, accuracy in shares["accuracy"].items():
        errors = shares["standard_error"][method]
        for name, row in ((method, accuracy), ("  standard error", errors)):
            values = [row.get(label) for label in labels]
            rows.append((name, ["-" if value is None else f"{value:.3f}" for value in values]))
    return rows


def _title_of_difficult(baselines: dict[str, Any]) -> str:
    full = baselines["full"]
    return f"difficult questions: right at {full} tokens, wrong in every resized picture"


def _baseline_page(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, cells in _baseline_rows(report):
        if not cells:
            lines += ["", f"{name[0].upper()}{name[1:]}", ""]
        else:
            lines.append(f"| {name.strip()} | {' | '.join(cells)} |")
            if name == "vision tokens":
                lines.append("|---" * (len(cells) + 1) + "|")
    full = report["baselines"]["full"]
    return [
        "## Baselines",
        *lines,
        "",
        f"The sides of `resized` pictures are shorter as those of the tokens' grid are; "
        f"`enlarged` ones have as little detail and cost {full} tokens; `strided` and `random` "
        f"keep some of the {full} tokens, and `pooled` averages them. No question is difficult "
        "where resizing cannot run; those that are count alike, whatever their kind.",
        "",
        "![Accuracy of the baselines](baselines.png)",
        "",
    ]


def _table(rows: list[tuple[str, list[str]]]) -> str:
    widths = [NAME_WIDTH, *[CELL_WIDTH] * len(rows[0][1])]
    return text_table([[name, *cells] for name, cells in rows], widths=widths)


def _questions(report: dict[str, Any]) -> str:
    by_kind = {kind: number for kind, number in report["questions"].items() if kind}
    named = ", ".join(f"{kind} {number}" for kind, number in by_kind.items())
    total = f"{sum(report['questions'].values())} questions"
    if "samples" in report:
        total += f" about {report['samples']} samples"
    return f"{total} ({named})" if named else total
