"""``python -m benchmarks.packing_pace``: samples a second of packed and of padded training.

A stock LLaVA of transformers, with random weights, goes through transformers' Trainer on one CPU
thread in four ways, over the same samples:

* ``padded``: batches of samples as they come, right-padded;
* ``padded, by length``: batches of samples of like lengths, as grouping by length makes them;
* ``packed``: the batches of ``padded``, each one row by ``tokenflex.packing``;
* ``packed, one mask``: the same rows under transformers' "sdpa", with its mask of all rows.

Ways take turns, a step each, in one process. A step is the processor seconds from its begin to the
next step's begin: the model, the optimiser, and the batch. Samples are outputs of a processor, made
before anything is timed. Before that, the losses of the first step must agree. Samples a second are
those of all rounds over the seconds of all rounds; ``ratio`` is over ``padded``, with a bootstrap
interval of 95 % over rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from benchmarks.report import table
from benchmarks.results import RESULTS, NewRow, Row, replace_rows
from benchmarks.training_pace import LOSS_LIMIT, Begins, Turn, alternate
from tokenflex import packing
from tokenflex_kernels.options import output_folder, positive

PADDED, BY_LENGTH = "padded", "padded, by length"
PACKED, ONE_MASK = "packed", "packed, one mask"
BATCH = 8  # samples a step
WARM_UP = 2  # rounds that are not counted
VOCABULARY, IMAGE = 512, 500
PIXELS, PATCH = 64, 8
IMAGE_TOKENS = (PIXELS // PATCH) ** 2
LAYERS = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


@dataclass(frozen=True)
class Case:
    """A distribution of samples.

    Attributes:
        median: Text tokens of a sample.
        spread: Standard deviation of their logarithm.
        longest: Text tokens at most.
        images: Numbers of images, drawn alike.
    """

    median: int
    spread: float
    longest: int
    images: tuple[int, ...]


CASES = {
    "chats": Case(60, 1.0, 640, (0, 1, 2)),
    "captions": Case(16, 0.4, 48, (1,)),
    "equal lengths": Case(96, 0.0, 96, (1,)),
}


def stock_model() -> LlavaForConditionalGeneration:
    """Return the model, with weights that are the same in every call."""
    config = LlavaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **LAYERS,
            "intermediate_size": 256,
            "image_size": PIXELS,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "llama",
            **LAYERS,
            "intermediate_size": 384,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
        },
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def samples_of(case: Case, number: int) -> list[dict[str, torch.Tensor]]:
    """Return samples as a processor would: images first, then text, which is learned."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(number):
        length = round(float(case.median * np.exp(case.spread * rng.standard_normal())))
        text = torch.from_numpy(rng.integers(3, IMAGE, min(max(length, 4), case.longest)))
        images = int(rng.choice(case.images))
        ids = torch.cat([torch.full((images * IMAGE_TOKENS,), IMAGE), text])
        sample = {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100)}
        if images:
            pixels = rng.standard_normal((images, 3, PIXELS, PIXELS), dtype=np.float32)
            sample["pixel_values"] = torch.from_numpy(pixels)
        samples.append(sample)
    return samples


def by_length(samples: Sequence[Any]) -> list[Any]:
    """Return samples in an order whose batches hold samples of like lengths, in random order."""
    order = sorted(range(len(samples)), key=lambda index: len(samples[index]["input_ids"]))
    batches = np.array(order).reshape(-1, BATCH)
    np.random.default_rng(1).shuffle(batches)
    return [samples[index] for index in batches.flatten()]


