"""configs/demo.yaml cut down to a run of a second or two."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

from tokenflex.data.packing import PackingCollator
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.training.build import build_processor
from tokenflex.training.config import SampleConfig, TrainConfig
from tokenflex.training.loop import TrainingRun
from tokenflex.training.metrics import TIMING_KEYS
from tokenflex.training.plan import ONE_COUNT, measure_samples

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


def demo_values() -> dict[str, Any]:
    return yaml.safe_load(DEMO.read_text(encoding="utf-8"))


def stage(**changes: Any) -> dict[str, Any]:
    return {
        "name": "all",
        "steps": 4,
        "batch_size": 3,
        "learning_rate": {"vision": 0.002, "projector": 0.002, "text": 0.002},
        "counts": [4, 9, 16],
        "weights": [0.2, 0.3, 0.5],
        "warmup_steps": min(2, changes.get("steps") or 4),
        **changes,
    }


def tiny_values(output: Path, **changes: Any) -> dict[str, Any]:
    """The demo's model and data with fewer and narrower layers; two short stages."""
    values = copy.deepcopy(demo_values())
    values["model"]["projector_hidden_width"] = 24
    for part in ("vision", "text"):
        values["model"][part]["config"] |= {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    values["model"]["text"]["config"]["num_key_value_heads"] = 1
    values |= {
        "output": str(output),
        "threads": 1,
        "workers": 0,
        "log_every": 1,
        "save_every": 3,
        "data": {"name": "digits", "split": "train", "size": 20, "questions": 2},
        "encoder_warm_up": {"steps": 2, "batch_size": 2, "learning_rate": 0.003},
        "stages": [
            stage(name="projector", learning_rate={"projector": 0.002}, counts=[16], weights=[1]),
            stage(name="all", steps=6),
        ],
        "evaluation": {
            "data": {"name": "digits", "split": "test", "size": 6, "questions": 2},
            "counts": [4, 9],
            "batch_size": 4,
        },
    }
    return {**values, **changes}


def mean_sample(config: TrainConfig, *, share_prefix: bool) -> SampleConfig:
    """The mean sample of a run's data for our own model."""
    collator = PackingCollator(build_processor(config.model), ONE_COUNT, share_prefix=share_prefix)
    return measure_samples(config, config.data, collator)


def write_config(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def metrics(output: Path) -> list[dict[str, Any]]:
    """Return the logged lines without timings."""
    return untimed(output / "metrics.jsonl")


def evaluations(output: Path) -> list[dict[str, Any]]:
    """Return the lines of evaluations during training without timings."""
    return untimed(output / "evaluations.jsonl")


def untimed(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines]


class Killed(BaseException):
    """Ends a run as a kill does: nothing in the sources catches it, so nothing is saved."""


def run_until_killed(config: TrainConfig, steps: int) -> None:
    """Train ``steps`` steps in this process, and die in the next one."""
    training, left = TrainingRun(config), [steps]
    step = training._step

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return step(*args, **kwargs)

    training._step = dying
    with pytest.raises(Killed):
        training.run()
    AcceleratorState._reset_state(reset_partial_state=True)


def temporary_files(output: Path) -> list[str]:
    return [str(path) for path in output.rglob(".*")]


def own_data(
    tmp_path: Path, samples: int, broken: tuple[int, ...], text_only: tuple[int, ...] = ()
) -> dict:
    """A messages file of which the pictures ``broken`` are cut off."""
    turns = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
    lines = []
    for index in range(samples):
        path = tmp_path / f"{index}.png"
        DigitsDataset("train", size=samples)[index].images[0].save(path)
        if index in broken:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
        images = [] if index in text_only else [path.name]
        lines.append(json.dumps({"id": f"s{index}", "images": images, "messages": turns}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return {"name": "messages", "path": str(tmp_path / "data.jsonl")}
