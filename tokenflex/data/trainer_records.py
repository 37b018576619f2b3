"""Records as users of Trainer and TRL have them, read for packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch

from tokenflex.counts import AUTO, Grid, TokenCount, token_grids
from tokenflex.data.media import PICTURE_KEYS, VIDEO_KEYS, is_empty
from tokenflex.data.packing import PackingCollator
from tokenflex.data.records import StoredVideo, read_record
from tokenflex.data.samples import Conversation, Sample, count_images
from tokenflex.data.sequences import IGNORE, TokenSequence
from tokenflex.files import check_utf8
from tokenflex.images import load_image
from tokenflex.models.chat import Chat, image_pattern, read_chat
from tokenflex.models.conversations import is_same_image
from tokenflex.videos import FrameSampling, is_frames, load_video
from tokenflex_kernels.checks import check_grids

_FORMS = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
    "input_ids": ("input_ids",),
}
"""The forms of a record, each with the keys that it is known by."""
_FIELDS = ("messages", "prompt", "completion", "text", "index", "epoch")
_OWN_KEYS = (*PICTURE_KEYS, *VIDEO_KEYS, *_FIELDS)


@dataclass(frozen=True)
class Example:
    """A record that is encoded, without its count.

    Attributes:
        sample: with its images, none where ``pixel_values`` hold them.
        sequences: one a conversation, with a placeholder for each image.
        tiles: of each image.
        key: (epoch, index) that the count is drawn by; None where the record has none.
        count: the count that the record is bound to; None to draw one.
        pixel_values: of processed images, [tiles, ...]; None where ``sample`` holds the images.
        grids: (height, width) of each tile in patches, where the encoder needs to be told.
    """

    sample: Sample
    sequences: list[TokenSequence]
    tiles: list[int]
    key: tuple[int, int] | None = None
    count: TokenCount | None = None
    pixel_values: torch.Tensor | None = None
    grids: list[Grid] | None = None


def read_example(record: Any, place: int, packer: PackingCollator) -> Example:
    """Read and encode a record of one of the forms of ``DataCollatorWithPacking``.

    Args:
        record: the record.
        place: its place in the batch, for messages.
        packer: encodes conversations; its processor is that of the records.

    Raises:
        TypeError, ValueError: it is of no such form; the message names its place.
    """
    name = f"records[{place}]"
    example = _read(record, name, packer)
    if not example.sequences:
        raise ValueError(f"{name} must hold at least one conversation, got none")
    for i, sequence in enumerate(example.sequences):
        if not len(sequence.ids):
            where = name if len(example.sequences) == 1 else f"{name}: conversation {i}"
            raise ValueError(f"{where} must hold at least one token, got {_shown(record)}")
    return example


def _shown(record: Any) -> str:
    """Return what a record without tokens holds in their place, for a message."""
    keys = [*(key for form in _FORMS.values() for key in form), "attention_mask"]
    held = {} if isinstance(record, Sample) else {key: record.get(key) for key in keys}
    return (
        " and ".join(f"{key} {held[key]!r:.60}" for key in held if held[key] is not None) or "none"
    )


def _read(record: Any, name: str, packer: PackingCollator) -> Example:
    """Read a record whose name is ``name``, with or without tokens."""
    if isinstance(record, Sample):
        return _encode(record, packer)
    if not isinstance(record, Mapping):
        raise TypeError(f"{name} must be a dict or a Sample, got {type(record).__name__}")
    form = _form_of(record, name)
    index, epoch = (_whole_number(record.get(key), f"{name}.{key}") for key in ("index", "epoch"))
    key = None if index is None else (epoch or 0, index)
    beside = _media_beside(record, PICTURE_KEYS, name, "images")
    videos = _media_beside(record, VIDEO_KEYS, name, "videos")
    if form == "input_ids":
        if beside or videos:
            kind = "images" if beside else "videos"
            raise ValueError(f"{name} must hold input_ids or {kind}, got both")
        return _read_features(record, name, key, packer.processor)
    if record.get("num_image_tokens") is not None:
        raise ValueError(
            f"{name}.num_image_tokens belongs to input_ids; the collator's counts say how many "
            "tokens the images of other records have"
        )
    messages, asked = _messages_of(record, name, form)
    if messages is None:
        if videos:
            raise ValueError(f"{name} must hold messages beside videos, got {form} of plain texts")
        sample = Sample(_id_of(record, name), _open(beside, name), (Conversation(()),))
        return _read_texts(record, name, sample, key, packer)
    media, conversations = _read_conversations(
        record, messages, beside, videos, name, packer.processor.image_token
    )
    images, conversations = _show(media, conversations, name, packer.processor)
    sample = Sample(_id_of(record, name), images, tuple(conversations))
    if asked and all(turn.role != "assistant" for turn in conversations[0].turns[asked:]):
        raise ValueError(f"{name}.completion must hold an assistant turn to learn from, got none")
    return _encode(sample, packer, key, asked)


def _form_of(record: Mapping[str, Any], name: str) -> str:
    """Return which of the forms a record has.

    Raises:
        ValueError: it has none, or several, of which the others would not be read.
    """
    forms = [
        form for form, keys in _FORMS.items() if all(record.get(key) is not None for key in keys)
    ]
    if not forms:
        raise ValueError(
            f"{name} must have messages, prompt and completion, text or input_ids, got "
            f"{', '.join(map(str, record)) or 'nothing'}; Trainer takes other columns than the "
            "model's arguments away unless remove_unused_columns=False"
        )
    if len(forms) > 1:
        raise ValueError(
            f"{name} must have one of messages, prompt and completion, text or input_ids, got "
            f"{' beside '.join(forms)}"
        )
    return forms[0]


def _whole_number(value: Any, name: str) -> int | None:
    """Return an int of at least 0, also of an array or tensor of one; None stays None."""
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0:
        value = value.item()
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r:.80}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return int(value)


def _id_of(record: Mapping[str, Any], name: str) -> str:
    return name if is_empty(record.get("id")) else str(record["id"])


def _media_beside(
    record: Mapping[str, Any], keys: Sequence[str], name: str, kind: str
) -> list[Any]:
    """Return the images or videos that a record holds beside its texts, under one of their keys."""
    found: dict[str, list[Any]] = {}
    for key in keys:
        value = record.get(key)
        if value is None or (kind == "videos" and isinstance(value, (bool, int, float))):
            continue
        is_list = isinstance(value, (list, tuple)) and not (kind == "videos" and is_frames(value))
        media = list(value) if is_list else [value]
        if media:
            found[key] = [_stored(item) for item in media]
    if len(found) > 1:
        raise ValueError(f"{name} must hold its {kind} under one key, got {' and '.join(found)}")
    return next(iter(found.values()), [])


def _show(
    media: Sequence[Any], conversations: list[Conversation], name: str, processor: Any
) -> tuple[tuple[Any, ...], list[Conversation]]:
    """Return images and the frames of videos, and conversations that tell the frames' number."""
    images: list[Any] = []
    frames: list[int] = []
    sampling = FrameSampling(processor.max_frames, processor.fps)
    for item in media:
        if isinstance(item, StoredVideo):
            clip = load_video(item.source, f"{name}.videos[{len(frames)}]", sampling).frames
            images += clip
            frames.append(len(clip))
        else:
            images.append(item)
    if frames:
        conversations = [conversation.show_frames(frames) for conversation in conversations]
    return _open(images, name), conversations


