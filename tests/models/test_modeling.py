"""The model through its padded path: batches, generation, saving, and everything it must refuse."""

from __future__ import annotations

import copy
import math
from types import MappingProxyType

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from tests.models.tiny import (
    IMAGE,
    PAD,
    PATCH,
    PIXELS,
    VOCABULARY,
    WIDTH,
    padded_batch,
    pixels,
    prompt,
    prompts,
    text_config,
    tiny_config,
    tiny_model,
    vision_config,
)
from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.counts import token_grid
from tokenflex.models.modeling import TokenFlexModel
from tokenflex_kernels import plan_packing

# Read-only: the pipelines of transformers before 5.20 write into the options that they are given.
GENERATION = MappingProxyType({"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD})
SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "two answers": {"num_beams": 3, "num_return_sequences": 2},
}


class AdaptedEmbedding(torch.nn.Embedding):
    """An embedding that may be more than its table, as adapters make it."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__(*weight.shape, _weight=weight.detach())


class CallCounter:
    """Count the calls of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls = 0
        module.register_forward_hook(self._count)

    def _count(self, *_) -> None:
        self.calls += 1


def one_image(count, grid_rows: int, seed: int = 1) -> dict:
    """A prompt with one image at ``count``, which stands for ``grid_rows`` vision tokens."""
    one = prompt([5, IMAGE, 6, 7], [grid_rows], seed)
    return {**one.inputs(), "num_image_tokens": count}


# ---- batches


@pytest.mark.parametrize(("text", "vision"), [("qwen2", "siglip"), ("llama", "clip")])
@pytest.mark.parametrize("implementation", ["tokenflex_varlen", "sdpa", "eager"])
def test_a_padded_batch_of_mixed_counts_gives_what_each_prompt_gives_alone(
    text, vision, implementation
):
    model = tiny_model(text, vision)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        batch = model(**padded_batch(prompts())).logits
        for row, one in zip(batch, prompts(), strict=True):
            alone = model(**one.inputs()).logits[0]
            assert float((row[-len(alone) :] - alone).abs().max()) < 1e-5


def test_pictures_matter_and_so_does_their_order():
    model, inputs = tiny_model(), prompt([5, IMAGE, 6, IMAGE, 7], [9, 9]).inputs()
    with torch.no_grad():
        straight = model(**inputs).logits
        swapped = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    assert float((straight - swapped).abs().max()) > 1e-2


def test_class_token_of_an_encoder_is_no_patch():
    model, pixel_values = tiny_model(vision="clip"), pixels(2)
    with torch.no_grad():
        images = model.encode_images(pixel_values)
        everything = model.model.vision_model(pixel_values=pixel_values).last_hidden_state
    assert everything.shape[1] == (PIXELS // PATCH) ** 2 + 1
    assert images.grids == ((PIXELS // PATCH,) * 2,) * 2
    assert torch.equal(images.features, everything[:, 1:].flatten(0, 1))


@pytest.mark.parametrize("grid", [(2, 3), (1, 5), (4, 1)])
def test_a_grid_of_unequal_sides_is_pooled_to_that_grid(grid):
    model, (height, width) = tiny_model(), grid
    with torch.no_grad():
        encoded = model.encode_images(pixels(1, seed=1))
        expected = model.model.projector(encoded.features[None], grid)[0]
        images = model.get_image_features(pixels(1, seed=1), grid)
        logits = model(**one_image(grid, height * width)).logits
        listed = model(**one_image([grid], height * width)).logits
    assert torch.equal(images.pooler_output[0], expected)
    assert logits.shape[1] == height * width + 3
    assert torch.equal(logits, listed)


def test_every_count_is_validated_once(monkeypatch):
    model, validated = tiny_model(), []

    def record(count, **options):
        validated.append(count)
        return token_grid(count, **options)

    for module in ("tokenflex.counts", "tokenflex.projector"):
        monkeypatch.setattr(f"{module}.token_grid", record)
    model.get_image_features(pixels(2), [4, (2, 3)])
    assert validated == [4, (2, 3)]


def test_unequal_grids_are_not_transposed():
    model = tiny_model()
    with torch.no_grad():
        wide = model(**one_image((2, 8), 16)).logits
        tall = model(**one_image((8, 2), 16)).logits
    assert float((wide - tall).abs().max()) > 1e-3


def test_count_defaults_to_the_configuration():
    model = tiny_model(num_image_tokens=9)
    with torch.no_grad():
        default = model(**one_image(None, 9)).logits
        named = model(**one_image(9, 9)).logits
    assert torch.equal(default, named)


# ---- what must be refused


def test_swapped_counts_of_two_rows_name_row_placeholders_and_counts():
    batch = [prompt([5, IMAGE, 6], [4], 1), prompt([5, IMAGE, 6], [9], 2)]
    inputs = {**padded_batch(batch), "num_image_tokens": [9, 4]}
    with pytest.raises(ValueError, match=r"row 0 .*image 0.* 4 of its 9") as error:
        tiny_model()(**inputs)
    assert "[9, 4]" in str(error.value)  # the counts
    assert "[4, 9]" in str(error.value)  # the placeholders


def test_swapped_counts_are_seen_where_a_row_ends_and_the_next_begins_with_an_image():
    """No text stands between the two runs, but the end of a row does."""
    rows = [[5] * 5 + [IMAGE] * 4, [IMAGE] * 9]
    inputs = {"input_ids": torch.tensor(rows), "pixel_values": pixels(2)}
    assert tiny_model()(**inputs, num_image_tokens=[4, 9]).logits.shape[:2] == (2, 9)
    with pytest.raises(ValueError, match=r"row 0 .*image 0.* 4 of its 9"):
        tiny_model()(**inputs, num_image_tokens=[9, 4])


def test_swapped_counts_inside_one_row_are_seen_where_text_separates_them():
    inputs = prompt([5, IMAGE, 6, IMAGE, 7], [4, 9]).inputs()
    with pytest.raises(ValueError, match=r"row 0 .*image 0.* 4 of its 9"):
        tiny_model()(**{**inputs, "num_image_tokens": [9, 4]})


@pytest.mark.parametrize("count", [4, 16])
def test_wrong_total_names_both_numbers(count):
    with pytest.raises(ValueError, match=rf"9 image placeholders .*\[9\].* {count} vision tokens"):
        tiny_model()(**one_image(count, 9))


def test_an_image_that_no_row_holds_is_named():
    inputs = prompt([5, IMAGE, 6], [4]).inputs()
    with pytest.raises(ValueError, match=r"no row of input_ids holds image 1 of 9 vision tokens"):
        tiny_model()(**{**inputs, "pixel_values": pixels(2), "num_image_tokens": [4, 9]})


def test_placeholders_after_the_last_image_are_named():
    inputs = padded_batch([prompt([5, IMAGE, 6], [4], 1), prompt([5, IMAGE, 6], [9], 2)])
    one = {"pixel_values": inputs["pixel_values"][:1], "num_image_tokens": [4]}
    with pytest.raises(ValueError, match=r"row 1 of input_ids holds 9 placeholders after the last"):
        tiny_model()(**{**inputs, **one})


def test_placeholders_of_a_row_are_counted_apart():
    batch = [prompt([5, IMAGE, 6], [4], 1), prompt([5, IMAGE, 6], [9], 2)]
    inputs = {**padded_batch(batch), "num_image_tokens": [9, 9]}
    with pytest.raises(ValueError, match=r"13 image placeholders \(per row \[4, 9\]\)"):
        tiny_model()(**inputs)


def test_non_square_count_names_its_neighbours():
    with pytest.raises(ValueError, match=r"got 10; the nearest squares are 9 and 16"):
        tiny_model()(**one_image(10, 10))


def test_as_many_counts_as_tiles():
    with pytest.raises(ValueError, match="2 entries for 1 images"):
        tiny_model()(**one_image([4, 4], 8))


def test_pixels_without_a_batch_dimension_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        tiny_model()(**{**one_image(4, 4), "pixel_values": pixels(1)[0]})


def test_nothing_to_read_is_refused():
    with pytest.raises(ValueError, match="input_ids"):
        tiny_model()()


# ---- generation


@pytest.mark.parametrize("search", SEARCHES)
def test_a_batch_generates_what_each_prompt_generates_alone(search):
    model, options = tiny_model(), {**GENERATION, **SEARCHES[search]}
    together = model.generate(**padded_batch(prompts()), **options)
    answers = options.get("num_return_sequences", 1)
    length = padded_batch(prompts())["input_ids"].shape[1]
    for i, one in enumerate(prompts()):
        inputs = one.inputs()
        alone = model.generate(**inputs, **options)
        assert (
            together[i * answers : (i + 1) * answers, length:].tolist()
            == alone[:, inputs["input_ids"].shape[1] :].tolist()
        )
    assert len({tuple(row) for row in together[:, length:].tolist()}) > 1


def test_greedy_generation_is_the_argmax_of_the_whole_sequence():
    model, inputs = tiny_model(), prompts()[1].inputs()
    generated = model.generate(**inputs, **GENERATION)
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": generated}).logits[0]
    assert logits[start - 1 : -1].argmax(-1).tolist() == generated[0, start:].tolist()


def test_text_only_generation():
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GENERATION)
    with torch.no_grad():
        logits = model(input_ids=generated).logits[0]
    assert logits[2:-1].argmax(-1).tolist() == generated[0, 3:].tolist()


def test_count_changes_the_answer_of_generate():
    model = tiny_model()
    answers = set()
    for count in (1, 4, 9, 16):
        inputs = one_image(count, count)
        output = model.generate(**inputs, **GENERATION)
        answers.add(tuple(output[0, inputs["input_ids"].shape[1] :].tolist()))
    assert len(answers) > 1


@pytest.mark.parametrize("search", SEARCHES)
def test_one_generation_encodes_once(search):
    model = tiny_model()
    encoder = CallCounter(model.model.vision_model)
    model.generate(**padded_batch(prompts()), **{**GENERATION, **SEARCHES[search]})
    assert encoder.calls == 1


def test_images_encoded_once_serve_several_generations():
    model, inputs = tiny_model(), padded_batch(prompts())
    expected = {
        name: model.generate(**inputs, **{**GENERATION, **options}).tolist()
        for name, options in SEARCHES.items()
    }
    pixel_values, counts = inputs.pop("pixel_values"), inputs.pop("num_image_tokens")
    images = model.get_image_features(pixel_values, counts)
    encoder = CallCounter(model.model.vision_model)

    for name in ("greedy", "beams", "two answers", "greedy"):
        options = {**GENERATION, **SEARCHES[name]}
        output = model.generate(**inputs, mm_encoder_outputs={"image": images}, **options)
        assert output.tolist() == expected[name], name
    assert encoder.calls == 0
    assert [len(tokens) for tokens in images.pooler_output] == counts


def test_images_encoded_once_give_the_same_logits():
    model, inputs = tiny_model(), padded_batch(prompts())
    with torch.no_grad():
        expected = model(**inputs).logits
        images = model.get_image_features(
            inputs.pop("pixel_values"), inputs.pop("num_image_tokens")
        )
        logits = model(**inputs, mm_encoder_outputs={"image": images}).logits
    assert torch.equal(logits, expected)


# ---- one image in several sequences


@pytest.mark.parametrize("adapted", [False, True])
def test_a_plan_shows_one_image_to_two_sequences(adapted):
    model = tiny_model().train()
    if adapted:  # more than its table
        model.set_input_embeddings(AdaptedEmbedding(model.get_input_embeddings().weight))
    prompts = [[5, IMAGE, 6, 7], [8, 9, IMAGE, 10]]
    image = pixels(1, seed=1)
    encoder = CallCounter(model.model.vision_model)

    def gradients_and_logits(plan, **inputs):
        model.zero_grad()
        output = model(plan=plan, labels=plan.labels[None], **inputs)
        output.loss.backward()
        return output.logits.detach(), [
            p.grad.clone() for p in model.model.parameters() if p.grad is not None
        ]

    shared, shared_gradients = gradients_and_logits(
        plan_packing(prompts, [9], IMAGE, image_index=[0, 0]),
        pixel_values=image,
        num_image_tokens=[9],
    )
    assert encoder.calls == 1
    twice, twice_gradients = gradients_and_logits(
        plan_packing(prompts, [9, 9], IMAGE),
        pixel_values=image.repeat(2, 1, 1, 1),
        num_image_tokens=[9, 9],
    )

    assert float((shared - twice).abs().max()) < 1e-6
    for a, b in zip(shared_gradients, twice_gradients, strict=True):
        assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))


def test_a_plan_shows_images_in_another_order():
    model, prompts = tiny_model(), [[5, IMAGE, 6], [7, IMAGE, 8]]
    plan = plan_packing(prompts, [4, 4], IMAGE)
    crossed = plan_packing(prompts, [4, 4], IMAGE, image_index=[1, 0])
    images = pixels(2, seed=4)
    with torch.no_grad():
        by_index = model(plan=crossed, pixel_values=images, num_image_tokens=4).logits
        by_pixels = model(plan=plan, pixel_values=images.flip(0), num_image_tokens=4).logits
        plain = model(plan=plan, pixel_values=images, num_image_tokens=4).logits
    assert float((by_index - by_pixels).abs().max()) < 1e-6
    assert float((by_index - plain).abs().max()) > 1e-2
    with pytest.raises(TypeError, match=r"vision_index .* image_index"):
        model(plan=plan, pixel_values=images, num_image_tokens=4, vision_index=torch.arange(8))


def test_an_image_of_a_plan_may_be_several_tiles():
    model, images = tiny_model(), pixels(3, seed=4)
    prompts = [[5, IMAGE, 6], [7, IMAGE, 8]]
    tiled = plan_packing(prompts, [8, 4], IMAGE, image_index=[0, 1])
    with torch.no_grad():
        logits = model(plan=tiled, pixel_values=images, num_image_tokens=4).logits
        prompts[0].insert(1, IMAGE)
        plan = plan_packing(prompts, [4, 4, 4], IMAGE)
        assert torch.equal(logits, model(plan=plan, pixel_values=images, num_image_tokens=4).logits)
    for counts in ([9, 4], [4, 4], [4, 4, 4, 4], [4, (2, 4)]):
        with pytest.raises(ValueError, match=r"counts that the plan was made for, \(8, 4\), got"):
            model(plan=tiled, pixel_values=pixels(len(counts)), num_image_tokens=counts)


# ---- the loss and the logits asked for


def test_logits_to_keep_are_rows_of_all_logits():
    model, inputs = tiny_model(), padded_batch(prompts())
    with torch.no_grad():
        everything = model(**inputs).logits
        rows = torch.tensor([30, 2, 17])
        last, chosen = model(**inputs, logits_to_keep=3), model(**inputs, logits_to_keep=rows)
    assert torch.allclose(last.logits, everything[:, -3:], atol=1e-6)
    assert torch.allclose(chosen.logits, everything[:, rows], atol=1e-6)


def test_loss_is_the_mean_over_labels_that_are_not_ignored():
    model, inputs = tiny_model(), prompts()[1].inputs()
    labels = inputs["input_ids"].clone()
    labels[labels == IMAGE] = -100
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    scores = output.logits[0, :-1].log_softmax(-1)
    expected = [-scores[t, label] for t, label in enumerate(labels[0, 1:]) if label >= 0]
    assert len(expected) == 6
    assert float(output.loss) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)


