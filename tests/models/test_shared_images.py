"""Several prompts about one image, which is processed and encoded once."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.models.test_modeling import GENERATION, SEARCHES, CallCounter
from tests.models.test_tiling import tiling_processor
from tests.models.tiny import IMAGE, picture, tiny_model
from tests.routing.planted import FixedRouter
from tokenflex.digits.processor import digits_processor
from tokenflex.routing.cascade import generate_with_escalation
from tokenflex.routing.storage import attach_router

A, B = picture(1), picture(2, (32, 64))
GROUPS = [["<image> odd", "read r1c1 <image>", "<image> count odd"], ["<image> majority"]]
FLAT = [prompt for group in GROUPS for prompt in group]
REPEATED = [A, A, A, B]


@pytest.fixture
def model():
    return tiny_model(trained_num_image_tokens=[4, 9, 16, (2, 3)])


@pytest.fixture(params=[digits_processor, lambda: tiling_processor(6, use_thumbnail=True)])
def processor(request):
    return request.param()


class Pixels:
    """Counts the tiles that an encoder sees."""

    def __init__(self, model) -> None:
        self.tiles: list[int] = []
        model.model.vision_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs) -> None:
        self.tiles.append(len(kwargs["pixel_values"]))


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
@pytest.mark.parametrize("counts", [4, [9, (2, 3)]], ids=["one count", "mixed"])
def test_answers_are_those_of_each_prompt_alone(model, processor, counts, search):
    per_image = [counts] * 2 if isinstance(counts, int) else counts
    inputs = processor(images=[A, B], text=GROUPS, num_image_tokens=counts)
    seen = Pixels(model)
    answers = model.generate(**inputs, **GENERATION, **search)[:, inputs["input_ids"].shape[1] :]
    tiles = len(inputs["pixel_values"])
    assert seen.tiles == [tiles]
    assert tiles == len(processor(images=[A, B], text="<image><image>")["pixel_values"])
    alone = []
    for prompt, image in zip(FLAT, REPEATED, strict=True):
        count = per_image[0 if image is A else 1]
        one = processor(images=image, text=prompt, num_image_tokens=count)
        output = model.generate(**one, **GENERATION, **search)
        alone += [*output[:, one["input_ids"].shape[1] :]]
    assert torch.equal(answers, torch.stack(alone))


def test_inputs_are_those_of_repeated_images_but_for_the_pixels(model, processor):
    inputs = processor(images=[A, B], text=GROUPS, num_image_tokens=[16, 4])
    repeated = processor(images=REPEATED, text=FLAT, num_image_tokens=[16, 16, 16, 4])
    assert torch.equal(inputs["input_ids"], repeated["input_ids"])
    assert torch.equal(inputs["attention_mask"], repeated["attention_mask"])
    assert torch.equal(inputs["pixel_values"][inputs["image_index"]], repeated["pixel_values"])
    with torch.no_grad():
        output, expected = model(**inputs), model(**repeated)
    assert torch.allclose(output.logits, expected.logits, atol=1e-5)
    assert torch.allclose(output.image_hidden_states, expected.image_hidden_states, atol=1e-5)


def test_gradients_of_a_shared_image_add_up(model):
    processor = digits_processor()
    losses = []
    for inputs in (
        processor(images=[A, B], text=GROUPS, num_image_tokens=[16, 4]),
        processor(images=REPEATED, text=FLAT, num_image_tokens=[16, 16, 16, 4]),
    ):
        model.zero_grad()
        ignored = (inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0)
        model(**inputs, labels=inputs["input_ids"].masked_fill(ignored, -100)).loss.backward()
        losses.append([p.grad.clone() for p in model.model.vision_model.parameters()])
    for shared, repeated in zip(*losses, strict=True):
        torch.testing.assert_close(shared, repeated, rtol=1e-4, atol=1e-6)


def test_several_images_a_group_and_none(model, processor):
    groups = [["<image> odd <image>", "odd <image> <image>"], ["odd", "count"], ["<image> red"]]
    inputs = processor(images=[[A, B], [], [B]], text=groups, num_image_tokens=[4, 9, 16])
    flat = [prompt for group in groups for prompt in group]
    images = [[A, B], [A, B], [], [], [B]]
    repeated = processor(images=images, text=flat, num_image_tokens=[4, 9, 4, 9, 16])
    assert torch.equal(inputs["input_ids"], repeated["input_ids"])
    answers = model.generate(**inputs, **GENERATION)
    assert torch.equal(answers, model.generate(**repeated, **GENERATION))
    assert processor(images=[A, A, B], text=[*groups[:1], *groups[2:]])["image_index"]
    assert "image_index" not in processor(text=[["odd"], ["count"]])


@pytest.mark.parametrize("source", ["encoded_images", "mm_encoder_outputs", "pixel_values"])
@pytest.mark.parametrize("extra", [{}, {"prefill_chunk_size": 5}, {"use_cache": False}])
def test_images_that_are_encoded_already(model, processor, source, extra):
    data, tiles = processor.process_images([A, B])
    inputs = processor.encode_text(GROUPS, tiles, num_image_tokens=[16, 4])
    expected = model.generate(
        **processor(images=REPEATED, text=FLAT, num_image_tokens=[16, 16, 16, 4]), **GENERATION
    )
    encoded = model.encode_images(data["pixel_values"])
    images = {
        "pixel_values": data["pixel_values"],
        "encoded_images": encoded,
        "mm_encoder_outputs": {
            "image": model.get_image_features(
                encoded_images=encoded, num_image_tokens=inputs["num_image_tokens"]
            )
        },
    }[source]
    answers = model.generate(**inputs, **{source: images}, **GENERATION, **extra)
    assert torch.equal(answers, expected)


def test_a_draft_sees_the_images_where_they_are_shown(model):
    processor = digits_processor()
    inputs = processor(
        images=A, text=[["<image> odd", "<image> count odd"][:1]], num_image_tokens=9
    )
    expected = model.generate(**inputs, **GENERATION)
    draft = tiny_model(seed=3)
    assert torch.equal(model.generate(**inputs, **GENERATION, assistant_model=draft), expected)


def test_conversations_share_the_images_of_the_first(model, tmp_path):
    processor = digits_processor()

    def ask(text: str, image=None) -> list[dict]:
        part = {"type": "image"} | ({} if image is None else {"image": image})
        return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]

    options = {"tokenize": True, "return_dict": True, "num_image_tokens": [9, 4]}
    groups = [[ask(" odd", A), ask(" count", A), ask(" red")], [ask(" majority", B)]]
    inputs = processor.apply_chat_template(groups, **options)
    flat = [ask(" odd", A), ask(" count", A), ask(" red", A), ask(" majority", B)]
    options["num_image_tokens"] = [9, 9, 9, 4]
    expected = processor.apply_chat_template(flat, **options)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert inputs["image_index"] == [0, 0, 0, 1]
    assert torch.equal(
        model.generate(**inputs, **GENERATION), model.generate(**expected, **GENERATION)
    )
    texts = processor.apply_chat_template(groups)
    assert [len(group) for group in texts] == [3, 1]
    assert [*texts[0], *texts[1]] == processor.apply_chat_template(flat)
    beside = [
        [[{"role": "user", "content": "<image> odd"}], [{"role": "user", "content": "odd <image>"}]]
    ]
    inputs = processor.apply_chat_template(beside, tokenize=True, return_dict=True, images=[A])
    assert inputs["image_index"] == [0, 0]
    A.save(tmp_path / "a.png")  # paths from JSON are equal, not one object
    paths = [str(tmp_path / "a.png"), str(tmp_path) + "/a.png"]
    assert paths[0] is not paths[1]
    options["num_image_tokens"] = 4
    shared = processor.apply_chat_template([[ask(" odd", path) for path in paths]], **options)
    assert shared["image_index"] == [0, 0]
    with pytest.raises(ValueError, match=r"conversation\[0\]\[1\] must show the images of"):
        processor.apply_chat_template([[ask(" odd", A), ask(" odd", B)]], **options)
    with pytest.raises(ValueError, match=r"conversation\[1\] must be a list of conversations"):
        processor.apply_chat_template([[ask(" odd", A)], ask(" odd", B)], **options)


# ---- chosen counts


@pytest.mark.parametrize("budget", [None, 20])
def test_each_prompt_chooses_its_own_count(model, processor, budget):
    attach_router(model, FixedRouter([0, 0.5, 0.6], [0.5, 0, 0], [0.1, 0.9, 0.2]))
    options = {**GENERATION, "return_dict_in_generate": True}
    options |= {"penalty": 0.1} if budget is None else {"budget": budget * 7}
    inputs = processor(images=[A, B], text=GROUPS, num_image_tokens="auto")
    seen = Pixels(model)
    answers = model.generate(**inputs, **options)
    assert seen.tiles == [len(inputs["pixel_values"])]
    repeated = processor(images=REPEATED, text=FLAT, num_image_tokens="auto")
    expected = model.generate(**repeated, **options)
    assert torch.equal(answers.sequences, expected.sequences)
    assert answers.num_image_tokens == expected.num_image_tokens
    assert len({*answers.num_image_tokens}) > 1 or budget
    del inputs["num_image_tokens"]
    cascade = generate_with_escalation(model, threshold=0.0, **inputs, max_new_tokens=2)
    assert len(cascade.new_tokens) == len(FLAT)


# ---- refused


@pytest.mark.parametrize(
    ("images", "text", "error", "words"),
    [
        ([A, B], [["<image>", "<image> <image>"]], ValueError, r"text\[0\].*got \[1, 2\]"),
        ([A, B], [["<image>"], "<image>"], TypeError, r"text\[1\] must be a list as others are"),
        ([A], [["<image>", 3]], TypeError, r"text\[0\]\[1\] must be a string, got int"),
        ([A], [["<image>"], []], ValueError, r"text\[1\] must hold at least one prompt"),
        ([A, B], [["<image>", "<image>"]], ValueError, "got 1 .* for 2 images"),
        ([[A], [B]], [["<image> <image>"]], ValueError, r"got \[2\] for \[1, 1\] images"),
    ],
)
def test_prompts_that_do_not_fit_their_images(images, text, error, words):
    with pytest.raises(error, match=words):
        digits_processor()(images=images, text=text)


@pytest.mark.parametrize("index", [[0, 0, 0], [0, 1, 2], [0, 1, -1], [0.5, 1, 1]])
def test_an_index_of_other_images_is_refused(model, index):
    inputs = digits_processor()(images=[A, B], text=GROUPS, num_image_tokens=4)
    inputs["image_index"] = index
    for call in (model, model.generate):
        with pytest.raises((ValueError, TypeError), match="image_index"):
            call(**inputs)


def test_an_index_without_images_or_beside_a_plan_is_refused(model):
    ids = torch.tensor([[5, 6]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="give the images"):
            call(input_ids=ids, image_index=[0])
    with pytest.raises(ValueError, match="give the images"):
        model.choose_counts(ids, image_index=[0], budget=4)


def test_counts_that_do_not_fit_the_shown_images_are_named(model):
    inputs = digits_processor()(images=[A, B], text=GROUPS, num_image_tokens=[4, 9])
    inputs["image_index"] = [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"per image \[4, 4, 9, 9\]"):
        model(**inputs)


def test_outputs_of_the_caller_stay_as_they_are(model):
    inputs = digits_processor()(images=[A, B], text=GROUPS, num_image_tokens=4)
    del inputs["pixel_values"]
    outputs = BaseModelOutputWithPooling(pooler_output=[torch.zeros(4, 32), torch.ones(4, 32)])
    model.generate(**inputs, mm_encoder_outputs={"image": outputs}, **GENERATION)
    assert len(outputs.pooler_output) == 2


def test_the_encoder_runs_once_a_call(model):
    inputs = digits_processor()(images=[A, B], text=GROUPS, num_image_tokens=4)
    counter = CallCounter(model.model.vision_model)
    model.generate(**inputs, **GENERATION)
    assert counter.calls == 1
