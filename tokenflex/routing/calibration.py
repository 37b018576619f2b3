"""Calibration of probabilities: a logistic curve per count, fitted to what was answered right.

A probability is calibrated if, of the answers that are given 0.9, nine in ten are right. Scores of
networks seldom are. Platt scaling (J. Platt, "Probabilistic outputs for support vector machines",
1999) replaces p by sigmoid(scale * logit(p) + shift); with a shift of 0 it is the temperature
scaling of Guo et al., "On calibration of modern neural networks", ICML 2017, for two classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Curve: TypeAlias = tuple[float, float]
"""Scale, at least 0, and shift of a logit."""

EDGE = 1e-7
"""Least distance of a probability to 0 and 1; float32 rounds what is closer to 1 than 6e-8."""
STEPS = 100
"""Newton's steps at most."""


def fit_curve(probabilities: NDArray[Any], right: NDArray[Any]) -> Curve:
    """Fit a curve by maximum likelihood, with Platt's targets.

    Platt's targets are (n + 1) / (n + 2) for n right answers and 1 / (m + 2) for m wrong ones, in
    place of 1 and 0. They keep the curve finite where all answers are right, or all wrong.

    Args:
        probabilities: [answers], in any calibration.
        right: bool [answers].

    Returns:
        The curve. Its scale is 0 where a higher probability does not mean more right answers: all
        then have the share that is right.
    """
    logits, right = _logits(probabilities), np.asarray(right, dtype=bool)
    n, m = int(right.sum()), int((~right).sum())
    targets = np.where(right, (n + 1) / (n + 2), 1 / (m + 2))
    mean, std = (logits.mean(), logits.std()) if len(logits) else (0.0, 0.0)
    base = float(np.log(targets.mean() / (1 - targets.mean()))) if len(logits) else 0.0
    if std < 1e-6:
        return 0.0, base
    inputs = np.stack([(logits - mean) / std, np.ones_like(logits)], axis=1)
    weights = np.array([0.0, base])
    loss = _log_loss(inputs @ weights, targets)
    for _ in range(STEPS):
        chances = _sigmoid(inputs @ weights)
        gradient = inputs.T @ (chances - targets)
        curvature = (inputs.T * (chances * (1 - chances))) @ inputs + 1e-9 * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while size > 1e-6 and _log_loss(inputs @ (weights - size * step), targets) > loss:
            size /= 2
        weights = weights - size * step
        loss = _log_loss(inputs @ weights, targets)
        if np.abs(size * step).max() < 1e-8:
            break
    scale = float(weights[0] / std)
    return (scale, float(weights[1] - scale * mean)) if scale > 0 else (0.0, base)


def calibrated(probabilities: NDArray[Any], curves: Sequence[Curve]) -> NDArray[np.float64]:
    """Return probabilities [..., counts] by each count's curve; their order is kept."""
    scales, shifts = np.array(curves, dtype=np.float64).T
    return _sigmoid(scales * _logits(probabilities) + shifts)


def check_curves(name: str, curves: Any, num_counts: int) -> tuple[Curve, ...] | None:
    """Return the curves as a tuple of pairs of floats; None stays None.

    Raises:
        TypeError: ``curves`` is no sequence of pairs of numbers.
        ValueError: There is not one curve per count, a scale is negative, or a number not finite.
    """
    if curves is None:
        return None
    pairs = [*curves] if isinstance(curves, Sequence) and not isinstance(curves, str) else [curves]
    for pair in pairs:
        if not (
            isinstance(pair, Sequence)
            and len(pair) == 2
            and all(isinstance(x, Real) and not isinstance(x, bool) for x in pair)
        ):
            raise TypeError(f"{name} must hold pairs of scale and shift, got {curves!r}")
        if not all(isfinite(x) for x in pair) or pair[0] < 0:
            raise ValueError(
                f"{name} must hold finite numbers and scales of at least 0, got {tuple(pair)}"
            )
    if len(pairs) != num_counts:
        raise ValueError(f"{name} must hold {num_counts} curves, one per count, got {len(pairs)}")
    return tuple((float(scale), float(shift)) for scale, shift in pairs)


def _logits(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    inside = np.clip(np.asarray(probabilities, dtype=np.float64), EDGE, 1 - EDGE)
    return np.log(inside) - np.log1p(-inside)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 + 0.5 * np.tanh(logits / 2)  # without overflow


def _log_loss(logits: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    return float((np.logaddexp(0, logits) - targets * logits).sum())