def test_num_items_in_batch_is_what_the_loss_is_divided_by():
    """As the Trainer asks it, so that accumulated micro-batches weigh every token alike."""
    model, inputs = tiny_model(), prompts()[1].inputs()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with torch.no_grad():
        mean = model(**inputs, labels=labels).loss
        part = model(**inputs, labels=labels, num_items_in_batch=24).loss
    assert float(part) == pytest.approx(float(mean) * 6 / 24, rel=1e-5)


# ---- saving and loading


@pytest.mark.parametrize(("text", "vision"), [("qwen2", "siglip"), ("llama", "clip")])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_is_exact(tmp_path, text, vision, tied):
    config = TokenFlexConfig(
        vision_config(vision),
        text_config(text, tie_word_embeddings=tied),
        image_token_id=IMAGE,
        num_image_tokens=(2, 3),
        pooling="resize",
        projector_hidden_width=40,
    )
    model = TokenFlexForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    loaded, info = TokenFlexForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.model.language_model.config._attn_implementation == "tokenflex_varlen"
    assert loaded.model.projector.pooling == "resize"
    assert loaded.model.projector.hidden_width == 40
    inputs = one_image(None, 6)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    for (name, saved), again in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(saved, again), name


def test_auto_classes_find_the_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TokenFlexConfig
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is TokenFlexForConditionalGeneration
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is TokenFlexModel
    inputs = one_image(9, 9)
    with torch.no_grad():
        hidden = base.eval()(**inputs).last_hidden_state
        assert torch.equal(loaded.eval().lm_head(hidden), model(**inputs).logits)


