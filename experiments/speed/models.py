"""Models of random weights, their training steps, and the clocks, options and CSV of a study."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.benchmark

from benchmarks.harness import SEED
from benchmarks.prompts import IMAGE
from benchmarks.results import NewRow, Row, environment, machine_name, read_csv, write_csv
from tokenflex.training.flops import Flops
from tokenflex_kernels import plan_packing

RESULTS = Path(__file__).with_name("results")
IGNORED = -100  # the label of tokens without a loss


def fields(width: int, hidden: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    """Return the configuration's fields that the encoder and the language model share."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, hidden, layers, heads), strict=True)) | others


def random_model(
    vision: dict[str, Any], text: dict[str, Any], device: str, dtype: torch.dtype = torch.float32
) -> Any:
    """Build SigLIP and Qwen2 with a projector between them.

    Args:
        vision: Fields of the SigLIP configuration.
        text: Fields of the Qwen2 configuration.
        device: Device of the weights; "meta" for a model whose operations are only counted.
        dtype: Type of the weights.
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


@dataclass(frozen=True)
class Samples:
    """The sizes of several samples, an array each."""

    text: np.ndarray  # text tokens
    tiles: np.ndarray  # tiles of the image
    counts: np.ndarray  # vision tokens of each tile
    answers: np.ndarray  # number of text tokens at the end that have a loss

    @property
    def rows(self) -> np.ndarray:
        """Rows of the language model."""
        return self.text + self.tiles * self.counts

    def operations(self, flops: Flops, members: Sequence[int], padded: bool = False) -> float:
        """Return the operations of the samples ``members``, packed or padded to the longest."""
        rows, tiles = self.rows[members], self.tiles[members]
        return flops.total(
            tiles=float(tiles.sum()),
            vision_tokens=float((tiles * self.counts[members]).sum()),
            tokens=float(rows.max() * len(rows) if padded else rows.sum()),
            targets=float(self.answers[members].sum()),
        )


class Step:
    """Forward and backward of samples of random numbers; gradients stay until the next step.

    Args:
        model: A model of :func:`random_model`.
        samples: The sizes.
        members: Numbers of the samples that take part.
        packed: Whether they are one row, or padded to the longest.
    """

    def __init__(self, model: Any, samples: Samples, members: Sequence[int], packed: bool) -> None:
        side, vocabulary = model.config.vision_config.image_size, model.lm_head.weight.shape[0]
        prompts, labels, pixels = [], [], []
        counts: list[int] = []
        for i in members:
            tiles, length = int(samples.tiles[i]), int(samples.text[i])
            generator = torch.Generator().manual_seed(SEED + i)
            text = torch.randint(2, vocabulary, (length,), generator=generator)
            prompts.append(torch.cat([torch.full((tiles,), IMAGE), text]))
            labels.append(prompts[-1].clone())
            labels[-1][: -samples.answers[i]] = IGNORED
            pixels.append(torch.randn(tiles, 3, side, side, generator=generator))
            counts += [int(samples.counts[i])] * tiles
        plan = plan_packing(prompts, counts, IMAGE, labels=labels)
        learned = (plan.labels[1:] != IGNORED).nonzero().squeeze(1)
        self.model, device = model, model.device
        self.answers = plan.labels[learned + 1].to(device)
        self.inputs: dict[str, Any] = {
            "pixel_values": torch.cat(pixels).to(device, next(model.parameters()).dtype),
            "num_image_tokens": counts,
            "use_cache": False,
        }
        if packed:
            self.inputs["plan"] = plan.to(device)
        else:
            longest = max(plan.lengths)
            row = torch.arange(plan.num_samples).repeat_interleave(torch.tensor(plan.lengths))
            ids = torch.ones(plan.num_samples, longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            ids[row, plan.position_ids], mask[row, plan.position_ids] = plan.input_ids, 1
            learned = row[learned] * longest + plan.position_ids[learned]
            self.inputs |= {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        self.learned = learned.to(device)

    def loss(self) -> torch.Tensor:
        """Return the mean loss. The output layer sees only the rows that have one."""
        hidden = self.model.model(**self.inputs).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1)[self.learned])
        return F.cross_entropy(logits.float(), self.answers)

    def __call__(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss.detach()


Key = TypeVar("Key")


class Taken(NamedTuple):
    """Seconds of a call: by the clock on the wall, and of this process's processors."""

    seconds: float
    processor_seconds: float


def take_turns(calls: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, list[Taken]]:
    """Return what each call takes in each round. The calls take turns; a first round warms up."""

    def timed(call: Callable[[], object]) -> Taken:
        began, processor_began = torch.utils.benchmark.timer(), time.process_time()
        call()
        processor_seconds = time.process_time() - processor_began
        return Taken(torch.utils.benchmark.timer() - began, processor_seconds)

    turns = [{key: timed(call) for key, call in calls.items()} for _ in range(rounds + 1)]
    return {key: [turn[key] for turn in turns[1:]] for key in calls}


def parse_options(
    study: str, about: str | None, arguments: list[str] | None, **numbers: tuple[int, str]
) -> argparse.Namespace:
    """Return a command's options: ``device``, ``out``, and positive numbers.

    Args:
        study: The module's name, which names the folder of its results too.
        about: The description in ``--help``.
        arguments: The words of the command line; None for those of this process.
        **numbers: Default and description of each number.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.speed.{study}", description=about)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    folder = RESULTS / study.replace("_", "-")
    parser.add_argument("--out", type=Path, default=folder, help="folder for CSV and picture")
    for name, (default, description) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=description)
    options = parser.parse_args(arguments)
    for name in numbers:
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def publish(
    rows: Sequence[NewRow],
    device: str,
    folder: Path,
    draw: Callable[[list[Row], Path], object] | None = None,
) -> list[Row]:
    """Write the machine's CSV, draw a picture beside it, and return the rows as written."""
    shared = environment(device)
    path = folder / f"{machine_name(shared)}.csv"
    write_csv(path, rows, shared)
    published = read_csv(path)
    if draw:
        draw(published, path.with_suffix(".png"))
    print(f"{len(rows)} rows in {path}")
    return published
