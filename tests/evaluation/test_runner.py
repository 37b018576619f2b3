"""Accuracy is the share of questions that greedy generation answers exactly."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import SiglipImageProcessor

from tests.models.tiny import PAD, PIXELS, picture, tiny_model
from tokenflex import TokenCounts, TokenFlexProcessor
from tokenflex.data.encoding import ConversationEncoder
from tokenflex.data.faults import BrokenSample, BrokenSamplesError
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import SPECIAL_TOKENS, digits_processor
from tokenflex.evaluation import evaluate
from tokenflex.evaluation.questions import PreparedSample, Question, images_of
from tokenflex.evaluation.scoring import RULES
from tokenflex.models.vision import EncodedImages

COUNTS = (4, 9, 16)


@pytest.fixture(scope="module")
def processor():
    return digits_processor()


def greedy_answer(model, processor, sample: Sample, question: str, count: int, length: int) -> str:
    """Return the generated answer, up to its end-of-answer or ``length`` tokens."""
    encoder = ConversationEncoder(processor.tokenizer, processor.image_token)
    prompt = encoder.prompt(Conversation((Turn("user", question),)), len(sample.images))
    inputs = processor(images=list(sample.images) or None, text=prompt, num_image_tokens=count)
    output = model.generate(
        **inputs,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=PAD,
    )
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def exact_matches(model, processor, dataset, count: int) -> dict[str, list[bool]]:
    matches = defaultdict(list)
    for i in range(len(dataset)):
        for conversation in dataset[i].conversations:
            question, answer = (turn.text for turn in conversation.turns)
            wanted = f"{answer} <eos>".split()
            said = greedy_answer(model, processor, dataset[i], question, count, len(wanted))
            matches[conversation.kind].append(said.split() == wanted)
    return matches


@pytest.fixture(scope="module")
def dataset():
    return DigitsDataset("test", size=6, questions=4)


@pytest.fixture(scope="module")
def half_taught(processor, dataset):
    """A model that knows some of the answers: it has seen half of the samples a few times."""
    model = tiny_model().train()
    collator = PackingCollator(processor, TokenCounts((9,), (1,)))
    batch = collator([DrawnSample(i, 0, dataset[i]) for i in range(0, len(dataset), 2)])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(25):
        logits = model(**batch.model_inputs()).logits[0]
        optimizer.zero_grad()
        F.cross_entropy(logits, batch.targets).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_accuracy_is_exact_match_of_greedy_generation(processor, dataset, half_taught, batch_size):
    expected = {c: exact_matches(half_taught, processor, dataset, c) for c in COUNTS}
    flat = [hit for hits in expected[9].values() for hit in hits]
    assert 4 < sum(flat) < len(flat) - 4  # or a constant might pass

    report = evaluate(half_taught, processor, dataset, COUNTS, batch_size=batch_size)

    for count in COUNTS:
        for kind, hits in expected[count].items():
            assert report["accuracy_by_kind"][kind][str(count)] == sum(hits) / len(hits)
    assert report["questions"] == {kind: len(hits) for kind, hits in sorted(expected[9].items())}


def test_questions_about_one_image_share_its_rows_where_the_model_can(
    processor, dataset, half_taught, monkeypatch
):
    """And are graded the same where it cannot."""
    rows, forward = [], type(half_taught).forward

    def counting(model, *args, **kwargs):
        rows.append(kwargs["plan"].num_tokens)
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(type(half_taught), "forward", counting)
    shared = evaluate(half_taught, processor, dataset, COUNTS)
    half_taught.model.language_model.set_attn_implementation("eager")
    try:
        apart = evaluate(half_taught, processor, dataset, COUNTS)
    finally:
        half_taught.model.language_model.set_attn_implementation("tokenflex_varlen")
    assert without_seconds(apart) == without_seconds(shared)
    ours, theirs = rows[: len(COUNTS)], rows[len(COUNTS) :]
    assert all(a < 0.6 * b for a, b in zip(ours, theirs, strict=True)), rows


def test_accuracy_is_the_mean_over_kinds_not_over_questions(processor, dataset, half_taught):
    report = evaluate(half_taught, processor, dataset, [9])
    rows, questions = report["accuracy_by_kind"], report["questions"]
    shares = [rows[kind]["9"] for kind in rows]
    over_questions = sum(rows[k]["9"] * n for k, n in questions.items()) / sum(questions.values())
    assert report["accuracy"]["9"] == pytest.approx(sum(shares) / len(shares))
    assert report["accuracy"]["9"] != pytest.approx(over_questions)


class OneAnswer:
    """A data set of one question about one picture."""

    def __init__(self, seed: int, *turns: Turn) -> None:
        self.sample = Sample("one", (picture(seed),), (Conversation(turns, "k"),))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return self.sample


def test_an_answer_that_would_go_on_is_wrong(processor):
    """Its word is the first the model says, but the model does not end there."""
    model, words = tiny_model(), {*processor.tokenizer.get_vocab()} - {*SPECIAL_TOKENS}
    tried = 0
    for seed in range(20):
        sample = OneAnswer(seed).sample
        said = greedy_answer(model, processor, sample, "odd", 9, 2).split()
        if said[:1] and said[0] in words and said[1:] != ["<eos>"]:
            one = OneAnswer(seed, Turn("user", "odd"), Turn("assistant", said[0]))
            assert evaluate(model, processor, one, [9])["accuracy"] == {"9": 0.0}
            tried += 1
    assert tried


def test_report_of_the_digits_task(processor):
    dataset, calls = DigitsDataset("test", size=5, questions=3), []
    report = evaluate(
        tiny_model(), processor, dataset, [4, 9], batch_size=2, on_batch=lambda: calls.append(1)
    )
    assert list(report["accuracy"]) == ["4", "9"]
    assert sum(report["questions"].values()) == 15
    kinds = {c.kind for i in range(5) for c in dataset[i].conversations}
    assert report["questions"].keys() == report["accuracy_by_kind"].keys() == kinds
    assert len(calls) == 6


def without_seconds(report: dict) -> dict:
    return {key: value for key, value in report.items() if not key.endswith("seconds")}


def test_workers_give_the_same_report(processor, dataset, half_taught):
    inline = evaluate(half_taught, processor, dataset, COUNTS, batch_size=2)
    others = evaluate(half_taught, processor, dataset, COUNTS, batch_size=2, workers=1)
    assert without_seconds(others) == without_seconds(inline)


def test_an_image_is_read_and_encoded_once_for_all_counts(processor, dataset, half_taught):
    """Three counts in four batches: four encoder passes over six images, not twelve over 18."""
    encoded, read = [], []
    hook = half_taught.model.vision_model.register_forward_hook(
        lambda module, inputs, output: encoded.append(len(output.last_hidden_state))
    )

    class Counted(DigitsDataset):
        def __getitem__(self, index: int) -> Sample:
            read.append(index)
            return super().__getitem__(index)

    evaluate(half_taught, processor, Counted("test", size=7, questions=4), COUNTS, batch_size=2)
    hook.remove()
    assert encoded == [2, 2, 2, 1]
    assert read == [*range(7)]


def test_seconds_of_a_count_are_those_of_asking_it_alone(processor, dataset, monkeypatch):
    """By a clock that only the model moves: the encoder is part of every count's, once a batch."""
    model, now = tiny_model(), [0.0]

    def takes(seconds: float, module) -> None:
        module.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + seconds))

    takes(100, model.model.vision_model)
    takes(10, model.model.projector)
    takes(1, model.model.language_model)
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("tokenflex.evaluation.runner.time", clock)
    report = evaluate(model, processor, dataset, [4, 9], batch_size=2)
    assert report["encoding_seconds"] == 3 * 100
    assert report["evaluation_seconds"] == {"4": 3 * 111, "9": 3 * 111}


