"""The training step of the end-to-end benchmark, at a shape of a few thousand parameters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import end_to_end
from benchmarks.harness import COLUMNS, Effort

TINY = dataclasses.replace(
    end_to_end.shape_of("cpu", True),
    layers=1,
    vision_width=32,
    vision_hidden=64,
    pixels=32,
    text_width=32,
    text_hidden=64,
    vocabulary=50,
    text=16,
    counts=(4, 9, 16),
)


def test_four_ways_and_the_same_loss():
    rows = end_to_end.measure(TINY, torch.float32, "cpu", Effort(3, 0.0))
    assert [(row["case"], row["variant"], row["status"]) for row in rows] == [
        ("fixed 16", "padded", "ok"),
        ("fixed 16", "packed", "ok"),
        ("mixed 4/9/16 2:3:5", "padded", "ok"),
        ("mixed 4/9/16 2:3:5", "packed", "ok"),
    ]
    assert all(tuple(row) == COLUMNS for row in rows)
    assert [row["tokens"] for row in rows] == [320, 320, 160 + 115, 160 + 115]
    assert max(row["error"] for row in rows) < 1e-4


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_on_what_follows_each_position(packed):
    inputs, answers = end_to_end.inputs_of(TINY, TINY.mixed, packed, torch.float32, "cpu")
    ids = inputs["plan"].input_ids if packed else inputs["input_ids"]
    assert torch.equal(ids[..., inputs["logits_to_keep"] + 1].flatten(), answers)
    assert len(answers) == TINY.samples * TINY.answer


def test_another_loss_is_a_row_with_the_reason(monkeypatch):
    step = end_to_end.step

    def wrong(model, inputs, answers):
        return step(model, inputs, answers) * (1.1 if "plan" in inputs else 1)

    monkeypatch.setattr(end_to_end, "step", wrong)
    rows = end_to_end.measure(TINY, torch.float32, "cpu", Effort(3, 0.0))
    assert [row["status"].startswith("failed: ValueError: loss must be") for row in rows] == [
        False,
        True,
        False,
        True,
    ]


def test_a_model_that_does_not_build_is_a_row(monkeypatch):
    def build(*_):
        raise ImportError("transformers is too old")

    monkeypatch.setattr(end_to_end, "build", build)
    (row,) = end_to_end.measure(TINY, torch.float32, "cpu", Effort(3, 0.0))
    assert row["status"] == "failed: ImportError: transformers is too old"


def test_flops_are_those_that_pytorch_counts():
    """But for the pooling, which is counted as nothing, and attention to what comes later."""
    counts = TINY.fixed
    model = end_to_end.build(TINY, torch.float32, "cpu")
    model.set_attn_implementation("eager")  # whose products are counted
    inputs, _ = end_to_end.inputs_of(TINY, counts, False, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    length = TINY.text + 16
    later = TINY.samples * 2 * length**2 * TINY.text_width
    grid = (TINY.pixels // TINY.patch, 4)
    pooling = (
        2 * TINY.samples * TINY.vision_width * (grid[0] ** 2 * grid[1] + grid[0] * grid[1] ** 2)
    )
    wanted = counter.get_total_flops() - pooling - later
    assert end_to_end.forward_flops(TINY, counts) == pytest.approx(wanted, rel=0.01)
