"""``generate`` with embeddings, chunks, drafts and repeated prompts, and its saved configs."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from tests.models.test_modeling import GENERATION, around
from tests.models.tiny import (
    IMAGE,
    VOCABULARY,
    padded_batch,
    pixels,
    prompts,
    text_config,
    tiny_config,
    tiny_model,
    vision_config,
)
from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.models.generation import cache_name, repeated_images
from tokenflex_kernels import plan_packing

LOGITS = {"return_dict_in_generate": True, "output_logits": True}
SHARED = {"projector_position": "normalized", "image_positions": "shared"}


def model_with(positions: str = "sequential", **changes) -> TokenFlexForConditionalGeneration:
    """Positions of images that are learned have a say: they are zero in a fresh model."""
    model = tiny_model(**(SHARED if positions == "shared" else {}), **changes)
    if positions == "shared":
        with torch.random.fork_rng():
            torch.manual_seed(5)
            torch.nn.init.normal_(model.model.projector.position.weight)
    return model


def two_images() -> dict:
    ids = [5, *[IMAGE] * 9, 6, 7, *[IMAGE] * 16, 8, 9]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels(2, seed=1),
        "num_image_tokens": [9, 16],
    }


def assert_same(actual, expected) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    for a, b in zip(actual.logits, expected.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


# ---- embeddings in place of ids


@pytest.mark.parametrize("positions", ["sequential", "shared"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_embeddings_of_a_prompt_generate_as_its_ids_do(positions, options):
    model, inputs = model_with(positions), padded_batch(prompts())
    expected = model.generate(**inputs, **GENERATION, **options)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    new = model.generate(inputs_embeds=embeds, **inputs, **GENERATION, **options)
    assert torch.equal(new, expected[:, ids.shape[1] :])
    encoded = model.encode_images(inputs.pop("pixel_values"))
    new = model.generate(
        inputs_embeds=embeds, encoded_images=encoded, **inputs, **GENERATION, **options
    )
    assert torch.equal(new, expected[:, ids.shape[1] :])


# ---- prompts read in chunks


@pytest.mark.parametrize("positions", ["sequential", "shared"])
@pytest.mark.parametrize("size", [1, 3, 8, 12, 29, 64])
def test_chunks_may_end_anywhere_in_an_image(positions, size):
    model, inputs = model_with(positions), two_images()
    expected = model.generate(**inputs, **GENERATION, **LOGITS)
    assert_same(model.generate(**inputs, prefill_chunk_size=size, **GENERATION, **LOGITS), expected)


@pytest.mark.parametrize("positions", ["sequential", "shared"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}],
    ids=["greedy", "beams", "samples"],
)
@pytest.mark.parametrize("size", [5, 16])
def test_chunks_of_a_padded_batch(positions, options, size):
    model, inputs = model_with(positions), padded_batch(prompts())
    options = {**GENERATION, **options}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, prefill_chunk_size=size, **options), expected)


@pytest.mark.parametrize("positions", ["sequential", "shared"])
@pytest.mark.parametrize("inputs", [two_images(), padded_batch(prompts())], ids=["one", "batch"])
def test_chunks_with_a_static_cache(positions, inputs):
    model = model_with(positions)
    options = {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(**inputs, **GENERATION)
    for size in ({}, {"prefill_chunk_size": 5}):
        assert torch.equal(model.generate(**inputs, **options, **size, **GENERATION), expected)


@pytest.mark.parametrize("positions", ["sequential", "shared"])
@pytest.mark.parametrize("given", ["encoded_images", "mm_encoder_outputs", "inputs_embeds"])
def test_chunks_of_images_and_prompts_given_in_other_ways(positions, given):
    model, inputs = model_with(positions), two_images()
    expected = model.generate(**inputs, **GENERATION, **LOGITS)
    if given == "encoded_images":
        inputs["encoded_images"] = model.encode_images(inputs.pop("pixel_values"))
    elif given == "mm_encoder_outputs":
        counts = inputs.pop("num_image_tokens")
        images = model.get_image_features(inputs.pop("pixel_values"), counts)
        inputs["mm_encoder_outputs"] = {"image": images}
    else:
        ids = inputs.pop("input_ids")
        inputs["inputs_embeds"] = model.get_input_embeddings()(ids)
        expected.sequences = expected.sequences[:, ids.shape[1] :]
    assert_same(model.generate(**inputs, prefill_chunk_size=7, **GENERATION, **LOGITS), expected)


def test_chunks_of_a_wrong_prompt_are_refused():
    inputs = {**two_images(), "num_image_tokens": [16, 9]}
    with pytest.raises(ValueError, match="inside image 0, after 9 of its 16 vision tokens"):
        tiny_model().generate(**inputs, prefill_chunk_size=4, **GENERATION)


@pytest.mark.parametrize("positions", ["sequential", "shared"])
@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
def test_a_conversation_goes_on_from_its_cache(positions, chunks):
    """The second turn brings the second image; the first is in the cache."""
    model, inputs = model_with(positions), two_images()
    options = {**GENERATION, **LOGITS, **chunks}
    ids, images, counts = inputs["input_ids"], inputs["pixel_values"], [9, 16]
    first = model.generate(
        input_ids=ids[:, :11], pixel_values=images[:1], num_image_tokens=counts[:1], **options
    )
    # The last token was generated, not read.
    said = torch.cat([first.sequences, ids[:, 11:]], 1)
    expected = model.generate(
        input_ids=said, pixel_values=images, num_image_tokens=counts, **{**GENERATION, **LOGITS}
    )
    second = model.generate(
        input_ids=said,
        pixel_values=images[1:],
        num_image_tokens=counts[1:],
        past_key_values=first.past_key_values,
        **options,
    )
    assert_same(second, expected)


class NewNames(torch.nn.Module):
    def forward(self, inputs_embeds, cache=None, **kwargs):
        raise NotImplementedError


class OldNames(torch.nn.Module):
    def forward(self, inputs_embeds, past_key_values=None, **kwargs):
        raise NotImplementedError


def test_a_cache_has_the_name_of_the_language_model_s_forward():
    assert cache_name(NewNames()) == "cache"
    assert cache_name(OldNames()) == "past_key_values"


def test_generating_warns_of_nothing_deprecated():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        tiny_model().generate(**two_images(), **GENERATION)


# ---- a draft


def draft_model(**changes) -> TokenFlexForConditionalGeneration:
    """Another width, another encoder, other weights."""
    config = tiny_config("qwen2", "clip", **changes)
    config.text_config.hidden_size = 16
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return TokenFlexForConditionalGeneration(config).eval()


def assisted(model, draft, inputs, **options):
    return model.generate(**inputs, assistant_model=draft, **{**GENERATION, **LOGITS, **options})


@pytest.mark.parametrize("positions", ["sequential", "shared"])
@pytest.mark.parametrize("kind", ["itself", "another", "text alone"])
@pytest.mark.parametrize("given", ["pixel_values", "encoded_images"])
def test_a_draft_changes_no_token(positions, kind, given):
    model, inputs = model_with(positions), two_images()
    expected = model.generate(**inputs, **{**GENERATION, **LOGITS, "max_new_tokens": 12})
    if kind == "text alone":
        draft = AutoModelForCausalLM.from_config(text_config()).eval()
    else:
        draft = model_with(positions) if kind == "itself" else draft_model()
    if given == "encoded_images":
        inputs["encoded_images"] = model.encode_images(inputs.pop("pixel_values"))
    assert_same(assisted(model, draft, inputs, max_new_tokens=12), expected)


@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
@pytest.mark.parametrize("positions", ["sequential", "shared"])
def test_a_draft_sees_the_images_at_their_counts(positions, chunks):
    """The same model as its own draft proposes what it would have said: few passes are enough."""
    model, draft, inputs = model_with(positions), model_with(positions), two_images()
    draft.generation_config.num_assistant_tokens = 11
    draft.generation_config.assistant_confidence_threshold = 0.0
    passes = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    expected = model.generate(**inputs, **{**GENERATION, **LOGITS, "max_new_tokens": 12})
    assert len(passes) == 12
    passes.clear()
    assert_same(assisted(model, draft, inputs, max_new_tokens=12, **chunks), expected)
    assert len(passes) <= 2


def test_a_draft_of_a_model_that_chooses_counts():
    model = tiny_model(trained_num_image_tokens=[4, 9, 16])
    inputs = {"input_ids": torch.tensor([[5, IMAGE, 6]]), "pixel_values": pixels(1)}
    expected = model.generate(**inputs, budget=9, **GENERATION)
    got = model.generate(**inputs, budget=9, assistant_model=draft_model(), **GENERATION)
    assert torch.equal(got, expected)


def test_prompt_lookup_proposes_no_placeholder():
    model, inputs = tiny_model(), two_images()
    expected = model.generate(**inputs, **{**GENERATION, "max_new_tokens": 12})
    options = {**GENERATION, "max_new_tokens": 12, "prompt_lookup_num_tokens": 4}
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize(
    ("draft", "given", "words"),
    [
        (lambda: draft_model(image_token_id=4), "pixel_values", "image_token_id, 3, got 4"),
        (lambda: draft_model(), "mm_encoder_outputs", "assistant_model.*mm_encoder_outputs"),
        (lambda: draft_model(), "inputs_embeds", "assistant_model.*input_ids"),
    ],
)
def test_drafts_that_cannot_see_the_images_are_refused(draft, given, words):
    model, inputs = tiny_model(), two_images()
    if given == "mm_encoder_outputs":
        counts = inputs.pop("num_image_tokens")
        images = model.get_image_features(inputs.pop("pixel_values"), counts)
        inputs["mm_encoder_outputs"] = {"image": images}
    if given == "inputs_embeds":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match=words):
        assisted(model, draft(), inputs)


def test_features_of_another_encoder_are_refused_for_a_draft():
    model, draft, inputs = tiny_model(), draft_model(), two_images()
    draft.config.vision_config.hidden_size = 48
    inputs["encoded_images"] = model.encode_images(inputs.pop("pixel_values"))
    with pytest.raises(ValueError, match=r"encoded_images.*width 48.*32.*pixel_values"):
        assisted(model, draft, inputs)


# ---- the placeholder is never an answer


def test_a_saved_model_tells_servers_not_to_generate_the_placeholder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens == [IMAGE]
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.suppress_tokens == [IMAGE]


def test_from_parts_adds_the_placeholder_to_what_is_suppressed_already():
    language = AutoModelForCausalLM.from_config(text_config())
    language.generation_config.suppress_tokens = [9, 1]
    assert around(language).generation_config.suppress_tokens == [1, IMAGE, 9]
    assert language.generation_config.suppress_tokens == [9, 1]


def prefer(model: TokenFlexForConditionalGeneration, first: int, second: int) -> None:
    def change_logits(_head, _inputs, logits):
        logits[..., first], logits[..., second] = 200, 100
        return logits

    model.lm_head.register_forward_hook(change_logits)


def with_another_placeholder(added: int = VOCABULARY + 1):
    """A model whose placeholder was added to the vocabulary, as docs/models.md says, and inputs."""
    model = tiny_model()
    model.resize_token_embeddings(VOCABULARY + 6)
    model.config.image_token_id = added
    inputs = two_images()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, added)
    return model, inputs


def answers(model, inputs, **options) -> set[int]:
    ids = model.generate(**inputs, **{**GENERATION, **options})
    return set(ids[:, inputs["input_ids"].shape[1] :].flatten().tolist())


@pytest.mark.parametrize("models_own", [None, [], [9], [IMAGE], [9, IMAGE]])
def test_another_placeholder_takes_the_place_of_the_one_that_was_suppressed(models_own, tmp_path):
    added = VOCABULARY + 1
    model, inputs = with_another_placeholder(added)
    if models_own is not None:
        model.generation_config.suppress_tokens = models_own
    expected = sorted({*(models_own or []), added} - {IMAGE})
    prefer(model, added, 7)
    assert answers(model, inputs) == {7}
    assert model.generation_config.suppress_tokens == expected
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens == expected


def test_a_model_that_is_saved_at_once_suppresses_its_new_placeholder(tmp_path):
    model, _ = with_another_placeholder(VOCABULARY + 1)
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens == [VOCABULARY + 1]


def test_the_former_placeholder_stays_suppressed_where_the_caller_adds_it():
    model, inputs = with_another_placeholder(VOCABULARY + 1)
    model.generate(**inputs, **GENERATION)
    model.generation_config.suppress_tokens = [IMAGE]
    model.generate(**inputs, **GENERATION)
    assert model.generation_config.suppress_tokens == [IMAGE, VOCABULARY + 1]


def test_a_copy_of_the_generation_config_follows_the_placeholder():
    """Pipelines hold such a copy, made before the placeholder changed."""
    model = tiny_model()
    copied = copy.deepcopy(model.generation_config)
    changed = copy.deepcopy(model.generation_config)
    changed.suppress_tokens = [9, IMAGE]
    model, inputs = with_another_placeholder(VOCABULARY + 1)
    prefer(model, VOCABULARY + 1, 7)
    for config in (copied, changed, GenerationConfig()):
        before = config.suppress_tokens
        assert answers(model, inputs, generation_config=config) == {7}
        assert config.suppress_tokens == before
    prefer(model, IMAGE, 7)
    assert answers(model, inputs, generation_config=copied) == {IMAGE}


def test_a_list_of_the_call_is_kept():
    model, inputs = with_another_placeholder(VOCABULARY + 1)
    prefer(model, VOCABULARY + 1, 7)
    for options in (
        {"suppress_tokens": [9]},
        {"generation_config": GenerationConfig(suppress_tokens=[9])},
        {"generation_config": GenerationConfig(suppress_tokens=[])},
    ):
        assert answers(model, inputs, **options) == {VOCABULARY + 1}


@pytest.mark.parametrize("own", [None, [9]])
def test_an_older_checkpoint_learns_what_to_suppress(tmp_path, own):
    """Checkpoints were saved without it once, or have a list of their own."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "older")
    GenerationConfig(suppress_tokens=own).save_pretrained(tmp_path / "older")
    expected = sorted({*(own or []), IMAGE})
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path / "older")
    assert loaded.generation_config.suppress_tokens == expected
    loaded.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").suppress_tokens == expected


