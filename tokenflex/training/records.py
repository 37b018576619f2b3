"""Count and time the steps of a run, and write lines of JSON about them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from tokenflex.data.steps import PackedStep
from tokenflex.files import parse_json, write_text
from tokenflex.training.config import StageConfig
from tokenflex.training.flops import Flops
from tokenflex.training.metrics import COUNTED, tokens_per_image

T = TypeVar("T")

_COSTS = ("tiles", "vision_tokens", "tokens", "targets")  # quantities that the FLOPs depend on
_TEACHERS = ("teacher_tokens", "teacher_vision_tokens")


class StageRecord:
    """Counts over one stage, or over the encoder's warm-up.

    Args:
        counts: Where to count, in plain numbers that a state can hold.
    """

    def __init__(self, counts: dict[str, Any]) -> None:
        self.counts = counts

    @classmethod
    def begin(cls, name: str) -> StageRecord:
        """Return an empty record."""
        return cls({"name": name, "steps": 0, "seconds": 0.0, **dict.fromkeys(COUNTED, 0)})

    def add(self, packed: PackedStep, seconds: float) -> None:
        """Count one step."""
        for name in COUNTED:
            self.counts[name] += getattr(packed, name)
        self.counts["steps"] += 1
        self.counts["seconds"] += seconds

    def done(self, stage: StageConfig) -> int:
        """Return how much of the stage's budget is used, in the unit of the budget."""
        return self.counts["steps" if stage.tokens is None else "tokens"]


class Meter:
    """Times the steps of a stage and turns them into rates over the steps since the last rates.

    ``flops`` is None where the operations of the model are not known, as ``mfu`` is then.
    The clock runs while a step waits for data and computes, not while the run saves, evaluates or
    draws bars. Each step is counted in ``record`` as well. ``peak`` is that of all processes'
    devices in operations a second, None if unknown; ``clock`` returns seconds.
    """

    def __init__(
        self,
        record: StageRecord,
        flops: Flops | None,
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

    def waiting(self, steps: Iterator[T]) -> Iterator[T]:
        """Yield the steps, and time the wait for each."""
        while True:
            self._asked = self._clock()
            try:
                packed = next(steps)
            except StopIteration:
                return
            self._began = self._clock()
            yield packed

    def add(self, packed: PackedStep) -> None:
        """Count the last step of :meth:`waiting`, which the device has finished."""
        waited, computed = self._began - self._asked, self._clock() - self._began
        self.record.add(packed, waited + computed)
        self._waited += waited
        self._computed += computed
        self._steps += 1
        for name in self._window:
            self._window[name] += getattr(packed, name)

    def shared(self, packed: PackedStep) -> list[float]:
        """Return what :meth:`rates` needs of every process, as numbers that can be gathered."""
        memory = 0.0
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device) / 2**30
        return [packed.rows - packed.rank_tokens, packed.rows, self._waited, memory]

    def rates(self, everyone: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Return the measured metrics, from the :meth:`shared` of all processes."""
        padding, rows, waits, memories = zip(*everyone, strict=True)
        steps, seconds = self._steps, self._waited + self._computed
        waited = min(sum(waits) / len(waits), seconds)
        window = self._window
        flops = None
        if self._flops is not None:
            flops = self._flops.total(**{name: window[name] for name in _COSTS})
        if flops is not None and self._teacher_flops is not None:
            teacher = {name: window[f"teacher_{name}"] for name in ("tokens", "vision_tokens")}
            flops += self._teacher_flops.total(
                tiles=window["tiles"], targets=window["targets"], **teacher
            )
        self._begin_window()
        return {
            "padding_share": sum(padding) / sum(rows),
            "seconds": round(self.record.counts["seconds"], 3),
            "data_seconds": waited / steps,
            "step_seconds": (seconds - waited) / steps,
            **{
                f"{name}_per_second": window[name] / seconds
                for name in ("tokens", "vision_tokens", "tiles", "samples")
            },
            "tflops_per_second": None if flops is None else flops / seconds / 1e12,
            "mfu": None if flops is None or not self._peak else flops / seconds / self._peak,
            "peak_memory_gib": max(memories) or None,
        }


class MetricsFile:
    """A file of lines of JSON, one for every step that is logged or evaluated after."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut(self, stage: int, step: int) -> None:
        """Drop the lines after a step, the last that the state of a resumed run knows of."""
        if self.path.exists():
            kept = [line for line in read_lines(self.path) if _place(line) <= (stage, step)]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_text(self.path, text)

    def has(self, stage: int, step: int) -> bool:
        """Return whether the file has a line of this step."""
        lines = read_lines(self.path) if self.path.exists() else []
        return any(_place(line) == (stage, step) for line in lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics file, without one that is only half written."""
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            record = parse_json(line, "line")
        except ValueError:
            continue
        if isinstance(record, dict) and all(isinstance(number, int) for number in _place(record)):
            lines.append(record)
    return lines


def _place(line: dict[str, Any]) -> tuple[Any, Any]:
    return line.get("stage"), line.get("step")


def position_of(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return where training is, as lines say it, from the counts of the stages that have begun."""
    return {
        "stage": len(stages) - 1,
        "stage_name": stages[-1]["name"],
        "step": stages[-1]["steps"],
        "global_step": sum(record["steps"] for record in stages),
    }


def training_report(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of ``report.json`` about training, from the counts of all stages."""
    return {
        "tokens_per_image": tokens_per_image(records),
        "seconds": sum(record["seconds"] for record in records),
        "stages": [
            {
                **{key: record[key] for key in ("name", "steps", "seconds", "tokens")},
                "tokens_per_image": tokens_per_image([record]),
            }
            for record in records
        ],
    }
