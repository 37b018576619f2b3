"""``python -m tokenflex_kernels.tune``: measure the candidates on this GPU, write the table.

For each dtype, bfloat16 first:

1. The candidates of all stages are compiled, in parallel and without the GPU. A candidate that
   spills, or does not fit a multiprocessor, is left out.
2. The others are timed briefly, stage by stage, at three batch sizes. The fastest few of each size
   are finalists.
3. The finalists, and PyTorch's own product (cuBLAS) where a stage may use it, are timed at every
   batch size.

Calls are those of training at the reference shapes. float16 starts with the finalists of bfloat16.
The fastest whose result agrees with the first one's is written to ``launch_configs.json`` under the
GPU's architecture after each stage and dtype; stages that were not measured keep their configs.

Each time is appended to ``--csv`` when it is measured. Another call with that file, on the same GPU
with the same versions and kernels, measures what is missing. The exit status is 75 if ``--seconds``
ended before all was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenflex_kernels.candidates import candidate_configs
from tokenflex_kernels.checks import Grid
from tokenflex_kernels.journal import (
    LOST,
    UNFINISHED,
    DeviceLost,
    Journal,
    device_is_lost,
    restart,
    setting_of_gpu,
)
from tokenflex_kernels.launch_configs import (
    DTYPES,
    STAGES,
    TABLE_PATH,
    Config,
    architecture,
    fits_rows,
    nearest,
    parse_stage,
    read_table,
)
from tokenflex_kernels.options import names_of, output_file, time_limit
from tokenflex_kernels.precompile import Launch, build, reason_of, unfit
from tokenflex_kernels.stage_calls import rows_of_stage, stage_calls

# (images, tokens of each): from one small image to a training batch.
SIZES: tuple[tuple[int, Grid], ...] = (
    (1, (8, 8)),
    (1, (16, 16)),
    (2, (16, 16)),
    (4, (16, 16)),
    (8, (16, 16)),
    (16, (16, 16)),
    (64, (16, 16)),
    (128, (16, 16)),
)
BRIEF_SIZES = (SIZES[-1], SIZES[1], SIZES[4])
FINALISTS = 5  # of each of those sizes
BRIEF, FULL = "brief", "full"
MILLISECONDS = {BRIEF: (1, 4), FULL: (5, 20)}  # to warm up, and to measure
CLEARLY_FASTER = 0.98  # a challenger must be: otherwise neighbouring sizes flip between equals
SUM_LIMIT = 1e-2  # 2-norm: what another order of summing and rounding to 8 bits can explain
# stage -> dtype -> buckets, as the table has them.
Tuned = dict[str, dict[str, list[dict[str, Any]]]]


class Timing(NamedTuple):
    """The time of one candidate."""

    stage: str
    dtype: str
    rows: int  # 0 for a candidate that was left out after it was compiled
    config: Config | None
    microseconds: float  # NaN where the candidate did not run
    remark: str
    effort: str = FULL  # or ``BRIEF``


class OutOfTime(Exception):
    """The time limit has passed."""


class Gpu:
    """The GPU at hand, as the search needs it: it compiles, calls and times candidates."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.architecture = architecture(self.device)
        self.setting = setting_of_gpu()

    def left_out(self, launches: Sequence[Launch], seconds: float) -> Iterator[tuple[Launch, str]]:
        """Compile; yield each launch that was compiled, and why not to measure it, or ""."""
        for launch, built in build(self.architecture, launches, seconds=seconds):
            yield launch, unfit(self.architecture, built)

    def call(self, stage: str, dtype: str, images: int, out_grid: Grid) -> Callable[..., Any]:
        """Return a function of ``config`` that runs the stage."""
        return next(stage_calls(stage, DTYPES[dtype], images, out_grid, self.device))[1]

    def microseconds(self, run: Callable[[], Any], effort: str) -> float:
        """Return the median time of a call."""
        import triton

        warmup, rep = MILLISECONDS[effort]
        return 1000 * float(
            triton.testing.do_bench(run, warmup=warmup, rep=rep, return_mode="median")
        )

    def is_lost(self) -> bool:
        """Return whether an error has ended all use of the GPU by this process."""
        return device_is_lost()