def _open(images: Sequence[Any], name: str) -> tuple[Any, ...]:
    opened = []
    for i, image in enumerate(images):
        try:
            opened.append(load_image(image, f"{name}.images[{i}]"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}.images[{i}]: {error}") from error
    return tuple(opened)


def _messages_of(record: Mapping[str, Any], name: str, form: str) -> tuple[list[Any] | None, int]:
    """Return the messages of a record and how many of them are a prompt; None of plain texts."""
    keys = _FORMS[form]
    values = [
        value.tolist() if isinstance(value := record[key], np.ndarray) else value for key in keys
    ]
    if form != "messages" and all(isinstance(value, str) for value in values):
        return None, 0
    wanted = {
        "messages": "a list of messages, or a list of those",
        "text": "a string",
    }.get(form, "a list of messages or a string, as the other one is")
    for key, value in zip(keys, values, strict=True):
        if form == "text" or not isinstance(value, (list, tuple)):
            raise TypeError(f"{name}.{key} must be {wanted}, got {type(value).__name__}")
    if form == "messages":
        return values[0], 0
    for key, value in zip(keys, values, strict=True):
        for i, message in enumerate(value):
            if not isinstance(message, Mapping):
                raise TypeError(f"{name}.{key}[{i}] must be a dict, got {type(message).__name__}")
    return [*values[0], *values[1]], len(values[0])


def _encode(
    sample: Sample, packer: PackingCollator, key: tuple[int, int] | None = None, asked: int = 0
) -> Example:
    """Encode a sample's conversations; of its first ``asked`` turns nothing is learned."""
    try:
        sequences = packer.encode(sample.conversations, len(sample.images))
        if asked:
            sequences = [
                _without_answers(sequence, talk, asked, packer)
                for sequence, talk in zip(sequences, sample.conversations, strict=True)
            ]
    except ValueError as error:
        raise ValueError(f"{sample.id}: {error}") from error
    return Example(sample, sequences, _tiles_of(sample, packer), key)


def _without_answers(
    sequence: TokenSequence, conversation: Conversation, asked: int, packer: PackingCollator
) -> TokenSequence:
    """Return a conversation without what is learned among its first ``asked`` turns."""
    turns, num_images = conversation.turns[:asked], sequence.images.stop
    is_marked = any(count_images(turn.text) for turn in conversation.turns)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        return sequence
    turns = turns[: answers[-1] + 1]
    if is_marked:  # images that are shown later do not stand in these turns
        num_images = sum(count_images(turn.text) for turn in turns)
    (earlier,) = packer.encode([Conversation(turns)], num_images)
    labels = sequence.labels.copy()  # the encoder keeps its own
    labels[: len(earlier.ids)] = IGNORE
    return replace(sequence, labels=labels)


def _tiles_of(sample: Sample, packer: PackingCollator) -> list[int]:
    tiles: list[int] = packer.processor.image_tokens(list(sample.image_sizes), 1)
    return tiles


def _read_conversations(
    record: Mapping[str, Any],
    messages: Sequence[Any],
    beside: Sequence[Any],
    videos: Sequence[Any],
    name: str,
    image_token: str,
) -> tuple[list[Any], list[Conversation]]:
    """Return the images and videos of a record in their order, and its conversations."""
    nested = bool(messages) and isinstance(messages[0], (list, tuple, np.ndarray))
    others = {key: record[key] for key in record if key not in _OWN_KEYS}
    for key, value in others.items():  # columns of a data set that is formatted as arrays
        if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0:
            others[key] = value.item()
    conversations: list[Conversation] = []
    inside: list[tuple[list[Any], list[Any]]] = []
    orders: list[list[Any]] = []
    for i, talk in enumerate(messages if nested else [messages]):
        talk_name = f"{name}.messages[{i}]" if nested else f"{name}.messages"
        if isinstance(talk, np.ndarray):
            talk = talk.tolist()
        if not isinstance(talk, (list, tuple)):
            raise TypeError(f"{talk_name} must be a list as others are, got {type(talk).__name__}")
        chat = read_chat(talk, talk_name, [image_token], takes_videos=True)
        of_talk = (
            [_stored(image.source) for image in chat.images],
            [_stored(video.source) for video in chat.videos],
        )
        inside.append(of_talk)
        for kind, own, shown, given in zip(
            ("images", "videos"), of_talk, inside[0], (beside, videos), strict=True
        ):
            if len(own) != len(shown) or not all(map(is_same_image, own, shown)):
                raise ValueError(f"{talk_name} must show the same {kind} as {name}.messages[0]")
            if own and given:
                raise ValueError(f"{talk_name} holds {kind}, and others stand beside it: give one")
        _, media, conversation = read_record(
            {**others, "messages": _typed(chat)},
            name,
            stored=beside or of_talk[0],
            stored_videos=videos or of_talk[1],
        )
        orders.append([type(item) is StoredVideo for item in media])
        if orders[-1] != orders[0]:
            raise ValueError(
                f"{talk_name} must show images and videos in the order of {name}.messages[0]"
            )
        conversations.append(conversation)
    return media, conversations


def _typed(chat: Chat) -> list[dict[str, Any]]:
    """Return the messages of a chat with parts of type video where it has videos."""
    kinds = iter(chat.kinds)
    return [
        {
            **message,
            "content": [
                {"type": next(kinds)} if part["type"] == "image" else part for part in content
            ],
        }
        if isinstance(content := message.get("content"), list)
        else message
        for message in chat.messages
    ]


def _stored(image: Any) -> Any:
    """Return what an image of the datasets library that is not decoded holds."""
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        return image.get("path") if image.get("bytes") is None else image["bytes"]
    return image


def _read_texts(
    record: Mapping[str, Any],
    name: str,
    sample: Sample,
    key: tuple[int, int] | None,
    packer: PackingCollator,
) -> Example:
    """Read a prompt with its completion, or a text that is learned whole."""
    processor = packer.processor
    keys = ("text",) if record.get("text") is not None else ("prompt", "completion")
    texts = [check_utf8(record[key], f"{name}.{key}") for key in keys]
    if keys[-1] == "completion" and not texts[-1]:
        raise ValueError(f"{name}.completion must hold text to learn from, got ''")
    pattern = image_pattern(processor.image_start, processor.image_token, processor.image_end)
    parts = [
        processor.tokenizer(
            pattern.sub(lambda _: processor.image_prompt, text), add_special_tokens=False
        )["input_ids"]
        for text in texts
    ]
    ids = np.array([token for part in parts for token in part], np.int64)
    try:
        packer.encode.check_placeholders(ids.tolist(), len(sample.images))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    labels = np.where(ids == processor.image_token_id, IGNORE, ids)
    if len(parts) == 2:
        labels[: len(parts[0])] = IGNORE
    sequence = TokenSequence(ids, labels, slice(0, len(sample.images)))
    return Example(sample, [sequence], _tiles_of(sample, packer), key)


def _read_features(
    record: Mapping[str, Any], name: str, key: tuple[int, int] | None, processor: Any
) -> Example:
    """Read outputs of the processor for one prompt, as tensors, arrays or lists."""
    ids = _ints(record["input_ids"], f"{name}.input_ids")
    columns = {}
    for column in ("labels", "attention_mask"):
        value = ids if record.get(column) is None else _ints(record[column], f"{name}.{column}")
        if len(value) != len(ids):
            raise ValueError(
                f"{name}.{column} must be as long as input_ids, {len(ids)}, got {len(value)}"
            )
        columns[column] = value
    _check_bounds(ids, f"{name}.input_ids", other=processor.image_token_id)
    _check_bounds(columns["labels"], f"{name}.labels", other=IGNORE)
    is_image = ids == processor.image_token_id
    keep = torch.ones_like(is_image)
    if record.get("attention_mask") is not None:
        _check_bounds(columns["attention_mask"], f"{name}.attention_mask", most=1)
        keep = columns["attention_mask"].bool()
        if bool((is_image & ~keep).any()):
            raise ValueError(f"{name}.attention_mask must not hide placeholders of images")
    pixels = _pixels_of(record, name)
    num_tiles = 0 if pixels is None else len(pixels)
    if record.get("image_index") is not None:
        shown_tiles = _ints(record["image_index"], f"{name}.image_index").tolist()
        if shown_tiles != [*range(num_tiles)]:
            raise ValueError(
                f"{name}.image_index must show each of the {num_tiles} tiles once, in order, got "
                f"{shown_tiles}"
            )
    tiles = [1] * num_tiles
    if record.get("tiles_per_image") is not None:
        tiles = _ints(record["tiles_per_image"], f"{name}.tiles_per_image").tolist()
    count: TokenCount | None = None
    counts = record.get("num_image_tokens")
    if isinstance(counts, str):
        if counts != AUTO:
            raise ValueError(f"{name}.num_image_tokens must be counts or 'auto', got {counts!r}")
    elif counts is not None:
        # Expanded already, at one count: of each tile's run one placeholder stays.
        tiles = [1] * num_tiles
        grids = set(token_grids(counts, num_tiles, name=f"{name}.num_image_tokens"))
        if len(grids) > 1:
            raise ValueError(
                f"{name}.num_image_tokens must be one count for all images of a record, got "
                f"{counts}; process it with num_image_tokens='auto'"
            )
        for height, width in grids:
            count = height * width if height == width else (height, width)
            keep = keep.masked_scatter(
                is_image, _first_of_runs(is_image, num_tiles, height * width, name)
            )
    ids, labels = ids[keep], columns["labels"][keep].masked_fill(is_image[keep], IGNORE)
    shown = int(is_image[keep].sum())
    if shown != len(tiles) or sum(tiles) != num_tiles or min(tiles, default=1) < 1:
        raise ValueError(
            f"{name}.input_ids hold {shown} images, for {len(tiles)} images of {tiles} tiles and "
            f"{num_tiles} tiles of pixel_values"
        )
    sample = Sample(_id_of(record, name), (), (Conversation(()),))
    sequence = TokenSequence(ids.numpy(), labels.numpy(), slice(0, shown))
    return Example(
        sample, [sequence], tiles, key, count, pixels, _grids_of(record, name, num_tiles)
    )


def _ints(value: Any, name: str) -> torch.Tensor:
    """Return one row of ints, [length] or [1, length], as int64 [length].

    Raises:
        TypeError: they are no ints.
        ValueError: there are several rows, which would become one sequence.
    """
    try:
        row = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a row of ints, got {type(value).__name__}: {error}"
        ) from error
    if row.numel() and (row.dtype == torch.bool or row.is_floating_point() or row.is_complex()):
        raise TypeError(f"{name} must hold ints, got {row.dtype}")
    if row.ndim not in (1, 2) or (row.ndim == 2 and len(row) != 1):
        raise ValueError(
            f"{name} must be one row, [length] or [1, length], got shape {list(row.shape)}; "
            "several prompts are several records"
        )
    return row.reshape(-1).to("cpu", torch.int64)


