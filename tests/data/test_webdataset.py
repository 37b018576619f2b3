"""WebDataset tars: samples by index, heads alone for outlines, damage that is said and named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.models.tiny import picture
from tokenflex.data.samples import Turn
from tokenflex.data.webdataset import IMAGE_ENDINGS, WebDataset, shards_of
from tokenflex.images import FORMATS

MESSAGES = {"messages": [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]}
LLAVA = {
    "id": 7,
    "image": "somewhere/else.jpg",
    "conversations": [{"from": "human", "value": "<image>\nodd"}, {"from": "gpt", "value": "3"}],
}


def encoded(seed: int, form: str = "PNG", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, form)
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes | dict]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            if isinstance(content, dict):
                content = json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def several(folder: Path, shards: int = 3, samples: int = 4) -> list[Path]:
    return [
        tar(
            folder / f"part-{shard:03}.tar",
            {
                f"{shard}-{i}.{ending}": content
                for i in range(samples)
                for ending, content in (
                    ("png", encoded(10 * shard + i)),
                    ("json", {**MESSAGES, "id": f"{shard}-{i}"}),
                )
            },
        )
        for shard in range(shards)
    ]


def test_both_kinds_of_record_become_samples(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        {
            "x/one.json": MESSAGES,
            "x/one.JPG": encoded(1, "JPEG", (10, 20)),
            "x/two.webp": encoded(2, "WEBP"),
            "x/two.json": LLAVA,
            "x/two.txt": b"not looked at",
            "x/text.json": MESSAGES,
        },
    )
    one, two, text = WebDataset(path)
    assert one.id == f"{path}: x/one"
    assert one.images[0].size == picture(1, (10, 20)).size
    assert one.conversations[0].turns == (Turn("user", "odd"), Turn("assistant", "3"))
    assert (two.id, two.images[0].mode) == ("7", "RGB")
    assert two.conversations[0].turns[0] == Turn("user", "<image>\nodd")
    assert text.images == ()


def test_several_images_come_by_number(tmp_path):
    members = {f"a.{n}.png": encoded(n) for n in (10, 2, 0)}
    path = tar(tmp_path / "a.tar", {**members, "a.json": MESSAGES})
    (sample,) = WebDataset(path)
    for image, seed in zip(sample.images, (0, 2, 10), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(picture(seed)))


def test_any_index_of_any_shard_is_its_own_sample(tmp_path):
    several(tmp_path)
    dataset = WebDataset(tmp_path)
    assert len(dataset) == 12
    for index in (11, 0, 4, 3, 8, 7):
        shard, i = divmod(index, 4)
        sample = dataset[index]
        assert sample.id == f"{shard}-{i}"
        assert np.array_equal(np.asarray(sample.images[0]), np.asarray(picture(10 * shard + i)))
    for index in (-1, 12):
        with pytest.raises(IndexError, match=r"0\.\.11"):
            dataset[index]


def test_an_outline_needs_no_more_of_an_image_than_its_head(tmp_path):
    content = encoded(3, size=(60, 40))
    path = tar(tmp_path / "a.tar", {"a.png": content[:100] + bytes(900), "a.json": MESSAGES})
    dataset = WebDataset(path)
    assert dataset.outline(0).image_sizes == (picture(3, (60, 40)).size[::-1],)
    with pytest.raises(ValueError, match=r"a\.tar: a: an image cannot be read"):
        dataset[0]


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [
        ("part-000.tar", [0]),
        ("*.tar", [0, 1, 2]),
        ("part-{000..001}.tar", [0, 1]),
        ("part-{002,000}.tar", [2, 0]),
        ("part-00{0..1}.{tar,tar}", [0, 0, 1, 1]),
        (".", [0, 1, 2]),
    ],
)
def test_shards_are_a_file_a_folder_or_a_pattern(tmp_path, pattern, shards):
    paths = several(tmp_path)
    assert shards_of(tmp_path / pattern) == [paths[shard] for shard in shards]


def test_a_shard_that_is_missing_is_named(tmp_path):
    several(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"part-003\.tar does not exist"):
        WebDataset(tmp_path / "part-{000..003}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no file \*\.tar"):
        WebDataset(tmp_path / "empty")


@pytest.mark.parametrize("end", [512, 700, 1024, 1700, -10240])
def test_a_tar_that_is_cut_off_is_an_error_that_names_it(tmp_path, end):
    """After a header, in a member, between two, in a header, before the end mark."""
    several(tmp_path)
    path = tmp_path / "part-001.tar"
    content = path.read_bytes()
    if end < 0:  # the end mark and what fills the last record
        end = len(content.rstrip(b"\0")) + 511 & ~511
    path.write_bytes(content[:end])
    with pytest.raises(ValueError, match=r"part-001\.tar (cannot be read|has)"):
        WebDataset(tmp_path)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = several(tmp_path, shards=1)[0]
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        content[archive.getmembers()[4].offset + 150] ^= 0xFF  # of the checksum
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-000\.tar has a damaged header"):
        WebDataset(path)


def test_tars_one_after_another_are_not_taken_for_one(tmp_path):
    one, other = several(tmp_path, shards=2)
    one.write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(ValueError, match=r"part-000\.tar goes on after its end mark"):
        WebDataset(one)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.add(__file__, "a.json")
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed tar"):
        WebDataset(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.png": encoded(1)}, r"there is no a\.json"),
        ({"a.json": b"{nothing"}, "the record is not JSON in UTF-8"),
        ({"a.json": b'{"messages": "\xff"}'}, "the record is not JSON in UTF-8"),
        ({"a.json": b"[1]"}, "expected a JSON object, got list"),
        ({"a.json": {"caption": "a cat"}}, "a record must have messages, .* keys caption"),
        ({"a.json": LLAVA}, "the record names 1 images, 0 are stored with it"),
        ({"a.png": b"", "a.json": MESSAGES}, "an image cannot be read"),
        ({"a.png": b"hello", "a.json": MESSAGES}, "an image cannot be read"),
    ],
)
def test_a_broken_sample_is_an_error_when_it_is_asked_for_and_named(tmp_path, members, reason):
    path = tar(tmp_path / "x.tar", {**members, "good.json": MESSAGES})
    dataset = WebDataset(path)
    for read in (dataset.outline, dataset.__getitem__):
        with pytest.raises(ValueError, match=rf"x\.tar: a: {reason}"):
            read(0)
        read(1)


def test_a_key_in_two_places_is_refused(tmp_path):
    """The halves of a sample would train as two."""
    members = {"a.json": MESSAGES, "b.json": MESSAGES, "a.png": encoded(1)}
    with pytest.raises(ValueError, match=r"x\.tar holds key a in two places"):
        WebDataset(tar(tmp_path / "x.tar", members))


def test_tars_without_samples_are_refused(tmp_path):
    tar(tmp_path / "x.tar", {"readme.txt": b"hello"})
    with pytest.raises(ValueError, match="holds no samples in 1 tars"):
        WebDataset(tmp_path)


def test_every_ending_of_a_format_that_is_decoded_is_read(tmp_path):
    endings = {name[1:] for name, form in Image.registered_extensions().items() if form in FORMATS}
    assert endings <= {*IMAGE_ENDINGS}
    forms = {"jfif": "JPEG", "jpe": "JPEG", "apng": "PNG", "pgm": "PPM", "pnm": "PPM", "dib": "BMP"}
    for ending, form in forms.items():
        path = tar(tmp_path / "a.tar", {f"a.{ending}": encoded(1, form), "a.json": MESSAGES})
        assert len(WebDataset(path)[0].images) == 1


@pytest.mark.parametrize(
    "ending", ["ico", "tga", "npy", "3gp", "ogv", "pickle", "x.psd", "PYD", "bin", "svg"]
)
@pytest.mark.parametrize("record_first", [True, False])
def test_a_member_that_may_be_a_picture_is_not_passed_over(tmp_path, ending, record_first):
    members = {"a.json": MESSAGES, f"a.{ending}": b"hello"}
    if not record_first:
        members = dict(reversed(members.items()))
    dataset = WebDataset(tar(tmp_path / "x.tar", {**members, "b.json": MESSAGES}))
    for read in (dataset.outline, dataset.__getitem__):
        with pytest.raises(ValueError, match=r"x\.tar: a: .*stored with it"):
            read(0)
    assert dataset[1].images == ()


@pytest.mark.parametrize("ending", ["txt", "cls", "json5", "meta.json", "CSV", "xml"])
def test_texts_beside_a_record_without_images_are_passed_over(tmp_path, ending):
    (sample,) = WebDataset(tar(tmp_path / "x.tar", {"a.json": MESSAGES, f"a.{ending}": b"x"}))
    assert sample.images == ()


def test_an_unknown_member_beside_a_picture_is_passed_over(tmp_path):
    members = {"a.json": MESSAGES, "a.npy": b"x", "a.png": encoded(1), "lone.npy": b"x"}
    (sample,) = WebDataset(tar(tmp_path / "x.tar", members))
    assert len(sample.images) == 1
