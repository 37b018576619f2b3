"""One question at several counts: the encoder runs once, and the times add up."""

from __future__ import annotations

import sys
import time
from collections import Counter

import pytest

from tests.models.test_modeling import GENERATION, CallCounter
from tests.models.test_ristretto import released_tensors, write_release
from tests.models.test_tiling import tiling_processor
from tests.models.tiny import picture, tiny_model
from tests.routing.planted import FixedRouter
from tokenflex.answers import answer_at_counts
from tokenflex.cli import main
from tokenflex.digits.processor import digits_processor
from tokenflex.routing.storage import attach_router

COUNTS = (4, (2, 3), 16)


def test_answers_are_those_of_separate_calls_and_the_encoder_runs_once():
    model, processor = tiny_model(), digits_processor()
    images, prompt = [picture(1), picture(2)], "<image> odd <image> read"
    expected = []
    for count in COUNTS:
        inputs = processor(images=images, text=prompt, num_image_tokens=count)
        output = model.generate(**inputs, **GENERATION)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(output, skip_special_tokens=True).strip())
    encoder = CallCounter(model.model.vision_model)
    answers = list(answer_at_counts(model, processor, images, [prompt], COUNTS, max_new_tokens=4))
    assert encoder.calls == 1
    assert [answer.text for answer in answers] == expected
    assert [answer.vision_tokens for answer in answers] == [8, 12, 32]


@pytest.mark.parametrize("options", [{}, {"confidence": 0.5}, {"budget": 40}])
def test_several_prompts_are_answered_as_each_alone_and_the_encoder_runs_once(options):
    model, processor = tiny_model(trained_num_image_tokens=[4, 16]), tiling_processor(6)
    images = [picture(1, (32, 64)), picture(2)]
    prompts = ["<image> odd <image>", "<image> <image> read r1c1 odd"]
    counts = (4, "auto") if options else COUNTS
    alone = [
        [*answer_at_counts(model, processor, images, [prompt], counts, max_new_tokens=4, **options)]
        for prompt in prompts
    ]
    encoder = CallCounter(model.model.vision_model)
    answers = [
        *answer_at_counts(model, processor, images, prompts, counts, max_new_tokens=4, **options)
    ]
    assert encoder.calls == 1
    expected = [answer for of_count in zip(*alone, strict=True) for answer in of_count]
    for name in ("text", "vision_tokens", "read_vision_tokens"):
        assert [getattr(a, name) for a in answers] == [getattr(a, name) for a in expected]
    assert answers[0].seconds == answers[1].seconds > 0


def test_images_are_processed_once_for_all_counts(monkeypatch):
    model, processor = tiny_model(trained_num_image_tokens=[4, 16]), tiling_processor(6)
    calls = Counter()

    def count_calls(frame, event, _):
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(count_calls)
    try:
        ask = (model, processor, [picture(1, (32, 64)), picture(2)], ["<image> odd <image>"])
        answers = list(answer_at_counts(*ask, (4, (2, 3), "auto", 16), max_new_tokens=2, budget=40))
    finally:
        sys.setprofile(None)
    assert len(answers) == 4
    assert calls["ImagePreparation.process_images"] == 1
    assert calls["cut_tiles"] == 2


def test_each_answers_time_is_that_of_its_own_call_with_the_encoding(monkeypatch):
    model, processor = tiny_model(), digits_processor()
    slow = {"encode": 0.15, "prefill": 0.1, "step": 0.05}
    encode = model.model.vision_model.forward
    decode = model.model.language_model.forward

    def slow_encode(*args, **kwargs):
        time.sleep(slow["encode"])
        return encode(*args, **kwargs)

    def slow_decode(*args, **kwargs):
        first = kwargs["inputs_embeds"].shape[1] > 1
        time.sleep(slow["prefill" if first else "step"])
        return decode(*args, **kwargs)

    model.model.vision_model.forward = slow_encode
    model.model.language_model.forward = slow_decode
    monkeypatch.setattr(model.generation_config, "eos_token_id", -1)  # never: four tokens
    for answer in answer_at_counts(
        model, processor, [picture(1)], ["<image> odd"], (4, 9), max_new_tokens=4
    ):
        assert answer.first_token_seconds >= 0.25
        assert answer.seconds >= answer.first_token_seconds + 0.15


def test_tiles_are_encoded_once_too():
    model, processor = tiny_model(), tiling_processor(6, use_thumbnail=True)
    encoder = CallCounter(model.model.vision_model)
    images = [picture(1, (64, 96))]
    answers = list(answer_at_counts(model, processor, images, ["<image> odd"], (1, 4)))
    assert [answer.vision_tokens for answer in answers] == [7, 28]
    assert encoder.calls == 1
    (uncut,) = answer_at_counts(model, processor, images, ["<image> odd"], (4,), max_tiles=1)
    assert uncut.vision_tokens == 4


def test_auto_answers_what_its_count_does_and_the_encoder_runs_once():
    model, processor = tiny_model(), tiling_processor(6)
    attach_router(model, FixedRouter([0, 0.5, 0.6], [0.5, 0, 0]))
    ask = (model, processor, [picture(1, (32, 64)), picture(2)], ["<image> odd <image>"])
    encoder = CallCounter(model.model.vision_model)
    by_counts = list(answer_at_counts(*ask, ([16, 4], "auto", 9), max_new_tokens=4))
    assert encoder.calls == 1
    assert [answer.vision_tokens for answer in by_counts] == [36, 36, 27]
    assert by_counts[1].text == by_counts[0].text
    (cheap,) = answer_at_counts(*ask, ("auto",), max_new_tokens=4, penalty=0.5)
    assert cheap.vision_tokens == 22
    assert cheap.text == next(answer_at_counts(*ask, ([9, 4],), max_new_tokens=4)).text


