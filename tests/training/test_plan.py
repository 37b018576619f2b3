"""The plan of a run: what it trains and costs, against a run that is really made."""

from __future__ import annotations

import json

import pytest

from tests.training.runs import mean_sample, metrics, own_data, stage, tiny_values, write_config
from tests.training.test_build import config_of
from tests.training.test_engine import kept_bytes
from tokenflex.cli import main
from tokenflex.training.build import build_model, build_processor
from tokenflex.training.config import TrainConfig, load_config
from tokenflex.training.loop import TrainingRun
from tokenflex.training.plan import format_plan, plan_run
from tokenflex.training.stages import build_optimizer

SAMPLE = {"text_tokens": 40, "answer_tokens": 20, "tiles": 2}


def tiny(tmp_path, **changes) -> TrainConfig:
    return TrainConfig.model_validate(tiny_values(tmp_path / "run", **changes))


def test_expected_tokens_and_tiles_are_near_those_of_the_run(tmp_path):
    stages = [stage(steps=60, batch_size=8)]
    config = tiny(tmp_path, stages=stages, evaluation=None, encoder_warm_up=None)
    (plan,) = plan_run(config)
    training = TrainingRun(config)
    training.run()
    lines = metrics(tmp_path / "run")
    assert plan.steps == len(lines)
    assert plan.tokens == pytest.approx(sum(line["tokens"] for line in lines), rel=0.05)
    assert sum(line["tiles"] for line in lines) == plan.samples


def test_a_budget_in_tokens_is_planned_in_expected_steps(tmp_path):
    stages = [stage(steps=60, batch_size=8), stage(tokens=6000, batch_size=8)]
    del stages[1]["steps"]
    config = tiny(tmp_path, stages=stages, evaluation=None, encoder_warm_up=None)
    in_steps, in_tokens = plan_run(config)
    TrainingRun(config).run()
    taken = [line["step"] for line in metrics(tmp_path / "run") if line["stage"] == 1][-1]
    assert in_tokens.steps == pytest.approx(taken, rel=0.1)
    assert in_tokens.tokens == pytest.approx(6000, rel=0.05)
    assert in_tokens.flops / in_tokens.steps == pytest.approx(in_steps.flops / 60)
    columns = [line.split()[3] for line in format_plan([in_steps, in_tokens]).splitlines()[1:3]]
    assert columns == ["60", f"~{in_tokens.steps}"]


def test_grids_are_planned_by_their_tokens(tmp_path):
    squares, grids = (
        plan_run(tiny(tmp_path, stages=[stage(counts=counts, weights=[1, 2])]))[0]
        for counts in ([4, 16], [[1, 4], [8, 2]])
    )
    assert grids == squares


@pytest.mark.parametrize("learning", [{"projector": 1e-3}, {"vision": 1e-3, "text": 1e-3}])
def test_trained_parameters_are_those_that_learn(tmp_path, learning):
    config = tiny(tmp_path, stages=[stage(learning_rate=learning)])
    (plan,) = plan_run(config)
    training = TrainingRun(config)
    groups = build_optimizer(training.setup.kind, config.stages[0]).param_groups
    learned = sum(one.numel() for group in groups for one in group["params"])
    assert sum(plan.trained_parameters.values()) == learned
    weights = sum(one.numel() for one in training.model.parameters())
    assert plan.state_bytes == 4 * weights + 12 * learned


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_estimated_within_a_factor_of_two(tmp_path, recomputed):
    values = tiny_values(tmp_path / "run", gradient_checkpointing=recomputed)
    values["stages"] = [stage(batch_size=16)]
    for part in ("vision", "text"):
        values["model"][part]["config"]["num_hidden_layers"] = 3
    config = TrainConfig.model_validate(values)
    (plan,) = plan_run(config)
    assert 0.5 < plan.activation_bytes / kept_bytes(TrainingRun(config)) < 2


def test_of_a_sharded_run_a_process_holds_its_share_and_what_is_gathered(tmp_path):
    sharded = tiny(tmp_path, sharding="full", stages=[stage(batch_size=4)])
    (alone,), (shared,) = plan_run(sharded, 1), plan_run(sharded, 4)
    (replicated,) = plan_run(tiny(tmp_path, stages=[stage(batch_size=4)]), 4)
    assert alone.state_bytes == replicated.state_bytes
    model = TrainingRun(sharded).model
    inner, gathered = model.model, sum(one.numel() for one in model.parameters())
    sizes = []
    for unit in (*inner.vision_model.encoder.layers, *inner.language_model.layers, inner.projector):
        sizes.append(sum(one.numel() for one in unit.parameters()))
    gathered += 2 * max(sizes) - sum(sizes)
    assert shared.state_bytes == pytest.approx(alone.state_bytes / 4 + 4 * gathered, abs=4)


