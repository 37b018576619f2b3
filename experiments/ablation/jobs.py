"""An ablation as a list of training runs, each with a configuration and a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.ablation.regimes import Regime, Start
from experiments.ablation.scales import Scale
from tokenflex.files import read_json, write_text
from tokenflex.training.strict import parse_yaml

CONFIG = "config.yaml"
REPORT = "report.json"
TRAINED = "trained.json"
LOG = "train.log"
_REPORT_KEYS = {"accuracy", "accuracy_by_kind", "standard_error", "questions", "stages"}


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        name: Name, and the folder within the ablation's.
        regime: Name of the regime or of the start.
        seed: Seed of the data's order, the counts and the initial weights.
        config: Configuration. Its paths are relative to the ablation's folder.
        steps: Training steps.
        needs: Name of the job whose checkpoint it starts from.
        asked_again: Number of its training canvases that the model is asked about as well.
    """

    name: str
    regime: str
    seed: int
    config: dict[str, Any]
    steps: int
    needs: str | None = None
    asked_again: int = 0

    def is_done(self, output: Path) -> bool:
        """Return whether the last file of the run exists."""
        return (output / self.name / (TRAINED if self.asked_again else REPORT)).is_file()

    def report(self, output: Path) -> dict[str, Any]:
        """Read the run's report.

        Raises:
            ValueError: The file is not JSON, or not a run's report.
        """
        return _read_report(output / self.name / REPORT, _REPORT_KEYS)

    def trained_accuracy(self, output: Path) -> dict[str, float] | None:
        """Read the accuracy on training canvases by count; None if the run was not asked.

        Raises:
            ValueError: The file is not JSON, or not such a report.
        """
        if not self.asked_again:
            return None
        return _read_report(output / self.name / TRAINED, {"accuracy"})["accuracy"]

    def write_config(self, output: Path) -> None:
        """Write the configuration into the job's folder, unless it is there already.

        Raises:
            ValueError: The folder holds a run of another configuration, or a damaged one.
        """
        path = output / self.name / CONFIG
        text = yaml.safe_dump(self.config, sort_keys=False)
        if path.exists():
            try:
                written = parse_yaml(path.read_bytes(), "it")
            except ValueError as error:
                raise ValueError(
                    f"configuration {path} is damaged: {error}; delete its folder and run again"
                ) from error
            if _compared(written) != _compared(self.config):
                raise ValueError(
                    f"output {output} holds another ablation: {path} differs from what this one "
                    "runs; give another --output, or delete that one"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _read_report(path: Path, keys: Set[str]) -> dict[str, Any]:
    again = "delete its folder and run again"
    try:
        report = read_json(path, "report file")
    except ValueError as error:
        raise ValueError(f"{error}; {again}") from error
    missing = sorted(keys - {*report} if isinstance(report, dict) else keys)
    if missing:
        raise ValueError(f"report file {path} lacks {', '.join(missing)}; {again}")
    return report


def _compared(config: Any) -> Any:
    """Return a configuration without the keys about the use of the machine."""
    if not isinstance(config, dict):
        return config
    return {key: value for key, value in config.items() if key not in ("workers", "threads")}


def plan_jobs(
    scale: Scale,
    regimes: Iterable[Regime],
    seeds: Sequence[int],
    *,
    on_gpu: bool,
    workers: int = 0,
    asked_again: int = 0,
) -> list[Job]:
    """Return the runs of each seed: the starts, and the regimes that continue from them.

    Regimes of one seed and start have the same checkpoint and the same order of data.

    Args:
        scale: Task, model and budget.
        regimes: The regimes.
        seeds: The seeds.
        on_gpu: Train on a GPU.
        workers: Processes that prepare the batches of a run.
        asked_again: Training canvases that the model of each regime is asked about as well.
    """
    jobs: dict[str, Job] = {}
    regimes = list(regimes)
    for seed in seeds:
        for regime in regimes:
            start = _start_job(scale, regime.start, seed, on_gpu, workers)
            jobs.setdefault(start.name, start)
            model = {**start.config["model"], **regime.model, "start": f"{start.name}/checkpoint"}
            name = f"seed{seed}/{regime.name}"
            stage = scale.stage(regime.name, **{"steps": scale.steps, **regime.stage})
            config = _config(scale, name, seed, model, stage, on_gpu, workers)
            config["data"].update(_size_of(regime.canvases or regime.start.canvases))
            jobs[name] = Job(
                name, regime.name, seed, config, stage["steps"], start.name, asked_again
            )
    return [*jobs.values()]


def _start_job(scale: Scale, start: Start, seed: int, on_gpu: bool, workers: int) -> Job:
    name = f"seed{seed}/{start.name}"
    stage = scale.alignment(**start.stage)
    # Starts may be fewer than cores, so another process draws their canvases.
    workers = max(workers, 1)
    config = _config(scale, name, seed, {**scale.model(), **start.model}, stage, on_gpu, workers)
    config["data"].update(_size_of(start.canvases))
    config["encoder_warm_up"] = {
        "steps": scale.warm_up_steps,
        "batch_size": scale.warm_up_batch,
        "learning_rate": scale.warm_up_learning_rate,
    }
    return Job(name, start.name, seed, config, stage["steps"])


def _size_of(canvases: int | None) -> dict[str, int]:
    return {} if canvases is None else {"size": canvases}


def _config(
    scale: Scale,
    name: str,
    seed: int,
    model: dict[str, Any],
    stage: dict[str, Any],
    on_gpu: bool,
    workers: int,
) -> dict[str, Any]:
    return {
        "output": name,
        "seed": seed,
        "workers": workers,
        **({} if on_gpu else {"threads": 1}),
        "precision": scale.precision if on_gpu else "no",
        "model": model,
        "data": scale.training_data,
        "stages": [stage],
        "evaluation": {
            "data": {**scale.data, "split": "test", "size": scale.evaluated},
            "counts": scale.asked,
            "batch_size": 256,
        },
    }
