"""LoRA adapters in the training loop: what learns, what is saved, and runs that were stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import load_file

from experiments.distillation.stock import new_model_and_processor
from tests.training.processes import end_of, start_two
from tests.training.runs import (
    evaluations,
    metrics,
    run_until_killed,
    stage,
    tiny_values,
    write_config,
)
from tokenflex import replace_projector
from tokenflex.checkpoints import load_model
from tokenflex.cli import main
from tokenflex.training.config import TrainConfig, load_config
from tokenflex.training.kinds import load_kind
from tokenflex.training.loop import TrainingRun
from tokenflex.training.plan import plan_run
from tokenflex.training.stages import build_optimizer

peft = pytest.importorskip("peft")

PEFT = {"r": 2, "lora_dropout": 0.2, "modules_to_save": ["norm"]}
PROJECTOR, BOTH = {"projector": 0.01}, {"projector": 0.01, "text": 0.02}
SAMPLE = {"text_tokens": 40, "answer_tokens": 20, "tiles": 2}


def values_of(output: Path, **changes: Any) -> dict[str, Any]:
    """A stage of the projector alone, then one of projector and adapters."""
    stages = [
        stage(name="projector", steps=3, learning_rate=PROJECTOR),
        stage(name="both", steps=4, learning_rate=BOTH, distillation=0.5),
    ]
    values = {"encoder_warm_up": None, "evaluation": None, "peft": PEFT, "stages": stages}
    return tiny_values(output, **{**values, **changes})


def config_of(output: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(values_of(output, **changes))


def weights_of(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def start_of(config: TrainConfig) -> Any:
    """The model that a run of ``config`` begins with."""
    set_seed(config.seed)
    return load_kind(config.model_copy(update={"peft": None})).model.eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    TrainingRun(config_of(folder)).run()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def logits_of(model: Any, processor: Any) -> torch.Tensor:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = processor(images=[image], text="<image> odd", num_image_tokens=4)
    with torch.inference_mode():
        return model(**inputs).logits


def test_adapters_learn_in_their_stage_and_what_has_none_stays(finished):
    before = start_of(config_of(finished)).state_dict()
    after = weights_of(finished / "checkpoint")
    assert after.keys() <= before.keys()  # names of a model without adapters
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    text = {name for name in changed if ".projector." not in name}
    layer = "model.language_model.layers.0"
    adapted = [*(f"self_attn.{name}_proj" for name in "qkvo")]
    adapted += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert text == {
        *(f"{layer}.{name}.weight" for name in adapted),
        "model.language_model.norm.weight",
    }
    assert changed - text  # of the projector
    difference = after[f"{layer}.mlp.up_proj.weight"] - before[f"{layer}.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(difference, atol=1e-6) == 2


def test_the_checkpoint_loads_as_any_other_and_peft_loads_the_adapter(finished):
    model, processor = load_model(finished / "checkpoint")
    assert not any("lora" in name for name, _ in model.named_modules())
    base = start_of(config_of(finished))
    expected = logits_of(model.eval(), processor)
    assert not torch.allclose(logits_of(base, processor), expected, atol=1e-2)
    adapted = peft.PeftModel.from_pretrained(base, finished / "adapter").eval()
    torch.testing.assert_close(logits_of(adapted, processor), expected, rtol=0, atol=1e-5)
    saved = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (2, 4, 0.2)
    noted = json.loads((finished / "config.json").read_text())["run"]["adapter"]
    assert {*noted} == {path.name for path in (finished / "adapter").iterdir()}


# The first stage has 3 steps, the second 4; states are saved after steps 3 of both.
@pytest.mark.parametrize("steps", [2, 6])
def test_a_run_that_died_continues_to_the_byte(finished, tmp_path, steps):
    config = config_of(tmp_path / "run")
    run_until_killed(config, steps)
    torch.manual_seed(steps)  # what another process would have
    TrainingRun(config).run()
    assert metrics(tmp_path / "run") == metrics(finished)
    for name in ("checkpoint/model", "adapter/adapter_model"):
        assert_same(weights_of(tmp_path / "run", name), weights_of(finished, name))


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    changes: dict[str, Any] = {"peft": {**PEFT, "lora_dropout": 0}}  # masks differ
    data = {"name": "digits", "split": "test", "size": 7, "questions": 2}
    changes["evaluation"] = {"data": data, "counts": [4], "every": 2, "keep_best": "loss"}
    TrainingRun(config_of(tmp_path / "one", **changes)).run()
    values = values_of(tmp_path / "two", **changes)
    ranks = start_two(write_config(tmp_path / "two.yaml", values))
    assert [end_of(rank)[0] for rank in ranks] == [0, 0]
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    lines = [evaluations(tmp_path / name) for name in ("one", "two")]
    for alone, together in zip(*lines, strict=True):
        assert together["loss"]["4"] == pytest.approx(alone["loss"]["4"], rel=1e-4)
    best = [json.loads((tmp_path / n / "best" / "best.json").read_text()) for n in ("one", "two")]
    assert best[0]["best"]["global_step"] == best[1]["best"]["global_step"]
    adapters = [weights_of(tmp_path / name / "adapter", "adapter_model") for name in ("one", "two")]
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, rtol=0, atol=2e-3)


def test_the_encoder_has_adapters_if_asked_and_its_pooling_head_none(tmp_path):
    adapters = {"modules": ["vision", "text"], "r": 1, "target_modules": ["q_proj", "fc1"]}
    stages = [stage(steps=2, learning_rate={"vision": 0.02, "text": 0.02})]
    values = values_of(tmp_path / "run", peft=adapters, stages=stages)
    values["model"]["vision"]["config"]["vision_use_head"] = True
    config = TrainConfig.model_validate(values)
    before = start_of(config).state_dict()
    TrainingRun(config).run()
    after = weights_of(tmp_path / "run" / "checkpoint")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {
        "model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    }


def test_a_conversion_learns_by_adapters(tmp_path):
    model, processor = new_model_and_processor(seed=0)
    replace_projector(model, processor, num_image_tokens=16)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start")
    values = values_of(tmp_path / "run", model={"start": str(tmp_path / "start")})
    values["stages"] = [stage(steps=3, learning_rate=BOTH)]
    TrainingRun(TrainConfig.model_validate(values)).run()
    before, after = weights_of(tmp_path / "start"), weights_of(tmp_path / "run" / "checkpoint")
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert any("q_proj" in name for name in changed)
    assert not any("embed_tokens" in name or "vision" in name for name in changed)
    trained, processor = load_model(tmp_path / "run" / "checkpoint")
    base, _ = load_model(tmp_path / "start")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        expected, actual = (one(input_ids=ids).logits for one in (trained.eval(), adapted))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    noted = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert noted["base_model_name_or_path"] == str(tmp_path / "start")


def test_the_plan_counts_what_learns_and_what_it_costs(tmp_path):
    changes: dict[str, Any] = {"sample": SAMPLE, "stages": [stage(learning_rate=BOTH)]}
    config = config_of(tmp_path / "run", **changes)
    (plan,), (whole,) = plan_run(config), plan_run(config_of(tmp_path, peft=None, **changes))
    (group,) = build_optimizer(load_kind(config), config.stages[0]).param_groups[1:]
    learned = sum(weight.numel() for weight in group["params"])
    assert plan.trained_parameters["text"] == learned < whole.trained_parameters["text"] / 2
    # Gradients go through the language model, and only adapters get any of their own.
    forward_and_back = 2 / 3
    assert forward_and_back < plan.flops / whole.flops < 1
    assert plan.tile_cost > whole.tile_cost


def test_the_best_model_has_its_adapters_merged(tmp_path):
    """At the last step it is the final checkpoint, to the bit; training does not notice."""
    data = {"name": "digits", "split": "test", "size": 4, "questions": 2}
    evaluation = {"data": data, "counts": [4], "at_stage_end": True, "keep_best": "loss"}
    stages = [stage(steps=3, learning_rate=BOTH)]
    TrainingRun(config_of(tmp_path / "run", stages=stages, evaluation=evaluation)).run()
    best, last = (weights_of(tmp_path / "run" / name) for name in ("best", "checkpoint"))
    assert_same(best, last)
    AcceleratorState._reset_state(reset_partial_state=True)
    TrainingRun(config_of(tmp_path / "without", stages=stages)).run()
    assert_same(weights_of(tmp_path / "without" / "checkpoint"), last)


def test_an_adapter_goes_with_the_run_that_made_it(finished, tmp_path):
    values = values_of(tmp_path / "run", stages=[stage(steps=1, learning_rate=BOTH)])
    config = write_config(tmp_path / "run.yaml", values)
    assert main(["train", str(config)]) == 0
    (tmp_path / "run" / "adapter" / "notes.txt").write_text("mine")
    values |= {"peft": None}
    write_config(config, values)
    assert main(["train", str(config), "--fresh"]) == 0
    assert [path.name for path in (tmp_path / "run" / "adapter").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharding": "full"}, "sharding must be none with peft"),
        ({"compile": True}, "compile must be false with peft"),
        ({"peft": {"modules": []}}, "modules must name vision, text or both"),
        ({"peft": {"r": 0}}, "peft.r"),
        ({"peft": {"lora_r": 4}}, "peft.lora_r is no known key"),
        ({"peft": {"modules": ["vision"]}}, "peft of vision needs a stage with a learning_rate"),
        (
            {
                "peft": {"modules": ["vision", "text"]},
                "encoder_warm_up": {"steps": 1},
                "stages": [stage()],
            },
            "encoder_warm_up must not be given with peft of vision",
        ),
        ({"peft": {"target_modules": ["query"]}}, r"target_modules of peft must name.*q_proj"),
        ({"peft": {"modules_to_save": ["nrom"]}}, r"modules_to_save of peft must name.*norm"),
        ({"peft": {"modules_to_save": ["layers"]}}, "must find a linear layer in text"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_does_not_work_is_one_line(tmp_path, capsys, changes, message, dry):
    import re

    config = write_config(tmp_path / "run.yaml", values_of(tmp_path / "run", **changes))
    assert main(["train", str(config), *["--dry-run"] * dry]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_without_peft_it_says_how_to_install_it(tmp_path, capsys, monkeypatch, dry):
    monkeypatch.setitem(sys.modules, "peft", None)
    config = write_config(tmp_path / "run.yaml", values_of(tmp_path / "run"))
    assert main(["train", str(config), *["--dry-run"] * dry]) == 2
    assert "needs the package peft: pip install peft" in capsys.readouterr().err


def test_a_folder_of_others_is_not_replaced_by_an_adapter(tmp_path, capsys):
    config = write_config(tmp_path / "run.yaml", values_of(tmp_path / "run", peft=None))
    assert main(["train", str(config)]) == 0
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "plug.txt").write_text("mine")
    write_config(config, values_of(tmp_path / "run"))
    assert main(["train", str(config), "--fresh"]) == 2
    assert "must be an adapter to be replaced by one" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint").is_dir()


def test_runs_of_versions_without_the_key_are_the_same_runs(tmp_path):
    config = load_config(write_config(tmp_path / "a.yaml", values_of(tmp_path, peft=None)))
    assert "peft" not in json.loads(config.fingerprint())
    assert json.loads(config_of(tmp_path).fingerprint())["peft"]["r"] == 2