def test_bfloat16_is_kept_by_saving(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path).eval()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.bfloat16, name
        assert torch.equal(weight, model.state_dict()[name]), name


def test_bfloat16_forward_backward_and_generate():
    exact = tiny_model()
    model, inputs = copy.deepcopy(exact).to(torch.bfloat16).train(), padded_batch(prompts())
    with torch.no_grad():
        difference = (model(**inputs).logits.float() - exact(**inputs).logits).abs()
        scale = float(exact(**inputs).logits.abs().max())
    assert float(difference[inputs["attention_mask"].bool()].max()) < 0.05 * scale
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert float(model.model.projector.down.weight.grad.float().abs().max()) > 0
    assert model.eval().generate(**inputs, **GENERATION).shape[0] == 4


def test_gradient_checkpointing_changes_no_gradient():
    model, inputs = tiny_model().train(), padded_batch(prompts())
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name


# ---- a model around parts that exist


@pytest.mark.parametrize("tied", [True, False])
def test_from_parts_keeps_the_weights_of_the_parts(tied):
    vision = AutoModel.from_config(vision_config())
    language = AutoModelForCausalLM.from_config(text_config(tie_word_embeddings=tied)).eval()
    vision_weights = copy.deepcopy(vision.state_dict())
    text_weights = copy.deepcopy(language.state_dict())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = language(input_ids=ids).logits

    config = TokenFlexConfig(vision.config, language.config, image_token_id=IMAGE)
    model = TokenFlexForConditionalGeneration.from_parts(config, vision, language).eval()

    for name, weight in model.model.vision_model.state_dict().items():
        assert torch.equal(weight, vision_weights[name]), name
    for name, weight in model.model.language_model.state_dict().items():
        assert torch.equal(weight, text_weights[f"model.{name}"]), name
    assert torch.equal(model.lm_head.weight, text_weights["lm_head.weight"])
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)
        assert torch.isfinite(model(**one_image(9, 9)).logits).all()


