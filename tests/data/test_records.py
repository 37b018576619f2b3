"""A broken record is one broken sample in every format, whatever is wrong with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from tests.data.test_webdataset import encoded, tar
from tests.dropin.processors import PROCESSORS, stock_processor
from tests.models.tiny import picture
from tokenflex.data.faults import BrokenSample, leaving_out, reason_of
from tokenflex.data.huggingface import HuggingFaceDataset
from tokenflex.data.messages import MessagesDataset
from tokenflex.data.mixture import Mixture
from tokenflex.data.placeholders import find_placeholder
from tokenflex.data.records import MAX_RECORD_BYTES, read_record
from tokenflex.data.samples import SampleDataset, Turn
from tokenflex.data.webdataset import WebDataset
from tokenflex.formats import detect_format

USER = {"role": "user", "content": "What is it?"}
ASSISTANT = {"role": "assistant", "content": "A cat."}
GOOD = {"messages": [USER, ASSISTANT]}
LLAVA = {
    "conversations": [
        {"from": "human", "value": "What is it?"},
        {"from": "gpt", "value": "A cat."},
    ]
}
TURNS = (Turn("user", "What is it?"), Turn("assistant", "A cat."))
HALF = "\ud83d"


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def asked(content: Any, answer: Any = "A cat.", **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}, {**ASSISTANT, "content": answer}]
    } | (fields)


# What is wrong with a record, as bytes where that is no JSON.
BROKEN: dict[str, Any] = {
    "not JSON": b"{'images': []}",
    "a string": "hello",
    "a number": 3,
    "null": None,
    "1,000 deep": nested(1_000),
    "100,000 deep": nested(100_000),
    "deep in a field": b'{"messages": ' + nested(100_000) + b"}",
    "a number of 5,000 digits": b'{"id": ' + b"9" * 5000 + b"}",
    "half an emoji in a question": asked(f"cut off {HALF}"),
    "half an emoji in an answer": asked("odd", f"cut off {HALF}"),
    "half an emoji in a part": asked([{"type": "text", "text": HALF}]),
    "half an emoji in the id": GOOD | {"id": HALF},
    "half an emoji in the kind": GOOD | {"kind": HALF},
    "half an emoji in LLaVA's turn": {
        "conversations": [{"from": "human", "value": HALF}, LLAVA["conversations"][1]]
    },
    "an id that is a list": GOOD | {"id": ["a"]},
    "an id that is true": GOOD | {"id": True},
    "a placeholder in a question": asked("<IMG_CONTEXT> what is it?"),
    "a placeholder in an answer": asked("what?", "a <|image_pad|>"),
    "a mark in a text without images": asked("<image> what is it?"),
    "a video under another name": GOOD | {"video_file": "a.mp4"},
    "videos under another name": LLAVA | {"video_urls": ["a.mp4"]},
    "a video that is a link": GOOD | {"video": "https://host/a.mp4"},
    "videos that are no list": GOOD | {"videos": "a.mp4"},
    "a mark without a video": asked("<video> what is it?"),
    "more marks than videos": asked("<video><video> what?") | {"video": "a.gif"},
    "a mark with a number": asked("<video:3> what?") | {"video": "a.gif"},
    "a sound": GOOD | {"audio": {"path": "a.wav"}},
    "an image under another name": GOOD | {"img": "a.png"},
    "a picture under any name": GOOD | {"thing": "pictures/a.JPG"},
    "pictures under any name": GOOD | {"things": [{"path": "a", "bytes": None}]},
    "an image key of another case": GOOD | {"Image": "a.png"},
    "an image in a message": {"messages": [USER | {"images": ["a.png"]}, ASSISTANT]},
    "a part without its video": asked([{"type": "video"}]),
    "a part with the frames of a video": asked([{"type": "video", "frames": ["a.png"]}]),
    "messages that are an object": {"messages": USER},
    "messages that are a string": {"messages": "hello"},
    "conversations that are a string": {"conversations": "hello"},
    "a turn that is a list": {"messages": [["user", "hello"], ASSISTANT]},
    "an unknown role": {"messages": [{"role": "robot", "content": "x"}, ASSISTANT]},
    "a role that is null": {"messages": [{"role": None, "content": "x"}, ASSISTANT]},
    "a role that is a list": {"messages": [{"role": ["user"], "content": "x"}, ASSISTANT]},
    "no role": {"messages": [{"content": "x"}, ASSISTANT]},
    "the answer first": {"messages": [ASSISTANT, USER]},
    "no answer": {"messages": [USER]},
    "content that is null": asked(None),
    "content that is a number": asked(3),
    "content that is a list in a list": asked([["hello"]]),
    "a part of unknown type": asked([{"type": "tool"}]),
    "a part whose type is a list": asked([{"type": ["text"]}]),
}

PAYLOAD = "iVBORw0KGgo" + "AbC9" * 60
BROKEN |= {
    f"a picture under {next(iter(fields))}": GOOD | fields
    for fields in (
        {"base64": PAYLOAD},
        {"Image_Base64": "AAAA"},
        {"image_b64": PAYLOAD},
        {"image_data": "AAAA"},
        {"image_list": ["dir/a"]},
        {"imagePath": "dir/a"},
        {"inputimages": ["dir/a"]},
        {"metadata": {"image": "dir/a"}},
        {"nested": {"extra": [{"photo": {"name": "a"}}]}},
        {"listed": ["a", "b", "c.JFIF"]},
        {"payload": PAYLOAD},
        {"link": f"data:application/octet-stream;base64,{PAYLOAD}"},
        {"sound_of_it": "a.3gp"},
        {"attachments": [{"name": "a"}]},
        {"image_id": "000001.jpg"},
    )
}
BROKEN |= {
    f"a picture in a message under {next(iter(fields))}": {"messages": [USER | fields, ASSISTANT]}
    for fields in (
        {"file": "a.png"},
        {"image_base64": PAYLOAD},
        {"attachments": [{"path": "dir/a"}]},
        {"attachment": "dir/a"},
        {"extra": {"images": ["dir/a"]}},
    )
}
BROKEN |= {
    "a picture in a turn of LLaVA's": {
        "conversations": [LLAVA["conversations"][0] | {"file": "a.png"}, LLAVA["conversations"][1]]
    },
    "a picture in a part of text": asked([{"type": "text", "text": "What?", "file": "a.png"}]),
    "base64 in a part": asked([{"type": "image", "base64": PAYLOAD}]),
    "a source in a part": asked([{"type": "image", "source": {"type": "base64", "data": "AA"}}]),
}

# Those that name images: tars and tables store these elsewhere.
BROKEN_IMAGES: dict[str, Any] = {
    "images that are a string": GOOD | {"images": "a.png"},
    "image paths that are a string": GOOD | {"image_paths": "a.png"},
    "images that are numbers": GOOD | {"images": [1]},
    "an image that is an object": GOOD | {"image": {"path": "a.png"}},
    "an image in a list in a list": GOOD | {"images": [["a.png"]]},
    "a URL": GOOD | {"image": "https://example.org/a.png"},
    "a data URL": GOOD | {"image": "data:image/png;base64,AAAA"},
    "half an emoji in a path": GOOD | {"image": f"{HALF}.png"},
    "a null byte in a path": GOOD | {"image": "a\0.png"},
    "an endless path": GOOD | {"image": "a/" * 5000},
    "a video in a message beside images": {
        "images": ["a.png"],
        "messages": [USER | {"video": "a.mp4"}, ASSISTANT],
    },
    "a sound in a text beside images": asked(
        [{"type": "text", "text": "What?", "audio": "a.wav"}], images=["a.png"]
    ),
    "a video beside images": GOOD | {"images": ["a.png"], "video_file": "a.mp4"},
    "two keys that differ": GOOD | {"image": "a.png", "images": ["b.png"]},
    "parts and images that differ": asked([{"type": "image", "image": "a.png"}], images=["b.png"]),
    "one part of two with its image": asked(
        [{"type": "image", "image": "a.png"}, {"type": "image"}]
    ),
    "a part with two images": asked([{"type": "image", "image": "a.png", "path": "b.png"}]),
    "null among images": GOOD | {"images": [None, "a.png"]},
    "null alone": GOOD | {"images": [None]},
    "base64 in a part beside images": asked(
        [{"type": "image", "base64": PAYLOAD}], images=["a.png"]
    ),
    "a source in a part beside images": asked(
        [{"type": "image", "source": "b.png"}], images=["a.png"]
    ),
    "an object in a part beside images": asked(
        [{"type": "image", "image": {"bytes": "AAAA"}}], images=["a.png"]
    ),
    "a data URL in a part beside images": asked(
        [{"type": "image", "url": f"data:image/png;base64,{PAYLOAD}"}], images=["a.png"]
    ),
    "a path that is too long with its folder": GOOD | {"image": "ab/" * 1363},
    "a name of 300 bytes": GOOD | {"image": "dir/" + "é" * 150},
    "a URL in a part": asked([{"type": "image_url", "image_url": {"url": "https://x.org/a"}}]),
}


def as_bytes(record: Any) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record).encode()


def lines(folder: Path, records: list[Any], start: bytes = b"") -> SampleDataset:
    path = folder / "data.jsonl"
    path.write_bytes(start + b"\r\n".join(map(as_bytes, records)) + b"\r\n\r\n")
    return MessagesDataset(path)


def llava_list(folder: Path, records: list[Any], start: bytes = b"") -> SampleDataset:
    path = folder / "data.json"
    path.write_bytes(start + b"\n[\n" + b",\n ".join(map(as_bytes, records)) + b"]\n\n")
    return MessagesDataset(path)


def tars(folder: Path, records: list[Any], start: bytes = b"") -> SampleDataset:
    members = {f"{i}.json": start + as_bytes(record) for i, record in enumerate(records)}
    return WebDataset(tar(folder / "data.tar", members))


def mixture(folder: Path, records: list[Any], start: bytes = b"") -> SampleDataset:
    return Mixture([lines(folder, records, start), lines(folder, records[::2])])


FORMATS = [lines, llava_list, tars, mixture]


@pytest.mark.parametrize("make", FORMATS)
@pytest.mark.parametrize("record", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_a_value_error_that_names_its_place(tmp_path, make, record):
    dataset = make(tmp_path, [GOOD, record, LLAVA])
    assert dataset[0].conversations[0].turns == dataset[2].conversations[0].turns == TURNS
    for read in (dataset.outline, dataset.__getitem__):
        with pytest.raises(ValueError, match=r"data\.(jsonl:2|json\[1\]|tar: 1)") as error:
            read(1)
        message = str(error.value).removeprefix(str(tmp_path))
        assert message.isprintable()
        assert len(message) < 300


@pytest.mark.parametrize("make", [lines, llava_list])
@pytest.mark.parametrize("record", BROKEN_IMAGES.values(), ids=BROKEN_IMAGES)
def test_a_broken_path_is_a_value_error_that_names_its_place(tmp_path, make, record):
    picture(1).save(tmp_path / "a.png")
    picture(2).save(tmp_path / "b.png")
    dataset = make(tmp_path, [GOOD, record, GOOD])
    with pytest.raises(ValueError, match=r"data\.(jsonl:2|json\[1\])") as error:
        dataset[1]
    assert len(str(error.value).removeprefix(str(tmp_path))) < 300


def test_all_broken_records_of_a_file_are_known_when_it_is_opened(tmp_path):
    """Also those behind one that cannot be parsed, in a list as well as in lines."""
    records = [GOOD, *BROKEN.values(), GOOD]
    for make in (lines, llava_list):
        dataset = make(tmp_path, records)
        assert [one.index for one in dataset.broken] == [*range(1, len(BROKEN) + 1)]
        assert len(dataset) == len(records)
    mixed = Mixture([lines(tmp_path, [GOOD, LLAVA]), lines(tmp_path, [GOOD, "x", GOOD, "y"])])
    assert [one.index for one in mixed.broken] == [3, 5]
    for one in mixed.broken:
        with pytest.raises(ValueError, match=r"jsonl:[24]: expected a JSON object") as error:
            mixed[one.index]
        assert str(error.value) == one.reason


@pytest.mark.parametrize("make", [lines, llava_list])
def test_a_file_without_a_good_record_is_an_error_at_once(tmp_path, make):
    with pytest.raises(ValueError, match=r"no samples that can be read, out of 5: .*data.*; .*; "):
        make(tmp_path, ["a", "b", "c", "d", "e"])


def test_a_list_that_is_cut_off_is_an_error_at_once(tmp_path):
    """The records behind the cut would be lost without a word."""
    content = json.dumps([GOOD] * 5)
    for length in (*range(1, len(content) - 1, 7), len(content) - 1):
        (tmp_path / "data.json").write_text(content[:length])
        with pytest.raises(ValueError, match=r"data\.json is a JSON list without an end"):
            MessagesDataset(tmp_path / "data.json")


def test_a_file_of_lines_may_begin_with_a_list(tmp_path):
    dataset = lines(tmp_path, [[1, 2], GOOD])
    assert (len(dataset), dataset.broken[0].index) == (2, 0)


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenflex.data.json_records.MAX_RECORD_BYTES", 200)
    dataset = lines(tmp_path, [GOOD, asked("x" * 1000), GOOD])
    (one,) = dataset.broken
    assert (one.index, "jsonl:2 is longer than 200 bytes" in one.reason) == (1, True)
    assert dataset[2].id.endswith(":3")


def test_a_record_of_gigabytes_in_a_tar_is_not_read(tmp_path, monkeypatch):
    assert MAX_RECORD_BYTES < 2**30
    monkeypatch.setattr("tokenflex.data.webdataset.MAX_RECORD_BYTES", 200)
    dataset = tars(tmp_path, [GOOD, asked("x" * 1000)])
    with pytest.raises(ValueError, match=r"data\.tar: 1: the record has \d+ bytes, more than 200"):
        dataset[1]


@pytest.mark.parametrize("make", [lines, llava_list, tars, mixture])
def test_a_reason_names_the_place_also_where_the_sample_has_another_name(tmp_path, make):
    """An image that is missing, and a text that a tokenizer refuses, are found in the file."""
    good = GOOD | {"id": "a"}
    records = [good, good, good | {"messages": [USER | {"content": "marks"}, ASSISTANT]}]
    if make is not tars:
        records[1] = records[1] | {"image": "none.png"}
    dataset = make(tmp_path, records)
    broken: list[BrokenSample] = []
    for index in range(3):
        with leaving_out(dataset, index, broken):
            if dataset.outline(index).conversations[0].turns[0].text == "marks":
                raise TypeError("no such text")
    place = {lines: "data.jsonl:{}", llava_list: "data.json[{}]", tars: "data.tar: {}"}
    form = place.get(make, "data.jsonl:{}")
    first = 1 if ":{}" in form else 0
    expected = [1, 2] if make is not tars else [2]
    assert [one.index for one in broken] == expected
    for one in broken:
        assert form.format(one.index + first) in one.reason
    assert broken[-1].reason.endswith(": TypeError: no such text")


# ---- pictures under either format's key


@pytest.mark.parametrize("turns", [GOOD, LLAVA], ids=["messages", "conversations"])
@pytest.mark.parametrize(
    "named",
    [
        {"image": "a.png"},
        {"image": ["a.png"]},
        {"images": ["a.png"]},
        {"image_path": "a.png"},
        {"image_paths": ["a.png"]},
        {"image": "a.png", "images": ["a.png"]},
        {"image": "a.png", "images": [], "video": None, "frames": 8},
    ],
    ids=str,
)
def test_an_image_is_seen_under_every_key(tmp_path, turns, named):
    picture(1).save(tmp_path / "a.png")
    stored = tar(tmp_path / "x.tar", {"0.json": turns | named, "0.png": encoded(1)})
    for dataset in (
        *(make(tmp_path, [turns | named]) for make in (lines, llava_list)),
        WebDataset(stored),
    ):
        (sample,) = dataset
        assert [image.tobytes() for image in sample.images] == [picture(1).tobytes()]
        assert sample.conversations[0].turns == TURNS
        assert len(dataset.outline(0).image_sizes) == 1


def test_an_image_may_be_named_by_its_part(tmp_path):
    picture(1).save(tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?", "image": None}]
    for record in (asked(parts), asked(parts, images=["a.png"])):
        (sample,) = lines(tmp_path, [record])
        assert len(sample.images) == 1
        assert sample.conversations[0].turns[0] == Turn("user", "<image>What?")


def test_harmless_fields_of_a_record_without_images_are_passed_over():
    harmless = {
        "image_id": "000001",
        "imageId": 7,
        "video_ids": ["a"],
        "image_size": [640, 480],
        "num_images": "0",
        "has_image": False,
        "image_box": [0.5, 1, None],
        "image_info": {"width": 3, "height": 4},
        "images_seen": 3,
        "video_caption": "A cat runs.",
        "img": None,
        "photo": "",
        "attachments": [{"path": None}],
        "source": "wiki",
        "modality": "image",
        "digest": "ab" * 32,
        "tags": ["cat", "image"],
        "metadata": {"image_id": 3, "images": [], "language": "en"},
    }
    turn = USER | {"name": "Ada", "image_id": "3", "attachments": [], "weight": 1}
    record = {"messages": [turn, ASSISTANT | {"tool_calls": []}]} | harmless
    assert read_record(record, "x:1")[1] == []


def test_other_fields_are_free_beside_pictures():
    record = GOOD | {"images": ["a.png"], "thumbnail": "b.png", "metadata": {"image": "c.png"}}
    assert read_record(record, "x:1")[1] == ["a.png"]


@pytest.mark.parametrize(
    "source",
    [
        {"image": f"data:image/png;base64,{PAYLOAD}"},
        {"image": PAYLOAD},
        {"image": {"bytes": "AAAA"}},
        {"base64": "AAAA"},
        {"source": "b.png"},
        {"source": "dir/b"},
        {"data": "AAAA"},
    ],
    ids=str,
)
def test_a_part_with_its_own_picture_is_refused_beside_stored_ones(source):
    record = asked([{"type": "image"} | source, {"type": "text", "text": "What?"}])
    with pytest.raises(ValueError, match="x:1"):
        read_record(record, "x:1", stored=["picture"])
    plain = asked([{"type": "image"}, {"type": "text", "text": "What?"}])
    assert read_record(plain, "x:1", stored=["picture"])[1] == ["picture"]


@pytest.mark.parametrize(
    "payload",
    [
        "Qm" * 3000,
        "iVBORw0KGgo" + "Qm" * 30,
        "/9j/" + "Qm/" * 1000,
        "data:image/png;base64," + "Qm" * 3000,
        "data:image/png;base64," + "Qm" * 10,
        "DATA:;base64," + "Qm" * 30,
    ],
    ids=range(6),
)
@pytest.mark.parametrize(
    "record",
    [
        lambda payload: GOOD | {"image": payload},
        lambda payload: GOOD | {"images": payload},
        lambda payload: GOOD | {"images": [payload, 1]},
        lambda payload: GOOD | {"images": [[payload]]},
        lambda payload: GOOD | {"images": [{"image": payload}]},
        lambda payload: GOOD | {"images": {payload: 1}},
        lambda payload: GOOD | {"video": payload},
        lambda payload: GOOD | {"picture_of": payload},
        lambda payload: GOOD | {"id": [payload]},
        lambda payload: asked([{"type": "image", "image": payload}]),
        lambda payload: asked([{"type": "image", "image": [payload]}]),
        lambda payload: asked([{"type": payload}]),
        lambda payload: asked([payload]),
        lambda payload: {"messages": payload},
        lambda payload: {"messages": [{"role": payload, "content": "x"}]},
    ],
    ids=range(15),
)
def test_no_reason_quotes_a_payload(tmp_path, record, payload):
    dataset = lines(tmp_path, [GOOD, record(payload)])
    for read in (dataset.outline, dataset.__getitem__):
        with pytest.raises((ValueError, OSError), match=r"data\.jsonl:2") as error:
            read(1)
        reason = reason_of(error.value)
        assert "Qm" not in reason
        assert len(reason.removeprefix(str(tmp_path))) < 300


@pytest.mark.parametrize(
    "placeholder",
    [
        *("<IMG_CONTEXT>", "[IMG]", "<start_of_image>", "<|image_1|>", "<|image_27|>", "<image 1>"),
        *("<video>", "<audio>", "<image_placeholder>", "<im_patch>", "<|vision_start|>"),
        *("<|IMAGE|>", "<fake_token_around_image>", "<ImageHere>", "<imgpad>", "<|video_pad|>"),
        *("<image_soft_token>", "<|audio_2|>"),
    ],
)
def test_a_placeholder_of_another_processor_is_refused_in_every_turn(placeholder):
    for record in (asked(f"what {placeholder}"), asked("what", f"a{placeholder}b")):
        with pytest.raises(ValueError, match=r"x:1.*a processor writes"):
            read_record(record, "x:1")


def test_texts_that_look_like_a_placeholder_are_texts():
    for text in ("<Image>", "[img]", "image_1", "<|im_start|>", "a < b > c", "<image", "|image|"):
        assert find_placeholder(text) is None


def test_the_placeholders_of_transformers_are_known():
    """Of its processors' own defaults; those that are no word for pictures or sound stay text."""
    general = r"\|SPEAKER\||\|NEWLINE\||<\|(unused_\d+|reserved_.*|pad|object_ref_\w+|box_start)\|>"
    general += r"|<extra_id_\d+>"
    default = re.compile(
        r'\b(?:image|img|boi|eoi|video|audio)_\w*token\w*(?:: str)? = ?"([<\[|][^"]+)"'
    )
    spelled: set[str] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/processing_*.py"):
        spelled.update(default.findall(path.read_text(encoding="utf-8").replace("=", " = ")))
    assert len(spelled) > 20
    unknown = {
        word
        for word in spelled - {"<image>"}
        if find_placeholder(word) is None and not re.fullmatch(general, word)
    }
    assert unknown == set()


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_placeholders_of_the_families_are_known(name):
    try:
        processor = stock_processor(name)
    except ImportError as error:
        pytest.skip(str(error))
    for attribute in ("image_token", "video_token", "boi_token", "eoi_token"):
        word = str(getattr(processor, attribute, None) or "<image>")
        assert word == "<image>" or find_placeholder(word)


