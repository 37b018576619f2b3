"""Conventions that converted models share with ours: encoded once, counts chosen, one batch.

Every family with a processor runs through ``process_images``, ``encode_images``, ``encode_text``
and ``generate``, which callers use without knowing the kind of model.
"""

from __future__ import annotations

import json
from itertools import groupby

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tests.dropin.processors import image_text, picture, stock_processor
from tests.dropin.test_model import TOLERANCE, logits
from tests.dropin.tiny import stock_model
from tokenflex import TokenCounts, replace_projector
from tokenflex.data.samples import Conversation, Turn
from tokenflex.evaluation.encoding import QuestionEncoder
from tokenflex.models.vision import on_device

GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
BATCH = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
_PAIRS: dict = {}


@pytest.fixture
def name(processor_name: str) -> str:
    return processor_name


def pair(name: str):
    """A converted model and its processor; made once for all tests of a family."""
    if name not in _PAIRS:
        processor = stock_processor(name)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = replace_projector(stock_model(name), processor, num_image_tokens=16)
        _PAIRS.clear()
        _PAIRS[name] = model, processor
    return _PAIRS[name]


def asked(name: str):
    """One image in the first prompt, two of other shapes in the second, where a family can."""
    image = image_text(name)
    first, second, third = picture(1), picture(2, 60, 130), picture(3, 130, 70)
    if name == "got_ocr2":  # one image a prompt
        groups = [[first], [second], [third]]
        return groups, [f"{image} what", f"a {image}", f"{image} is a cat"]
    return [[first], [second, third]], [f"{image} what is this", f"a {image} is {image} a cat"]


def called(processor, name: str, groups, text, counts):
    images = [image for group in groups for image in group] if name == "got_ocr2" else groups
    return processor(images=images, text=text, num_image_tokens=counts, **BATCH)


def test_encoded_once_and_answered_at_several_counts_equals_separate_calls(name):
    model, processor = pair(name)
    groups, text = asked(name)
    data, tiles = processor.process_images(groups)
    encoded = model.encode_images(**on_device(data, model.device))
    assert len(encoded) == sum(tiles)
    for counts in (4, [9, (2, 3), 16]):
        expected = called(processor, name, groups, text, counts)
        inputs = processor.encode_text(text, tiles, num_image_tokens=counts, padding_side="left")
        assert {*expected} - {*data} == {*inputs}
        for key, value in inputs.items():
            same = torch.equal if isinstance(value, torch.Tensor) else (lambda a, b: a == b)
            assert same(value, expected[key]), key
        wanted = model.generate(**expected, **GREEDY)
        assert torch.equal(model.generate(**inputs, encoded_images=encoded, **GREEDY), wanted)
        difference = logits(model, {**inputs, "encoded_images": encoded}) - logits(model, expected)
        assert float(difference.abs().max()) < TOLERANCE


def test_auto_spreads_a_budget_and_answers_as_at_the_chosen_counts(name):
    model, processor = pair(name)
    groups, text = asked(name)
    auto = called(processor, name, groups, text, "auto")
    assert auto["num_image_tokens"] == "auto"
    tiles = auto["tiles_per_image"]
    of_images = iter(tiles)
    of_groups = [[next(of_images) for _ in group] for group in groups]
    budget = max(4 * sum(group) + 12 * min(group) for group in of_groups)  # one more at 16
    output = model.generate(**auto, budget=budget, return_dict_in_generate=True, **GREEDY)
    chosen = output.num_image_tokens
    assert model.choose_counts(**auto, budget=budget)["num_image_tokens"] == chosen
    of_tiles = iter(chosen)
    per_image = [[next(of_tiles) for _ in range(number)] for number in tiles]
    assert all(len({*counts}) == 1 and counts[0] in (4, 16) for counts in per_image)
    rest = iter(per_image)
    spent = [sum(sum(next(rest)) for _ in group) for group in groups]
    assert max(spent) <= budget
    if name != "got_ocr2":  # its images have 2 x 2 cells, which gain nothing at 16
        assert 16 in chosen
    inputs = called(processor, name, groups, text, [counts[0] for counts in per_image])
    new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(output.sequences[:, auto["input_ids"].shape[1] :], new)
    assert torch.equal(output.sequences[:, : auto["input_ids"].shape[1]], auto["input_ids"])
    with pytest.raises(ValueError, match="budget must be at least"):
        model.generate(**auto, budget=3, **GREEDY)


