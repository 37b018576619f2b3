"""Videos in records: ``<video>`` marks, parts and columns become frames of a sample and train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.models.tiny import picture, tiny_model
from tokenflex import DataCollatorWithPacking, TokenCounts
from tokenflex.data.faults import BrokenSample
from tokenflex.data.messages import MessagesDataset
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.samples import Conversation, Sample, Turn, count_images
from tokenflex.data.steps import StepPacker, outline_of
from tokenflex.digits.processor import digits_processor
from tokenflex.evaluation import evaluate
from tokenflex.formats import FORMATS
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.videos import FrameSampling, load_video

ANSWER = {"role": "assistant", "content": "3"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A GIF of 10 frames, a folder of 3, and a picture."""
    frames = [Image.new("RGB", (32, 32), (20 * i,) * 3) for i in range(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "frames").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "frames" / f"{i}.png")
    picture(9).save(tmp_path / "a.png")
    return tmp_path


def lines(folder: Path, *records: dict, **options) -> MessagesDataset:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return MessagesDataset(path, **options)


def asked(content, **fields) -> dict:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **fields}


PART = {"type": "video", "video": "a.gif"}
TEXT = {"type": "text", "text": " odd"}


@pytest.mark.parametrize(
    ("record", "text", "frames"),
    [
        (asked("<video> odd", video="a.gif"), "<video:4> odd", [4]),
        (asked("odd", videos=["a.gif"]), "<video:4>odd", [4]),
        (asked([PART, TEXT]), "<video:4> odd", [4]),
        (asked([{"type": "video"}, TEXT], video_path="a.gif"), "<video:4> odd", [4]),
        (
            asked("<video> <image> <video> odd", image="a.png", videos=["frames", "a.gif"]),
            "<video:3> <image> <video:4> odd",
            [3, 1, 4],
        ),
        (asked("odd", images=["a.png"], videos=["frames"]), "<image><video:3>odd", [1, 3]),
        (asked("odd <image>", images=["a.png"], videos=["frames"]), "<video:3>odd <image>", [3, 1]),
        (
            {
                "video": "frames",
                "conversations": [
                    {"from": "human", "value": "<video>\nodd"},
                    {"from": "gpt", "value": "3"},
                ],
            },
            "<video:3>\nodd",
            [3],
        ),
    ],
)
def test_videos_of_a_record_become_frames(folder, record, text, frames):
    dataset = lines(folder, record, sampling=FrameSampling(max_frames=4))
    sample, outline = dataset[0], outline_of(dataset, 0)
    assert sample.conversations[0].turns[0].text == text
    assert outline.conversations == sample.conversations
    assert outline.image_sizes == sample.image_sizes
    sources = {3: "frames", 4: "a.gif"}
    expected = []
    for number in frames:
        if number == 1:
            expected.append(Image.open(folder / "a.png"))
        else:
            clip = load_video(folder / sources[number], sampling=FrameSampling(max_frames=4))
            expected += clip.frames
    assert [image.tobytes() for image in sample.images] == [one.tobytes() for one in expected]
    assert sample.max_tiles == [limit for n in frames for limit in ([None] if n == 1 else [1] * n)]
    assert count_images(text) == len(sample.images)


def test_a_prompt_of_training_is_that_of_a_chat(folder):
    processor = digits_processor(4)
    encode = PackingCollator(processor, TokenCounts()).encode
    template = (  # writes its own text around an image, and sees a video as one image
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}read <image> red "
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    )
    processor.tokenizer.chat_template = template
    sample = lines(folder, asked([PART, TEXT, {"type": "image"}], images=["a.png"]))[0]
    prompt = encode.prompt(Conversation(sample.conversations[0].turns[:1]), len(sample.images))
    assert prompt == "read " + "<image>" * 10 + " red  oddread <image> red  "
    chat = [{"role": "user", "content": [{**PART, "video": [*sample.images[:10]]}, TEXT]}]
    inputs = processor.apply_chat_template(
        chat, chat_template=template, tokenize=True, return_dict=True, num_image_tokens=1
    )
    (ids,) = inputs["input_ids"].tolist()
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert words == ["read", *["<image>"] * 10, "red", "odd"]


