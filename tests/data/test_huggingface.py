"""Data sets of the ``datasets`` library: both layouts of columns, sizes without pixels."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest

from tests.models.tiny import picture
from tokenflex.data.huggingface import HuggingFaceDataset
from tokenflex.data.samples import Turn

MESSAGES = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
TURNS = [{"from": "human", "value": "<image> odd"}, {"from": "gpt", "value": "3"}]


def saved(folder, columns: dict, features: dict):
    rows = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        rows = rows.cast_column(name, feature)
    rows.save_to_disk(folder)
    return str(folder)


@pytest.fixture
def trl_layout(tmp_path) -> str:
    columns = {
        "images": [[picture(1, (10, 20))], [picture(2), picture(3)], []],
        "messages": [MESSAGES] * 3,
    }
    return saved(tmp_path / "trl", columns, {"images": datasets.List(datasets.Image())})


def test_images_and_messages_become_samples(trl_layout):
    dataset = HuggingFaceDataset(trl_layout)
    assert [len(dataset[index].images) for index in range(len(dataset))] == [1, 2, 0]
    sample = dataset[1]
    assert sample.conversations[0].turns == (Turn("user", "odd"), Turn("assistant", "3"))
    assert np.array_equal(np.asarray(sample.images[1]), np.asarray(picture(3)))
    assert sample.images[0].mode == "RGB"
    assert sample.id == f"{trl_layout}[1]"


def test_llavas_columns_become_samples(tmp_path):
    columns = {"image": [picture(1)], "conversations": [TURNS], "id": ["a"]}
    path = saved(tmp_path / "llava", columns, {"image": datasets.Image()})
    (sample,) = (HuggingFaceDataset(path)[0],)
    assert (sample.id, len(sample.images)) == ("a", 1)
    assert sample.conversations[0].turns[0] == Turn("user", "<image> odd")


def test_an_outline_has_the_samples_sizes(trl_layout):
    dataset = HuggingFaceDataset(trl_layout)
    for index in range(len(dataset)):
        sizes = tuple((image.height, image.width) for image in dataset[index].images)
        assert dataset.outline(index).image_sizes == sizes


def test_a_split_of_several_is_chosen(tmp_path):
    rows = datasets.Dataset.from_dict({"images": [[picture(1)]], "messages": [MESSAGES]})
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    datasets.DatasetDict({"train": rows, "extra": rows}).save_to_disk(tmp_path / "both")
    assert len(HuggingFaceDataset(str(tmp_path / "both"), "extra")) == 1
    with pytest.raises(ValueError, match="cannot be loaded, split 'none'"):
        HuggingFaceDataset(str(tmp_path / "both"), "none")


def test_an_image_that_is_none_is_an_error_that_names_the_row(tmp_path):
    columns = {"images": [[{"bytes": b"hello", "path": None}]], "messages": [MESSAGES]}
    feature = datasets.List(datasets.Image(decode=False))
    path = saved(tmp_path / "bad", columns, {"images": feature})
    for read in (HuggingFaceDataset(path).outline, HuggingFaceDataset(path).__getitem__):
        with pytest.raises(ValueError, match=r"bad\[0\]: an image cannot be read"):
            read(0)


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0]])
def test_a_null_in_a_list_of_images_is_a_broken_row(tmp_path, order):
    content = io.BytesIO()
    picture(1).save(content, "PNG")
    images = [[None, {"bytes": content.getvalue(), "path": None}][index] for index in order]
    columns = {"images": [images, [], None], "messages": [MESSAGES] * 3}
    feature = datasets.List(datasets.Image(decode=False))
    dataset = HuggingFaceDataset(saved(tmp_path / "rows", columns, {"images": feature}))
    for read in (dataset.outline, dataset.__getitem__):
        with pytest.raises(ValueError, match=rf"rows\[0\]: .*no null, got one at {order.index(0)}"):
            read(0)
    assert dataset[1].images == dataset[2].images == ()


def test_a_single_image_that_is_null_is_no_image(tmp_path):
    columns = {"image": [None, picture(1)], "messages": [MESSAGES] * 2}
    dataset = HuggingFaceDataset(saved(tmp_path / "rows", columns, {"image": datasets.Image()}))
    assert [len(sample.images) for sample in (dataset[0], dataset[1])] == [0, 1]


@pytest.mark.parametrize("column", ["thing", "image_bytes"])
def test_bytes_beside_an_empty_list_of_images_are_a_broken_row(tmp_path, column):
    columns = {"images": [[], []], column: [b"hello", None], "messages": [MESSAGES] * 2}
    feature = datasets.List(datasets.Image(decode=False))
    dataset = HuggingFaceDataset(saved(tmp_path / "rows", columns, {"images": feature}))
    with pytest.raises(ValueError, match=rf"rows\[0\]: '{column}' looks like pictures"):
        dataset[0]
    assert dataset[1].images == ()


def test_two_columns_of_images_must_agree(tmp_path):
    columns = {
        "image": [picture(1), picture(1), picture(1)],
        "images": [[picture(1)], [picture(2)], []],
        "messages": [MESSAGES] * 3,
    }
    features = {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    dataset = HuggingFaceDataset(saved(tmp_path / "rows", columns, features))
    assert len(dataset[0].images) == len(dataset[2].images) == 1
    with pytest.raises(ValueError, match=r"rows\[1\]: images and image hold different images"):
        dataset[1]


def test_other_columns_are_refused_with_their_names(tmp_path):
    path = saved(tmp_path / "other", {"picture": [1], "caption": ["x"]}, {})
    with pytest.raises(ValueError, match=r"images and messages.*got picture, caption"):
        HuggingFaceDataset(path)


def test_a_folder_that_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        HuggingFaceDataset(str(tmp_path / "none"))


def test_an_empty_data_set_is_refused(tmp_path):
    path = saved(tmp_path / "empty", {"images": [], "messages": []}, {})
    with pytest.raises(ValueError, match="empty cannot be loaded, split 'train'"):
        HuggingFaceDataset(path)
