"""The headers of a tar: what tarfile lists, and an error for what strangers make of them."""

from __future__ import annotations

import io
import random
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest

from tests.data.test_webdataset import MESSAGES, encoded, tar
from tests.selection import ALL
from tokenflex.data.tars import MAX_HEADER_BYTES, MAX_HEADERS, Member, members
from tokenflex.data.webdataset import WebDataset


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def with_size(block: bytes, field: bytes) -> bytes:
    """The header with another size field, and the checksum of that."""
    changed = bytearray(block)
    changed[124:136] = field
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def write(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts) + bytes(10240))
    return path


def pax(*attributes: bytes, kind: bytes = b"x") -> bytes:
    lines = b""
    for attribute in attributes:
        length = len(attribute) + 2
        length += len(str(length + len(str(length))))
        lines += b"%d %s\n" % (length, attribute)
    return header("pax", len(lines), kind) + padded(lines)


def listed(path: Path) -> list[Member]:
    with tarfile.open(path, "r:") as archive:
        return [
            Member(info.name, info.offset_data, info.size)
            for info in archive
            if info.isreg() and not info.issparse()
        ]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_lists(tmp_path, layout):
    path = tmp_path / "a.tar"
    names = ["a.json", "b/c.0.png", "ü/名.json", "n" * 90 + "/" + "m" * 90]
    names += [] if layout == tarfile.USTAR_FORMAT else ["folder/" * 60 + "d.json"]
    with tarfile.open(path, "w", format=layout) as archive:
        for place, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * place
            archive.addfile(info, io.BytesIO(bytes(info.size)))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("elsewhere")
            info.type, info.linkname = kind, "l" * (150 if layout != tarfile.USTAR_FORMAT else 50)
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("last.json"))
    assert [*members(path)] == listed(path)
    assert len(listed(path)) == len(names) + 1


def test_a_size_in_a_header_of_its_own_is_the_members(tmp_path):
    body = padded(b"x" * 900)
    path = write(tmp_path / "a.tar", pax(b"size=900", b"path=long.json"), header("a", 0), body)
    assert [*members(path)] == listed(path) == [Member("long.json", 1536, 900)]


NEGATIVE = with_size(header("0.json"), b"\xff" * 12)
HUGE = with_size(header("0.json"), b"\x80" + b"\xff" * 11)
BEYOND = header("0.json", 4096)
TOO_LONG = header("././@LongLink", MAX_HEADER_BYTES + 1, b"L")

STRANGE = {
    "a negative size": (NEGATIVE, "size -1"),
    "an octal size below zero": (with_size(header("0.json"), b"-0000000001\0"), "size -1"),
    "a size beyond any disk": (HUGE, "goes beyond its end"),
    "a size beyond the end": (BEYOND, "goes beyond its end") ,
    "a PAX size below zero": (pax(b"size=-1") + header("0.json"), "size '-1'"),
    "a PAX size beyond the end": (pax(b"size=99999999") + header("0.json"), "beyond its end"),
    "a PAX size of many digits": (pax(b"size=" + b"9" * 5000) + header("0.json"), "of size '999"),
    "a PAX size in other digits": (pax("size=٣".encode()) + header("0.json"), "of size '"),
    "a name for all members": (pax(b"path=a.json", kind=b"g"), "name or size for all members"),
    "a line of wrong length": (header("p", 9, b"x") + padded(b"99 path=a"), "damaged PAX header"),
    "a line without a length": (header("p", 9, b"x") + padded(b"path=abc\n"), "damaged PAX"),
    "a line of length 0": (header("p", 9, b"x") + padded(b"0 path=a\n"), "damaged PAX header"),
    "a long name of no member": (header("l", 4, b"L") + padded(b"abc\0"), "header of no member"),
    "a header that is too long": (
        TOO_LONG + padded(b"x" * (MAX_HEADER_BYTES + 1)), f"more than {MAX_HEADER_BYTES} bytes"
    ),
    "headers of headers": (pax(b"comment=x") * (MAX_HEADERS + 1), f"more than {MAX_HEADERS} head"),
    "thousands of long names": (
        (header("l", 4, b"L") + padded(b"abc\0")) * 20_000, f"more than {MAX_HEADERS} headers"
    ),
    "a sparse member": (header("0.json", 0, tarfile.GNUTYPE_SPARSE), "a sparse member"),
    "a sparse member of PAX": (pax(b"GNU.sparse.major=1") + header("0.json"), "a sparse member"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), STRANGE.values(), ids=STRANGE)
def test_a_strange_header_is_a_value_error(tmp_path, content, words):
    path = write(tmp_path / "x.tar", header("good.json"), content)
    if words == "goes beyond its end":
        path.write_bytes(path.read_bytes()[: 512 * 2 + 1000])
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"x\.tar") as error:
            WebDataset(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert words in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 200
    assert peak < 2**21
    assert time.perf_counter() - started < 5


def test_names_of_any_bytes_are_shown_on_one_line(tmp_path):
    path = write(tmp_path / "x.tar", pax(b"path=a\n\xff" + b"k" * 3000 + b".json"), header("a"))
    with pytest.raises(ValueError, match=r"x\.tar: a \\udcffkkk") as error:
        WebDataset(path)[0]
    assert str(error.value).isprintable()
    assert len(str(error.value)) < len(str(path)) + 400


@pytest.mark.slow
def test_a_flipped_byte_is_another_tar_or_a_value_error(tmp_path):
    """Tars with up to four bytes of a header changed, checksums right in half of them."""
    good = tar(
        tmp_path / "good.tar",
        {"0.json": MESSAGES, "0.png": encoded(1), "f/" * 80 + "1.json": MESSAGES},
    ).read_bytes()
    with tarfile.open(tmp_path / "good.tar") as archive:
        heads = [info.offset for info in archive] + [0]
    draw = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    longest = 0
    tracemalloc.start()
    for number in range(2_000 if ALL else 500):
        content = bytearray(good)
        head = draw.choice(heads)
        for _ in range(draw.randint(1, 4)):
            content[head + draw.choice([*range(512), *range(124, 157), 156])] = draw.randrange(256)
        if number % 2:
            content[head + 148 : head + 156] = b" " * 8
            content[head + 148 : head + 156] = b"%06o\0 " % sum(content[head : head + 512])
        path = tmp_path / "x.tar"
        path.write_bytes(content)
        try:
            dataset = WebDataset(path)
        except ValueError as error:
            outcomes["refused"] += 1
            longest = max(longest, len(str(error)))
            continue
        outcomes["read"] += 1
        for index in range(len(dataset)):
            try:
                dataset[index]
            except ValueError as error:
                longest = max(longest, len(str(error)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(outcomes.values()) > 25, outcomes
    assert peak < 2**23
    assert longest < 1000
