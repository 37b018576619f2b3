"""Data that changes between two halves of a run is noticed, by the name of its file."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.training.runs import metrics, own_data, stage, tiny_values, write_config
from tokenflex.cli import main
from tokenflex.training import data_digests
from tokenflex.training.config import load_config
from tokenflex.training.data_config import DataConfig
from tokenflex.training.data_digests import check_unchanged, digests_of
from tokenflex.training.loop import TrainingRun
from tokenflex.training.states import load_state, save_state


def records(path: Path, number: int = 4) -> None:
    path.write_text(
        "".join(json.dumps({"id": f"s{i}", "text": "x" * 20}) + "\n" for i in range(number))
    )


def shrink(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES = {
    shrink: r"had \d+ bytes and has \d+",
    grow: r"had \d+ bytes and has \d+",
    edit: "holds other bytes of the same number",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["messages", "llava", "webdataset", "huggingface"])
def test_a_changed_file_is_named(tmp_path, name, change):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in ("a", "b"):
        if name == "webdataset":
            records(tmp_path / "0.json")
            with tarfile.open(folder / f"{file}.tar", "w") as tar:
                tar.add(tmp_path / "0.json", "0.json")
        else:
            records(folder / f"{file}.jsonl")
    whole = name in ("webdataset", "huggingface")
    config = DataConfig(name=name, path=folder if whole else folder / "b.jsonl")
    parts = DataConfig(name="mixture", parts=(DataConfig(name="digits"), config))
    for data in (config, parts):
        saved = json.loads(json.dumps(digests_of([data])))  # lists where there were tuples
        check_unchanged(saved, digests_of([data]))
        file = sorted(folder.iterdir())[-1]
        content = file.read_bytes()
        os.utime(file, (1, 1))
        check_unchanged(saved, digests_of([data]))  # it was only touched
        change(file)
        with pytest.raises(ValueError, match=rf"{file} has changed.*it {CHANGES[change]}"):
            check_unchanged(saved, digests_of([data]))
        file.write_bytes(content)


def test_files_that_come_and_go_are_named(tmp_path):
    config = DataConfig(name="huggingface", path=tmp_path)
    for name in ("a.arrow", "b.arrow"):
        (tmp_path / name).write_text(name)
    before = digests_of([config])
    (tmp_path / "cache-1.arrow").write_text("of the library")
    (tmp_path / ".hidden.json").write_text("")
    (tmp_path / "picture.png").write_text("not covered")
    check_unchanged(before, digests_of([config]))
    (tmp_path / "c.arrow").write_text("c")
    with pytest.raises(ValueError, match=r"c\.arrow has changed.*is new"):
        check_unchanged(before, digests_of([config]))
    (tmp_path / "c.arrow").unlink()
    (tmp_path / "a.arrow").unlink()
    with pytest.raises(ValueError, match=r"a\.arrow has changed.*is gone"):
        check_unchanged(before, digests_of([config]))


def test_of_a_large_file_both_ends_and_samples_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data_digests, "SAMPLED", 1000)
    monkeypatch.setattr(data_digests, "WHOLE", 2000)
    monkeypatch.setattr(data_digests, "_BLOCK", 100)
    path = tmp_path / "a.arrow"
    path.write_bytes(os.urandom(100_000))
    config, content = DataConfig(name="huggingface", path=path), path.read_bytes()
    before = digests_of([config])
    noticed = []
    for place in (0, 50, 99_950, 99_999, *range(500, 99_000, 97)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        noticed.append(digests_of([config]) != before)
    assert all(noticed[:4])
    assert 0 < sum(noticed[4:]) < len(noticed[4:])
    path.write_bytes(content[:-1])
    assert digests_of([config]) != before


def test_files_are_read_whole_up_to_a_bound_on_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(data_digests, "SAMPLED", 1000)
    monkeypatch.setattr(data_digests, "_BLOCK", 100)
    for name in "abc":
        (tmp_path / f"{name}.arrow").write_bytes(os.urandom(3000))
    config = DataConfig(name="huggingface", path=tmp_path)
    unbounded = digests_of([config])
    monkeypatch.setattr(data_digests, "ALL_WHOLE", 6000)
    bounded = digests_of([config])
    assert [len(digest) for digest in bounded.values()] == [3, 3, 2]
    check_unchanged(unbounded, bounded)  # what both have is the same
    check_unchanged(bounded, unbounded)


def test_any_byte_of_a_file_of_some_size_counts(tmp_path):
    """Above the size from which blocks are sampled, too."""
    path = tmp_path / "a.tar"
    content = bytearray(12 << 20)
    path.write_bytes(content)
    config = DataConfig(name="huggingface", path=path)
    before = json.loads(json.dumps(digests_of([config])))
    check_unchanged(before, digests_of([config]))
    content[1_000_003] = 1  # between two blocks
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds other bytes of the same number"):
        check_unchanged(before, digests_of([config]))
    of_old = {name: digest[:2] for name, digest in before.items()}
    check_unchanged(of_old, digests_of([config]))  # all that such a state knows is as it was
    content[0] = 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds other bytes of the same number"):
        check_unchanged(of_old, digests_of([config]))


# ---- runs


def stopped(tmp_path: Path) -> tuple[Path, Path]:
    """(configuration, its data file) of a run that has a state."""
    values = tiny_values(
        tmp_path / "run",
        data=own_data(tmp_path, 12, ()),
        stages=[stage(steps=4)],
        encoder_warm_up=None,
        evaluation=None,
    )
    config = write_config(tmp_path / "run.yaml", values)
    training = TrainingRun(load_config(config))
    step, count = training._step, [0]

    def counting(*args, **kwargs):
        count[0] += 1
        training.interruption.requested = count[0] == 2
        return step(*args, **kwargs)

    training._step = counting
    with pytest.raises(KeyboardInterrupt):
        training.run()
    AcceleratorState._reset_state(reset_partial_state=True)
    return config, tmp_path / "data.jsonl"


def test_a_run_is_not_continued_on_other_data_unless_it_is_accepted(tmp_path, capsys):
    config, data = stopped(tmp_path)
    content = data.read_text()
    data.write_text("\n".join(content.splitlines()[:9]))
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert f"data file {data} has changed" in said
    assert "--accept-changed-data" in said
    assert load_state(tmp_path / "run" / "state.pt")["step"] == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", str(config), "--accept-changed-data"]) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_state_without_digests_continues(tmp_path):
    config, data = stopped(tmp_path)
    path = tmp_path / "run" / "state.pt"
    state = load_state(path)
    assert list(state.pop("data")) == [str(data)]
    save_state(path, state)
    data.write_text("\n".join(data.read_text().splitlines()[:9]))
    TrainingRun(load_config(config)).run()
