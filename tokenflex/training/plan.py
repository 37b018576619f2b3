"""Plan what a run does and costs: ``tokenflex train CONFIG --dry-run``.

The model is built on the meta device, from configurations alone: no weights are read or allocated.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokenflex.counts import Grid, TokenCount, TokenCounts, token_grid, tokens_of
from tokenflex.data.faults import (
    BrokenSample,
    broken_records,
    check_broken,
    leaving_out,
    warn_of_broken,
)
from tokenflex.data.mixture import Mixture
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.samples import DataExhaustedError, SampleDataset, size_of
from tokenflex.data.steps import outline_of
from tokenflex.models.loss import CHUNK_LOGITS
from tokenflex.terminal import text_table, watched
from tokenflex.training.build import (
    build_dataset,
    build_order,
    check_processes,
    check_supply,
)
from tokenflex.training.config import EvaluationConfig, SampleConfig, StageConfig, TrainConfig
from tokenflex.training.data_config import DataConfig
from tokenflex.training.flops import Flops
from tokenflex.training.kinds import empty_kind
from tokenflex.training.layers import layers_of, sharded_units
from tokenflex.training.model_kind import ModelKind

MEASURED_SAMPLES = 64
ONE_COUNT = TokenCounts((1,), (1.0,))
"""Counts to measure samples at: a vision token for each tile."""

_FLOAT32 = 4  # bytes of weights, gradients and both of Adam's moments


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage, over all processes unless said otherwise.

    Attributes:
        name: The stage's name.
        trained_parameters: Module -> parameters that learn, without frozen modules.
        steps, samples: Optimiser steps, and samples in all of them.
        steps_are_expected: The stage has a budget in tokens, so both are expected numbers.
        passes: Passes over the data, one number for each part of a mixture; None for a part whose
            size is not known, and empty where the data was not opened.
        tokens: Expected rows of the language model, text and vision.
        vision_tokens: Expected rows that are vision.
        flops: Expected floating-point operations, forward and backward; None for a converted stock
            model, whose family's operations are not known.
        flops_saved: Share of them that the drawn counts save against the largest one. Negative
            where a teacher's pass costs more than they save.
        tile_cost: Cost of encoding a tile, in rows of the language model.
        state_bytes: Weights, gradients and optimiser state of one process. With shards its share of
            them, and the weights that are gathered at once.
        activation_bytes: Estimate for one forward and backward pass; None where ``flops`` is.
        notes: Sentences about the model that is planned for.
        warnings: Sentences about what the stage should rather not do.
    """

    name: str
    trained_parameters: dict[str, int]
    steps: int
    steps_are_expected: bool
    samples: int
    tokens: float
    vision_tokens: float
    flops: float | None
    flops_saved: float | None
    tile_cost: float
    state_bytes: int
    activation_bytes: float | None
    passes: tuple[float | None, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def plan_run(config: TrainConfig, processes: int = 1) -> list[StagePlan]:
    """Plan each stage of a run on a number of processes.

    The mean sample is ``config.sample``, or else measured on the first samples of the data.

    Raises:
        ValueError: The configuration of a part is not valid, a count exceeds the model's positions,
            there are more processes than samples a step, or no sample can be read.
        FileNotFoundError: A required file does not exist.
    """
    check_processes(config, processes)
    kind = empty_kind(config)
    # A machine that plans with a mean sample need not have the data.
    opened = {} if config.sample else {data: build_dataset(data) for data in config.stage_data}
    samples = {
        data: measure_samples(config, data, kind.collator(ONE_COUNT), dataset)
        for data, dataset in opened.items()
    }
    plans: list[StagePlan] = []
    for stage in config.stages:
        data = config.data_of(stage)
        plan = _plan_stage(stage, kind, config.sample or samples[data], config, processes)
        if data in opened:
            read = plan.steps * stage.samples_read
            plan = replace(plan, passes=passes_over(data, opened[data], read))
        plans.append(plan)
    if config.evaluation is not None:
        note = _evaluation_note(config.evaluation, plans, 4 * _parameters([kind.model]))
        plans = [replace(plan, notes=(*plan.notes, *note)) for plan in plans]
        asked = warnings_of("the evaluation asks for", config.evaluation.counts, kind.patch_grid)
        plans[-1] = replace(plans[-1], warnings=(*plans[-1].warnings, *asked))
    return plans


def _evaluation_note(
    settings: EvaluationConfig, plans: Collection[StagePlan], model_bytes: int
) -> Iterator[str]:
    """Yield what evaluations during training cost, if there are any."""
    number = 0
    for plan in plans:
        number += plan.steps // settings.every if settings.every else 0
        is_due = settings.every is not None and plan.steps % settings.every == 0
        number += settings.at_stage_end and not is_due
    if not number:
        return
    passes = len(settings.counts) * (2 if settings.keep_best == "loss" else 1)
    yield (
        f"evaluations during training: {number}, each {passes} passes over "
        f"{settings.samples} samples at most, which is in none of the numbers above"
    )
    if settings.keep_best:
        yield (
            f"keep_best by {settings.keep_best}: a copy of the model, {model_bytes / 2**30:.1f} "
            f"GiB on the disk, written at most {number} times"
        )


def passes_over(data: DataConfig, dataset: Any, samples: int) -> tuple[float | None, ...]:
    """Return how often ``samples`` pass over a data set, or over each part of a mixture.

    The size of a stream is not known: its number is None.
    """
    if not isinstance(dataset, Mixture):
        size = size_of(dataset)
        return (None if size is None else samples / size,)
    weights = [part.weight for part in data.parts]
    sizes = map(size_of, dataset.parts)
    return tuple(
        None if size is None else samples * weight / sum(weights) / size
        for weight, size in zip(weights, sizes, strict=True)
    )


def warnings_of(what: str, counts: Iterable[TokenCount], grid: Grid | None) -> Iterator[str]:
    """Yield a sentence for each count that asks for more tokens than the encoder has patches.

    Args:
        what: What asks for them, with its verb.
        counts: Vision tokens per tile.
        grid: Rows and columns of patches of a tile; None if they are not known.
    """
    if grid is None:
        return
    for count in counts:
        rows, columns = token_grid(count)
        if rows > grid[0] or columns > grid[1]:
            yield (
                f"warning: {what} {rows} x {columns} = {tokens_of(count)} "
                f"tokens, but the encoder has {grid[0]} x {grid[1]} = {grid[0] * grid[1]} patches "
                "a tile: pooling then enlarges the grid, which repeats what it holds"
            )


def measure_samples(
    config: TrainConfig,
    data: DataConfig,
    collator: PackingCollator,
    dataset: SampleDataset | None = None,
) -> SampleConfig:
    """Return the mean of the first training samples, from texts and image sizes alone.

    What a sample's conversations have in common counts as often as ``collator`` shows it. Broken
    records of a file are named in warnings. ``dataset`` is the data if it is open already.

    Raises:
        BrokenSamplesError: More records of a file are broken than ``max_broken_samples``.
        ValueError: No sample can be read.
    """
    dataset = build_dataset(data) if dataset is None else dataset
    known = broken_records(dataset)
    warn_of_broken(known)
    check_broken(known, config.max_broken_samples)
    order = build_order(data, dataset, config.seed)
    check_supply(config, {data: order})
    size = size_of(dataset)
    num_read = MEASURED_SAMPLES if size is None else min(size, MEASURED_SAMPLES)
    samples: list[DrawnSample] = []
    broken: list[BrokenSample] = []
    for position in watched(range(num_read), "measuring samples", num_read, unit="sample"):
        try:
            index = order[position][1]
            with leaving_out(dataset, index, broken):  # as training does
                drawn = DrawnSample(index, 0, outline_of(dataset, index), 1)
                samples.append(collator.fit(drawn))
        except DataExhaustedError:
            break
    if not samples:
        reason = broken[-1].reason if broken else "there are none"
        raise ValueError(f"none of the first {num_read} samples can be read: {reason}")
    text = answers = tiles = shown = 0
    for fitted in samples:
        tiles += sum(fitted.tiles)
        text += fitted.num_tokens_at(0)
        answers += fitted.num_targets
        for sequence in fitted.sequences or ():
            shown += sum(fitted.tiles[sequence.images])
    return SampleConfig(
        text_tokens=text / len(samples),
        answer_tokens=answers / len(samples),
        tiles=tiles / len(samples),
        shown_tiles=shown / len(samples),
    )


def _plan_stage(
    stage: StageConfig,
    kind: ModelKind,
    sample: SampleConfig,
    config: TrainConfig,
    processes: int,
) -> StagePlan:
    expected = TokenCounts(stage.counts, stage.weights).expected
    tokens = sample.text_tokens + sample.shown * expected
    # A stage with a budget in tokens ends with the step that reaches it.
    steps = stage.steps or math.ceil(stage.budget / (stage.batch_size * tokens))
    samples = steps * stage.batch_size
    trained = {name: sum(w.numel() for w in kind.learned(name)) for name in stage.learning}
    plan = StagePlan(
        name=stage.name,
        trained_parameters=trained,
        steps=steps,
        steps_are_expected=stage.steps is None,
        samples=samples,
        tokens=samples * tokens,
        vision_tokens=samples * sample.shown * expected,
        flops=None,
        flops_saved=None,
        tile_cost=kind.tile_cost(stage),
        state_bytes=_state_bytes(kind.model, sum(trained.values()), config, processes),
        activation_bytes=None,
        notes=tuple(kind.notes()),
        warnings=tuple(
            warnings_of(f"stage {stage.name!r} draws", stage.drawn_counts, kind.patch_grid)
        ),
    )
    flops = kind.training_flops(stage)
    if flops is None:
        return plan
    cost = samples * _sample_flops(flops, sample, expected)
    largest = samples * _sample_flops(flops, sample, max(map(tokens_of, stage.counts)))
    teacher = kind.teacher_flops(stage)
    if teacher is not None and stage.teacher_count is not None:
        cost += samples * _sample_flops(teacher, sample, tokens_of(stage.teacher_count))
    return replace(
        plan,
        flops=cost,
        flops_saved=1 - cost / largest,
        activation_bytes=_activation_bytes(stage, kind, sample, tokens, config),
    )


def _sample_flops(flops: Flops, sample: SampleConfig, count: float) -> float:
    return flops.total(
        tiles=sample.tiles,
        vision_tokens=sample.tiles * count,
        tokens=sample.text_tokens + sample.shown * count,
        targets=sample.answer_tokens,
    )


def _parameters(modules: Collection[nn.Module]) -> int:
    # The head may share its weight with the embedding: each tensor once.
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


def _state_bytes(model: Any, trained: int, config: TrainConfig, processes: int) -> int:
    weights = _parameters([model])
    everything = _FLOAT32 * (weights + 3 * trained)
    if config.sharding == "none" or processes == 1:
        return everything
    sizes = [_parameters([unit]) for unit in sharded_units(model)]
    # Gathered are the weights of no unit, of the unit at work, and of the next one.
    gathered = weights - sum(sizes) + 2 * max(sizes)
    return -(-everything // processes) + gathered * _width(config)


def _width(config: TrainConfig) -> int:
    return 4 if config.precision == "no" else 2


def _activation_bytes(
    stage: StageConfig, kind: ModelKind, sample: SampleConfig, tokens: float, config: TrainConfig
) -> float:
    """Estimate what the backward pass reads: inputs and outputs of linear layers with a gradient.

    Norms and attention keep about as much as layers that share an input save. Of recomputed layers
    it is the input of each, and all of the one at work.
    """
    rows = stage.batch_size * tokens
    tiles = stage.batch_size * sample.tiles
    bin_rows = min(rows, stage.max_tokens or rows)
    bin_tiles = min(tiles, stage.max_tiles or tiles, tiles * bin_rows / rows)
    model, learned = kind.model, kind.learned_by(stage)
    vision, inner = model.config.vision_config, model.model
    parts = [(inner.language_model, bin_rows)]
    if "vision" in stage.learning:
        patches = (vision.image_size // vision.patch_size) ** 2
        parts.append((inner.vision_model, bin_tiles * patches))
    kept = at_work = 0.0
    for part, part_rows in parts:
        layers = layers_of(part)
        if config.gradient_checkpointing:
            kept += part_rows * part.config.hidden_size * len(layers)
            at_work = max(at_work, part_rows * _linear_widths(layers[0], learned))
        else:
            kept += part_rows * _linear_widths(part, learned)
    if {"vision", "projector"} & set(stage.learning):
        expected = TokenCounts(stage.counts, stage.weights).expected
        weights = {*inner.projector.parameters()}
        projected = bin_tiles * expected * _linear_widths(inner.projector, weights)
        if config.gradient_checkpointing:
            at_work = max(at_work, projected)
        else:
            kept += projected
    targets = sample.answer_tokens * stage.batch_size * bin_rows / rows
    # Of a chunk the logits, their softmax and their gradient.
    logits = min(targets * model.lm_head.weight.shape[0], CHUNK_LOGITS) * 3 * _FLOAT32
    return (kept + at_work) * _width(config) + logits


def _linear_widths(module: nn.Module, learned: Collection[nn.Parameter]) -> int:
    """Return the elements a row that linear layers keep; frozen ones do not need their inputs."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(
        (layer.weight in learned) * layer.in_features + layer.out_features for layer in layers
    )


def format_plan(plans: Collection[StagePlan]) -> str:
    """Return the plan as a table and its totals, for a terminal."""
    rows: list[tuple[str, ...]] = [
        (
            *("stage", "trained", "steps", "samples", "epochs"),
            *("tokens", "vision", "FLOP", "saved", "GiB"),
        )
    ]
    for plan in plans:
        trained = plan.trained_parameters
        rows.append(
            (
                plan.name,
                f"{_short(sum(trained.values()))} {'+'.join(trained)}",
                "~" * plan.steps_are_expected + str(plan.steps),
                _short(plan.samples),
                _epochs(plan),
                *map(_short, (plan.tokens, plan.vision_tokens)),
                _or_unknown(plan.flops, ".2e"),
                _or_unknown(plan.flops_saved, ".1%"),
                f"{plan.state_bytes / 2**30:.1f} + {_gib(plan.activation_bytes)}",
            )
        )
    lines = [text_table(rows, left=2)]
    known = [plan.flops for plan in plans if plan.flops is not None]
    total = f"{sum(known):.2e} floating-point operations in all"
    if not known:
        total = "?: the operations of converted stock models are not known"
    lines += [
        "",
        *dict.fromkeys(note for plan in plans for note in plan.notes),
        *(warning for plan in plans for warning in plan.warnings),
        total,
        "epochs: passes over the data, of a mixture over each part; ? where its size is not known.",
        "trained: parameters and modules. saved: of the arithmetic, against the largest count.",
        "GiB of one process: weights, gradients, optimiser + activations (estimated).",
    ]
    return "\n".join(lines)


def _epochs(plan: StagePlan) -> str:
    """Return the passes over the data, those over the parts of a mixture between "/"."""
    passes = ["?" if number is None else f"{number:.3g}" for number in plan.passes or [None]]
    return "~" * (plan.steps_are_expected and passes != ["?"]) + "/".join(passes)


def _or_unknown(number: float | None, form: str) -> str:
    return "?" if number is None else format(number, form)


def _gib(size: float | None) -> str:
    return _or_unknown(None if size is None else size / 2**30, ".1f")


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
