"""All tokens of an image at one text position: padded, packed and generated answers agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.models.tiny import (
    IMAGE,
    PAD,
    padded_batch,
    pixels,
    prompt,
    prompts,
    tiny_config,
    tiny_model,
)
from tokenflex import TokenFlexForConditionalGeneration
from tokenflex.models.prefixes import share_prefixes
from tokenflex_kernels import plan_packing

TOLERANCE = 1e-5
SHARED = {"projector_position": "normalized", "image_positions": "shared"}


def shared_model(**changes):
    """With a term of positions that is not zero: nothing else tells an image's tokens apart."""
    model = tiny_model(**{**SHARED, **changes})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        nn.init.normal_(model.model.projector.position.weight)
    return model


def seen_positions(model, **inputs) -> list[int]:
    """The position ids that reach the language model, all rows of the batch in one list."""
    seen = []

    def watch(_, args, kwargs):
        seen.append(kwargs["position_ids"].flatten().tolist())

    handle = model.model.language_model.register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def packed(batch) -> dict:
    counts = [count for one in batch for count in one.counts]
    plan = plan_packing([one.ids for one in batch], counts, IMAGE)
    pixel_values = torch.cat([one.pixels for one in batch])
    return {"plan": plan, "pixel_values": pixel_values, "num_image_tokens": counts}


def test_adjacent_images_of_a_plan_in_another_order_end_where_each_ends():
    plan = plan_packing([[5, IMAGE, IMAGE, 6]], [4, 9], IMAGE, image_index=[1, 0])
    inputs = {"plan": plan, "pixel_values": pixels(2), "num_image_tokens": [4, 9]}
    assert seen_positions(shared_model(), **inputs) == [0, *[9] * 9, *[13] * 4, 14]


def test_text_after_an_image_stands_next_to_all_of_its_tokens():
    one = prompt([5, IMAGE, 6, 7, IMAGE, 8], [4, (2, 3)])
    inputs = {**prompt(one.ids, [4, 6]).inputs(), "num_image_tokens": one.counts}
    expected = [0, 4, 4, 4, 4, 5, 6, 12, 12, 12, 12, 12, 12, 13]
    assert seen_positions(shared_model(), **inputs) == expected


def test_each_tile_of_an_image_has_a_position_of_its_own():
    inputs = {"input_ids": torch.tensor([[5] + [IMAGE] * 8 + [6]]), "pixel_values": pixels(2)}
    model, expected = shared_model(), [0, 4, 4, 4, 4, 8, 8, 8, 8, 9]
    assert seen_positions(model, **inputs, num_image_tokens=4) == expected
    # A plan knows no tiles: both stand at one placeholder.
    plan = plan_packing([[5, IMAGE, 6]], [8], IMAGE, image_index=[0])
    inputs = {"plan": plan, "pixel_values": pixels(2), "num_image_tokens": 4}
    assert seen_positions(model, **inputs) == expected


def test_padding_and_a_mask_move_positions_as_they_do_without_images():
    model, batch = shared_model(), [prompt([5, IMAGE, 6], [4]), prompt([7, IMAGE], [4])]
    inputs = padded_batch(batch)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = [0, 4, 4, 4, 4, 5, 0, 0, 4, 4, 4, 4]  # the second row begins with padding
    assert seen_positions(model, **inputs, position_ids=positions) == expected


def test_sequential_positions_are_left_to_the_language_model():
    model = tiny_model(projector_position="normalized")
    one = prompt([5, IMAGE, 6], [4])
    assert seen_positions(model, **packed([one])) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("implementation", ["tokenflex_varlen", "sdpa", "eager"])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(implementation, use_cache):
    model = shared_model()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        batch = model(**padded_batch(prompts())).logits
        for row, one in zip(batch, prompts(), strict=True):
            alone = model(**one.inputs(), use_cache=use_cache).logits[0]
            assert float((row[-len(alone) :] - alone).abs().max()) < TOLERANCE


@pytest.mark.parametrize("training", [False, True])
def test_packed_gives_what_each_prompt_gives_alone(training):
    model, inputs = shared_model().train(training), packed(prompts())
    with torch.no_grad():
        rows = model(**inputs).logits[0].split(inputs["plan"].lengths)
        for row, one in zip(rows, prompts(), strict=True):
            assert float((row - model(**one.inputs()).logits[0]).abs().max()) < TOLERANCE