def test_arithmetic_follows_steps_counts_and_frozen_modules(tmp_path):
    def flops(**changes) -> float:
        return plan_run(tiny(tmp_path, stages=[stage(**changes)], sample=SAMPLE))[0].flops

    assert flops(steps=8) == pytest.approx(2 * flops(steps=4))
    assert flops(counts=[4], weights=[1]) < flops() < flops(counts=[16], weights=[1])
    assert flops(learning_rate={"projector": 1e-3}) < flops()


def test_what_is_saved_is_against_the_largest_count(tmp_path):
    stages = [stage(), stage(counts=[16], weights=[1])]
    mixed, fixed = plan_run(tiny(tmp_path, stages=stages, sample=SAMPLE))
    assert fixed.flops_saved == 0
    assert mixed.flops_saved == pytest.approx(1 - mixed.flops / fixed.flops)
    assert mixed.flops_saved > 0.03


def test_the_mean_sample_is_measured_on_the_data(tmp_path):
    config = tiny(tmp_path)
    sample = mean_sample(config, share_prefix=False)
    assert (sample.tiles, sample.shown_tiles) == (1, 2)  # one picture under two questions
    assert sample.answer_tokens == 4  # a word and an end, twice
    assert 2 * (1 + 2) <= sample.text_tokens <= 2 * (2 + 2)


def test_the_mean_sample_counts_what_is_shared_once(tmp_path):
    config = tiny(tmp_path)
    apart = mean_sample(config, share_prefix=False)
    together = mean_sample(config, share_prefix=True)
    assert (together.tiles, together.shown_tiles) == (1, 1)
    assert together.answer_tokens == apart.answer_tokens
    # Questions of one kind have their first word in common, and shared rows are counted once.
    assert apart.text_tokens - 0.5 < together.text_tokens < apart.text_tokens


