"""A training configuration to start from, for parts and data that a user has."""

from __future__ import annotations

from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic_core import to_jsonable_python
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
)

from tokenflex.data.faults import BrokenSample, broken_records, leaving_out
from tokenflex.data.samples import SampleDataset, size_of
from tokenflex.files import excerpt
from tokenflex.training.build import (
    build_dataset,
    build_processor,
    patch_grid,
    pretrained,
    saved_vision_config,
)
from tokenflex.training.config import ModelConfig, TrainConfig
from tokenflex.training.data_config import DataConfig
from tokenflex.training.strict import parse_yaml, validated

PAPER_SIDE = 16
"""Side of the paper's largest grid of vision tokens."""
KNOWN_PLACEHOLDERS = ("<image>", "<|image_pad|>", "<IMG_CONTEXT>", "<image_soft_token>")
MOST_SAMPLES_A_STEP = 32
FEW_STEPS = 100
"""A stage of fewer steps is named: a projector with random weights learns little in it."""
SAMPLES_TRIED = 8
"""Samples that are read, pictures too, before a configuration is written."""

_TEMPLATE = """\
# Written by `tokenflex init`. Every key: docs/reference/configuration.md; how stages, counts and
# packing work: docs/training.md. Replace single values on the command line with --set KEY=VALUE,
# for example --set stages.0.steps=500.
output: {output}
precision: {precision}  # "no" is float32; bf16 on a GPU

model:
  vision: {vision}
  text: {text}
  image_token: {image_token}  # {image_token_comment}
  num_image_tokens: {largest}  # default of a request; the encoder has {patches} patches an image
  max_tiles: 1  # more cut large images into tiles, each with the count of its sample

data: {data}  # {samples}

stages:
  # The new projector learns to speak to the language model; both parts stay as they are.
  - name: alignment
    steps: {steps}  # {passes} through the data{few}
    batch_size: {batch_size}  # samples a step, over all processes: as many as memory allows
    learning_rate: {{projector: 0.001}}
    counts: {counts}  # vision tokens of an image, drawn for each sample
    weights: [0.2, 0.3, 0.5]  # with these odds, the paper's
    max_tokens: 8192  # rows of one forward pass; fewer take less memory
    loss: square  # every answer counts, long ones not more; token: every token counts the same
    warmup_share: 0.03
  # Projector and language model learn the task. Add `vision: 0.000002` to train the encoder too.
  - name: instruction tuning
    steps: {steps}  # {passes} through the data{few}
    batch_size: {batch_size}
    learning_rate: {{projector: 0.00002, text: 0.00002}}
    counts: {counts}
    weights: [0.2, 0.3, 0.5]
    max_tokens: 8192
    loss: square
    warmup_share: 0.03

# Accuracy at each count after training; on data that was not trained on, if you have some:
# evaluation:
#   data: {{name: messages, path: held_out.jsonl}}
#   counts: {counts}
"""


class StartingConfig(NamedTuple):
    """A commented YAML configuration, and what a user should know of its data.

    Attributes:
        text: The configuration, which :func:`load_config` takes.
        samples: Samples of the data, without those that are known to be broken.
        broken: Samples that cannot be read, of all records and the first pictures.
        steps: Steps of each stage.
    """

    text: str
    samples: int
    broken: list[BrokenSample]
    steps: int

    @property
    def has_few_steps(self) -> bool:
        """True if one pass is too short for a projector that begins with random weights."""
        return self.steps < FEW_STEPS


