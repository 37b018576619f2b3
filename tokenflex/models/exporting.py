"""Images and prompts while ``torch.export`` traces: one count, for tiles and prompts of any number.

A graph with a dynamic batch has no list with an entry per image, and cannot read placeholders back
to the host. With one count for all tiles it needs neither: the n-th placeholder of a batch is the
n-th vision token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokenflex.counts import is_one_count
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex_kernels.tracing import is_exporting


def traces_one_count(num_image_tokens: Any, image_index: Any) -> bool:
    """Return whether ``torch.export`` traces a call whose tiles all have one count.

    With a list of counts, or images that are shown several times, the number of tiles is a constant
    of the graph, and the call is traced as it runs.
    """
    if not is_exporting() or image_index is not None:
        return False
    return num_image_tokens is None or is_one_count(num_image_tokens)


@dataclass(frozen=True)
class UniformTokens:
    """Vision tokens of tiles that all have one count.

    Attributes:
        per_tile: [tiles, count, D].
    """

    per_tile: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        """Vision tokens of one tile after another, [tiles * count, D]."""
        return self.per_tile.flatten(0, 1)

    def merge(
        self,
        embedding: nn.Module,
        config: TokenFlexConfig,
        *,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        seen: int,
    ) -> dict[str, Any]:
        """Return what :func:`tokenflex.models.placeholders.merge_prompt` does, as a graph can.

        The graph refuses a batch with another number of placeholders than vision tokens. It cannot
        name the row, and does not notice two rows whose placeholders were swapped.

        Raises:
            ValueError: ``input_ids`` are not given.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("torch.export needs input_ids for prompts with images")
        embeds = embedding(input_ids)
        is_placeholder = input_ids == config.image_token_id
        number = self.per_tile.shape[0] * self.per_tile.shape[1]
        torch._assert_async(
            is_placeholder.sum() == number,
            "input_ids must hold as many image placeholders as there are vision tokens",
        )
        order = is_placeholder.flatten().cumsum(0).view(input_ids.shape) - 1
        tokens = self.tokens.to(embeds)[order.clamp(0, number - 1)]
        if config.image_positions == "shared":
            batch, length = input_ids.shape
            if position_ids is None:
                position_ids = torch.arange(seen, seen + length, device=input_ids.device)
            if attention_mask is None:  # or transformers takes equal positions for new samples
                attention_mask = input_ids.new_ones(batch, seen + length)
            count = self.per_tile.shape[1]
            to_last = torch.where(is_placeholder, count - 1 - order % count, 0)
            columns = torch.arange(length, device=input_ids.device) + to_last
            position_ids = position_ids.expand(batch, length).gather(1, columns)
        return {
            "inputs_embeds": torch.where(is_placeholder.unsqueeze(-1), tokens, embeds),
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
