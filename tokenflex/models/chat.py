"""Conversations: messages of text and images, written out by any chat template.

The content of a message is a string or a list of parts. Some chat templates iterate the parts and
write each image themselves; those of plain language models take strings. :func:`render` gives the
template what it understands, and checks that every image was written once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tokenflex.models.image_inputs import NamedImage

IMAGE_MARK = "<image>"
"""The mark of an image in texts, whatever the tokenizer's own placeholder is."""
IMAGE_KEYS = ("image", "url", "path", "base64")
"""Keys of an image part, of which one holds the image."""

_PARTS_AS_TEXT = re.compile(r"""['"]type['"]\s*:\s*['"](?:text|image)['"]""")


@dataclass
class Chat:
    """A conversation that was checked.

    Attributes:
        messages: With contents that are strings, or lists of ``{"type": "text", "text": ...}`` and
            ``{"type": "image"}``.
        images: The images that its parts hold, in order of appearance.
        parts_without_image: The names of image parts that hold none.
        written: How many placeholders its contents spell out.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[NamedImage] = field(default_factory=list)
    parts_without_image: list[str] = field(default_factory=list)
    written: int = 0

    @property
    def num_placeholders(self) -> int:
        """The number of placeholders that the rendered conversation must hold."""
        return len(self.images) + len(self.parts_without_image) + self.written


def is_batch(conversation: Any) -> bool:
    """Return whether ``conversation`` is a list of conversations, not one.

    Raises:
        TypeError: It is no list.
        ValueError: It is empty.
    """
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Sequence):
        raise TypeError(
            "conversation must be a list of messages, or a list of those, got "
            f"{type(conversation).__name__}"
        )
    if not conversation:
        raise ValueError("conversation must hold at least one message, got none")
    return isinstance(conversation[0], (list, tuple))


def read_chat(
    conversation: Any, name: str, placeholders: Sequence[str], foreign: Sequence[str] = ()
) -> Chat:
    """Check a conversation's messages and take the images out of them.

    A placeholder in a text would stand for an image that is not there, or push others from their
    places. It is refused, but for the processor's own in a conversation whose contents are strings:
    there it says where images stand that are given beside the conversation.

    Args:
        conversation: A list of messages; they are not changed.
        name: What errors call it.
        placeholders: What stands for an image in the processor's prompts.
        foreign: What users may write in their place; it is refused everywhere.

    Raises:
        TypeError: A message is no dict, or a content or text of another type than it should be.
        ValueError: A part is neither text nor image, holds several images, or a text holds a
            placeholder.
    """
    chat = Chat()
    texts: list[tuple[str, str]] = []
    for i, message in enumerate(conversation):
        if not isinstance(message, Mapping):
            raise TypeError(f"{name}[{i}] must be a dict, got {type(message).__name__}")
        # Chat templates show None as a word, and handle a missing key.
        shown = {key: value for key, value in message.items() if value is not None}
        content, content_name = shown.get("content"), f"{name}[{i}].content"
        if isinstance(content, str):
            texts.append((content, content_name))
        elif isinstance(content, (list, tuple)):
            shown["content"] = [
                _read_part(part, f"{content_name}[{j}]", chat, [*placeholders, *foreign])
                for j, part in enumerate(content)
            ]
        elif content is not None:
            raise TypeError(
                f"{content_name} must be a string or a list of parts, got {type(content).__name__}"
            )
        chat.messages.append(shown)
    refused = [*placeholders, *foreign] if chat.num_placeholders else foreign
    for content, content_name in texts:
        _check_text(content, content_name, refused)
    chat.written = sum(content.count(word) for content, _ in texts for word in placeholders)
    return chat


def _read_part(part: Any, name: str, chat: Chat, placeholders: Sequence[str]) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise TypeError(f"{name}.text must be a string, got {type(text).__name__}")
        _check_text(text, name, placeholders)
        return {"type": "text", "text": text}
    if kind not in ("image", "image_url"):
        got = type(part).__name__ if not isinstance(part, Mapping) else f"type {str(kind)[:40]!r}"
        hint = "; give the frames of a video as images" if kind == "video" else ""
        raise ValueError(f"{name}: content must have parts of type text and image, got {got}{hint}")
    keys = (*IMAGE_KEYS, "image_url")
    given = [key for key in keys if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{name} must hold one image, got {' and '.join(given)}")
    if not given:
        chat.parts_without_image.append(name)
        return {"type": "image"}
    source = part[given[0]]
    if given[0] == "image_url" and isinstance(source, Mapping):
        source = source.get("url")
        if not isinstance(source, str):
            raise ValueError(f"{name}.image_url must hold a url, got {type(source).__name__}")
    chat.images.append(NamedImage(source, name))
    return {"type": "image"}


def _check_text(text: str, name: str, placeholders: Sequence[str]) -> None:
    for placeholder in placeholders:
        if placeholder in text:
            raise ValueError(
                f"{name} holds {placeholder!r} in its text, which stands for an image: give images "
                'as parts of type "image"'
            )


def without_placeholders(text: str, placeholders: Sequence[str]) -> str:
    """Remove placeholders from a text, also those that appear where another one was."""
    while any(placeholder in text for placeholder in placeholders):
        for placeholder in placeholders:
            text = text.replace(placeholder, "")
    return text


def image_pattern(image_start: str, placeholder: str, image_end: str) -> re.Pattern[str]:
    """Match a placeholder with the marks around it, which a prompt may hold already or leave out.

    Args:
        image_start: What stands before an image's placeholders.
        placeholder: The placeholder.
        image_end: What stands after them; a prompt may leave out the space that it ends in.
    """
    end = image_end.rstrip()
    parts = (image_start, placeholder, end, image_end[len(end) :])
    return re.compile("(?:{})?{}(?:{})?(?:{})?".format(*map(re.escape, parts)))


# ---------------------------------------------------------------------- chat templates


def render(
    chat: Chat,
    chat_template: str,
    *,
    placeholder: str,
    image_prompt: str,
    variables: Mapping[str, Any],
    **options: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """Write a conversation out with a chat template.

    The contents are tried as they are, with parts only where there are images, as strings with
    ``image_prompt`` where images stand, and as parts. The first form is taken of which the template
    writes every image once and every text.

    Args:
        chat: The conversation.
        chat_template: The source of a Jinja template.
        placeholder: What must stand once for each image.
        image_prompt: What stands for an image in a content that is a string.
        variables: Of the template.
        **options: For transformers' ``render_jinja_template``, for example ``tools``.

    Returns:
        The text, and the (start, end) of its ``{% generation %}`` blocks.

    Raises:
        ValueError: The template writes another number of images than there are.
        jinja2.TemplateError: It cannot be rendered.
    """
    texts = [text for message in chat.messages for text in _texts_of(message)]
    quoted_parts = sum(len(_PARTS_AS_TEXT.findall(text)) for text in texts)
    errors: list[Exception] = []
    incomplete: list[tuple[str, list[tuple[int, int]]]] = []
    written: int | None = None
    for messages in _forms(chat.messages, image_prompt):
        try:
            (text,), spans = render_jinja_template(
                conversations=[messages], chat_template=chat_template, **options, **variables
            )
        except Exception as error:  # a template fails in any way on a form it was not made for
            errors.append(error)
            continue
        if len(_PARTS_AS_TEXT.findall(text)) > quoted_parts:
            continue  # the list was printed, not iterated
        written = text.count(placeholder)
        if written > chat.num_placeholders:
            raise _wrong_number(placeholder, written, chat.num_placeholders)
        if written == chat.num_placeholders:
            rendered = text, spans[0] if spans else []
            if all(content.strip() in text for content in texts):
                return rendered
            incomplete.append(rendered)
    if incomplete:  # the template leaves text out on purpose, such as earlier reasoning
        return incomplete[0]
    if written is not None:
        raise _wrong_number(placeholder, written, chat.num_placeholders)
    # A template's own refusal says more than what it stumbles over in a form not made for it.
    failure = next((e for e in errors if type(e) is TemplateError), errors[-1])
    if isinstance(failure, ValueError):  # transformers quotes the conversation
        raise ValueError(str(failure).partition("Final message to continue:")[0][:300]) from None
    raise failure


def _wrong_number(placeholder: str, written: int, images: int) -> ValueError:
    return ValueError(
        f"chat_template must write {placeholder!r} once per image, but wrote it {written} times "
        f"for {images} images; does a text spell it?"
    )


def _forms(messages: list[dict[str, Any]], image_prompt: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages with the same contents in each form that a template may understand."""
    tried: list[list[dict[str, Any]]] = []
    for convert in (
        lambda content: content,
        lambda content: content if _has_image(content) else _as_text(content, image_prompt),
        lambda content: _as_text(content, image_prompt),
        _as_parts,
    ):
        form = [
            {**message, "content": convert(message["content"])} if "content" in message else message
            for message in messages
        ]
        if form not in tried:
            tried.append(form)
            yield form


