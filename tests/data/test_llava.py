"""LLaVA's JSON: the same samples as of messages, and each bad record named."""

from __future__ import annotations

import contextlib
import json
import time
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


WHOLE = {
    "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
}
DAMAGED = [
    '{"conversations": [}',
    '{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}}',
    '{"id": "x}',
    '{"id": 1',
    '{"id": 1}}',
    '{"id": [1}',
    '{"id": tru}',
    '["a", {]',
    "{'id': 1}",
    "nothing",
    '{"id": 1}]',
]


@pytest.mark.parametrize("space", ["", " ", "\n  "])
@pytest.mark.parametrize("damaged", DAMAGED[:-1])
def test_a_record_with_unbalanced_brackets_spoils_no_other(tmp_path, damaged, space):
    whole = json.dumps(WHOLE)
    path = tmp_path / "data.json"
    for records, expected in (
        ([whole, damaged, whole, whole], [1]),
        ([damaged, whole], [0]),
        ([whole, damaged, whole, damaged, whole], [1, 3]),
    ):
        path.write_text("[" + f",{space}".join(records) + "]\n")
        dataset = LlavaDataset(path)
        assert len(dataset) == len(records)
        assert [one.index for one in dataset.broken] == expected
        assert all(f"data.json[{one.index}] is not JSON" in one.reason for one in dataset.broken)


@pytest.mark.parametrize("damaged", ['{"conversations": [}', '{"id": 1}}', '{"id": "x}\n', "{'a'}"])
def test_the_last_record_of_a_list_may_be_damaged(tmp_path, damaged):
    (tmp_path / "data.json").write_text(f"[{json.dumps(WHOLE)}, {damaged}]\n")
    dataset = LlavaDataset(tmp_path / "data.json")
    assert [one.index for one in dataset.broken] == [1]
    assert len(dataset) == 2


def test_a_list_that_is_cut_off_behind_a_damaged_record_names_the_place(tmp_path):
    whole = json.dumps(WHOLE)
    for end in ('{"conversations": [{"from": "hum', '{"conversations": [{"from": "human"}]'):
        (tmp_path / "data.json").write_text(f'[{whole}, {{"id": [}}, {whole}, {end}')
        with pytest.raises(ValueError, match=r"a JSON list without an end.*in .*data\.json\[3\]"):
            LlavaDataset(tmp_path / "data.json")


def test_an_element_is_decoded_in_pieces_as_it_is_in_whole(tmp_path, monkeypatch):
    """A piece may end within a number, an escape, a word or a string."""
    records = [
        WHOLE | {"id": f"{'x' * i}\u00e9\U0001f600", "n": [-1.5e-10, True, None, 12345678]}
        for i in range(40)
    ]
    path = tmp_path / "data.json"
    for ascii_only in (True, False):
        path.write_text(json.dumps(records, ensure_ascii=ascii_only), encoding="utf-8")
        for length in (1, 2, 7, 32, 100):
            monkeypatch.setattr("tokenflex.data.json_records._FIRST_PIECE", length)
            monkeypatch.setattr("tokenflex.data.json_records._PIECE_GROWTH", 2)
            dataset = LlavaDataset(path)
            assert [sample.id for sample in dataset] == [record["id"] for record in records]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_many_damaged_records_are_read_in_linear_time(tmp_path, damaged):
    whole = json.dumps(WHOLE)
    path = tmp_path / "data.json"
    path.write_text("[" + ",\n".join([whole, *[damaged] * 20_000, whole]) + "]")
    start = time.perf_counter()
    with contextlib.suppress(ValueError):
        LlavaDataset(path)
    assert time.perf_counter() - start < 10
