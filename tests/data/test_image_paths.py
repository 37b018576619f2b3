"""Image paths that leave the data's folder: broken samples, unless they are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from tests.models.tiny import picture
from tokenflex.data.huggingface import HuggingFaceDataset
from tokenflex.data.messages import MessagesDataset
from tokenflex.data.streaming import StreamingDataset
from tokenflex.training.build import build_dataset
from tokenflex.training.data_config import DataConfig

GOOD = {"messages": [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]}


@pytest.fixture
def data(tmp_path) -> Path:
    """``data/`` with an image, ``secret/`` beside it with another, and links between them."""
    for name in ("data/inner", "secret", "data-too"):
        (tmp_path / name).mkdir(parents=True)
    picture(1).save(tmp_path / "data" / "a.png")
    for name in ("secret", "data-too"):
        picture(2).save(tmp_path / name / "b.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret" / "b.png")
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "own.png").symlink_to(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "loop.png").symlink_to(tmp_path / "data" / "loop.png")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    return tmp_path / "data"


def inside(data: Path) -> list[str]:
    return ["a.png", "inner/../a.png", "own.png", str(data / "a.png"), f"../{data.name}/a.png"]


def outside(data: Path) -> list[str]:
    secret = data.parent / "secret" / "b.png"
    return [
        *("../secret/b.png", str(secret), "link.png", "folder/b.png", "../data-too/b.png"),
        *("inner/../../secret/b.png", f"{data}/../secret/b.png", "/etc/hostname", "../.."),
    ]


def write(data: Path, paths: list[str]) -> Path:
    records = [{**GOOD, "images": [path]} for path in paths]
    (data / "data.jsonl").write_text("\n".join(map(json.dumps, [GOOD, *records])))
    return data / "data.jsonl"


def test_paths_that_stay_in_the_folder_are_read(data):
    for path in (write(data, inside(data)), data.parent / "linked" / "data.jsonl"):
        dataset = MessagesDataset(path)
        assert len(dataset) == 1 + len(inside(data))
        for index in range(1, len(dataset)):
            assert dataset[index].images[0].tobytes() == picture(1).tobytes()


def test_paths_that_leave_the_folder_are_broken_samples(data):
    dataset = MessagesDataset(write(data, outside(data)))
    for index, path in enumerate(outside(data), 1):
        for read in (dataset.outline, dataset.__getitem__):
            message = r"data\.jsonl:\d+: image .* is outside of the data's folder .*allow_outside"
            with pytest.raises(ValueError, match=message):
                read(index)
        known = path in [outside(data)[one.index - 1] for one in dataset.broken]
        assert known == (path not in ("link.png", "folder/b.png")), path  # by their text alone


def test_paths_that_leave_the_folder_are_read_where_that_is_asked_for(data):
    paths = outside(data)[:7]
    dataset = MessagesDataset(write(data, paths), allow_outside=True)
    assert not dataset.broken
    for index in range(1, 1 + len(paths)):
        assert dataset[index].images[0].tobytes() == picture(2).tobytes()


def test_a_link_to_itself_is_one_broken_sample(data):
    dataset = MessagesDataset(write(data, ["loop.png"]))
    with pytest.raises((ValueError, OSError), match=r"loop\.png"):
        dataset[1]


def test_with_a_folder_of_images_that_one_counts(data):
    path = write(data, ["a.png", "b.png", str(data / "a.png")])
    dataset = MessagesDataset(path, data.parent / "secret")
    assert dataset[2].images[0].tobytes() == picture(2).tobytes()
    for index, error in ((1, FileNotFoundError), (3, ValueError)):
        with pytest.raises(error, match=r"a\.png"):
            dataset[index]


@pytest.mark.parametrize("name", ["messages", "llava"])
def test_a_configuration_says_so(data, name):
    path = write(data, ["../secret/b.png"])
    with pytest.raises(ValueError, match="outside"):
        build_dataset(DataConfig(name=name, path=path))[1]
    allowed = DataConfig(name=name, path=path, allow_outside=True)
    assert build_dataset(allowed)[1].images[0].tobytes() == picture(2).tobytes()
    assert "allow_outside" not in allowed.model_dump()  # a run may go on with it, or without


# ---- rows whose images are paths


def rows(data: Path, paths: list[str]) -> str:
    folder = data / "rows"
    folder.mkdir()
    images = [[{"bytes": None, "path": path}] for path in paths]
    table = datasets.Dataset.from_dict(
        {"images": images, "messages": [GOOD["messages"]] * len(paths)}
    )
    table = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    table.to_parquet(folder / "0.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_name_images_of_their_own_folder(data, streaming):
    folder = rows(data, ["a.png", str(data / "rows" / "a.png"), "../a.png", str(data / "a.png")])
    picture(1).save(f"{folder}/a.png")

    def opened(**options):
        if streaming:
            return StreamingDataset(folder, shuffle_buffer=1, **options)
        return HuggingFaceDataset(folder, **options)

    for index in range(4):
        assert opened(allow_outside=True)[index].images[0].tobytes() == picture(1).tobytes()
        if index < 2:
            assert opened()[index].images[0].tobytes() == picture(1).tobytes()
        else:
            with pytest.raises(ValueError, match=rf"rows\[{index}\]: image .* is outside"):
                opened()[index]


def test_rows_that_name_urls_are_not_fetched(data):
    folder = rows(data, ["https://example.org/a.png", "hf://datasets/a/b/a.png"])
    for index in range(2):
        with pytest.raises(ValueError, match=r"rows\[\d\]: images must be files, which are not"):
            HuggingFaceDataset(folder)[index]


def test_a_folder_of_images_with_their_metadata_is_read(tmp_path):
    """Its rows hold absolute paths."""
    picture(1).save(tmp_path / "a.png")
    line = {"file_name": "a.png", **GOOD}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    (sample,) = HuggingFaceDataset(str(tmp_path))
    assert sample.images[0].tobytes() == picture(1).tobytes()
