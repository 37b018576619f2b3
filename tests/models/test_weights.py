"""Weight indexes: they name files of their own folder, or are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
