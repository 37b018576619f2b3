"""Streams: a sample stands at its position whoever asks and from wherever; each pass anew."""

from __future__ import annotations

import json
import pickle
import shutil

import datasets
import pytest

from tests.models.tiny import picture
from tokenflex.data.order import load_in_order
from tokenflex.data.samples import DataExhaustedError, size_of
from tokenflex.data.streaming import StreamError, StreamingDataset

MESSAGES = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
FILES, ROWS = 3, 20  # 60 rows a pass


def write(folder, files: int = FILES, rows: int = ROWS) -> str:
    folder.mkdir()
    for file in range(files):
        data = datasets.Dataset.from_dict(
            {
                "id": [f"{file}-{row}" for row in range(rows)],
                "images": [[picture(ROWS * file + row, (20, 10))] for row in range(rows)],
                "messages": [MESSAGES] * rows,
            }
        ).cast_column("images", datasets.List(datasets.Image()))
        data.to_parquet(folder / f"{file}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("stream") / "data")


def stream(path: str, seed: int = 0, **options) -> StreamingDataset:
    dataset = StreamingDataset(path, **{"shuffle_buffer": 16, **options})
    dataset.shuffle(seed)
    return dataset


def ids(dataset: StreamingDataset, positions) -> list[str]:
    return [dataset.outline(position).id for position in positions]


def test_each_pass_holds_every_row_once_in_another_order(path):
    names = ids(stream(path), range(180))
    passes = [names[first : first + 60] for first in (0, 60, 120)]
    assert all(sorted(one) == sorted(passes[0]) and len(set(one)) == 60 for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_shards_are_shuffled_too(path):
    firsts = {stream(path, seed, shuffle_buffer=1).outline(0).id for seed in range(6)}
    assert len(firsts) > 1
    assert firsts <= {"0-0", "1-0", "2-0"}


def test_seeds_differ_and_one_seed_is_one_order(path):
    assert ids(stream(path, 1), range(60)) == ids(stream(path, 1), range(60))
    assert ids(stream(path, 1), range(60)) != ids(stream(path, 2), range(60))


def test_a_position_is_the_same_wherever_the_walk_begins(path):
    straight = ids(stream(path), range(260))
    for first in (1, 59, 60, 61, 130, 250):
        assert ids(stream(path), range(first, 260)) == straight[first:]
    jumping = stream(path)
    for position in (250, 3, 3, 61, 60, 0, 130, 259):
        assert jumping.outline(position).id == straight[position]


def test_samples_are_those_of_the_outlines(path):
    dataset = stream(path)
    outlines = [dataset.outline(position) for position in range(5)]
    for position, outline in enumerate(outlines):
        sample = dataset[position]
        assert (sample.id, sample.conversations) == (outline.id, outline.conversations)
        (image,) = sample.images
        assert (image.mode, ((image.height, image.width),)) == ("RGB", outline.image_sizes)
        file, row = map(int, sample.id.split("-"))
        assert image.tobytes() == picture(ROWS * file + row, (20, 10)).tobytes()


def test_a_step_larger_than_what_is_kept_is_read_twice_once(path, monkeypatch):
    """Then the window has grown to it."""
    monkeypatch.setattr("tokenflex.data.streaming.ROWS_KEPT", 4)
    monkeypatch.setattr("tokenflex.data.streaming.ROWS_READ", 2)
    dataset, starts = stream(path), []
    original = dataset._tables
    monkeypatch.setattr(dataset, "_tables", lambda n: starts.append(n) or original(n))
    names = ids(stream(path), range(60))
    for first in range(0, 60, 15):
        for _ in range(2):  # the outlines of a step, then its samples
            assert ids(dataset, range(first, first + 15)) == names[first : first + 15]
    assert starts == [0, 0]
    assert sum(len(table) for _, table in dataset._kept) <= 2 * 15 + 2


def test_rows_that_are_done_with_are_let_go(path, monkeypatch):
    monkeypatch.setattr("tokenflex.data.streaming.ROWS_KEPT", 8)
    dataset = stream(path)
    ids(dataset, range(200))
    assert sum(len(table) for _, table in dataset._kept) <= 8 + 16


class Names:
    """A packer that does none of the work."""

    def __init__(self, dataset: StreamingDataset) -> None:
        self.dataset = dataset

    def __call__(self, keys) -> list[str]:
        return ids(self.dataset, [index for _, index in keys])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_see_one_stream(path, workers):
    """The library itself would give each worker of a loader a share of the rows."""
    dataset = stream(path)
    ids(dataset, range(5))  # a walk that a forked worker must not go on with
    steps = [[(0, position) for position in range(f, f + 7)] for f in range(0, 140, 7)]
    names = ids(stream(path), range(140))
    found = list(load_in_order(Names(dataset), steps, workers=workers))
    assert [name for step in found for name in step] == names


def test_passes_that_workers_begin_at_the_same_time_have_orders_of_their_own(path):
    """Another worker's epoch, set before this one's first row is read, is not this one's."""
    dataset = stream(path)
    alone = [table.to_pydict() for table in dataset._tables(1)]
    first, _ = dataset._tables(1), dataset._tables(2)
    assert [table.to_pydict() for table in first] == alone


def test_a_forked_process_walks_anew(path, monkeypatch):
    """It shares its files' positions with the process it comes from."""
    dataset, starts = stream(path), []
    names = ids(dataset, range(40))
    original = dataset._tables
    monkeypatch.setattr(dataset, "_tables", lambda n: starts.append(n) or original(n))
    monkeypatch.setattr("tokenflex.data.streaming.os.getpid", lambda: -1)
    assert ids(dataset, range(40)) == names
    assert starts == [0]


def test_it_travels_to_another_process(path):
    dataset = stream(path, 5)
    names = ids(dataset, range(70))
    assert ids(pickle.loads(pickle.dumps(dataset)), range(70)) == names
    assert ids(dataset, range(70)) == names


def test_it_has_no_length(path):
    with pytest.raises(TypeError, match="is a stream and has no length"):
        len(stream(path))
    assert size_of(stream(path)) is None


def test_it_ends_after_its_epochs(path):
    dataset = stream(path, epochs=2)
    assert len(set(ids(dataset, range(120)))) == 60
    with pytest.raises(DataExhaustedError, match=r"ended after 2 epochs of 60 samples"):
        dataset[120]
    with pytest.raises(DataExhaustedError, match=r"ended after 2 epochs of 60 samples"):
        stream(path, epochs=2)[700]
    assert dataset.outline(119).id == ids(stream(path), [119])[0]


def test_a_stream_without_a_row_is_refused(tmp_path):
    folder = write(tmp_path / "empty", files=1, rows=0)
    with pytest.raises(ValueError, match="holds no samples"):
        StreamingDataset(folder, shuffle_buffer=4)


def test_a_file_that_breaks_off_is_an_error_and_not_the_end_of_a_pass(tmp_path):
    folder = write(tmp_path / "data")
    dataset = stream(folder, shuffle_buffer=1)
    path = tmp_path / "data" / "1.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for _ in range(2):  # at the next asking too
        with pytest.raises(StreamError, match=r"data cannot be read at position \d+ of the stream"):
            ids(dataset, range(60))


def test_a_folder_of_save_to_disk_and_json_lines_stream_too(tmp_path):
    (tmp_path / "lines").mkdir()
    picture(1).save(tmp_path / "lines" / "a.png")
    line = {"id": "a", "images": [str(tmp_path / "lines" / "a.png")], "messages": MESSAGES}
    (tmp_path / "lines" / "train.jsonl").write_text(json.dumps(line) + "\n")
    rows = datasets.Dataset.from_dict({"images": [[picture(1)]], "messages": [MESSAGES]})
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    rows.save_to_disk(tmp_path / "saved")
    for name in ("lines", "saved"):
        sample = stream(str(tmp_path / name))[1]  # of the second pass
        assert sample.images[0].tobytes() == picture(1).tobytes()


def test_a_row_that_is_broken_is_a_value_error_that_names_its_position(tmp_path):
    columns = {"images": [[{"bytes": b"hello", "path": None}]], "messages": [MESSAGES]}
    rows = datasets.Dataset.from_dict(columns)
    rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    (tmp_path / "bad").mkdir()
    rows.to_parquet(tmp_path / "bad" / "0.parquet")
    dataset = stream(str(tmp_path / "bad"))
    for read in (dataset.outline, dataset.__getitem__):
        with pytest.raises(ValueError, match=r"bad\[2\]: an image cannot be read"):
            read(2)


def test_files_that_are_gone_when_reading_begins(tmp_path):
    folder = write(tmp_path / "data")
    dataset = stream(folder)
    shutil.rmtree(folder)
    with pytest.raises(StreamError, match="position 0 of the stream: FileNotFoundError"):
        dataset.outline(0)