def test_a_video_beside_a_record_in_a_tar_is_not_passed_over(tmp_path):
    dataset = WebDataset(tar(tmp_path / "x.tar", {"0.json": GOOD, "0.mp4": b"x", "1.json": GOOD}))
    with pytest.raises(ValueError, match=r"x\.tar: 0: a video, sound or drawing"):
        dataset[0]
    assert dataset[1].images == ()


def test_numbers_are_ids_and_nothing_else_is_kept_of_a_deep_field():
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    name, images, conversation = read_record(GOOD | {"id": 7, "notes": deep}, "x:1")
    assert (name, images, conversation.turns) == ("7", [], TURNS)
    for key in ("id", "images", "image", "messages", "video"):
        with pytest.raises(ValueError, match="x:1"):
            read_record(GOOD | {key: deep}, "x:1")
    with pytest.raises(ValueError, match="x:1"):
        read_record(asked([{"type": "image", "image": deep}], images=deep), "x:1")


# ---- what a file may begin with


@pytest.mark.parametrize("make", FORMATS)
def test_a_byte_order_mark_is_no_part_of_a_record(tmp_path, make):
    dataset = make(tmp_path, [GOOD, LLAVA], b"\xef\xbb\xbf")
    assert [dataset[i].conversations[0].turns for i in range(2)] == [TURNS, TURNS]
    assert not getattr(dataset, "broken", [])


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n \n", b"\n\n"])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (as_bytes(GOOD), "messages"),
        (as_bytes(LLAVA), "llava"),
        (as_bytes([LLAVA]), "llava"),
        (b'{"messages": [', "messages"),
        (as_bytes(GOOD | LLAVA), "messages"),
    ],
)
def test_the_format_of_a_file_is_known_from_its_first_record(tmp_path, start, content, name):
    (tmp_path / "data").write_bytes(start + content + b"\r\n")
    assert detect_format(tmp_path / "data") == name


