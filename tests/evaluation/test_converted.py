"""Grades of converted stock models are those of their own calls, one by one."""

from __future__ import annotations

import pytest
import torch

from tests.dropin.processors import picture, stock_processor
from tests.dropin.tiny import stock_model
from tokenflex import replace_projector
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.evaluation import evaluate
from tokenflex.evaluation.encoding import QuestionEncoder
from tokenflex.routing.grading import grade

COUNTS = (4, 9)
ANSWERS = ["cat a", "this", "a cat is"]


def talk(question: str, answer: str) -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)), "kind")


def dataset() -> list[Sample]:
    wide = picture(2, 60, 130)
    return [
        Sample("one", (picture(1),), (talk("what is", ANSWERS[0]), talk("this is", ANSWERS[1]))),
        Sample("two", (wide, picture(3)), (talk("a <image> is <image> what", ANSWERS[2]),)),
    ]


def asked_alone(processor, sample: Sample, conversation: Conversation, **options) -> dict:
    """The outputs of the processor for a conversation with its answer."""
    question, answer = (turn.text for turn in conversation.turns)
    pieces = question.split("<image>") if "<image>" in question else ["", question]
    content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for image, piece in zip(sample.images, pieces[1:], strict=True):
        content += [{"type": "image", "image": image}, {"type": "text", "text": piece}]
    return processor.apply_chat_template(
        [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


@pytest.mark.parametrize(
    "name", ["llava", "idefics3", "aya_vision", "qwen3_vl", "gemma3", "qianfan_ocr"]
)
def test_forced_answers_have_the_probabilities_of_each_call_alone(name):
    processor = stock_processor(name)
    model = replace_projector(stock_model(name), processor, num_image_tokens=16)
    samples = dataset()
    graded = grade(model, processor, samples, COUNTS, batch_size=2)
    talks = [(sample, one) for sample in samples for one in sample.conversations]
    for row, (sample, conversation) in enumerate(talks):
        learned = len(f"assistant {conversation.turns[1].text}".split())
        for column, count in enumerate(COUNTS):
            inputs = asked_alone(processor, sample, conversation, num_image_tokens=count)
            inputs.pop("labels", None)
            with torch.no_grad():
                chances = model(**inputs).logits[0, -learned - 1 : -1].softmax(-1)
            expected = float(chances.amax(-1).min())
            assert float(graded.confidence[row, column]) == pytest.approx(expected, rel=1e-4)
            right = chances.argmax(-1) == inputs["input_ids"][0, -learned:]
            assert bool(graded.right[row, column]) == bool(right.all())
            assert int(graded.tiles[row]) * count == sum(inputs["num_image_tokens"])


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3"])
def test_frames_of_videos_are_asked_about_as_images(name):
    """Each has the tags of an image, whose positions are laid out by them; also beside images."""
    processor = stock_processor(name)
    model = replace_projector(stock_model(name), processor, num_image_tokens=16)
    film = tuple(picture(10 + i) for i in range(3))
    frames = [
        Sample("alone", film, (talk("<video:3> what is", ANSWERS[0]),)),
        Sample("mixed", (*film, picture(3)), (talk("a <video:3> is <image>", ANSWERS[2]),)),
    ]
    images = [
        Sample("alone", film, (talk("<image><image><image> what is", ANSWERS[0]),)),
        Sample(
            "mixed",
            (*film, picture(3)),
            (talk("a <image><image><image> is <image>", ANSWERS[2]),),
        ),
    ]
    of_frames = grade(model, processor, frames, COUNTS, batch_size=2)
    of_images = grade(model, processor, images, COUNTS, batch_size=1)
    assert torch.equal(of_frames.tiles, of_images.tiles)
    torch.testing.assert_close(of_frames.confidence, of_images.confidence, rtol=1e-4, atol=0)
    talks = [
        (sample.conversations[0], processor.process_images([[*sample.images]])[1])
        for sample in (*frames, *images)
    ]
    encode = QuestionEncoder(processor)
    ids = [encode.prompt_ids(conversation, tiles) for conversation, tiles in talks]
    assert torch.equal(ids[0], ids[2])
    assert torch.equal(ids[1], ids[3])
    report = evaluate(model, processor, frames, [4], score="exact", max_new_tokens=2)
    assert report["samples"] == 2


def test_generated_answers_are_compared_with_what_generate_says():
    processor = stock_processor("internvl")
    model = replace_projector(stock_model("internvl"), processor, num_image_tokens=16)
    (sample, other) = dataset()
    said = []
    for one in (sample, other):
        question = Conversation(one.conversations[0].turns, "kind")
        inputs = asked_alone(processor, one, question, num_image_tokens=9)
        # The answer and the name of its role are the last words of the prompt here.
        learned = len(f"assistant {question.turns[1].text}".split())
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if key in inputs:
                inputs[key] = inputs[key][:, :-learned]
        new = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = new[0, inputs["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    right = [
        Sample(one.id, one.images, (talk(one.conversations[0].turns[0].text, text or "none"),))
        for one, text in zip((sample, other), said, strict=True)
    ]
    report = evaluate(model, processor, right, [9], score="exact", max_new_tokens=3)
    assert any(said)
    assert report["accuracy"]["9"] == sum(map(bool, said)) / 2
    wrong = [Sample("wrong", sample.images, (talk("what is", "w99"),))]
    assert evaluate(model, processor, wrong, [9], score="exact", max_new_tokens=3)["accuracy"] == {
        "9": 0.0
    }