class Times:
    """All times so far, those of earlier calls included."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._timings: dict[tuple[Any, ...], Timing] = {}
        for row in journal.rows:
            self._keep(_parse(row))
        if journal.lost:
            stage, dtype, config = json.loads(journal.lost)
            self.leave_out(stage, dtype, _config_of(stage, config), LOST)

    def _keep(self, timing: Timing) -> None:
        key = timing.stage, timing.dtype, timing.config, timing.rows, timing.effort
        self._timings[key] = timing

    def add(self, timing: Timing) -> None:
        self._keep(timing)
        values: dict[str, object] = timing._asdict() | {"config": _config_text(timing.config)}
        self._journal.add(*values.values())

    def leave_out(self, stage: str, dtype: str, config: Config | None, remark: str) -> None:
        """Keep a candidate from being measured at any size; "" says that it may be."""
        self.add(Timing(stage, dtype, 0, config, math.nan, remark, BRIEF))

    def find(
        self, stage: str, dtype: str, config: Config | None, rows: int, effort: str
    ) -> Timing | None:
        return self._timings.get((stage, dtype, config, rows, effort))

    def remark(self, stage: str, dtype: str, config: Config | None) -> str | None:
        """Return why a candidate was left out, "" for a good one, None for one not compiled."""
        timing = self.find(stage, dtype, config, 0, BRIEF)
        return None if timing is None else timing.remark

    def measure(
        self,
        gpu: Gpu,
        stage: str,
        dtype: str,
        size: tuple[int, Grid],
        candidates: Sequence[Config | None],
        effort: str,
        end: float,
    ) -> list[Timing]:
        """Time the candidates at one size; what fails or has another result gets a remark instead.

        Raises:
            OutOfTime: ``time.monotonic()`` passed ``end``.
            DeviceLost: a candidate ended all use of the GPU by this process.
        """
        rows = rows_of_stage(stage, *size)
        timings: list[Timing] = []
        call: Callable[..., Any] | None = None
        expected: list[torch.Tensor] | None = None
        for config in candidates:
            if not fits_rows(config, rows):
                continue
            timing = self.find(stage, dtype, config, rows, effort)
            if timing is None:
                if time.monotonic() > end:
                    raise OutOfTime
                call = call or gpu.call(stage, dtype, *size)
                name = json.dumps([stage, dtype, _config_text(config)])
                with self._journal.measuring(name):
                    if expected is None:
                        earlier = [done.config for done in timings if not done.remark]
                        expected = _first_results(call, [*earlier, config])
                    microseconds, remark = _time(gpu, call, config, expected, effort)
                timing = Timing(stage, dtype, rows, config, microseconds, remark, effort)
                self.add(timing)
                if remark and gpu.is_lost():
                    self.leave_out(stage, dtype, config, remark)
                    raise DeviceLost
            timings.append(timing)
        return timings


def _first_results(
    call: Callable[..., Any], configs: Sequence[Config | None]
) -> list[torch.Tensor] | None:
    """Return the results of the first config that runs."""
    for config in configs:
        try:
            return _tensors(call(config=config))
        except Exception:
            continue
    return None


def _time(
    gpu: Gpu,
    call: Callable[..., Any],
    config: Config | None,
    expected: list[torch.Tensor] | None,
    effort: str,
) -> tuple[float, str]:
    """Return the microseconds of a candidate and "", or NaN and the reason."""
    try:
        results = _tensors(call(config=config))
        if expected is not None and not _agree(results, expected):
            return math.nan, "result differs from the first candidate's"
        return gpu.microseconds(lambda: call(config=config), effort), ""
    except Exception as error:  # out of shared memory, or a compiler's limit: the next one
        return math.nan, reason_of(error)


def _tensors(results: Any) -> list[torch.Tensor]:
    several = results if isinstance(results, tuple) else (results,)
    return [result for result in several if result is not None and result.numel()]


def _agree(results: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    for result, other in zip(results, expected, strict=True):
        difference = (result.float() - other.float()).norm()
        if not difference <= SUM_LIMIT * other.float().norm():  # NaN does not pass
            return False
    return True


def compile_candidates(
    gpu: Gpu,
    times: Times,
    dtype: str,
    candidates: Mapping[str, Sequence[Config | None]],
    end: float,
) -> None:
    """Compile the candidates of some stages, by stage, that have not been compiled.

    Raises:
        OutOfTime: ``time.monotonic()`` passed ``end``.
    """
    launches = [
        Launch(stage, dtype, config)
        for stage, configs in candidates.items()
        for config in configs
        if config is not None and times.remark(stage, dtype, config) is None
    ]
    for launch, remark in gpu.left_out(launches, end - time.monotonic()):
        times.leave_out(launch.stage, dtype, launch.config, remark)
    if time.monotonic() > end:
        raise OutOfTime


def finalists(
    gpu: Gpu,
    times: Times,
    stage: str,
    dtype: str,
    candidates: Sequence[Config | None],
    end: float,
) -> list[Config | None]:
    """Compile the candidates, time them briefly, and return the fastest few, in their order.

    If every candidate spills, all are timed. PyTorch's own product is always a finalist.

    Raises:
        OutOfTime, DeviceLost: as for :meth:`Times.measure`.
        RuntimeError: no candidate ran.
    """
    own = [config for config in candidates if config is not None]
    library: list[Config | None] = [None] if None in candidates else []
    compile_candidates(gpu, times, dtype, {stage: candidates}, end)
    good = [config for config in own if not times.remark(stage, dtype, config)] or own
    if len(good) <= FINALISTS:
        return [*library, *good]
    chosen: set[Config | None] = set()
    for size in BRIEF_SIZES:
        timings = times.measure(gpu, stage, dtype, size, [*library, *good], BRIEF, end)
        ran = sorted((t for t in timings if not t.remark), key=lambda t: t.microseconds)
        chosen |= {timing.config for timing in ran[:FINALISTS]}
    if not chosen:
        fastest(timings)  # raises
    return [config for config in candidates if config is None or config in chosen]


def tune_stage(
    gpu: Gpu,
    times: Times,
    stage: str,
    dtype: str,
    candidates: Sequence[Config | None],
    end: float,
) -> list[dict[str, Any]]:
    """Return the buckets of a stage, measured where they have not been.

    Raises:
        OutOfTime, DeviceLost: as for :meth:`Times.measure`.
        RuntimeError: no candidate ran.
    """
    chosen = finalists(gpu, times, stage, dtype, candidates, end)
    choices: list[tuple[int, Config | None]] = []
    for size in SIZES:
        measured = times.measure(gpu, stage, dtype, size, chosen, FULL, end)
        best = fastest(measured, choices[-1][1] if choices else None)
        library = [f", library {t.microseconds:.1f}" for t in measured if t.config is None]
        print(
            f"{stage:19} {dtype:9} {best.rows:6} rows: {best.microseconds:8.1f} us"
            f"{''.join(library)}  {best.config or 'library'}",
            flush=True,
        )
        choices.append((best.rows, best.config))
    return buckets(choices)


def fastest(timings: Sequence[Timing], before: Config | None = None) -> Timing:
    """Return the quickest candidate, or that of ``before`` unless the quickest is clearly faster.

    ``before`` is the choice for the next smaller size.

    Raises:
        RuntimeError: no candidate ran.
    """
    ran = [timing for timing in timings if timing.microseconds > 0]
    if not ran:
        remarks = sorted({timing.remark for timing in timings})
        raise RuntimeError(f"no candidate of {timings[0].stage} ran: {'; '.join(remarks)}")
    best = min(ran, key=lambda timing: timing.microseconds)
    for timing in ran:
        if timing.config == before and best.microseconds > CLEARLY_FASTER * timing.microseconds:
            return timing
    return best


def buckets(choices: Sequence[tuple[int, Config | None]]) -> list[dict[str, Any]]:
    """Return buckets from (rows, config) by rising rows; equal neighbours become one."""
    merged: list[dict[str, Any]] = []
    for rows, config in choices:
        use = "library" if config is None else config._asdict()
        if merged and merged[-1]["use"] == use:
            merged[-1]["up_to"] = rows
        else:
            merged.append({"up_to": rows, "use": use})
    merged[-1]["up_to"] = None
    return merged


def write_table(path: Path, name: str, source: str, tuned: Tuned) -> None:
    """Put the tuned stages of one architecture into the table at ``path``; the rest stays.

    Raises:
        ValueError: the new table would not be valid.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    stages = deepcopy(table[nearest(name, tuple(table))]["stages"])
    for stage, by_dtype in tuned.items():
        kept = {
            dtype: stage_buckets
            for dtypes, stage_buckets in stages[stage].items()
            for dtype in dtypes.split(",")
        }
        stages[stage] = kept | by_dtype
        parse_stage(stages, stage)
    table[name] = {"source": source, "stages": stages}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def check_table(path: Path, name: str) -> None:
    """Check that :func:`write_table` can put stages of the architecture ``name`` into a table.

    Raises:
        ValueError: the file is no table, or lacks a stage.
    """
    try:
        table = read_table(path)
        stages = table[nearest(name, tuple(table))]["stages"]
        for stage in STAGES:
            parse_stage(stages, stage)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has another layout ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config_text(config: Config | None) -> str:
    return "library" if config is None else json.dumps(config._asdict())


