"""Training of a router on graded questions, in seconds; the model itself stays unchanged."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tokenflex.counts import TokenCount, token_grid
from tokenflex.data.samples import SampleDataset
from tokenflex.evaluation.counts import label_of
from tokenflex.routing.calibration import Curve, fit_curve
from tokenflex.routing.grading import (
    FEW_SAMPLES,
    Choice,
    Grades,
    drop_of,
    grade,
    routed,
    score,
)
from tokenflex.routing.router import Router, check_counts
from tokenflex.terminal import watched

STEPS = 1000
BATCH = 512
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
CHECK_EVERY = 50
"""Steps between evaluations on the held-out part."""
PATIENCE = 12
"""Evaluations without an improvement before training stops."""
MARGIN = 1.0
"""Standard errors that are added to a drop: that of a chosen setting is too small by luck."""
FEW_RIGHT = 0.05
"""Share of right answers below which a warning asks for other questions."""
PENALTIES = (0.0, *np.geomspace(0.002, 1.0, 28).round(4).tolist())


@dataclass(frozen=True)
class RouterReport:
    """Cost and result of training a router.

    Attributes:
        parameters: Parameters of the router.
        questions: Questions of the training part.
        held_out_questions: Questions that early stopping and the penalty were chosen on.
        held_out_samples: Samples of these questions.
        text_only_questions: Questions without an image, left out because no count applies to them.
        grading_seconds: Seconds of encoding and grading at all counts.
        fitting_seconds: Seconds of fitting the router.
        steps: Optimiser steps up to the router that is kept.
        penalty: Default penalty of the router. Of the penalties that cost at most ``max_drop`` of
            the largest count's accuracy on the held-out part, a standard error included, it is the
            one with the fewest tokens; 0 if all cost more.
        accuracy: Held-out accuracy of the router at that penalty.
        tokens: Held-out vision tokens per question of the router at that penalty.
        drop_error: Standard error of ``largest_accuracy - accuracy``, see
            :func:`tokenflex.routing.grading.drop_of`.
        largest_accuracy: Held-out accuracy of the largest count.
        largest_tokens: Held-out vision tokens per question of the largest count.
    """

    parameters: int
    questions: int
    held_out_questions: int
    held_out_samples: int
    text_only_questions: int
    grading_seconds: float
    fitting_seconds: float
    steps: int
    penalty: float
    accuracy: float
    tokens: float
    drop_error: float
    largest_accuracy: float
    largest_tokens: float


def train_router(
    model: Any,
    processor: Any,
    dataset: SampleDataset,
    counts: Sequence[TokenCount],
    *,
    max_drop: float = 0.01,
    held_out: float = 0.2,
    hidden_width: int = 16,
    seed: int = 0,
    batch_size: int = 64,
    on_samples: Callable[[int], object] = lambda samples: None,
) -> tuple[Router, RouterReport]:
    """Grade every question at every count, and fit a router to the grades.

    Use questions that the model was not trained on, because it answers those too well.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration`; it stays unchanged.
        processor: Its processor.
        dataset: The questions with their answers.
        counts: Two or more perfect squares or grids to choose from.
        max_drop: Share of right answers that the router's default penalty may cost.
        held_out: Share of the samples that the router is not fitted on.
        hidden_width: Hidden width of the router.
        seed: Seed of the initial weights, the batches and the held-out part.
        batch_size: Samples of a pass of the model.
        on_samples: Called with the number of samples after each pass.

    Raises:
        TypeError: A count is neither an int nor a pair of ints.
        ValueError: There are fewer than two counts or two samples with images, the model was not
            trained at the largest count, no answer is right, or a number is out of its range.
    """
    _check_shares(held_out, max_drop)  # before the work, not after it
    check_largest_trained(model, counts)
    started = time.perf_counter()
    grades = grade(model, processor, dataset, counts, batch_size=batch_size, on_samples=on_samples)
    return fit_router(
        grades,
        max_drop=max_drop,
        held_out=held_out,
        hidden_width=hidden_width,
        seed=seed,
        grading_seconds=time.perf_counter() - started,
    )


def fit_router(
    grades: Grades,
    *,
    max_drop: float = 0.01,
    held_out: float = 0.2,
    hidden_width: int = 16,
    seed: int = 0,
    grading_seconds: float = 0.0,
) -> tuple[Router, RouterReport]:
    """Fit a router to grades, and calibrate its probabilities and the answers' confidence.

    The curves of its probabilities are fitted on the held-out part, as is its penalty. The
    arguments are those of :func:`train_router`.

    Raises:
        ValueError: There are fewer than two samples with images, no answer about an image is right
            at any count, or a number is out of its range.
    """
    _check_shares(held_out, max_drop)
    has_images = grades.tiles > 0
    _check_right(grades.counts, grades.right[has_images])
    started = time.perf_counter()
    fitted, tested = split_samples(grades, held_out, seed)
    held_out_samples = len(tested.samples.unique())
    _check_held_out(held_out_samples, held_out)
    router = Router(
        grades.counts,
        grades.images.shape[1] // 2,
        grades.questions.shape[1],
        hidden_width=hidden_width,
    )
    steps = _fit(router, fitted, tested, torch.Generator().manual_seed(seed))
    right = tested.right[tested.pair_questions].numpy()
    images, questions, *_ = _pairs(tested)
    router.calibration = _curves(router.probabilities(images, questions), right)
    # The model saw none of these questions, so all that have images tell how sure it may be.
    router.confidence_calibration = _curves(
        grades.confidence[has_images].numpy(), grades.right[has_images].numpy()
    )
    largest_accuracy, largest_tokens = score(tested, np.full(len(tested), len(grades.counts) - 1))
    choices = {penalty: routed(router, tested, penalty) for penalty in PENALTIES}
    allowed = [p for p, choice in choices.items() if costs_at_most(max_drop, tested, choice)]
    router.penalty = min(allowed, key=lambda p: (score(tested, choices[p])[1], p), default=0.0)
    accuracy, tokens = score(tested, choices[router.penalty])
    return router, RouterReport(
        parameters=sum(parameter.numel() for parameter in router.parameters()),
        questions=len(fitted),
        held_out_questions=len(tested),
        held_out_samples=held_out_samples,
        text_only_questions=int((~has_images).sum()),
        grading_seconds=grading_seconds,
        fitting_seconds=time.perf_counter() - started,
        steps=steps,
        penalty=router.penalty,
        accuracy=accuracy,
        tokens=tokens,
        drop_error=drop_of(tested, choices[router.penalty])[1],
        largest_accuracy=largest_accuracy,
        largest_tokens=largest_tokens,
    )


def costs_at_most(
    max_drop: float,
    grades: Grades,
    choice: Choice,
    weights: torch.Tensor | None = None,
    margin: float = MARGIN,
) -> bool:
    """Return whether a choice costs at most ``max_drop``, ``margin`` standard errors included.

    The cheapest of many settings costs more on other questions than on those it was chosen on.

    Args:
        max_drop: Accuracy below the largest count's that is allowed.
        grades: Questions that the setting is chosen on.
        choice: Choice for each question.
        weights: See :func:`tokenflex.routing.grading.drop_of`.
        margin: Standard errors; 0 takes the questions for all there are.
    """
    drop, error = drop_of(grades, choice, weights)
    return drop + margin * error <= max_drop + 1e-9


def check_largest_trained(model: Any, counts: Sequence[TokenCount]) -> None:
    """Refuse a largest count that the model was not trained at: a router saves tokens against it.

    Smaller counts may be new to the model. A model whose config names no trained counts passes.

    Raises:
        TypeError: A count is neither an int nor a pair of ints.
        ValueError: The model was not trained at the largest count, or the counts leave no choice.
    """
    *_, largest = check_counts(counts)
    trained = getattr(model.config, "trained_num_image_tokens", None)
    if trained and token_grid(largest) not in {token_grid(count) for count in trained}:
        raise ValueError(
            f"counts must have a count that the model was trained at, {list(trained)}, as the "
            f"largest, because a router is measured by the answers at it, got {list(counts)}"
        )


def _check_right(counts: Sequence[TokenCount], right: torch.Tensor) -> None:
    """Refuse answers, bool [questions, counts], that are all wrong; warn of few right ones."""
    if not len(right):
        return  # split_samples says that there are no images
    by_count = right.sum(0).tolist()
    said = ", ".join(f"{n} at {label_of(count)}" for n, count in zip(by_count, counts, strict=True))
    if not any(by_count):
        raise ValueError(
            f"dataset must hold questions that the model answers right at some count, because a "
            f"router learns from right and wrong answers, got {said} of {len(right)} right: are "
            "they of the model's task?"
        )
    if max(by_count) < FEW_RIGHT * len(right):
        warnings.warn(
            f"dataset has few questions that the model answers right, {said} of {len(right)}: the "
            "router has little to learn from. Are they of the model's task?",
            stacklevel=3,
        )


def _check_held_out(samples: int, held_out: float) -> None:
    """Warn of held-out samples that are too few to choose a penalty on."""
    if samples < FEW_SAMPLES:
        warnings.warn(
            f"dataset leaves few samples to hold out, {samples}, where {FEW_SAMPLES} or more are "
            "expected: the router's penalty and curves are little more than chance there. Give "
            f"{math.ceil(FEW_SAMPLES / held_out)} samples with images or more",
            stacklevel=3,
        )


def _check_shares(held_out: float, max_drop: float) -> None:
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    if not 0 <= max_drop < 1:
        raise ValueError(f"max_drop must be at least 0 and below 1, got {max_drop}")


def split_samples(grades: Grades, held_out: float, seed: int) -> tuple[Grades, Grades]:
    """Return the part that a router is fitted on, and the held-out part.

    The split is by samples, so that questions about one image are never in both parts.
    """
    with_images = grades.samples[grades.tiles > 0].unique()
    if len(with_images) < 2:
        raise ValueError(
            f"dataset must hold at least 2 samples with images to fit a router on, got "
            f"{len(with_images)}"
        )
    order = torch.randperm(len(with_images), generator=torch.Generator().manual_seed(seed))
    tested = min(max(1, round(held_out * len(with_images))), len(with_images) - 1)
    parts = []
    for samples in (with_images[order[tested:]], with_images[order[:tested]]):
        chosen = torch.zeros(int(grades.samples.max()) + 1, dtype=torch.bool)
        chosen[samples] = True
        parts.append(grades.of_samples(chosen))
    return parts[0], parts[1]


def _fit(router: Router, fitted: Grades, tested: Grades, generator: torch.Generator) -> int:
    """Train until the held-out loss stops improving; return the steps up to the best router."""
    images, questions, right, weights = _pairs(fitted)
    for name, values in (("image", images), ("question", questions)):
        std, mean = torch.std_mean(values, dim=0, correction=0)
        getattr(router, f"{name}_mean").copy_(mean)
        getattr(router, f"{name}_std").copy_(std + 1e-5)
    for linear in (router.image, router.question, router.right):
        torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW(router.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    kept, kept_loss, kept_step = router.state_dict(), float("inf"), 0
    for step in watched(range(1, STEPS + 1), "fitting", STEPS, unit="step"):
        drawn = torch.randint(len(images), (BATCH,), generator=generator)
        loss = _loss(router, images[drawn], questions[drawn], right[drawn], weights[drawn])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % CHECK_EVERY == 0:
            with torch.no_grad():
                held_out_loss = float(_loss(router, *_pairs(tested)))
            if held_out_loss < kept_loss:
                kept = {name: value.clone() for name, value in router.state_dict().items()}
                kept_loss, kept_step = held_out_loss, step
            elif step - kept_step >= PATIENCE * CHECK_EVERY:
                break
    router.load_state_dict(kept)
    router.eval()
    return kept_step


def _curves(chances: NDArray[Any], right: NDArray[Any]) -> tuple[Curve, ...]:
    """Fit a curve at each count, from [answers, counts]."""
    return tuple(
        fit_curve(of_count, hits) for of_count, hits in zip(chances.T, right.T, strict=True)
    )


def _pairs(grades: Grades) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return statistics, embeddings, targets and weight of each pair of image and question."""
    owners = grades.pair_questions
    return (
        grades.images[grades.pair_images],
        grades.questions[owners],
        grades.right[owners].float(),
        1 / torch.bincount(owners)[owners].float(),
    )


def _loss(
    router: Router,
    images: torch.Tensor,
    questions: torch.Tensor,
    right: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    losses = F.binary_cross_entropy_with_logits(router(images, questions), right, reduction="none")
    return (losses.mean(1) * weights).sum() / weights.sum()