# ---- the placeholder and the vocabulary


@pytest.mark.parametrize("placeholder", [-200, -1, VOCABULARY, VOCABULARY + 5])
def test_a_placeholder_without_an_embedding_is_refused(placeholder):
    with pytest.raises(ValueError, match=f"image_token_id.*{VOCABULARY - 1}.*{placeholder}"):
        tiny_model(image_token_id=placeholder)


def test_a_checkpoint_with_a_wrong_placeholder_says_how_to_correct_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "image_token_id": VOCABULARY}))
    with pytest.raises(ValueError, match=r"63.*64.*correct image_token_id in its config\.json"):
        TokenFlexForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_an_added_placeholder_works_once_the_embeddings_have_its_row(tied):
    config = tiny_config()
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied
    model = TokenFlexForConditionalGeneration(config).eval()
    inputs, added = two_images(), VOCABULARY
    expected = model.generate(**inputs, **GENERATION)
    model.resize_token_embeddings(VOCABULARY + 1)
    model.config.image_token_id = added
    # As the new row might be the likeliest otherwise.
    options = {**GENERATION, "suppress_tokens": [IMAGE, added]}
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, added)
    got = model.generate(**{**inputs, "input_ids": ids}, **options)
    assert torch.equal(got[:, ids.shape[1] :], expected[:, ids.shape[1] :])