def _as_parts(content: Any) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_text(content: Any, image_prompt: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", image_prompt) for part in content)


def _has_image(content: Any) -> bool:
    return not isinstance(content, str) and any(part["type"] == "image" for part in content)


def _texts_of(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content", "")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def assistant_masks(
    offsets: Sequence[Sequence[tuple[int, int]]],
    spans: Sequence[Sequence[tuple[int, int]]],
    replacements: Sequence[Sequence[Mapping[str, Any]]],
) -> list[list[int]]:
    """Mark the tokens of each row that an assistant wrote.

    Args:
        offsets: The (start, end) of each token in the text with all placeholders repeated.
        spans: The (start, end) of what assistants wrote, before placeholders were repeated.
        replacements: What the processor returns as ``text_replacement_offsets``.

    Returns:
        A list of 0 and 1 per row.
    """
    masks = []
    for tokens, written, replaced in zip(offsets, spans, replacements, strict=True):
        moved = [
            [
                point + sum(_growth(one) for one in replaced if one["span"][1] <= point)
                for point in span
            ]
            for span in written
        ]
        masks.append(
            [int(any(start < to and end > at for at, to in moved)) for start, end in tokens]
        )
    return masks


def _growth(replaced: Mapping[str, Any]) -> int:
    start, end = replaced["span"]
    return len(replaced["replacement"]) - (end - start)