def test_the_plan_needs_neither_weights_nor_data(tmp_path, capsys):
    values = tiny_values(tmp_path / "run", sample=SAMPLE, encoder_warm_up=None, evaluation=None)
    values["model"].pop("processor")
    for part in ("vision", "text"):
        values["model"][part]["path"] = str(tmp_path / "not here")
    values["data"] = {"name": "messages", "path": str(tmp_path / "none.jsonl")}
    config = write_config(tmp_path / "run.yaml", values)
    assert main(["train", str(config), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["projector", "all"]
    assert not (tmp_path / "run").exists()


def test_a_plan_without_data_or_a_mean_sample_is_one_line(tmp_path, capsys):
    values = tiny_values(tmp_path / "run")
    values["data"] = {"name": "messages", "path": str(tmp_path / "none.jsonl")}
    config = write_config(tmp_path / "run.yaml", values)
    assert main(["train", str(config), "--dry-run"]) == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err


def test_the_plan_says_how_often_it_passes_over_the_data(tmp_path, capsys):
    half = own_data(tmp_path, 6, broken=())
    values = tiny_values(tmp_path / "run", evaluation=None, encoder_warm_up=None)
    parts = [{**half, "weight": 3}, {"name": "digits", "split": "train", "size": 20}]
    values["stages"] = [
        stage(steps=40, batch_size=3),  # of 20 canvases
        stage(steps=4, batch_size=6, draw="all", weights=[1, 1, 1]),  # each at three counts
        stage(steps=8, batch_size=4, data={"name": "mixture", "parts": parts}),
    ]
    config = write_config(tmp_path / "run.yaml", values)
    assert main(["train", str(config), "--dry-run"]) == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()[:4]]
    assert header[4] == "epochs"
    assert [row[5] for row in rows] == ["6", "0.4", "4/0.4"]  # after the word for "trained"


def test_epochs_of_a_budget_in_tokens_are_expected_and_those_of_no_data_unknown(tmp_path):
    stages = [stage(tokens=6000, batch_size=8)]
    del stages[0]["steps"]
    (plan,) = plan_run(tiny(tmp_path, stages=stages, evaluation=None))
    assert plan.passes == (plan.steps * 8 / 20,)
    assert f"~{plan.passes[0]:.3g}" in format_plan([plan])
    (plan,) = plan_run(tiny(tmp_path, stages=stages, evaluation=None, sample=SAMPLE))
    assert plan.passes == ()
    assert format_plan([plan]).splitlines()[1].split()[5] == "?"


def test_evaluated_counts_beyond_the_encoders_grid_are_warned_of(tmp_path):
    evaluation = {"data": {"name": "digits"}, "counts": [16, 100]}
    stages = [stage(counts=[16], weights=[1]), stage(counts=[4], weights=[1])]
    first, last = plan_run(tiny(tmp_path, stages=stages, evaluation=evaluation))
    assert first.warnings == ()
    (warning,) = last.warnings
    assert "the evaluation asks for 10 x 10 = 100 tokens, but the encoder has 8 x 8" in warning


def test_counts_beyond_the_encoders_grid_are_warned_of(tmp_path):
    fits = [[8, 8], [1, 8], 16]
    (plan,) = plan_run(tiny(tmp_path, stages=[stage(counts=fits)]))
    assert plan.warnings == ()
    beyond = [[1, 9], 81, 4]
    (plan,) = plan_run(tiny(tmp_path, stages=[stage(counts=beyond)]))
    wide, large = plan.warnings
    assert "draws 1 x 9 = 9 tokens, but the encoder has 8 x 8 = 64 patches" in wide
    assert "9 x 9 = 81 tokens" in large
    assert wide in format_plan([plan])


def test_pretrained_parts_are_planned_from_their_configurations_alone(parts, tmp_path):
    model = config_of(parts).model_dump(exclude_none=True)
    values = {**tiny_values(tmp_path / "run", sample=SAMPLE), "model": model}
    values.pop("encoder_warm_up")
    for weights in parts.rglob("*.safetensors"):
        assert weights.stat().st_size > 0
    (first, _) = plan_run(TrainConfig.model_validate(values))
    built = build_model(config_of(parts), build_processor(config_of(parts)))
    projector = sum(one.numel() for one in built.model.projector.parameters())
    assert first.trained_parameters == {"projector": projector}


def test_a_checkpoint_of_another_architecture_than_stated_is_refused(parts):
    config = config_of(parts).model_dump(exclude_none=True)
    config["text"]["config"] = {"model_type": "qwen2", "hidden_size": 64}
    stated = type(config_of(parts)).model_validate(config)
    with pytest.raises(ValueError, match=r"hidden_size = 64.*has 32"):
        build_model(stated, build_processor(stated))


@pytest.mark.parametrize(
    ("name", "tile_costs"),
    [("7b", [26, 77, 51]), ("3b", [60, 180, 120]), ("0.5b", [466, 1397, 931])],
)
def test_the_papers_stages_have_a_plan(name, tile_costs):
    """A tile's cost in rows of each language model, from public configurations by hand."""
    plans = plan_run(load_config(f"configs/siglip400m_qwen2.5_{name}.yaml"))
    assert [plan.tile_cost for plan in plans] == pytest.approx(tile_costs, rel=0.02)
    modules = [["projector"], ["vision", "projector"], ["vision", "projector", "text"]]
    assert [list(plan.trained_parameters) for plan in plans] == modules
    assert all(plan.vision_tokens / plan.samples / 2.2 == pytest.approx(184) for plan in plans)


def test_the_demo_has_a_plan():
    plans = plan_run(load_config("configs/demo.yaml"))
    assert [plan.steps for plan in plans] == [600, 1500]
    assert json.dumps([plan.trained_parameters for plan in plans])


def test_a_sample_that_cannot_be_read_is_left_out_of_the_mean(tmp_path):
    data = own_data(tmp_path, 12, broken=())
    config = tiny(tmp_path, data=data, encoder_warm_up=None, evaluation=None)
    whole = mean_sample(config, share_prefix=True)
    (tmp_path / "3.png").unlink()
    assert mean_sample(config, share_prefix=True) == whole
    for index in range(12):
        (tmp_path / f"{index}.png").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"none of the first 12 samples can be read.*\.png"):
        mean_sample(config, share_prefix=True)


def test_more_processes_than_samples_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one sample a process, 100, got 3"):
        plan_run(tiny(tmp_path), 100)
