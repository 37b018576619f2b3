"""A user need not say what format the data is in."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tokenflex.formats import FORMATS, detect_format


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'{"messages": []}\n{}', "messages"),
        (b'\n \n  {"messages": []}', "messages"),
        (b"", "messages"),
        (b"[{}]", "llava"),
        (b"\n [\n{}]", "llava"),
    ],
)
def test_of_a_file(tmp_path, content, name):
    (tmp_path / "data").write_bytes(content)
    assert detect_format(tmp_path / "data") == name


def test_of_a_folder(tmp_path):
    assert detect_format(tmp_path) == "huggingface"


def test_what_is_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        detect_format(tmp_path / "none.json")
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"a\.png must begin"):
        detect_format(tmp_path / "a.png")


NEW_FORMAT = """
from pydantic import Field
from tokenflex.data.format import DataFormat, FormatOptions
from tokenflex.data.samples import Conversation, Sample, Turn


class CaptionOptions(FormatOptions):
    language: str = "en"
    limit: int = Field(default=10, ge=1)

    def contradictions(self):
        if self.language not in ("en", "de"):
            yield f"language must be en or de, got {self.language}"


def read(options):
    turns = (Turn("user", "?"), Turn("assistant", options.language))
    lines = options.path.read_text().split()[: options.limit]
    return [Sample(line, (), (Conversation(turns),)) for line in lines]


FORMATS = (
    DataFormat(
        "captions", read, CaptionOptions, recognises=lambda path: path.suffix == ".captions"
    ),
)
"""

USE = """
import sys
from pathlib import Path

import tokenflex.data
from tests.torchvision_ops import make_torchvision_importable

make_torchvision_importable()
tokenflex.data.__path__.append(sys.argv[1])
from tokenflex.formats import FORMATS, detect_format
from tokenflex.training.build import build_dataset, build_order
from tokenflex.training.data_config import DataConfig
from tokenflex.training.data_digests import digests_of

path = Path(sys.argv[1], "a.captions")
config = DataConfig(name=detect_format(path), path=path, language="de", limit=2)
dataset = build_dataset(config)
assert [sample.id for sample in dataset] == ["x", "y"]
assert dataset[0].conversations[0].turns[1].text == "de"
assert sorted(build_order(config, dataset, 0)[i][1] for i in range(2)) == [0, 1]
assert [*digests_of([config])] == [str(path)]
for values in (
    {"name": "captions"},
    {"name": "captions", "path": path, "limit": 0},
    {"name": "captions", "path": path, "limit": True},
    {"name": "captions", "path": path, "language": "fr"},
    {"name": "digits", "language": "de"},
    {"name": "caption", "path": path},
):
    try:
        DataConfig(**values)
    except ValueError as error:
        print(*str(error).splitlines()[1:])
    else:
        raise AssertionError(values)
"""


def test_a_new_format_is_one_file(tmp_path):
    """Configurations, detection, digests and readers learn of a module with ``FORMATS``."""
    (tmp_path / "captions.py").write_text(NEW_FORMAT)
    (tmp_path / "a.captions").write_text("x y z")
    ran = subprocess.run(
        [sys.executable, "-c", USE, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    expected = [
        "path must be given with name: messages,",
        "limit   Input should be greater than or equal to 1",
        "limit   Value error, must be a number, got True",
        "language must be en or de, got fr",
        "language must be given with name: captions only, got name='digits' and language='de'",
        "'captions'",
    ]
    for line, words in zip(ran.stdout.splitlines(), expected, strict=True):
        assert words in line


def test_formats_share_only_keys_that_they_define_alike():
    for known in FORMATS.values():
        for key, field in known.keys.items():
            for other in FORMATS.values():
                alike = other.keys.get(key, field)
                for name in ("annotation", "default", "metadata", "exclude"):
                    assert getattr(alike, name) == getattr(field, name), (known.name, key)
