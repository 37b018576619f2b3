"""States: damage is found, a whole one is never put aside, and what is saved is on the disk."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch

from tests.models.tiny import tiny_model
from tests.training.runs import tiny_values
from tokenflex import files
from tokenflex.digits.processor import digits_processor
from tokenflex.files import write_json
from tokenflex.routing.router import Router
from tokenflex.routing.storage import save_router
from tokenflex.training import agreement, checkpoint
from tokenflex.training.agreement import OtherProcessError, from_main
from tokenflex.training.checkpoint import save_model
from tokenflex.training.config import TrainConfig
from tokenflex.training.sharding import optimizer_state, restore_optimizer
from tokenflex.training.states import (
    STATE_KEYS,
    DamagedStateError,
    RunStates,
    load_state,
    save_state,
    saved_states,
)


def state_of(step: int = 0) -> dict:
    return {**dict.fromkeys(STATE_KEYS, 0), "step": step, "model": {"w": torch.arange(40.0)}}


# ---- damage


class LoadedError(BaseException):
    """A damaged state was loaded; nothing in the sources catches it."""


def test_any_flipped_bit_is_found_before_the_state_is_loaded(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_state(path, state_of())
    content = path.read_bytes()

    def must_not_load(*_, **__):
        raise LoadedError

    monkeypatch.setattr(torch, "load", must_not_load)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedStateError, match=r"state\.pt"):
            load_state(path)


def test_every_bit_of_the_end_counts(tmp_path):
    """The zip's directory, which torch reads without a look at it, and the digest itself."""
    path = tmp_path / "state.pt"
    save_state(path, state_of())
    content = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * (len(content) - 400), 8 * len(content)), 300):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedStateError):
            load_state(path)


def test_a_state_is_what_torch_and_zip_read_too(tmp_path):
    save_state(tmp_path / "state.pt", state_of(3))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3
    assert zipfile.ZipFile(tmp_path / "state.pt").testzip() is None


def test_a_state_that_lost_its_digest_is_damaged(tmp_path):
    """Without its digest it is an archive as earlier versions wrote, whole by its checksums."""
    path = tmp_path / "state.pt"
    save_state(path, state_of(3))
    assert "digest" not in load_state(path)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"tokenflex blake2")])
    with pytest.raises(DamagedStateError, match="digest is cut off"):
        load_state(path)


def test_a_state_from_before_there_were_digests_loads_or_is_damaged(tmp_path):
    path = tmp_path / "state.pt"
    torch.save(state_of(7), path)
    assert load_state(path)["step"] == 7
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(DamagedStateError, match="checksum"):
        load_state(path)


# ---- what a state holds