def test_from_parts_survives_saving(tmp_path):
    vision = AutoModel.from_config(vision_config())
    language = AutoModelForCausalLM.from_config(text_config())
    config = TokenFlexConfig(vision.config, language.config, image_token_id=IMAGE)
    model = TokenFlexForConditionalGeneration.from_parts(config, vision, language).eval()
    model.save_pretrained(tmp_path)
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**one_image(9, 9)).logits, model(**one_image(9, 9)).logits)


def test_from_parts_answers_as_the_language_model_was_saved_to():
    language = AutoModelForCausalLM.from_config(text_config())
    language.generation_config.eos_token_id = [5, 6]
    language.generation_config.max_new_tokens = 3
    assert around(language).generation_config.eos_token_id == [5, 6]
    assert around(language).generation_config.max_new_tokens == 3


def test_from_parts_follows_the_dtype_of_the_language_model():
    vision = AutoModel.from_config(vision_config()).to(torch.bfloat16)
    language = AutoModelForCausalLM.from_config(text_config()).to(torch.bfloat16)
    config = TokenFlexConfig(vision.config, language.config, image_token_id=IMAGE)
    model = TokenFlexForConditionalGeneration.from_parts(config, vision, language)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("encoder", [torch.float32, torch.bfloat16])
def test_parts_of_different_dtypes_work_together(encoder):
    vision = AutoModel.from_config(vision_config()).to(encoder)
    other = torch.bfloat16 if encoder == torch.float32 else torch.float32
    language = AutoModelForCausalLM.from_config(text_config()).to(other)
    model = TokenFlexForConditionalGeneration.from_parts(
        TokenFlexConfig(vision.config, language.config, image_token_id=IMAGE), vision, language
    )
    inputs = one_image(9, 9)
    output = model(**inputs, labels=inputs["input_ids"])
    assert output.logits.dtype == other
    output.loss.backward()
    gradient = model.model.vision_model.get_input_embeddings().weight.grad
    assert gradient.dtype == encoder
    assert float(gradient.float().abs().max()) > 0
    assert model.eval().generate(**inputs, **GENERATION).shape[0] == 1


