"""Run a harness at every count for the same benchmarks, and merge its results into one table."""

from __future__ import annotations

import importlib
import runpy
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from tokenflex.routing.policies import policy_names

HARNESSES = ("lmms-eval", "vlmevalkit")

_LMMS_EVAL = ("lmms-eval", "pip install lmms-eval")
_VLMEVALKIT = ("VLMEvalKit", "install VLMEvalKit (github.com/open-compass/VLMEvalKit)")

# Options of VLMEvalKit's script that run_vlmevalkit sets.
_SET_FOR_VLMEVALKIT = ("--model", "--data", "--work-dir")


class HarnessError(Exception):
    """A failure of a harness. The message is one line, the cause is the harness's exception.

    Args:
        exit_code: Of the harness if it ended the process, else 2.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def _failures_of(harness: str, doing: str) -> Iterator[None]:
    """Convert any exception of a harness to a :class:`HarnessError`."""
    try:
        yield
    except SystemExit as stop:
        if stop.code is None or stop.code == 0:
            return
        code = stop.code if isinstance(stop.code, int) else 1
        message = "" if isinstance(stop.code, int) else f": {_in_one_line(stop.code)}"
        raise HarnessError(
            f"{harness} ended {doing} with exit code {code}{message}", code
        ) from stop
    except ModuleNotFoundError as error:
        raise HarnessError(f"{harness} failed {doing}: it needs {error.name}") from error
    except Exception as error:
        message = f"{type(error).__name__}: {_in_one_line(error)}".removesuffix(": ")
        raise HarnessError(f"{harness} failed {doing}: {message}") from error


def _in_one_line(message: object) -> str:
    return textwrap.shorten(str(message), 300, placeholder=" ...")


def _load(module: str, harness: str, install: str) -> Any:
    """Import a module of a harness; ``install`` is the hint of the error if it is missing."""
    try:
        with _failures_of(harness, "to load"):
            return importlib.import_module(module)
    except HarnessError as error:
        missing = getattr(error.__cause__, "name", None) or ""
        if missing.partition(".")[0] == module.partition(".")[0]:
            raise ImportError(f"this needs {missing}: {install}") from error.__cause__
        raise


def count_names(counts: Sequence[int | str]) -> list[str]:
    """Check counts, and return their names in tables.

    Args:
        counts: ``64``, ``"12x16"`` or ``"auto"``.

    Raises:
        ValueError: A count is not valid, or given twice.
    """
    names = [
        count if count in policy_names() else label_of(parse_count(count, name="counts"))
        for count in counts
    ]
    if not names or len({*names}) < len(names):
        raise ValueError(f"counts must be one or more, all different, got {', '.join(names)}")
    return names


def every_count(run: Callable[[str], Scores], counts: Sequence[int | str]) -> dict[str, Scores]:
    """Call ``run`` with the name of each count, and return its scores by that name.

    Args:
        run: Runs all benchmarks at one count; returns benchmark -> metric -> score.
        counts: As :func:`count_names` takes them. All are checked first.
    """
    return {name: run(name) for name in count_names(counts)}


def run_lmms_eval(
    checkpoint: str | Path,
    counts: Sequence[int | str],
    tasks: Sequence[str],
    *,
    max_tiles: int | None = None,
    include_path: Sequence[str | Path] = (),
    simple_evaluate: Callable[..., Mapping[str, Any]] | None = None,
    **options: Any,
) -> CountTable:
    """Run tasks of lmms-eval at every count. The checkpoint is loaded again for each.

    Args:
        checkpoint: Checkpoint folder.
        counts: As :func:`count_names` takes them.
        tasks: Names of lmms-eval's tasks, or of those in ``include_path``.
        max_tiles: Most tiles of an image, at every count.
        include_path: Folders with further tasks.
        simple_evaluate: ``lmms_eval.evaluator.simple_evaluate`` by default.
        **options: Options of it, for example ``batch_size`` or ``limit``.

    Raises:
        HarnessError: lmms-eval failed.
        ImportError: lmms-eval is not installed.
        NotADirectoryError: A folder of ``include_path`` does not exist.
        ValueError: lmms-eval's syntax cannot hold the path, or a task or a count is unknown.
    """
    if set(",='\"{}") & set(str(checkpoint)):
        raise ValueError(
            f"checkpoint must be a path without commas, equal signs, quotes and braces for "
            f"lmms-eval's model_args, got {str(checkpoint)!r}"
        )
    count_names(counts)  # lmms-eval takes seconds to load
    evaluate = simple_evaluate or _load("lmms_eval.evaluator", *_LMMS_EVAL).simple_evaluate
    if simple_evaluate is None or include_path:
        options["task_manager"] = _task_manager(tasks, include_path)
    tiles = "" if max_tiles is None else f",max_tiles={max_tiles}"
    groups: set[str] = set()

    def run(count: str) -> Scores:
        arguments = f"pretrained={checkpoint},tokens={count}{tiles}"
        with _failures_of("lmms-eval", f"at {count} tokens"):
            results = evaluate(
                model="tokenflex", model_args=arguments, tasks=list(tasks), **options
            )
        results = results or {"results": {}}  # only the first of several processes has results
        members = results.get("group_subtasks", {})
        groups.update(name for name, subtasks in members.items() if subtasks)
        return lmms_eval_scores(results)

    scores = every_count(run, counts)
    # The row of a group may be empty: its tasks have rows.
    return merge(scores, [task for task in tasks if task not in groups])


def _task_manager(tasks: Sequence[str], include_path: Sequence[str | Path]) -> Any:
    """Return lmms-eval's index of tasks, which holds ``tasks``."""
    folders = [str(folder) for folder in include_path]
    for folder in folders:
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"include_path must name folders, got {folder!r}")
    TaskManager = _load("lmms_eval.tasks", *_LMMS_EVAL).TaskManager
    with _failures_of("lmms-eval", "to index its tasks"):
        manager = TaskManager(include_path=folders, model_name="tokenflex")
        unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lmms-eval knows no task {', '.join(unknown)}: `lmms-eval --tasks list` names its "
            "tasks, and --include-path adds a folder with your own"
        )
    return manager


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
    """Run benchmarks of VLMEvalKit at every count, by its own ``run.py`` in this process.

    Args:
        checkpoint: Checkpoint folder.
        counts: As :func:`count_names` takes them.
        benchmarks: VLMEvalKit's names.
        run_py: The script in a copy of VLMEvalKit.
        work_dir: Its output folder, which must be empty unless ``arguments`` hold ``--reuse``: an
            old score could replace that of a failed run.
        max_tiles: Most tiles of an image, at every count.
        arguments: Further arguments of the script, for example ``["--judge", "exact_matching"]``.

    Raises:
        FileExistsError: ``work_dir`` holds results.
        FileNotFoundError: The script does not exist.
        HarnessError: The script failed, or ended the process with an exit code other than 0.
        ImportError: VLMEvalKit is not installed.
        ValueError: A count is not valid, or ``arguments`` hold an option that is set here.
    """
    if not run_py.is_file():
        raise FileNotFoundError(f"VLMEvalKit's script {run_py} does not exist")
    if work_dir.is_dir() and any(work_dir.iterdir()) and "--reuse" not in arguments:
        raise FileExistsError(
            f"{work_dir} holds results already: name another folder, or give --reuse to continue"
        )
    for argument in arguments:
        if argument.partition("=")[0] in _SET_FOR_VLMEVALKIT:
            raise ValueError(
                f"arguments must not hold {argument}: {', '.join(_SET_FOR_VLMEVALKIT)} are the "
                "checkpoint at each count, the benchmarks and the output folder"
            )
    count_names(counts)
    _load("vlmeval.config", *_VLMEVALKIT)
    from tokenflex.harnesses.vlmevalkit import register

    def run(count: str) -> Scores:
        (name,) = register(checkpoint, [count], max_tiles=max_tiles)
        command = [str(run_py), "--model", name, "--data", *benchmarks]
        before, sys.argv = sys.argv, [*command, "--work-dir", str(work_dir), *arguments]
        try:
            with _failures_of("VLMEvalKit", f"at {count} tokens"):
                runpy.run_path(str(run_py), run_name="__main__")
        finally:
            sys.argv = before
        return vlmevalkit_scores(work_dir / name, name, benchmarks)

    return merge(every_count(run, counts), benchmarks)