@pytest.mark.parametrize("format_name", ["messages", "llava"])
def test_sampling_is_a_key_of_the_configuration(folder, format_name):
    lines(folder, asked("<video> odd", video="a.gif"))
    data_format = FORMATS[format_name]
    options = data_format.options(path=folder / "data.jsonl", max_frames=3)
    assert len(data_format.open(options)[0].images) == 3
    options = data_format.options(path=folder / "data.jsonl", fps=2)
    assert len(data_format.open(options)[0].images) == 2  # of one second
    for wrong in ({"max_frames": 0}, {"fps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            data_format.options(**wrong)


def test_videos_outside_of_the_folder_are_broken(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    picture(1).save(outside / "0.png")
    (folder / "linked").mkdir()
    (folder / "linked" / "0.png").symlink_to(outside / "0.png")
    records = [
        asked("<video> odd", video="frames"),
        asked("<video> odd", video=str(outside)),
        asked("<video> odd", video="linked"),
        asked("<video> odd", video="none.gif"),
    ]
    dataset = lines(folder, *records)
    assert [sample.index for sample in dataset.broken] == [1]
    for index, words in ((1, "outside of the data's folder"), (2, "outside"), (3, "not exist")):
        for read in (dataset.__getitem__, dataset.outline):
            with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
                read(index)
            assert f"data.jsonl:{index + 1}" in str(error.value)
    assert "video" in dataset.broken[0].reason
    assert "image" not in dataset.broken[0].reason
    permitted = lines(folder, *records[:3], allow_outside=True)
    assert [len(sample.images) for sample in permitted] == [3, 1, 1]


def test_a_damaged_video_is_left_out_of_a_step(folder):
    content = (folder / "a.gif").read_bytes()
    (folder / "b.gif").write_bytes(content[: len(content) // 2])
    dataset = lines(folder, *(asked("<video> odd", video=f"{name}.gif") for name in "ab"))
    packer = StepPacker(dataset, PackingCollator(digits_processor(4), TokenCounts((4,), (1,))))
    step = packer([(0, 0), (0, 1)])
    assert step.samples == 1
    (broken,) = step.broken
    assert isinstance(broken, BrokenSample)
    assert "data.jsonl:2: video" in broken.reason
    assert "cut off" in broken.reason


def test_a_step_costs_the_frames_of_its_videos(folder):
    """A step is planned by outlines: what it plans is what is packed."""
    records = [asked("<video> odd", video="a.gif"), asked("<image> odd", image="a.png")]
    dataset = lines(folder, *records, sampling=FrameSampling(max_frames=5))
    processor = TokenFlexProcessor(
        digits_processor(4).image_processor, digits_processor(4).tokenizer, max_tiles=4
    )
    packer = StepPacker(dataset, PackingCollator(processor, TokenCounts((4,), (1,))))
    step = packer([(0, 0), (0, 1)])
    assert step.tiles == 6
    assert step.vision_tokens == sum(step.bins[0].plan.token_counts) == 24
    assert len(step.bins[0].pixel_values) == 6
    bounded = StepPacker(dataset, packer.collator, max_tiles=4)
    assert "more than max_tiles of 4" in bounded([(0, 0), (0, 1)]).broken[0].reason


def test_frames_of_a_wide_clip_are_not_cut_into_tiles(folder):
    wide = [picture(i, (32, 64)) for i in range(2)]
    mark = (Turn("user", "<video:2> <image> odd"), Turn("assistant", "3"))
    sample = Sample("wide", (*wide, wide[0]), (Conversation(mark),))
    base = digits_processor(4)
    processor = TokenFlexProcessor(base.image_processor, base.tokenizer, max_tiles=4)
    collator = PackingCollator(processor, TokenCounts((4,), (1,)))
    assert collator.fit(DrawnSample(0, 0, sample.outline())).tiles == [1, 1, 2]
    assert len(collator([DrawnSample(0, 0, sample)]).pixel_values) == 4


def test_a_packed_video_has_the_loss_of_the_prompt_with_its_frames(folder):
    processor, model = digits_processor(4), tiny_model()
    clip = [picture(i) for i in range(3)]
    records = [
        {"videos": [clip], **asked("<video> odd")},
        {"videos": [str(folder / "frames")], **asked("<video> odd")},
        asked([{"type": "video", "video": clip}, TEXT]),
        {"images": clip, **asked("<image><image><image> odd")},
    ]
    losses = []
    for record in records:
        batch = DataCollatorWithPacking(processor, 9)([record])
        assert batch["num_image_tokens"] == [9, 9, 9]
        losses.append(model(**batch).loss.item())
    assert max(losses) - min(losses) < 1e-6
    inputs = processor(text="<video> odd 3<eos>", videos=[clip], num_image_tokens=9)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"videos": [[picture(0)]], "text": "<video> odd"}, "must hold messages beside videos"),
        ({"videos": [[picture(0)]], "input_ids": [3]}, "input_ids or videos, got both"),
        ({"videos": ["none.gif"], **asked("<video> odd")}, "none.gif"),
        ({"videos": [""], **asked("<video> odd")}, "got an empty text"),
        (
            {"videos": [[picture(0)]], **asked([{"type": "video", "video": "x"}])},
            "holds videos, and others stand beside it",
        ),
        ({"videos": [[picture(0)]], **asked("<video><video> odd")}, "2 times for 1 videos"),
    ],
)
def test_records_of_trainer_that_do_not_fit(record, words):
    collator = DataCollatorWithPacking(digits_processor(4), 4)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        collator([record])


def save_table(rows, path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "videos": datasets.List(
                {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
            ),
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.Value("string")}
            ),
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(path)


def test_columns_of_a_table(folder, tmp_path):
    content = (folder / "a.gif").read_bytes()
    rows = [
        {"videos": [{"bytes": content, "path": None}], **asked("<video> odd")},
        {"videos": [{"bytes": None, "path": "a.gif"}], **asked("<video> odd")},
        {"videos": [], **asked("odd")},
    ]
    for row in rows:
        for message in row["messages"]:
            message.setdefault("content", "")
    save_table(rows, folder / "rows")
    (folder / "rows" / "a.gif").write_bytes(content)
    data_format = FORMATS["huggingface"]
    dataset = data_format.open(data_format.options(path=folder / "rows", max_frames=5))
    assert [len(dataset[i].images) for i in range(3)] == [5, 5, 0]
    assert dataset[0].conversations[0].turns[0].text == "<video:5> odd"
    assert dataset.outline(1).image_sizes == ((32, 32),) * 5
    stream = data_format.open(
        data_format.options(path=folder / "rows", max_frames=2, streaming=True)
    )
    assert sorted(len(stream[i].images) for i in range(3)) == [0, 2, 2]


def test_frames_of_a_table_that_link_out_of_its_folder_are_broken(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    picture(1).save(outside / "0.png")
    rows = [
        {"videos": [{"bytes": None, "path": name}], **asked("<video> odd")}
        for name in ("frames", "linked", "a_link.gif")
    ]
    path = folder / "rows"
    save_table(rows, path)
    (folder / "frames").rename(path / "frames")
    (path / "linked").mkdir()
    (path / "linked" / "0.png").symlink_to(outside / "0.png")
    (path / "a_link.gif").symlink_to(folder / "a.gif")
    data_format = FORMATS["huggingface"]
    dataset = data_format.open(data_format.options(path=path))
    for read in (dataset.__getitem__, dataset.outline):
        with pytest.raises(ValueError, match=r"image .*linked.* is outside of the data's folder"):
            read(1)
        with pytest.raises(ValueError, match=r"video 'a_link\.gif' is outside"):
            read(2)
    assert len(dataset[0].images) == 3
    permitted = data_format.open(data_format.options(path=path, allow_outside=True))
    assert [len(permitted[i].images) for i in range(3)] == [3, 1, 10]


def test_records_of_a_trainer_show_the_frames_of_the_processor(folder):
    parts = digits_processor(4)
    record = {"videos": [str(folder / "a.gif")], **asked("<video> odd")}
    shown = []
    for options in ({}, {"max_frames": 3}, {"fps": 5}, {"max_frames": 2, "fps": 5}):
        processor = TokenFlexProcessor(parts.image_processor, parts.tokenizer, **options)
        shown.append(len(DataCollatorWithPacking(processor, 4)([record])["num_image_tokens"]))
    assert shown == [10, 3, 5, 2]  # of one second


@pytest.mark.parametrize("score", ["forced", "exact"])
def test_evaluation_sees_the_frames(folder, score):
    records = [asked("<video> odd", video="a.gif"), asked("<image> odd", image="a.png")]
    dataset = lines(folder, *records, sampling=FrameSampling(max_frames=3))
    report = evaluate(
        tiny_model(), digits_processor(4), dataset, [4, 9], score=score, max_new_tokens=2
    )
    assert report["samples"] == 2
    assert report["vision_tokens_per_image"] == {"4": 4.0, "9": 9.0}
    assert report["vision_tokens_per_question"] == {"4": 8.0, "9": 18.0}  # 12 and 4; 27 and 9