def _check_bounds(
    values: torch.Tensor, name: str, *, most: int = 2**31 - 1, other: int | None = None
) -> None:
    """Refuse ints outside of [0, ``most``] that are not ``other``; the message names the first."""
    outside = (values < 0) | (values > most)
    if other is not None:
        outside &= values != other
    if bool(outside.any()):
        place = int(outside.nonzero()[0])
        wanted = f"in [0, {most}]" if other is None else f"in [0, {most}] or {other}"
        raise ValueError(f"{name}[{place}] must be {wanted}, got {int(values[place])}")


def _first_of_runs(
    is_image: torch.Tensor, num_tiles: int, tokens_per_tile: int, name: str
) -> torch.Tensor:
    """Return which placeholders begin the run of a tile, bool [placeholders]."""
    places = is_image.nonzero().squeeze(1)
    if len(places) != num_tiles * tokens_per_tile:
        raise ValueError(
            f"{name}.input_ids hold {len(places)} placeholders, for {num_tiles} tiles of "
            f"{tokens_per_tile} vision tokens"
        )
    runs = places.view(num_tiles, tokens_per_tile)
    if not bool((runs[:, -1] - runs[:, 0] == tokens_per_tile - 1).all()):
        raise ValueError(
            f"{name}.input_ids hold text between the {tokens_per_tile} placeholders of a tile"
        )
    return torch.arange(len(places)) % tokens_per_tile == 0