def test_one_image_in_two_sequences_by_index():
    model, image = shared_model(), pixels(1, seed=1)
    prompts = [[5, IMAGE, 6, 7], [8, 9, IMAGE, 10]]
    plan = plan_packing(prompts, [9, 9], IMAGE)
    shown_twice = plan_packing(prompts, [9], IMAGE, image_index=[0, 0])
    with torch.no_grad():
        once = model(plan=shown_twice, pixel_values=image, num_image_tokens=[9]).logits
        twice = model(
            plan=plan, pixel_values=image.repeat(2, 1, 1, 1), num_image_tokens=[9, 9]
        ).logits
    assert float((once - twice).abs().max()) < TOLERANCE


def test_questions_that_share_the_rows_of_an_image_are_answered_as_alone():
    model, image = shared_model(), pixels(1, seed=1)
    plan = plan_packing([[5, IMAGE], [6, 7], [8]], [9], IMAGE)
    shared = share_prefixes(plan, [-1, 0, 0])
    with torch.no_grad():
        packed_logits = model(
            plan=plan, pixel_values=image, num_image_tokens=[9], shared_prefixes=shared
        ).logits[0]
        alone = [
            model(**prompt([5, IMAGE, *question], [9], seed=1).inputs()).logits[0, 10:]
            for question in ([6, 7], [8])
        ]
    assert float((packed_logits[10:] - torch.cat(alone)).abs().max()) < TOLERANCE


def test_packing_needs_an_attention_that_is_told_where_samples_end():
    model = shared_model()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"image_positions='shared' packs with .*'sdpa' knows"):
        model(**packed(prompts()))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_generates_what_each_prompt_generates_alone(beams):
    model = shared_model()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "num_beams": beams}
    together = model.generate(**padded_batch(prompts()), **options)[:, -4:]
    for row, one in zip(together, prompts(), strict=True):
        assert row.tolist() == model.generate(**one.inputs(), **options)[0, -4:].tolist()


def test_generation_step_by_step_is_the_argmax_of_the_whole_sequence():
    model, inputs = shared_model(), prompts()[1].inputs()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    generated = model.generate(**inputs, **options)
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": generated}).logits[0]
    assert logits[start - 1 : -1].argmax(-1).tolist() == generated[0, start:].tolist()


def test_the_place_of_a_cell_reaches_the_answer():
    """Two halves of a picture that look the same are told apart by the term alone."""
    model = shared_model()
    inputs = prompt([5, IMAGE, 6], [9]).inputs()
    with torch.no_grad():
        with_places = model(**inputs).logits
        model.model.projector.position.weight.zero_()
        without = model(**inputs).logits
    assert float((with_places - without).abs().max()) > 1e-2


# ---- configurations and checkpoints


def test_shared_positions_need_the_projectors_term():
    with pytest.raises(ValueError, match="image_positions='shared' needs projector_position"):
        tiny_config(image_positions="shared")


@pytest.mark.parametrize("name", ["projector_position", "image_positions"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(ValueError, match=rf"^{name} must be .*'sine'"):
        tiny_config(**{**SHARED, name: "sine"})


def test_a_saved_model_answers_the_same(tmp_path):
    model, inputs = shared_model(), padded_batch(prompts())
    model.save_pretrained(tmp_path)
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (loaded.config.projector_position, loaded.config.image_positions) == (
        "normalized",
        "shared",
    )
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_model_without_the_term_is_loaded_into_one_with_it_and_answers_the_same(tmp_path):
    model, inputs = tiny_model(), padded_batch(prompts())
    model.save_pretrained(tmp_path)
    loaded = TokenFlexForConditionalGeneration.from_pretrained(
        tmp_path, projector_position="normalized"
    ).eval()
    assert not loaded.model.projector.position.weight.any()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_model_from_parts_begins_without_the_term():
    language_model = AutoModelForCausalLM.from_config(tiny_config().text_config)
    vision_model = tiny_model().model.vision_model
    made = TokenFlexForConditionalGeneration.from_parts(
        tiny_config(**SHARED), vision_model, language_model
    )
    assert not made.model.projector.position.weight.any()
