"""One optimiser step over a rank's bins: forward, the loss of the whole step, backward, update."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from tokenflex.data.packing import PackedBatch
from tokenflex.data.steps import PackedStep
from tokenflex.training.config import StageConfig, TrainConfig
from tokenflex.training.trackers import tracker_arguments


@dataclass(frozen=True)
class StepOutcome:
    """What came of a step, the same on every rank.

    Attributes:
        loss: float32 scalar, the weighted mean over the answer tokens of all ranks.
        norm: scalar, the gradients' norm before it was clipped.
        broken: samples that ranks left out, each counted by every rank that met it.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    broken: int


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The engine that knows devices, precision and processes."""
    # Encoders have parts that no patch goes through, and a bin may hold no image at all.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        mixed_precision=config.precision,
        kwargs_handlers=[unused],
        **tracker_arguments(config.trackers, config.output),
    )


def optimize(
    accelerator: Accelerator, model: Any, optimizer: Any, packed: PackedStep, stage: StageConfig
) -> StepOutcome:
    """Learn from one step; ``model`` and ``optimizer`` are those that accelerate prepared."""
    device = accelerator.device
    weights = [target_weights(batch, stage.loss).to(device) for batch in packed.bins]
    here = torch.tensor([sum(float(w.sum()) for w in weights), len(packed.broken)]).to(device)
    weight_everywhere, broken_everywhere = accelerator.reduce(here, "sum").tolist()
    loss = torch.zeros((), device=device)
    for place, (batch, weight) in enumerate(zip(packed.bins, weights, strict=True), start=1):
        last = place == len(packed.bins)
        with nullcontext() if last else accelerator.no_sync(model):
            batch = batch.to(device)
            with accelerator.autocast():
                logits = model(**batch.model_inputs()).logits[0]
            each = F.cross_entropy(logits.float(), batch.targets, reduction="none")
            share = (each * weight).sum() / weight_everywhere
            # Gradients are averaged over ranks; the shares of all ranks add up to the loss.
            accelerator.backward(share * accelerator.num_processes)
            loss += share.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepOutcome(accelerator.reduce(loss, "sum"), norm, int(broken_everywhere))


def target_weights(batch: PackedBatch, loss: str) -> torch.Tensor:
    """float32 [targets]: how much each answer token of ``batch`` counts.

    "square" is one over the square root of the answer's length, between every token (0) and every
    answer (1) counting the same: what the released model was trained with.
    """
    if loss == "token":
        return torch.ones(len(batch.targets))
    lengths = torch.tensor([length for _, length in batch.answers], dtype=torch.int64)
    return lengths.float().rsqrt().repeat_interleave(lengths)
