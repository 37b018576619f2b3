"""The collator: what a packed batch holds, against lists written out by hand."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import IMAGE, picture, tiny_model
from tokenflex import TokenCounts
from tokenflex.data.order import load_in_order
from tokenflex.data.packing import DrawnSample, PackedBatch, PackingCollator
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor

COUNTS = TokenCounts((4, 9, 16), (0.2, 0.3, 0.5), seed=7)


def talk(*texts: str, kind: str = "") -> Conversation:
    turns = (Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    return Conversation(tuple(turns), kind)


def sample(name: str, images: int, *conversations: Conversation) -> Sample:
    first = sum(map(ord, name))
    return Sample(name, tuple(picture(first + i) for i in range(images)), conversations)


SAMPLES = [
    sample("one", 1, talk("odd", "3", kind="odd"), talk("read r1c1", "blank", kind="read")),
    sample("two", 2, talk("<image> where <image> count", "5", "odd", "7", kind="count")),
    sample("none", 0, talk("majority", "red green", kind="majority")),
    sample("again", 1, talk("colour r2c2", "blue", kind="colour")),
]


@pytest.fixture(scope="module")
def processor():
    return digits_processor()


def drawn(samples=SAMPLES, epoch=0) -> list[DrawnSample]:
    return [DrawnSample(index, epoch, one) for index, one in enumerate(samples)]


def naive_rows(items: list[DrawnSample], counts: TokenCounts, tokenizer):
    """For each conversation, (word, position, is learned, vision token shown) of every row."""
    shown_before = 0
    for item in items:
        count, images = counts.draw(item.index, item.epoch), len(item.sample.images)
        for conversation in item.sample.conversations:
            words = []
            marked = any("<image>" in turn.text for turn in conversation.turns)
            for turn in conversation.turns:
                text = turn.text.split()
                if not marked and not words:
                    text = ["<image>"] * images + text
                words += [(word, turn.role == "assistant") for word in text]
                if turn.role == "assistant":
                    words.append(("<eos>", True))
            token = shown_before
            rows = []
            for word, is_learned in words:
                for _ in range(count if word == "<image>" else 1):
                    is_image = word == "<image>"
                    rows.append((word, len(rows), is_learned, token if is_image else None))
                    token += is_image
            yield item.sample.id, conversation.kind, rows
        shown_before += count * images


@pytest.mark.parametrize("epoch", range(4))
def test_batch_is_what_the_written_out_rows_say(processor, epoch):
    batch = PackingCollator(processor, COUNTS)(drawn(epoch=epoch))
    sequences = list(naive_rows(drawn(epoch=epoch), COUNTS, processor.tokenizer))
    rows = [row for _, _, sequence in sequences for row in sequence]
    ids = processor.tokenizer.convert_tokens_to_ids([word for word, *_ in rows])

    assert batch.plan.input_ids.tolist() == ids
    assert batch.plan.position_ids.tolist() == [position for _, position, _, _ in rows]
    assert list(batch.plan.lengths) == [len(sequence) for _, _, sequence in sequences]
    # Which projected row stands at each row of the batch.
    source = batch.plan.source.tolist()
    assert [~s if s < 0 else None for s in source] == [token for *_, token in rows]
    shown = sorted((row[3], r) for r, row in enumerate(rows) if row[3] is not None)
    assert batch.plan.vision_rows.tolist() == [r for _, r in shown]
    # The row before a learned row predicts it.
    targets = [[r - 1, ids[r]] for r, row in enumerate(rows) if row[2] and row[1] > 0]
    assert torch.stack([batch.target_rows, batch.targets], 1).tolist() == targets
    assert batch.answers == [
        (kind, sum(row[2] for row in sequence)) for _, kind, sequence in sequences
    ]
    assert batch.sample_ids == ["one", "two", "none", "again"]


def test_counts_are_drawn_per_sample_and_epoch(processor):
    collator = PackingCollator(processor, COUNTS)
    seen = set()
    for epoch in range(8):
        batch = collator(drawn(epoch=epoch))
        a, b, _, d = (COUNTS.draw(index, epoch) for index in range(4))
        assert batch.num_image_tokens == [a, b, b, d]
        assert all(isinstance(count, int) for count in batch.num_image_tokens)
        seen.add(len({a, b, d}))
    assert max(seen) > 1  # or the draws above could not tell samples apart


def test_grids_are_packed_as_the_tokens_they_stand_for(processor):
    squares = TokenCounts((4, 16), (1, 1), seed=7)
    grids = TokenCounts(((1, 4), (8, 2)), (1, 1), seed=7)
    expected = PackingCollator(processor, squares)(drawn())
    batch = PackingCollator(processor, grids)(drawn())
    names = {4: (1, 4), 16: (8, 2)}
    assert batch.num_image_tokens == [names[count] for count in expected.num_image_tokens]
    assert set(batch.num_image_tokens) == {(1, 4), (8, 2)}
    assert torch.equal(batch.plan.source, expected.plan.source)
    with torch.no_grad():
        logits = tiny_model()(**batch.model_inputs()).logits
        squares_logits = tiny_model()(**expected.model_inputs()).logits
    assert logits.shape == squares_logits.shape
    assert not torch.allclose(logits, squares_logits)


def test_counts_depend_on_the_sample_not_on_its_company(processor):
    collator = PackingCollator(processor, COUNTS)
    together = collator(drawn())
    reversed_batch = collator(drawn()[::-1])
    assert reversed_batch.num_image_tokens == together.num_image_tokens[::-1]
    alone = [collator([one]).num_image_tokens for one in drawn()]
    assert [n for counts in alone for n in counts] == together.num_image_tokens


def test_conversations_of_a_sample_share_its_vision_rows(processor):
    batch = PackingCollator(processor, TokenCounts((4,), (1,)))(drawn(SAMPLES[:1]))
    assert batch.pixel_values.shape[0] == 1
    assert batch.num_image_tokens == [4]
    assert batch.plan.vision_tokens().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pixels_are_the_image_processors(processor):
    batch = PackingCollator(processor, COUNTS)(drawn())
    images = [image for one in SAMPLES for image in one.images]
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.pixel_values, expected)


def test_no_target_crosses_into_the_next_conversation(processor):
    batch = PackingCollator(processor, COUNTS)(drawn())
    last_rows = set((batch.plan.cu_seqlens[1:] - 1).tolist())
    assert not last_rows & set(batch.target_rows.tolist())


def test_text_only_batch_runs(processor):
    batch = PackingCollator(processor, COUNTS)(drawn(SAMPLES[2:3]))
    assert batch.pixel_values.shape[0] == 0
    assert batch.num_image_tokens == []
    assert batch.plan.vision_rows.tolist() == []
    with torch.no_grad():
        logits = tiny_model()(**batch.model_inputs()).logits
    assert logits.shape[1] == len(batch.targets) == 3


def test_model_gives_logits_at_the_target_rows(processor):
    model, batch = tiny_model(), PackingCollator(processor, COUNTS)(drawn())
    inputs = batch.model_inputs()
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        everything = model(**{**inputs, "logits_to_keep": 0}).logits[0]
    assert torch.allclose(logits, everything[batch.target_rows], atol=1e-6)


def test_packed_answers_score_as_they_do_alone(processor):
    """Targets, vision rows and counts together, against each conversation alone and padded."""
    model, batch = tiny_model(), PackingCollator(processor, COUNTS)(drawn())
    with torch.no_grad():
        packed = model(**batch.model_inputs()).logits[0].log_softmax(-1)
        packed = packed.gather(1, batch.targets[:, None]).squeeze(1)
        alone = []
        sequences = naive_rows(drawn(), COUNTS, processor.tokenizer)
        for name, _, rows in sequences:
            item = next(one for one in drawn() if one.sample.id == name)
            ids = processor.tokenizer.convert_tokens_to_ids([word for word, *_ in rows])
            inputs = {"input_ids": torch.tensor([ids])}
            if item.sample.images:
                inputs |= processor.image_processor(list(item.sample.images), return_tensors="pt")
                inputs["num_image_tokens"] = COUNTS.draw(item.index, 0)
            scores = model(**inputs).logits[0].log_softmax(-1)
            alone += [scores[t - 1, ids[t]] for t, row in enumerate(rows) if row[2]]
    assert float((packed - torch.stack(alone)).abs().max()) < 1e-5


def test_an_image_in_an_answer_is_shown_and_not_learned(processor):
    shown = sample("shown", 1, talk("where", "<image> red", kind="where"))
    batch = PackingCollator(processor, COUNTS)(drawn([shown]))
    assert IMAGE not in batch.targets.tolist()
    assert len(batch.targets) == 2  # red <eos>
    assert batch.answers == [("where", 2)]


@pytest.mark.parametrize("images", [0, 1])
def test_an_error_names_the_sample(processor, images):
    bad = sample("broken", images, Conversation((Turn("assistant", "3"),)))
    with pytest.raises(ValueError, match="sample broken"):
        PackingCollator(processor, COUNTS)(drawn([*SAMPLES[:1], bad]))


# ---- conversations that share their prefix

EIGHT = sample(
    "eight", 1, *(talk(f"read r{1 + i // 4}c{1 + i % 4}", str(i), kind="read") for i in range(8))
)
LATER = sample("later", 2, talk("<image> odd <image>", "3"), talk("<image> count <image>", "5 7"))
MIXED = [SAMPLES[3], EIGHT, *SAMPLES[:3], LATER]


def sharing(processor, counts=COUNTS) -> PackingCollator:
    return PackingCollator(processor, counts, share_prefix=True)


def test_shared_rows_written_out(processor):
    batch = sharing(processor, TokenCounts((4,), (1,)))(drawn([SAMPLES[0], SAMPLES[3]]))
    words = processor.tokenizer.convert_ids_to_tokens(batch.plan.input_ids.tolist())
    shown, alone = ["<image>"] * 4, ["colour", "r2c2", "blue", "<eos>"]
    first, second = ["odd", "3", "<eos>"], ["read", "r1c1", "blank", "<eos>"]
    assert words == [*shown, *first, *second, *shown, *alone]
    assert batch.shared_prefixes.parents == (-1, 0, 0, -1)
    assert batch.shared_prefixes.position_ids.tolist() == [
        *range(4),
        4,
        5,
        6,
        *range(4, 8),
        *range(8),
    ]
    assert batch.plan.vision_tokens().tolist() == list(range(8))
    assert batch.plan.shown_once
    assert batch.num_image_tokens == [4, 4]
    assert batch.target_rows.tolist() == [4, 5, 8, 9, 16, 17]
    targets = processor.tokenizer.convert_ids_to_tokens(batch.targets.tolist())
    assert targets == ["3", "<eos>", "blank", "<eos>", "blue", "<eos>"]
    assert batch.answers == [("odd", 2), ("read", 2), ("colour", 2)]


def test_images_after_what_is_common_are_shown_again(processor):
    batch = sharing(processor, TokenCounts((4,), (1,)))(drawn([LATER]))
    assert batch.shared_prefixes.parents == (-1, 0, 0)
    assert batch.plan.vision_tokens().tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7]


@pytest.mark.parametrize("epoch", range(3))
def test_sharing_changes_rows_and_nothing_that_is_learned(processor, epoch):
    plain = PackingCollator(processor, COUNTS)(drawn(MIXED, epoch))
    shared = sharing(processor)(drawn(MIXED, epoch))
    assert shared.plan.num_tokens < 0.75 * plain.plan.num_tokens
    assert torch.equal(shared.targets, plain.targets)
    assert shared.answers == plain.answers
    assert shared.num_image_tokens == plain.num_image_tokens
    assert torch.equal(shared.pixel_values, plain.pixel_values)


def test_shared_answers_score_and_teach_as_they_do_repeated(processor):
    scores, gradients = [], []
    for collator in (PackingCollator(processor, COUNTS), sharing(processor)):
        model, batch = tiny_model().train(), collator(drawn(MIXED))
        logits = model(**batch.model_inputs()).logits[0]
        scores.append(logits.detach())
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert float((scores[0] - scores[1]).abs().max()) < 1e-5
    assert float(scores[0].std()) > 0.1
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))


def test_nothing_shared_is_no_word_of_prefixes(processor):
    assert sharing(processor)(drawn(SAMPLES[1:])).shared_prefixes is None
    assert PackingCollator(processor, COUNTS)(drawn(MIXED)).shared_prefixes is None
    assert sharing(processor)([]).shared_prefixes is None


def assert_same_batch(actual: PackedBatch, expected: PackedBatch) -> None:
    assert torch.equal(actual.pixel_values, expected.pixel_values)
    assert torch.equal(actual.plan.source, expected.plan.source)
    assert torch.equal(actual.plan.labels, expected.plan.labels)
    assert actual.plan.lengths == expected.plan.lengths
    assert actual.plan.image_index == expected.plan.image_index
    assert torch.equal(actual.target_rows, expected.target_rows)
    assert torch.equal(actual.targets, expected.targets)
    assert actual.num_image_tokens == expected.num_image_tokens
    assert (actual.answers, actual.sample_ids) == (expected.answers, expected.sample_ids)


def packed_batches(dataset, collator, keys, workers=0) -> list[PackedBatch]:
    def pack(step):
        return collator([DrawnSample(index, epoch, dataset[index]) for epoch, index in step])

    return list(load_in_order(pack, keys, workers=workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches_in_the_same_order(processor, workers):
    dataset, collator = DigitsDataset(size=20, questions=2), PackingCollator(processor, COUNTS)
    keys = [[(0, 3), (0, 1)], [(1, 3), (0, 7)], [(2, 19)], [(0, 0), (0, 2), (0, 4)], [(5, 5)]]
    inline = packed_batches(dataset, collator, keys)
    remote = packed_batches(dataset, collator, keys, workers)
    assert [batch.sample_ids for batch in inline][1] == ["digits-train-3", "digits-train-7"]
    for a, b in zip(remote, inline, strict=True):
        assert_same_batch(a, b)


def test_loader_draws_with_the_epoch_of_the_key(processor):
    dataset, collator = DigitsDataset(size=20, questions=1), PackingCollator(processor, COUNTS)
    keys = [[(epoch, 3)] for epoch in range(12)]
    counts = [batch.num_image_tokens[0] for batch in packed_batches(dataset, collator, keys)]
    assert counts == [COUNTS.draw(3, epoch) for epoch in range(12)]
    assert len(set(counts)) == 3


def test_a_moved_batch_keeps_its_host_numbers(processor):
    batch = PackingCollator(processor, COUNTS)(drawn())
    assert_same_batch(batch.to("cpu"), batch)
    moved = sharing(processor)(drawn()).to("meta")
    assert moved.shared_prefixes.key_rows.is_meta
    moved = batch.to("meta")
    assert moved.pixel_values.is_meta
    assert moved.plan.source.is_meta
    assert moved.targets.is_meta
    assert moved.num_image_tokens == batch.num_image_tokens
    assert moved.plan.lengths == batch.plan.lengths
