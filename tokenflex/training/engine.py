"""One optimiser step over a process's bins: forward, loss of the whole step, backward, update."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.distributed.tensor import DTensor

from tokenflex.counts import tokens_of
from tokenflex.data.steps import Bin, PackedStep
from tokenflex.training.agreement import AgreedStop, other_process_stopped, share
from tokenflex.training.config import StageConfig, TrainConfig
from tokenflex.training.sharding import is_sharded, refresh_shards
from tokenflex.training.trackers import tracker_arguments


@dataclass(frozen=True)
class StepOutcome:
    """The result of a step, the same on every process.

    Attributes:
        loss: Weighted mean over the answer tokens of all processes.
        norm: Norm of the gradients before they were clipped.
        broken: Number of samples that were left out, counted by every process that met them.
        interrupted: A signal came to any process before the step.
        distillation_loss: The mean that ``distillation`` multiplies; 0 without distillation.
    """

    loss: float
    norm: float
    broken: int
    interrupted: bool
    distillation_loss: float = 0.0


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator, which knows devices, precision and processes.

    Raises:
        ValueError: The run was launched with accelerate's own FSDP, or with processes that
            accelerate does not find.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "sharding: full in the configuration shards; launch without accelerate's FSDP "
            "(--use_fsdp, distributed_type: FSDP), got ACCELERATE_USE_FSDP=true"
        )
    # Encoders have parts that no patch goes through, such as SigLIP's pooling head.
    replicas = DistributedDataParallelKwargs(
        find_unused_parameters=True, gradient_as_bucket_view=True
    )
    accelerator = Accelerator(
        # By default accelerate takes each process that torchrun starts on a CPU for the only one.
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
    """Return model and optimiser of a stage as :func:`optimize` takes them."""
    if is_sharded(model):
        refresh_shards(model)
        return model, optimizer
    if accelerator.scaler is None:  # accelerate's wrapper only scales gradients, and looks for LOMO
        return accelerator.prepare(model), optimizer
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
    """Learn from one step; ``model`` and ``optimizer`` are those that :func:`prepare` returned.

    ``interrupted`` says that a signal came to this process. All processes are told here.

    Raises:
        AgreedStop: Another process has no data for this step; nothing was learned from it.
    """
    device = accelerator.device
    weights = [target_weights(batch, stage.loss).to(device) for batch in packed.bins]
    total_weight, broken, interruptions, failures = share(
        accelerator,
        sum(float(weight.sum()) for weight in weights),
        len(packed.broken),
        interrupted,
        False,
    )
    if failures:
        raise AgreedStop(KeyboardInterrupt()) if interruptions else other_process_stopped()
    count = min(stage.drawn_counts, key=tokens_of)
    loss, distillation_loss = torch.zeros(2, device=device)
    for index, (batch, weight) in enumerate(zip(packed.bins, weights, strict=True)):
        is_last = index == len(packed.bins) - 1
        # Shards exchange gradients after every bin: whole gradients would undo their saving.
        with nullcontext() if is_last or is_sharded(model) else accelerator.no_sync(model):
            batch = batch.to(device)
            batch = batch.with_every_gradient(accelerator.unwrap_model(model), count)
            with accelerator.autocast():
                inputs = batch.model_inputs()
                if batch.teacher is not None:
                    inputs["teacher"] = batch.teacher.model_inputs()
                    inputs["distillation"] = stage.distillation
                outputs = model(**inputs, targets=batch.targets, target_weights=weight)
            part = outputs.loss / total_weight
            # Gradients are averaged over ranks; the parts of all ranks add up to the loss.
            accelerator.backward(part * accelerator.num_processes)
            loss += part.detach()
            if stage.distillation:
                distillation_loss += outputs.distillation_loss / total_weight
    learning = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = accelerator.clip_grad_norm_(learning, stage.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if stage.distillation:
        distillation_loss = accelerator.reduce(distillation_loss, "sum")
    return StepOutcome(
        loss=accelerator.reduce(loss, "sum").item(),
        norm=(norm.full_tensor() if isinstance(norm, DTensor) else norm).item(),
        broken=int(broken),
        interrupted=bool(interruptions),
        distillation_loss=distillation_loss.item(),
    )


def stop_without_data(
    accelerator: Accelerator, error: Exception, *, interrupted: bool = False
) -> AgreedStop:
    """Tell the other processes, which are at :func:`optimize`, that this one has no data.

    Returns:
        The exception to raise: with ``error``, or with KeyboardInterrupt where a signal came to any
        process.
    """
    *_, interruptions, _ = share(accelerator, 0, 0, interrupted, True)
    return AgreedStop(KeyboardInterrupt() if interruptions else error)


def target_weights(batch: Bin, loss: str) -> torch.Tensor:
    """Return the weight of each answer token of ``batch``, float32 [targets].

    "square" is one over the square root of the answer's length, as the released model was trained:
    between equal tokens (power 0) and equal answers (power 1).
    """
    if loss == "token":
        return torch.ones(len(batch.targets))
    lengths = torch.tensor([length for _, length in batch.answers], dtype=torch.int64)
    return lengths.float().rsqrt().repeat_interleave(lengths)
