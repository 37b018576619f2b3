"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import json

import pytest
import torch

from tests.models.tiny import picture, prompts, tiny_model
from tokenflex.digits.processor import digits_processor
from tokenflex.files import write_atomically, write_json
from tokenflex.models.loading import load_checkpoint
from tokenflex.training.checkpoint import save_model
from tokenflex.training.states import STATE_KEYS, load_state, save_state


class Stopped(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_writer_that_stops_half_way_leaves_what_was_there(tmp_path, stop, before):
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)

    def write(temporary):
        temporary.write_text("half")
        assert (path.read_text() if path.exists() else None) == before
        raise stop

    with pytest.raises(stop):
        write_atomically(path, write)
    assert names(tmp_path) == ([] if before is None else ["file.txt"])
    assert (path.read_text() if path.exists() else None) == before


def test_a_writer_that_finishes_replaces_the_file(tmp_path):
    path = tmp_path / "file.txt"
    for text in ("first", "second"):
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
    assert names(tmp_path) == ["file.txt"]


def test_json_is_readable_and_a_value_that_is_no_json_changes_nothing(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 0.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 0.5]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 0.5]}
    assert names(tmp_path) == ["a.json"]


def test_a_state_comes_back_bit_by_bit(tmp_path):
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    state = {
        **dict.fromkeys(STATE_KEYS, 0),
        "config": "c",
        "step": 3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert (loaded["config"], loaded["step"]) == ("c", 3)
    assert torch.equal(loaded["rng"], state["rng"])
    assert torch.equal(loaded["model"]["weight"], model.weight)
    moments = loaded["optimizer"]["state"][0]
    assert torch.equal(moments["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_state_is_an_error_that_names_it(tmp_path, share):
    path = tmp_path / "state.pt"
    save_state(path, {"config": "c", "model": {"w": torch.randn(1000)}})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"state\.pt"):
        load_state(path)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x04."])
def test_another_file_is_no_state(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt"):
        load_state(tmp_path / "state.pt")


def test_another_object_is_no_state(tmp_path):
    torch.save([1, 2], tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt"):
        load_state(tmp_path / "state.pt")


class Trap:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_state_runs_no_code(tmp_path, capsys):
    torch.save({"config": Trap()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt"):
        load_state(tmp_path / "state.pt")
    assert "code ran" not in capsys.readouterr().out


# ---- finished models


def test_a_saved_model_loads_whole(tmp_path):
    model = tiny_model()
    save_model(tmp_path / "checkpoint", model, digits_processor(9))
    loaded, processor = load_checkpoint(tmp_path / "checkpoint")
    assert names(tmp_path) == ["checkpoint"]
    assert processor.num_image_tokens == 9
    assert not loaded.training
    inputs = prompts()[1].inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert processor(images=picture(), text="<image> odd")["num_image_tokens"] == [9]


def test_saving_again_replaces_the_folder_whole(tmp_path):
    folder = tmp_path / "checkpoint"
    save_model(folder, tiny_model(seed=0), digits_processor(9))
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in shards:
        (folder / name).write_text("of another model")
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": "../escape.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    newer = tiny_model(seed=1)
    save_model(folder, newer, digits_processor(16))
    assert names(tmp_path) == ["checkpoint"]
    assert not {*shards, "model.safetensors.index.json"} & {*names(folder)}
    loaded, processor = load_checkpoint(folder)
    assert processor.num_image_tokens == 16
    assert torch.equal(loaded.lm_head.weight, newer.lm_head.weight)


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("saved_before", [False, True])
def test_saving_that_stops_half_way_leaves_the_old_model(tmp_path, stop, saved_before):
    folder, old = tmp_path / "checkpoint", tiny_model(seed=0)
    if saved_before:
        save_model(folder, old, digits_processor())

    class Broken:
        def save_pretrained(self, directory):
            (directory / "tokenizer.json").write_text("half")
            raise stop

    with pytest.raises(stop):
        save_model(folder, tiny_model(seed=1), Broken())
    assert names(tmp_path) == (["checkpoint"] if saved_before else [])
    if saved_before:
        loaded, _ = load_checkpoint(folder)
        assert torch.equal(loaded.lm_head.weight, old.lm_head.weight)
