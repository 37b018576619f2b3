"""Conversations: messages of text and images, rendered by any chat template.

The content of a message is a string or a list of parts. Some chat templates iterate the parts and
write each image themselves; those of plain language models take strings. :func:`render` gives the
template the form that it understands, and checks that every image was written once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tokenflex.models.image_inputs import NamedImage
from tokenflex.models.video_inputs import VIDEO_MARK, NamedVideo

IMAGE_MARK = "<image>"
"""The mark of an image in texts, whatever the tokenizer's own placeholder is."""
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
"""Keys of an image part, of which one holds the image."""
VIDEO_KEYS = ("video", "url", "path", "base64", "video_url")
"""Keys of a video part, of which one holds the video."""

_PARTS_AS_TEXT = re.compile(r"""['"]type['"]\s*:\s*['"](?:text|image)['"]""")


Rendered = tuple[str, list[tuple[int, int]]]
"""A text, and the (start, end) of what an assistant wrote in it."""

KNOWN_FORMS = 1024
_FITTING_FORMS: dict[tuple[Any, ...], int] = {}
"""Chat template and kinds of messages -> the index of the form that they are rendered in."""


@dataclass
class Chat:
    """A conversation that was checked.

    Attributes:
        messages: with contents that are strings, or lists of ``{"type": "text", "text": ...}`` and
            ``{"type": "image"}``.
        images: the images that its parts hold, in order of appearance.
        parts_without_image: the names of image parts that hold no image.
        written: the number of placeholders that its contents spell out.
        videos: the videos that its parts hold, in order of appearance. In ``messages`` their parts
            are of type image.
        parts_without_video: the names of video parts that hold no video.
        kinds: "image" or "video" for each such part, in order of appearance.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[NamedImage] = field(default_factory=list)
    parts_without_image: list[str] = field(default_factory=list)
    written: int = 0
    videos: list[NamedVideo] = field(default_factory=list)
    parts_without_video: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    @property
    def num_placeholders(self) -> int:
        """The number of placeholders that the rendered conversation must hold."""
        parts = len(self.images) + len(self.parts_without_image)
        return parts + len(self.videos) + len(self.parts_without_video) + self.written


def is_batch(conversation: Any) -> bool:
    """Return whether ``conversation`` is a list of conversations, not one.

    Raises:
        TypeError: it is no list.
        ValueError: it is empty.
    """
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Sequence):
        raise TypeError(
            "conversation must be a list of messages, or a list of those, got "
            f"{type(conversation).__name__}"
        )
    if not conversation:
        raise ValueError("conversation must hold at least one message, got none")
    return isinstance(conversation[0], (list, tuple))


def parts_of(text: str, with_videos: bool = False) -> list[dict[str, str]]:
    """Split a text into parts: an image for each :data:`IMAGE_MARK`, and the text between them.

    ``with_videos`` each :data:`tokenflex.models.video_inputs.VIDEO_MARK` is a video.
    """
    marks = f"({IMAGE_MARK}|{VIDEO_MARK})" if with_videos else f"({IMAGE_MARK})"
    kinds = {IMAGE_MARK: "image", VIDEO_MARK: "video"}
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(re.split(marks, text)):
        if i % 2:
            parts.append({"type": kinds[piece]})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def read_chat(
    conversation: Any,
    name: str,
    placeholders: Sequence[str],
    foreign: Sequence[str] = (),
    *,
    takes_videos: bool = False,
) -> Chat:
    """Check a conversation's messages and take the images and videos out of them.

    A placeholder in a text would stand for an image that does not exist, or move others. It is
    refused, except the processor's own in a conversation whose contents are strings: these mark the
    images that are given beside the conversation.

    Args:
        conversation: a list of messages.
        name: its name in errors.
        placeholders: texts that stand for an image in the processor's prompts.
        foreign: texts that users may write in their place; refused everywhere.
        takes_videos: parts of type video are taken too; a text beside them must not hold
            :data:`tokenflex.models.video_inputs.VIDEO_MARK`.

    Raises:
        TypeError: a message is no dict, or a content or text is of a wrong type.
        ValueError: a part is neither text nor image or holds several images, or a text holds a
            placeholder.
    """
    chat = Chat()
    texts: list[tuple[str, str]] = []
    for i, message in enumerate(conversation):
        if not isinstance(message, Mapping):
            raise TypeError(f"{name}[{i}] must be a dict, got {type(message).__name__}")
        # Chat templates print None as a word, and handle a missing key.
        shown = {key: value for key, value in message.items() if value is not None}
        content, content_name = shown.get("content"), f"{name}[{i}].content"
        if isinstance(content, str):
            texts.append((content, content_name))
        elif isinstance(content, (list, tuple)):
            shown["content"] = [
                _read_part(
                    part, f"{content_name}[{j}]", chat, [*placeholders, *foreign], takes_videos
                )
                for j, part in enumerate(content)
            ]
        elif content is not None:
            raise TypeError(
                f"{content_name} must be a string or a list of parts, got {type(content).__name__}"
            )
        chat.messages.append(shown)
    refused = [*placeholders, *foreign] if chat.num_placeholders else [*foreign]
    if "video" in chat.kinds:
        refused.append(VIDEO_MARK)
        texts += [
            (text, f"{name}[{i}].content")
            for i, message in enumerate(chat.messages)
            if not isinstance(message.get("content"), str)
            for text in _texts_of(message)
        ]
    for content, content_name in texts:
        _check_text(content, content_name, refused)
    chat.written = sum(content.count(word) for content, _ in texts for word in placeholders)
    return chat


def _read_part(
    part: Any, name: str, chat: Chat, placeholders: Sequence[str], takes_videos: bool
) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise TypeError(f"{name}.text must be a string, got {type(text).__name__}")
        _check_text(text, name, placeholders)
        return {"type": "text", "text": text}
    if takes_videos and kind in ("video", "video_url"):
        _read_video(part, name, chat)
        return {"type": "image"}  # the template writes one image, in whose place the frames stand
    if kind not in ("image", "image_url"):
        got = type(part).__name__ if not isinstance(part, Mapping) else f"type {str(kind)[:40]!r}"
        known = "text, image and video" if takes_videos else "text and image"
        hint = "; give the frames of a video as images" if kind == "video" else ""
        raise ValueError(f"{name}: content must have parts of type {known}, got {got}{hint}")
    chat.kinds.append("image")
    source = _source_of(part, name, "image", IMAGE_KEYS)
    if source is None:
        chat.parts_without_image.append(name)
    else:
        chat.images.append(NamedImage(source, name))
    return {"type": "image"}


def _read_video(part: Mapping[str, Any], name: str, chat: Chat) -> None:
    for option in ("max_frames", "num_frames", "nframes", "fps"):
        if part.get(option) is not None:
            raise ValueError(
                f"{name}.{option} belongs to the call, as max_frames or fps, not to a video's part"
            )
    chat.kinds.append("video")
    source = _source_of(part, name, "video", VIDEO_KEYS)
    if source is None:
        chat.parts_without_video.append(name)
    else:
        chat.videos.append(NamedVideo(source, name))


def _source_of(part: Mapping[str, Any], name: str, kind: str, keys: Sequence[str]) -> Any:
    """Return what an image or video part holds; None if it holds none."""
    given = [key for key in keys if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{name} must hold one {kind}, got {' and '.join(given)}")
    if not given:
        return None
    source = part[given[0]]
    if given[0] == f"{kind}_url" and isinstance(source, Mapping):
        source = source.get("url")
        if not isinstance(source, str):
            raise ValueError(f"{name}.{kind}_url must hold a url, got {type(source).__name__}")
    return source


def _check_text(text: str, name: str, placeholders: Sequence[str]) -> None:
    for placeholder in placeholders:
        if placeholder in text:
            kind, article = ("video", "a") if placeholder == VIDEO_MARK else ("image", "an")
            raise ValueError(
                f"{name} holds {placeholder!r} in its text, which stands for {article} {kind}: "
                f'give {kind}s as parts of type "{kind}"'
            )


def without_placeholders(text: str, placeholders: Sequence[str]) -> str:
    """Remove placeholders from a text, also those that a removal creates."""
    while any(placeholder in text for placeholder in placeholders):
        for placeholder in placeholders:
            text = text.replace(placeholder, "")
    return text


def mark_videos(rendered: Rendered, kinds: Sequence[str], pattern: re.Pattern[str]) -> Rendered:
    """Return a rendered conversation with :data:`VIDEO_MARK` in place of each video's placeholder.

    Args:
        rendered: the text with a placeholder for each image and video, and spans in it.
        kinds: "image" or "video" for each placeholder.
        pattern: matches a placeholder, see :func:`image_pattern`.
    """
    text, spans = rendered
    if "video" not in kinds:
        return rendered
    replaced: list[dict[str, Any]] = [
        {"span": match.span(), "replacement": VIDEO_MARK}
        for match, kind in zip(pattern.finditer(text), kinds, strict=True)
        if kind == "video"
    ]
    moved = [(_moved(start, replaced), _moved(end, replaced)) for start, end in spans]
    remaining = iter(kinds)
    marked = pattern.sub(
        lambda match: VIDEO_MARK if next(remaining) == "video" else match.group(), text
    )
    return marked, moved


def image_pattern(image_start: str, placeholder: str, image_end: str) -> re.Pattern[str]:
    """Match a placeholder, and the marks around it where a prompt holds them.

    A prompt may leave out the white space at the end of ``image_end``.
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
) -> Rendered:
    """Render a conversation with a chat template.

    The contents are tried as they are, with parts only where there are images, as strings with
    ``image_prompt`` in place of images, and as parts. The first form is taken of which the template
    writes every image once and every text. Conversations of the same roles and kinds of parts try
    it first from then on: it takes a template longer to fail than to write.

    Args:
        chat: the conversation.
        chat_template: the source of a Jinja template.
        placeholder: the text that must be written once for each image.
        image_prompt: the text of an image in a content that is a string.
        variables: of the template.
        **options: for transformers' ``render_jinja_template``, for example ``tools``.

    Returns:
        The text, and the (start, end) of its ``{% generation %}`` blocks.

    Raises:
        ValueError: the template writes another number of images than there are.
        jinja2.TemplateError: it cannot be rendered.
    """
    texts = [text for message in chat.messages for text in _texts_of(message)]
    quoted_parts = sum(len(_PARTS_AS_TEXT.findall(text)) for text in texts)

    def write(messages: list[dict[str, Any]]) -> Rendered:
        (text,), spans = render_jinja_template(
            conversations=[messages], chat_template=chat_template, **options, **variables
        )
        return text, spans[0] if spans else []

    def is_printed(text: str) -> bool:  # a list of parts was, not iterated
        return len(_PARTS_AS_TEXT.findall(text)) > quoted_parts

    def is_complete(text: str) -> bool:
        return all(content.strip() in text for content in texts)

    forms = [*_forms(chat.messages, image_prompt)]
    key = chat_template, *map(_kind, chat.messages)
    if (form := _FITTING_FORMS.get(key)) is not None:
        with suppress(Exception):  # a text may make it fail: then the forms are tried in order
            rendered = write(forms[form])
            text = rendered[0]
            fits = text.count(placeholder) == chat.num_placeholders and is_complete(text)
            if fits and not is_printed(text):
                return rendered
    errors: list[Exception] = []
    incomplete: list[Rendered] = []
    written: int | None = None
    for form, messages in enumerate(forms):
        try:
            rendered = write(messages)
        except Exception as error:  # a template fails in any way on a form it was not made for
            errors.append(error)
            continue
        text = rendered[0]
        if is_printed(text):
            continue
        written = text.count(placeholder)
        if written > chat.num_placeholders:
            break
        if written == chat.num_placeholders:
            if is_complete(text):
                if len(_FITTING_FORMS) == KNOWN_FORMS:
                    _FITTING_FORMS.clear()
                _FITTING_FORMS[key] = form
                return rendered
            incomplete.append(rendered)
    else:
        if incomplete:  # the template leaves text out on purpose, such as earlier reasoning
            return incomplete[0]
    if written is not None:
        raise ValueError(
            f"chat_template must write {placeholder!r} once per image, but wrote it {written} "
            f"times for {chat.num_placeholders} images; does a text spell it?"
        )
    # A template's own refusal says more than an error on a form it was not made for.
    failure = next((e for e in errors if type(e) is TemplateError), errors[-1])
    if isinstance(failure, ValueError):  # transformers quotes the conversation
        raise ValueError(str(failure).partition("Final message to continue:")[0][:300]) from None
    raise failure


