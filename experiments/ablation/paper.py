"""The paper's figures (arXiv 2504.03154), second-hand, from a public summary of its tables.

They are claims on SigLIP-400M + Qwen2.5-7B and eight benchmarks. They stand beside ours to compare
directions, not values.
"""

from __future__ import annotations

COUNTS = (64, 144, 256)

TRAINED_WITH: dict[str, tuple[float, float, float]] = {
    "fixed-small": (57.5, 57.4, 56.2),
    "fixed-middle": (56.4, 58.6, 60.0),
    "fixed-large": (53.3, 57.4, 60.6),
    "stochastic": (58.7, 60.0, 60.7),
}
"""OpenCompass average of 8 benchmarks, in percent, at 64, 144 and 256 tokens."""

ODDS: dict[str, tuple[float, float, float]] = {
    "odds-5-3-2": (58.5, 59.5, 59.6),
    "odds-1-1-1": (58.9, 60.1, 60.6),
    "stochastic": (58.7, 60.0, 60.7),
}
"""The same for stochastic training at other odds of 64 : 144 : 256."""

COST: dict[str, tuple[float, float]] = {
    "fixed-small": (2.0, 8.2),
    "fixed-middle": (4.4, 10.8),
    "fixed-large": (7.8, 15.0),
    "stochastic": (5.6, 13.0),
}
"""Vision tokens of stage 2 in billions, and its hours on 64 A100."""


def gains() -> list[str]:
    """Return the stochastic model minus each fixed model at that model's own count, in points."""
    rows = (TRAINED_WITH[f"fixed-{size}"] for size in ("small", "middle", "large"))
    pairs = zip(TRAINED_WITH["stochastic"], rows, strict=True)
    return [f"{value - fixed[i]:+.1f}" for i, (value, fixed) in enumerate(pairs)]