class Study:
    """The ways of one case.

    Args:
        case: The samples.
        rounds: Steps of every way that are counted.
        folder: A folder for whatever Trainer writes.
    """

    def __init__(self, case: Case, rounds: int, folder: Path) -> None:
        self.steps, self.folder = WARM_UP + rounds + 2, folder
        self.samples = samples_of(case, self.steps * BATCH)
        counted = slice(WARM_UP * BATCH, (WARM_UP + rounds) * BATCH)
        self.lengths = [len(sample["input_ids"]) for sample in self.samples[counted]]
        # The samples that are counted are those of the others.
        self.grouped = [*self.samples]
        self.grouped[counted] = by_length(self.samples[counted])
        self.losses: dict[str, list[float]] = {}

    def ways(self) -> dict[str, Callable[[Callable[[], None]], None]]:
        """Return the ways by name, as :class:`benchmarks.training_pace.Turn` takes them."""
        names = (PADDED, BY_LENGTH, PACKED, ONE_MASK)
        return {name: partial(self._train, name) for name in names}

    def _train(self, name: str, begin_step: Callable[[], None]) -> None:
        model = stock_model()
        collator: Callable[[Any], Any] = packing.join_outputs
        if name in (PACKED, ONE_MASK):
            packing.enable(model)
            collator = packing.PackingCollator(model, collator)
        if name == ONE_MASK:
            model.base_model.get_decoder().set_attn_implementation("sdpa")
        options = TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            per_device_train_batch_size=BATCH,
            max_steps=self.steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
            logging_first_step=True,
            logging_steps=1000,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        samples = self.grouped if name == BY_LENGTH else self.samples
        trainer = Trainer(model, options, train_dataset=samples, data_collator=collator)
        self.losses[name] = []
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Begins(begin_step, self.losses[name]))
        trainer.train()

    def padded_tokens(self, name: str) -> int:
        """Return the rows of the language model in all counted steps, padding included."""
        if name in (PACKED, ONE_MASK):
            return sum(self.lengths)
        lengths = sorted(self.lengths) if name == BY_LENGTH else self.lengths
        batches = np.array(lengths).reshape(-1, BATCH)
        return int(batches.max(1).sum()) * BATCH


def check_losses(losses: dict[str, list[float]]) -> None:
    """Compare the losses of the first step.

    Raises:
        ValueError: A loss is not that of the padded run; it is named.
    """
    expected = losses[PADDED][0]
    for name, (loss, *_) in losses.items():
        if not abs(loss - expected) <= LOSS_LIMIT * abs(expected):
            raise ValueError(
                f"the first loss of {name!r} must be that of the padded run, {expected:.6g}, got "
                f"{loss:.6g}"
            )


def interval(seconds: np.ndarray, padded: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio of samples a second over the padded run, and its bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(seconds), (2000, len(seconds)))
    low, high = np.quantile(padded[drawn].sum(1) / seconds[drawn].sum(1), (0.025, 0.975))
    return float(padded.sum() / seconds.sum()), float(low), float(high)


def measure(name: str, rounds: int) -> list[NewRow]:
    """Return a row for each way of the case called ``name``."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study(CASES[name], rounds, Path(folder))
        turns = {way: Turn(run) for way, run in study.ways().items()}
        for turn in turns.values():
            turn.step()  # to the begin of the first step
        seconds: dict[str, list[float]] = {way: [] for way in turns}
        for number, times in enumerate(alternate(turns, WARM_UP + rounds)):
            if number == 0:
                check_losses(study.losses)
            if number >= WARM_UP:
                for way, value in times.items():
                    seconds[way].append(value)
        for turn in turns.values():
            turn.finish()
    rows = []
    for way, values in seconds.items():
        ratio, low, high = interval(np.array(values), np.array(seconds[PADDED]))
        rows.append(
            {
                "case": name,
                "way": way,
                "batch": BATCH,
                "rounds": rounds,
                "tokens": sum(study.lengths),
                "padded_tokens": study.padded_tokens(way),
                "samples_per_s": round(BATCH * rounds / sum(values), 2),
                "ratio": round(ratio, 3),
                "low": round(low, 3),
                "high": round(high, 3),
            }
        )
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    lines = []
    for row in rows:
        padding = 1 - int(row["tokens"]) / int(row["padded_tokens"])
        ratio = f"{row['ratio']} [{row['low']}, {row['high']}]"
        lines.append((row["case"], row["way"], f"{padding:.0%}", row["samples_per_s"], ratio))
    return table(("samples", "way", "padding", "samples a second", "over padded"), *lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing_pace", description=__doc__)
    parser.add_argument("--case", choices=CASES, help="default: all")
    parser.add_argument("--rounds", type=positive, default=16)
    parser.add_argument("--out", type=output_folder, default=str(RESULTS / "packing-pace"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    published: list[Row] = []
    for name in [options.case] if options.case else CASES:
        published = replace_rows(measure(name, options.rounds), options.out, ("case",))
    print(format_table(published))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
