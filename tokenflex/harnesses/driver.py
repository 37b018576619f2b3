"""Run a harness at every count, for the same benchmarks, and merge what it says into one table."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenflex.counts import parse_count
from tokenflex.evaluation.counts import label_of
from tokenflex.harnesses.table import (
    CountTable,
    Scores,
    lmms_eval_scores,
    merge,
    vlmevalkit_scores,
)

HARNESSES = ("lmms-eval", "vlmevalkit")


def every_count(run: Callable[[str], Scores], counts: Sequence[int | str]) -> dict[str, Scores]:
    """``run(count)`` for each count, by the count's name.

    Args:
        run: runs all benchmarks at one count, and gives benchmark -> metric -> score.
        counts: ``64``, ``"12x16"`` or ``"auto"``; all are checked before the first is run.

    Raises:
        ValueError: a count is not valid, or named twice.
    """
    names = [
        count if count == "auto" else label_of(parse_count(count, name="counts"))
        for count in counts
    ]
    if not names or len({*names}) < len(names):
        raise ValueError(f"counts must be one or more, all different, got {', '.join(names)}")
    return {name: run(name) for name in names}


def run_lmms_eval(
    checkpoint: str | Path,
    counts: Sequence[int | str],
    tasks: Sequence[str],
    *,
    max_tiles: int | None = None,
    simple_evaluate: Callable[..., Mapping[str, Any]] | None = None,
    **options: Any,
) -> CountTable:
    """lmms-eval's tasks at every count, the checkpoint loaded anew for each.

    Args:
        checkpoint: checkpoint folder.
        counts: as :func:`every_count` takes them.
        tasks: lmms-eval's names.
        max_tiles: the same at every count.
        simple_evaluate: ``lmms_eval.evaluator.simple_evaluate`` if None.
        **options: for it, for example ``batch_size`` or ``limit``.

    Raises:
        ImportError: lmms-eval is not installed.
        ValueError: a path that lmms-eval's own syntax cannot hold.
    """
    if simple_evaluate is None:
        try:
            from lmms_eval.evaluator import simple_evaluate as lmms_evals_own
        except ModuleNotFoundError as error:
            raise ImportError(f"this needs {error.name}: pip install lmms-eval") from error
        simple_evaluate = lmms_evals_own
    if set(",='\"{}") & set(str(checkpoint)):
        raise ValueError(
            f"checkpoint must be a path without commas, equal signs, quotes and braces for "
            f"lmms-eval's model_args, got {str(checkpoint)!r}"
        )
    tiles = "" if max_tiles is None else f",max_tiles={max_tiles}"
    groups: set[str] = set()

    def run(count: str) -> Scores:
        arguments = f"pretrained={checkpoint},tokens={count}{tiles}"
        results = simple_evaluate(
            model="tokenflex", model_args=arguments, tasks=list(tasks), **options
        )
        results = results or {"results": {}}  # only the first of several processes gets them
        members = results.get("group_subtasks", {})
        groups.update(name for name, subtasks in members.items() if subtasks)
        return lmms_eval_scores(results)

    scores = every_count(run, counts)
    # A group's own row may be empty, for its tasks have theirs.
    return merge(scores, [task for task in tasks if task not in groups])


def run_vlmevalkit(
    checkpoint: str | Path,
    counts: Sequence[int | str],
    benchmarks: Sequence[str],
    *,
    run_py: Path,
    work_dir: Path,
    max_tiles: int | None = None,
    arguments: Sequence[str] = (),
) -> CountTable:
    """VLMEvalKit's benchmarks at every count, by its own ``run.py`` in this process.

    Args:
        checkpoint: checkpoint folder.
        counts: as :func:`every_count` takes them.
        benchmarks: VLMEvalKit's names.
        run_py: the script in a copy of VLMEvalKit.
        work_dir: where it writes; results that lie there already are refused, or an old score could
            stand in for one that failed, unless ``arguments`` say ``--reuse``.
        max_tiles: the same at every count and benchmark.
        arguments: more of the script's own, for example ``["--judge", "exact_matching"]``.

    Raises:
        FileExistsError: ``work_dir`` holds results already.
        FileNotFoundError: there is no such script.
        ImportError: VLMEvalKit is not installed.
    """
    if not run_py.is_file():
        raise FileNotFoundError(f"VLMEvalKit's script {run_py} does not exist")
    if work_dir.is_dir() and any(work_dir.iterdir()) and "--reuse" not in arguments:
        raise FileExistsError(
            f"{work_dir} holds results already: name another folder, or give --reuse to continue"
        )
    from tokenflex.harnesses.vlmevalkit import register

    def run(count: str) -> Scores:
        (name,) = register(checkpoint, [count], max_tiles=max_tiles)
        before, sys.argv = (
            sys.argv,
            [
                str(run_py),
                *("--model", name, "--data", *benchmarks, "--work-dir", str(work_dir), *arguments),
            ],
        )
        try:
            runpy.run_path(str(run_py), run_name="__main__")
        finally:
            sys.argv = before
        return vlmevalkit_scores(work_dir / name, name, benchmarks)

    return merge(every_count(run, counts), benchmarks)
