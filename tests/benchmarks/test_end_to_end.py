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
    for row, counts in zip(rows, 2 * [TINY.fixed] + 2 * [TINY.mixed], strict=True):
        assert row["flops"] == 3 * end_to_end.forward_flops(TINY, counts)  # backward: twice more


def test_peak_memory_is_that_of_a_step(monkeypatch):
    def peak_bytes(call, device):
        assert call().ndim == 0
        return 123

    monkeypatch.setattr(end_to_end, "peak_bytes", peak_bytes)
    rows = end_to_end.measure(TINY, torch.float32, "cpu", Effort(3, 0.0))
    assert [row["peak_bytes"] for row in rows] == [123] * 4


def test_shapes_on_a_gpu_are_siglip_400m_and_qwen2_5_3b_cut_in_depth():
    shape = end_to_end.shape_of("cuda", False)
    assert (shape.vision_width, shape.vision_hidden, shape.vision_heads) == (1152, 4304, 16)
    assert (shape.pixels, shape.patch, shape.patches) == (384, 14, 27 * 27)
    assert (shape.text_width, shape.text_hidden, shape.vocabulary) == (2048, 11_008, 151_936)
    assert (shape.heads, shape.key_heads) == (16, 2)
    assert shape.layers >= 3
    assert shape.counts == (64, 144, 256)
    assert [shape.mixed.count(count) for count in shape.counts] == [8, 12, 20]


def test_the_loss_alone_is_neither_padded_nor_packed(monkeypatch):
    seen = []
    loss_of = end_to_end.loss_of

    def watched(model, inputs, answers):
        seen.append((inputs["input_ids"].shape[0], bool(inputs["attention_mask"].all())))
        return loss_of(model, inputs, answers)

    monkeypatch.setattr(end_to_end, "loss_of", watched)
    model = end_to_end.build(TINY, torch.float32, "cpu")
    alone = end_to_end.loss_of_each_alone(model, TINY, TINY.mixed, torch.float32, "cpu")
    assert seen == [(1, True)] * TINY.samples
    packed = loss_of(model, *end_to_end.inputs_of(TINY, TINY.mixed, True, torch.float32, "cpu"))
    assert alone == pytest.approx(packed.item(), rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_on_what_follows_each_position(packed):
    inputs, answers = end_to_end.inputs_of(TINY, TINY.mixed, packed, torch.float32, "cpu")
    ids = inputs["plan"].input_ids if packed else inputs["input_ids"]
    assert torch.equal(ids[..., inputs["logits_to_keep"] + 1].flatten(), answers)
    assert len(answers) == TINY.samples * TINY.answer


@pytest.mark.parametrize("wrong_one", ["packed", "padded"])
def test_another_loss_is_a_row_with_the_reason_and_no_time(monkeypatch, wrong_one):
    step = end_to_end.step

    def wrong(model, inputs, answers):
        is_packed = "plan" in inputs
        off = 1.0005 if is_packed == (wrong_one == "packed") else 1
        return step(model, inputs, answers) * off

    monkeypatch.setattr(end_to_end, "step", wrong)
    rows = end_to_end.measure(TINY, torch.float32, "cpu", Effort(3, 0.0))
    for row in rows:
        failed = row["status"].startswith("failed: ValueError: loss must be that of each sample")
        assert failed is (row["variant"] == wrong_one)
        assert (row["p50_us"] == "") is failed


def test_how_far_a_loss_may_be_off():
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-4)):
        assert end_to_end._loss_error(1 + 0.9 * limit, 1.0, dtype) == pytest.approx(0.9 * limit)
        with pytest.raises(ValueError, match="loss must be that of each sample alone, 1, got"):
            end_to_end._loss_error(1 + 1.1 * limit, 1.0, dtype)


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
