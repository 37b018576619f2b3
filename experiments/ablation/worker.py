"""Process of one job: ``tokenflex train``, which ends together with its parent.

With ``--asked-again N`` the trained model is also asked about ``N`` canvases of its training data.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

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
    from experiments.ablation.jobs import TRAINED
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--asked-again", type=int, default=0)
    options = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = main(["train", str(options.config)])
    if code == 0 and options.asked_again:
        ask_again(options.config, options.asked_again)
    sys.exit(code)
