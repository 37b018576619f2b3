"""Runs that begin from a checkpoint, and stages that choose counts in other ways."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.training.runs import metrics, stage, tiny_values, write_config
from tokenflex.models.loading import load_checkpoint
from tokenflex.training.build import build_model, build_processor
from tokenflex.training.config import TrainConfig, load_config
from tokenflex.training.loop import TrainingRun

ALL_COUNTS = {"counts": [4, 9, 16], "weights": [1, 1, 1], "draw": "all"}

WITHOUT_POSITIONS = {"projector_position": None, "image_positions": "sequential"}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A checkpoint at 16 tokens, without positions."""
    folder = tmp_path_factory.mktemp("start")
    values = tiny_values(folder / "run", stages=[stage(counts=[16], weights=[1], steps=2)])
    values["model"] |= WITHOUT_POSITIONS
    TrainingRun(load_config(write_config(folder / "run.yaml", values))).run()
    return folder / "run" / "checkpoint"


def started(folder: Path, start: Path, **changes) -> TrainConfig:
    values = tiny_values(folder / "run", stages=[stage()])
    values.pop("encoder_warm_up")
    values["model"] |= {**WITHOUT_POSITIONS, "start": str(start)}
    return load_config(write_config(folder / "run.yaml", {**values, **changes}))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(name.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()


def built(config: TrainConfig):
    counts = {count for one in config.stages for count in one.counts}
    return build_model(config.model, build_processor(config.model), counts)


def test_a_run_begins_with_the_weights_of_its_start(start, tmp_path):
    """With any seed and any counts: all regimes of an ablation start alike."""
    saved = digest(load_checkpoint(start)[0].state_dict())
    for seed, one in enumerate([stage(counts=[4], weights=[1]), stage(**ALL_COUNTS)]):
        model = built(started(tmp_path / str(seed), start, seed=seed + 1, stages=[one]))
        assert digest(model.state_dict()) == saved


def test_a_started_model_knows_the_counts_that_now_come(start, tmp_path):
    model = built(started(tmp_path, start, stages=[stage(counts=[4, 9], weights=[1, 1])]))
    assert model.config.trained_num_image_tokens == [4, 9]
    with pytest.warns(UserWarning, match=r"asks for 16 vision tokens"):
        model.get_image_features(torch.zeros(1, 3, 32, 32), 16)


def test_training_goes_on_from_the_start(start, tmp_path):
    TrainingRun(started(tmp_path, start)).run()
    trained, _ = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert digest(trained.state_dict()) != digest(load_checkpoint(start)[0].state_dict())
    first = metrics(tmp_path / "run")[0]["loss"]
    fresh = tiny_values(tmp_path / "fresh", stages=[stage()])
    TrainingRun(load_config(write_config(tmp_path / "fresh.yaml", fresh))).run()
    assert first != metrics(tmp_path / "fresh")[0]["loss"]


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vision", "hidden_size", 32, r"vision_config\.hidden_size = 16.*states 32"),
        ("text", "num_hidden_layers", 2, r"text_config\.num_hidden_layers = 1.*states 2"),
        ("text", "rms_norm_eps", 0.1, r"text_config\.rms_norm_eps"),
        (None, "projector_hidden_width", 48, r"projector_hidden_width = 24.*states 48"),
        (None, "pooling", "resize", r"pooling = 'adaptive'.*states 'resize'"),
    ],
)
def test_a_start_of_another_architecture_is_refused(start, tmp_path, part, key, value, message):
    values = tiny_values(tmp_path / "run")
    values.pop("encoder_warm_up")
    values["model"]["start"] = str(start)
    target = values["model"] if part is None else values["model"][part]["config"]
    target[key] = value
    config = load_config(write_config(tmp_path / "run.yaml", values))
    with pytest.raises(ValueError, match=message):
        TrainingRun(config)


def test_a_start_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        TrainingRun(started(tmp_path, tmp_path / "nowhere"))