def test_a_language_model_may_be_resized_before_it_gets_its_placeholder():
    language = AutoModelForCausalLM.from_config(text_config())
    vision = AutoModel.from_config(vision_config())
    config = TokenFlexConfig(vision.config, language.config, image_token_id=VOCABULARY)
    with pytest.raises(ValueError, match=r"image_token_id.*resize_token_embeddings"):
        TokenFlexForConditionalGeneration.from_parts(config, vision, language)
    language.resize_token_embeddings(VOCABULARY + 1)
    model = TokenFlexForConditionalGeneration.from_parts(config, vision, language).eval()
    ids = torch.tensor([[5, *[VOCABULARY] * 4, 6]])
    answer = model.generate(input_ids=ids, pixel_values=pixels(1), num_image_tokens=4, **GENERATION)
    assert VOCABULARY not in answer[0, ids.shape[1] :]


def test_an_embedding_that_would_lose_the_placeholder_is_not_cut():
    model = tiny_model(image_token_id=40)
    with pytest.raises(ValueError, match=r"image_token_id.*39.*40"):
        model.resize_token_embeddings(40)
    assert model.resize_token_embeddings(41).num_embeddings == 41
    assert model.resize_token_embeddings(39, pad_to_multiple_of=8 * 6).num_embeddings == 48