@pytest.mark.parametrize("score", ["forced", "exact"])
def test_counts_asked_together_are_answered_as_alone(processor, dataset, half_taught, score):
    grids = [4, (2, 3), (3, 3), 16]
    options = {"score": score, "max_new_tokens": 4, "batch_size": 3}
    together = evaluate(half_taught, processor, dataset, grids, **options)
    for count, label in zip(grids, ["4", "2x3", "3x3", "16"], strict=True):
        alone = evaluate(half_taught, processor, dataset, [count], **options)
        assert alone["accuracy"][label] == together["accuracy"][label]
        assert alone["standard_error"][label] == together["standard_error"][label]
    assert len({*together["accuracy"].values()}) > 1  # or the counts might all be one


def test_a_square_grid_is_the_count_of_its_sides(processor, dataset, half_taught):
    report = evaluate(half_taught, processor, dataset, [9, (3, 3)])
    assert report["accuracy"]["9"] == report["accuracy"]["3x3"]


def test_a_generated_answer_that_is_exact_is_what_forcing_calls_right(
    processor, dataset, half_taught
):
    """Both ask what greedy generation gives, by two ways through the model."""
    forced = evaluate(half_taught, processor, dataset, COUNTS)
    said = evaluate(half_taught, processor, dataset, COUNTS, score="exact", max_new_tokens=8)
    assert said["accuracy_by_kind"] == forced["accuracy_by_kind"]
    assert 0.1 < forced["accuracy"]["9"] < 0.9
    assert (said["score"], forced["score"]) == ("exact", "forced")


