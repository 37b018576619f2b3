"""``python -m benchmarks.training_pace``: a training step beside those of Trainer and TRL.

The same model, weights, pictures and questions go through five training loops on one CPU thread:

* ``tokenflex mixed``: ``tokenflex train``, a count drawn for each picture, the questions about a
  picture packed behind its vision tokens;
* ``tokenflex fixed``: the same at the largest count;
* ``Trainer padded``: transformers' Trainer with fused AdamW, a question a row, rows padded, at the
  counts of ``tokenflex mixed``;
* ``Trainer packed``: the same Trainer with ``DataCollatorWithPacking``, a record a picture;
* ``TRL fixed``: TRL's SFTTrainer, a question a row, at the largest count: it passes on none.

Loops take turns, a step each, in one process. A step is the processor seconds from its begin to the
next step's begin: the model, the optimiser, logging, and the data of the next step, which no worker
prepares. Before anything is timed, the losses of the first step must agree. A ratio is the median
over rounds of a loop's step over ours of the same round, with a bootstrap interval of 95 %.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.report import table
from benchmarks.results import (
    RESULTS,
    ROOT,
    NewRow,
    Row,
    replace_rows,
)
from tokenflex import DataCollatorWithPacking, TokenCounts
from tokenflex.data.steps import PackedStep
from tokenflex.digits.canvas import CELL_PIXELS
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.training.build import build_model, build_processor
from tokenflex.training.config import ModelConfig, TrainConfig
from tokenflex.training.flops import training_flops
from tokenflex.training.loop import TrainingRun
from tokenflex_kernels.options import output_folder, positive

MIXED, FIXED = "tokenflex mixed", "tokenflex fixed"
PADDED, PACKED, TRL = "Trainer padded", "Trainer packed", "TRL fixed"
WEIGHTS = (0.2, 0.3, 0.5)
CANVASES = 960  # drawn before anything is timed, and kept in memory
LOG_EVERY = 10  # steps
WARM_UP = 3  # rounds that are not counted
LOSS_LIMIT = 1e-4  # relative, float32


@dataclass(frozen=True)
class Scale:
    """A model and its steps.

    Attributes:
        cells: Cells along a side of a canvas.
        counts: Vision tokens of a picture, drawn at 2 : 3 : 5.
        pictures: Pictures a step.
        learning_rate: Of all modules.
        sizes: Fields of the configurations of encoder and language model; empty for those of
            ``configs/demo.yaml``. The model has no positions of its own, as other loops know none.
    """

    cells: int
    counts: tuple[int, ...]
    pictures: int
    learning_rate: float
    sizes: dict[str, int]

    def model(self) -> dict[str, Any]:
        """Return the configuration's ``model``."""
        demo = yaml.safe_load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"))
        model: dict[str, Any] = demo["model"] | {"num_image_tokens": self.counts[-1]}
        model |= {"projector_position": None, "image_positions": "sequential"}
        if self.sizes:
            width, heads = self.sizes["hidden_size"], self.sizes["num_attention_heads"]
            model["projector_hidden_width"] = 2 * width
            model["vision"]["config"] |= self.sizes | {"intermediate_size": 3 * width}
            model["vision"]["config"]["image_size"] = self.cells * CELL_PIXELS
            model["text"]["config"] |= self.sizes | {"intermediate_size": 2 * width}
            model["text"]["config"] |= {"num_key_value_heads": heads // 2, "vocab_size": 128}
        return model

    def config(
        self, questions: int, counts: Sequence[int], steps: int, output: Path
    ) -> TrainConfig:
        """Return the configuration of our loop at ``counts``."""
        stage = {
            "name": "pace",
            "steps": steps,
            "batch_size": self.pictures,
            "learning_rate": dict.fromkeys(("vision", "projector", "text"), self.learning_rate),
            "counts": counts,
            "weights": WEIGHTS if len(counts) > 1 else (1,),
            "schedule": "constant",
        }
        return TrainConfig.model_validate(
            {
                "output": output,
                "threads": 1,
                "workers": 0,
                "log_every": LOG_EVERY,
                "model": self.model(),
                "data": {
                    "name": "digits",
                    "questions": questions,
                    "size": CANVASES,
                    "cells": self.cells,
                },
                "stages": [stage],
            }
        )


LARGER = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
SCALES = {
    "tiny": Scale(4, (4, 9, 16), 16, 2e-3, {}),
    "larger": Scale(8, (16, 36, 64), 4, 1e-3, LARGER),
    "larger-256": Scale(8, (64, 144, 256), 4, 1e-3, LARGER),
}


# ---- taking turns


class Finished(Exception):
    """All rounds are over."""


class Turn:
    """A training loop that runs a step at a time, in a thread of its own.

    Args:
        loop: The loop. It calls its argument at the begin of every step.
    """

    def __init__(self, loop: Callable[[Callable[[], None]], None]) -> None:
        self._loop = loop
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._is_over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._loop(self._begin_step)
        except Finished:
            pass
        except BaseException as error:
            self._error = error
        self._done.release()

    def _begin_step(self) -> None:
        self._done.release()
        self._go.acquire()
        if self._is_over:
            raise Finished

    def step(self) -> float:
        """Run until the next step begins; return the processor seconds of it."""
        began = time.process_time()
        self._go.release()
        self._done.acquire()
        seconds = time.process_time() - began
        if self._error is not None:
            raise self._error
        return seconds

    def finish(self) -> None:
        """End the loop."""
        self._is_over = True
        self._go.release()
        self._thread.join()


def alternate(turns: dict[str, Turn], rounds: int) -> Iterator[dict[str, float]]:
    """Yield each round's seconds of every loop; every other round goes backwards."""
    names = list(turns)
    for number in range(rounds):
        order = names if number % 2 == 0 else names[::-1]
        seconds = {name: turns[name].step() for name in order}
        yield {name: seconds[name] for name in names}


# ---- the loops


class OurRun(TrainingRun):
    """A run of ``tokenflex train`` that saves and evaluates nothing."""

    begin_step: Callable[[], None]
    steps: list[PackedStep]
    losses: list[float]

    def _step(self, model: Any, optimizer: Any, packed: PackedStep, stage: Any) -> Any:
        self.steps.append(packed)
        self.begin_step()
        outcome = super()._step(model, optimizer, packed, stage)
        self.losses.append(outcome.loss)
        return outcome

    def _save_state(self, optimizer: Any, scheduler: Any) -> None:
        pass


class Begins(TrainerCallback):
    """Tell of the begin of every step of Trainer, and keep the losses that it logs."""

    def __init__(self, begin_step: Callable[[], None], losses: list[float]) -> None:
        self._begin_step, self._losses = begin_step, losses

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin_step()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "loss" in logs:
            self._losses.append(float(logs["loss"]))


class Study:
    """The loops of one scale and one number of questions a picture.

    Args:
        scale: The scale.
        questions: Questions about each picture.
        steps: Steps of every loop.
        folder: A folder for whatever the loops write.
    """

    def __init__(self, scale: Scale, questions: int, steps: int, folder: Path) -> None:
        self.scale, self.questions, self.steps, self.folder = scale, questions, steps, folder
        self.canvases = DigitsDataset(size=CANVASES, questions=questions, cells=scale.cells)
        for index in range(CANVASES):
            self.canvases[index]
        self.draws = TokenCounts(scale.counts, WEIGHTS)
        self.ours = {
            MIXED: self._our_run("mixed", scale.counts),
            FIXED: self._our_run("fixed", scale.counts[-1:]),
        }
        self.config = self.ours[MIXED].config
        order = next(iter(self.ours[MIXED].setup.orders.values()))
        self.keys = [order[position] for position in range(steps * scale.pictures)]
        state = self.ours[MIXED].model.state_dict()
        self.weights = {name: tensor.clone() for name, tensor in state.items()}
        self.losses: dict[str, list[float]] = {}

    def _our_run(self, name: str, counts: Sequence[int]) -> OurRun:
        path = self.folder / name
        run = OurRun(self.scale.config(self.questions, counts, self.steps, path), fresh=True)
        for data in run.setup.datasets:
            run.setup.datasets[data] = self.canvases
        run.steps, run.losses = [], []
        return run

    def loops(self) -> dict[str, Callable[[Callable[[], None]], None]]:
        """Return the loops by name, as :class:`Turn` takes them; TRL's only if it is installed."""
        loops = {
            MIXED: lambda begin: self._train_ours(MIXED, begin),
            FIXED: lambda begin: self._train_ours(FIXED, begin),
            PADDED: self._train_padded,
            PACKED: self._train_packed,
        }
        return loops | {TRL: self._train_trl} if find_spec("trl") else loops

    def _train_ours(self, name: str, begin_step: Callable[[], None]) -> None:
        run = self.ours[name]
        run.begin_step = begin_step
        run.model.load_state_dict(self.weights)
        run.run()

    def first_losses(self) -> dict[str, float]:
        """Return the loss of each loop's first step."""
        ours = {name: run.losses for name, run in self.ours.items()}
        return {name: losses[0] for name, losses in (ours | self.losses).items() if losses}

    def _model(self) -> tuple[Any, Any]:
        parts = self.config.model
        assert isinstance(parts, ModelConfig)
        processor = build_processor(parts)
        model = build_model(parts, processor, self.scale.counts)
        model.load_state_dict(self.weights)
        return model, processor

    def _options(self, rows: int) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "trainer"),
            "per_device_train_batch_size": rows,
            "max_steps": self.steps,
            "learning_rate": self.scale.learning_rate,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "adam_beta2": self.config.stages[0].betas[1],
            "weight_decay": self.config.stages[0].weight_decay,
            "max_grad_norm": self.config.stages[0].max_grad_norm,
            "train_sampling_strategy": "sequential",
            "logging_first_step": True,
            "logging_steps": LOG_EVERY,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }

    def _train(self, trainer: Any, name: str, begin_step: Callable[[], None]) -> None:
        self.losses[name] = []
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Begins(begin_step, self.losses[name]))
        trainer.train()

    def _questions(self) -> Iterator[tuple[tuple[int, int], Any, str, str]]:
        """Yield every question: the key of its count, the picture, the question, the answer."""
        for epoch, index in self.keys:
            sample = self.canvases[index]
            for talk in sample.conversations:
                question, answer = (turn.text for turn in talk.turns)
                yield (index, epoch), sample.images[0], question, answer

    def _train_padded(self, begin_step: Callable[[], None]) -> None:
        model, processor = self._model()
        eos = processor.tokenizer.eos_token_id

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
            batch = processor(
                images=[row["image"] for row in rows],
                text=[row["text"] for row in rows],
                num_image_tokens=[self.draws.draw(*row["key"]) for row in rows],
                padding_side="right",
            )
            ids = batch["input_ids"]
            learned = ids == eos  # every answer is one word and <eos>
            learned[:, :-1] |= learned[:, 1:].clone()
            batch["labels"] = ids.masked_fill(~learned, -100)
            return batch

        rows = [
            {"image": image, "text": f"<image>{question} {answer}<eos>", "key": key}
            for key, image, question, answer in self._questions()
        ]
        options = TrainingArguments(**self._options(self.scale.pictures * self.questions))
        trainer = Trainer(model, options, train_dataset=rows, data_collator=collate)
        self._train(trainer, PADDED, begin_step)

    def _train_packed(self, begin_step: Callable[[], None]) -> None:
        model, processor = self._model()
        options = TrainingArguments(**self._options(self.scale.pictures))
        trainer = Trainer(
            model,
            options,
            train_dataset=[self._record(epoch, index) for epoch, index in self.keys],
            data_collator=DataCollatorWithPacking(processor, self.draws),
        )
        self._train(trainer, PACKED, begin_step)

    def _record(self, epoch: int, index: int) -> dict[str, Any]:
        """Return a picture with its questions as a data set of conversations holds it."""
        sample = self.canvases[index]
        return {
            "epoch": epoch,
            "index": index,
            "images": list(sample.images),
            "messages": [
                [{"role": turn.role, "content": turn.text} for turn in talk.turns]
                for talk in sample.conversations
            ],
        }

    def _train_trl(self, begin_step: Callable[[], None]) -> None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        model, processor = self._model()
        rows = [
            {"images": [image], "prompt": f"<image>{question} ", "completion": f"{answer}<eos>"}
            for _, image, question, answer in self._questions()
        ]
        options = SFTConfig(
            **self._options(self.scale.pictures * self.questions),
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
        )
        data = Dataset.from_list(rows)
        trainer = SFTTrainer(model, options, train_dataset=data, processing_class=processor)
        self._train(trainer, TRL, begin_step)

    def arithmetic_saving(self) -> float:
        """Return the share of the operations that mixed counts save over fixed ones."""
        run = self.ours[MIXED]
        flops = training_flops(run.model, run.config.stages[0].learning)
        costs = ("tiles", "vision_tokens", "tokens", "targets")
        mixed, fixed = (
            sum(
                flops.total(**{name: getattr(step, name) for name in costs})
                for step in self.ours[name].steps[WARM_UP:]
            )
            for name in (MIXED, FIXED)
        )
        return 1 - mixed / fixed


