"""Conversations: any chat template, images in every form, options that are used or refused."""

from __future__ import annotations

import base64
import copy
from io import BytesIO

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil

from tests.models.tiny import IMAGE, PIXELS, picture
from tokenflex import TokenFlexProcessor
from tokenflex.digits.processor import digits_processor
from tokenflex.models import chat
from tokenflex.models.chat import assistant_masks, without_placeholders

A, B = picture(1), picture(2)
INPUTS = {"tokenize": True, "return_dict": True}
STRINGS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
IMAGES_FIRST = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
    "{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ 'Picture: <image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def shown(image, key: str = "image") -> dict:
    return {"type": "image", key: image}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def processor() -> TokenFlexProcessor:
    return digits_processor(num_image_tokens=4)


@pytest.fixture(scope="module")
def letters() -> TokenFlexProcessor:
    """A processor that keeps every character, in whose prompts marks stand around images."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<picture>", "<image>"])
    backend.add_tokens(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    images = SiglipImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    return TokenFlexProcessor(
        images, tokenizer, num_image_tokens=4, image_token="<picture>", image_start="<"
    )


# ---- chat templates


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRINGS, "[system]be brief[user]odd <image> even <image>[assistant]7"),
        (PARTS, "[system]be brief[user]odd <image> even <image>[assistant]7"),
        (IMAGES_FIRST, "[system]be brief[user]<image>\n<image>\nodd  even [assistant]7"),
        (EITHER, "be briefodd Picture: <image> even Picture: <image>7"),
    ],
)
@pytest.mark.parametrize("system", ["be brief", [text("be brief")]])
def test_a_template_writes_images_as_it_takes_contents(processor, template, expected, system):
    messages = [
        {"role": "system", "content": system},
        *user(text("odd "), shown(A), text(" even "), shown(B)),
        {"role": "assistant", "content": "7"},
    ]
    before = copy.deepcopy([{**m, "content": str(m["content"])} for m in messages])
    assert processor.apply_chat_template(messages, chat_template=template) == expected
    assert [{**m, "content": str(m["content"])} for m in messages] == before
    inputs = processor.apply_chat_template(messages, chat_template=template, **INPUTS)
    assert int((inputs["input_ids"] == IMAGE).sum()) == 8


@pytest.mark.parametrize("template", [STRINGS, PARTS, IMAGES_FIRST])
@pytest.mark.parametrize("content", ["odd", [text("odd")], [text("o"), text("dd")]])
def test_texts_without_images_are_written_whole(processor, template, content):
    messages = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(messages, chat_template=template) == "[user]odd"


def test_a_text_may_look_like_a_printed_part(processor):
    words = "what is {'type': 'text'}"
    assert processor.apply_chat_template(user(text(words)), chat_template=STRINGS).endswith(words)


def test_a_form_that_fitted_is_tried_first(processor, monkeypatch):
    rendered = []

    def render_jinja_template(**options):
        rendered.append(options)
        return render(**options)

    render = chat.render_jinja_template
    monkeypatch.setattr(chat, "render_jinja_template", render_jinja_template)
    template = STRINGS + "{# of this test alone #}"
    for words, tries in (("a", 2), ("b", 1), ("c", 1)):
        rendered.clear()
        messages = user(shown(A), text(words))
        written = processor.apply_chat_template(messages, chat_template=template)
        assert (written, len(rendered)) == (f"[user]<image>{words}", tries)


def test_a_form_that_fitted_need_not_fit_again(processor):
    """As this template, which takes strings, except that of one word."""
    taken = "m.content is string and m.content != 'odd' or m.content is not string"
    template = (
        f"{{% for m in messages %}}{{% if not ({taken}) %}}{{{{ 1 + '' }}}}{{% endif %}}"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    for words in ("even", "odd", "even"):
        messages = [{"role": "user", "content": words}]
        assert processor.apply_chat_template(messages, chat_template=template) == words


def test_a_template_may_leave_texts_out(processor):
    template = PARTS.replace("part['text'] }}", "part['text'].split('</think>')[-1] }}")
    messages = [*user(shown(A)), {"role": "assistant", "content": "hm</think>7"}]
    written = processor.apply_chat_template(messages, chat_template=template)
    assert written == "[user]<image>[assistant]7"


def test_other_keys_tools_and_documents_reach_the_template(processor):
    template = (
        "{{ tools[0].function.name }} {{ documents[0].title }} {% for m in messages %}"
        "{{ m.content or m.tool_calls[0].function.name }} {{ m.name }} {% endfor %}{{ flavour }}"
    )
    call = {"type": "function", "function": {"name": "look"}}
    messages = [
        {"role": "user", "content": "odd", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    written = processor.apply_chat_template(
        messages,
        chat_template=template,
        tools=[{"type": "function", "function": {"name": "zoom"}}],
        documents=[{"title": "map", "text": "x"}],
        flavour="sweet",
    )
    assert written.split() == ["zoom", "map", "odd", "ann", "look", "sweet"]


def test_the_last_message_can_be_continued(processor):
    messages = [*user(shown(A), text("odd")), {"role": "assistant", "content": [text("it is ")]}]
    for template in (STRINGS, PARTS):
        written = processor.apply_chat_template(
            messages, chat_template=template + "<eos>", continue_final_message=True
        )
        assert written.rstrip() == "[user]<image>odd[assistant]it is"


def test_named_templates(processor):
    both = TokenFlexProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template={"default": STRINGS, "short": "{{ messages[0].content }}"},
    )
    messages = user(text("odd"))
    assert both.apply_chat_template(messages) == "[user]odd"
    assert both.apply_chat_template(messages, chat_template="short") == "odd"
    both.chat_template = {"short": STRINGS}
    with pytest.raises(ValueError, match=r"chat_template must be given.*only short"):
        both.apply_chat_template(messages)


def test_a_template_refuses_in_its_own_words(processor):
    with pytest.raises(Exception, match=r"^roles must alternate$"):
        processor.apply_chat_template(
            user(shown(A)), chat_template="{{ raise_exception('roles must alternate') }}"
        )
    with pytest.raises(ValueError, match="'<image>' once per image, but wrote it 2 times for 1"):
        processor.apply_chat_template(user(shown(A), text("odd")), chat_template=PARTS + "<image>")
    with pytest.raises(ValueError, match="final message") as error:
        processor.apply_chat_template(
            user(shown(A), text("secret" * 50)),
            chat_template="{% for m in messages %}{{ '<image>' if m.content }}{% endfor %}",
            continue_final_message=True,
        )
    assert "secret" not in str(error.value)


# ---- masks of answers


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_masks_mark_the_answers(processor, side):
    first = [*user(shown(A), text(" odd ")), {"role": "assistant", "content": "7 <eos>"}]
    second = [*user(text("read r1c1 ")), {"role": "assistant", "content": "blank"}]
    inputs = processor.apply_chat_template(
        [first, second],
        chat_template=MARKED,
        return_assistant_tokens_mask=True,
        padding_side=side,
        **INPUTS,
    )
    assert set(inputs) == {
        *("input_ids", "attention_mask", "pixel_values", "num_image_tokens", "assistant_masks")
    }
    learned = [
        processor.tokenizer.convert_ids_to_tokens(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert learned == [["7", "<eos>"], ["blank"]]


def test_masks_move_with_what_placeholders_become():
    replaced = [{"span": (0, 3), "new_span": (0, 9), "replacement": "x" * 9}]
    tokens = [(0, 9), (10, 12), (13, 15), (0, 0)]
    assert assistant_masks([tokens], [[(4, 6)]], [replaced]) == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template": MARKED}, "tokenize=True and return_dict=True"),
        ({"chat_template": MARKED, "tokenize": True}, "tokenize=True and return_dict=True"),
        (INPUTS, "generation"),
    ],
)
def test_masks_that_cannot_be_made_are_refused(processor, options, words):
    with pytest.raises(ValueError, match=f"return_assistant_tokens_mask needs.*{words}"):
        processor.apply_chat_template(
            user(text("odd")), return_assistant_tokens_mask=True, **options
        )


# ---- images


def encoded(image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


DATA_URL = "data:image/png;base64," + base64.b64encode(encoded(A)).decode()


@pytest.mark.parametrize(
    "part",
    [
        lambda path: shown(A),
        lambda path: shown(np.asarray(A)),
        lambda path: shown(torch.from_numpy(np.asarray(A).copy()).permute(2, 0, 1)),
        lambda path: shown(encoded(A)),
        lambda path: shown(path),
        lambda path: shown(str(path)),
        lambda path: shown(DATA_URL),
        lambda path: shown(path, "path"),
        lambda path: shown(path.as_posix(), "url"),
        lambda path: shown(DATA_URL, "url"),
        lambda path: shown(base64.b64encode(encoded(A)).decode(), "base64"),
        lambda path: {"type": "image", "image": None, "url": DATA_URL},
        lambda path: {"type": "image_url", "image_url": DATA_URL},
        lambda path: {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}},
    ],
)
def test_a_part_holds_an_image_in_any_form(processor, tmp_path, part):
    A.save(tmp_path / "a.png")
    inputs = processor.apply_chat_template(user(part(tmp_path / "a.png"), text(" odd")), **INPUTS)
    expected = processor(images=A, text="<image> odd")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image"}, "an image part without an image"),
        ({"type": "image", "image": A, "url": "x"}, "one image, got image and url"),
        ({"type": "image_url", "image_url": {"detail": "low"}}, "must hold a url, got NoneType"),
        ({"type": "video"}, "a video part without a video"),
        ({"type": "video", "video": "x", "url": "x"}, "one video, got video and url"),
        ({"type": "video", "video": "x", "fps": 2}, "fps belongs to the call"),
        ({"type": "text", "text": 3}, "text must be a string, got int"),
        ({"type": "audio", "url": "x"}, "type 'audio'"),
        ({"type": "text"}, "text must be a string, got NoneType"),
        (shown(b"1" * 5000), "cannot be read"),
        (shown("data:image/png;base64," + "A" * 5000), "cannot be read"),
        (shown("?" * 5000), "text of 5000 characters"),
        (shown({"bytes": b"1" * 5000}), "got dict"),
    ],
)
def test_parts_that_are_refused_are_named(processor, part, words):
    conversations = [user(text("odd")), user(text("odd"), part)]
    with pytest.raises((TypeError, ValueError), match=words) as error:
        processor.apply_chat_template(conversations, **INPUTS)
    assert "conversation[1][0].content[1]" in str(error.value)
    assert len(str(error.value)) < 300
    with pytest.raises((TypeError, ValueError), match=r"^messages\[0\]\.content\[1\]"):
        processor.apply_chat_template(conversations[1], **INPUTS)


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ("odd", "list of messages.*got str"),
        ([], "at least one message"),
        ([3], r"messages\[0\] must be a dict, got int"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content.*got int"),
        ([user(text("odd")), [3]], r"conversation\[1\]\[0\] must be a dict"),
    ],
)
def test_conversations_that_are_none(processor, conversation, words):
    with pytest.raises((TypeError, ValueError), match=words):
        processor.apply_chat_template(conversation)


def test_no_image_is_opened_for_text(processor):
    written = processor.apply_chat_template(user(shown("/no/such.png", "path"), text(" odd")))
    assert written.split() == ["<image>", "odd"]


def test_images_stand_in_the_messages_or_beside_them(processor):
    for beside in (A, [A], [[A]]):
        inputs = processor.apply_chat_template(
            user({"type": "image"}, text(" odd")), images=beside, **INPUTS
        )
        assert len(inputs["pixel_values"]) == 1
    with pytest.raises(ValueError, match=r"got both: messages\[0\]\.content\[0\] holds one"):
        processor.apply_chat_template(user(shown(A)), images=[A], **INPUTS)


# ---- placeholders in texts


@pytest.mark.parametrize("options", [{}, INPUTS])
@pytest.mark.parametrize(
    "messages",
    [
        user(text("what is <image>")),
        user(shown(A), text("what is <image>")),
        [{"role": "system", "content": "an <image> is"}, *user(shown(A))],
    ],
)
def test_a_placeholder_in_a_text_is_refused(processor, messages, options):
    with pytest.raises(ValueError, match=r"messages\[0\]\.content.*'<image>' in its text"):
        processor.apply_chat_template(messages, **options)


def test_a_placeholder_made_of_two_texts_is_refused(processor):
    with pytest.raises(ValueError, match="wrote it 2 times for 1"):
        processor.apply_chat_template(user(shown(A), text("<im"), text("age>")))


def test_strings_say_where_images_beside_them_stand(processor):
    messages = [{"role": "user", "content": "odd <image>"}]
    assert processor.apply_chat_template(messages).split() == ["odd", "<image>"]
    inputs = processor.apply_chat_template(messages, images=[A], **INPUTS)
    assert inputs["num_image_tokens"] == [4]
    with pytest.raises(ValueError, match=r"got 1 .* for 0 images"):
        processor.apply_chat_template(messages, **INPUTS)


def test_both_marks_are_refused_where_they_differ(letters):
    for mark in ("<picture>", "<image>"):
        with pytest.raises(ValueError, match=mark):
            letters.apply_chat_template(user(shown(A), text(mark)), chat_template=STRINGS)
    with pytest.raises(ValueError, match="<image>"):
        letters.apply_chat_template([{"content": "<image>"}], chat_template=STRINGS)
    written = letters.apply_chat_template(user(text("a"), shown(A)), chat_template=STRINGS)
    assert written == "[user]a<<picture>"


def test_placeholders_are_removed_wherever_they_appear():
    assert without_placeholders("a <im<image>age> b", ["<image>"]) == "a  b"
    assert without_placeholders("<im<x>age>", ["<image>", "<x>"]) == ""


# ---- options


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"num_image_tokens": 9},
        {"num_image_tokens": [9, (1, 2), 4], "padding_side": "right"},
        {"max_tiles": 4, "num_image_tokens": 1},
        {"do_rescale": False},
        {"truncation": True, "max_length": 9},
        {"padding": "max_length", "max_length": 30},
        {"return_mm_token_type_ids": True},
        {"images_kwargs": {"do_normalize": False}},
    ],
)
def test_options_are_those_of_a_call(processor, options, nested):
    conversations = [
        user(shown(picture(3, (32, 64))), text(" odd odd odd odd odd odd odd odd")),
        user(shown(A), shown(B), text(" odd")),
    ]
    inputs = processor.apply_chat_template(
        conversations, **INPUTS, **({"processor_kwargs": options} if nested else options)
    )
    expected = processor(
        images=[[picture(3, (32, 64))], [A, B]],
        text=["<image> odd odd odd odd odd odd odd odd", "<image><image> odd"],
        **options,
    )
    assert inputs.keys() == expected.keys()
    for name, value in inputs.items():
        same = value == expected[name]
        assert bool(same.all()) if isinstance(same, torch.Tensor) else same, name


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_image_tokens": 9}, ValueError, "num_image_tokens must be given with tokenize=True"),
        ({"processor_kwargs": {"padding": True}}, ValueError, "padding must be given with"),
        ({"num_image_token": 9, **INPUTS}, TypeError, "did you mean num_image_tokens"),
        ({"processor_kwargs": {"max_tile": 9}, **INPUTS}, TypeError, "did you mean max_tiles"),
        ({"flavour": "sweet", **INPUTS}, TypeError, "flavour is no argument"),
        (
            {"max_tiles": 2, "processor_kwargs": {"max_tiles": 2}, **INPUTS},
            ValueError,
            "max_tiles must be given once",
        ),
        ({"truncation": True, "max_length": 2, **INPUTS}, ValueError, "2 of 4 are left"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            ValueError,
            "exclude each other",
        ),
        ({"load_audio_from_video": True}, ValueError, "load_audio_from_video"),
        ({"sanitize_control_tokens": True, **INPUTS}, ValueError, "sanitize_control_tokens"),
    ],
)
def test_options_without_effect_are_refused(processor, options, error, words):
    with pytest.raises(error, match=words):
        processor.apply_chat_template(user(shown(A), text(" odd")), **options)


def test_floats_in_a_part_stay_as_they_are(processor):
    floats = np.random.default_rng(0).random((PIXELS, PIXELS, 3), dtype=np.float32)
    options = {"do_rescale": False, "do_normalize": False, "do_resize": False}
    inputs = processor.apply_chat_template(user(shown(floats)), **INPUTS, **options)
    assert np.array_equal(inputs["pixel_values"][0], floats.transpose(2, 0, 1))