def build_fresh():
    return TokenFlexForConditionalGeneration(tiny_config())


def build_from_parts():
    vision = AutoModel.from_config(vision_config())
    language = AutoModelForCausalLM.from_config(text_config())
    config = TokenFlexConfig(vision.config, language.config, image_token_id=IMAGE)
    return TokenFlexForConditionalGeneration.from_parts(config, vision, language)


@pytest.mark.parametrize("build", [build_fresh, build_from_parts])
def test_projector_starts_at_the_scale_of_its_width(build):
    """PyTorch's uniform(+-1/sqrt(width)), not the 0.02 that transformers gives every Linear."""
    projector = build().model.projector
    projector.requires_grad_(False)
    for linear in (projector.gate, projector.up, projector.down):
        bound = 1 / math.sqrt(linear.in_features)
        assert float(linear.weight.abs().max()) <= bound
        assert float(linear.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert float(linear.bias.abs().max()) > 0.5 * bound
    assert torch.equal(projector.layernorm.weight, torch.ones(WIDTH))
    assert torch.equal(projector.layernorm.bias, torch.zeros(WIDTH))


# ---- language models of other families

SMALL = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "pad_token_id": PAD, "eos_token_id": None}
LLAMA_LIKE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "cohere": {**LLAMA_LIKE, "logit_scale": 0.3},
    "granite": {**LLAMA_LIKE, "logits_scaling": 5.0},
    "gemma2": {**LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 0.7},
    "gpt2": {**SMALL, "max_position_embeddings": 64},  # tied, its table called wte
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": WIDTH},  # tied, inside a decoder
    "phi": LLAMA_LIKE,  # its head has a bias
}


