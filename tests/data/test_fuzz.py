"""Readers of records meet anything: a sample comes out, or an error of ours that is short."""

from __future__ import annotations

import copy
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.selection import ALL
from tokenflex.data.huggingface import HuggingFaceDataset
from tokenflex.data.image_paths import ImageFolder
from tokenflex.data.media import MEDIA_KEYS, PICTURE_KEYS
from tokenflex.data.messages import MessagesDataset
from tokenflex.data.records import read_record
from tokenflex.data.samples import SampleDataset
from tokenflex.data.webdataset import WebDataset

KEYS = st.sampled_from(
    [
        *("id", "kind", "messages", "conversations", "role", "content", "from", "value", "type"),
        *("text", "url", "path", "bytes", *PICTURE_KEYS, *sorted(MEDIA_KEYS)[:8]),
    ]
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2),  # halves of pairs
    st.sampled_from(
        [
            *("<image>", "<image><image>", "user", "assistant", "human", "gpt", "system", "image"),
            *("text", "a.png", "/etc/passwd", "../a.png", "http://a/b.png", "data:image/png,"),
            *("<|image_pad|>", "\0"),
        ]
    ),
    st.sampled_from("xa.").map(lambda letter: letter * 10_000),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(4000).map(lambda digits: 10**digits),
    st.floats(),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(KEYS, TEXTS), inner, max_size=4)
    ),
    max_leaves=12,
)
ASKED = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
GOOD: list[Any] = [
    {
        "id": "a",
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "odd"}]},
            {"role": "assistant", "content": "3"},
        ],
    },
    {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>odd"}, {"from": "gpt", "value": "3"}],
    },
]
FUZZED = settings(
    max_examples=2_000 if ALL else 300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a record."""
    below: Any = ()
    if isinstance(value, (dict, list)):
        below = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(place for key, inner in below for place in places(inner, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A good record in which up to three values are others, or have another key."""
    record = copy.deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 3))):
        *outer, last = draw(st.sampled_from([p for p in places(record) if p]))
        holder = record
        for key in outer:
            holder = holder[key]
        if isinstance(holder, dict) and draw(st.booleans()):
            holder[draw(KEYS)] = holder[last] if draw(st.booleans()) else holder.pop(last)
        else:
            holder[last] = draw(VALUES)
    return record


RECORDS = st.one_of(VALUES, mutated(), mutated())


def check(read: Any) -> None:
    """Only errors that readers raise on purpose, and short ones."""
    try:
        read()
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        return
    assert len(message) < 1000, message[:1000]
    assert message.encode()


@pytest.mark.slow
@FUZZED
@given(RECORDS)
def test_a_record_is_one_or_a_short_value_error(record):
    for stored in (None, [], [1], [1, 2]):
        check(lambda stored=stored: read_record(record, "data.jsonl:1", stored=stored))


@pytest.mark.slow
@FUZZED
@given(st.lists(RECORDS, min_size=1, max_size=3))
def test_files_of_records_hold_samples_or_broken_ones(records):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.png").write_bytes(b"no picture")
        good = {"messages": ASKED}
        texts = [json.dumps(record) for record in [good, *records]]
        (folder / "lines").write_text("\n".join(texts))
        (folder / "list").write_text(f"[{', '.join(texts)}]")
        with tarfile.open(folder / "x.tar", "w") as archive:
            for place, text in enumerate(texts):
                info = tarfile.TarInfo(f"{place}.json")
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
        opened: list[SampleDataset] = [
            MessagesDataset(folder / "lines"),
            MessagesDataset(folder / "list"),
            WebDataset(folder / "x.tar"),
        ]
        for dataset in opened:
            assert len(dataset) == len(texts)
            for index in range(len(texts)):
                check(lambda data=dataset, i=index: data.outline(i))
                check(lambda data=dataset, i=index: data[i])
            assert all(len(one.reason) < 1000 for one in getattr(dataset, "broken", ()))


@pytest.mark.slow
@FUZZED
@given(st.binary(max_size=60), st.sampled_from([b"[", b"{", b'[{"a": [1, "]', b"\xef\xbb\xbf["]))
def test_files_of_any_bytes_are_refused_in_one_line(content, start):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "data"
        for whole in (content, start + content, start + content + b"]"):
            path.write_bytes(whole)
            with pytest.raises(ValueError, match="data") as error:
                MessagesDataset(path)
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 1000


@pytest.mark.slow
@FUZZED
@given(RECORDS)
@example({"messages": ASKED, "images": [{"bytes": False}]})
def test_a_row_is_one_or_a_short_value_error(record):
    row = record if isinstance(record, dict) else {"messages": record}
    dataset = HuggingFaceDataset.__new__(HuggingFaceDataset)
    dataset.path, dataset._rows, dataset._folders = "data", [row], [ImageFolder("/nowhere")]
    check(lambda: dataset.outline(0))
