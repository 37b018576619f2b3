"""``python -m experiments.distillation``: what distillation gains over resizing the picture.

A tiny stock LLaVA is trained on the digits task, at the whole picture (16 tokens) and at smaller
ones. Its projector is then replaced by one that takes any count: fitted, and distilled towards the
stock model's own answers about pictures of the training split, with and without LoRA on the
language model. All are asked the same questions of the test split. A picture of the accuracies is
written beside the report.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from experiments.distillation.stock import (
    SIDES,
    new_model_and_processor,
    question,
    questions,
    stock_logits,
    train_stock,
)
from tokenflex import TokenCounts, replace_projector
from tokenflex.dropin import distill, projector_name
from tokenflex.dropin.samples import encode_samples
from tokenflex.files import write_json
from tokenflex.plots import plot_lines
from tokenflex.terminal import progress_bar, progress_of_parts, show_work, watched

COUNTS = tuple(side * side for side in reversed(SIDES))
BATCH = 128


@torch.no_grad()
def accuracy(
    logits: Callable[[Sequence[Any]], torch.Tensor],
    asked: Sequence[Any],
    vocabulary: dict[str, int],
) -> dict[str, float]:
    """Return the share of right answers of each kind of question, and of all."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    starts = range(0, len(asked), BATCH)
    for start in watched(starts, "asking", len(starts), unit="batch"):
        batch = asked[start : start + BATCH]
        guesses = logits(batch).argmax(-1).tolist()
        for guess, (_, kind, _, answer) in zip(guesses, batch, strict=True):
            for name in (kind, "all"):
                total[name] += 1
                right[name] += guess == vocabulary[answer]
    return {name: right[name] / total[name] for name in sorted(total)}


def converted_logits(model: Any, processor: Any, count: int, asked: Sequence[Any]) -> torch.Tensor:
    """Return the logits [B, vocabulary] of a converted model after each question."""
    samples = [question(picture, prompt) for picture, _, prompt, _ in asked]
    inputs = encode_samples(
        processor, samples, num_image_tokens=count, padding=True, padding_side="left"
    )
    logits: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits


def standard_error(share: float, number: int) -> float:
    """Return the standard error of a share of ``number`` independent questions."""
    return math.sqrt(share * (1 - share) / number)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of each model against the vision tokens of a picture, as a PNG."""
    lines = {
        name: [
            (int(count), shares["all"], report["standard_error"][name][count])
            for count, shares in row.items()
        ]
        for name, row in report["accuracy"].items()
    }
    plot_lines(lines, path)


def main() -> None:
    """Train, convert, distil, measure, and write the report."""
    options = _parser().parse_args()
    show_work()
    torch.set_num_threads(1)
    model, processor = new_model_and_processor(options.seed)
    vocabulary = processor.tokenizer.get_vocab()
    random_state = torch.get_rng_state()
    with progress_bar("stock model", options.warm_up + options.stock_steps) as bar:
        train_stock(
            model,
            processor,
            warm_up=options.warm_up,
            steps=options.stock_steps,
            batch_size=16,
            learning_rate=2e-3,
            seed=options.seed,
            on_step=bar.update,
        )
    torch.set_rng_state(random_state)  # what follows does not depend on how the model was trained
    seconds = {}
    test = questions("test", options.canvases)
    results: dict[str, dict[int, dict[str, float]]] = {}
    results["stock, picture resized"] = {
        side * side: accuracy(partial(stock_logits, model, processor, side), test, vocabulary)
        for side in reversed(SIDES)
    }

    def measure(name: str, converted: Any, converted_processor: Any) -> None:
        results[name] = {
            count: accuracy(
                partial(converted_logits, converted, converted_processor, count), test, vocabulary
            )
            for count in COUNTS
        }

    learned = [
        question(picture, prompt)
        for picture, _, prompt, _ in questions("train", options.prompts // 8, seed=1)
    ]
    pictures = [sample["messages"][0]["content"][0]["image"] for sample in learned[:512:8]]
    agreements = {}
    for name, adapters in (("distilled", False), ("distilled, with LoRA", True)):
        student, student_processor = copy.deepcopy(model), copy.deepcopy(processor)
        replace_projector(
            student, student_processor, num_image_tokens=max(COUNTS), images=pictures, patch_merge=1
        )
        if not adapters:
            measure("fitted", student, student_processor)
        trained = student
        if adapters:
            lora = LoraConfig(
                r=8,
                target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
                modules_to_save=[projector_name(student)],
            )
            trained = get_peft_model(student, lora)
        started = time.process_time()
        with progress_of_parts("") as on_progress:
            agreement = distill(
                trained,
                student_processor,
                learned,
                counts=TokenCounts(COUNTS, (1.0,) * len(COUNTS)),
                steps=options.steps,
                batch_size=32,
                learning_rate=3e-3,
                max_new_tokens=1,
                seed=options.seed,
                on_progress=on_progress,
            )
        seconds[name] = time.process_time() - started
        agreements[name] = {
            count: {"before": vars(agreement.before[count]), "after": vars(agreement.after[count])}
            for count in COUNTS
        }
        measure(name, trained, student_processor)
    report: dict[str, Any] = {
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "questions": len(test),
        "accuracy": results,
        "standard_error": {
            name: {count: standard_error(row[count]["all"], len(test)) for count in row}
            for name, row in results.items()
        },
        "agreement": agreements,
        "cpu_seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    write_json(options.out, report)
    draw(report, options.out.with_suffix(".png"))
    print(f"{'':24}" + "".join(f"{count:>8}" for count in COUNTS))
    for name, row in results.items():
        print(f"{name:24}" + "".join(f"{row[count]['all']:8.3f}" for count in COUNTS))
    print({name: round(value, 1) for name, value in seconds.items()}, "CPU seconds")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.distillation", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/distillation/report.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up", type=int, default=300, help="steps of the encoder's warm-up")
    parser.add_argument("--stock-steps", type=int, default=2000, help="steps of the stock model")
    parser.add_argument("--prompts", type=int, default=4000, help="prompts to distil on")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the distillation")
    parser.add_argument("--canvases", type=int, default=512, help="test pictures, 8 questions each")
    return parser


if __name__ == "__main__":
    main()
