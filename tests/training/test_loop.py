"""A run: the files it leaves, the modules it must not change, the same numbers after a stop."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tests.forked import Command
from tests.training.processes import start, start_two
from tests.training.runs import (
    Killed,
    evaluations,
    metrics,
    own_data,
    stage,
    temporary_files,
    tiny_values,
    write_config,
)
from tokenflex import TokenCounts
from tokenflex.cli import main
from tokenflex.data.mixture import MixtureOrder
from tokenflex.data.order import EpochOrder, StepSampler
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.models.loading import load_checkpoint
from tokenflex.training.config import load_config
from tokenflex.training.faults import BrokenSamplesError, NonFiniteLossError
from tokenflex.training.loop import TrainingRun
from tokenflex.training.states import load_state

PATIENCE = 90  # seconds before a subprocess counts as hanging


def configured(tmp_path: Path, name: str = "run", **changes) -> Path:
    values = tiny_values(tmp_path / name, **changes)
    return write_config(tmp_path / f"{name}.yaml", values)


def train(config: Path, **options) -> dict:
    return TrainingRun(load_config(config), **options).run()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint")[0].state_dict()


def assert_same_weights(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


# ---- what a run leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output of an uninterrupted run of the tiny configuration."""
    folder = tmp_path_factory.mktemp("finished")
    train(configured(folder))
    return folder / "run"


def test_metrics_have_a_line_a_step_with_sound_numbers(finished):
    lines = metrics(finished)
    assert [(line["stage"], line["step"]) for line in lines] == [
        *((0, step) for step in range(1, 5)),
        *((1, step) for step in range(1, 7)),
    ]
    assert all(0 < line["loss"] < 10 for line in lines)
    assert all(line["tokens_per_image"] == 16 for line in lines[:4])
    # Adam's rate after each step: two steps of warm-up, then a cosine to zero.
    rates = [line["learning_rate"]["projector"] for line in lines[:4]]
    assert rates == pytest.approx([0.001, 0.002, 0.001, 0.0])


def test_tokens_per_image_are_those_that_were_drawn(finished):
    counts = TokenCounts((4, 9, 16), (0.2, 0.3, 0.5), seed=0)
    sampler = StepSampler(EpochOrder(20, 0), first_position=12, steps=6, batch_size=3)
    drawn = [counts.draw(index, epoch) for batch in sampler for epoch, index in batch]
    assert metrics(finished)[-1]["tokens_per_image"] == pytest.approx(sum(drawn) / len(drawn))
    report = json.loads((finished / "report.json").read_text())
    assert report["tokens_per_image"] == pytest.approx((12 * 16 + sum(drawn)) / 30)


def test_report_has_every_count_and_kind(finished):
    report = json.loads((finished / "report.json").read_text())
    assert list(report["accuracy"]) == ["4", "9"]
    assert sum(report["questions"].values()) == 12
    assert report["accuracy_by_kind"].keys() == report["questions"].keys()
    assert report["seconds"] > 0


def test_checkpoint_loads_and_answers(finished):
    model, processor = load_checkpoint(finished / "checkpoint")
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    sample = DigitsDataset("test", size=1)[0]
    inputs = processor(images=list(sample.images), text="<image> odd", num_image_tokens=4)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_nothing_else_is_left(finished):
    left = sorted(path.name for path in finished.iterdir())
    assert left == ["checkpoint", "config.json", "metrics.jsonl", "report.json"]
    assert temporary_files(finished) == []


def test_the_same_configuration_gives_the_same_run(finished, tmp_path):
    train(configured(tmp_path))
    assert metrics(tmp_path / "run") == metrics(finished)
    assert_same_weights(weights(tmp_path / "run"), weights(finished))


def test_another_seed_gives_another_run(finished, tmp_path):
    train(configured(tmp_path, seed=1))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert all(a != line["loss"] for a, line in zip(losses, metrics(finished), strict=True))


def test_logging_and_saving_seldom_changes_no_number(finished, tmp_path):
    train(configured(tmp_path, log_every=4, save_every=100))
    kept = [line for line in metrics(finished) if line["step"] % 4 == 0 or line["step"] == 6]
    assert metrics(tmp_path / "run") == kept
    assert_same_weights(weights(tmp_path / "run"), weights(finished))


