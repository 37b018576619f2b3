"""The best model of a run: which evaluation it is of, and that a stopped run knows it still."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.training.runs import evaluations, stage, tiny_values, write_config
from tokenflex.checkpoints import load_model
from tokenflex.cli import main
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.training.best import compared, is_better, read_best
from tokenflex.training.config import EvaluationConfig, TrainConfig
from tokenflex.training.loop import TrainingRun
from tokenflex.training.plan import format_plan, plan_run

DATA = {"name": "digits", "split": "test", "size": 8, "questions": 2}
EVALUATION = {"data": DATA, "counts": [4, 9], "batch_size": 4, "every": 2, "samples": 5}
SAMPLE = {"text_tokens": 40, "answer_tokens": 20, "tiles": 2}
ACCURACIES = {2: 0.2, 4: 0.75, 7: 0.5}  # by global step; the best one is in the first stage


def config_of(folder, **changes: Any) -> TrainConfig:
    stages = [stage(name="first", steps=5), stage(name="second", steps=3)]
    evaluation = {**EVALUATION, "keep_best": "accuracy"}
    values = {"encoder_warm_up": None, "stages": stages, "evaluation": evaluation}
    return TrainConfig.model_validate(tiny_values(folder, **{**values, **changes}))


def with_accuracies(monkeypatch, training: TrainingRun) -> dict[int, dict[str, torch.Tensor]]:
    """Let evaluations find :data:`ACCURACIES`; return the weights that each of them saw."""
    seen = {}

    def run(model: Any, samples: int) -> dict[str, Any]:
        step = training._position()["global_step"]
        seen[step] = {name: weight.clone() for name, weight in model.state_dict().items()}
        value = ACCURACIES.get(step, 0.0)
        by_count = {"4": value - 0.125, "9": value + 0.125}
        return {"accuracy": by_count, "accuracy_by_kind": {}, "questions": {}}

    monkeypatch.setattr(training.evaluator, "run", run)
    return seen


def test_the_model_of_the_best_evaluation_is_kept_and_named(tmp_path, monkeypatch):
    training = TrainingRun(config_of(tmp_path / "run"))
    seen = with_accuracies(monkeypatch, training)
    report = training.run()
    best = {"stage": 0, "stage_name": "first", "step": 4, "global_step": 4}
    best |= {"metric": "accuracy", "value": 0.75}
    assert report["best"] == best
    assert json.loads((tmp_path / "run" / "report.json").read_text())["best"] == best
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["best"] == best
    kept = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert [name for name in kept if not torch.equal(kept[name], seen[4][name])] == []
    last = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert any(not torch.equal(kept[name], last[name]) for name in last)
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert "after step 4 of the run (step 4 of stage 'first')" in card
    model, processor = load_model(tmp_path / "run" / "best")
    assert processor.num_image_tokens == model.config.num_image_tokens
    noted = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert {*noted["best"]} == {path.name for path in (tmp_path / "run" / "best").iterdir()}


# Death comes after the evaluation of a step: in the file, but before the next state.
@pytest.mark.parametrize(("save_every", "death"), [(3, 4), (4, 4), (3, 7)])
def test_a_run_that_died_has_the_same_best(tmp_path, monkeypatch, save_every, death):
    config = config_of(tmp_path / "run", save_every=save_every)
    training = TrainingRun(config)
    with_accuracies(monkeypatch, training)
    track = training._track

    def dying(kind, line):
        if kind == "evaluation" and line["global_step"] == death:
            raise SystemExit
        track(kind, line)

    monkeypatch.setattr(training, "_track", dying)
    with pytest.raises(SystemExit):
        training.run()
    before = load_file(tmp_path / "run" / "best" / "model.safetensors")
    AcceleratorState._reset_state(reset_partial_state=True)
    training = TrainingRun(config)
    with_accuracies(monkeypatch, training)
    best = training.run()["best"]
    assert (best["global_step"], best["value"]) == (4, 0.75)
    after = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert [name for name in after if not torch.equal(after[name], before[name])] == []


def test_a_disk_that_is_full_leaves_the_best_before(tmp_path, monkeypatch):
    training = TrainingRun(config_of(tmp_path / "run"))
    seen = with_accuracies(monkeypatch, training)
    save, calls = type(training.processor).save_pretrained, [0]

    def full(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(type(training.processor), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        training.run()
    kept = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert all(torch.equal(kept[name], seen[2][name]) for name in kept)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".best")]


def expected_loss(model: Any, processor: Any, count: int) -> float:
    """The mean over all answer tokens, each question alone through the padded path."""
    dataset, losses = DigitsDataset("test", size=8, questions=2), []
    for index in range(EVALUATION["samples"]):
        sample = dataset[index]
        for conversation in sample.conversations:
            question, answer = (turn.text for turn in conversation.turns)
            images = list(sample.images)
            inputs = processor(images=images, text=f"<image> {question}", num_image_tokens=count)
            ids = processor.tokenizer(f"{answer} <eos>", return_tensors="pt")["input_ids"]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
            inputs.pop("attention_mask", None)
            with torch.inference_mode():
                logits = model(**inputs).logits[0, -ids.shape[1] - 1 : -1]
            losses.append(F.cross_entropy(logits, ids[0], reduction="none"))
    return float(torch.cat(losses).mean())


def test_the_loss_is_that_of_an_answer_token(tmp_path):
    evaluation = {**EVALUATION, "keep_best": "loss", "every": None, "at_stage_end": True}
    stages = [stage(steps=1, batch_size=2, loss="square")]
    TrainingRun(config_of(tmp_path / "run", evaluation=evaluation, stages=stages)).run()
    (line,) = evaluations(tmp_path / "run")
    model, processor = load_model(tmp_path / "run" / "best")
    for count in (4, 9):
        expected = expected_loss(model.eval(), processor, count)
        assert line["loss"][str(count)] == pytest.approx(expected, rel=1e-4)
    saved = json.loads((tmp_path / "run" / "best" / "best.json").read_text())["best"]
    assert saved["value"] == pytest.approx(sum(line["loss"].values()) / 2)
    assert saved["metric"] == "loss"


# ---- comparing


def settings(**changes: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({**EVALUATION, "keep_best": "accuracy", **changes})


@pytest.mark.parametrize(
    ("metric", "value", "before", "better"),
    [
        ("accuracy", 0.5, None, True),
        ("accuracy", 0.5, 0.4, True),
        ("accuracy", 0.4, 0.4, False),  # the first of equal ones stays
        ("loss", 0.5, 0.4, False),
        ("loss", 0.3, 0.4, True),
        ("loss", float("nan"), None, False),
        ("loss", float("nan"), 0.4, False),
    ],
)
def test_which_one_is_better(metric, value, before, better):
    best = None if before is None else {"value": before}
    report = {metric: {"4": value, "9": value}}
    assert is_better(settings(keep_best=metric), report, best) is better


@pytest.mark.parametrize(
    ("place", "changes", "content", "is_known"),
    [
        ((0, 4), {}, {}, True),
        ((1, 0), {}, {}, True),
        ((0, 3), {}, {}, False),  # the run comes to that step once more
        ((1, 0), {"samples": 6}, {}, False),
        ((1, 0), {"keep_best": "loss"}, {}, False),
        ((1, 0), {"every": 3, "batch_size": 2}, {}, True),
        ((1, 0), {}, {"best": {"stage": 0}}, False),
        ((1, 0), {}, {"best": None}, False),
    ],
)
def test_what_a_run_that_continues_knows_of_its_best(tmp_path, place, changes, content, is_known):
    best = {"stage": 0, "step": 4, "metric": "accuracy", "value": 0.5}
    saved = {"best": best, "evaluation": compared(settings()), **content}
    (tmp_path / "best.json").write_text(json.dumps(saved))
    assert read_best(tmp_path, settings(**changes), place) == (best if is_known else None)
    assert read_best(tmp_path / "none", settings(), place) is None


def test_what_it_costs_is_in_the_plan(tmp_path):
    evaluation = {**EVALUATION, "keep_best": "loss", "at_stage_end": True}
    plan = format_plan(plan_run(config_of(tmp_path, evaluation=evaluation, sample=SAMPLE)))
    assert "evaluations during training: 5, each 4 passes over 5 samples" in plan  # 2, 4, 5; 2, 3
    assert "keep_best by loss: a copy of the model, 0.0 GiB on the disk, written at most 5" in plan
    without = {**EVALUATION, "every": None}
    plan = format_plan(plan_run(config_of(tmp_path, evaluation=without, sample=SAMPLE)))
    assert "evaluations during" not in plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {**EVALUATION, "every": None, "keep_best": "loss"}}, "give every or at_st"),
        ({"evaluation": {**EVALUATION, "keep_best": "bleu"}}, "evaluation.keep_best"),
        (
            {"evaluation": {**EVALUATION, "keep_best": "loss"}, "sharding": "full"},
            "keep_best of evaluation must be accuracy with sharding: full",
        ),
    ],
)
def test_what_does_not_work_is_one_line(tmp_path, capsys, changes, message):
    values = tiny_values(tmp_path / "run", encoder_warm_up=None, **changes)
    assert main(["train", str(write_config(tmp_path / "run.yaml", values))]) == 2
    assert message in capsys.readouterr().err
