"""Evaluation in the middle of training: at the right steps, and training does not notice."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext

import pytest
import torch

from tests.training.runs import evaluations, metrics, stage, tiny_values
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.evaluation import evaluate
from tokenflex.models.loading import load_checkpoint
from tokenflex.training import evaluations as training_evaluations
from tokenflex.training import loop
from tokenflex.training.config import TrainConfig
from tokenflex.training.evaluations import Share, merged
from tokenflex.training.loop import TrainingRun
from tokenflex.training.states import load_state

EVALUATION = {
    "data": {"name": "digits", "split": "test", "size": 12, "questions": 2},
    "counts": [4, 9],
    "batch_size": 4,
}


def config_of(folder, **changes) -> TrainConfig:
    """With dropout, so that a disturbed generator or mode changes the losses."""
    values = tiny_values(folder, encoder_warm_up=None, **changes)
    values["model"]["vision"]["config"]["attention_dropout"] = 0.3
    values["stages"] = [
        stage(name="some", steps=4, learning_rate={"vision": 0.002, "projector": 0.002}),
        stage(name="all", steps=3),
    ]
    return TrainConfig.model_validate(values)


DURING = {**EVALUATION, "every": 2, "at_stage_end": True, "samples": 5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    TrainingRun(config_of(folder, evaluation=DURING)).run()
    return folder


def test_it_comes_every_so_many_steps_and_at_the_end_of_stages(whole):
    lines = evaluations(whole)
    assert [(line["stage"], line["step"]) for line in lines] == [(0, 2), (0, 4), (1, 2), (1, 3)]
    assert [line["global_step"] for line in lines] == [2, 4, 6, 7]
    for line in lines:
        assert list(line["accuracy"]) == ["4", "9"]
        assert sum(line["questions"].values()) == 10  # of 5 samples
    report = json.loads((whole / "report.json").read_text())
    assert sum(report["questions"].values()) == 24  # of all 12


def test_without_the_end_of_stages(tmp_path):
    TrainingRun(config_of(tmp_path / "run", evaluation={**DURING, "at_stage_end": False})).run()
    places = [(line["stage"], line["step"]) for line in evaluations(tmp_path / "run")]
    assert places == [(0, 2), (0, 4), (1, 2)]


@pytest.mark.parametrize("evaluation", [None, EVALUATION])
def test_training_does_not_notice(whole, tmp_path, evaluation):
    TrainingRun(config_of(tmp_path / "run", evaluation=evaluation)).run()
    assert metrics(tmp_path / "run") == metrics(whole)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


@pytest.mark.parametrize("is_put_back", [True, False])
def test_random_numbers_of_evaluation_are_put_back(whole, tmp_path, monkeypatch, is_put_back):
    """Dropout draws from the same generator: one that is not put back changes the losses."""

    def drawing(*args, **kwargs):
        torch.rand(1)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(training_evaluations, "evaluate", drawing)
    if not is_put_back:
        monkeypatch.setattr("torch.random.fork_rng", lambda devices: nullcontext())
    TrainingRun(config_of(tmp_path / "run", evaluation=DURING)).run()
    assert (metrics(tmp_path / "run") == metrics(whole)) is is_put_back


def test_seconds_of_evaluation_are_not_training(tmp_path, monkeypatch):
    """By a clock on which a step takes 2 seconds and an evaluation 1000."""
    training, now = TrainingRun(config_of(tmp_path / "run", evaluation=DURING)), [0.0]
    step, together, meter_of = training._step, training.evaluator.run, loop.build_meter

    def taking(seconds, work):
        def timed(*args):
            now[0] += seconds
            return work(*args)

        return timed

    def meter(*args):
        made = meter_of(*args)
        made._clock = lambda: now[0]
        return made

    monkeypatch.setattr(training, "_step", taking(2, step))
    monkeypatch.setattr(training.evaluator, "run", taking(1000, together))
    monkeypatch.setattr(loop, "build_meter", meter)
    report = training.run()
    assert now[0] == 7 * 2 + 5 * 1000
    assert [one["seconds"] for one in report["stages"]] == [8, 6]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["tokens_per_second"] == line["tokens"] / 2


def stopping(monkeypatch, batch: int) -> None:
    """Ctrl-C while an evaluation's forward pass runs, the ``batch``-th of all."""
    left, original = [batch], training_evaluations.interrupted_anywhere

    def check(accelerator, interruption) -> bool:
        left[0] -= 1
        if left[0] == 0:
            interruption._note(signal.SIGINT, None)
        return original(accelerator, interruption)

    monkeypatch.setattr(training_evaluations, "interrupted_anywhere", check)