class Asked:
    """Pictures of noise, each with questions of unequal length: what a model says depends on both.

    Its answers are never right; tests look at what is said.
    """

    questions = ("odd", "read r1c1", "where")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        turns = ((Turn("user", one), Turn("assistant", "3")) for one in self.questions)
        return Sample(str(index), (picture(index),), tuple(Conversation(t, "k") for t in turns))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_generated_answers_are_those_of_each_question_alone(processor, monkeypatch, batch_size):
    model, said = tiny_model(), []
    monkeypatch.setitem(RULES, "exact", lambda answer, reference: bool(said.append(answer)))
    options = {"score": "exact", "batch_size": batch_size, "max_new_tokens": 4}
    evaluate(model, processor, Asked(), [9], **options)
    expected = [
        " ".join(greedy_answer(model, processor, Asked()[i], question, 9, 4).split())
        for i in range(4)
        for question in Asked.questions
    ]
    assert [" ".join(answer.split()) for answer in said] == expected
    assert len({*expected}) > 4  # or a mix-up of pictures or questions might not show


def test_a_question_sees_its_own_image_whatever_the_batch(processor):
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    evaluate(model, processor, Asked(), [9], batch_size=1)
    alone = torch.cat(seen)
    seen.clear()
    evaluate(model, processor, Asked(), [4, 9], batch_size=64)
    torch.testing.assert_close(seen[1], alone)
    per_sample = alone.split(len(alone) // 4)
    assert (per_sample[0] - per_sample[1]).abs().max() > 0.01


class Tiled:
    """Two samples: two images with three questions, and none with one."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        asked = Conversation((Turn("user", "odd"), Turn("assistant", "3")), "k")
        images = (picture(1, (32, 64)), picture(2)) if index == 0 else ()
        return Sample(str(index), images, (asked,) * (3 if index == 0 else 1))


@pytest.mark.parametrize("score", ["forced", "exact"])
def test_vision_tokens_are_those_of_all_tiles(processor, score):
    """1 x 2 tiles and one: three tiles for two images, shown by three of four questions."""
    model, shown = tiny_model(), []
    model.model.projector.register_forward_hook(
        lambda module, inputs, output: shown.append(len(output))
    )
    options = {"max_tiles": 2, "score": score, "max_new_tokens": 2}
    report = evaluate(model, processor, Tiled(), [4, (1, 5)], **options)
    assert shown == [12, 15]  # projected once, however many questions show them
    assert report["vision_tokens_per_image"] == {"4": 6.0, "1x5": 7.5}
    assert report["vision_tokens_per_question"] == {"4": 9.0, "1x5": 11.25}
    assert report["samples"] == 2


class ByLength:
    """A selector: questions of one word get 4 tokens, others 16."""

    label = "auto"

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[int, ...], int]] = []

    def select(self, model, images, tiles, prompts):
        self.asked.append((len(images), tuple(tiles), len(prompts)))
        return [[4 if len(ids) < 3 else (4, 4)] * len(tiles) for ids in prompts]


@pytest.mark.parametrize("score", ["forced", "exact"])
def test_a_selector_chooses_per_question(processor, dataset, half_taught, score):
    options = {"score": score, "max_new_tokens": 3, "batch_size": 4}
    selector = ByLength()
    report = evaluate(half_taught, processor, dataset, [4, selector, 16], **options)
    short, by_kind = 0, defaultdict(list)
    for i in range(len(dataset)):
        for conversation in dataset[i].conversations:
            few = " " not in conversation.turns[0].text
            short += few
            by_kind[conversation.kind].append(4 if few else 16)
            row = report["accuracy_by_kind"][conversation.kind]
            assert row["auto"] == row["4" if few else "16"]
    assert 0 < short < 24
    over_kinds = sum(sum(tokens) / len(tokens) for tokens in by_kind.values()) / len(by_kind)
    over_questions = (4 * short + 16 * (24 - short)) / 24
    assert over_kinds != pytest.approx(over_questions)
    assert report["vision_tokens_per_image"]["auto"] == pytest.approx(over_kinds)
    assert report["vision_tokens_per_question"]["auto"] == pytest.approx(over_kinds)
    assert report["vision_tokens_per_question_unweighted"]["auto"] == pytest.approx(over_questions)
    assert selector.asked == [(1, (1,), 4)] * 6


@pytest.mark.parametrize(
    ("score", "shown"),
    [("forced", "<image> odd"), ("exact", "<image> odd 3 <eos> where")],
)
def test_a_selector_sees_the_prompt_of_the_first_forced_and_the_last_generated_answer(
    processor, score, shown
):
    turns = (Turn("user", "odd"), Turn("assistant", "3"), Turn("user", "where"))
    seen = []

    class Selector(ByLength):
        def select(self, model, images, tiles, prompts):
            seen.extend(processor.tokenizer.convert_ids_to_tokens(ids) for ids in prompts)
            return super().select(model, images, tiles, prompts)

    one = OneAnswer(0, *turns, Turn("assistant", "r1c1"))
    evaluate(tiny_model(), processor, one, [Selector()], score=score, max_new_tokens=1)
    assert [" ".join(words) for words in seen] == [shown]


class FirstAndOthers:
    """A selector: the first image of a prompt gets 4 tokens, others 1 x 5."""

    label = "auto"

    def select(self, model, images, tiles, prompts):
        return [[4, (1, 5)][: len(tiles)] for _ in prompts]


@pytest.mark.parametrize("score", ["forced", "exact"])
def test_a_selector_chooses_per_image(processor, score):
    """Two tiles at 4 tokens and one at 5: 13 for three of four questions, none for the other."""
    model, shown = tiny_model(), []
    model.model.projector.register_forward_hook(
        lambda module, inputs, output: shown.append(len(output))
    )
    options = {"max_tiles": 2, "score": score, "max_new_tokens": 2}
    report = evaluate(model, processor, Tiled(), [FirstAndOthers()], **options)
    assert shown == [13]
    assert report["vision_tokens_per_question"] == {"auto": 13 * 3 / 4}
    assert report["vision_tokens_per_question_unweighted"] == {"auto": 13 * 3 / 4}
    assert report["vision_tokens_per_image"] == {"auto": 6.5}


def test_a_question_behind_another_is_asked_with_the_turns_before_it(processor):
    turns = (Turn("user", "odd"), Turn("assistant", "3"), Turn("user", "where"))
    model, asked = tiny_model(), []
    generate = type(model).generate

    def record(self, **inputs):
        asked.extend(inputs["input_ids"].tolist())
        return generate(self, **inputs)

    model.generate = record.__get__(model)
    one = OneAnswer(0, *turns, Turn("assistant", "r1c1"))
    evaluate(model, processor, one, [4], score="exact", max_new_tokens=1)
    words = processor.tokenizer.convert_ids_to_tokens(asked[0])
    assert words == ["<image>"] * 4 + ["odd", "3", "<eos>", "where"]


@pytest.mark.parametrize(
    ("counts", "options", "words"),
    [
        ([], {}, "at least one"),
        ([4, 9, 4], {}, "differ"),
        ([10], {}, "9 and 16"),
        ([4], {"score": "rouge"}, "rouge"),
        (["auto"], {}, "auto"),
        ([4], {"score": "choice"}, "sample digits-test-0"),
    ],
)
def test_what_cannot_be_asked_is_refused(processor, dataset, counts, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        evaluate(tiny_model(), processor, dataset, counts, max_new_tokens=1, **options)


def test_an_empty_data_set_is_refused(processor):
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate(tiny_model(), processor, [], [4])


class SomeBroken:
    """Samples of which some cannot be read, encoded or processed; the others are the digits'."""

    def __init__(self, good, broken: dict[int, Any]) -> None:
        self.good, self.unread = good, broken

    def __len__(self) -> int:
        return len(self.good) + len(self.unread)

    def __getitem__(self, index: int) -> Sample:
        broken = self.unread.get(index)
        if isinstance(broken, Exception):
            raise broken
        if broken is not None:
            return broken
        return self.good[index - sum(place < index for place in self.unread)]


def talk(question: str, answer: str) -> tuple[Conversation, ...]:
    return (Conversation((Turn("user", question), Turn("assistant", answer))),)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_broken_samples_are_left_out_and_named(processor, dataset, batch_size, workers):
    """The rest is what it is without them, whatever they shared a batch with."""
    unread = {
        0: ValueError("a.jsonl:1 is not JSON"),
        1: FileNotFoundError("b.png does not exist"),
        4: RecursionError("too deep"),
        5: Sample("marks", (), talk("<image> odd", "3")),
        6: Sample("half", (picture(1),), talk("odd \ud83d", "3")),
        7: Sample("nothing", (picture(1),), ()),
    }
    model, done = tiny_model(), []
    report = evaluate(
        model,
        processor,
        SomeBroken(dataset, unread),
        COUNTS,
        batch_size=batch_size,
        workers=workers,
        on_batch=lambda: done.append(1),
    )
    assert len(done) == 3 * -(12 // -batch_size)
    expected = evaluate(model, processor, dataset, COUNTS, batch_size=batch_size)
    assert [one["index"] for one in sorted(report.pop("broken_samples"), key=str)] == [*unread]
    for key in ("accuracy", "accuracy_by_kind", "questions", "samples", "standard_error"):
        assert report[key] == expected[key]
    assert "broken_samples" not in expected


def test_a_picture_that_cannot_be_processed_is_left_out(processor, dataset, monkeypatch):
    process = processor.process_images
    strange = picture(77, (48, 48))

    def failing(images, **options):
        if any(image.size == strange.size for of_sample in images for image in of_sample):
            raise TypeError("no such picture")
        return process(images, **options)

    monkeypatch.setattr(processor, "process_images", failing)
    broken = {2: Sample("strange", (strange,), talk("odd", "3"))}
    report = evaluate(tiny_model(), processor, SomeBroken(dataset, broken), [4])
    reason = "TypeError: no such picture"
    assert report["broken_samples"] == [{"index": 2, "reason": reason}]
    assert report["samples"] == len(dataset)


@pytest.mark.parametrize("score", ["forced", "exact"])
def test_a_processors_placeholder_in_a_text_is_left_out(processor, dataset, score):
    broken = {1: Sample("marks", (picture(1),), talk("<image> or <image>", "3"))}
    report = evaluate(
        tiny_model(), processor, SomeBroken(dataset, broken), [4], score=score, max_new_tokens=1
    )
    (one,) = report["broken_samples"]
    assert one["index"] == 1
    assert "one placeholder, <image>, for each of its 1 images, got 2" in one["reason"]


def test_more_broken_samples_than_allowed_stop_the_evaluation(processor, dataset):
    unread = {index: ValueError(f"line {index}") for index in (1, 3)}
    data = SomeBroken(dataset, unread)
    for most in (2, 100, None):
        report = evaluate(tiny_model(), processor, data, [4], max_broken_samples=most)
        assert len(report["broken_samples"]) == 2
    with pytest.raises(BrokenSamplesError, match=r"2 broken samples are more .* of 1.*line 3"):
        evaluate(tiny_model(), processor, data, [4], max_broken_samples=1)
    data.broken = [BrokenSample(1, "line 1"), BrokenSample(3, "line 3")]  # before it is read
    data.unread = {1: MemoryError(), 3: MemoryError()}
    with pytest.raises(BrokenSamplesError, match=r"2 broken samples are more .* of 1.*line 3"):
        evaluate(tiny_model(), processor, data, [4], max_broken_samples=1)
    with pytest.raises(MemoryError):
        evaluate(tiny_model(), processor, data, [4])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(processor, training):
    model = tiny_model().train(training)
    modes = []
    model.model.vision_model.register_forward_hook(lambda m, *_: modes.append(m.training))
    evaluate(model, processor, DigitsDataset("test", size=1, questions=1), [4])
    assert modes == [False]
    assert all(module.training == training for module in model.modules())


def test_the_mode_of_the_model_is_restored_after_an_error(processor):
    model = tiny_model().train()
    broken = OneAnswer(0, Turn("assistant", "3"))
    with pytest.raises(ValueError, match="sample one"):
        evaluate(model, processor, broken, [4])
    assert model.training


def test_evaluation_needs_no_gradients(processor):
    model = tiny_model()
    outputs = []
    model.register_forward_hook(lambda m, i, output: outputs.append(output.logits.requires_grad))
    evaluate(model, processor, DigitsDataset("test", size=1, questions=1), [4])
    assert outputs == [False]


class SeveralPictures:
    """Two or three pictures a sample, one of them between words, under several questions."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        pictures = tuple(picture(10 * index + i) for i in range(2 + index % 2))
        shown = "<image> read " + "<image> " * (len(pictures) - 1)
        talks = [
            Conversation((Turn("user", f"{shown}{word}"), Turn("assistant", answer)), "k")
            for word, answer in (("r1c1", "3"), ("r1c2", "red 5"), ("r1c1", "7"))
        ]
        return Sample(f"several-{index}", pictures, tuple(talks))


def test_questions_that_share_rows_are_answered_as_those_that_do_not(processor, monkeypatch):
    """The same logits in the same order, from fewer rows."""
    model = tiny_model().eval()
    logits, rows = [], []
    model.lm_head.register_forward_hook(lambda *hooked: logits.append(hooked[-1][0]))
    model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    assert model.takes_shared_prefixes
    evaluate(model, processor, SeveralPictures(), [9, (2, 3)])
    monkeypatch.setattr(type(model), "takes_shared_prefixes", False)
    evaluate(model, processor, SeveralPictures(), [9, (2, 3)])
    shared, whole = logits[:2], logits[2:]
    for one, other in zip(shared, whole, strict=True):
        torch.testing.assert_close(one, other)
    assert sum(rows[:2]) < sum(rows[2:]) / 2


def test_a_report_says_what_resized_the_images(processor, dataset):
    """PIL and torchvision round a few pixels differently: whoever compares reports must know."""
    report = evaluate(tiny_model(), processor, dataset, [4])
    assert report["image_backend"] == "pil"
    image_processor = SiglipImageProcessor(size={"height": PIXELS, "width": PIXELS})
    other = TokenFlexProcessor(image_processor, processor.tokenizer, num_image_tokens=9)
    report = evaluate(tiny_model(), other, dataset, [4])
    assert report["image_backend"] == ("torchvision" if find_spec("torchvision") else "pil")


def test_each_tile_has_the_grid_of_its_image_and_equal_questions_share_tiles():
    sample = PreparedSample(0, "a", (1, 2), 0, ())
    wide = Question(sample, Conversation(()), grids=((2, 8), (3, 3)))
    square = Question(sample, Conversation(()), grids=((4, 4), (3, 3)))
    encoded = EncodedImages(torch.zeros(12, 2), ((2, 2),) * 3)
    images = images_of(encoded, [wide, wide, square])
    assert images.grids == [(2, 8), (3, 3), (3, 3), (4, 4), (3, 3), (3, 3)]
    assert images.tiles == [range(3), range(3), range(3, 6)]
    assert len(images.encoded) == 6