def _config_of(stage: str, text: str) -> Config | None:
    return None if text == "library" else STAGES[stage](**json.loads(text))


def _parse(row: Mapping[str, str]) -> Timing:
    return Timing(
        row["stage"],
        row["dtype"],
        int(row["rows"]),
        _config_of(row["stage"], row["config"]),
        float(row["microseconds"]),
        row["remark"],
        row["effort"],
    )


def search(
    gpu: Gpu,
    times: Times,
    stages: Sequence[str],
    dtypes: Sequence[str],
    end: float,
    write: Callable[[Tuned], None],
) -> bool:
    """Tune every stage, dtype by dtype; return whether all candidates of some stage failed.

    Args:
        gpu: What measures.
        times: All times so far.
        stages, dtypes: What to measure, in this order.
        end: Of the time, as ``time.monotonic()`` counts it.
        write: Gets all stages that are measured, after each.

    Raises:
        OutOfTime, DeviceLost: as for :meth:`Times.measure`.
    """
    tuned: Tuned = {}
    failed = False
    finals: dict[str, list[Config | None]] = {}
    for dtype in dtypes:
        candidates = {s: candidate_configs(s, DTYPES[dtype], gpu.architecture) for s in stages}
        if dtype == "float16":  # it has the bytes and rates of bfloat16
            candidates |= finals
        compile_candidates(gpu, times, dtype, candidates, end)
        for stage in stages:
            try:
                measured = tune_stage(gpu, times, stage, dtype, candidates[stage], end)
            except RuntimeError as error:
                if gpu.is_lost():
                    raise DeviceLost from error
                print(error, flush=True)
                failed = True
                continue
            if dtype == "bfloat16":
                finals[stage] = finalists(gpu, times, stage, dtype, candidates[stage], end)
            tuned.setdefault(stage, {})[dtype] = measured
            write(tuned)
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenflex_kernels.tune", description=__doc__)
    parser.add_argument(
        "--stages", type=names_of(STAGES), default=",".join(STAGES), help="of: %(default)s"
    )
    parser.add_argument(
        "--dtypes",
        type=names_of(DTYPES),
        default="bfloat16,float16,float32",
        help="of: %(default)s",
    )
    parser.add_argument(
        "--table", type=output_file, default=str(TABLE_PATH), help="table to write into"
    )
    parser.add_argument("--csv", type=output_file, help="where every time is kept")
    parser.add_argument("--seconds", type=time_limit, default=math.inf, help="default: no limit")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")
    end = time.monotonic() + options.seconds
    gpu = Gpu()
    try:
        times = Times(Journal(options.csv, Timing._fields, gpu.setting))
    except (OSError, ValueError) as error:
        parser.error(f"--csv must be a file that tune wrote: {error}")
    if not options.table.exists():
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_bytes(TABLE_PATH.read_bytes())
    try:
        check_table(options.table, gpu.architecture)
    except ValueError as error:
        parser.error(f"--table must be a table of launch configs: {error}")

    def write(tuned: Tuned) -> None:
        source = f"measured on {gpu.setting}; stages that tune was not run for are estimates"
        write_table(options.table, gpu.architecture, source, tuned)

    try:
        failed = search(gpu, times, options.stages, options.dtypes, end, write)
    except OutOfTime:
        print(f"time ended after {options.seconds:g} s: run it again to measure the rest")
        return UNFINISHED
    except DeviceLost:
        if options.csv is None:  # nothing would remember what to leave out
            raise
        print("a candidate ended the use of the GPU: starting again without it", flush=True)
        given = sys.argv[1:] if arguments is None else arguments
        left = str(max(1.0, end - time.monotonic()))
        restart("tokenflex_kernels.tune", [*given, "--seconds", left])  # the last one counts
    print(f"wrote {gpu.architecture} to {options.table}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