def _pixels_of(record: Mapping[str, Any], name: str) -> torch.Tensor | None:
    value = record.get("pixel_values")
    if value is None:
        return None
    try:
        pixels = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}.pixel_values must be an array of floats, got {type(value).__name__}: {error}"
        ) from error
    if not pixels.is_floating_point():
        raise TypeError(f"{name}.pixel_values must be floats, got {pixels.dtype}")
    if pixels.ndim not in (3, 4):  # 3 are patches of an encoder for any shape
        raise ValueError(
            f"{name}.pixel_values must be [tiles, channels, height, width] or [tiles, patches, "
            f"width], got shape {list(pixels.shape)}"
        )
    if 0 in pixels.shape[1:]:
        raise ValueError(
            f"{name}.pixel_values must have tiles of at least one pixel, got shape "
            f"{list(pixels.shape)}"
        )
    return pixels.detach().cpu().contiguous()


def _grids_of(record: Mapping[str, Any], name: str, num_tiles: int) -> list[Grid] | None:
    grids = record.get("grids")
    if isinstance(grids, (np.ndarray, torch.Tensor)):
        grids = grids.tolist()
    if grids is None:
        return None
    checked = check_grids(f"{name}.grids", grids)
    if len(checked) != num_tiles:
        raise ValueError(
            f"{name}.grids must have one pair for each of {num_tiles} tiles, got {len(checked)}"
        )
    return checked or None
