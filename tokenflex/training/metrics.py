"""The metrics of a run, listed once: the file, the bar, trackers and the documentation follow.

To log another value, add a :class:`Metric` to :data:`METRICS` and its value to
:func:`metrics_line`; :func:`metrics_table` is the table of docs/training.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from tokenflex.data.steps import PackedStep
from tokenflex.training.config import StageConfig
from tokenflex.training.engine import StepOutcome

COUNTED = ("samples", "tokens", "vision_tokens", "tiles", "targets")
"""Attributes of a ``PackedStep`` that are logged, and added up over a stage."""


@dataclass(frozen=True)
class Metric:
    """A key of ``metrics.jsonl``.

    Attributes:
        key: The key.
        over: What a value covers: this step, the steps since the last line, the stage or the run so
            far. "line" and "time" values depend on the machine and the moment; "time" is over the
            stage. All other values are the same whenever a run is repeated.
        unit: Unit of a value.
        doc: One line of documentation.
        bar: Format of the value in the progress bar, where an empty text is left out; None if the
            bar does not show it.
    """

    key: str
    over: Literal["step", "line", "stage", "time", "run"]
    unit: str
    doc: str
    bar: Callable[[Any], str] | None = None


def _number(unit: str, factor: float = 1.0) -> Callable[[float], str]:
    return lambda value: f"{tqdm.format_sizeof(factor * value)}{unit}"  # 1234567 as "1.23M"


def _broken(samples: int) -> str:
    return f"broken {samples}" if samples else ""


METRICS = (
    Metric("stage", "run", "", "index of the stage"),
    Metric("stage_name", "run", "", "name of the stage"),
    Metric("step", "stage", "steps", "optimiser steps"),
    Metric("global_step", "run", "steps", "optimiser steps"),
    Metric("loss", "step", "nats", "weighted mean over the answer tokens", "loss {:.3f}".format),
    Metric("distillation_loss", "step", "nats", "only with `distillation`: KL(teacher, student)"),
    Metric("gradient_norm", "step", "", "before clipping; null where float16 overflowed"),
    Metric("learning_rate", "step", "", "of each module that learns, after this step"),
    Metric("samples", "step", "samples", "samples, over all processes"),
    Metric("tokens", "step", "rows", "rows of the language model, text and vision"),
    Metric("vision_tokens", "step", "tokens", "vision tokens; those of a tile count once"),
    Metric("tiles", "step", "tiles", "tiles through the vision encoder"),
    Metric("targets", "step", "tokens", "answer tokens"),
    *(Metric(f"stage_{name}", "stage", "", f"`{name}`, added up") for name in COUNTED),
    Metric("tokens_per_image", "stage", "tokens", "vision tokens over tiles"),
    Metric("counts", "step", "samples", "vision-token count -> samples with images that drew it"),
    Metric("bins", "step", "", "forward passes, over all processes"),
    Metric("seconds", "time", "s", "training: waiting for data and computing"),
    Metric("data_seconds", "line", "s", "waiting for data in a step, the mean over processes"),
    Metric("step_seconds", "line", "s", "the rest of a step"),
    Metric("tokens_per_second", "line", "rows/s", "`tokens` of all processes", _number(" tok/s")),
    Metric("vision_tokens_per_second", "line", "tokens/s", "`vision_tokens` of all processes"),
    Metric("tiles_per_second", "line", "tiles/s", "`tiles` of all processes", _number(" tiles/s")),
    Metric("samples_per_second", "line", "samples/s", "`samples` of all processes"),
    Metric(
        "tflops_per_second",
        "line",
        "10^12/s",
        "model arithmetic; null if unknown",
        _number("FLOP/s", 1e12),
    ),
    Metric(
        "mfu",
        "line",
        "share",
        "arithmetic over the devices' peak; null if unknown",
        "MFU {:.1%}".format,
    ),
    Metric("peak_memory_gib", "time", "GiB", "most GPU memory of a process; null on CPUs"),
    Metric(
        "padding_share", "step", "share", "rows of no sample over all rows", "pad {:.0%}".format
    ),
    Metric("cost_balance", "step", "", "costliest bin over the mean", "balance {:.3f}".format),
    Metric("broken_samples", "run", "samples", "samples that were left out", _broken),
)
"""All keys of ``metrics.jsonl``, in the order of the file, the bar and the documentation."""

TIMING_KEYS = frozenset(metric.key for metric in METRICS if metric.over in ("line", "time"))
"""Keys whose values differ between two runs of the same configuration."""


def metrics_line(
    position: dict[str, Any],
    stage: StageConfig,
    counts: dict[str, Any],
    outcome: StepOutcome,
    packed: PackedStep,
    *,
    learning_rates: Sequence[float],
    processes: int,
    broken_samples: int,
    rates: dict[str, Any],
) -> dict[str, Any]:
    """Return a line of ``metrics.jsonl``.

    ``position`` is of :func:`position_of`, ``counts`` of the :class:`StageRecord`,
    ``learning_rates`` of the modules that learn, and ``rates`` of :meth:`Meter.rates`.
    """
    values = {
        **position,
        "loss": outcome.loss,
        # float16 has steps whose gradients overflowed, and JSON has no infinity.
        "gradient_norm": outcome.norm if math.isfinite(outcome.norm) else None,
        "learning_rate": dict(zip(stage.learning, learning_rates, strict=True)),
        **{name: getattr(packed, name) for name in (*COUNTED, "counts", "cost_balance")},
        **{f"stage_{name}": counts[name] for name in COUNTED},
        "tokens_per_image": tokens_per_image([counts]),
        "bins": len(packed.bins) * processes,
        "broken_samples": broken_samples,
        **rates,
    }
    if stage.distillation:
        values["distillation_loss"] = outcome.distillation_loss
    return {metric.key: values[metric.key] for metric in METRICS if metric.key in values}


def tokens_per_image(records: Sequence[dict[str, Any]]) -> float | None:
    """Return the mean vision tokens of the tiles in the counts of stages; None without tiles."""
    tiles = sum(record["tiles"] for record in records)
    return sum(record["vision_tokens"] for record in records) / tiles if tiles else None


def bar_text(line: dict[str, Any]) -> str:
    """Return what the progress bar shows of a line; operations a second only without MFU."""
    hidden = {"tflops_per_second"} if line["mfu"] is not None else {"mfu"}
    hidden |= {name for name in ("tflops_per_second",) if line[name] is None}
    texts = [m.bar(line[m.key]) for m in METRICS if m.bar is not None and m.key not in hidden]
    return ", ".join(filter(None, texts))


def metrics_table() -> str:
    """Return :data:`METRICS` as a table in Markdown."""
    over = {"line": "since the last line", "stage": "stage", "time": "stage", "run": "run"}
    rows = [
        f"| `{metric.key}` | {over.get(metric.over, 'step')} | {metric.unit} | {metric.doc} |"
        for metric in METRICS
    ]
    return "\n".join(["| key | over | unit | meaning |", "|---|---|---|---|", *rows])
