"""A fitted projector starts near the stock one: in its tokens, and in the loss."""

from __future__ import annotations

import pytest
import torch

from tests.dropin.processors import picture, stock_processor
from tests.dropin.table import END, IMAGE, PIXELS, START, image_inputs, pixels
from tests.dropin.test_model import converted, logits, projector_of
from tests.dropin.tiny import MODELS, PROMPTS, batch, stock_model
from tokenflex import TokenCounts, replace_projector
from tokenflex.dropin import fit_projector
from tokenflex.dropin.model import as_stock
from tokenflex.dropin.variants import is_converted


def model_with_a_projector_to_imitate(name: str):
    model = stock_model(name)
    if name == "gemma3":  # its projector starts from zeros
        weight = model.base_model.multi_modal_projector.mm_input_projection_weight
        weight.data.copy_(pixels(*weight.shape, seed=5))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return replace_projector(model, num_image_tokens=16)


NOT_FITTED = ["aria"]
GATED = (
    *("aya_vision", "cohere2_vision"),
    *("glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "glmga"),
)


def test_projectors_of_learned_queries_are_not_imitated():
    model = converted("aria")
    with pytest.raises(ValueError, match="that of aria: its tokens are learned queries"):
        fit_projector(model, image_inputs("aria", [1, 2]))
    with pytest.raises(ValueError, match="init='random'"):
        replace_projector(stock_model("aria"), images=image_inputs("aria", [1, 2]))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_FITTED])
def test_fitted_tokens_are_near_the_stock_ones(name, record_property):
    """Images of noise and random encoders are the hardest case to generalise from."""
    model = model_with_a_projector_to_imitate(name).train()
    frozen = next(model.base_model.children()).eval()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        report = fit_projector(model, image_inputs(name, range(100, 124)), counts=[16, 4])
    record_property("error", {k: getattr(report, k) for k in ("before", "after", "held_out")})
    assert report.before > 0.95
    # Gated stock projectors, of products of patches, are the furthest from ours.
    assert report.after < (0.85 if name in GATED else 0.6)
    assert report.held_out < 0.95
    assert model.training
    assert not frozen.training
    assert is_converted(model)
    model(**batch(name, PROMPTS, labels=True)).loss.backward()
    assert all(p.grad is not None for p in projector_of(model).parameters())


def test_fit_is_of_the_tokens_that_the_stock_model_makes():
    """With as many tokens as patches and nothing in between, the target is the stock output."""
    model = model_with_a_projector_to_imitate("paligemma")
    images = image_inputs("paligemma", [1, 2, 3])
    fit_projector(model, images, counts=[64])
    with torch.no_grad():
        fitted = model.base_model.get_image_features(**images, num_image_tokens=64)
        stock = model_with_a_projector_to_imitate("paligemma")
        with as_stock(stock) as base:
            expected = base.get_image_features(**images).pooler_output
    fitted = torch.stack(fitted.pooler_output)
    assert float((fitted - expected).norm() / expected.norm()) < 0.1
    assert is_converted(stock)


# ---- step 0, where it matters: in front of a language model that reads images

CLASSES = 8


def pictures_of(classes: torch.Tensor, seed: int) -> torch.Tensor:
    kinds = torch.stack([pixels(3, 4, 4, seed=500 + i) for i in range(CLASSES)])
    kinds = torch.nn.functional.interpolate(kinds, size=(PIXELS, PIXELS))
    return kinds[classes] + 0.3 * pixels(len(classes), 3, PIXELS, PIXELS, seed=seed)