def _forms(messages: list[dict[str, Any]], image_prompt: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages in each form that a template may understand."""

    def as_text(content: Any) -> str:
        if isinstance(content, str):
            return content
        return "".join(part.get("text", image_prompt) for part in content)

    def as_text_without_images(content: Any) -> Any:
        has_image = not isinstance(content, str) and {"type": "image"} in content
        return content if has_image else as_text(content)

    def as_parts(content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    tried: list[list[dict[str, Any]]] = []
    for convert in (lambda content: content, as_text_without_images, as_text, as_parts):
        form = [
            {**message, "content": convert(message["content"])} if "content" in message else message
            for message in messages
        ]
        if form not in tried:
            tried.append(form)
            yield form


def _kind(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return all of a message but its texts."""
    content = message.get("content", "")
    types = "text" if isinstance(content, str) else tuple(part["type"] for part in content)
    return message.get("role"), types, *sorted(message)


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
    """Return a list of 0 and 1 per row, 1 for the tokens that an assistant wrote.

    Args:
        offsets: the (start, end) of each token in the text with all placeholders repeated.
        spans: the (start, end) of an assistant's texts, before placeholders were repeated.
        replacements: the processor's ``text_replacement_offsets``.
    """
    masks = []
    for tokens, written, replaced in zip(offsets, spans, replacements, strict=True):
        moved = [[_moved(point, replaced) for point in span] for span in written]
        masks.append(
            [int(any(start < to and end > at for at, to in moved)) for start, end in tokens]
        )
    return masks


def _moved(point: int, replacements: Sequence[Mapping[str, Any]]) -> int:
    """Return the position of ``point`` once the placeholders before it are repeated."""
    growth = 0
    for replaced in replacements:
        start, end = replaced["span"]
        if end <= point:
            growth += len(replaced["replacement"]) - (end - start)
    return point + growth