def test_workers_change_no_number(finished, tmp_path):
    train(configured(tmp_path, workers=2))
    assert metrics(tmp_path / "run") == metrics(finished)


def test_training_learns(tmp_path):
    one_stage = [stage(steps=60, batch_size=8, counts=[16], weights=[1], schedule="constant")]
    train(configured(tmp_path, stages=one_stage, log_every=5, evaluation=None, save_every=100))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


# ---- what may change


@pytest.mark.parametrize("module", ["vision", "projector", "text"])
def test_modules_without_a_learning_rate_do_not_change(tmp_path, module):
    stages = [stage(learning_rate={module: 0.01})]
    config = configured(tmp_path, encoder_warm_up=None, evaluation=None, stages=stages)
    training = TrainingRun(load_config(config))
    before = copy.deepcopy(training.model.state_dict())
    training.run()
    prefixes = {
        "vision": ("model.vision_model.",),
        "projector": ("model.projector.",),
        "text": ("model.language_model.", "lm_head."),
    }
    changed = set()
    for name, tensor in weights(tmp_path / "run").items():
        owner = next(key for key, starts in prefixes.items() if name.startswith(starts))
        if not torch.equal(tensor, before[name]):
            assert owner == module, name
            changed.add(name)
    assert len(changed) >= 6


def test_a_learning_rate_of_zero_freezes(tmp_path):
    stages = [stage(learning_rate={"projector": 0.01, "text": 0, "vision": 0})]
    config = configured(tmp_path, encoder_warm_up=None, evaluation=None, stages=stages)
    training = TrainingRun(load_config(config))
    before = copy.deepcopy(training.model.state_dict())
    training.run()
    for name, tensor in weights(tmp_path / "run").items():
        if not name.startswith("model.projector."):
            assert torch.equal(tensor, before[name]), name


# ---- the gradient


def answer_loss(model, processor, keys, counts, questions) -> torch.Tensor:
    """Mean loss over all answer tokens, each question alone through the padded path."""
    dataset, losses = DigitsDataset("train", size=20, questions=questions), []
    for epoch, index in keys:
        sample, count = dataset[index], counts.draw(index, epoch)
        for conversation in sample.conversations:
            question, answer = (turn.text for turn in conversation.turns)
            prompt = processor(
                images=list(sample.images), text=f"<image> {question}", num_image_tokens=count
            )
            ids = processor.tokenizer(f"{answer} <eos>", return_tensors="pt")["input_ids"]
            prompt["input_ids"] = torch.cat([prompt["input_ids"], ids], dim=1)
            del prompt["attention_mask"]
            logits = model(**prompt).logits[0]
            losses += F.cross_entropy(logits[-3:-1], ids[0], reduction="none").unbind()
    return torch.stack(losses).mean()


@pytest.mark.parametrize("warm_up", [None, {"steps": 1, "batch_size": 2}])
def test_first_gradient_is_that_of_the_mean_over_all_answer_tokens(tmp_path, monkeypatch, warm_up):
    one_step = [stage(steps=1, warmup_steps=0, max_grad_norm=1e9)]
    config = configured(tmp_path, encoder_warm_up=warm_up, evaluation=None, stages=one_step)
    training, seen = TrainingRun(load_config(config)), {}
    step = torch.optim.AdamW.step

    def recording(optimizer, *args, **kwargs):
        seen["weights"] = copy.deepcopy(training.model.state_dict())
        seen["gradients"] = [
            None if p.grad is None else p.grad.clone() for p in training.model.parameters()
        ]
        return step(optimizer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recording)
        training.run()

    (keys,) = StepSampler(EpochOrder(20, 0), first_position=0, steps=1, batch_size=3)
    counts = TokenCounts((4, 9, 16), (0.2, 0.3, 0.5), seed=0)
    assert len({counts.draw(index, epoch) for epoch, index in keys}) > 1
    model = copy.deepcopy(training.model).train().requires_grad_(True)
    model.load_state_dict(seen["weights"])
    loss = answer_loss(model, training.processor, keys, counts, questions=2)
    loss.backward()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for (name, parameter), gradient in zip(
        model.named_parameters(), seen["gradients"], strict=True
    ):
        scale = max(1.0, float(parameter.grad.abs().max()))
        assert float((gradient - parameter.grad).abs().max()) < 1e-5 * scale, name