def test_a_placeholder_that_was_changed_is_refused_however_it_is_asked():
    model = tiny_model()
    model.config.image_token_id = VOCABULARY
    inputs = two_images()
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, VOCABULARY)
    plan = plan_packing([ids[0].tolist()], [9, 16], VOCABULARY, expanded=True)
    with pytest.raises(ValueError, match=r"image_token_id.*63.*64"):
        model(**{**inputs, "input_ids": ids})
    with pytest.raises(ValueError, match=r"image_token_id.*63.*64"):
        model(plan=plan, **{k: v for k, v in inputs.items() if k != "input_ids"})
    with pytest.raises(ValueError, match=r"image_token_id.*63.*64"):
        model.generate(**{**inputs, "input_ids": ids}, **GENERATION)


# ---- the order of images once prompts are repeated

TEXT = IMAGE + 1


def prompts_of_runs(*rows: list[int]) -> torch.Tensor:
    """Prompts of one length; each number is a run of as many placeholders, then text."""
    ids = [[token for run in row for token in [*[IMAGE] * run, TEXT]] for row in rows]
    length = max(map(len, ids))
    return torch.tensor([[TEXT] * (length - len(row)) + row for row in ids])


@pytest.mark.parametrize(
    ("rows", "counts", "expected"),
    [
        ([[4], [9]], [4, 9], [0, 0, 1, 1]),
        ([[4, 9]], [4, 9], [0, 1, 0, 1]),
        ([[4, 4], [4]], [4, 4, 4], [0, 1, 0, 1, 2, 2]),
        ([[8], [4]], [4, 4, 4], [0, 1, 0, 1, 2, 2]),  # two tiles of one image
        ([[], [4], []], [4], [0, 0]),
        ([[], []], [], []),
    ],
)
def test_images_of_a_prompt_stay_together(rows, counts, expected):
    assert repeated_images(prompts_of_runs(*rows) == IMAGE, counts, 2) == expected


def test_images_without_placeholders_are_kept_for_the_forward_to_refuse():
    assert repeated_images(prompts_of_runs([4], [4]) == IMAGE, [4, 4, 4], 2) == [0, 0, 1, 2, 1, 2]
