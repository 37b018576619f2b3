"""Conversations to ids and labels: the assistant's words and its end-of-turn, nothing else."""

from __future__ import annotations

import copy
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models.tiny import picture
from tokenflex import TokenFlexProcessor
from tokenflex.data.encoding import CACHED_CONVERSATIONS, ConversationEncoder
from tokenflex.data.samples import Conversation, Turn
from tokenflex.data.sequences import IGNORE
from tokenflex.digits.processor import digits_processor

ROLE_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} <eos> "
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
# Like templates that drop the reasoning of earlier answers: the past changes as turns are added.
REWRITING_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and not loop.last %}dropped {% else %}"
    "{{ message['content'] }} {% endif %}{% endfor %}"
)


def conversation(*texts: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return Conversation(tuple(([Turn("system", system)] if system else []) + turns))


def encoder_with(template: str | None = None) -> ConversationEncoder:
    tokenizer = copy.deepcopy(digits_processor().tokenizer)
    if template is not None:
        tokenizer.add_tokens(["system", "user", "assistant", ":", "short", "dropped"])
        tokenizer.chat_template = template
    return ConversationEncoder(tokenizer, "<image>")


def encode(encoder: ConversationEncoder, talk: Conversation, num_images: int):
    (sequence,) = encoder([talk], num_images)
    assert sequence.images == slice(0, num_images)
    return sequence.ids, sequence.labels


def words(encoder, ids) -> list[str]:
    return encoder.tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def learned(encoder, ids, labels) -> list[str]:
    kept = labels != IGNORE
    assert labels[kept].tolist() == ids[kept].tolist()  # aligned, not shifted
    return words(encoder, ids[kept])


def test_the_answer_and_its_end_are_learned():
    encoder = encoder_with()
    ids, labels = encode(encoder, conversation("read r1c1", "7"), num_images=1)
    assert words(encoder, ids) == ["<image>", "read", "r1c1", "7", "<eos>"]
    assert labels.tolist() == [IGNORE] * 3 + ids[3:].tolist()
    assert ids.dtype == labels.dtype


def test_several_turns_learn_each_answer():
    encoder = encoder_with(ROLE_TEMPLATE)
    talk = conversation("odd", "3", "count", "5", "where", "top-left", system="short")
    ids, labels = encode(encoder, talk, num_images=0)
    assert " ".join(words(encoder, ids)) == (
        "system : short <eos> user : odd <eos> assistant : 3 <eos> "
        "user : count <eos> assistant : 5 <eos> user : where <eos> assistant : top-left <eos>"
    )
    assert learned(encoder, ids, labels) == ["3", "<eos>", "5", "<eos>", "top-left", "<eos>"]


def test_a_last_question_without_an_answer_is_not_learned():
    encoder = encoder_with(ROLE_TEMPLATE)
    ids, labels = encode(encoder, conversation("odd", "3", "count"), num_images=0)
    assert learned(encoder, ids, labels) == ["3", "<eos>"]


def test_images_stand_before_the_first_user_turn_unless_marked():
    encoder = encoder_with(ROLE_TEMPLATE)
    talk = conversation("odd", "3", "count", "5", system="short")
    ids, _ = encode(encoder, talk, num_images=2)
    assert words(encoder, ids)[3:9] == ["<eos>", "user", ":", "<image>", "<image>", "odd"]
    marked = conversation("odd", "3", "count <image> where", "5")
    ids, _ = encode(encoder, marked, num_images=1)
    assert words(encoder, ids).count("<image>") == 1
    assert words(encoder, ids)[8:13] == ["user", ":", "count", "<image>", "where"]


def test_the_tokenizers_own_placeholder_replaces_the_mark():
    tokenizer = copy.deepcopy(digits_processor().tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    encoder = ConversationEncoder(tokenizer, "<picture>")
    ids, _ = encode(encoder, conversation("read <image> odd", "7"), num_images=1)
    assert words(encoder, ids)[:3] == ["read", "<picture>", "odd"]


@pytest.mark.parametrize("words_of", ["odd", "odd <image> even", "<image> odd"])
def test_training_reads_what_a_chat_reads(words_of):
    """Also where the template iterates parts, and where marks stand around an image."""
    parts = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ 'where <image>' if part.type == 'image' else part.text }}"
        "{% endfor %}{% endif %}{{ ' : ' }}{% endfor %}"
    )
    iterating = (
        "{% for m in messages %}{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %} : {% endfor %}"
    )
    base = digits_processor(1)
    for template in (None, parts, iterating):
        processor = TokenFlexProcessor(
            base.image_processor,
            copy.deepcopy(base.tokenizer),
            num_image_tokens=1,
            image_start="read ",
            image_end=" blank",
            chat_template=template,
        )
        processor.tokenizer.chat_template = processor.chat_template
        encoder = ConversationEncoder(
            processor.tokenizer, processor.image_prompt, processor.image_token
        )
        ids, labels = encode(
            encoder, conversation(words_of, "7"), num_images=words_of.count("<image>")
        )
        content = []
        for i, piece in enumerate(words_of.split("<image>")):
            content += [{"type": "image", "image": picture(i)}] * (i > 0)
            content.append({"type": "text", "text": piece})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}],
            tokenize=True,
        )
        assert ids.tolist() == inputs[0].tolist()
        assert "7" in learned(encoder, ids, labels)


