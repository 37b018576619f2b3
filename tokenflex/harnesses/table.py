"""One table of benchmarks by counts, from a harness's results at each count."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenflex.files import read_json
from tokenflex.terminal import text_table, width_of

MISSING = "missing"


@dataclass(frozen=True)
class Score:
    """The number of a benchmark, and its standard error if the harness reports one."""

    value: float
    standard_error: float | None = None

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4g}"
        return f"{self.value:.4g}{error}"


Scores = Mapping[str, Mapping[str, Score]]  # benchmark -> metric -> score


@dataclass(frozen=True)
class CountTable:
    """Every metric of every benchmark at every count.

    Attributes:
        counts: The columns.
        rows: (benchmark, metric) -> count -> score, without entries for missing scores.
    """

    counts: list[str]
    rows: dict[tuple[str, str], dict[str, Score]]

    @property
    def missing(self) -> list[tuple[str, str, str]]:
        """The benchmark, metric and count of each missing score."""
        return [
            (*row, count)
            for row, scores in self.rows.items()
            for count in self.counts
            if count not in scores
        ]

    def markdown(self) -> str:
        """Return the table as Markdown; missing scores are marked."""
        lines = [f"| benchmark | metric | {' | '.join(self.counts)} |"]
        lines.append("|---" * (2 + len(self.counts)) + "|")
        for row, scores in self.rows.items():
            cells = [str(scores.get(count, MISSING)) for count in self.counts]
            lines.append(f"| {' | '.join([*row, *cells])} |")
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        """Return the table for a terminal, where it is folded; else as Markdown."""
        if width_of(sys.stdout) is None:
            return self.markdown().rstrip("\n")
        head = ["benchmark", "metric", *self.counts]
        rows = [
            [*row, *(str(scores.get(count, MISSING)) for count in self.counts)]
            for row, scores in self.rows.items()
        ]
        return text_table([head, *rows], left=2)

    def as_json(self) -> list[dict[str, Any]]:
        """Return one record per score, with None for missing scores."""
        return [
            {
                "benchmark": benchmark,
                "metric": metric,
                "count": count,
                "value": scores[count].value if count in scores else None,
                "standard_error": scores[count].standard_error if count in scores else None,
            }
            for (benchmark, metric), scores in self.rows.items()
            for count in self.counts
        ]


def merge(scores: Mapping[str, Scores], benchmarks: Sequence[str] = ()) -> CountTable:
    """Merge the scores at each count into one table.

    Args:
        scores: Count -> benchmark -> metric -> score.
        benchmarks: The benchmarks that were run. One without any score gets an empty row.
    """
    rows: dict[tuple[str, str], dict[str, Score]] = {}
    for count, by_benchmark in scores.items():
        for benchmark, metrics in by_benchmark.items():
            for metric, score in metrics.items():
                rows.setdefault((benchmark, metric), {})[count] = score
    with_scores = {benchmark for benchmark, _ in rows}
    rows |= {(benchmark, "-"): {} for benchmark in benchmarks if benchmark not in with_scores}
    return CountTable(list(scores), dict(sorted(rows.items())))


def lmms_eval_scores(results: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    """Read scores from the results of ``lmms_eval.evaluator.simple_evaluate``, or its file.

    Keys of scores are ``metric,filter`` and ``metric_stderr,filter``. Other keys, such as
    ``metric_stderr_clt,filter``, are ignored.
    """
    scores: dict[str, dict[str, Score]] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or "_stderr" in metric or not _is_number(value):
                continue
            error = values.get(f"{metric}_stderr,{name}")
            label = metric if name == "none" else f"{metric} ({name})"
            score = Score(float(value), float(error) if _is_number(error) else None)
            scores.setdefault(task, {})[label] = score
    return scores


def vlmevalkit_scores(folder: Path, model: str, benchmarks: Sequence[str]) -> dict[str, Any]:
    """Read scores from the ``*acc.csv`` and ``*score.csv``/``.json`` files of a model's folder.

    Each benchmark has numbers of its own. All of them are read, and named by the cells of their
    row and by their column.

    Args:
        folder: The model's folder in VLMEvalKit's work directory.
        model: Its name.
        benchmarks: The benchmarks that were run.
    """
    scores: dict[str, dict[str, Score]] = {}
    for path in sorted(folder.glob(f"{model}_*")):
        if not re.search(r"(acc|score)\.(csv|json)$", path.name):
            continue
        rest = path.name.removeprefix(f"{model}_")
        # The files of MMBench_DEV_EN_V11 begin like those of MMBench_DEV_EN.
        owners = [benchmark for benchmark in benchmarks if rest.startswith(f"{benchmark}_")]
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
    if isinstance(value, int):  # that a float can hold
        return not isinstance(value, bool) and value.bit_length() < 1024
    return isinstance(value, float)
