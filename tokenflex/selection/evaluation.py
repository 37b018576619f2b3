"""Accuracy and cost of "auto" on a data set, beside what evaluation reports of each count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenflex.data.samples import SampleDataset
from tokenflex.selection.curve import auto_report
from tokenflex.selection.grading import grade
from tokenflex.selection.storage import router_of


def evaluate_auto(
    model: Any,
    processor: Any,
    dataset: SampleDataset,
    *,
    penalty: float | None = None,
    batch_size: int = 64,
    on_samples: Callable[[int], object] = lambda samples: None,
) -> dict[str, Any]:
    """Share of conversations answered exactly at the counts that the model's router chooses.

    Everything is asked at every count of the router, images encoded once; the router then picks.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration` with a router; its mode is
            left as it was.
        processor: its processor.
        dataset: what to ask.
        penalty: the router's own if None.
        batch_size: samples a pass.
        on_samples: called with the number of samples after each pass.

    Returns:
        What :func:`tokenflex.selection.curve.auto_report` says.

    Raises:
        FileNotFoundError: there is no router; the message says how to make one.
        ValueError: a sample cannot be encoded, or ``penalty`` is out of range.
    """
    router = router_of(model)
    grades = grade(
        model, processor, dataset, router.counts, batch_size=batch_size, on_samples=on_samples
    )
    return auto_report(grades, router, penalty)
