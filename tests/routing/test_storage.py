"""A router's file is whole or not there, and one that is neither is named."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from tests.routing.planted import COUNTS
from tokenflex.routing import storage
from tokenflex.routing.router import Router
from tokenflex.routing.storage import load_router, save_router


@pytest.fixture
def router() -> Router:
    router = Router(COUNTS, 4, 6, hidden_width=5, penalty=0.25)
    router.image_mean.copy_(torch.arange(8))
    return router


@pytest.fixture
def saved(router, tmp_path):
    return save_router(router, tmp_path, {"seconds": 1}) / "router.safetensors"


def test_what_is_loaded_is_what_was_saved(router, saved, tmp_path):
    loaded = load_router(tmp_path)
    assert loaded.counts == COUNTS
    assert (loaded.penalty, loaded.hidden_width) == (0.25, 5)
    assert not loaded.training
    inputs = torch.randn(3, 8), torch.randn(3, 6)
    assert torch.equal(loaded(*inputs), router(*inputs))
    assert json.loads((saved.parent / "report.json").read_text()) == {"seconds": 1}
    assert sorted(file.name for file in saved.parent.iterdir()) == [
        "report.json",
        "router.safetensors",
    ]


def test_a_second_save_takes_the_place_of_the_first(saved, tmp_path):
    save_router(Router((4, 16), 4, 6), tmp_path, {})
    assert load_router(tmp_path).counts == (4, 16)


def test_a_save_that_breaks_off_leaves_the_earlier_router(saved, tmp_path, monkeypatch):
    def half(weights, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_router(Router((4, 16), 4, 6), tmp_path, {})
    assert load_router(tmp_path).counts == COUNTS
    assert len([*saved.parent.iterdir()]) == 2


def test_a_checkpoint_without_a_router_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"tokenflex route --model {tmp_path}"):
        load_router(tmp_path)


def test_a_folder_that_is_not_there_is_named(router, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        save_router(router, tmp_path / "nowhere", {})


@pytest.mark.parametrize("length", [0, 7, 100, -8])
def test_a_file_that_is_cut_off_is_refused(saved, tmp_path, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(ValueError, match="is not a whole router"):
        load_router(tmp_path)


SETTINGS = {"counts": [4, 9, 16], "vision_width": 4, "text_width": 6, "hidden_width": 5}


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        {**SETTINGS, "counts": [4, 10]},
        {**SETTINGS, "penalty": -1},
        {**SETTINGS, "hidden_width": 6},
        {**SETTINGS, "counts": [4, 16]},
        {**SETTINGS, "depth": 3},
        [4, 9],
    ],
)
def test_settings_that_do_not_fit_are_refused(router, saved, tmp_path, settings):
    metadata = {} if settings is None else {"router": json.dumps(settings)}
    save_file(router.state_dict(), saved, metadata=metadata)
    with pytest.raises(ValueError, match="is not a whole router"):
        load_router(tmp_path)


HUGE = 2**40


@pytest.mark.parametrize(
    "settings",
    [
        {**SETTINGS, "hidden_width": HUGE},
        {**SETTINGS, "hidden_width": 2**20},
        {**SETTINGS, "vision_width": HUGE},
        {**SETTINGS, "text_width": 10**30},
        {**SETTINGS, "hidden_width": 10**4000},
        {**SETTINGS, "counts": [n * n for n in range(1, 2000)]},
        {**SETTINGS, "counts": "4,9"},
        {**SETTINGS, "counts": 4},
        {**SETTINGS, "counts": None},
        {**SETTINGS, "counts": {"4": 9}},
        {**SETTINGS, "counts": [[4], [9]]},
        {**SETTINGS, "vision_width": "4"},
        {**SETTINGS, "vision_width": 4.0},
        {**SETTINGS, "vision_width": True},
        {**SETTINGS, "penalty": float("nan")},
        {**SETTINGS, "penalty": float("inf")},
        {**SETTINGS, "penalty": "0.1"},
        {**SETTINGS, "penalty": [0.1]},
        {**SETTINGS, "k" * 10_000: 1},
        "settings",
        3,
    ],
    ids=lambda settings: str(settings)[-40:],
)
def test_what_settings_claim_is_compared_before_it_is_allocated(
    router, saved, tmp_path, settings, monkeypatch
):
    save_file(router.state_dict(), saved, metadata={"router": json.dumps(settings)})
    devices = []

    def recording(**values):
        made = Router(**values)
        devices.append(made.image.weight.device.type)
        return made

    monkeypatch.setattr(storage, "Router", recording)
    tracemalloc.start()
    with pytest.raises(ValueError, match="is not a whole router") as error:
        load_router(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    assert {*devices} <= {"meta"}
    assert len(str(error.value)) < len(str(saved)) + 400
    assert "\n" not in str(error.value)


def test_settings_of_great_depth_are_refused(router, saved, tmp_path):
    deep = '{"counts": ' + "[" * 10_000 + "]" * 10_000 + "}"
    save_file(router.state_dict(), saved, metadata={"router": deep})
    with pytest.raises(ValueError, match="nests lists and objects too deeply"):
        load_router(tmp_path)


@pytest.mark.parametrize("name", ["image.weight", "right.bias", "image_mean"])
@pytest.mark.parametrize("change", ["missing", "transposed", "more"])
def test_tensors_that_do_not_fit_are_refused(router, saved, tmp_path, name, change):
    tensors = {key: value.clone() for key, value in router.state_dict().items()}
    value = tensors.pop(name)
    if change != "missing":
        tensors[name] = torch.cat([value, value]) if change == "more" else value[None].clone()
    save_file(tensors, saved, metadata={"router": json.dumps(SETTINGS)})
    with pytest.raises(ValueError, match="is not a whole router"):
        load_router(tmp_path)


def test_weights_that_are_not_finite_are_refused(router, tmp_path):
    torch.nn.init.constant_(router.right.bias, float("nan"))
    save_router(router, tmp_path, {})
    with pytest.raises(ValueError, match=r"values in right.bias that are not finite"):
        load_router(tmp_path)
