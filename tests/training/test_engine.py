"""Layers that are recomputed or compiled: the same numbers, less memory, and the same names."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.models.tiny import tiny_model
from tests.training.runs import metrics, own_data, run_until_killed, stage, tiny_values
from tokenflex.data.packing import PackedBatch
from tokenflex.models.loading import load_checkpoint
from tokenflex.training import layers
from tokenflex.training.config import TrainConfig
from tokenflex.training.layers import adapted_layers, layers_of
from tokenflex.training.loop import TrainingRun
from tokenflex.training.stages import build_optimizer, load_steps
from tokenflex_kernels import plan_packing

# Parts that learn behind parts that do not: gradients go through frozen layers too.
STAGES = [
    stage(name="projector", learning_rate={"projector": 0.002}, steps=3, max_tokens=100),
    stage(name="all", steps=4, max_tokens=100),
]


def configured(tmp_path, name="run", **changes) -> TrainConfig:
    common = {"stages": STAGES, "evaluation": None, "encoder_warm_up": None}
    return TrainConfig.model_validate(tiny_values(tmp_path / name, **{**common, **changes}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    TrainingRun(configured(folder)).run()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run"


def weights(output):
    return load_checkpoint(output / "checkpoint")[0].state_dict()


# ---- recomputed


def test_recomputed_layers_give_the_same_run_bit_by_bit(plain, tmp_path):
    training = TrainingRun(configured(tmp_path, gradient_checkpointing=True))
    training.run()
    assert metrics(tmp_path / "run") == metrics(plain)
    expected = weights(plain)
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name]), name
    assert training.model.model.projector.save == "preactivation"
    assert not any("forward" in vars(layer) for layer in layers_of(training.model))


@pytest.mark.parametrize(
    ("learning", "passes"),
    [({"projector": 1e-3}, (1, 2)), ({"vision": 1e-3}, (2, 2)), ({"text": 1e-3}, (1, 2))],
)
def test_layers_that_gradients_go_through_run_twice(tmp_path, learning, passes):
    """Frozen ones as well, though they are in evaluation mode."""
    config = configured(
        tmp_path, gradient_checkpointing=True, stages=[stage(steps=1, learning_rate=learning)]
    )
    training = TrainingRun(config)
    inner = training.model.model
    counts = []
    for part in (inner.vision_model, inner.language_model):
        calls = []
        (layer,) = layers_of(part)
        norm = next(one for name, one in layer.named_modules() if "norm" in name)
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        counts.append(calls)
    training.run()
    assert tuple(map(len, counts)) == passes


def kept_bytes(training: TrainingRun) -> int:
    """Return the bytes that autograd keeps between forward and backward, without weights."""
    config = training.config
    build_optimizer(training.setup.kind, config.stages[0])
    (batch,) = next(load_steps(training.setup, 0, [])).bins
    own = {one.untyped_storage().data_ptr() for one in training.model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        adapted_layers(training.setup.kind.parts, config, config.stages[0].learning),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        training.model(
            **batch.model_inputs(),
            targets=batch.targets,
            target_weights=torch.ones(len(batch.targets)),
        )
    return sum(kept.values())


def test_recomputed_layers_keep_less(tmp_path):
    sizes = []
    for recomputed in (False, True):
        values = tiny_values(tmp_path / "run", gradient_checkpointing=recomputed)
        for part in ("vision", "text"):
            values["model"][part]["config"]["num_hidden_layers"] = 4
        values |= {"stages": [stage(batch_size=8)], "encoder_warm_up": None, "evaluation": None}
        sizes.append(kept_bytes(TrainingRun(TrainConfig.model_validate(values))))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert sizes[1] < 0.3 * sizes[0]


# ---- faster


def test_hidden_states_of_the_encoder_are_contiguous_in_a_stage(tmp_path):
    values = tiny_values(tmp_path / "run", encoder_warm_up=None, evaluation=None)
    training = TrainingRun(TrainConfig.model_validate(values))
    model, config = training.model, training.config
    states = []
    for layer in layers_of(model.model.vision_model):
        layer.register_forward_hook(lambda _, __, output: states.append(output))
    pixels = torch.randn(2, 3, 32, 32)
    expected = model.encode_images(pixels).features
    states.clear()
    with adapted_layers(training.setup.kind.parts, config, config.stages[0].learning):
        features = model.encode_images(pixels).features
    assert states
    assert all(state.is_contiguous() for state in states)
    torch.testing.assert_close(features, expected)


# ---- compiled


@pytest.fixture
def _compiled_fast(monkeypatch):
    """The graphs of the compiler without its code generator, which takes minutes here."""
    monkeypatch.setattr(layers, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


COMPILED = {
    "compile": True,
    "gradient_checkpointing": True,
    "save_every": 1,
    "stages": [stage(steps=5, max_tokens=100)],
}


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled_fast")
def test_compiled_layers_give_the_same_run(tmp_path):
    """Also recomputed; every step has other lengths, and yet there are few graphs."""
    TrainingRun(configured(tmp_path, "plain", stages=COMPILED["stages"])).run()
    AcceleratorState._reset_state(reset_partial_state=True)
    TrainingRun(configured(tmp_path, "whole", **COMPILED)).run()
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "plain")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert weights(tmp_path / "whole").keys() == weights(tmp_path / "plain").keys()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 12


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled_fast")
def test_a_compiled_run_continues_exactly(tmp_path):
    short = {**COMPILED, "stages": [stage(steps=2, max_tokens=100)]}
    TrainingRun(configured(tmp_path, "whole", **short)).run()
    AcceleratorState._reset_state(reset_partial_state=True)
    run_until_killed(configured(tmp_path, "stopped", **short), 1)
    TrainingRun(configured(tmp_path, "stopped", **short)).run()
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


# ---- bins of text alone


def test_a_bin_of_text_alone_trains_where_text_is_frozen(tmp_path):
    data = own_data(tmp_path, 6, broken=(), text_only=(0, 1, 2, 3))
    bins = [stage(steps=6, batch_size=2, learning_rate={"projector": 0.01}, max_tokens=20)]
    TrainingRun(configured(tmp_path, data=data, stages=bins)).run()
    lines = metrics(tmp_path / "run")
    assert 0 in {line["tiles"] for line in lines}
    assert len(lines) == 6


@pytest.mark.parametrize("vision", ["siglip", "clip", "siglip2"])
def test_a_blank_tile_changes_no_number(vision):
    model = tiny_model(vision=vision)
    plan = plan_packing([[5, 6, 7]], [], 3)
    empty = PackedBatch(
        pixel_values=torch.zeros(0, 3, 1, 1),
        plan=plan,
        target_rows=torch.tensor([0, 1]),
        targets=plan.input_ids[1:],
    )
    logits = model(**empty.model_inputs()).logits
    batch = empty.with_every_gradient(model, 4)
    assert len(batch.pixel_values) == 1
    with_tile = model(**batch.model_inputs()).logits
    assert torch.equal(with_tile, logits)
    with_tile.sum().backward()
    for name, parameter in model.model.projector.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
