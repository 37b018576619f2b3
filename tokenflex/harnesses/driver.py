"""Run a harness at every count, for the same benchmarks, and merge what it says into one table."""

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

# Options of VLMEvalKit's script that :func:`run_vlmevalkit` gives itself.
_GIVEN_TO_VLMEVALKIT = ("--model", "--data", "--work-dir")


class HarnessError(Exception):
    """A harness failed. The message is one line, the cause is the harness's own exception.

    Args:
        message: which harness failed at which count, and what it said.
        exit_code: of the harness where it ended the process, else 2.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def _failures_of(harness: str, doing: str) -> Iterator[None]:
    """Turn whatever a harness raises into a :class:`HarnessError`."""
    try:
        yield
    except SystemExit as stop:
        if stop.code is None or stop.code == 0:
            return
        code = stop.code if isinstance(stop.code, int) else 1
        said = "" if isinstance(stop.code, int) else f": {_in_one_line(stop.code)}"
        raise HarnessError(f"{harness} ended {doing} with exit code {code}{said}", code) from stop
    except ModuleNotFoundError as error:
        raise HarnessError(f"{harness} failed {doing}: it needs {error.name}") from error
    except Exception as error:
        said = f"{type(error).__name__}: {_in_one_line(error)}".removesuffix(": ")
        raise HarnessError(f"{harness} failed {doing}: {said}") from error


def _in_one_line(message: object) -> str:
    return textwrap.shorten(str(message), 300, placeholder=" ...")


def _load(module: str, harness: str, install: str) -> Any:
    """Import a module of a harness.

    Raises:
        HarnessError: the harness is installed and cannot be imported.
        ImportError: it is not installed; ``install`` says how to.
    """
    try:
        with _failures_of(harness, "to load"):
            return importlib.import_module(module)
    except HarnessError as error:
        missing = getattr(error.__cause__, "name", None) or ""
        if missing.partition(".")[0] == module.partition(".")[0]:
            raise ImportError(f"this needs {missing}: {install}") from error.__cause__
        raise


def count_names(counts: Sequence[int | str]) -> list[str]:
    """Return how tables name the counts, once all of them are valid.

    Args:
        counts: ``64``, ``"12x16"`` or ``"auto"``.

    Raises:
        ValueError: a count is not valid, or named twice.
    """
    names = [
        count if count in policy_names() else label_of(parse_count(count, name="counts"))
        for count in counts
    ]
    if not names or len({*names}) < len(names):
        raise ValueError(f"counts must be one or more, all different, got {', '.join(names)}")
    return names


def every_count(run: Callable[[str], Scores], counts: Sequence[int | str]) -> dict[str, Scores]:
    """``run(count)`` for each count, by the count's name.

    Args:
        run: runs all benchmarks at one count, and gives benchmark -> metric -> score.
        counts: as :func:`count_names` takes them; all are checked before the first is run.

    Raises:
        ValueError: a count is not valid, or named twice.
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
    """Run lmms-eval's tasks at every count, the checkpoint loaded anew for each.

    Args:
        checkpoint: checkpoint folder.
        counts: as :func:`every_count` takes them.
        tasks: lmms-eval's names, or those of the tasks in ``include_path``.
        max_tiles: the same at every count.
        include_path: folders with tasks of your own, searched beside lmms-eval's.
        simple_evaluate: ``lmms_eval.evaluator.simple_evaluate`` if None.
        **options: for it, for example ``batch_size`` or ``limit``.

    Raises:
        HarnessError: lmms-eval failed.
        ImportError: lmms-eval is not installed.
        NotADirectoryError: a folder of ``include_path`` does not exist.
        ValueError: a path that lmms-eval's own syntax cannot hold, or a task that it does not know.
    """
    if set(",='\"{}") & set(str(checkpoint)):
        raise ValueError(
            f"checkpoint must be a path without commas, equal signs, quotes and braces for "
            f"lmms-eval's model_args, got {str(checkpoint)!r}"
        )
    count_names(counts)  # before the seconds that lmms-eval takes to load
    if simple_evaluate is None:
        simple_evaluate = _load("lmms_eval.evaluator", *_LMMS_EVAL).simple_evaluate
        options["task_manager"] = _task_manager(tasks, include_path)
    elif include_path:
        options["task_manager"] = _task_manager(tasks, include_path)
    evaluate = simple_evaluate
    tiles = "" if max_tiles is None else f",max_tiles={max_tiles}"
    groups: set[str] = set()

    def run(count: str) -> Scores:
        arguments = f"pretrained={checkpoint},tokens={count}{tiles}"
        with _failures_of("lmms-eval", f"at {count} tokens"):
            results = evaluate(
                model="tokenflex", model_args=arguments, tasks=list(tasks), **options
            )
        results = results or {"results": {}}  # only the first of several processes gets them
        members = results.get("group_subtasks", {})
        groups.update(name for name, subtasks in members.items() if subtasks)
        return lmms_eval_scores(results)

    scores = every_count(run, counts)
    # A group's own row may be empty, for its tasks have theirs.
    return merge(scores, [task for task in tasks if task not in groups])


def _task_manager(tasks: Sequence[str], include_path: Sequence[str | Path]) -> Any:
    """lmms-eval's index of tasks, once it is known to hold ``tasks``."""
    for folder in include_path:
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"include_path must name folders, got {str(folder)!r}")
    TaskManager = _load("lmms_eval.tasks", *_LMMS_EVAL).TaskManager
    folders = [str(folder) for folder in include_path]
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
    """Run VLMEvalKit's benchmarks at every count, by its own ``run.py`` in this process.

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
        HarnessError: the script failed, or ended the process with an exit code other than 0.
        ImportError: VLMEvalKit is not installed.
        ValueError: ``arguments`` hold an option that is given by this function.
    """
    if not run_py.is_file():
        raise FileNotFoundError(f"VLMEvalKit's script {run_py} does not exist")
    if work_dir.is_dir() and any(work_dir.iterdir()) and "--reuse" not in arguments:
        raise FileExistsError(
            f"{work_dir} holds results already: name another folder, or give --reuse to continue"
        )
    for argument in arguments:
        if argument.partition("=")[0] in _GIVEN_TO_VLMEVALKIT:
            raise ValueError(
                f"arguments must not hold {argument}: {', '.join(_GIVEN_TO_VLMEVALKIT)} are the "
                "checkpoint at each count, the benchmarks and the output folder"
            )
    count_names(counts)
    _load("vlmeval.config", *_VLMEVALKIT)
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
            with _failures_of("VLMEvalKit", f"at {count} tokens"):
                runpy.run_path(str(run_py), run_name="__main__")
        finally:
            sys.argv = before
        return vlmevalkit_scores(work_dir / name, name, benchmarks)

    return merge(every_count(run, counts), benchmarks)
