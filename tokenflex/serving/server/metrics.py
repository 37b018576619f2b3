"""Counters of a server in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass
class Histogram:
    """Counts of observations up to each bound."""

    bounds: Sequence[float]
    total: float = 0.0
    number: int = 0
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
        self.number += 1

    def lines(self, name: str) -> list[str]:
        """Return the samples."""
        lines, below = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            label = "+Inf" if bound == float("inf") else f"{bound:g}"
            lines.append(f'{name}_bucket{{le="{label}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {self.number}"]


class Metrics:
    """The numbers of a server, thread-safe.

    Attributes:
        batch_rows: answers that were written side by side.
        request_seconds: from the arrival of a request to its answer.
        first_token_seconds: from the arrival of a request to the first token.
    """

    _HELP = {
        "requests_total": "Chat completions by HTTP status; 499 is a client that hung up.",
        "prompt_tokens_total": "Tokens of prompts, vision tokens included.",
        "vision_tokens_total": "Vision tokens of prompts.",
        "completion_tokens_total": "Tokens of answers.",
        "encoder_passes_total": "Pictures that the vision encoder read.",
        "feature_cache_hits_total": "Encodings that the feature cache made unnecessary.",
        "batches_total": "Calls of generate.",
    }

    def __init__(self) -> None:
        self._lock = Lock()
        self._counters: dict[str, float] = {}
        self.batch_rows = Histogram(ROWS)
        self.request_seconds = Histogram(SECONDS)
        self.first_token_seconds = Histogram(SECONDS)

    def add(self, name: str, value: float = 1) -> None:
        """Add to a counter, whose name may end in labels: ``requests_total{status="200"}``."""
        with self._lock:
            self._counters[name] = self._counters.get(name, 0) + value

    def observe(self, histogram: Histogram, value: float) -> None:
        """Count a value in one of the histograms."""
        with self._lock:
            histogram.observe(value)

    def text(
        self, gauges: Mapping[str, tuple[str, float]], counters_elsewhere: Mapping[str, float]
    ) -> str:
        """Return all numbers.

        Args:
            gauges: name -> (help, value).
            counters_elsewhere: values of counters that are counted elsewhere.
        """
        lines: list[str] = []
        with self._lock:
            counters = {
                **dict.fromkeys(self._HELP, 0.0),
                **self._counters,
                **counters_elsewhere,
            }
            if any(name.startswith("requests_total{") for name in counters):
                del counters["requests_total"]
            for family, text in self._HELP.items():
                lines += [f"# HELP tokenflex_{family} {text}", f"# TYPE tokenflex_{family} counter"]
                members = [n for n in sorted(counters) if n.partition("{")[0] == family]
                lines += [f"tokenflex_{name} {counters[name]:g}" for name in members]
            for name, help_text, histogram in (
                ("batch_rows", "Answers written side by side.", self.batch_rows),
                ("request_seconds", "From arrival to answer.", self.request_seconds),
                ("first_token_seconds", "From arrival to first token.", self.first_token_seconds),
            ):
                lines += [f"# HELP tokenflex_{name} {help_text}"]
                lines += [f"# TYPE tokenflex_{name} histogram"]
                lines += histogram.lines(f"tokenflex_{name}")
        for name, (help_text, value) in gauges.items():
            lines += [f"# HELP tokenflex_{name} {help_text}", f"# TYPE tokenflex_{name} gauge"]
            lines += [f"tokenflex_{name} {value:g}"]
        return "\n".join(lines) + "\n"
