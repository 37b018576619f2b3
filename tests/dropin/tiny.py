"""A random-weight model of each family, a few thousand parameters, and prompts for it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from tests.dropin.configs import CONFIGS, MROPE, TOO_NEW, model_type
from tests.dropin.configs.common import END, IMAGE, PAD, START
from tests.dropin.table import image_inputs, tiles_per_image
from tokenflex.dropin.families import family_of

MODELS = sorted(CONFIGS)


def one_of_each_kind(names: Sequence[str]) -> list[str]:
    """Return the first name for each adapter, for tests of what is the same in all families."""
    first: dict[Any, str] = {}
    for name in names:
        family = family_of(SimpleNamespace(model_type=model_type(name)))
        first.setdefault(family.patch_grids, name)
    return sorted(first.values())


KINDS = one_of_each_kind(["llava", *MODELS])


def stock_model(name: str, seed: int = 0) -> Any:
    """Return a model in evaluation mode, with weights that depend only on the arguments.

    A test whose family needs a newer transformers than the installed one is skipped.
    """
    if name in TOO_NEW:
        pytest.skip(f"{name} needs transformers {TOO_NEW[name]} or newer")
    config = CONFIGS[name]()
    mapping = transformers.AutoModelForImageTextToText._model_mapping
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mapping[type(config)](config).eval()
    model.generation_config.eos_token_id = None  # a fixed number of new tokens
    return model


class Prompt(NamedTuple):
    """Token ids with one ``IMAGE`` per image, the images' counts, and the images' seeds."""

    ids: list[int]
    counts: list[Any]
    images: list[int]


PROMPTS = [
    Prompt([3, 4, START, IMAGE, END, 5, 6], [9], [1]),
    Prompt([7, START, IMAGE, END, 8, START, IMAGE, END, 9, 10, 11], [25, 16], [2, 3]),
]


def batch(name: str, prompts: Sequence[Prompt], *, labels: bool = False) -> dict[str, Any]:
    """Return the prompts as one left-padded batch, like the family's processor."""
    tiles = tiles_per_image(name)
    rows = [_expanded(prompt, tiles) for prompt in prompts]
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    ids = torch.tensor([[PAD] * n + row for n, row in zip(padding, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(row) for n, row in zip(padding, rows, strict=True)])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    seeds = [seed for prompt in prompts for seed in prompt.images]
    if seeds:
        inputs |= image_inputs(name, seeds)
        inputs["num_image_tokens"] = [
            count for prompt in prompts for count in prompt.counts for _ in range(tiles)
        ]
    if name in MROPE:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if name == "ernie4_5_vl_moe":
        inputs["moe_mm_token_type_ids"] = ((ids >= IMAGE) & (ids <= END)).long()
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)  # all of a prompt is its prefix
    if labels:
        inputs["labels"] = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
        if name == "paligemma":  # what is learned is the suffix
            inputs["token_type_ids"] = torch.ones_like(ids)
    return inputs


def _expanded(prompt: Prompt, tiles: int) -> list[int]:
    repeats = iter(_size(count) * tiles for count in prompt.counts)
    return [i for i in prompt.ids for _ in range(next(repeats) if i == IMAGE else 1)]


def _size(count: Any) -> int:
    return count[0] * count[1] if isinstance(count, tuple) else count
