"""Grades are those of evaluation and generation, and a router sees then what it sees in use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.routing.curve import selection_curve
from tests.evaluation.test_runner import half_taught, processor  # noqa: F401 (fixtures)
from tests.models.test_modeling import CallCounter
from tests.models.test_tiling import tiling_processor
from tests.models.tiny import WIDTH, picture, tiny_model
from tests.routing.planted import COUNTS, FixedRouter
from tokenflex.data.encoding import ConversationEncoder
from tokenflex.data.faults import BrokenSamplesError
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.evaluation import evaluate
from tokenflex.evaluation import grading as forced_grading
from tokenflex.routing.cascade import generate_with_escalation
from tokenflex.routing.choice import choose_counts
from tokenflex.routing.features import image_statistics, question_embeddings
from tokenflex.routing.grading import grade, routed, score
from tokenflex.routing.router import Router
from tokenflex.routing.selector import resolve_count
from tokenflex.routing.storage import attach_router, save_router


@pytest.fixture(scope="module")
def dataset():
    return DigitsDataset("test", size=6, questions=4)


def asked(question: str, answer: str, kind: str) -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)), kind)


class Several:
    """Samples of one, no and two images; tall ones become tiles where a processor cuts."""

    samples = (
        Sample("a", (picture(1, (32, 96)),), (asked("odd", "3", "x"),)),
        Sample("b", (), (asked("count", "7", "y"),)),
        Sample(
            "c",
            (picture(2), picture(3, (64, 64))),
            (asked("<image> odd <image>", "5", "x"), asked("majority", "red", "y")),
        ),
    )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_always_one_count_is_what_evaluation_reports(processor, dataset, half_taught, batch_size):  # noqa: F811
    report = evaluate(half_taught, processor, dataset, COUNTS)
    grades = grade(half_taught, processor, dataset, COUNTS, batch_size=batch_size)
    assert 4 < int(grades.right.sum()) < grades.right.numel() - 4  # or a constant might pass
    points = {p.setting: p for p in selection_curve(grades) if p.selector == "always"}
    for i, count in enumerate(COUNTS):
        assert points[str(count)].accuracy == pytest.approx(report["accuracy"][str(count)])
        assert points[str(count)].tokens == pytest.approx(count)
        for kind, accuracy in report["accuracy_by_kind"].items():
            rows = [k == kind for k in grades.kinds]
            share = float(grades.right[rows, i].double().mean())
            assert share == pytest.approx(accuracy[str(count)])


def test_auto_is_the_routers_own_point_of_the_curve(processor, half_taught, tmp_path):  # noqa: F811
    """Accuracy and tokens, both weighed over kinds of unequal size."""
    dataset = DigitsDataset("test", size=8)
    width = half_taught.config.vision_config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(1)
        router = Router(COUNTS, width, width, penalty=0.02)
        torch.nn.init.normal_(router.question.weight, std=30.0)
    save_router(router, tmp_path, {})
    report = evaluate(half_taught, processor, dataset, [resolve_count("auto", tmp_path)])
    grades = grade(half_taught, processor, dataset, COUNTS)
    (own,) = [p for p in selection_curve(grades, router) if p.setting == "own"]
    assert report["accuracy"]["auto"] == pytest.approx(own.accuracy)
    assert report["vision_tokens_per_question"]["auto"] == pytest.approx(own.tokens)
    assert report["vision_tokens_per_question_unweighted"]["auto"] != pytest.approx(own.tokens)
    assert len(set(routed(router, grades, 0.02).tolist())) > 1


def test_tiles_texts_and_several_images_are_graded_as_evaluation_does():
    model, cutting = tiny_model(), tiling_processor(6, use_thumbnail=True)
    report = evaluate(model, cutting, Several(), COUNTS)
    encoder = CallCounter(model.model.vision_model)
    grades = grade(model, cutting, Several(), COUNTS)
    assert encoder.calls == 1
    for i, count in enumerate(COUNTS):
        accuracy, _ = score(grades, np.full(4, i))
        assert accuracy == pytest.approx(report["accuracy"][str(count)])
    tiles = [sum(cutting.image_tokens(list(sample.images), 1)) for sample in Several.samples]
    assert grades.tiles.tolist() == [tiles[0], 0, tiles[2], tiles[2]]
    assert grades.pair_questions.tolist() == [0, 2, 2, 3, 3]
    assert grades.pair_images.tolist() == [0, 1, 2, 1, 2]
    one_by_one = grade(model, cutting, Several(), COUNTS, batch_size=1)
    for name in ("right", "pair_questions", "pair_images", "tiles", "samples"):
        assert torch.equal(getattr(one_by_one, name), getattr(grades, name))


class Reversed(Several):
    """Those of :class:`Several`, the sample of two images first."""

    samples = Several.samples[::-1]


def test_images_are_numbered_over_all_samples():
    """A sample of several images before others, in one batch and in several."""
    model, words = tiny_model(), digits_processor()
    forward = grade(model, words, Several(), COUNTS)
    for batch_size in (1, 64):
        grades = grade(model, words, Reversed(), COUNTS, batch_size=batch_size)
        assert grades.pair_questions.tolist() == [0, 0, 1, 1, 3]
        assert grades.pair_images.tolist() == [0, 1, 0, 1, 2]
        torch.testing.assert_close(grades.images, forward.images[[1, 2, 0]])


def test_the_router_sees_in_use_what_it_saw_in_training():
    model, cutting = tiny_model(), tiling_processor(6, use_thumbnail=True)
    grades = grade(model, cutting, Several(), COUNTS)
    router = FixedRouter([1, 0, 0])
    attach_router(model, router)
    encoder = ConversationEncoder(cutting.tokenizer, cutting.image_prompt)
    questions = [(s, c) for s in Several.samples for c in s.conversations]
    inputs = cutting(
        images=[list(sample.images) for sample, _ in questions],
        text=[
            encoder.prompt(Conversation(c.turns[:1]), len(sample.images)) for sample, c in questions
        ],
        num_image_tokens="auto",
        add_special_tokens=False,
    )
    choose_counts(model, **inputs)
    ((images, embeddings),) = router.seen
    torch.testing.assert_close(images, grades.images[grades.pair_images])
    torch.testing.assert_close(embeddings, grades.questions[grades.pair_questions])


class LongTalks(Several):
    """Answers behind answers, and an image that is shown after the first."""

    samples = (
        Sample(
            "long",
            (picture(1), picture(2)),
            (
                Conversation(
                    (
                        *(Turn("user", "<image> odd"), Turn("assistant", "3")),
                        *(Turn("user", "where <image> count"), Turn("assistant", "r1c1")),
                    )
                ),
                Conversation(
                    (
                        *(Turn("user", "<image> <image> majority"), Turn("assistant", "red")),
                        *(Turn("user", "read r1c1"), Turn("assistant", "5")),
                    )
                ),
            ),
        ),
    )


def test_forced_evaluation_shows_the_router_what_grading_does(tmp_path, monkeypatch):
    """The text before the first answer, and all images, also of later turns."""
    model, words = tiny_model(), digits_processor()
    grades = grade(model, words, LongTalks(), COUNTS)
    save_router(Router(COUNTS, WIDTH, WIDTH, penalty=0.0), tmp_path, {})
    seen = []

    def record(self, images, questions):
        seen.append((images, questions))
        return np.ones((len(images), len(COUNTS)))

    monkeypatch.setattr(Router, "probabilities", record)
    evaluate(model, words, LongTalks(), [resolve_count("auto", tmp_path)])
    ((images, embeddings),) = seen
    torch.testing.assert_close(images, grades.images[grades.pair_images])
    torch.testing.assert_close(embeddings, grades.questions[grades.pair_questions])
    odd, majority = words.tokenizer.convert_tokens_to_ids(["odd", "majority"])
    table = model.get_input_embeddings().weight.detach()
    expected = table[[odd, odd, majority, majority]]  # two images each
    torch.testing.assert_close(embeddings.detach(), expected)


def test_confidence_is_generations_own_where_the_answer_is_right(processor, dataset, half_taught):  # noqa: F811
    grades = grade(half_taught, processor, dataset, COUNTS)
    encoder = ConversationEncoder(processor.tokenizer, processor.image_prompt)
    prompts = [
        (sample.images[0], encoder.prompt(Conversation(c.turns[:1]), 1))
        for sample in (dataset[i] for i in range(len(dataset)))
        for c in sample.conversations
    ]
    inputs = processor(
        images=[[image] for image, _ in prompts],
        text=[prompt for _, prompt in prompts],
        num_image_tokens="auto",
    )
    answers = generate_with_escalation(
        half_taught,
        **inputs,
        counts=(9,),
        max_new_tokens=2,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=0,
    )
    rows = grades.right[:, 1]
    assert rows.sum() > 4
    torch.testing.assert_close(
        torch.tensor(answers.confidences)[rows], grades.confidence[rows, 1], rtol=1e-4, atol=1e-5
    )


def test_statistics_and_embeddings_are_means_and_deviations():
    model = tiny_model()
    encoded = model.encode_images(torch.randn(3, 3, 32, 32)).to("cpu")
    got = image_statistics(encoded, [1, 2]).detach()
    whole = encoded.features.detach()
    for row, features in zip(got, (whole[:64], whole[64:]), strict=True):
        expected = torch.cat([features.mean(0), features.std(0, correction=0)])
        torch.testing.assert_close(row, expected)
    embedding = model.get_input_embeddings()
    words = [torch.tensor([5, 6, 6]), torch.zeros(0, dtype=torch.int64), torch.tensor([7])]
    vectors = question_embeddings(embedding, words).detach()
    torch.testing.assert_close(vectors[0], embedding(words[0]).mean(0).detach())
    assert vectors[1].abs().max() == 0
    torch.testing.assert_close(vectors[2], embedding(words[2])[0].detach())


@pytest.mark.parametrize("change", ["whole conversations", "a row at a time"])
def test_grades_do_not_depend_on_how_the_work_is_shared_out(
    processor,  # noqa: F811
    dataset,
    half_taught,  # noqa: F811
    monkeypatch,
    change,
):
    assert half_taught.takes_shared_prefixes
    usual = grade(half_taught, processor, dataset, COUNTS)
    if change == "whole conversations":
        monkeypatch.setattr(type(half_taught), "takes_shared_prefixes", False)
    else:
        monkeypatch.setattr(forced_grading, "ROWS_AT_ONCE", 1)
    grades = grade(half_taught, processor, dataset, COUNTS)
    assert torch.equal(grades.right, usual.right)
    torch.testing.assert_close(grades.confidence, usual.confidence)
    assert 0 < grades.confidence.min() < grades.confidence.max() <= 1


class Unanswered(Several):
    """Those of :class:`Several`, and one in front that has no answer."""

    samples = (
        Sample("s7", (picture(1),), (Conversation((Turn("user", "odd"),)),)),
        *Several.samples,
    )


def test_a_conversation_without_an_answer_is_left_out_by_name():
    model, words = tiny_model(), digits_processor()
    reason = "sample s7: a conversation holds no answer to grade"
    with pytest.warns(UserWarning, match=f"left out: {reason}"):
        grades = grade(model, words, Unanswered(), COUNTS)
    whole = grade(model, words, Several(), COUNTS)
    assert torch.equal(grades.samples, whole.samples + 1)
    assert torch.equal(grades.right, whole.right)
    pairs = (grades.images[grades.pair_images], whole.images[whole.pair_images])
    torch.testing.assert_close(*pairs)
    with pytest.raises(BrokenSamplesError, match=f"more than max_broken_samples of 0.*{reason}"):
        grade(model, words, Unanswered(), COUNTS, max_broken_samples=0)


def test_samples_of_which_none_can_be_graded_are_an_error():
    class Alone(Several):
        samples = Unanswered.samples[:1]

    with (
        pytest.warns(UserWarning, match="left out: sample s7"),
        pytest.raises(BrokenSamplesError, match="none of the 1 samples can be asked: sample s7"),
    ):
        grade(tiny_model(), digits_processor(), Alone(), COUNTS)


def test_no_samples_are_refused():
    class Nothing(Several):
        samples = ()

    with pytest.raises(ValueError, match="at least one sample"):
        grade(tiny_model(), digits_processor(), Nothing(), COUNTS)


def test_the_mode_of_the_model_is_restored():
    model = tiny_model().train()
    grade(model, digits_processor(), DigitsDataset("test", size=1, questions=1), COUNTS)
    assert model.training