def test_clipping_measures_the_gradients_of_this_step_only(tmp_path, monkeypatch):
    """Earlier gradients of a module that is frozen now must not shrink the others' steps."""
    one_step = [stage(steps=1, learning_rate={"projector": 0.01}, warmup_steps=0)]
    config = configured(tmp_path, evaluation=None, stages=one_step)
    training, step, holders = TrainingRun(load_config(config)), torch.optim.AdamW.step, set()

    def recording(optimizer, *args, **kwargs):
        holders.clear()
        holders.update(n for n, p in training.model.named_parameters() if p.grad is not None)
        return step(optimizer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recording)
        training.run()
    assert holders == {n for n in training.model.state_dict() if n.startswith("model.projector.")}


@pytest.mark.slow
def test_sigterm_to_one_of_two_ranks_stops_both_and_they_continue_as_one(tmp_path):
    """With evaluations by both, of an odd number of samples, and a budget in tokens."""
    stages = [stage(name="steps", steps=30), stage(name="tokens", tokens=1500)]
    del stages[1]["steps"]
    evaluation = {
        "data": {"name": "digits", "split": "test", "size": 7, "questions": 2},
        "counts": [4, 9],
        "every": 8,
        "samples": 5,
    }
    changes = {"stages": stages, "evaluation": evaluation, "save_every": 5}
    alone, shared = (configured(tmp_path, name, **changes) for name in ("alone", "shared"))
    ranks = start_two(shared)
    errors = signal_after(ranks[1], tmp_path / "shared", (0, 6), signal.SIGTERM)
    ranks[0].wait(PATIENCE)
    assert [rank.returncode for rank in ranks] == [2, 2], (errors, ranks[0].stderr.read())
    stopped = load_state(tmp_path / "shared" / "state.pt")
    lines = metrics(tmp_path / "shared")
    assert (stopped["stage"], stopped["step"]) == (lines[-1]["stage"], lines[-1]["step"])
    assert lines[-1]["global_step"] < 60

    ranks = start_two(shared)
    train(alone)
    for process in ranks:
        process.wait(PATIENCE)
        assert process.returncode == 0, process.stderr.read()
    exact = ("stage", "step", "global_step", "tokens", "stage_tokens", "samples", "counts")
    for a, b in zip(metrics(tmp_path / "shared"), metrics(tmp_path / "alone"), strict=True):
        assert [a[key] for key in exact] == [b[key] for key in exact]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    places = [(line["stage"], line["step"]) for line in evaluations(tmp_path / "shared")]
    assert places == [(line["stage"], line["step"]) for line in evaluations(tmp_path / "alone")]
    assert places[:4] == [(0, 8), (0, 16), (0, 24), (1, 8)]
    assert all(sum(one["questions"].values()) == 10 for one in evaluations(tmp_path / "shared"))
    report = json.loads((tmp_path / "shared" / "report.json").read_text())
    assert sum(report["questions"].values()) == 14


# ---- stopping and continuing


def train_until(monkeypatch, config: Path, steps: int, **options) -> None:
    """Run, and die instead of the optimiser step after ``steps`` of them.

    PyTorch fills a new optimiser by a step with zero gradients before it restores a saved one; that
    is no step of the run.
    """
    left, step = [steps], torch.optim.AdamW.step
    training = TrainingRun(load_config(config), **options)

    def counting(optimizer, *args, **kwargs):
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        left[0] -= any(one.grad is not None and bool(one.grad.any()) for one in parameters)
        if left[0] < 0:
            raise Killed
        return step(optimizer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counting)
        with pytest.raises(Killed):
            training.run()


# The encoder's warm-up takes the first 2 optimiser steps, the stages 4 and 6.
@pytest.mark.parametrize(
    ("steps", "workers"),
    [
        *((1, 0), (6, 0), (9, 1)),
        *(pytest.param(*case, marks=pytest.mark.release) for case in ((5, 0), (11, 0))),
    ],
)
def test_a_run_that_died_continues_with_the_same_numbers(
    finished, tmp_path, monkeypatch, steps, workers
):
    config = configured(tmp_path, workers=workers)
    train_until(monkeypatch, config, steps)
    torch.manual_seed(steps)  # what another process would have
    train(config)
    assert metrics(tmp_path / "run") == metrics(finished)
    assert_same_weights(weights(tmp_path / "run"), weights(finished))
    fresh, resumed = (
        json.loads((folder / "report.json").read_text()) for folder in (finished, tmp_path / "run")
    )
    for key in ("accuracy", "accuracy_by_kind", "questions", "tokens_per_image"):
        assert resumed[key] == fresh[key]


