"""One optimiser step over a rank's bins: forward, the loss of the whole step, backward, update."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.distributed.tensor import DTensor

from tokenflex.counts import TokenCount, tokens_of
from tokenflex.data.packing import PackedBatch
from tokenflex.data.steps import PackedStep
from tokenflex.models.vision import blank_tile
from tokenflex.training.agreement import AgreedStop, other_process_stopped, share
from tokenflex.training.config import StageConfig, TrainConfig
from tokenflex.training.sharding import is_sharded, note_what_learns
from tokenflex.training.trackers import tracker_arguments


@dataclass(frozen=True)
class StepOutcome:
    """What came of a step, the same on every rank.

    Attributes:
        loss: float32 scalar, the weighted mean over the answer tokens of all ranks.
        norm: scalar, the gradients' norm before it was clipped.
        broken: samples that ranks left out, each counted by every rank that met it.
        interrupted: whether a signal came to any rank before the step.
        distillation_loss: float32 scalar, the part of the loss that is ``distillation`` times this;
            None where that is off.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    broken: int
    interrupted: bool
    distillation_loss: torch.Tensor | None = None


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The engine that knows devices, precision and processes.

    Raises:
        ValueError: it was launched with FSDP of its own.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "sharding: full in the configuration shards; launch without accelerate's FSDP "
            "(--use_fsdp, distributed_type: FSDP), got ACCELERATE_USE_FSDP=true"
        )
    # Encoders have parts that no patch goes through, as SigLIP's pooling head.
    replicas = DistributedDataParallelKwargs(
        find_unused_parameters=True, gradient_as_bucket_view=True
    )
    accelerator = Accelerator(
        # Left alone, accelerate takes each process that torchrun starts on a CPU for the only one.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.precision,
        kwargs_handlers=[replicas],
        **tracker_arguments(config.trackers, config.output),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"WORLD_SIZE must be the number of processes that accelerate finds, "
            f"{accelerator.num_processes}, got {launched}"
        )
    return accelerator


def prepare(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Model and optimiser of a stage as :func:`optimize` takes them."""
    if is_sharded(model):
        note_what_learns(model)
        return model, optimizer
    prepared: tuple[Any, Any] = accelerator.prepare(model, optimizer)
    return prepared


def optimize(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    packed: PackedStep,
    stage: StageConfig,
    *,
    interrupted: bool = False,
) -> StepOutcome:
    """Learn from one step; ``model`` and ``optimizer`` are those that :func:`prepare` gave.

    ``interrupted`` is whether a signal came to this rank: all learn of it here.

    Raises:
        AgreedStop: another rank has no data for this step; nothing was learned from it.
    """
    device = accelerator.device
    weights = [target_weights(batch, stage.loss).to(device) for batch in packed.bins]
    weight_here = sum(float(w.sum()) for w in weights)
    weight_everywhere, broken_everywhere, interrupted_everywhere, failed_anywhere = share(
        accelerator, weight_here, len(packed.broken), interrupted, False
    )
    if failed_anywhere:
        raise AgreedStop(KeyboardInterrupt()) if interrupted_everywhere else other_process_stopped()
    count = min(stage.drawn_counts, key=tokens_of)
    loss, distillation_loss = torch.zeros(2, device=device)
    for place, (batch, weight) in enumerate(zip(packed.bins, weights, strict=True), start=1):
        last = place == len(packed.bins)
        # Shards exchange gradients after every bin: whole ones would need the memory of no shards.
        with nullcontext() if last or is_sharded(model) else accelerator.no_sync(model):
            batch = with_a_tile(batch.to(device), accelerator.unwrap_model(model), count)
            with accelerator.autocast():
                inputs = batch.model_inputs()
                if batch.teacher is not None:
                    inputs["teacher"] = batch.teacher.model_inputs()
                    inputs["distillation"] = stage.distillation
                outputs = model(**inputs, targets=batch.targets, target_weights=weight)
            part = outputs.loss / weight_everywhere
            # Gradients are averaged over ranks; the parts of all ranks add up to the loss.
            accelerator.backward(part * accelerator.num_processes)
            loss += part.detach()
            if stage.distillation:
                distillation_loss += outputs.distillation_loss / weight_everywhere
    norm = accelerator.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepOutcome(
        loss=accelerator.reduce(loss, "sum"),
        norm=norm.full_tensor() if isinstance(norm, DTensor) else norm,
        broken=int(broken_everywhere),
        interrupted=bool(interrupted_everywhere),
        distillation_loss=accelerator.reduce(distillation_loss, "sum")
        if stage.distillation
        else None,
    )


def stop_without_data(
    accelerator: Accelerator, error: Exception, *, interrupted: bool = False
) -> AgreedStop:
    """Tell the other ranks, which are at :func:`optimize`, that this one has no data for the step.

    Returns:
        What to raise: ``error``, or KeyboardInterrupt where a signal came to any rank.
    """
    *_, interrupted_everywhere, _ = share(accelerator, 0, 0, interrupted, True)
    return AgreedStop(KeyboardInterrupt() if interrupted_everywhere else error)


def with_a_tile(batch: PackedBatch, model: Any, count: TokenCount) -> PackedBatch:
    """``batch``, with a blank tile of ``count`` vision tokens, which no row shows, if it has none.

    Then a bin of text alone has a gradient too, zero, where text does not learn; and processes that
    gather shards together run the same modules.
    """
    if len(batch.pixel_values):
        return batch
    pixels, grids = blank_tile(model.model.vision_model, model.config.vision_config)
    pixels = pixels.to(batch.plan.input_ids.device)
    return replace(batch.with_unseen_tile(count), pixel_values=pixels, grids=grids)


def target_weights(batch: PackedBatch, loss: str) -> torch.Tensor:
    """float32 [targets]: how much each answer token of ``batch`` counts.

    "square" is one over the square root of the answer's length, between every token (0) and every
    answer (1) counting the same: what the released model was trained with.
    """
    if loss == "token":
        return torch.ones(len(batch.targets))
    lengths = torch.tensor([length for _, length in batch.answers], dtype=torch.int64)
    return lengths.float().rsqrt().repeat_interleave(lengths)
