"""An ablation as a list of training runs, each a configuration in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.ablation.regimes import Regime, Start
from experiments.ablation.scales import Scale
from tokenflex.files import read_json, write_atomically
from tokenflex.training.strict import parse_yaml

CONFIG = "config.yaml"
REPORT = "report.json"


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        name: also its folder under the ablation's.
        regime: the regime's name, or that of the start.
        seed: of the data's order, the counts and the fresh weights.
        config: of the run. Paths in it are relative to the ablation's folder.
        steps: of training.
        needs: the job whose checkpoint it starts from.
    """

    name: str
    regime: str
    seed: int
    config: dict[str, Any]
    steps: int
    needs: str | None = None

    def is_done(self, output: Path) -> bool:
        """Whether its report is there, which is the last thing that a run writes."""
        return (output / self.name / REPORT).is_file()

    def report(self, output: Path) -> dict[str, Any]:
        """What the run found.

        Raises:
            ValueError: its report is not JSON, or not that of a run.
        """
        path = output / self.name / REPORT
        again = "delete its folder and run again"
        try:
            report = read_json(path, "report file")
        except ValueError as error:
            raise ValueError(f"{error}; {again}") from error
        expected = {"accuracy", "accuracy_by_kind", "standard_error", "questions", "stages"}
        missing = sorted(expected - {*report}) if isinstance(report, dict) else sorted(expected)
        if missing:
            raise ValueError(f"report file {path} lacks {', '.join(missing)}; {again}")
        return report

    def write_config(self, output: Path) -> None:
        """Write the configuration into the job's folder, or find it there.

        Raises:
            ValueError: the folder holds a run of another configuration, or a damaged one.
        """
        path = output / self.name / CONFIG
        text = yaml.safe_dump(self.config, sort_keys=False)
        if path.exists():
            try:
                there = parse_yaml(path.read_bytes(), "it")
            except ValueError as error:
                raise ValueError(
                    f"configuration {path} is damaged: {error}; delete its folder and run again"
                ) from error
            if _compared(there) != _compared(self.config):
                raise ValueError(
                    f"output {output} holds another ablation: {path} differs from what this one "
                    "runs; give another --output, or delete that one"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _compared(config: Any) -> Any:
    """A configuration without what only says how the machine is used."""
    if not isinstance(config, dict):
        return config
    return {key: value for key, value in config.items() if key not in ("workers", "threads")}


def plan_jobs(
    scale: Scale, regimes: Iterable[Regime], seeds: Sequence[int], *, on_gpu: bool, workers: int = 0
) -> list[Job]:
    """Every run: for each seed the starts that are needed, and the regimes from them.

    All regimes of a seed that have the same start go on from the same checkpoint, and in the same
    order of data.
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
            jobs[name] = Job(name, regime.name, seed, config, stage["steps"], start.name)
    return [*jobs.values()]


def _start_job(scale: Scale, start: Start, seed: int, on_gpu: bool, workers: int) -> Job:
    name = f"seed{seed}/{start.name}"
    stage = scale.stage("alignment", scale.start_steps, **start.stage)
    # Fewer starts than cores may run: another process draws their canvases.
    workers = max(workers, 1)
    config = _config(scale, name, seed, {**scale.model(), **start.model}, stage, on_gpu, workers)
    config["encoder_warm_up"] = {
        "steps": scale.warm_up_steps,
        "batch_size": scale.warm_up_batch,
        "learning_rate": 0.003,
    }
    return Job(name, start.name, seed, config, stage["steps"])


def _config(
    scale: Scale,
    name: str,
    seed: int,
    model: dict[str, Any],
    stage: dict[str, Any],
    on_gpu: bool,
    workers: int,
) -> dict[str, Any]:
    canvases = {"name": "digits", "cells": scale.cells}
    return {
        "output": name,
        "seed": seed,
        "workers": workers,
        **({} if on_gpu else {"threads": 1}),
        "precision": scale.precision if on_gpu else "no",
        "model": model,
        "data": {**canvases, "split": "train"},
        "stages": [stage],
        "evaluation": {
            "data": {**canvases, "split": "test", "size": scale.evaluated},
            "counts": scale.asked,
            "batch_size": 256,
        },
    }
