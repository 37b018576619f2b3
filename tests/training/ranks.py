"""Train several runs in turn, in each process of ``torchrun -m tests.training.ranks RUNS.json``.

Starting processes takes longer than tiny runs, so those that need two share them. RUNS.json lists
[configuration, event or None]; what became of each run is in ``<output>.<rank>.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from tokenflex.training import states
from tokenflex.training.config import load_config
from tokenflex.training.loop import TrainingRun

RANK = int(os.environ["RANK"])


def run(config: str, event: str | None) -> None:
    training = TrainingRun(load_config(config))
    step, count = training._step, [0]

    def with_event(*args, **kwargs):
        count[0] += 1
        if count[0] == 5 and RANK == 1:  # on one rank alone
            if event == "signal":
                training.interruption.requested = True
            elif event == "error":
                raise RuntimeError("rank 1 has had enough")
        return step(*args, **kwargs)

    def full_disk(*args, **kwargs):
        raise OSError("the disk is full")

    training._step = with_event
    save = states.save_state
    if event == "full disk" and RANK == 0:
        states.save_state = full_disk
    try:
        training.run()
    finally:
        states.save_state = save


def main() -> None:
    for config, event in json.loads(Path(sys.argv[1]).read_text()):
        result = None
        try:
            run(config, event)
        except BaseException as error:
            result = [type(error).__name__, str(error)]
        output = load_config(config).output
        Path(f"{output}.{RANK}.json").write_text(json.dumps(result))
        if event == "error":
            # As the command does; whoever is left must not wait for it.
            sys.exit(2)
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main()