def check_losses(losses: dict[str, float]) -> None:
    """Compare the losses of the first step: of mixed counts, and of fixed ones.

    Raises:
        ValueError: A loss is not that of our loop; it is named.
    """
    for name, loss in losses.items():
        expected = losses[FIXED if name == TRL else MIXED] if name != FIXED else loss
        if not abs(loss - expected) <= LOSS_LIMIT * abs(expected):
            raise ValueError(
                f"the first loss of {name!r} must be that of our loop, {expected:.6g}, got "
                f"{loss:.6g}"
            )


# ---- the report


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Return the median and its bootstrap interval of 95 %."""
    generator = np.random.default_rng(0)
    again = np.median(generator.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(again, (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def measure(name: str, scale: Scale, questions: int, rounds: int) -> list[NewRow]:
    """Return a row for each loop of the scale called ``name``."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study(scale, questions, WARM_UP + rounds + 2, Path(folder))
        turns = {loop: Turn(run) for loop, run in study.loops().items()}
        for turn in turns.values():
            turn.step()  # to the begin of the first step
        seconds: dict[str, list[float]] = {loop: [] for loop in turns}
        for number, times in enumerate(alternate(turns, WARM_UP + rounds)):
            if number == 0:
                check_losses(study.first_losses())
            if number >= WARM_UP:
                for loop, value in times.items():
                    seconds[loop].append(value)
        for turn in turns.values():
            turn.finish()
        saving = study.arithmetic_saving()
    rows = []
    ours = np.array(seconds[MIXED])
    for loop, values in seconds.items():
        ratio, low, high = interval(np.array(values) / ours)
        rows.append(
            {
                "model": name,
                "questions": questions,
                "loop": loop,
                "pictures": scale.pictures,
                "counts": "/".join(map(str, scale.counts)),
                "rounds": rounds,
                "cpu_ms": round(1000 * float(np.median(values)), 2),
                "ratio": round(ratio, 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "arithmetic_saving": round(saving, 4) if loop == FIXED else "",
            }
        )
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table, with the share of the saving that becomes time."""
    lines = []
    for row in rows:
        saved = ""
        if row["arithmetic_saving"]:
            saving = 1 - 1 / float(row["ratio"])
            share = saving / float(row["arithmetic_saving"])
            saved = f"{saving:.1%} of {float(row['arithmetic_saving']):.1%}: {share:.0%}"
        interval_text = f"{row['ratio']} [{row['low']}, {row['high']}]"
        lines.append(
            (*(row[key] for key in ("model", "questions", "loop", "cpu_ms")), interval_text, saved)
        )
    header = ("model", "questions", "loop", "CPU ms a step", "over tokenflex mixed", "saved")
    return table(header, *lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_pace", description=__doc__)
    parser.add_argument("--model", choices=SCALES, help="default: both")
    parser.add_argument("--questions", type=int, choices=(1, 8), help="default: both")
    parser.add_argument("--rounds", type=positive, default=30)
    parser.add_argument("--out", type=output_folder, default=str(RESULTS / "training-pace"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if find_spec("trl") is None:
        print("TRL is not installed: its loop is left out")
    published: list[Row] = []
    for name in [options.model] if options.model else SCALES:
        for questions in [options.questions] if options.questions else (1, 8):
            rows = measure(name, SCALES[name], questions, options.rounds)
            published = replace_rows(rows, options.out, ("model", "questions"))
    print(format_table(published))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