def test_a_cascade_answers_as_its_last_try_and_adds_up_all_of_them():
    model = tiny_model(trained_num_image_tokens=[4, 9, 16])
    processor = tiling_processor(6)
    ask = (model, processor, [picture(1, (32, 64)), picture(2)], ["<image> odd <image>"])
    encoder = CallCounter(model.model.vision_model)
    options = {"max_new_tokens": 4, "confidence": 1.0}
    largest, never_sure = answer_at_counts(*ask, (16, "auto"), **options)
    assert encoder.calls == 1
    assert (largest.vision_tokens, largest.read_vision_tokens) == (48, 48)
    assert (never_sure.vision_tokens, never_sure.read_vision_tokens) == (48, 12 + 27 + 48)
    assert never_sure.text == largest.text
    options["confidence"] = 0.0
    smallest, sure = answer_at_counts(*ask, (4, "auto"), **options)
    assert (sure.vision_tokens, sure.read_vision_tokens) == (12, 12)
    assert sure.text == smallest.text != largest.text


def test_a_cascades_first_token_comes_after_the_tries_before_it(monkeypatch):
    """Three tries of a slow prompt and one slow token each."""
    model = tiny_model(trained_num_image_tokens=[4, 9, 16])
    monkeypatch.setattr(model.generation_config, "eos_token_id", -1)
    decode = model.model.language_model.forward

    def slow_decode(*args, **kwargs):
        time.sleep(0.1)
        return decode(*args, **kwargs)

    model.model.language_model.forward = slow_decode
    ask = (model, digits_processor(), [picture(1)], ["<image> odd"], ("auto",))
    (answer,) = answer_at_counts(*ask, max_new_tokens=2, confidence=1.0)
    assert answer.first_token_seconds >= 0.5
    assert answer.seconds >= answer.first_token_seconds + 0.1


def test_a_budget_is_the_prompts():
    model, processor = tiny_model(), digits_processor()
    attach_router(model, FixedRouter([0, 0.5, 0.6], [0, 0.2, 0.9]))
    ask = (model, processor, [picture(1), picture(2)], ["<image> odd <image>"], ("auto",))
    (answer,) = answer_at_counts(*ask, budget=17, max_new_tokens=4)
    assert answer.vision_tokens == 13  # what is left after 9 for the first is too little
    assert answer.text == next(answer_at_counts(*ask[:4], ([9, 4],), max_new_tokens=4)).text


@pytest.mark.parametrize("other", [{"penalty": 0.1}, {"budget": 9}])
def test_confidence_stands_alone(other):
    ask = (tiny_model(), digits_processor(), [picture(1)], ["<image> odd"], ("auto",))
    with pytest.raises(ValueError, match="confidence must be given alone"):
        list(answer_at_counts(*ask, confidence=0.9, **other))


def test_choosing_is_part_of_the_time_to_the_first_token(monkeypatch):
    model, processor = tiny_model(), digits_processor()
    router = FixedRouter([0, 0, 1])
    attach_router(model, router)
    chances = router.probabilities
    monkeypatch.setattr(router, "probabilities", lambda *of: time.sleep(0.2) or chances(*of))
    (answer,) = answer_at_counts(model, processor, [picture(1)], ["<image> odd"], ("auto",))
    assert answer.first_token_seconds >= 0.2


def test_a_question_without_images():
    (answer,) = answer_at_counts(tiny_model(), digits_processor(), [], ["odd"], (4,))
    assert answer.vision_tokens == 0


def test_the_released_layout_answers_too(tmp_path, capsys):
    """The prompt of the command has one image's run between <img> and </img>, and a new line."""
    folder = write_release(tmp_path / "r", released_tensors())
    picture(1, (300, 700)).save(tmp_path / "a.png")
    arguments = ["generate", "--model", str(folder), "--image", str(tmp_path / "a.png")]
    code = main([*arguments, "--prompt", "What ?", "--tokens", "64,144", "--max-new-tokens", "2"])
    out, _ = capsys.readouterr()
    assert code == 0
    assert [row.split()[0] for row in out.splitlines()[1:]] == ["192", "432"]


@pytest.mark.parametrize(("ends", "expected"), [([5, 2], [5, 2]), (None, 2)])
def test_answers_end_where_the_model_says_or_else_the_tokenizer(monkeypatch, ends, expected):
    model, processor = tiny_model(), digits_processor()
    model.generation_config.eos_token_id = ends
    asked = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **options: asked.append(options) or generate(**options)
    )
    list(answer_at_counts(model, processor, [picture(1)], ["<image> odd"], (4,), max_new_tokens=2))
    assert {str(options["eos_token_id"]) for options in asked} == {str(expected)}


def test_answers_are_greedy_whatever_search_the_model_is_saved_with(monkeypatch):
    model, processor = tiny_model(), digits_processor()
    ask = (model, processor, [picture(1)], ["<image> odd"], COUNTS)
    expected = [answer.text for answer in answer_at_counts(*ask, max_new_tokens=4)]
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    answers = list(answer_at_counts(*ask, max_new_tokens=4))
    assert [answer.text for answer in answers] == expected
