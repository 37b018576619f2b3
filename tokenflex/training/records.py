"""What a run says of itself while it trains: counts and rates of each stage, the file, the bar.

The keys of a line of ``metrics.jsonl`` are described in docs/training.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenflex.data.steps import PackedStep
from tokenflex.files import parse_json, write_atomically
from tokenflex.training.config import StageConfig
from tokenflex.training.flops import Flops

COUNTED = ("samples", "tokens", "vision_tokens", "tiles", "targets")

_TEACHERS = ("teacher_tokens", "teacher_vision_tokens")

# What depends on the machine and the moment: all else is the same whenever a run is repeated.
TIMING_KEYS = frozenset(
    {
        "seconds",
        "data_seconds",
        "step_seconds",
        "tokens_per_second",
        "vision_tokens_per_second",
        "tiles_per_second",
        "samples_per_second",
        "tflops_per_second",
        "mfu",
        "peak_memory_gib",
    }
)


class StageRecord:
    """Counts over one stage, or the encoder's warm-up; continued by a resumed run.

    Args:
        counts: those of the run that is continued, as :attr:`counts` held them.
    """

    def __init__(self, counts: dict[str, Any]) -> None:
        self.counts = counts
        """Plain numbers, so that they travel in a state."""

    @classmethod
    def begin(cls, name: str) -> StageRecord:
        """A record of nothing yet."""
        return cls({"name": name, "steps": 0, "seconds": 0.0, **dict.fromkeys(COUNTED, 0)})

    def add(self, packed: PackedStep, seconds: float) -> None:
        """Count one step."""
        for name in COUNTED:
            self.counts[name] += getattr(packed, name)
        self.counts["steps"] += 1
        self.counts["seconds"] += seconds

    def done(self, stage: StageConfig) -> int:
        """How much of the stage's budget is used, in the budget's unit."""
        return self.counts["steps" if stage.tokens is None else "tokens"]


class Meter:
    """Times the steps of a stage and turns them into rates.

    Only waiting for data and computing are on the clock: not saving, evaluating or drawing bars.
    Rates are over the steps since the last ones were asked for.

    Args:
        record: where each step is counted as well.
        flops: what the stage's arithmetic costs.
        teacher_flops: what a teacher's pass costs, where there is one.
        peak: operations a second that all processes can do at most; None where nobody knows.
        device: where the model is.
        clock: seconds.
    """

    def __init__(
        self,
        record: StageRecord,
        flops: Flops,
        *,
        teacher_flops: Flops | None = None,
        peak: float | None,
        device: torch.device,
        clock: Any = time.perf_counter,
    ) -> None:
        self.record = record
        self._flops = flops
        self._teacher_flops = teacher_flops
        self._peak = peak
        self._device = device
        self._clock = clock
        self._asked = self._began = clock()
        self._begin_window()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def _begin_window(self) -> None:
        self._window = dict.fromkeys((*COUNTED, *_TEACHERS), 0)
        self._steps = 0
        self._waited = self._computed = 0.0

    def waiting(self, steps: Iterator[PackedStep]) -> Iterator[PackedStep]:
        """The steps, each with the time it was waited for."""
        while True:
            self._asked = self._clock()
            try:
                packed = next(steps)
            except StopIteration:
                return
            self._began = self._clock()
            yield packed

    def add(self, packed: PackedStep) -> None:
        """The step that :meth:`waiting` gave is done, and the device has finished it."""
        waited, computed = self._began - self._asked, self._clock() - self._began
        self.record.add(packed, waited + computed)
        self._waited += waited
        self._computed += computed
        self._steps += 1
        for name in self._window:
            self._window[name] += getattr(packed, name)

    def shared(self, packed: PackedStep) -> list[float]:
        """What :meth:`rates` must know of every process, as numbers that can be gathered."""
        memory = 0.0
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device) / 2**30
        return [packed.rows - packed.rank_tokens, packed.rows, self._waited, memory]

    def rates(self, everyone: Sequence[Sequence[float]]) -> dict[str, Any]:
        """The part of a line that is measured, from the :meth:`shared` of all processes."""
        padding, rows, waits, memories = zip(*everyone, strict=True)
        steps, seconds = self._steps, self._waited + self._computed
        waited = min(sum(waits) / len(waits), seconds)
        window = self._window
        flops = self._flops.total(
            tiles=window["tiles"],
            vision_tokens=window["vision_tokens"],
            tokens=window["tokens"],
            targets=window["targets"],
        )
        if self._teacher_flops is not None:
            flops += self._teacher_flops.total(
                tiles=window["tiles"],
                vision_tokens=window["teacher_vision_tokens"],
                tokens=window["teacher_tokens"],
                targets=window["targets"],
            )
        self._begin_window()
        return {
            "padding_share": sum(padding) / sum(rows),
            "seconds": round(self.record.counts["seconds"], 3),
            "data_seconds": waited / steps,
            "step_seconds": (seconds - waited) / steps,
            "tokens_per_second": window["tokens"] / seconds,
            "vision_tokens_per_second": window["vision_tokens"] / seconds,
            "tiles_per_second": window["tiles"] / seconds,
            "samples_per_second": window["samples"] / seconds,
            "tflops_per_second": flops / seconds / 1e12,
            "mfu": None if self._peak is None else flops / seconds / self._peak,
            "peak_memory_gib": max(memories) or None,
        }


class MetricsFile:
    """A line for every step that is logged (``metrics.jsonl``) or evaluated after.

    Args:
        path: the file; there only after the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        """Add one line, at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut(self, stage: int, step: int) -> None:
        """Drop what was logged after the state that the run resumes from."""
        if self.path.exists():
            kept = [line for line in read_lines(self.path) if _place(line) <= (stage, step)]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def has(self, stage: int, step: int) -> bool:
        """Whether there is a line of this very step."""
        lines = read_lines(self.path) if self.path.exists() else []
        return any(_place(line) == (stage, step) for line in lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; not the one that a run is writing, or died in."""
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            record = parse_json(line, "line")
        except ValueError:
            continue
        if isinstance(record, dict) and all(isinstance(one, int) for one in _place(record)):
            lines.append(record)
    return lines