def test_the_number_of_images_is_part_of_the_question():
    """The encoder remembers conversations; the same words about other images are another one."""
    encoder, talk = encoder_with(), conversation("odd", "7")
    lengths = [len(encode(encoder, talk, n)[0]) for n in (0, 1, 2, 1, 0)]
    assert lengths == [3, 4, 5, 4, 3]


def test_new_conversations_of_a_sample_are_one_call_of_the_tokenizer(monkeypatch):
    texts_of_calls = []
    tokenize = PreTrainedTokenizerFast.__call__

    def recording(self, texts, **options):
        texts_of_calls.append(texts)
        return tokenize(self, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", recording)
    encoder = encoder_with()
    known, new = conversation("odd", "3"), conversation("count", "5", "where", "top-left")
    encoder([known, conversation("read r1c1", "7"), known], 0)
    encoder([known, new], 0)
    assert texts_of_calls == [
        ["odd ", "3<eos>", "read r1c1 ", "7<eos>"],
        ["count ", "5<eos>", "where ", "top-left<eos>"],
    ]


def test_memory_is_bounded():
    encoder = encoder_with()
    for n in range(CACHED_CONVERSATIONS + 5):
        talk = Conversation((Turn("user", "odd"), Turn("assistant", "7")), kind=str(n))
        encode(encoder, talk, 0)
    assert len(encoder._cache) <= CACHED_CONVERSATIONS


def test_what_is_remembered_cannot_be_changed():
    ids, labels = encode(encoder_with(), conversation("odd", "7"), num_images=1)
    for array in (ids, labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 9


def test_a_prompt_is_the_beginning_of_what_was_trained():
    encoder = encoder_with(ROLE_TEMPLATE)
    ids, labels = encode(encoder, conversation("odd", "3"), num_images=1)
    prompt = encoder.prompt(Conversation((Turn("user", "odd"),)), num_images=1)
    asked = encoder.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert asked == ids[labels == IGNORE].tolist()


def test_a_template_that_rewrites_the_past_is_refused():
    encoder = encoder_with(REWRITING_TEMPLATE)
    encode(encoder, conversation("odd", "3"), num_images=0)  # one turn has no past
    with pytest.raises(ValueError, match=r"turn by turn.*turn 3"):
        encode(encoder, conversation("odd", "3", "count", "5"), num_images=0)


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = copy.deepcopy(digits_processor().tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template"):
        ConversationEncoder(tokenizer, "<image>")


def test_images_without_a_user_turn_are_refused():
    """Not StopIteration: a data loader takes that for the end of the data."""
    only_answer = Conversation((Turn("assistant", "7"),))
    with pytest.raises(ValueError, match="user"):
        encode(encoder_with(), only_answer, num_images=1)


@pytest.mark.parametrize("texts", [("odd <picture>", "3"), ("odd", "3 <picture>")])
@pytest.mark.parametrize("images", [0, 1])
def test_a_text_that_holds_the_placeholder_is_refused(texts, images):
    tokenizer = copy.deepcopy(digits_processor().tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    encoder = ConversationEncoder(tokenizer, "<picture>")
    for read in (partial(encode, encoder), encoder.prompt):
        with pytest.raises(ValueError, match="holds <picture>, the processor's own placeholder"):
            read(conversation(*texts), images)


@pytest.mark.parametrize(("text", "images"), [("odd <image> <image>", 1), ("odd <image>", 2)])
def test_a_conversation_has_a_placeholder_for_each_image(text, images):
    message = f"one placeholder, <image>, for each of its {images} images, got {text.count('<')}"
    with pytest.raises(ValueError, match=message):
        encode(encoder_with(), conversation(text, "3"), images)


def test_an_image_behind_the_last_answer_is_refused():
    with pytest.raises(ValueError, match="for each of its 1 images, got 0"):
        encode(encoder_with(), conversation("odd", "3", "count <image>"), 1)


# ---------------------------------------------------------------------- one call for all texts

TEMPLATES = {
    "marks": "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "stripped": "{% for m in messages %}{{ m.content | trim }} {% endfor %}",
    "nothing between": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "last turn marked": "{% for m in messages %}{{ m.content }}{% if loop.last %}.{% endif %}"
    "{% endfor %}",
    "earlier answers dropped": "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
    "{{ m.content }}{% endif %} {% endfor %}",
    "words before answers": "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %} b"
    "{% endif %}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: b{% endif %}",
}


def merging_tokenizer(pre_tokenizer, template: str) -> PreTrainedTokenizerFast:
    """Letters, and pairs that merge: also where the end of one turn meets the next."""
    letters = [*map(chr, range(33, 127)), "Ġ", "▁"]
    merges = [("a", "b"), ("b", "a"), ("ab", "ab"), ("b", "["), ("]", "a"), ("Ġ", "a"), ("▁", "a")]
    vocabulary = {"<image>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens(["<image>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def piece_by_piece(tokenizer, talk: Conversation, images: int):
    """(ids, labels) by a call of the tokenizer for every turn; None where turns rewrite others."""
    messages = [{"role": turn.role, "content": turn.text} for turn in talk.turns]
    messages[0]["content"] = "<image>" * images + messages[0]["content"]
    written, ids, labels = "", [], []
    for i in range(1, len(messages), 2):
        options = [(messages[:i], True, False), (messages[: i + 1], False, True)]
        for shown, ask, is_learned in options:
            text = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=ask)
            if not text.startswith(written):
                return None
            tokens = tokenizer(text[len(written) :], add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if is_learned else [IGNORE] * len(tokens)
            written = text
    return ids, labels


@pytest.mark.parametrize("pre_tokenizer", ["bytes", "words with a space before the first"])
@pytest.mark.parametrize("template", TEMPLATES)
@given(
    st.lists(st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=5), max_size=5),
    st.integers(0, 2),
)
@settings(deadline=None, max_examples=25)
def test_one_call_tokenizes_as_a_call_for_each_turn(pre_tokenizer, template, texts, images):
    pre_tokenizers_of = {
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "words with a space before the first": pre_tokenizers.Metaspace(),
    }
    tokenizer = merging_tokenizer(pre_tokenizers_of[pre_tokenizer], TEMPLATES[template])
    talks = [conversation(*text) for text in texts]
    expected = [piece_by_piece(tokenizer, talk, images) for talk in talks]
    encoder = ConversationEncoder(tokenizer, "<image>")
    if None in expected:
        with pytest.raises(ValueError, match="turn by turn"):
            encoder(talks, images)
    regular = [(talk, pieces) for talk, pieces in zip(talks, expected, strict=True) if pieces]
    sequences = encoder([talk for talk, _ in regular], images)
    encoded = [(sequence.ids.tolist(), sequence.labels.tolist()) for sequence in sequences]
    assert encoded == [pieces for _, pieces in regular]