def test_dying_twice_and_with_half_a_line_in_the_metrics(finished, tmp_path, monkeypatch):
    config = configured(tmp_path)
    train_until(monkeypatch, config, 6)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 0, "st')
    train_until(monkeypatch, config, 3)
    train(config)
    assert metrics(tmp_path / "run") == metrics(finished)


def test_workers_and_logging_may_change_between_the_halves(finished, tmp_path, monkeypatch):
    train_until(monkeypatch, configured(tmp_path), 8)
    train(configured(tmp_path, workers=1, save_every=2))
    assert metrics(tmp_path / "run") == metrics(finished)


def test_a_state_of_another_configuration_is_refused(tmp_path, monkeypatch):
    train_until(monkeypatch, configured(tmp_path), 8)
    other = configured(tmp_path, seed=3)
    with pytest.raises(ValueError, match=r"state\.pt.*another.*--fresh"):
        train(other)
    train(other, fresh=True)
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_finished_run_is_not_written_over_by_another(tmp_path):
    train(configured(tmp_path))
    before = (tmp_path / "run" / "checkpoint" / "model.safetensors").read_bytes()
    other = configured(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"config\.json is of a run of another configuration"):
        train(other)
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").read_bytes() == before
    train(configured(tmp_path, log_every=5))  # how much is said is no other run
    train(other, fresh=True)


def test_dropout_that_packed_attention_has_not_is_known_before_the_first_stage(tmp_path):
    values = tiny_values(tmp_path / "run")
    values["model"]["text"]["config"]["attention_dropout"] = 0.1
    config = write_config(tmp_path / "run.yaml", values)
    with pytest.raises(ValueError, match=r"attention_dropout of model\.text .* be 0.*'all', got"):
        TrainingRun(load_config(config))
    assert not (tmp_path / "run").exists()


def test_fresh_begins_anew(finished, tmp_path, monkeypatch):
    config = configured(tmp_path)
    train_until(monkeypatch, config, 8)
    train(config, fresh=True)
    assert metrics(tmp_path / "run") == metrics(finished)


def test_fresh_forgets_the_old_state_at_once(finished, tmp_path, monkeypatch):
    """Or a fresh run that dies early would continue from what it was told to forget."""
    train_until(monkeypatch, configured(tmp_path), 8)
    train_until(monkeypatch, configured(tmp_path), 1, fresh=True)
    train(configured(tmp_path))
    assert metrics(tmp_path / "run") == metrics(finished)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def flip_a_bit_of_the_weights(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit_of_the_weights])
def test_a_corrupt_state_falls_back_to_the_one_before(finished, tmp_path, monkeypatch, damage):
    config = configured(tmp_path, save_every=1)
    train_until(monkeypatch, config, 9)
    damage(tmp_path / "run" / "state.pt")
    with pytest.warns(UserWarning, match=r"state\.pt.*continuing from state\.1\.pt, step 2 of"):
        train(config)
    assert metrics(tmp_path / "run") == metrics(finished)
    assert_same_weights(weights(tmp_path / "run"), weights(finished))
    assert (tmp_path / "run" / "state.pt.corrupt").exists()


def test_a_run_that_dies_again_after_a_fall_back_still_has_two_whole_states(tmp_path, monkeypatch):
    config = configured(tmp_path, save_every=1)
    train_until(monkeypatch, config, 8)
    truncate(tmp_path / "run" / "state.pt")
    with pytest.warns(UserWarning, match=r"state\.1\.pt"):
        train_until(monkeypatch, config, 2)
    steps = [load_state(tmp_path / "run" / name)["step"] for name in ("state.pt", "state.1.pt")]
    assert steps == [3, 2]


