"""What a run says of itself while it trains: counts of each stage, the metrics file, the bar."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokenflex.data.steps import PackedStep
from tokenflex.training.checkpoint import write_atomically


class StageRecord:
    """Counts over one stage, or the encoder's warm-up; continued by a resumed run.

    Args:
        counts: those of the run that is continued, as :attr:`counts` held them.
    """

    def __init__(self, counts: dict[str, Any]) -> None:
        self.counts = counts
        """Plain numbers, so that they travel in a state."""
        self._clock = time.perf_counter() - counts["seconds"]

    @classmethod
    def begin(cls, name: str, steps: int) -> StageRecord:
        """A record of nothing yet; its clock runs."""
        counted = {"tokens": 0, "tiles": 0, "vision_tokens": 0}
        return cls({"name": name, "steps": steps, "seconds": 0.0, **counted})

    def add(self, packed: PackedStep) -> None:
        """Count one step."""
        for name in ("tokens", "tiles", "vision_tokens"):
            self.counts[name] += getattr(packed, name)
        self.stop_clock()

    def stop_clock(self) -> None:
        """Note the seconds until now."""
        self.counts["seconds"] = time.perf_counter() - self._clock


class MetricsFile:
    """``metrics.jsonl``: a line for every step that is logged.

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
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that the killed run was writing
            if (record["stage"], record["step"]) <= (stage, step):
                kept.append(line + "\n")
        text = "".join(kept)
        write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))


def progress_bar(name: str, steps: int, *, done: int = 0, shown: bool = True) -> tqdm:
    """A bar over ``steps``, ``done`` of them behind us."""
    return tqdm(
        total=steps, initial=done, desc=name, unit="step", disable=not shown, dynamic_ncols=True
    )


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
                "tokens_per_image": tokens_per_image([record]),
            }
            for record in records
        ],
    }


def tokens_per_image(records: Sequence[dict[str, Any]]) -> float | None:
    """Mean vision tokens of the tiles trained on; None before there are any."""
    tiles = sum(record["tiles"] for record in records)
    return sum(record["vision_tokens"] for record in records) / tiles if tiles else None
