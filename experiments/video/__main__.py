"""``python -m experiments.video CHECKPOINT OUTPUT``: accuracy against frames and tokens a frame.

A model that ``tokenflex train experiments/video/moving.yaml`` made answers questions about clips of
a moving digit, of scans that it never saw, at every split of a total of vision tokens into frames
and tokens per frame. OUTPUT gets ``report.json``, and a page and a picture that are made from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.results import environment
from tokenflex.digits.moving import FRAMES, QUESTIONS, MovingDataset
from tokenflex.evaluation import evaluate
from tokenflex.files import read_json, write_json, write_text
from tokenflex.models.loading import load_checkpoint
from tokenflex.plots import plot_lines
from tokenflex.terminal import show_work, work_bar

SHOWN = (1, 2, 4, 8, 16)
COUNTS = (1, 4, 16)
BATCH = 32


def measure(model: Any, processor: Any, clips: int) -> dict[str, Any]:
    """Return the accuracy of every split, by kind of question.

    Args:
        model: The trained model.
        processor: Its processor.
        clips: Clips of the split "test", each with one question of each kind.

    The report also names the commit of the code that measured, "-dirty" if files were changed.
    """
    splits = []
    batches = -(clips // -BATCH) * len(COUNTS) * len(SHOWN)
    bar = work_bar("evaluation", batches, unit="batch", delay=0)
    for frames in SHOWN:
        dataset = MovingDataset("test", size=clips, frames=frames)
        report = evaluate(
            model, processor, dataset, list(COUNTS), batch_size=BATCH, on_batch=bar.update
        )
        splits += [
            {
                "frames": frames,
                "tokens_per_frame": count,
                "total": frames * count,
                "accuracy": report["accuracy"][f"{count}"],
                "standard_error": report["standard_error"][f"{count}"],
                "accuracy_by_kind": {
                    kind: row[f"{count}"] for kind, row in report["accuracy_by_kind"].items()
                },
            }
            for count in COUNTS
        ]
    bar.close()
    return {
        "commit": environment("cpu")["commit"],
        "clips": clips,
        "frames_per_clip": FRAMES,
        "questions": report["questions"],
        "splits": splits,
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of every split against its total of vision tokens, as a PNG."""
    lines = {
        f"{'1 frame' if frames == 1 else f'{frames} frames'} a clip": [
            (split["total"], split["accuracy"], split["standard_error"])
            for split in report["splits"]
            if split["frames"] == frames
        ]
        for frames in SHOWN
    }
    plot_lines(lines, path, label="vision tokens of a clip", logarithmic=True)


def training_of(checkpoint: Path) -> dict[str, Any]:
    """Return the seed and the steps of the run whose folder holds the checkpoint.

    Raises:
        FileNotFoundError, ValueError: The folder has no ``config.json`` of a run.
    """
    path = checkpoint.resolve().parent / "config.json"
    config = read_json(path, "configuration of the training run")
    try:
        warm_up = config["encoder_warm_up"]
        steps = {stage["name"]: stage["steps"] for stage in config["stages"]}
        return {
            "seed": config["seed"],
            "encoder_warm_up_steps": warm_up["steps"] if warm_up else 0,
            "steps": steps,
            "total_steps": sum(steps.values()),
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must be the configuration of a training run: {error}") from error


def page_of(report: dict[str, Any]) -> str:
    """Return the Markdown page of a report."""
    questions = sum(report["questions"].values())
    error = max(split["standard_error"] for split in report["splits"])
    lines = [
        "# A total of vision tokens, split over the frames of a clip",
        "",
        f"Clips of {report['frames_per_clip']} frames from scans that training never saw (split "
        f"`test`): {report['clips']} clips, {questions} questions, one of each kind a clip. "
        "Accuracy is in percent; the column `all` is the mean over the kinds, with a standard "
        f"error of at most {100 * error:.1f} points. One model was trained on all of these counts, "
        "with 1, 4, 8 and 16 frames a clip; it never saw clips of 2 frames.",
        "",
        "A yellow digit moves over resting ones and turns into others: where it starts and ends, "
        "which digit it is first and last, and how many different digits it was.",
        "",
        "| total | frames x tokens each | " + " | ".join([*QUESTIONS, "all"]) + " |",
        "|---" * (len(QUESTIONS) + 3) + "|",
    ]
    for split in sorted(report["splits"], key=lambda split: (split["total"], split["frames"])):
        by_kind = [split["accuracy_by_kind"][kind] for kind in QUESTIONS]
        cells = [f"{100 * value:.1f}" for value in (*by_kind, split["accuracy"])]
        shown = f"{split['frames']} x {split['tokens_per_frame']}"
        lines.append(f"| {split['total']} | {shown} | " + " | ".join(cells) + " |")
    if "training" in report:  # reports of earlier versions do not say
        training = report["training"]
        lines += [
            "",
            f"Measured at commit `{report['commit']}`; trained with seed {training['seed']} for "
            f"{training['total_steps']} steps, after {training['encoder_warm_up_steps']} of the "
            "encoder's warm-up.",
        ]
    lines += [
        "",
        "Guessing gives 25 (where), 10 (which) and 25 (how many) percent.",
        "",
        "```",
        "tokenflex train experiments/video/moving.yaml",
        "python -m experiments.video runs/video/checkpoint docs/results/video"
        f" --clips {report['clips']}",
        "```",
        "",
        "![Accuracy against vision tokens of a clip](accuracy.png)",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure a checkpoint and write the report, its picture and its page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.video", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--clips", type=int, default=1024, help="clips of the test split (1024)")
    options = parser.parse_args()
    training = training_of(options.checkpoint)  # before the work
    show_work()
    model, processor = load_checkpoint(options.checkpoint)
    report = {**measure(model.eval(), processor, options.clips), "training": training}
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "report.json", report)
    draw(report, options.output / "accuracy.png")
    page = page_of(report)
    write_text(options.output / "README.md", page)
    print(page)


if __name__ == "__main__":
    main()
