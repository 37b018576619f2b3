"""JSONL data: every form that is allowed, and one line for every form that is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tokenflex.data.faults import BrokenSample
from tokenflex.data.messages import MessagesDataset
from tokenflex.data.samples import Conversation, Turn
from tokenflex.images import open_image

USER = {"role": "user", "content": "What is it?"}
ASSISTANT = {"role": "assistant", "content": "A cat."}


def write(folder, *records):
    """Records as JSON; bytes and strings as they are."""
    lines = [
        record
        if isinstance(record, bytes)
        else (record if isinstance(record, str) else json.dumps(record)).encode()
        for record in records
    ]
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def noise(size=(7, 5), mode="RGB") -> Image.Image:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    return image.convert(mode)


# ---- forms that are allowed


def test_plain_messages(tmp_path):
    noise().save(tmp_path / "a.png")
    dataset = MessagesDataset(
        write(
            tmp_path,
            {"id": "x", "kind": "animal", "images": ["a.png"], "messages": [USER, ASSISTANT]},
        )
    )
    assert len(dataset) == 1
    sample = dataset[0]
    assert sample.id == "x"
    assert sample.conversations == (
        Conversation((Turn("user", "What is it?"), Turn("assistant", "A cat.")), "animal"),
    )
    assert np.array_equal(np.asarray(sample.images[0]), np.asarray(noise()))


def test_content_in_parts_is_content_with_marks(tmp_path):
    parts = [
        {"type": "text", "text": "Between "},
        {"type": "image"},
        {"type": "text", "text": " and "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    for name in "ab":
        noise().save(tmp_path / f"{name}.png")
    in_parts = {
        "images": ["a.png", "b.png"],
        "messages": [{"role": "user", "content": parts}, ASSISTANT],
    }
    as_text = {
        **in_parts,
        "messages": [{"role": "user", "content": "Between <image> and <image>?"}, ASSISTANT],
    }
    dataset = MessagesDataset(write(tmp_path, in_parts, as_text))
    assert dataset[0].conversations == dataset[1].conversations
    assert len(dataset[0].images) == 2


def test_text_only_several_turns_and_a_system_turn(tmp_path):
    turns = [{"role": "system", "content": "Be short."}, USER, ASSISTANT, USER, ASSISTANT]
    sample = MessagesDataset(write(tmp_path, {"messages": turns}))[0]
    assert sample.images == ()
    assert [turn.role for turn in sample.conversations[0].turns] == [t["role"] for t in turns]
    assert sample.conversations[0].kind == ""


def test_blank_lines_are_skipped_and_a_missing_id_is_file_and_line(tmp_path):
    path = write(
        tmp_path, {"messages": [USER, ASSISTANT]}, "", "  ", {"messages": [USER, ASSISTANT]}
    )
    dataset = MessagesDataset(path)
    assert [dataset[i].id for i in range(len(dataset))] == [f"{path}:1", f"{path}:4"]


def test_image_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "data" / "images").mkdir(parents=True)
    noise().save(tmp_path / "data" / "images" / "a.png")
    path = write(tmp_path / "data", {"images": ["images/a.png"], "messages": [USER, ASSISTANT]})
    monkeypatch.chdir(tmp_path)
    assert MessagesDataset(path.relative_to(tmp_path))[0].images[0].size == (5, 7)


def test_iteration_ends(tmp_path):
    dataset = MessagesDataset(write(tmp_path, {"messages": [USER, ASSISTANT]}))
    with pytest.raises(IndexError):
        dataset[1]


# ---- lines that are not


BAD_LINES = {
    "not JSON": "{'images': []}",
    "cut off": '{"messages": [{"role": "user"',
    "a list": [1],
    "a number": 3,
    "no messages": {"images": []},
    "messages empty": {"messages": []},
    "messages a string": {"messages": "hello"},
    "a message that is a string": {"messages": ["hello"]},
    "a role that is unknown": {"messages": [{"role": "robot", "content": "x"}, ASSISTANT]},
    "a role that is missing": {"messages": [{"content": "x"}, ASSISTANT]},
    "content missing": {"messages": [{"role": "user"}, ASSISTANT]},
    "content a number": {"messages": [{"role": "user", "content": 3}, ASSISTANT]},
    "a part of unknown type": {
        "messages": [{"role": "user", "content": [{"type": "audio"}]}, ASSISTANT]
    },
    "a text part without text": {
        "messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]
    },
    "a part that is a string": {"messages": [{"role": "user", "content": ["x"]}, ASSISTANT]},
    "images a string": {"images": "a.png", "messages": [USER, ASSISTANT]},
    "images numbers": {"images": [1], "messages": [USER, ASSISTANT]},
    "no assistant": {"messages": [USER]},
    "more marks than images": {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image> <image>"}, ASSISTANT],
    },
    "fewer marks than images": {
        "images": ["a.png", "b.png"],
        "messages": [{"role": "user", "content": "<image>"}, ASSISTANT],
    },
    "marks without images": {"messages": [{"role": "user", "content": "<image>"}, ASSISTANT]},
    "the assistant speaks first": {"messages": [ASSISTANT, USER, ASSISTANT]},
    "images but no user turn to stand in": {"images": ["a.png"], "messages": [ASSISTANT]},
    "bytes that are not UTF-8": b'{"messages": "\xff\xfe"}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line):
    path = write(tmp_path, {"messages": [USER, ASSISTANT]}, "", line)
    dataset = MessagesDataset(path)
    assert dataset[0].id == f"{path}:1"
    for read in (dataset.outline, dataset.__getitem__):
        with pytest.raises(ValueError, match=r"data\.jsonl") as error:
            read(1)
        assert f"{path}:3" in str(error.value)
        assert "\n" not in str(error.value)
    assert dataset.broken == [BrokenSample(1, str(error.value))]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        MessagesDataset(tmp_path / "none.jsonl")


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_a_file_without_samples(tmp_path, lines):
    with pytest.raises(ValueError, match=r"data\.jsonl holds no samples"):
        MessagesDataset(write(tmp_path, *lines))


# ---- image files


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    noise(mode=mode).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert image.size == (5, 7)
    assert np.array_equal(np.asarray(image), np.asarray(noise(mode=mode).convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_an_error_that_names_it(tmp_path, suffix, share):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    noise((64, 64)).save(whole)
    open_image(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}"):
        open_image(cut)


def test_a_png_cut_anywhere_is_the_whole_picture_or_an_error_of_ours(tmp_path):
    noise((8, 8)).save(tmp_path / "whole.png")
    whole, content = np.asarray(noise((8, 8))), (tmp_path / "whole.png").read_bytes()
    errors = 0
    for length in range(len(content)):
        (tmp_path / "cut.png").write_bytes(content[:length])
        try:
            image = open_image(tmp_path / "cut.png")
        except ValueError:
            errors += 1
        else:  # only the checksums behind the pixels are missing
            assert np.array_equal(np.asarray(image), whole), length
    assert errors > 0.8 * len(content)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png"):
        open_image(tmp_path / "a.png")


def test_missing_image_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        open_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        open_image(tmp_path)


def test_a_bad_image_of_a_sample_is_named(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    dataset = MessagesDataset(write(tmp_path, {"images": ["a.png"], "messages": [USER, ASSISTANT]}))
    with pytest.raises(ValueError, match=r"a\.png"):
        dataset[0]