def _place(line: dict[str, Any]) -> tuple[Any, Any]:
    return line.get("stage"), line.get("step")


def progress_bar(
    name: str,
    total: float,
    *,
    done: int = 0,
    unit: str = "step",
    shown: bool = True,
    leave: bool = True,
) -> tqdm:
    """A bar over ``total`` of ``unit``, ``done`` of them behind us; it may vanish at the end."""
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        unit_scale=unit == "token",
        disable=not shown,
        leave=leave,
        dynamic_ncols=True,
    )


def summary(line: dict[str, Any]) -> str:
    """A line of the metrics file as it stands at the end of the bar."""
    short = tqdm.format_sizeof  # 1234567 as "1.23M"
    speed = f"{short(1e12 * line['tflops_per_second'])}FLOP/s"
    if line["mfu"] is not None:
        speed = f"MFU {line['mfu']:.1%}"
    parts = [
        f"loss {line['loss']:.3f}",
        f"{short(line['tokens_per_second'])} tok/s",
        f"{short(line['tiles_per_second'])} tiles/s",
        speed,
        f"pad {line['padding_share']:.0%}",
        f"balance {line['cost_balance']:.3f}",
    ]
    if line["broken_samples"]:
        parts.append(f"broken {line['broken_samples']}")
    return ", ".join(parts)


def training_report(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``report.json`` says of training, from the counts of its stages."""
    return {
        "tokens_per_image": tokens_per_image(records),
        "seconds": sum(record["seconds"] for record in records),
        "stages": [
            {
                "name": record["name"],
                "steps": record["steps"],
                "seconds": record["seconds"],
                "tokens": record["tokens"],
                "tokens_per_image": tokens_per_image([record]),
            }
            for record in records
        ],
    }


def tokens_per_image(records: Sequence[dict[str, Any]]) -> float | None:
    """Mean vision tokens of the tiles trained on; None before there are any."""
    tiles = sum(record["tiles"] for record in records)
    return sum(record["vision_tokens"] for record in records) / tiles if tiles else None
