"""The model on a CUDA device: packed rows, generation and a few steps of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.test_packed_attention import alone_logits, largest_difference, packed_inputs
from tests.models.tiny import Prompt, prompts, tiny_model
from tokenflex.training.config import load_config
from tokenflex.training.loop import Trainer

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def on_cuda(inputs: dict) -> dict:
    return {k: v.to("cuda") if hasattr(v, "to") else v for k, v in inputs.items()}


def packed_on_cuda(model, batch: list[Prompt]) -> list[torch.Tensor]:
    inputs = packed_inputs(batch)
    logits = model(**on_cuda(inputs)).logits[0]
    return [rows.float().cpu() for rows in logits.split(inputs["plan"].lengths)]


@torch.no_grad()
def test_packed_float32_logits_are_those_of_each_sample_alone_on_the_cpu() -> None:
    expected = alone_logits(tiny_model(), prompts())
    assert largest_difference(packed_on_cuda(tiny_model().cuda(), prompts()), expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_half_precision_is_no_worse_than_each_sample_alone(dtype: torch.dtype) -> None:
    """Here the flash kernel for variable lengths runs."""
    truth = alone_logits(tiny_model(), prompts())
    model = tiny_model().to("cuda", dtype)
    packed = packed_on_cuda(model, prompts())
    alone = [model(**on_cuda(one.inputs())).logits[0].float().cpu() for one in prompts()]
    error, peer = largest_difference(packed, truth), largest_difference(alone, truth)
    assert error < 2 * peer + 1e-3


@torch.no_grad()
def test_packed_samples_do_not_see_each_other() -> None:
    model = tiny_model().to("cuda", torch.bfloat16)
    batch = prompts()
    before = packed_on_cuda(model, batch)
    batch[1] = batch[1]._replace(pixels=-batch[1].pixels)
    after = packed_on_cuda(model, batch)
    assert largest_difference(before[1:2], after[1:2]) > 0
    assert largest_difference(before[:1] + before[2:], after[:1] + after[2:]) == 0


@torch.no_grad()
def test_generation_is_that_of_the_cpu() -> None:
    inputs = prompts()[1].inputs()
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = tiny_model().generate(**inputs, **options)
    actual = tiny_model().cuda().generate(**on_cuda(inputs), **options)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_lowers_the_loss(tmp_path: Path, precision: str) -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    stage = config.stages[0].model_copy(update={"steps": 60, "warmup_steps": 5})
    small = {"output": tmp_path, "stages": (stage,), "evaluation": None, "encoder_warm_up": None}
    trainer = Trainer(config.model_copy(update={**small, "precision": precision, "log_every": 1}))
    trainer.run()
    lines = trainer.metrics_path.read_text(encoding="utf-8").splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
