"""Process of jobs in turn: ``tokenflex train`` for each, which ends together with its parent.

An argument is ``CONFIG:N``: after its training the model is asked about ``N`` canvases of its
training data. What a job prints goes into the log beside its configuration.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from experiments.ablation.jobs import LOG, TRAINED
from tokenflex.cli import main


def _end_with_parent() -> None:
    """Save the state and stop, as on SIGTERM, when the input is closed."""
    os.read(sys.stdin.fileno(), 1)  # returns when the input is closed: nothing is written
    os.kill(os.getpid(), signal.SIGTERM)


def ask_again(path: Path, canvases: int) -> None:
    """Write the accuracy of a run on its own training data, beside its configuration.

    Args:
        path: Configuration of the run, which is done.
        canvases: The most canvases that are asked about, the first of the data.
    """
    from tokenflex.checkpoints import load_model
    from tokenflex.evaluation import evaluate
    from tokenflex.files import write_json
    from tokenflex.training.build import build_dataset
    from tokenflex.training.config import load_config

    config = load_config(path)
    # A canvas does not depend on their number.
    size = min(config.data.size, canvases)
    dataset = build_dataset(config.data.model_copy(update={"size": size}))
    model, processor = load_model(config.output / "checkpoint")
    assert config.evaluation is not None
    report = evaluate(
        model,
        processor,
        dataset,
        config.evaluation.counts,
        batch_size=config.evaluation.batch_size,
    )
    write_json(path.parent / TRAINED, report)


def log_into(path: Path) -> None:
    """Let this process print into a file, behind what is there."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def run_in_turn(jobs: Sequence[str]) -> int:
    """Run jobs until one fails; return its exit status, or 0."""
    for job in jobs:
        path, _, asked_again = job.rpartition(":")
        config = Path(path)
        log_into(config.parent / LOG)
        if code := main(["train", path]):
            return code
        if int(asked_again):
            ask_again(config, int(asked_again))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="+", metavar="CONFIG:N")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(run_in_turn(parser.parse_args().jobs))