def causal_model(family: str, **changes):
    """A random one with a head large enough for a cap to bend its logits."""
    config = CONFIG_MAPPING[family](**{**FAMILIES[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        language = AutoModelForCausalLM.from_config(config).eval()
        torch.nn.init.normal_(language.get_output_embeddings().weight, std=0.3)
        if language.get_output_embeddings().bias is not None:
            torch.nn.init.normal_(language.get_output_embeddings().bias)
    return language


def around(language) -> TokenFlexForConditionalGeneration:
    config = TokenFlexConfig(vision_config(), language.config, image_token_id=IMAGE)
    vision = AutoModel.from_config(config.vision_config)
    return TokenFlexForConditionalGeneration.from_parts(config, vision, language).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_family_are_its_own_and_survive_saving(tmp_path, family):
    language = causal_model(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = language(input_ids=ids).logits
        model = around(language)
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)
        assert float((model.lm_head(torch.ones(1, WIDTH))).abs().max()) > 0.7
    model.save_pretrained(tmp_path)
    loaded, info = TokenFlexForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    tied = bool(language.config.tie_word_embeddings)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    inputs = one_image(9, 9)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    answer = model.generate(**inputs, **GENERATION)
    assert torch.equal(loaded.generate(**inputs, **GENERATION), answer)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("hyperclovax", {**LLAMA_LIKE, "logits_scaling": 2.0}, "logits_scaling.*hyperclovax.*2.0"),
        ("falcon_h1", {**LLAMA_LIKE, "lm_head_multiplier": 0.5}, "lm_head_multiplier.*0.5"),
        ("mamba", {"hidden_size": WIDTH, "num_hidden_layers": 1}, "past_key_values.*mamba"),
        ("opt", {**FAMILIES["opt"], "word_embed_proj_dim": 16}, "opt.*hidden_size 32.*16"),
        ("qwen2_vl_text", LLAMA_LIKE, "text_config must be of a causal.*qwen2_vl_text"),
    ],
)
def test_language_models_whose_logits_are_not_known_are_refused(family, changes, words):
    config = TokenFlexConfig(vision_config(), CONFIG_MAPPING[family](**changes), image_token_id=3)
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        TokenFlexForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (torch.nn.Linear(WIDTH, VOCABULARY), "no bias, got .* a bias"),
        (torch.nn.Linear(WIDTH, 70, bias=False), r"\[64, 32\].*\[70, 32\]"),
    ],
)
def test_from_parts_refuses_a_head_that_could_not_be_loaded_again(head, words):
    language = AutoModelForCausalLM.from_config(text_config())
    language.set_output_embeddings(head)
    with pytest.raises(ValueError, match=words):
        around(language)