def test_a_start_needs_no_warm_up(start, tmp_path):
    warm_up = {"steps": 2, "batch_size": 2, "learning_rate": 0.003}
    with pytest.raises(ValueError, match=r"encoder_warm_up must not be given with model\.start"):
        started(tmp_path, start, encoder_warm_up=warm_up)


def test_a_run_from_another_start_is_another_run(start, tmp_path):
    first = started(tmp_path, start, stages=[stage(steps=6)])
    training = TrainingRun(first)
    training.interruption.requested = True
    with pytest.raises(KeyboardInterrupt):
        training.run()
    model = first.model.model_copy(update={"start": Path(f"{start}/../checkpoint")})
    with pytest.raises(ValueError, match="unfinished run of another configuration"):
        TrainingRun(first.model_copy(update={"model": model}))


# ---- one count a step, or all of them


@pytest.mark.parametrize("how", [{"draw": "step"}, ALL_COUNTS])
def test_a_stopped_run_gives_the_same_numbers(how, start, tmp_path):
    """Two stages on the same data: the second goes on where the first stopped, and is stopped."""
    stages = [stage(name="first", steps=2, **how), stage(name="second", steps=6, **how)]
    whole = started(tmp_path / "whole", start, stages=stages)
    TrainingRun(whole).run()
    halves = started(tmp_path / "halves", start, stages=stages, save_every=1)
    training = TrainingRun(halves)
    take = training._step
    taken = 0

    def stop_at_the_fifth(*arguments):
        nonlocal taken
        taken += 1
        training.interruption.requested = taken == 5
        return take(*arguments)

    training._step = stop_at_the_fifth
    with pytest.raises(KeyboardInterrupt):
        training.run()
    TrainingRun(halves).run()
    lines = metrics(tmp_path / "whole" / "run")
    assert len(lines) == 8
    assert metrics(tmp_path / "halves" / "run") == lines


def test_every_image_at_all_counts_reads_a_third_of_the_images(start, tmp_path):
    """The budget is in images shown, so that regimes can be compared."""
    config = started(tmp_path, start, stages=[stage(steps=4, batch_size=6, **ALL_COUNTS)])
    training = TrainingRun(config)
    read: set[str] = set()
    take = training._step

    def note(model, optimizer, packed, of_stage):
        read.update(name for batch in packed.bins for name in batch.sample_ids)
        return take(model, optimizer, packed, of_stage)

    training._step = note
    training.run()
    assert len(read) == 4 * 2
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["tokens_per_image"] == pytest.approx((4 + 9 + 16) / 3)
    assert [line["tiles"] for line in metrics(tmp_path / "run")] == [6] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, r"batch_size must be a multiple of the 3 counts with draw: all, got 4"),
        ({"weights": [1, 1, 2]}, r"weights must be equal with draw: all"),
        ({"draw": "batch"}, r"draw: .*'sample', 'step' or 'all'"),
    ],
)
def test_contradictions_are_named(changes, message, tmp_path):
    values = tiny_values(tmp_path, stages=[stage(**{**ALL_COUNTS, **changes})])
    with pytest.raises(ValueError, match=message):
        load_config(write_config(tmp_path / "run.yaml", values))


def test_positions_may_be_switched_on_from_a_start_without(start, tmp_path):
    """Their term begins at zero: the projector gives what it gave."""
    values = {"projector_position": "normalized", "image_positions": "shared"}
    config = started(tmp_path, start)
    config = config.model_copy(update={"model": config.model.model_copy(update=values)})
    model, before = built(config), load_checkpoint(start)[0]
    assert (model.config.projector_position, model.config.image_positions) == tuple(values.values())
    assert not model.model.projector.position.weight.any()
    pixels = torch.randn(2, 3, 32, 32)
    for counts in ([4, 16], [(2, 3), 9]):
        expected = before.get_image_features(pixels, counts).pooler_output
        actual = model.get_image_features(pixels, counts).pooler_output
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
    TrainingRun(config).run()
    trained = load_checkpoint(config.output / "checkpoint")[0]
    assert trained.model.projector.position.weight.any()
    with pytest.raises(ValueError, match="projector_position = 'normalized', but the"):
        built(started(tmp_path, config.output / "checkpoint"))