def test_states_of_which_none_can_be_read_are_refused(tmp_path, monkeypatch):
    config = configured(tmp_path, save_every=1)
    train_until(monkeypatch, config, 8)
    for name in ("state.pt", "state.1.pt"):
        truncate(tmp_path / "run" / name)
    with pytest.raises(ValueError, match=r"state\.pt.*no earlier state.*--fresh"):
        train(config)


def test_a_disk_that_is_full_leaves_the_state_before(finished, tmp_path, monkeypatch):
    """The limit on a file's size stands for the disk: the write fails in the middle."""
    config = configured(tmp_path, save_every=1)
    train_until(monkeypatch, config, 8)
    before = (tmp_path / "run" / "state.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"state\.pt could not be written"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert temporary_files(tmp_path / "run") == []
    train(config)
    assert metrics(tmp_path / "run") == metrics(finished)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    stages = [stage(learning_rate={"projector": 1e30, "text": 1e30}, steps=20, warmup_steps=0)]
    config = configured(tmp_path, stages=stages, log_every=100, save_every=1, evaluation=None)
    with pytest.raises(NonFiniteLossError, match=r"step \d+ of stage 'all'.*non_finite\.json"):
        train(config)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_the_samples_of_a_step_whose_loss_is_nan_are_saved(tmp_path, monkeypatch):
    """Those of that very step, though it is neither logged nor saved."""
    stages = [stage(steps=20)]
    config = configured(
        tmp_path,
        stages=stages,
        log_every=100,
        save_every=100,
        evaluation=None,
        encoder_warm_up=None,
    )
    left, step = [7], TrainingRun._step

    def poisoned(training, model, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            with torch.no_grad():
                next(training.model.model.projector.parameters()).fill_(float("nan"))
        return step(training, model, *args, **kwargs)

    monkeypatch.setattr(TrainingRun, "_step", poisoned)
    with pytest.raises(NonFiniteLossError, match="step 7 of"):
        train(config)
    saved = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    sampler = StepSampler(EpochOrder(20, 0), first_position=18, steps=1, batch_size=3)
    (keys,) = list(sampler)
    assert sorted(saved["sample_ids"]) == sorted(f"digits-train-{index}" for _, index in keys)
    assert (saved["stage"], saved["step"], saved["loss"]) == ("all", 7, "nan")
    assert not (tmp_path / "run" / "state.pt").exists()


def on_own_data(tmp_path: Path, broken: tuple[int, ...], **changes) -> Path:
    return configured(
        tmp_path,
        data=own_data(tmp_path, 12, broken),
        stages=[stage(steps=8)],
        encoder_warm_up=None,
        evaluation=None,
        **changes,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_are_skipped_counted_and_named(tmp_path, workers):
    train(on_own_data(tmp_path, (2, 7), workers=workers))
    named = json.loads((tmp_path / "run" / "broken_samples.json").read_text())
    assert [one["index"] for one in named] == [2, 7]
    assert [f"{index}.png" in one["reason"] for index, one in zip((2, 7), named, strict=True)]
    assert metrics(tmp_path / "run")[-1]["broken_samples"] == 2  # though met in two epochs


def test_more_broken_samples_than_allowed_stop_the_run(tmp_path):
    config = on_own_data(tmp_path, (2, 7), max_broken_samples=1)
    with pytest.raises(BrokenSamplesError, match=r"2 broken.*max_broken_samples of 1.*\.png"):
        train(config)
    assert len(json.loads((tmp_path / "run" / "broken_samples.json").read_text())) == 2


def test_a_checkpoint_shows_the_frames_that_training_showed(tmp_path, monkeypatch):
    """A run that was stopped, too."""
    data = {**own_data(tmp_path, 12, ()), "max_frames": 4, "fps": 2}
    stages = [stage(steps=3)]
    config = configured(
        tmp_path, data=data, stages=stages, save_every=1, encoder_warm_up=None, evaluation=None
    )
    train_until(monkeypatch, config, 2)
    train(config)
    saved = json.loads((tmp_path / "run" / "checkpoint" / "processor_config.json").read_text())
    assert (saved["max_frames"], saved["fps"]) == (4, 2.0)


def test_broken_samples_are_remembered_by_a_resumed_run(tmp_path, monkeypatch):
    config = on_own_data(tmp_path, (2, 7), save_every=1)
    train_until(monkeypatch, config, 5)
    assert len(load_state(tmp_path / "run" / "state.pt")["broken"]) == 2
    train(config)
    # At once, before the second epoch meets them again.
    assert metrics(tmp_path / "run")[5]["broken_samples"] == 2


# ---- data of stages


def test_stages_walk_through_data_of_their_own(tmp_path, monkeypatch):
    """A mixture first, then another set from its beginning, then the mixture where it stopped."""
    digits = {"name": "digits", "size": 20, "questions": 1}
    parts = [{**digits, "weight": 3}, {**digits, "split": "validation"}]
    other = {**digits, "split": "test"}
    stages = [
        stage(name="first", steps=2),
        stage(name="other", steps=2, data=other),
        stage(name="again", steps=2),
    ]
    mixture = {"name": "mixture", "parts": parts}
    changes = {"data": mixture, "encoder_warm_up": None, "evaluation": None, "save_every": 1}
    seen, original = [], TrainingRun._step

    def recording(training, model, optimizer, packed, stage):
        seen.append(sorted(name for batch in packed.bins for name in batch.sample_ids))
        return original(training, model, optimizer, packed, stage)

    monkeypatch.setattr(TrainingRun, "_step", recording)
    train(configured(tmp_path, "whole", stages=stages, **changes))
    names = [f"digits-{split}-{i}" for split in ("train", "validation") for i in range(20)]
    order = MixtureOrder([20, 20], [3, 1], seed=0)
    walked = [[names[order[3 * step + i][1]] for i in range(3)] for step in range(4)]
    assert seen[:2] + seen[4:] == [sorted(step) for step in walked]
    plain = EpochOrder(20, 0)
    expected = [[f"digits-test-{plain[3 * step + i][1]}" for i in range(3)] for step in range(2)]
    assert seen[2:4] == [sorted(step) for step in expected]

    config = configured(tmp_path, "stopped", stages=stages, **changes)
    train_until(monkeypatch, config, 3)
    train(config)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


# ---- packing by cost


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output)]


def test_a_step_in_several_passes_is_the_step_in_one(tmp_path):
    """Bins are bounds on memory, not on the mathematics: the loss is that of the whole step."""
    # One and three questions an image: bins of equal cost have unequal numbers of answers.
    digits = {"name": "digits", "size": 20}
    mixed = [{**digits, "questions": questions} for questions in (1, 3)]
    data = {"name": "mixture", "parts": mixed}
    common = {"encoder_warm_up": None, "evaluation": None, "data": data}
    whole = configured(tmp_path, "whole", stages=[stage(steps=6, batch_size=8)], **common)
    bounded = [stage(steps=6, batch_size=8, max_tokens=100, max_tiles=3)]
    parts = configured(tmp_path, "parts", stages=bounded, **common)
    for config in (whole, parts):
        train(config)
    one, many = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert {line["bins"] for line in one} == {1}
    assert min(line["bins"] for line in many) >= 3
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-5)
    for key in ("tokens", "tiles", "tokens_per_image"):
        assert [line[key] for line in many] == [line[key] for line in one]
    assert all(1 <= line["cost_balance"] < 2 for line in many)


