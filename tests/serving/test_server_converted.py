"""Converted stock models behind the server: answers are those of ``generate``, counts mixed."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from tests.dropin.processors import NEED_TORCHVISION, PROCESSORS, picture, stock_processor
from tests.dropin.tiny import one_of_each_kind, stock_model
from tests.serving.server_tools import chat, data_url, image_part, running
from tests.serving.test_server_batching import Harness
from tokenflex import from_pretrained, replace_projector
from tokenflex.serving.server.chat_request import Limits, RequestError, parse_request
from tokenflex.serving.server.served import ConvertedServed, load_served

QUESTION = "what is"
WITHOUT_CHATS = {"got_ocr2"}  # transformers' chats give its processor images that it refuses
SERVED = one_of_each_kind(
    [n for n in ("llava", *PROCESSORS) if n not in {*NEED_TORCHVISION, *WITHOUT_CHATS}]
)


def converted(name: str) -> ConvertedServed:
    model, processor = stock_model(name), stock_processor(name)
    replace_projector(model, processor, num_image_tokens=9)
    return ConvertedServed(model, processor, Limits(), 2**24)


def alone(served: ConvertedServed, seeds, counts, max_tokens: int = 6) -> str:
    content = [{"type": "image", "image": picture(seed)} for seed in seeds]
    content.append({"type": "text", "text": QUESTION})
    inputs = served.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        num_image_tokens=counts,
    )
    inputs.pop("labels", None)
    output = served.model.generate(
        **inputs, **served.special_tokens, do_sample=False, max_new_tokens=max_tokens
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    return served.processor.tokenizer.decode(new, skip_special_tokens=True)


def part(seed: int, **settings):
    return image_part(data_url(picture(seed)), **settings)


@pytest.mark.parametrize("name", SERVED)
def test_a_mixed_batch_answers_as_generate_does(name):
    served = converted(name)
    cases = [([1], [4]), ([2], [(2, 3)]), ([1], [16]), ([3, 1], [9, 4])]
    harness = Harness(served)
    for seeds, counts in cases:
        entries = [list(n) if isinstance(n, tuple) else n for n in counts]
        harness.submit(chat(*map(part, seeds), question=QUESTION, num_image_tokens=entries))
    answers = harness.run()
    assert [a.texts[0] for a in answers] == [alone(served, *case) for case in cases]
    assert harness.metrics.batch_rows.number == 1
    assert [a.usage["encoder_passes"] for a in answers] == [1, 1, 0, 2]
    for answer, (_, counts) in zip(answers, cases, strict=True):
        cells = [n if isinstance(n, int) else n[0] * n[1] for n in counts]
        tokens = answer.usage["image_tokens"]
        assert [t % n for t, n in zip(tokens, cells, strict=True)] == [0] * len(cells)


def test_pictures_of_one_color_and_two_shapes_are_told_apart():
    """Their patches are the same numbers: what is kept of one must not answer for the other."""
    served = converted("qwen2_vl")
    harness = Harness(served)
    for size in ((64, 16), (16, 64), (64, 16)):
        url = data_url(Image.new("RGB", size, "gray"))
        harness.submit(chat(image_part(url), question=QUESTION, num_image_tokens=1))
    waiting = [job.prompt.inputs for job in harness.batcher._waiting]
    assert torch.equal(waiting[0]["pixel_values"], waiting[1]["pixel_values"])
    assert not torch.equal(waiting[0]["image_grid_thw"], waiting[1]["image_grid_thw"])
    assert [answer.usage["encoder_passes"] for answer in harness.run()] == [1, 1, 0]


def test_a_saved_conversion_is_served(tmp_path):
    served = converted("llava")
    served.model.save_pretrained(tmp_path)
    served.processor.save_pretrained(tmp_path)
    loaded = load_served(tmp_path, counts=[4, 16])
    assert isinstance(loaded, ConvertedServed)
    model, _ = from_pretrained(tmp_path)
    assert type(loaded.model) is type(model)
    with running(loaded) as client:
        answer = client.post(chat(part(1), question=QUESTION))
        assert answer.text == alone(served, [1], [9])
        assert answer.usage["image_tokens"] == [9]
        low = client.post(chat(part(1, detail="low"), question=QUESTION))
        assert (low.usage["image_tokens"], low.usage["encoder_passes"]) == ([4], 0)
        text = {"messages": [{"role": "user", "content": "what is"}], "max_tokens": 3}
        assert client.post(text).usage["image_tokens"] == []
        beyond = client.post(chat(part(1), num_image_tokens=100))
        assert beyond.status == 400
        assert "8 x 8" in beyond.error["message"]
        assert client.post(chat(part(1), num_image_tokens=5)).status == 400
        assert client.post(chat(question="what <image>")).status == 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (chat(part(1), num_image_tokens="auto"), "router"),
        (chat(part(1), budget=9, num_image_tokens=16), "at least 16"),
        (chat(part(1, detail="high")), "--counts"),
    ],
)
def test_what_needs_our_own_model_is_refused(body, words):
    served = converted("llava")
    request = parse_request(json.dumps(body).encode(), served.limits, served.defaults)
    with pytest.raises(RequestError, match=words):
        served.prepare(request)


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen3_vl", "gemma3"])
def test_a_budget_is_spread_as_generate_spreads_it(name):
    served = converted(name)
    _, (tiles, other) = served.processor.process_images([[picture(1), picture(3)]])
    assert tiles == other == (5 if name == "idefics3" else 1)  # the same for both pictures
    harness = Harness(served)
    harness.submit(chat(part(1), part(3), question=QUESTION, budget=12 * tiles))
    fixed = part(1, num_image_tokens=4)
    harness.submit(chat(fixed, part(3), question=QUESTION, budget=13 * tiles))
    both, one = harness.run()
    chosen = [tokens // tiles for tokens in both.usage["image_tokens"]]
    assert sorted(chosen) == [1, 9]
    assert both.texts[0] == alone(served, [1, 3], chosen)
    assert one.usage["image_tokens"] == [4 * tiles, 9 * tiles]
    assert one.texts[0] == alone(served, [1, 3], [4, 9])


def test_a_budget_bounds_fixed_counts_of_a_converted_model():
    served = converted("internvl")  # which cuts pictures into tiles
    harness = Harness(served)
    harness.submit(chat(part(1), question=QUESTION, num_image_tokens=4, budget=4))
    (answer,) = harness.run()
    assert answer.usage["vision_tokens"] == 4
