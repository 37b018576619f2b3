"""Models of random weights, and their training steps: of samples packed into one row, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import SEED
from benchmarks.prompts import IMAGE
from tokenflex_kernels import plan_packing

NOTHING_TO_LEARN = -100  # the label of tokens without a loss


def fields(width: int, hidden: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    """Return the fields of a configuration that the encoder and the language model both have."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, hidden, layers, heads), strict=True)) | others


def random_model(
    vision: dict[str, Any], text: dict[str, Any], device: str, dtype: torch.dtype = torch.float32
) -> Any:
    """Build SigLIP and Qwen2 with a projector between them.

    Args:
        vision: Fields of the SigLIP configuration.
        text: Fields of the Qwen2 configuration.
        device: Of the weights; "meta" for a model that is only counted.
        dtype: Of the weights.
    """
    from transformers import Qwen2Config, SiglipVisionConfig

    from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration

    no_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 1}
    config = TokenFlexConfig(
        SiglipVisionConfig(**vision, vision_use_head=False),
        Qwen2Config(**text, **no_ids),
        image_token_id=IMAGE,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        return TokenFlexForConditionalGeneration(config).to(dtype)


class Step:
    """Forward and backward of some samples; the gradients stay until the next step.

    Args:
        model: Of :func:`random_model`.
        prompts: Token ids of each sample, ``IMAGE`` once for each of its tiles.
        answers: How many of its last tokens have a loss, for each sample.
        pixels: [tiles, 3, height, width].
        counts: Vision tokens of each tile.
        packed: Whether the samples are one row, or padded to the longest.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[torch.Tensor],
        answers: Sequence[int],
        pixels: torch.Tensor,
        counts: Sequence[int],
        packed: bool,
    ) -> None:
        labels = []
        for ids, answer in zip(prompts, answers, strict=True):
            labels.append(ids.clone())
            labels[-1][: len(ids) - answer] = NOTHING_TO_LEARN
        plan = plan_packing(list(prompts), list(counts), IMAGE, labels=labels)
        learned = (plan.labels[1:] != NOTHING_TO_LEARN).nonzero().squeeze(1)
        self.model, self.device = model, model.device
        self.answers = plan.labels[learned + 1].to(self.device)
        dtype = next(model.parameters()).dtype
        self.inputs = {
            "pixel_values": pixels.to(self.device, dtype),
            "num_image_tokens": list(counts),
            "use_cache": False,
        }
        if packed:
            self.inputs["plan"] = plan.to(self.device)
        else:
            longest = max(plan.lengths)
            row = torch.arange(plan.num_samples).repeat_interleave(torch.tensor(plan.lengths))
            ids = torch.ones(plan.num_samples, longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            ids[row, plan.position_ids], mask[row, plan.position_ids] = plan.input_ids, 1
            learned = row[learned] * longest + plan.position_ids[learned]
            self.inputs |= {
                "input_ids": ids.to(self.device),
                "attention_mask": mask.to(self.device),
            }
        self.learned = learned.to(self.device)

    def loss(self) -> torch.Tensor:
        """Return the mean loss. The output layer sees the rows that have one, however they lie."""
        hidden = self.model.model(**self.inputs).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1)[self.learned])
        return F.cross_entropy(logits.float(), self.answers)

    def __call__(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss.detach()
