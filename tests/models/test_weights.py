"""Weight indexes: they name files of their own folder, or are refused in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.models.tiny import tiny_model
from tokenflex.digits.processor import digits_processor
from tokenflex.models.loading import load_checkpoint
from tokenflex.models.weights import INDEX, weight_files


def write(folder: Path, weight_map: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_files_of_an_index_come_once_each(tmp_path):
    folder = write(tmp_path / "one", {"x": "b.safetensors", "y": "b.safetensors"})
    assert weight_files(folder) == [folder / "b.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        *("../a.safetensors", "/etc/passwd", "inner/../../a.safetensors", "..", "", ".", "a\0"),
        *(None, 3, 1.5, True, [], ["a.safetensors"], {"a.safetensors": 1}, [[[[]]]], "a" * 10_000),
    ],
    ids=lambda name: repr(name)[:30],
)
def test_a_name_that_is_no_file_of_the_folder_is_refused(tmp_path, name):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    folder = write(tmp_path / "one", {"x": "a.safetensors", "layer.weight": name})
    with pytest.raises(ValueError, match=r"must name a file in its folder for 'layer.weight'") as e:
        weight_files(folder)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < len(str(folder)) + 300


@pytest.mark.parametrize("weight_map", [None, [], "a.safetensors", 3])
def test_an_index_without_names_is_refused(tmp_path, weight_map):
    with pytest.raises(ValueError, match="must hold a weight_map of names"):
        weight_files(write(tmp_path / "one", weight_map))


def test_an_index_of_great_depth_is_refused(tmp_path):
    folder = write(tmp_path / "one", {})
    (folder / INDEX).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="nests lists and objects too deeply"):
        weight_files(folder)


def test_links_to_the_hubs_blobs_are_read(tmp_path):
    """In its cache a snapshot is a folder of links that lead out of it."""
    write(tmp_path / "blobs", {})
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "a.safetensors").symlink_to(tmp_path / "blobs" / "a.safetensors")
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert weight_files(snapshot) == [snapshot / "a.safetensors"]


@pytest.mark.parametrize(
    ("part", "field"),
    [
        *((None, "projector_hidden_width"), ("text_config", "vocab_size")),
        *(("text_config", "intermediate_size"), ("vision_config", "intermediate_size")),
    ],
)
@pytest.mark.parametrize("size", [10**11, 10**30])
def test_a_config_of_huge_sizes_is_refused_before_memory_is_asked_for(tmp_path, part, field, size):
    tiny_model().save_pretrained(tmp_path)
    digits_processor(4).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (values if part is None else values[part])[field] = size
    (tmp_path / "config.json").write_text(json.dumps(values))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        load_checkpoint(tmp_path)
    assert time.monotonic() - begin < 5
    assert "allocate" not in str(error.value)
    assert "\n" not in str(error.value)
    if size == 10**11:
        assert "mismatched keys, the first is" in str(error.value)
