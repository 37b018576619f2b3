"""LLaVA's JSON: the same samples as its messages, and each bad record named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models.tiny import picture
from tokenflex.data.llava import LlavaDataset
from tokenflex.data.samples import Turn
from tokenflex.data.steps import outline_of

TURNS = [{"from": "human", "value": "<image>\nodd"}, {"from": "gpt", "value": "3"}]


def write(folder: Path, *records: object) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def test_records_become_samples(tmp_path):
    picture(1).save(tmp_path / "a.png")
    talk = [{"from": "system", "value": "be brief"}, *TURNS]
    two = [{"from": "human", "value": "<image><image> same"}, {"from": "gpt", "value": "no"}]
    path = write(
        tmp_path,
        {"id": "one", "image": "a.png", "conversations": talk},
        {"conversations": [{"from": "human", "value": "hello"}, TURNS[1]]},
        {"id": 7, "image": ["a.png", "a.png"], "conversations": two},
    )
    first, text, both = LlavaDataset(path)
    assert (first.id, len(first.images)) == ("one", 1)
    assert first.conversations[0].turns == (
        Turn("system", "be brief"),
        Turn("user", "<image>\nodd"),
        Turn("assistant", "3"),
    )
    assert (text.id, text.images) == (f"{path}[1]", ())
    assert (both.id, len(both.images)) == ("7", 2)


def test_images_may_lie_in_a_folder_of_their_own(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture(1, (10, 20)).save(tmp_path / "pictures" / "a.png")
    path = write(tmp_path, {"image": "a.png", "conversations": TURNS})
    dataset = LlavaDataset(path, tmp_path / "pictures")
    width, height = dataset[0].images[0].size
    assert outline_of(dataset, 0).image_sizes == ((height, width),)
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        LlavaDataset(path)[0]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (3, "JSON object"),
        ({"image": "a.png"}, "conversations"),
        ({"image": "a.png", "conversations": "hello"}, "conversations"),
        ({"image": "a.png", "conversations": [{"from": "user", "value": "x"}]}, "human, gpt"),
        ({"image": "a.png", "conversations": [{"from": "human"}, TURNS[1]]}, "content"),
        ({"image": 3, "conversations": TURNS}, "images"),
        ({"conversations": TURNS}, "<image> 1 times for 0 images"),
        ({"image": "a.png", "conversations": TURNS[:1]}, "no assistant turn"),
    ],
)
def test_a_bad_record_is_named_by_file_and_place(tmp_path, record, words):
    path = write(tmp_path, {"image": "a.png", "conversations": TURNS}, record)
    dataset = LlavaDataset(path)
    with pytest.raises(ValueError, match=r"data\.json\[1\]") as error:
        dataset[1]
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert [one.index for one in dataset.broken] == [1]


@pytest.mark.parametrize(("content", "words"), [("{", "not JSON"), ("{}", "list"), ("[]", "list")])
def test_a_file_that_is_no_list(tmp_path, content, words):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=rf"data\.json.*{words}"):
        LlavaDataset(tmp_path / "data.json")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        LlavaDataset(tmp_path / "none.json")
