"""Stages that learn from their own answers at the largest count."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from tests.models.tiny import tiny_model
from tests.training.runs import metrics, own_data, run_until_killed, stage, tiny_values
from tokenflex import TokenCounts
from tokenflex.data.packing import DrawnSample, PackedBatch, PackingCollator
from tokenflex.data.steps import StepPacker
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.models.loading import load_checkpoint
from tokenflex.training.config import StageConfig, TrainConfig
from tokenflex.training.engine import target_weights
from tokenflex.training.flops import forward_flops, teacher_flops, tile_cost, training_flops
from tokenflex.training.loop import TrainingRun
from tokenflex.training.plan import plan_run
from tokenflex.training.records import StageRecord
from tokenflex.training.stages import build_meter, build_optimizer, load_steps

COUNTS = TokenCounts((4, 9, 16), (0.2, 0.3, 0.5), seed=0)


def configured(tmp_path, name="run", **changes) -> TrainConfig:
    common = {"evaluation": None, "encoder_warm_up": None}
    return TrainConfig.model_validate(tiny_values(tmp_path / name, **{**common, **changes}))


def train(config: TrainConfig) -> TrainingRun:
    AcceleratorState._reset_state(reset_partial_state=True)
    training = TrainingRun(config)
    training.run()
    return training


# ---- the configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": -0.1}, "greater than or equal to 0"),
        ({"distillation": float("inf")}, "less than inf"),
        ({"draw": "all", "weights": [1, 1, 1]}, "distillation must be 0 with draw: all"),
        ({"weights": [0, 0, 1]}, "at least two sizes with odds above 0, got counts"),
        ({"counts": [[2, 8], 16], "weights": [1, 1]}, "at least two sizes"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    values = {**stage(batch_size=3), "distillation": 1.0, **changes}
    with pytest.raises(ValueError, match=message):
        StageConfig.model_validate(values)


def test_the_teacher_sees_the_largest_count_that_is_drawn():
    values = stage(counts=[9, [2, 8], 4, 64], weights=[1, 1, 1, 0], distillation=0.5)
    assert StageConfig.model_validate(values).teacher_count == (2, 8)
    assert StageConfig.model_validate({**values, "distillation": 0}).teacher_count is None


# ---- what a teacher is shown


@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_teachers_row_is_that_of_the_largest_count_over_the_same_pixels(share_prefix):
    data = DigitsDataset("train", size=6, questions=2)
    drawn = [DrawnSample(index, 0, data[index]) for index in range(6)]
    processor = digits_processor()
    options = {"share_prefix": share_prefix}
    batch = PackingCollator(processor, COUNTS, **options, teacher_count=16)(drawn)
    plain = PackingCollator(processor, COUNTS, **options)(drawn)
    largest = PackingCollator(processor, TokenCounts((16,), (1,)), **options)(drawn)

    assert plain.teacher is None
    assert torch.equal(batch.plan.input_ids, plain.plan.input_ids)
    assert batch.num_image_tokens == plain.num_image_tokens != largest.num_image_tokens
    teacher = batch.teacher
    assert teacher.num_image_tokens == largest.num_image_tokens
    for name in ("target_rows", "targets"):
        assert torch.equal(getattr(teacher, name), getattr(largest, name)), name
    assert torch.equal(teacher.plan.input_ids, largest.plan.input_ids)
    assert (teacher.shared_prefixes is not None) == share_prefix
    assert torch.equal(teacher.targets, batch.targets)


def test_the_teacher_goes_where_the_batch_goes():
    data = DigitsDataset("train", size=2, questions=2)
    collator = PackingCollator(digits_processor(), COUNTS, share_prefix=True, teacher_count=16)
    batch = collator([DrawnSample(index, 0, data[index]) for index in range(2)]).to("meta")
    inputs = batch.teacher.model_inputs()
    assert inputs["logits_to_keep"].device.type == "meta"
    assert inputs["plan"].input_ids.device.type == "meta"
    assert inputs["shared_prefixes"].key_rows.device.type == "meta"


def test_a_conversation_is_cut_where_the_teacher_must_cut_it():
    """Both learn the same tokens, and neither sees more than ``max_length`` rows."""
    data = DigitsDataset("train", size=20, questions=1)
    drawn = [DrawnSample(index, 0, data[index], 4) for index in range(20)]
    whole = PackingCollator(digits_processor(), COUNTS, teacher_count=16)(drawn)
    bound = max(whole.teacher.plan.lengths) - 1
    collator = PackingCollator(digits_processor(), COUNTS, max_length=bound, teacher_count=16)
    batch = collator(drawn)
    assert len(batch.targets) < len(whole.targets)
    assert max(batch.teacher.plan.lengths) <= bound
    assert torch.equal(batch.teacher.targets, batch.targets)


def test_a_rank_without_samples_has_a_teacher_too():
    data = DigitsDataset("train", size=4, questions=2)
    collator = PackingCollator(digits_processor(), COUNTS, teacher_count=16)
    (batch,) = StepPacker(data, collator, rank=1, num_ranks=2)([(0, 0)]).bins
    assert len(batch.targets) == len(batch.teacher.target_rows) == 0
    assert batch.teacher.plan.num_tokens > 0


def test_a_step_counts_the_teachers_rows():
    data = DigitsDataset("train", size=20, questions=2)
    keys = [(0, index) for index in range(8)]
    collator = PackingCollator(digits_processor(), COUNTS, teacher_count=16)
    options = {"max_tokens": 70, "num_ranks": 2}
    steps = [StepPacker(data, collator, rank=rank, **options)(keys) for rank in (0, 1)]
    bins = [batch for step in steps for batch in step.bins]
    assert len(bins) >= 4
    for step in steps:
        assert step.teacher_tokens == sum(one.teacher.plan.num_tokens for one in bins)
        assert step.teacher_vision_tokens == sum(sum(one.teacher.num_image_tokens) for one in bins)
        assert step.teacher_vision_tokens == 16 * 8


# ---- a step, by hand


def samples_of(batch: PackedBatch, counts: list[int]) -> PackedBatch:
    """The samples of a batch once more, at these counts, by a collator that knows no teacher."""
    data = {
        one.id: one for one in (DigitsDataset("train", size=20, questions=2)[i] for i in range(20))
    }
    drawn = [
        DrawnSample(0, 0, data[name], count)
        for name, count in zip(batch.sample_ids, counts, strict=True)
    ]
    return PackingCollator(digits_processor(16), COUNTS, share_prefix=True)(drawn)


def step_by_hand(training: TrainingRun, distillation: float) -> tuple[float, float, float]:
    """(loss, distillation loss, gradient norm) of the first step, from plain forward passes."""
    model, settings = training.model, training.config.stages[0]
    build_optimizer(training.setup.kind, settings)
    bins = next(load_steps(training.setup, 0, [])).bins
    assert len(bins) > 1
    losses = divergences = total = 0.0
    for one in bins:
        student = samples_of(one, one.num_image_tokens)
        teacher = samples_of(one, [16] * len(one.sample_ids))
        weights = target_weights(student, settings.loss)
        with torch.no_grad():
            truth = model(**teacher.model_inputs()).logits[0].log_softmax(-1)
        logits = model(**student.model_inputs()).logits[0].log_softmax(-1)
        apart = F.kl_div(logits, truth, reduction="none", log_target=True).sum(-1)
        each = F.nll_loss(logits, student.targets, reduction="none") + distillation * apart
        losses = losses + (each * weights).sum()
        divergences += float((apart * weights).sum().detach())
        total += float(weights.sum())
    (losses / total).backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack(norms).norm())
    model.zero_grad(set_to_none=True)
    return float(losses.detach()) / total, divergences / total, norm


@pytest.mark.parametrize("draw", ["sample", "step"])
@pytest.mark.parametrize("loss", ["token", "square"])
def test_a_step_is_what_two_plain_passes_say(tmp_path, loss, draw):
    """In several bins."""
    options = {"draw": draw, "loss": loss, "batch_size": 8, "max_tokens": 60, "warmup_steps": 0}
    odds = {"counts": [4, 16], "weights": [0.9, 0.1]}
    stages = [stage(steps=1, **options, **odds, distillation=0.7)]
    config = configured(tmp_path, stages=stages)
    training = TrainingRun(config)
    expected = step_by_hand(training, 0.7)
    training.run()
    (line,) = metrics(tmp_path / "run")
    found = line["loss"], line["distillation_loss"], line["gradient_norm"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[1] > 1e-6
    assert line["bins"] > 1


def test_where_every_sample_is_at_the_largest_count_there_is_nothing_between_them(tmp_path):
    odds = {"counts": [4, 16], "weights": [1e-9, 1]}
    runs = {"with": {"distillation": 5.0}, "without": {}}
    for name, changes in runs.items():
        train(configured(tmp_path, name, stages=[stage(steps=3, **odds, **changes)]))
    ours, plain = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    assert [line.pop("distillation_loss") for line in ours] == pytest.approx([0, 0, 0], abs=1e-6)
    assert "distillation_loss" not in plain[0]
    for one, other in zip(ours, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


# ---- whole runs

STAGES = [
    stage(name="projector", steps=2, learning_rate={"projector": 0.002}, distillation=1.0),
    stage(name="all", steps=3, max_tokens=100, batch_size=6, loss="square", distillation=0.5),
]


def test_a_run_that_died_or_recomputes_has_the_same_numbers(tmp_path):
    train(configured(tmp_path, "whole", stages=STAGES))
    train(configured(tmp_path, "recomputed", stages=STAGES, gradient_checkpointing=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    run_until_killed(configured(tmp_path, "stopped", stages=STAGES, save_every=1), 4)
    train(configured(tmp_path, "stopped", stages=STAGES, save_every=1))
    expected = metrics(tmp_path / "whole")
    assert len(expected) == 5
    assert all(line["distillation_loss"] > 0 for line in expected)
    weights = load_checkpoint(tmp_path / "whole" / "checkpoint")[0].state_dict()
    for name in ("recomputed", "stopped"):
        assert metrics(tmp_path / name) == expected
        again = load_checkpoint(tmp_path / name / "checkpoint")[0].state_dict()
        assert all(torch.equal(again[key], one) for key, one in weights.items()), name


def test_in_bfloat16_it_is_near(tmp_path):
    for name, precision in (("exact", "no"), ("near", "bf16")):
        train(configured(tmp_path, name, stages=STAGES, precision=precision))
    for ours, exact in zip(metrics(tmp_path / "near"), metrics(tmp_path / "exact"), strict=True):
        for key in ("loss", "gradient_norm"):
            assert ours[key] == pytest.approx(exact[key], rel=0.05), key
        assert math.isfinite(ours["distillation_loss"])


def test_bins_of_text_alone_have_a_teacher(tmp_path):
    data = own_data(tmp_path, 6, broken=(), text_only=(0, 1, 2, 3))
    bins = [stage(steps=6, batch_size=2, max_tokens=20, distillation=1.0)]
    train(configured(tmp_path, data=data, stages=bins))
    lines = metrics(tmp_path / "run")
    assert 0 in {line["tiles"] for line in lines}
    for line in lines:
        assert line["tiles"] or line["distillation_loss"] == 0


# ---- what it costs


def test_a_teachers_arithmetic_is_counted(tmp_path):
    model = tiny_model()
    forward, backward = forward_flops(model), training_flops(model, ("projector",))
    assert teacher_flops(model) == replace(forward, tile=0)
    assert tile_cost(model, ("projector",)) == backward.tile_cost
    seen = 16 * (forward.token + forward.vision_token)
    expected = (backward.tile + seen) / backward.token
    assert tile_cost(model, ("projector",), 16) == pytest.approx(expected)

    config = configured(tmp_path, stages=[stage(steps=2), stage(steps=2, distillation=1.0)])
    without, with_teacher = plan_run(config)
    training = TrainingRun(config)
    step = StepPacker(
        DigitsDataset("train", size=20, questions=2),
        PackingCollator(training.processor, COUNTS, share_prefix=True, teacher_count=16),
    )([(0, index) for index in range(20)])
    added = teacher_flops(training.model).total(
        tiles=step.tiles,
        vision_tokens=step.teacher_vision_tokens,
        tokens=step.teacher_tokens,
        targets=step.targets,
    )
    assert with_teacher.flops - without.flops == pytest.approx(added * 6 / 20, rel=0.01)
    assert with_teacher.flops_saved < without.flops_saved
    assert with_teacher.tile_cost > without.tile_cost

    rates = []
    for settings in config.stages:
        meter = build_meter(training.setup, settings, StageRecord.begin(settings.name))
        for packed in meter.waiting(iter([step])):
            meter.add(packed)
        seconds = meter.record.counts["seconds"]
        line = meter.rates([meter.shared(step)])
        rates.append(line["tflops_per_second"] * seconds * 1e12)
    assert rates[1] - rates[0] == pytest.approx(added, rel=0.01)
