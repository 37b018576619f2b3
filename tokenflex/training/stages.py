"""The parts of one stage: what learns, the optimiser, the learning rate, the steps, the meter."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import torch

from tokenflex.counts import TokenCounts
from tokenflex.data.order import StepSampler, load_in_order
from tokenflex.data.steps import PackedStep, StepPacker
from tokenflex.training.config import StageConfig
from tokenflex.training.flops import peak_flops
from tokenflex.training.model_kind import ModelKind
from tokenflex.training.records import Meter, StageRecord
from tokenflex.training.setup import Setup

FUSED_DEVICES = ("cpu", "cuda")
"""Devices on which AdamW updates all weights in one call. A state keeps how its run updates."""


def build_optimizer(kind: ModelKind, stage: StageConfig) -> torch.optim.Optimizer:
    """Freeze all modules but those that learn in ``stage``; return an optimiser of the others."""
    model = kind.model
    model.requires_grad_(False)
    model.eval()  # a frozen module answers as it does when the model is used
    groups = []
    for name, rate in stage.learning_rate.items():
        if not rate:
            continue
        modules = kind.modules[name]
        for module in modules:
            module.train()
        ordered = kind.learned(name)
        for parameter in ordered:
            parameter.requires_grad_(True)
        groups.append({"params": ordered, "lr": rate})
    return torch.optim.AdamW(
        groups,
        betas=stage.betas,
        weight_decay=stage.weight_decay,
        fused=model.device.type in FUSED_DEVICES or None,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, stage: StageConfig, record: StageRecord
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule that follows the steps and tokens of ``record``."""
    counts = record.counts
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: learning_rate_factor(stage, counts["steps"], counts["tokens"])
    )


def learning_rate_factor(stage: StageConfig, steps: int, tokens: int) -> float:
    """Return the factor of the learning rates after a number of steps and tokens of ``stage``.

    In steps it is transformers' schedule of the same name: a linear warm-up, then half a cosine to
    zero, or a constant. With a budget in tokens the same curve follows the tokens; a warm-up in
    steps, which no number of tokens corresponds to, is then another factor.
    """
    budget, ramp = stage.budget, 1.0
    warm_up = stage.warmup_share * budget
    done = float(steps)
    if stage.tokens is not None:
        done = min(float(tokens), budget)
        if stage.warmup_steps:
            ramp = min(1.0, steps / stage.warmup_steps)
    elif stage.warmup_steps:
        warm_up = stage.warmup_steps
    if done < warm_up:
        return done / warm_up
    if stage.schedule == "constant":
        return ramp
    progress = (done - warm_up) / max(1.0, budget - warm_up)
    return ramp * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def build_meter(setup: Setup, stage: StageConfig, record: StageRecord) -> Meter:
    """Return the meter of a stage, which counts in ``record``."""
    config, accelerator = setup.config, setup.accelerator
    device = accelerator.device
    peak = None if config.peak_tflops is None else 1e12 * config.peak_tflops
    if peak is None and device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device), config.precision)
    return Meter(
        record,
        setup.kind.training_flops(stage),
        teacher_flops=setup.kind.teacher_flops(stage),
        peak=None if peak is None else peak * accelerator.num_processes,
        device=device,
    )


def load_steps(
    setup: Setup, stage_index: int, records: Sequence[dict[str, Any]]
) -> Generator[PackedStep | Exception, None, None]:
    """Yield the steps left of a stage, and at their end the error that prevents the next one.

    Each step is a pure function of the configuration and of its place in the run. ``records`` are
    the counts of the stages that have begun, this one among them if it has.
    """
    config = setup.config
    stage = config.stages[stage_index]
    data = config.data_of(stage)
    # A stage continues where an earlier one on the same data has stopped.
    first_position = sum(
        record["steps"] * earlier.samples_read
        for earlier, record in zip(config.stages[: stage_index + 1], records, strict=False)
        if config.data_of(earlier) == data
    )
    unit, done = "steps" if stage.tokens is None else "tokens", 0
    if len(records) > stage_index:
        done = records[stage_index][unit]
    sampler = StepSampler(
        setup.orders[data],
        first_position=first_position,
        # Of a budget in tokens the most steps: each has at least one token.
        steps=max(0, math.ceil(stage.budget - done)),
        batch_size=stage.samples_read,
    )
    packer = StepPacker(
        setup.datasets[data],
        setup.kind.collator(
            TokenCounts(stage.counts, stage.weights, seed=config.seed),
            max_length=stage.max_length,
            teacher_count=stage.teacher_count,
        ),
        draw=stage.draw,
        max_tokens=stage.max_tokens,
        max_tiles=stage.max_tiles,
        tile_cost=setup.kind.tile_cost(stage),
        rank=setup.accelerator.process_index,
        num_ranks=setup.accelerator.num_processes,
    )
    try:
        # Not prepared by accelerate: the packer gives each process its own share.
        yield from load_in_order(packer, sampler, workers=config.workers)
    except Exception as error:
        yield error
