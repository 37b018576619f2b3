"""The projector writes vision tokens into the packed row where nothing else sees them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tokenflex.projector
from tests.models.tiny import IMAGE, Prompt, prompts, tiny_model
from tokenflex_kernels import plan_packing


def packed_inputs(batch: list[Prompt]) -> dict:
    counts = [count for one in batch for count in one.counts]
    plan = plan_packing([one.ids for one in batch], counts, IMAGE)
    pixels = torch.cat([one.pixels for one in batch])
    return {"plan": plan, "pixel_values": pixels, "num_image_tokens": counts}


def with_targets(inputs: dict) -> dict:
    labels = inputs["plan"].labels
    rows = (labels[1:] != -100).nonzero()[:, 0]
    targets = labels[rows + 1]
    weights = torch.full(targets.shape, 0.5)
    return {**inputs, "logits_to_keep": rows, "targets": targets, "target_weights": weights}


@pytest.fixture
def fused(monkeypatch) -> list[torch.Tensor]:
    """The rows that `project_and_pack` returns from here on."""
    rows = []
    op = tokenflex.projector.project_and_pack

    def record(*args, **options):
        rows.append(op(*args, **options))
        return rows[-1]

    monkeypatch.setattr(tokenflex.projector, "project_and_pack", record)
    return rows


def without_tokens(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs, output_image_hidden_states=False)
    assert output.image_hidden_states is None
    return output.logits


def test_logits_are_those_of_projecting_first(fused):
    model, inputs = tiny_model(), packed_inputs(prompts())
    with torch.no_grad():
        expected = model(**inputs)
    assert expected.image_hidden_states.shape[0] == sum(inputs["num_image_tokens"])
    assert fused == []
    torch.testing.assert_close(without_tokens(model, inputs), expected.logits)
    assert len(fused) == 1


def test_targets_train_the_same(fused, monkeypatch):
    model, inputs = tiny_model(), with_targets(packed_inputs(prompts()))

    def gradients():
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        assert output.image_hidden_states is None
        return {name: weight.grad for name, weight in model.named_parameters()}

    actual = gradients()
    assert len(fused) == 1
    monkeypatch.setattr(tokenflex.projector, "_has_any_global_hook", lambda: True)
    expected = gradients()
    assert len(fused) == 1
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(actual[name], gradient, msg=lambda m, name=name: name + m)


def test_a_hook_on_the_embedding_counts_in_packed_rows():
    model, inputs = tiny_model(), packed_inputs(prompts())
    plain = without_tokens(model, inputs)
    add_a_hook(model.get_input_embeddings())
    hooked = without_tokens(model, inputs)
    assert not torch.allclose(plain, hooked)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, hooked)


class ScaledTable(torch.Tensor):
    """A table whose rows are computed as they are looked up, as quantised ones are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        return 1.5 * result.as_subclass(torch.Tensor) if func is F.embedding else result


def test_a_table_that_computes_its_rows_is_looked_up_for_packed_rows(fused):
    model, inputs = tiny_model(), packed_inputs(prompts())
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, inputs, output: output * 1.5)
    expected = without_tokens(model, inputs)
    handle.remove()
    table = embedding.weight.detach().as_subclass(ScaledTable)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    fused.clear()
    assert type(embedding.weight) is ScaledTable
    torch.testing.assert_close(without_tokens(model, inputs), expected)
    assert fused == []


class Adapted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.5


def add_a_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * 1.5)


def replace_the_forward(module: nn.Module) -> None:
    plain = module.forward
    module.forward = lambda *args, **options: plain(*args, **options) * 1.5


def adapt(projector: nn.Module) -> None:
    projector.down.__class__ = Adapted


def make_a_subclass(projector: nn.Module) -> None:
    class Scaled(type(projector)):
        def forward(self, *args, **options):
            return super().forward(*args, **options) * 1.5

    projector.__class__ = Scaled


CHANGES = {
    "hook on the projector": add_a_hook,
    "hook on a part": lambda projector: add_a_hook(projector.gate),
    "forward of the projector": replace_the_forward,
    "forward of a part": lambda projector: replace_the_forward(projector.up),
    "an adapted part": adapt,
    "a subclass": make_a_subclass,
    "compiled": lambda projector: projector.compile(backend="eager"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_added_to_the_projector_keeps_its_effect(fused, name):
    model, inputs = tiny_model(), packed_inputs(prompts())
    plain = without_tokens(model, inputs)
    CHANGES[name](model.model.projector)
    fused.clear()
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(without_tokens(model, inputs), expected)
    assert fused == []
    if name != "compiled":
        assert not torch.allclose(expected, plain)


def test_positions_are_added(fused):
    model, inputs = tiny_model(projector_position="normalized"), packed_inputs(prompts())
    nn.init.normal_(model.model.projector.position.weight)
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(without_tokens(model, inputs), expected)
    assert fused == []


def test_a_hook_of_all_modules_sees_the_projector(fused):
    model, inputs, seen = tiny_model(), packed_inputs(prompts()), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(module)
    )
    try:
        without_tokens(model, inputs)
    finally:
        handle.remove()
    assert any(module is model.model.projector for module in seen)
    assert fused == []


def test_an_adapted_embedding_merges_the_tokens(fused):
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2.0

    model, inputs = tiny_model(), packed_inputs(prompts())
    model.get_input_embeddings().__class__ = Scaled
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(without_tokens(model, inputs), expected)
    assert fused == []


def test_weights_of_another_type_than_the_table(fused):
    model, inputs = tiny_model(), packed_inputs(prompts())
    model.model.language_model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(without_tokens(model, inputs), expected)
    assert fused == []


def test_counts_of_other_images_are_refused():
    inputs = packed_inputs(prompts())
    inputs["num_image_tokens"] = [4, 9, 16, 9]
    with pytest.raises(ValueError, match=r"\(4, 9, 16, 16\), got \(4, 9, 16, 9\)"):
        without_tokens(tiny_model(), inputs)


def test_the_order_in_which_images_are_shown_and_images_shown_twice(fused):
    model, batch = tiny_model(), prompts()
    counts = [4, 9, 16]
    images = torch.cat([batch[0].pixels, batch[1].pixels])
    for order in ([2, 0, 1], [1, 0, 1, 2]):
        ids = [[5, *[IMAGE] * len(order), 7], [8, 9]]
        plan = plan_packing(ids, counts, IMAGE, image_index=order)
        inputs = {"plan": plan, "pixel_values": images, "num_image_tokens": counts}
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(without_tokens(model, inputs), expected)
    assert len(fused) == 2
