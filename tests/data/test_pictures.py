"""Every reader of data sees a picture as the processor does, and outlines state the turned size."""

from __future__ import annotations

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image

from tokenflex.data.huggingface import HuggingFaceDataset
from tokenflex.data.messages import MessagesDataset
from tokenflex.data.streaming import StreamingDataset
from tokenflex.data.webdataset import WebDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.images import load_image

MESSAGES = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
TURNS = [{"from": "human", "value": "<image>\nodd"}, {"from": "gpt", "value": "3"}]


def transparent() -> bytes:
    array = np.zeros((20, 40, 4), np.uint8)
    array[5:10, 5:30, 3] = 255
    return saved(Image.fromarray(array), "PNG")


def lying_on_its_side() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (20, 1))
    return saved(Image.fromarray(ramp).convert("RGB"), "JPEG", exif=exif)


def sixteen_bits() -> bytes:
    return saved(Image.fromarray(np.tile(np.arange(0, 65536, 1640, np.uint16), (20, 1))), "PNG")


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def from_messages(folder, content):
    (folder / "a.png").write_bytes(content)
    (folder / "d.jsonl").write_text(json.dumps({"images": ["a.png"], "messages": MESSAGES}))
    return MessagesDataset(folder / "d.jsonl")


def from_llava(folder, content):
    (folder / "a.png").write_bytes(content)
    (folder / "d.json").write_text(json.dumps([{"image": "a.png", "conversations": TURNS}]))
    return MessagesDataset(folder / "d.json")


def from_webdataset(folder, content):
    with tarfile.open(folder / "a.tar", "w") as archive:
        record = json.dumps({"messages": MESSAGES}).encode()
        for name, data in (("a.png", content), ("a.json", record)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return WebDataset(folder / "a.tar")


def huggingface_rows(folder, content):
    image = {"bytes": content, "path": None}
    rows = datasets.Dataset.from_dict({"images": [[image]], "messages": [MESSAGES]})
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    rows.save_to_disk(folder / "rows")
    return str(folder / "rows")


def from_huggingface(folder, content):
    return HuggingFaceDataset(huggingface_rows(folder, content))


def from_a_stream(folder, content):
    return StreamingDataset(huggingface_rows(folder, content), shuffle_buffer=1)


READERS = [from_messages, from_llava, from_webdataset, from_huggingface, from_a_stream]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("picture", [transparent, lying_on_its_side, sixteen_bits])
def test_training_reads_a_picture_as_the_processor_does(tmp_path, picture, read):
    content = picture()
    expected = load_image(content)
    dataset = read(tmp_path, content)
    (image,) = dataset[0].images
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert dataset.outline(0).image_sizes == ((expected.height, expected.width),)
    processor = digits_processor(4)
    tiled = type(processor)(
        processor.image_processor, processor.tokenizer, num_image_tokens=4, max_tiles=6
    )
    with Image.open(io.BytesIO(content)) as file:
        for each in (processor, tiled):
            asked = each(images=file, text="<image> odd")
            trained = each(images=image, text="<image> odd")
            assert np.array_equal(asked["pixel_values"], trained["pixel_values"])
    # The tiles that were planned from the outline are those that are cut.
    (planned,) = tiled.image_tokens(dataset.outline(0).image_sizes)
    assert planned == 4 * len(trained["pixel_values"])


@pytest.mark.parametrize("read", READERS)
def test_a_picture_that_declares_too_many_pixels_is_refused_in_outlines_too(
    tmp_path, read, monkeypatch
):
    dataset = read(tmp_path, transparent())
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", "799")
    for look in (dataset.outline, dataset.__getitem__):
        with pytest.raises(ValueError, match="40 x 20 pixels, more than the 799"):
            look(0)