def starting_config(vision: str, text: str, data: DataConfig, output: Path) -> StartingConfig:
    """Return a configuration to start from.

    The counts are the paper's 64, 144 and 256 where the encoder's grid has 16 x 16 patches or
    more. Where it has fewer, they are the squares of half, three quarters and all of a side,
    rounded down. Both stages pass through the data once.

    Args:
        vision: Folder or hub name of the vision encoder.
        text: Folder or hub name of the language model.
        data: The training data.
        output: Folder of the run.

    Raises:
        ValueError: A part cannot be loaded or is of another kind, the language model has no chat
            template, the encoder's grid has fewer than 3 x 3 patches, or none of the data's first
            :data:`SAMPLES_TRIED` samples can be read.
    """
    _check_kinds(vision, text)
    patches = patch_grid(saved_vision_config(vision))
    counts = _counts_for(min(*patches) if patches else PAPER_SIDE, vision)
    tokenizer = pretrained(AutoTokenizer, text)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"--text {excerpt(text)} must have a chat template, which writes conversations as the "
            "model reads them, got none; take the instruction-tuned model, or set chat_template "
            "of the tokenizer and save it to a folder"
        )
    known = [word for word in KNOWN_PLACEHOLDERS if word in tokenizer.get_vocab()]
    samples, broken = _count_samples(build_dataset(data), str(data.path))
    batch_size = min(MOST_SAMPLES_A_STEP, samples)
    steps = ceil(samples / batch_size)
    passes = steps * batch_size / samples
    filled = _TEMPLATE.format(
        output=_flow(str(output)),
        precision="bf16" if torch.cuda.is_available() else '"no"',
        vision=_flow({"path": vision}),
        text=_flow({"path": text}),
        image_token=_flow(known[0] if known else "<image>"),
        image_token_comment=(
            "a token of the language model" if known else "a new token; marks an image in texts"
        ),
        largest=counts[-1],
        patches=" x ".join(map(str, patches)) if patches else "any number of",
        data=_flow(_given_keys(data)),
        samples=f"{samples:,} sample{'s' * (samples != 1)}"
        + (f"; {len(broken):,} more cannot be read" if broken else ""),
        steps=steps,
        passes="one pass" if passes == 1 else f"{passes:.2f} passes",
        few="; few: a small data set takes many" if steps < FEW_STEPS else "",
        batch_size=batch_size,
        counts=_flow([*counts]),
    )
    name = "the configuration to write"
    config = validated(parse_yaml(filled.encode(), name), TrainConfig, name)
    assert isinstance(config.model, ModelConfig)  # as the template has it
    build_processor(config.model, [data])
    return StartingConfig(filled, samples, broken, steps)


def _check_kinds(vision: str, text: str) -> None:
    """Raise ValueError unless one is a vision encoder and the other a language model."""
    config = saved_vision_config(vision)
    if not _takes_pictures(config):
        raise ValueError(
            f"--vision {excerpt(vision)} must be a vision encoder, got a model of type "
            f"{excerpt(config.model_type)}"
        )
    config = pretrained(AutoConfig, text)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"--text {excerpt(text)} must be a language model, got a model of type "
            f"{excerpt(config.model_type)}"
        )


def _takes_pictures(config: PretrainedConfig) -> bool:
    classes = MODEL_MAPPING.get(type(config), ())
    classes = classes if isinstance(classes, tuple) else (classes,)
    return any(one.main_input_name == "pixel_values" for one in classes)


def _count_samples(dataset: SampleDataset, path: str) -> tuple[int, list[BrokenSample]]:
    """Return how many samples there are, and those beside them that are known to be broken.

    Raises:
        ValueError: The first samples cannot be read, or the data does not know its length.
    """
    size = size_of(dataset)
    if size is None:
        raise ValueError(f"--data {excerpt(path)} must have a known number of samples")
    broken: list[BrokenSample] = broken_records(dataset)
    left_out = {sample.index for sample in broken}
    tried = [*islice((index for index in range(size) if index not in left_out), SAMPLES_TRIED)]
    for index in tried:
        with leaving_out(dataset, index, broken):
            dataset[index]
    if len(broken) == len(left_out) + len(tried):
        reason = f"; the last reason: {broken[-1].reason}" if broken else ""
        raise ValueError(
            f"--data {excerpt(path)} must have samples that can be read, got none among the first "
            f"{len(tried)}{reason}"
        )
    return size - len(broken), broken


def _given_keys(data: DataConfig) -> dict[str, Any]:
    # No model_dump, which leaves out the keys that change nothing about the samples.
    given = {key: getattr(data, key) for key in type(data).model_fields}
    keys = {key: given[key] for key in given if key in data.model_fields_set}
    return {k: v for k, v in to_jsonable_python(keys).items() if v not in (None, False, [])}


def _flow(value: Any) -> str:
    """Format a value as YAML on one line."""
    text = yaml.safe_dump(
        value,
        default_flow_style=True,
        width=float("inf"),
        sort_keys=False,
        allow_unicode=True,
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _counts_for(side: int, vision: str) -> list[int]:
    """Return three counts that a square grid of patches with this side can be pooled to."""
    largest = min(PAPER_SIDE, side)
    sides = sorted({max(1, largest // 2), max(1, 3 * largest // 4), largest})
    if len(sides) < 3:
        raise ValueError(
            f"--vision {excerpt(vision)} must have at least 3 x 3 patches an image for three "
            f"counts, got {side} x {side}"
        )
    return [side * side for side in sides]