def test_prompts_that_share_their_images_answer_as_each_alone(name):
    model, processor = pair(name)
    groups, text = asked(name)
    shared = [[text[0], f"{text[0]} cat"], *([one] for one in text[1:])]
    inputs = called(processor, name, groups, shared, [9, (2, 3), 16])
    images = sum(map(len, groups))
    assert {*inputs["image_index"]} == {*range(len(inputs["num_image_tokens"]))}
    together = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    beams = model.generate(**inputs, **{**GREEDY, "num_beams": 2})
    assert beams.shape == (len(text) + 1, inputs["input_ids"].shape[1] + 3)
    all_logits = logits(model, inputs)
    counts = iter([[9], [9], *([[(2, 3)], [16]] if images == len(groups) else [[(2, 3), 16]])])
    alone_of = [(groups[0], p) for p in shared[0]] + [
        (group, p) for group, (p,) in zip(groups[1:], shared[1:], strict=True)
    ]
    for row, (group, prompt) in enumerate(alone_of):
        alone = called(processor, name, [group], [prompt], next(counts))
        new = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(together[row], new)
        difference = all_logits[row, -alone["input_ids"].shape[1] :] - logits(model, alone)[0]
        assert float(difference.abs().max()) < TOLERANCE


@pytest.mark.parametrize("start", ["", "<s>"])
def test_a_rendered_chat_has_the_special_tokens_of_the_stock_processor(start):
    processor = stock_processor("llava")
    tokenizer = processor.tokenizer
    bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = bos
    processor.chat_template = f"{start} {processor.chat_template}"[not start :]
    replace_projector(stock_model("llava"), processor, num_image_tokens=4)
    parts = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is"}]
    chat = [{"role": "user", "content": parts}]
    expected = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    assert int((expected == tokenizer.bos_token_id).sum()) == 1
    prompt = processor.apply_chat_template(chat)
    _, tiles = processor.process_images([picture(1)])
    adds = processor.adds_special_tokens(prompt)
    read = processor.encode_text(prompt, tiles, add_special_tokens=adds)["input_ids"]
    assert torch.equal(read, expected)
    ids = QuestionEncoder(processor).prompt_ids(
        Conversation((Turn("user", "what is"),), "kind"), tiles
    )
    assert ids.tolist() == [i for i, _ in groupby(expected[0].tolist())]


def test_draws_of_a_processor_are_one_for_each_prompt():
    processor = stock_processor("llava")
    replace_projector(stock_model("llava"), processor, num_image_tokens=4)
    processor.num_image_tokens = TokenCounts((4, 9, 16), (1, 1, 1))
    assert processor.image_token_counts == processor.num_image_tokens
    _, tiles = processor.process_images([picture(seed) for seed in range(40)])
    inputs = processor.encode_text(["<image> a <image>"] * 20, tiles)
    drawn = inputs["num_image_tokens"]
    assert drawn[::2] == drawn[1::2]
    assert {*drawn} == {4, 9, 16}


def test_a_stock_processor_with_a_number_of_that_name_keeps_it(tmp_path):
    processor = stock_processor("janus")
    replace_projector(stock_model("janus"), processor, num_image_tokens=4)
    assert processor.num_image_tokens == 4
    assert processor(images=picture(1), text="<image_placeholder>")["num_image_tokens"] == [4]
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_image_tokens"] == 64


def test_what_does_not_fit_together_is_refused():
    model, processor = pair("llava")
    data, tiles = processor.process_images([picture(1)])
    encoded = model.encode_images(**data)
    inputs = processor.encode_text("what <image>", tiles, num_image_tokens=4)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="give the images as one of pixel_values"):
            call(**inputs, **data, encoded_images=encoded)
        with pytest.raises(ValueError, match="give the images with it"):
            call(**inputs, image_index=[0])
    with pytest.raises(ValueError, match="must name each of the 1 images"):
        model(**inputs, encoded_images=encoded, image_index=[1])
    with pytest.raises(TypeError, match="image_sises is no image input of llava, which takes"):
        model.encode_images(data["pixel_values"], image_sises=[(1, 2)])
    with pytest.raises(ValueError, match="grids are for TokenFLEX models"):
        model.encode_images(data["pixel_values"], (8, 8))
    with pytest.raises(ValueError, match="'auto' is for generate"):
        model(**processor(images=picture(1), text="<image>", num_image_tokens="auto", **BATCH))
    with pytest.raises(TypeError, match="what process_images returned"):
        processor.encode_text("what <image>", [1], num_image_tokens=4)
    with pytest.raises(ValueError, match="max_tiles is for TokenFLEX models, got 2"):
        processor.process_images([picture(1)], max_tiles=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"get_text_with_replacements": lambda *_, **__: {}["rows"]}, "KeyError: 'rows'"),
        ({"_process_images": lambda *_, **__: ({}, ["<image>"])}, "in a way of its own"),
    ],
)
def test_a_processor_that_needs_images_and_prompts_together_says_so(monkeypatch, changes, words):
    _, processor = pair("llava")
    _, tiles = processor.process_images([picture(1)])
    for method, replacement in changes.items():
        monkeypatch.setattr(type(processor), method, replacement)
    with pytest.raises(ValueError, match="cannot be processed apart from their prompts") as error:
        processor.encode_text("what <image>", tiles, num_image_tokens=4)
    assert words in str(error.value)