def test_an_optimiser_is_restored_without_states_of_parameters_that_had_no_gradient(tmp_path):
    """As SigLIP's pooling head; also from states of before, which have an empty entry for them."""
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "unused": torch.nn.Linear(3, 2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model["used"](torch.ones(4, 3)).sum().backward()
    optimizer.step()
    model.zero_grad()
    state = optimizer_state(model, optimizer)
    assert {*state["moments"]} == {"used.weight", "used.bias"}
    state["moments"]["unused.weight"] = {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restored = torch.optim.AdamW(model.parameters(), lr=0.5)
    restore_optimizer(model, restored, state)
    assert {*restored.state} == {*model["used"].parameters()}
    assert restored.param_groups[0]["lr"] == 0.1
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            assert torch.equal(restored.state[parameter][key], value), key
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("fused", [None, True])
def test_a_run_goes_on_with_the_update_that_its_state_began_with(fused):
    """A state of before AdamW was fused continues bit by bit, and so does one of today."""

    def learn(model, optimizer) -> None:
        model(torch.arange(12.0).view(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def weights(model) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in model.parameters()]

    model = torch.nn.Linear(3, 2)
    saved = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        learn(model, saved)
    state, before = copy.deepcopy((optimizer_state(model, saved), model.state_dict()))
    for _ in range(3):
        learn(model, saved)
    expected = weights(model)
    model.load_state_dict(before)
    resumed = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)  # as build_optimizer does
    restore_optimizer(model, resumed, state)
    assert resumed.param_groups[0]["fused"] is fused
    for _ in range(3):
        learn(model, resumed)
    assert all(map(torch.equal, weights(model), expected))


# ---- errors that say nothing of the state


class Failing(io.RawIOBase):
    """A file that cannot be read now."""

    def __init__(self, number: int) -> None:
        self.number = number

    def read(self, *_):
        raise OSError(self.number, os.strerror(self.number))

    def seek(self, *_):
        return 0


def run_states(folder: Path) -> RunStates:
    config = TrainConfig.model_validate(tiny_values(folder))
    folder.mkdir()
    kept = RunStates(config)
    for step in (1, 2):
        state = state_of(step)
        del state["config"]
        kept.save(state)
    return RunStates(config)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_a_state_that_cannot_be_read_now_is_not_put_aside(tmp_path, monkeypatch, number):
    kept = run_states(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: Failing(number))
        with pytest.raises(
            OSError, match=r"(?s)could not be read.*says nothing.*state\.pt"
        ) as info:
            kept.read()
    assert info.value.errno == number
    kept.put_damaged_aside()
    assert sorted(os.listdir(tmp_path / "run")) == ["state.1.pt", "state.pt"]
    assert kept.read()["step"] == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), MemoryError),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), MemoryError),
        (RuntimeError("PytorchStreamReader failed reading file data/0"), OSError),
        (OSError(errno.EIO, "Input/output error"), OSError),
    ],
)
def test_a_whole_state_that_torch_cannot_load_now_is_not_put_aside(
    tmp_path, monkeypatch, error, expected
):
    kept = run_states(tmp_path / "run")

    def failing(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", failing)
        with pytest.raises(expected):
            kept.read()
    kept.put_damaged_aside()
    assert kept.read()["step"] == 2


def test_a_state_of_an_earlier_version_may_have_its_keys_in_another_order(tmp_path):
    config = TrainConfig.model_validate(tiny_values(tmp_path))
    values = json.loads(config.fingerprint())
    reordered = json.dumps(dict(reversed(values.items())))
    save_state(tmp_path / "state.pt", {**state_of(3), "config": reordered})
    assert RunStates(config).read()["step"] == 3
    other = json.dumps({**values, "seed": 5})
    save_state(tmp_path / "state.pt", {**state_of(3), "config": other})
    with pytest.raises(ValueError, match="another configuration"):
        RunStates(config).read()


def test_only_states_of_a_run_are_removed(tmp_path):
    kept = run_states(tmp_path / "run")
    for name in ("state.backup.pt", "state.100.pt", "mystate.pt", "state.pt.bak", "state.5.pt"):
        (tmp_path / "run" / name).write_text("mine")
    torch.save(state_of(3), tmp_path / "run" / "state.2.pt")  # from before there were digests
    assert [path.name for path in saved_states(kept.path)][:2] == ["state.pt", "state.1.pt"]
    kept.remove()
    assert sorted(os.listdir(tmp_path / "run")) == [
        *("mystate.pt", "state.100.pt", "state.5.pt", "state.backup.pt", "state.pt.bak"),
    ]


def test_other_processes_hear_of_any_error_of_the_first(monkeypatch):
    """An error of the main process keeps its type there; the others stop with one of their own."""
    sent = []
    monkeypatch.setattr(agreement, "broadcast_object_list", lambda shared: sent.append([*shared]))

    def failing():
        raise KeyError("a fault")

    with pytest.raises(KeyError, match="a fault"):
        from_main(failing, True)

    def receive(shared):
        shared[:] = sent[0]

    monkeypatch.setattr(agreement, "broadcast_object_list", receive)
    with pytest.raises(OtherProcessError, match="first process failed: KeyError"):
        from_main(failing, False)


# ---- on the disk


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """Names of files and folders in the order in which they were put on the disk or renamed."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def recording_fsync(descriptor):
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        return fsync(descriptor)

    def recorded(original):
        def move(path, target):
            result = original(path, target)
            events.append(f"move {Path(target).name}")
            return result

        return move

    monkeypatch.setattr(files.os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recorded(rename))
    monkeypatch.setattr(Path, "replace", recorded(replace))
    return events


def test_a_file_is_on_the_disk_before_its_name_and_the_name_after(tmp_path, synced):
    write_json(tmp_path / "a.json", 1)
    temporary = f".a.json.{os.getpid()}.tmp"
    assert synced == [f"sync {temporary}", "move a.json", f"sync {tmp_path.name}"]


def test_a_model_is_on_the_disk_when_it_is_saved(tmp_path, synced):
    save_model(tmp_path / "checkpoint", tiny_model(), digits_processor(9))
    moved = synced.index("move checkpoint")
    before = {event.removeprefix("sync ") for event in synced[:moved]}
    written = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert written <= before
    assert synced[moved - 1] == f"sync .checkpoint.{os.getpid()}.tmp"
    assert synced[moved + 1 :] == [f"sync {tmp_path.name}"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_what_is_saved_is_readable_as_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_model(tmp_path / "checkpoint", tiny_model(), digits_processor(9))
        write_json(tmp_path / "a.json", 1)
        save_state(tmp_path / "state.pt", state_of())
    finally:
        os.umask(before)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "model.safetensors" in {path.name for path in paths}
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o666 & ~mask}
    assert (tmp_path / "checkpoint").stat().st_mode & 0o777 == 0o777 & ~mask


# ---- a checkpoint's folder


def test_what_others_have_put_beside_a_checkpoint_is_kept_when_it_is_replaced(tmp_path):
    folder = tmp_path / "checkpoint"
    save_model(folder, tiny_model(seed=0), digits_processor(9))
    (folder / "notes.md").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_text("mine")
    save_router(Router([4, 9], 8, 8), folder, {})
    (folder / "router" / "mine.txt").write_text("mine")
    (folder / "linked").symlink_to(tmp_path)
    save_model(folder, tiny_model(seed=1), digits_processor(9))
    assert (folder / "notes.md").read_text() == (folder / "plots" / "a.png").read_text() == "mine"
    # A router goes with the weights that it was made for.
    assert os.listdir(folder / "router") == ["mine.txt"]
    assert (folder / "linked").is_symlink()
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("content", ['{"model_type": "llava"}', "{", None])
def test_another_models_folder_is_not_replaced(tmp_path, content):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_text("theirs")
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(FileExistsError, match="must be a TokenFLEX checkpoint"):
        save_model(folder, tiny_model(), digits_processor(9))
    assert (folder / "model.safetensors").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_replacement_that_was_killed_half_way_is_ended(tmp_path):
    folder, previous = tmp_path / "checkpoint", tmp_path / ".checkpoint.123.old"
    save_model(previous, tiny_model(seed=0), digits_processor(9))
    (previous / "notes.md").write_text("mine")
    checkpoint.restore_folder(previous, folder)
    assert (folder / "model.safetensors").exists()
    folder.rename(previous)
    save_model(folder, tiny_model(seed=1), digits_processor(9))
    checkpoint.restore_folder(previous, folder)
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert (folder / "notes.md").read_text() == "mine"