def test_square_weights_count_long_answers_less(tmp_path, monkeypatch):
    """The first loss against the formula, from each answer token's own loss."""
    seen, nll_loss = [], F.nll_loss

    def recording(log_probabilities, targets, **options):
        seen.append(nll_loss(log_probabilities, targets, reduction="none").detach())
        return nll_loss(log_probabilities, targets, **options)

    def two_lengths(dataset, index):
        sample = original(dataset, index)
        long = Conversation((Turn("user", "odd"), Turn("assistant", "3 4 5 6 7 8 9")))
        return Sample(sample.id, sample.images, (sample.conversations[0], long))

    original = DigitsDataset.__getitem__
    monkeypatch.setattr(DigitsDataset, "__getitem__", two_lengths)
    monkeypatch.setattr(F, "nll_loss", recording)
    stages = [stage(steps=1, batch_size=3, loss="square")]
    train(configured(tmp_path, stages=stages, encoder_warm_up=None, evaluation=None))
    weight = torch.tensor([*[2**-0.5] * 2, *[8**-0.5] * 8] * 3)
    expected = (seen[0] * weight).sum() / weight.sum()
    assert losses_of(tmp_path / "run")[0] == pytest.approx(expected.item(), abs=1e-6)
    assert abs(expected.item() - seen[0].mean().item()) > 1e-4


