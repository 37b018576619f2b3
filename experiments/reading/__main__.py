"""``python -m experiments.reading RUN OUTPUT``: what a model of ``configs/reading.yaml`` can read.

RUN is the folder of ``tokenflex train configs/reading.yaml``. Its model answers questions about
pages that training never saw, at every count; those about tall pages also as one tile, and those
about tables and charts also with these at any pixel. OUTPUT gets ``report.json``, ``accuracy.png``
and a page that is written from the report.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.results import environment
from tokenflex.cli.options import positive
from tokenflex.evaluation import evaluate
from tokenflex.files import check_folder, read_json, write_json, write_text
from tokenflex.models.loading import load_checkpoint
from tokenflex.plots import plot_accuracy
from tokenflex.reading.dataset import ReadingDataset
from tokenflex.reading.drawing import PLACEMENTS
from tokenflex.terminal import show_work, watched, work_bar

COUNTS = (16, (4, 8), (8, 4), 36, 64)
BATCH = 32
GUESSES = 4000  # training samples whose most frequent answers are the guesses


def guessing(samples: int) -> dict[str, float]:
    """Return how often the most frequent answer in training is right in the split "test", by kind.

    Args:
        samples: Samples of the split "test".
    """
    frequent: dict[str, Counter[str]] = defaultdict(Counter)
    train = ReadingDataset("train", size=GUESSES)
    for index in watched(range(GUESSES), "guessing", GUESSES, unit="sample"):
        for talk in train.outline(index).conversations:
            frequent[talk.kind][talk.turns[1].text] += 1
    guesses = {kind: answers.most_common(1)[0][0] for kind, answers in frequent.items()}
    right: dict[str, list[bool]] = defaultdict(list)
    test = ReadingDataset("test", size=samples)
    for index in range(samples):
        for talk in test.outline(index).conversations:
            right[talk.kind].append(talk.turns[1].text == guesses[talk.kind])
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def measure(model: Any, processor: Any, samples: int) -> dict[str, Any]:
    """Return the report of an evaluation, and of harder forms of the pages.

    These are tall pages as one tile, and tables and charts at any pixel.

    Args:
        model: The trained model.
        processor: Its processor.
        samples: Samples of the split "test", each with eight questions.
    """
    tall = ReadingDataset("test", size=max(1, samples // 8), layouts=["tall"])
    placed = [
        ReadingDataset(
            "test", size=max(1, samples // 4), layouts=["table", "chart"], placement=placement
        )
        for placement in PLACEMENTS
    ]
    sizes = [samples, len(tall), len(tall), *map(len, placed)]
    batches = len(COUNTS) * sum(-(size // -BATCH) for size in sizes)
    with work_bar("evaluation", batches, unit="batch", delay=0) as bar:

        def ask(dataset: ReadingDataset, **options: Any) -> dict[str, Any]:
            return evaluate(
                model,
                processor,
                dataset,
                list(COUNTS),
                batch_size=BATCH,
                on_batch=bar.update,
                **options,
            )

        report = ask(ReadingDataset("test", size=samples))
        by_tiles = {f"{n}": ask(tall, max_tiles=n)["accuracy_by_kind"] for n in (1, 2)}
        by_placement = {data.placement: ask(data)["accuracy_by_kind"] for data in placed}
    return {
        **report,
        "guessing": guessing(samples),
        "tall_samples": len(tall),
        "tall_by_tiles": by_tiles,
        "figure_samples": len(placed[0]),
        "figures_by_placement": by_placement,
        "commit": environment("cpu")["commit"],
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }


def page_of(report: dict[str, Any]) -> str:
    """Return the Markdown page of a report."""
    labels = list(report["accuracy"])
    questions = report["questions"]
    lines = [
        "# Reading: pages, tables and charts that training never saw",
        "",
        f"Accuracy in percent by kind of question and vision tokens a tile: {report['samples']} "
        f"samples of the split `test`, {sum(questions.values())} questions. *Guessing* always "
        "gives the most frequent answer of training. `tall` pages are two tiles, `wide` ones are "
        "squeezed into one, and `pair page` is about two pages.",
        "",
        f"| kind | questions | guessing | {' | '.join(labels)} |",
        "|---" * (len(labels) + 3) + "|",
    ]
    for kind, row in sorted(report["accuracy_by_kind"].items()):
        cells = [f"{100 * row[label]:.1f}" for label in labels]
        guess = f"{100 * report['guessing'][kind]:.1f}"
        lines.append(f"| {kind} | {questions[kind]} | {guess} | {' | '.join(cells)} |")
    mean = sum(report["guessing"].values()) / len(report["guessing"])
    cells = [f"{100 * report['accuracy'][label]:.1f}" for label in labels]
    lines.append(f"| mean of kinds | | {100 * mean:.1f} | {' | '.join(cells)} |")
    error = 100 * max(report["standard_error"].values())
    lines += [
        "",
        f"The standard error of the means is at most {error:.1f} points: of the questions, not of "
        "repeated training, as this is one seed.",
        "",
        f"Tall pages as two tiles, and shrunk into one ({report['tall_samples']} samples): the "
        "model was trained with two.",
        "",
        f"| kind | tiles | {' | '.join(labels)} |",
        "|---" * (len(labels) + 2) + "|",
    ]
    for kind in sorted(report["tall_by_tiles"]["2"]):
        for tiles in ("2", "1"):
            row = report["tall_by_tiles"][tiles][kind]
            cells = [f"{100 * row[label]:.1f}" for label in labels]
            lines.append(f"| {kind} | {tiles} | {' | '.join(cells)} |")
    if "figures_by_placement" in report:
        lines += [
            "",
            "Tables and charts at any pixel, and in type of 9 to 13 pixels "
            f"({report['figure_samples']} samples): the model was trained with those on the grid.",
            "",
            f"| kind | placement | {' | '.join(labels)} |",
            "|---" * (len(labels) + 2) + "|",
        ]
        for kind in sorted(report["figures_by_placement"]["grid"]):
            for placement, rows in report["figures_by_placement"].items():
                cells = [f"{100 * rows[kind][label]:.1f}" for label in labels]
                lines.append(f"| {kind} | {placement} | {' | '.join(cells)} |")
    if "training" in report:
        training = report["training"]
        steps = ", ".join(f"{number} of {name!r}" for name, number in training["steps"].items())
        lines += [
            "",
            f"Trained with seed {training['seed']} for {training['warm_up_steps']} steps of the "
            f"encoder's warm-up, {steps}, in {training['seconds']:.0f} s by the clock"
            f"{training['note']}.",
        ]
    lines += [
        "",
        f"Measured at commit `{report['commit']}`.",
        "",
        "```",
        "tokenflex train configs/reading.yaml",
        "python -m experiments.reading runs/reading docs/results/reading"
        f" --samples {report['samples']}",
        "```",
        "",
        "![Accuracy against vision tokens](accuracy.png)",
        "",
    ]
    return "\n".join(lines)


def training_of(run: Path, note: str) -> dict[str, Any]:
    """Return the seed, the steps and the seconds of a run.

    Raises:
        FileNotFoundError, ValueError: The folder holds no finished run.
    """
    config = read_json(run / "config.json", "configuration of the training run")
    report = read_json(run / "report.json", "report of the training run")
    try:
        return {
            "seed": config["seed"],
            "warm_up_steps": config["encoder_warm_up"]["steps"],
            "steps": {stage["name"]: stage["steps"] for stage in config["stages"]},
            "seconds": report["seconds"],
            "note": f", {note}" if note else "",
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run} must be the folder of a finished run: {error}") from error


def main() -> None:
    """Measure the checkpoint of a run and write the report, its picture and its page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reading", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--samples", type=positive, default=768, help="samples of the test split (768)"
    )
    parser.add_argument("--note", default="", help="a remark on the run's seconds")
    options = parser.parse_args()
    try:  # before the work
        check_folder(options.output)
        training = training_of(options.run, options.note)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    show_work()
    model, processor = load_checkpoint(options.run / "checkpoint")
    report = {**measure(model.eval(), processor, options.samples), "training": training}
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "report.json", report)
    plot_accuracy(report, options.output / "accuracy.png")
    page = page_of(report)
    write_text(options.output / "README.md", page)
    print(page)


if __name__ == "__main__":
    main()