# ---- tables


def table(folder: Path, rows: list[dict[str, Any]], **features: Any) -> HuggingFaceDataset:
    data = datasets.Dataset.from_list(rows)
    for name, feature in features.items():
        data = data.cast_column(name, feature)
    folder.mkdir()
    data.to_parquet(folder / "0.parquet")
    return HuggingFaceDataset(str(folder))


def test_broken_rows_of_a_table_are_named(tmp_path):
    image = {"bytes": encoded(1), "path": None}
    rows = [
        {"images": [image], "messages": [USER, ASSISTANT], "video": None},
        {"images": [image], "messages": [USER, ASSISTANT], "video": "a.mp4"},
        {"images": [], "messages": None, "video": None},
        {"images": [image], "messages": [USER, ASSISTANT | {"role": None}], "video": None},
        {"images": [image], "messages": [USER | {"content": "<image><image>"}, ASSISTANT]},
        {"images": [{"bytes": None, "path": None}], "messages": [USER, ASSISTANT]},
    ]
    dataset = table(tmp_path / "rows", rows, images=datasets.List(datasets.Image(decode=False)))
    assert len(dataset[0].images) == 1
    for index in range(1, len(rows)):
        for read in (dataset.outline, dataset.__getitem__):
            with pytest.raises((ValueError, FileNotFoundError), match=rf"rows\[{index}\]"):
                read(index)


@pytest.mark.parametrize("column", ["image", "image_path", "images", "image_paths"])
@pytest.mark.parametrize("texts", ["messages", "conversations"])
def test_a_table_may_have_either_columns(tmp_path, column, texts):
    turns = GOOD["messages"] if texts == "messages" else LLAVA["conversations"]
    picture(1).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    path = tmp_path / "table"
    rows = [{column: [image] if column.endswith("s") else image, texts: turns}]
    datasets.Dataset.from_list(rows).save_to_disk(path)
    (sample,) = HuggingFaceDataset(str(path), allow_outside=True)
    assert sample.images[0].tobytes() == picture(1).tobytes()
    assert sample.conversations[0].turns == TURNS


def test_a_column_of_numbers_holds_no_images(tmp_path):
    with pytest.raises(ValueError, match="table: column images must hold images"):
        table(tmp_path / "table", [{"images": 3, "messages": [USER, ASSISTANT]}])
