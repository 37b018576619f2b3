"""A few steps of training on a CUDA device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenflex.training.config import load_config
from tokenflex.training.loop import TrainingRun

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_lowers_the_loss(tmp_path: Path, precision: str) -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    stage = config.stages[0].model_copy(update={"steps": 60, "warmup_steps": 5})
    small = {"output": tmp_path, "stages": (stage,), "evaluation": None, "encoder_warm_up": None}
    small |= {"precision": precision, "log_every": 1}
    TrainingRun(config.model_copy(update=small)).run()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