def test_frozen_modules_are_in_evaluation_mode(tmp_path, monkeypatch):
    stages = [stage(steps=1, learning_rate={"projector": 0.01, "text": 0.01})]
    config = configured(tmp_path, stages=stages, encoder_warm_up=None, evaluation=None)
    training, modes, step = TrainingRun(load_config(config)), {}, torch.optim.AdamW.step

    def recording(optimizer, *args, **kwargs):
        inner = training.model.model
        for name in ("vision_model", "projector", "language_model"):
            modes[name] = {module.training for module in getattr(inner, name).modules()}
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    training.run()
    assert modes == {"vision_model": {False}, "projector": {True}, "language_model": {True}}


@pytest.mark.parametrize("precision", ["bf16"])
def test_reduced_precision_trains(finished, tmp_path, precision):
    train(configured(tmp_path, precision=precision))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    exact = [line["loss"] for line in metrics(finished)]
    assert losses == pytest.approx(exact, rel=0.05)
    assert losses != exact
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


# ---- processes


def signal_after(process: Command, output: Path, place: tuple[int, int], sign: int) -> str:
    """Send ``sign`` once ``place`` (stage, step) is logged and a state is there; returns stderr."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            line = (output / "metrics.jsonl").read_text().splitlines()[-1]
            reached = json.loads(line)
        except (OSError, IndexError, ValueError):
            reached = None
        if (
            reached
            and (reached["stage"], reached["step"]) >= place
            and (output / "state.pt").exists()
        ):
            break
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read()
    if sign == signal.SIGINT:
        os.killpg(process.pid, sign)  # Ctrl-C reaches the workers too
    else:
        process.send_signal(sign)
    _, errors = process.communicate(timeout=PATIENCE)
    return errors


LONGER = {
    "stages": [stage(steps=20, name="first"), stage(steps=80, name="second")],
    "save_every": 7,
    "evaluation": None,
}


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Path:
    """An uninterrupted run, long enough for others to be stopped in the middle of."""
    folder = tmp_path_factory.mktemp("longer")
    train(configured(folder, **LONGER))
    return folder / "run"


class Stopped(NamedTuple):
    config: Path
    output: Path
    returncode: int
    errors: str


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> dict[str, Stopped]:
    """Three runs of the same, stopped from outside, side by side."""

    def stop(name: str, workers: int, place: tuple[int, int], sign: int) -> Stopped:
        config = configured(tmp_path_factory.mktemp(name), workers=workers, **LONGER)
        process, output = start(config), config.parent / "run"
        errors = signal_after(process, output, place, sign)
        return Stopped(config, output, process.returncode, errors)

    cases = {
        "killed": (0, (0, 8), signal.SIGKILL),
        "killed with a worker": (1, (1, 11), signal.SIGKILL),
        "interrupted": (1, (1, 3), signal.SIGINT),
    }
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(stop, name.split()[0], *case) for name, case in cases.items()}
    return {name: future.result() for name, future in futures.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "killed with a worker"])
def test_a_killed_process_continues_bit_by_bit(longer, stopped, name):
    run = stopped[name]
    assert run.returncode == -signal.SIGKILL
    assert not (run.output / "checkpoint").exists()
    assert 0 < load_state(run.output / "state.pt")["step"] < 80

    train(run.config)

    assert metrics(run.output) == metrics(longer)
    assert_same_weights(weights(run.output), weights(longer))
    assert temporary_files(run.output) == []


@pytest.mark.slow
def test_an_interrupted_process_says_so_in_a_line_and_continues(longer, stopped):
    run = stopped["interrupted"]
    assert run.returncode == 2
    parts = [part.strip() for part in re.split(r"[\r\n]", run.errors)]
    said = [part for part in parts if part and not re.search(r"\d+%\||\| \d+/\d+ \[", part)]
    assert len(said) == 1, run.errors
    assert said[0].startswith("tokenflex: interrupted")
    assert "state.pt" in said[0]
    assert temporary_files(run.output) == []

    assert main(["train", str(run.config)]) == 0
    assert metrics(run.output) == metrics(longer)
