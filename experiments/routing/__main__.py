"""``python -m experiments.routing OUTPUT CHECKPOINT ...``: does choosing counts meet its target?

Each checkpoint answers the questions of a built-in task's splits "validation" and "test" at every
count. Routers are fitted on the first with several seeds, each rule gets its setting there, and
accuracy, tokens and calibration are measured on the second. Counts that the checkpoints were not
trained with are studied apart: what routers gain or lose by having them too. OUTPUT gets
``report.json``, ``curve.png``, ``reliability.png`` and a page that is written from the report.

    python -m experiments.routing docs/results/selection/digits runs/demo-0/checkpoint \
        runs/demo-1/checkpoint --data digits --counts 4,9,16
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks.results import environment
from experiments.routing.curve import as_rows, selection_curve
from experiments.routing.figures import plot_reliability, plot_selection
from experiments.routing.pages import page_of
from experiments.routing.reliability import of_answers, of_router
from experiments.routing.study import HELD_OUT, LIMIT, MAX_DROP, GradedCheckpoint, study
from tokenflex.cli.options import counts_or_grids, positive
from tokenflex.cli.route import has_splits
from tokenflex.counts import TokenCount, token_grid, tokens_of
from tokenflex.files import check_folder, read_json, write_json, write_text
from tokenflex.formats import FORMATS
from tokenflex.models.loading import check_length, load_checkpoint
from tokenflex.routing.grading import grade
from tokenflex.routing.router import check_counts
from tokenflex.routing.training import fit_router
from tokenflex.terminal import progress_bar
from tokenflex.training.build import build_dataset
from tokenflex.training.data_config import DataConfig

TASKS = tuple(filter(has_splits, FORMATS))
"""Built-in data with splits."""


def graded(
    folder: Path, name: str, task: str, counts: tuple[TokenCount, ...], size: int, batch_size: int
) -> tuple[GradedCheckpoint, tuple[TokenCount, ...]]:
    """Return a checkpoint's grades and the counts among ``counts`` that it was trained with."""
    model, processor = load_checkpoint(folder)
    check_length(model.config, tokens_of(counts[-1]))
    parts = []
    for split in ("validation", "test"):
        dataset = build_dataset(DataConfig(name=task, split=split, size=size))
        with progress_bar(f"{name}, {split}", size, unit="sample") as bar:
            parts.append(
                grade(
                    model.eval(),
                    processor,
                    dataset,
                    counts,
                    batch_size=batch_size,
                    on_samples=bar.update,
                )
            )
    trained = {token_grid(count) for count in model.config.trained_num_image_tokens or ()}
    return GradedCheckpoint(name, *parts), tuple(n for n in counts if token_grid(n) in trained)


def main() -> None:
    """Grade the checkpoints, study the rules, and write the report, pictures and page."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--data", choices=TASKS, required=True)
    parser.add_argument("--counts", type=counts_or_grids, required=True, help="like 4,2x3,9,16")
    parser.add_argument("--seeds", type=positive, default=3, help="routers per checkpoint (3)")
    parser.add_argument("--size", type=positive, default=1024, help="samples of a split (1024)")
    parser.add_argument("--batch-size", type=positive, default=64, help="samples per pass (64)")
    parser.add_argument("--note", default="", help="a remark on the machine or the checkpoints")
    options = parser.parse_args()
    try:
        check_folder(options.output)  # before the work, not after it
        counts = check_counts(options.counts)
        names = [_name_of(folder) for folder in options.checkpoints]
        if len({*names}) < len(names):
            raise ValueError(f"checkpoints must lie in folders of different names, got {names}")
        for folder in options.checkpoints:
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"checkpoint {folder} has no config.json")
            if "model_type" not in read_json(folder / "config.json"):
                raise ValueError(
                    f"checkpoint {folder} has a config.json of no model; the checkpoint of a run "
                    "is the folder `checkpoint` in its own"
                )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    checkpoints, ladders = [], []
    for folder, name in zip(options.checkpoints, names, strict=True):
        checkpoint, trained = graded(
            folder, name, options.data, counts, options.size, options.batch_size
        )
        checkpoints.append(checkpoint)
        ladders.append(trained)
    if len({*ladders}) > 1 or len(ladders[0]) < 2:
        parser.error(
            f"--counts must name the same two or more counts that each checkpoint was trained "
            f"with, got {dict(zip(names, ladders, strict=True))}"
        )
    report = report_of(checkpoints, ladders[0], options.seeds)
    report |= {
        "data": options.data,
        "samples": options.size,
        "note": options.note,
        "commit": environment("cpu")["commit"],
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }
    options.output.mkdir(parents=True, exist_ok=True)
    first = checkpoints[0].at(ladders[0])
    router, fitting = fit_router(first.fitted, max_drop=MAX_DROP, held_out=HELD_OUT)
    points = selection_curve(first.test, router)
    report |= {"curve": as_rows(points), "parameters": fitting.parameters}
    plot_selection(points, options.output / "curve.png")
    answers = of_answers(router, first.test)
    del answers["cascade"]
    panels = {"p(right) of the router": of_router(router, first.test), "confidence": answers}
    plot_reliability(panels, options.output / "reliability.png")
    write_json(options.output / "report.json", report)
    page = page_of(report)
    write_text(options.output / "README.md", page)
    print(page)


def report_of(
    checkpoints: list[GradedCheckpoint], trained: tuple[TokenCount, ...], seeds: int
) -> dict[str, Any]:
    """Return the studies at the trained counts and, if there are more, at all counts."""
    every = checkpoints[0].test.counts
    report: dict[str, Any] = {
        "seeds": seeds,
        "questions": {name: len(getattr(checkpoints[0], name)) for name in ("fitted", "test")},
        "trained": study([c.at(trained) for c in checkpoints], range(seeds), limit=LIMIT),
    }
    if every != trained:
        report["unseen"] = study(checkpoints, range(seeds), limit=LIMIT)
    return report


def _name_of(folder: Path) -> str:
    """Return the run's name, for a checkpoint RUN/checkpoint."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "checkpoint" else folder.name


if __name__ == "__main__":
    main()