def questions(number: int, tokens: int, seed: int) -> dict:
    """Make questions after one of eight kinds of pictures, answered by one of eight tokens."""
    classes = torch.randint(CLASSES, (number,), generator=torch.Generator().manual_seed(seed))
    prompt = torch.tensor([[3, START, *[IMAGE] * tokens, END, 4]]).expand(number, -1)
    ids = torch.cat([prompt, 60 + classes[:, None]], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "labels": labels, "pixel_values": pictures_of(classes, seed)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stock_count"), [("llava-siglip", 64), ("internvl", 16)])
def test_loss_at_step_0_is_near_the_stock_model_s(name, stock_count, record_property):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = stock_model(name).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(80):
            model(**questions(16, stock_count, step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

        @torch.no_grad()
        def loss(count: int) -> float:
            options = {"num_image_tokens": count} if is_converted(model) else {}
            return float(model(**questions(64, count, 999), **options).loss)

        stock = loss(stock_count)
        replace_projector(model, num_image_tokens=16)
        random = loss(stock_count)
        images = pictures_of(torch.arange(32) % CLASSES, seed=998)
        fit_projector(model, {"pixel_values": images}, counts=[16, stock_count])
        fitted = loss(stock_count)
    record_property("loss", {"stock": stock, "random": random, "fitted": fitted})
    assert stock < 0.2  # it has learned to look
    assert random > 2.0  # one of eight would be 2.08
    assert fitted < stock + 0.1


# ---- arguments


def test_pictures_go_through_the_processor(processor_name):
    model, processor = stock_model(processor_name), stock_processor(processor_name)
    if processor_name == "gemma3":
        model = stock_model(processor_name)
        model.base_model.multi_modal_projector.mm_input_projection_weight.data.normal_()
    pictures = [picture(i, 64, 100) for i in range(4)]
    replace_projector(model, processor, num_image_tokens=16, images=pictures)
    fitted = projector_of(model).down.bias.detach().clone()
    report = fit_projector(model, pictures, processor)
    assert report.after < 1.0
    assert not torch.equal(fitted, torch.zeros_like(fitted))


def test_fit_on_arguments_of_replace_projector():
    images = image_inputs("llava", [1, 2, 3, 4])
    model = stock_model("llava")
    replace_projector(model, num_image_tokens=16, images=images)
    random = converted("llava")
    with torch.no_grad():
        tokens = [
            torch.cat(m.base_model.get_image_features(**images).pooler_output)
            for m in (model, random)
        ]
    assert fit_projector(random, images).before > 0.9
    refitted = fit_projector(model, images)
    assert refitted.before < 0.5
    assert not torch.equal(*tokens)


def test_failed_fit_leaves_the_stock_model():
    model, processor = stock_model("llava"), stock_processor("llava")
    with pytest.raises(ValueError, match="at least one picture"):
        replace_projector(model, processor, num_image_tokens=16, images=[])
    assert not is_converted(model)
    stock = stock_model("llava")
    inputs = batch("llava", [PROMPTS[0]._replace(counts=[64])])
    del inputs["num_image_tokens"]
    assert torch.equal(logits(model, inputs), logits(stock, inputs))
    assert not hasattr(processor, "_tokenflex")


def test_fit_needs_the_stock_projector(tmp_path):
    with pytest.raises(ValueError, match="converted in place"):
        fit_projector(stock_model("llava"), image_inputs("llava", [1]))


def test_half_precision_models_are_fitted_too():
    model = stock_model("internvl").to(torch.bfloat16)
    replace_projector(model, num_image_tokens=16)
    report = fit_projector(model, image_inputs("internvl", range(24)))
    assert {p.dtype for p in projector_of(model).parameters()} == {torch.bfloat16}
    assert report.after < 0.6 < report.before


def test_one_image_is_enough_but_holds_none_out():
    report = fit_projector(converted("llava"), image_inputs("llava", [1]))
    assert report.held_out is None
    assert report.after < report.before


@pytest.mark.parametrize(
    ("default", "tokens"),
    [(36, 36 + 9 + 4), (16, 16 + 4), (9, 9 + 1), (25, 25), ((4, 6), 24 + 6), ((6, 9), 54 + 6)],
)
def test_default_counts_to_fit_at_are_a_quarter_and_a_ninth_where_sides_divide(default, tokens):
    model = replace_projector(stock_model("llava"), num_image_tokens=default)
    assert fit_projector(model, image_inputs("llava", [1])).tokens == tokens


@pytest.mark.parametrize("counts", [[10], ["9"], [TokenCounts()]])
def test_counts_to_fit_at_must_be_counts(counts):
    with pytest.raises((TypeError, ValueError), match="num_tokens"):
        fit_projector(converted("llava"), image_inputs("llava", [1]), counts=counts)