@pytest.mark.parametrize("batch", [1, 6, 12])
def test_stopped_in_an_evaluation_it_is_done_once_when_the_run_continues(
    whole, tmp_path, monkeypatch, batch
):
    """4 forward passes each: in the first evaluation, in the second, in the third."""
    config = config_of(tmp_path / "run", evaluation=DURING, save_every=100)
    training = TrainingRun(config)
    stopping(monkeypatch, batch)
    with pytest.raises(KeyboardInterrupt):
        training.run()
    done = evaluations(tmp_path / "run") if batch > 4 else []
    assert len(done) == (batch - 1) // 4
    saved, last = load_state(tmp_path / "run" / "state.pt"), metrics(tmp_path / "run")[-1]
    assert (saved["stage"], saved["step"]) == (last["stage"], last["step"])
    TrainingRun(config).run()
    assert evaluations(tmp_path / "run") == evaluations(whole)
    assert len(metrics(tmp_path / "run")) == 7


@pytest.mark.parametrize(
    ("save_every", "place", "asked_again"),
    [(2, (0, 2), [5, 5, 5, 12]), (100, (1, 2), [5, 5, 12])],
)
def test_killed_after_an_evaluation_it_stands_in_the_file_once(
    whole, tmp_path, monkeypatch, save_every, place, asked_again
):
    """With a state of that very step it is not done again; with an older one it is."""
    config = config_of(tmp_path / "run", evaluation=DURING, save_every=save_every)

    class Killed(BaseException):
        pass

    training, asked = TrainingRun(config), []
    track = training._track

    def dying(kind, line):
        if kind == "evaluation" and (line["stage"], line["step"]) == place:
            raise Killed
        track(kind, line)

    monkeypatch.setattr(training, "_track", dying)
    with pytest.raises(Killed):
        training.run()
    again = TrainingRun(config)
    together = again.evaluator.run
    monkeypatch.setattr(
        again.evaluator, "run", lambda model, n: asked.append(n) or together(model, n)
    )
    again.run()
    assert evaluations(tmp_path / "run") == evaluations(whole)
    assert asked == asked_again


# ---- shares of processes


@pytest.mark.parametrize(("size", "ranks"), [(7, 2), (7, 3), (2, 4), (12, 1)])
def test_shares_cover_each_sample_once(size, ranks):
    dataset = DigitsDataset("test", size=12)
    shares = [Share(dataset, size, rank=rank, num_ranks=ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {-(size // -ranks)}
    counted = [
        sample.id
        for share in shares
        for sample in (share[index] for index in range(len(share)))
        if sample.conversations[0].kind != "stand-in"
    ]
    assert sorted(counted) == sorted(dataset[index].id for index in range(size))


@pytest.mark.parametrize("ranks", [2, 5])
def test_shares_together_give_the_report_of_one_process(whole, ranks):
    model, processor = load_checkpoint(whole / "checkpoint")
    dataset = DigitsDataset("test", size=7, questions=3)
    alone = evaluate(model, processor, dataset, [4, 9])
    reports = [
        evaluate(model, processor, Share(dataset, 7, rank=rank, num_ranks=ranks), [4, 9])
        for rank in range(ranks)
    ]
    together = merged(reports)
    assert together["questions"] == alone["questions"]
    assert together["image_backend"] == alone["image_backend"] is not None
    assert together["accuracy"] == pytest.approx(alone["accuracy"])
    for kind, row in alone["accuracy_by_kind"].items():
        assert together["accuracy_by_kind"][kind] == pytest.approx(row)


def test_a_kind_that_only_one_process_has():
    one = {"accuracy": {"4": 1.0}, "accuracy_by_kind": {"a": {"4": 1.0}}, "questions": {"a": 1}}
    two = {
        "accuracy": {"4": 0.25},
        "accuracy_by_kind": {"a": {"4": 0.5}, "b": {"4": 0.0}, "stand-in": {"4": 1.0}},
        "questions": {"a": 2, "b": 4, "stand-in": 1},
    }
    together = merged([one, two])
    assert together["questions"] == {"a": 3, "b": 4}
    assert together["accuracy_by_kind"] == {"a": {"4": pytest.approx(2 / 3)}, "b": {"4": 0.0}}
    assert together["accuracy"] == {"4": pytest.approx(1 / 3)}


def test_a_share_reads_what_it_is_asked_for():
    """Stand-ins keep the picture and the questions: the pass is as large as the others'."""
    turns = (Turn("user", "odd"), Turn("assistant", "3"))
    samples = [Sample(f"s{i}", (), (Conversation(turns, "odd"),)) for i in range(3)]
    share = Share(samples, 3, rank=1, num_ranks=2)
    assert [share[0].id, share[1].id] == ["s1", "s2"]
    assert share[1].conversations[0].turns == turns