# ---- configuration


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_image_tokens": 10}, "nearest squares are 9 and 16"),
        ({"pooling": "max"}, "max"),
        ({"vision_config": {"model_type": "no-such-model"}}, "vision_config.*no-such-model"),
        ({"text_config": {"model_type": "no-such-model"}}, "text_config.*no-such-model"),
    ],
)
def test_configuration_refuses(changes, match):
    with pytest.raises(ValueError, match=match):
        TokenFlexConfig(**changes)


def test_configuration_refuses_a_part_that_is_no_config():
    with pytest.raises(TypeError, match="vision_config"):
        TokenFlexConfig(vision_config="siglip")


def test_configuration_round_trip(tmp_path):
    config = tiny_config("llama", "clip", num_image_tokens=(2, 3), projector_eps=1e-3)
    config.save_pretrained(tmp_path)
    loaded = TokenFlexConfig.from_pretrained(tmp_path)
    assert type(loaded.vision_config) is type(config.vision_config)
    assert type(loaded.text_config) is type(config.text_config)
    assert tuple(loaded.num_image_tokens) == (2, 3)
    assert loaded.image_token_id == IMAGE
    assert loaded.projector_eps == 1e-3
    assert loaded.text_config.num_key_value_heads == 2


# ---- what used to go through in silence


def test_packed_counts_must_be_the_plans():
    """Equal totals would give the first image's rows to the second."""
    plan = plan_packing([[5, IMAGE, 6], [IMAGE, 7]], [4, 9], IMAGE)
    inputs = {"plan": plan, "pixel_values": pixels(2)}
    assert tiny_model()(**inputs, num_image_tokens=[4, 9]).logits.shape[1] == plan.num_tokens
    with pytest.raises(ValueError, match=r"num_image_tokens.*\(4, 9\).*\(9, 4\)"):
        tiny_model()(**inputs, num_image_tokens=[9, 4])


def test_placeholders_without_images_are_refused():
    ids = torch.tensor([[IMAGE] * 4 + [5, 6]])
    with pytest.raises(ValueError, match=r"4 image placeholders.*0 vision tokens"):
        tiny_model()(input_ids=ids)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"pixel_values": torch.zeros(1, 3, 16, 64)}, ValueError, "pixel_values.*32 x 32.*16 x 64"),
        (
            {"pixel_values": torch.zeros(1, 1, 32, 32)},
            ValueError,
            r"pixel_values.*\(1, 1, 32, 32\)",
        ),
        ({"pixel_values": torch.zeros(3, 32, 32)}, ValueError, r"pixel_values.*\(3, 32, 32\)"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32).byte()}, TypeError, "pixel_values.*uint8"),
        ({"input_ids": torch.zeros(1, 4)}, TypeError, "input_ids.*float32"),
        ({"pixel_values": pixels(1).to("meta")}, ValueError, "pixel_values.*cpu.*meta"),
        ({"input_ids": torch.ones(1, 4).long().to("meta")}, ValueError, "input_ids.*cpu.*meta"),
    ],
)
def test_inputs_the_encoder_would_misread(changes, error, words):
    inputs = {"input_ids": torch.tensor([[IMAGE] * 4]), "pixel_values": pixels(1)}
    with pytest.raises(error, match=words):
        tiny_model()(**{**inputs, **changes}, num_image_tokens=4)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_a_plan_stands_alone(name):
    plan = plan_packing([[5, 6]], [], IMAGE)
    with pytest.raises(ValueError, match=f"plan .*{name}"):
        tiny_model()(plan=plan, **{name: torch.ones(1, 2, dtype=torch.int64)})
