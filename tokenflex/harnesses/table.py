"""One table of benchmarks by counts, from what a harness says of each count."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenflex.files import read_json

MISSING = "missing"


@dataclass(frozen=True)
class Score:
    """A benchmark's number, and its standard error where the harness gives one."""

    value: float
    standard_error: float | None = None


Scores = Mapping[str, Mapping[str, Score]]  # benchmark -> metric -> score


@dataclass(frozen=True)
class CountTable:
    """Every metric of every benchmark at every count.

    Attributes:
        counts: the columns.
        rows: (benchmark, metric) -> count -> score; a count that gave none has no entry.
    """

    counts: list[str]
    rows: dict[tuple[str, str], dict[str, Score]]

    @property
    def missing(self) -> list[tuple[str, str, str]]:
        """(benchmark, metric, count) of each hole: a run that failed must not pass unseen."""
        return [
            (benchmark, metric, count)
            for (benchmark, metric), row in self.rows.items()
            for count in self.counts
            if count not in row
        ]

    def markdown(self) -> str:
        """The table as Markdown; holes are named as such."""
        lines = [f"| benchmark | metric | {' | '.join(self.counts)} |"]
        lines.append("|---|---" + "|---" * len(self.counts) + "|")
        for (benchmark, metric), row in self.rows.items():
            cells = [_cell(row.get(count)) for count in self.counts]
            lines.append(f"| {benchmark} | {metric} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def as_json(self) -> list[dict[str, Any]]:
        """One record a number, ``value`` None where it is missing."""
        return [
            {
                "benchmark": benchmark,
                "metric": metric,
                "count": count,
                "value": row[count].value if count in row else None,
                "standard_error": row[count].standard_error if count in row else None,
            }
            for (benchmark, metric), row in self.rows.items()
            for count in self.counts
        ]


def merge(scores: Mapping[str, Scores], benchmarks: Sequence[str] = ()) -> CountTable:
    """One table from the scores at each count.

    Args:
        scores: count -> benchmark -> metric -> score.
        benchmarks: those that were asked for: one without any score gets a row of holes.
    """
    rows: dict[tuple[str, str], dict[str, Score]] = {}
    for count, by_benchmark in scores.items():
        for benchmark, metrics in by_benchmark.items():
            for metric, score in metrics.items():
                rows.setdefault((benchmark, metric), {})[count] = score
    known = {benchmark for benchmark, _ in rows}
    rows |= {(benchmark, "-"): {} for benchmark in benchmarks if benchmark not in known}
    return CountTable(list(scores), dict(sorted(rows.items())))


def lmms_eval_scores(results: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    """Scores from what ``lmms_eval.evaluator.simple_evaluate`` returns, or its results file holds.

    Keys are ``metric,filter`` and ``metric_stderr,filter``; all else is not a score, other
    standard errors (``metric_stderr_clt``) least of all.
    """
    scores: dict[str, dict[str, Score]] = {}
    for task, values in results["results"].items():
        found = {}
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or "_stderr" in metric or not _is_number(value):
                continue
            error = values.get(f"{metric}_stderr,{name}")
            label = metric if name == "none" else f"{metric} ({name})"
            found[label] = Score(float(value), float(error) if _is_number(error) else None)
        if found:
            scores[task] = found
    return scores


def vlmevalkit_scores(folder: Path, model: str, benchmarks: Sequence[str]) -> dict[str, Any]:
    """Scores from the ``*acc.csv`` and ``*score.csv``/``.json`` files of one model's folder.

    Which numbers there are is each benchmark's own affair; all are taken, named by the cells of
    their row and their column.

    Args:
        folder: the model's folder in VLMEvalKit's work directory.
        model: its name.
        benchmarks: those that were run.
    """
    scores: dict[str, dict[str, Score]] = {}
    for path in sorted(folder.glob(f"{model}_*")):
        if not re.search(r"(acc|score)\.(csv|json)$", path.name):
            continue
        rest = path.name.removeprefix(f"{model}_")
        # MMBench_DEV_EN_V11's files begin like MMBench_DEV_EN's.
        owners = [one for one in benchmarks if rest.startswith(f"{one}_")]
        if owners:
            if path.suffix == ".json":
                numbers = _numbers_of_json(read_json(path, "result file"))
            else:
                numbers = _numbers_of_csv(path.read_text(encoding="utf-8"))
            scores.setdefault(max(owners, key=len), {}).update(numbers)
    return scores


def _numbers_of_csv(text: str) -> dict[str, Score]:
    rows = [*csv.DictReader(text.splitlines())]
    numbers = {}
    for row in rows:
        values = {column: _number(cell) for column, cell in row.items()}
        names = [str(row[column]) for column, value in values.items() if value is None]
        prefix = " ".join(name for name in names if name) if len(rows) > 1 else ""
        for column, value in values.items():
            if value is not None and column:
                numbers[f"{prefix} {column}".strip()] = Score(value)
    return numbers


def _numbers_of_json(values: Any) -> dict[str, Score]:
    if not isinstance(values, dict):
        return {}
    return {key: Score(float(value)) for key, value in values.items() if _is_number(value)}


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    if isinstance(value, int):  # one that no float holds is no score
        return not isinstance(value, bool) and value.bit_length() < 1024
    return isinstance(value, float)


def _cell(score: Score | None) -> str:
    if score is None:
        return MISSING
    error = "" if score.standard_error is None else f" ± {score.standard_error:.4g}"
    return f"{score.value:.4g}{error}"
