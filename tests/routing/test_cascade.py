"""The cascade is generation at its counts, from the smallest on, until it is sure."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_modeling import GENERATION, CallCounter
from tests.models.test_tiling import tiling_processor
from tests.models.tiny import picture, tiny_model
from tokenflex.digits.processor import digits_processor
from tokenflex.routing.cascade import generate_with_escalation

COUNTS = (4, 9, 16)
IMAGES = [[picture(i)] for i in range(6)]
TEXTS = ["odd <image>", "read <image> where", "<image>", "count <image>", "<image> r1c1", "<image>"]
OPTIONS = {"max_new_tokens": 4, "pad_token_id": 0}


def asked(processor, images=IMAGES, texts=TEXTS):
    return processor(images=images, text=texts, num_image_tokens="auto")


def alone(model, processor, row: int, count: int) -> tuple[list[int], float]:
    """New tokens of one prompt at one count, and the probability of the least certain."""
    inputs = processor(images=IMAGES[row], text=TEXTS[row], num_image_tokens=count)
    output = model.generate(
        **inputs, **GENERATION, output_logits=True, return_dict_in_generate=True
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    chances = [
        float(step[0].softmax(-1)[token]) for step, token in zip(output.logits, new, strict=True)
    ]
    return new.tolist(), min(chances)


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 4), (1.01, 16)])
def test_the_ends_are_always_the_smallest_and_always_the_largest(threshold, count):
    model, processor = tiny_model(trained_num_image_tokens=COUNTS), digits_processor()
    answers = generate_with_escalation(model, **asked(processor), threshold=threshold, **OPTIONS)
    inputs = processor(images=IMAGES, text=TEXTS, num_image_tokens=count)
    expected = model.generate(**inputs, **GENERATION)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(answers.new_tokens, expected)
    assert answers.counts == [count] * 6
    assert answers.vision_tokens == [count] * 6
    assert answers.prefill_tokens == [4 if count == 4 else 29] * 6


def test_each_row_is_answered_at_the_first_count_it_is_sure_at():
    model, processor = tiny_model(), digits_processor()
    said = {(row, n): alone(model, processor, row, n) for row in range(6) for n in COUNTS}
    threshold = sorted(confidence for _, confidence in said.values())[-5]  # a few are sure
    encoder = CallCounter(model.model.vision_model)
    answers = generate_with_escalation(
        model, **asked(processor), threshold=threshold - 1e-6, counts=COUNTS, **OPTIONS
    )
    assert encoder.calls == 1
    for row in range(6):
        sure = [n for n in COUNTS if said[row, n][1] >= threshold - 1e-6]
        count = sure[0] if sure else 16
        assert answers.counts[row] == count
        assert answers.new_tokens[row].tolist() == said[row, count][0]
        assert answers.confidences[row] == pytest.approx(said[row, count][1], abs=1e-5)
        assert answers.prefill_tokens[row] == sum(n for n in COUNTS if n <= count)
    assert len({*answers.counts}) > 1  # or nothing was decided


def test_confidence_ends_where_the_answer_does():
    model, processor = tiny_model(), digits_processor()
    first = [alone(model, processor, row, 4)[0][0] for row in range(6)]
    answers = generate_with_escalation(
        model, **asked(processor), threshold=0, counts=COUNTS, **OPTIONS, eos_token_id=first
    )
    one_token = generate_with_escalation(
        model, **asked(processor), threshold=0, counts=COUNTS, max_new_tokens=1, pad_token_id=0
    )
    assert answers.new_tokens[:, 0].tolist() == first
    assert answers.new_tokens.shape[1] == 1
    assert answers.confidences == pytest.approx(one_token.confidences, abs=1e-6)


def test_a_row_that_ends_first_is_not_judged_by_what_pads_it():
    model, processor = tiny_model(), digits_processor()
    ask = {**asked(processor), "counts": COUNTS, "threshold": 0, "pad_token_id": 0}
    end = alone(model, processor, 0, 4)[0][0]
    first = generate_with_escalation(model, **ask, max_new_tokens=1)
    answers = generate_with_escalation(model, **ask, max_new_tokens=4, eos_token_id=end)
    assert answers.new_tokens.shape[1] == 4  # others go on
    assert answers.new_tokens[0].tolist() == [end, 0, 0, 0]
    assert answers.confidences[0] == pytest.approx(first.confidences[0], abs=1e-6)


def test_an_answer_at_the_threshold_is_sure_enough():
    model, processor = tiny_model(), digits_processor()
    ask = {**asked(processor), "counts": COUNTS, **OPTIONS}
    least = generate_with_escalation(model, **ask, threshold=0).confidences
    answers = generate_with_escalation(model, **ask, threshold=max(least))
    assert answers.counts[least.index(max(least))] == 4
    assert answers.confidences[least.index(max(least))] == max(least)


def test_rows_without_images_are_asked_once_and_tiles_escalate_together():
    model, processor = tiny_model(), tiling_processor(6)
    inputs = asked(
        processor,
        [[picture(1, (32, 64))], [], [picture(2), picture(3)]],
        ["<image> odd", "count", "<image> <image> odd"],
    )
    calls = CallCounter(model.model.vision_model)
    answers = generate_with_escalation(
        model, **inputs, threshold=1.01, counts=(4, (2, 3)), **OPTIONS
    )
    assert calls.calls == 1
    assert answers.counts == [(2, 3), None, (2, 3)]
    assert answers.vision_tokens == [12, 0, 12]
    assert answers.prefill_tokens == [20, 0, 20]
    assert len(answers.new_tokens) == 3


@pytest.mark.parametrize("counts", [(9, 4), (4, 4), ()])
def test_counts_must_rise(counts):
    with pytest.raises(ValueError, match="counts must rise"):
        generate_with_escalation(tiny_model(), **asked(digits_processor()), counts=counts)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"threshold": float("nan")}, ValueError, "threshold must be a probability.*got nan"),
        ({"threshold": "0.9"}, TypeError, "threshold must be a number, got '0.9'"),
        ({"threshold": None}, TypeError, "threshold must be a number, got None"),
        ({"threshold": True}, TypeError, "threshold must be a number, got True"),
        ({"do_sample": True}, ValueError, "do_sample must be False.*got True"),
        ({"num_beams": 4}, ValueError, "num_beams must be 1.*got 4"),
        ({"output_logits": False}, ValueError, "output_logits must be True.*got False"),
        ({"counts": [4, 900]}, ValueError, r"counts \[4, 900\] at row 0: .*256 positions, got 900"),
    ],
)
def test_what_a_cascade_cannot_do_is_refused_before_an_answer(options, error, words):
    model = tiny_model()
    calls = CallCounter(model.model.language_model)
    ask = {"threshold": 0.0, "counts": COUNTS, **asked(digits_processor()), **OPTIONS, **options}
    with pytest.raises(error, match=words):
        generate_with_escalation(model, **ask)
    assert calls.calls == 0


def test_all_tiles_of_a_row_must_fit_the_model():
    """100 tokens fit 256 positions; those of a row's three tiles do not."""
    model, processor = tiny_model(), tiling_processor(6)
    images, texts = [[picture(1)], [picture(2, (32, 96))]], ["<image> odd", "<image> odd"]
    ask = {**asked(processor, images, texts), "threshold": 0.0, **OPTIONS}
    with pytest.raises(ValueError, match=r"at row 1: .*256 positions, got 300"):
        generate_with_escalation(model, **ask, counts=(4, 100))
    assert generate_with_escalation(model, **ask, counts=(4, 64)).counts == [4, 4]


def test_options_that_say_what_a_cascade_does_are_taken():
    model, ask = tiny_model(), {**asked(digits_processor()), "counts": COUNTS, **OPTIONS}
    plain = generate_with_escalation(model, **ask)
    told = generate_with_escalation(model, **ask, do_sample=False, num_beams=1)
    assert torch.equal(plain.new_tokens, told.new_tokens)


def test_a_model_that_does_not_say_its_counts_needs_them_named():
    with pytest.raises(ValueError, match="trained_num_image_tokens must name the counts"):
        generate_with_escalation(tiny_model(), **asked(digits_processor()))


def test_chosen_counts_are_refused():
    inputs = digits_processor()(images=IMAGES[0], text=TEXTS[0], num_image_tokens=9)
    with pytest.raises(ValueError, match="must be 'auto', got"):
        generate_with_escalation(tiny_model(), **inputs, counts=COUNTS)
