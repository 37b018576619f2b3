"""Accuracy is the share of questions that greedy generation answers exactly."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from tests.models.tiny import PAD, picture, tiny_model
from tokenflex import TokenCounts
from tokenflex.data.encoding import ConversationEncoder
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import SPECIAL_TOKENS, digits_processor
from tokenflex.evaluation import evaluate

COUNTS = (4, 9, 16)


@pytest.fixture(scope="module")
def processor():
    return digits_processor()


def greedy_answer(model, processor, sample: Sample, question: str, count: int, length: int) -> str:
    """What generation says, up to its end-of-answer or ``length`` tokens."""
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


def test_a_model_that_cannot_share_prefixes_is_graded_the_same(processor, dataset, half_taught):
    expected = evaluate(half_taught, processor, dataset, COUNTS)
    half_taught.model.language_model.set_attn_implementation("eager")
    try:
        assert evaluate(half_taught, processor, dataset, COUNTS) == expected
    finally:
        half_taught.model.language_model.set_attn_implementation("tokenflex_varlen")


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


def test_workers_give_the_same_report(processor, dataset, half_taught):
    inline = evaluate(half_taught, processor, dataset, COUNTS, batch_size=2)
    assert evaluate(half_taught, processor, dataset, COUNTS, batch_size=2, workers=1) == inline


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
