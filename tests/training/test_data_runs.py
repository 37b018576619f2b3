"""Whole runs on tars and streams: stopping changes nothing, nor do workers; data that runs out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState

from tests.training.runs import (
    Killed,
    evaluations,
    mean_sample,
    metrics,
    own_data,
    stage,
    tiny_values,
    write_config,
)
from tokenflex.cli import main
from tokenflex.data.samples import DataExhaustedError
from tokenflex.data.steps import outline_of
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.training.build import build_dataset, build_order, check_supply
from tokenflex.training.config import TrainConfig, load_config
from tokenflex.training.evaluations import merged
from tokenflex.training.faults import BrokenSamplesError
from tokenflex.training.loop import TrainingRun
from tokenflex.training.plan import plan_run

TURNS = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    DigitsDataset("train", size=40)[index].images[0].save(buffer, "PNG")
    return buffer.getvalue()


def tars(folder: Path, samples: int = 12, broken: tuple[int, ...] = ()) -> dict:
    """Two tars; the pictures ``broken`` are cut off."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for index in range(shard * samples // 2, (shard + 1) * samples // 2):
                content = png(index)
                content = content[: len(content) // 2] if index in broken else content
                record = json.dumps({"id": f"s{index}", "messages": TURNS}).encode()
                for name, value in ((f"{index:03}.png", content), (f"{index:03}.json", record)):
                    info = tarfile.TarInfo(name)
                    info.size = len(value)
                    archive.addfile(info, io.BytesIO(value))
    return {"name": "webdataset", "path": str(folder / "{0..1}.tar")}


def stream(folder: Path, samples: int = 12, broken: tuple[int, ...] = (), **changes) -> dict:
    """Two Parquet files, likewise."""
    folder.mkdir()
    for shard in range(2):
        rows = range(shard * samples // 2, (shard + 1) * samples // 2)
        images = [[{"bytes": png(i)[: 60 if i in broken else None], "path": None}] for i in rows]
        columns = {"images": images, "messages": [TURNS] * len(rows), "id": [f"s{i}" for i in rows]}
        data = datasets.Dataset.from_dict(columns)
        data = data.cast_column("images", datasets.List(datasets.Image(decode=False)))
        data.to_parquet(folder / f"{shard}.parquet")
    options = {"streaming": True, "shuffle_buffer": 4, **changes}
    return {"name": "huggingface", "path": str(folder), **options}


def both(folder: Path, **changes) -> dict:
    folder.mkdir()
    parts = [
        {**stream(folder / "stream", **changes), "weight": 2},
        {**tars(folder / "tars", **changes), "weight": 1},
    ]
    return {"name": "mixture", "parts": parts}


def configured(output: Path, data: dict, **changes) -> Path:
    stages = [stage(name="first", steps=3), stage(name="second", steps=6)]
    common = {"data": data, "encoder_warm_up": None, "evaluation": None, "save_every": 2}
    values = tiny_values(output, **{"stages": stages, **common, **changes})
    return write_config(output.with_suffix(".yaml"), values)


def train(config: Path) -> None:
    TrainingRun(load_config(config)).run()


def train_until(monkeypatch, config: Path, steps: int) -> None:
    """Run, and die instead of the optimiser step after ``steps`` of them."""
    left, step = [steps], torch.optim.AdamW.step

    def counting(optimizer, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return step(optimizer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counting)
        with pytest.raises(Killed):
            train(config)


@pytest.fixture(scope="module", params=[tars, stream, both], ids=lambda make: make.__name__)
def unbroken(request, tmp_path_factory) -> tuple[dict, list[dict]]:
    """The data, and what a run on it logs. 27 samples of 12: more than two passes."""
    folder = tmp_path_factory.mktemp("data")
    data = request.param(folder / "data")
    train(configured(folder / "run", data))
    AcceleratorState._reset_state(reset_partial_state=True)
    return data, metrics(folder / "run")


@pytest.mark.parametrize(
    ("steps", "workers"), [pytest.param(4, 0, marks=pytest.mark.release), (6, 1)]
)
def test_a_run_that_died_continues_with_the_same_numbers(
    unbroken, tmp_path, monkeypatch, steps, workers
):
    data, expected = unbroken
    config = configured(tmp_path / "run", data, workers=workers)
    train_until(monkeypatch, config, steps)
    torch.manual_seed(steps)  # what another process would have
    train(config)
    assert metrics(tmp_path / "run") == expected


def test_workers_change_no_number_and_another_seed_does(unbroken, tmp_path):
    data, expected = unbroken
    train(configured(tmp_path / "workers", data, workers=2))
    assert metrics(tmp_path / "workers") == expected
    AcceleratorState._reset_state(reset_partial_state=True)
    train(configured(tmp_path / "seed", data, seed=1))
    assert metrics(tmp_path / "seed") != expected


@pytest.mark.parametrize("make", [tars, stream])
def test_broken_samples_are_named_and_too_many_stop_the_run(tmp_path, make):
    data = make(tmp_path / "data", broken=(2, 7))
    stages = [stage(steps=4)]  # one pass
    train(configured(tmp_path / "run", data, stages=stages))
    named = json.loads((tmp_path / "run" / "broken_samples.json").read_text())
    assert len(named) == 2
    assert all("an image cannot be read" in one["reason"] for one in named)
    if make is tars:
        assert [one["index"] for one in named] == [2, 7]
        assert "0.tar: 002:" in named[0]["reason"]
    config = configured(tmp_path / "strict", data, stages=stages, max_broken_samples=1)
    with pytest.raises(BrokenSamplesError, match=r"2 broken samples are more.*cannot be read"):
        train(config)


# ---- records that are broken


BAD_LINES = {3: '{"messages": [{"role": "user"', 5: "3", 8: json.dumps({"messages": TURNS[:1]})}


def with_bad_lines(folder: Path) -> dict:
    """Nine lines, of which three are no records."""
    folder.mkdir()
    data = own_data(folder, 6, broken=())
    path = Path(data["path"])
    good = iter(path.read_text().splitlines())
    path.write_text("\n".join(BAD_LINES.get(number) or next(good) for number in range(1, 10)))
    return data


def test_all_broken_records_of_a_file_are_named_also_those_that_no_step_met(tmp_path):
    data = with_bad_lines(tmp_path / "data")
    parts = [{**data, "weight": 1}, {**tars(tmp_path / "tars"), "weight": 999}]
    for name, given, first in (("run", data, 0), ("mixed", {"name": "mixture", "parts": parts}, 0)):
        train(configured(tmp_path / name, given, stages=[stage(steps=1, batch_size=4)]))
        AcceleratorState._reset_state(reset_partial_state=True)
        named = json.loads((tmp_path / name / "broken_samples.json").read_text())
        assert [one["index"] for one in named] == [first + line - 1 for line in BAD_LINES]
        for one, line in zip(named, BAD_LINES, strict=True):
            assert f"data.jsonl:{line}" in one["reason"]
        assert metrics(tmp_path / name)[0]["broken_samples"] == 3


def test_too_many_broken_records_are_refused_before_training_and_all_are_named(tmp_path):
    data = with_bad_lines(tmp_path / "data")
    config = configured(tmp_path / "run", data, max_broken_samples=2)
    message = (
        r"3 broken samples are more than max_broken_samples of 2; .*broken_samples\.json names"
    )
    with pytest.raises(BrokenSamplesError, match=message):
        train(config)
    assert len(json.loads((tmp_path / "run" / "broken_samples.json").read_text())) == 3
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with (
        pytest.warns(UserWarning, match=r"left out: .*data\.jsonl:") as warned,
        pytest.raises(BrokenSamplesError, match="3 broken samples are more than"),
    ):
        plan_run(load_config(config))
    assert len(warned) == 3
    with pytest.warns(UserWarning, match="left out"):
        assert main(["train", str(config), "--dry-run"]) == 2


def test_a_dry_run_plans_without_the_broken_records_and_names_them(tmp_path, capsys):
    config = configured(tmp_path / "run", with_bad_lines(tmp_path / "data"))
    with pytest.warns(UserWarning, match="left out") as warned:
        assert main(["train", str(config), "--dry-run"]) == 0
    assert "floating-point operations in all" in capsys.readouterr().out
    for line, warning in zip(BAD_LINES, warned, strict=True):
        assert f"data.jsonl:{line}" in str(warning.message)


def test_a_broken_record_moves_no_other_one_and_stopping_changes_nothing(tmp_path, monkeypatch):
    """The same lines, once with records in the places of the bad ones."""
    data = with_bad_lines(tmp_path / "data")
    orders = []
    for path in (data["path"], str(tmp_path / "whole.jsonl")):
        config = load_config(configured(tmp_path / "order", {**data, "path": path})).data
        if path != data["path"]:
            lines = Path(data["path"]).read_text().splitlines()
            good = [lines[0] if n in BAD_LINES else line for n, line in enumerate(lines, 1)]
            Path(path).write_text("\n".join(good))
        order = build_order(config, build_dataset(config), 0)
        orders.append([order[i] for i in range(20)])
    assert orders[0] == orders[1]
    stages = [stage(steps=5)]
    train(configured(tmp_path / "whole", data, stages=stages))
    AcceleratorState._reset_state(reset_partial_state=True)
    config = configured(tmp_path / "run", data, stages=stages)
    train_until(monkeypatch, config, 3)
    train(config)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_evaluation_leaves_out_and_names_broken_samples(tmp_path):
    data = with_bad_lines(tmp_path / "data")
    picture = tmp_path / "data" / "0.png"
    picture.write_bytes(picture.read_bytes()[:60])
    settings = {"data": data, "counts": [4, 9], "batch_size": 1, "every": 1, "samples": 4}
    changes = {"stages": [stage(steps=1)], "evaluation": settings}
    digits = {"name": "digits", "size": 20, "questions": 1}
    train(configured(tmp_path / "run", digits, **changes))
    (line,) = evaluations(tmp_path / "run")
    assert [one["index"] for one in line["broken_samples"]] == [0, 2]
    assert line["questions"] == {"": 2}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [one["index"] for one in report["broken_samples"]] == [0, 2, 4, 7]
    assert report["questions"] == {"": 5}
    with pytest.raises(BrokenSamplesError, match="3 broken samples are more than"):
        TrainingRun(
            load_config(configured(tmp_path / "few", digits, **changes, max_broken_samples=2))
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    config = configured(tmp_path / "last", digits, **changes, max_broken_samples=3)
    with pytest.raises(BrokenSamplesError, match="4 broken samples are more than"):
        train(config)


def test_processes_of_which_one_can_ask_nothing_report_together():
    one = {
        "accuracy": {"4": 0.5},
        "accuracy_by_kind": {"x": {"4": 0.5}},
        "questions": {"x": 2},
        "image_backend": "pil",
    }
    broken = [{"index": 3, "reason": "cut off"}, {"index": 1, "reason": "no JSON"}]
    together = merged([{"broken_samples": broken}, {**one, "broken_samples": broken[:1]}])
    assert together == {**one, "broken_samples": broken[::-1]}
    with pytest.raises(BrokenSamplesError, match="no sample can be asked: no JSON"):
        merged([{"broken_samples": broken}])


def test_the_seed_of_a_run_orders_its_streams(tmp_path):
    alone = stream(tmp_path / "data")
    for data in (alone, {"name": "mixture", "parts": [alone, alone]}):
        orders = []
        for seed in (0, 0, 1):
            config = load_config(configured(tmp_path / "run", data)).data
            dataset = build_dataset(config)
            order = build_order(config, dataset, seed)
            orders.append([outline_of(dataset, order[i][1]).id for i in range(12)])
        assert orders[0] == orders[1] != orders[2]


# ---- data that runs out


def loaded(output: Path, data: dict, **changes) -> tuple[TrainConfig, dict]:
    config = load_config(configured(output, data, **changes))
    dataset = build_dataset(config.data)
    return config, {config.data: build_order(config.data, dataset, config.seed)}


def test_a_stage_that_needs_more_than_the_epochs_hold_is_known_beforehand(tmp_path):
    data = tars(tmp_path / "data")
    for epochs in (3, None):
        check_supply(*loaded(tmp_path / "run", {**data, "epochs": epochs}))
    config, orders = loaded(tmp_path / "run", {**data, "epochs": 2})
    message = r"stage 'second' goes on to sample 27 of its data, but its epochs end at 24"
    with pytest.raises(ValueError, match=message):
        check_supply(config, orders)
    with pytest.raises(ValueError, match=message):  # as a dry run says too
        plan_run(config)


def test_the_parts_of_a_mixture_have_bounds_of_their_own(tmp_path):
    parts = [{**tars(tmp_path / "a"), "epochs": 1}, {**tars(tmp_path / "b"), "weight": 3}]
    config, orders = loaded(tmp_path / "run", {"name": "mixture", "parts": parts})
    (end,) = (order.end for order in orders.values())
    assert 30 < end < 70  # 12 samples at one in four
    check_supply(config, orders)  # 27 samples
    many = load_config(
        configured(tmp_path / "run", {"name": "mixture", "parts": parts}, stages=[stage(steps=30)])
    )
    with pytest.raises(ValueError, match=f"goes on to sample 90 .* end at {end}"):
        check_supply(many, orders)


def test_a_stream_that_ends_stops_the_run_and_more_epochs_continue_it(tmp_path):
    data = stream(tmp_path / "data")
    config = configured(tmp_path / "run", {**data, "epochs": 2}, workers=1)
    with pytest.raises(DataExhaustedError, match="ended after 2 epochs of 12 samples; allow more"):
        train(config)
    assert len(metrics(tmp_path / "run")) == 8  # 24 samples
    assert main(["train", str(config)]) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    train(configured(tmp_path / "run", {**data, "epochs": 3}))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(configured(tmp_path / "free", data))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "free")


def test_fewer_samples_than_a_step_asks_for_train(tmp_path):
    for name, make in (("tars", tars), ("stream", stream)):
        stages = [stage(steps=2, batch_size=9)]
        train(
            configured(tmp_path / name, make(tmp_path / f"{name} data", samples=4), stages=stages)
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        assert len(metrics(tmp_path / name)) == 2


def test_a_dry_run_measures_a_stream_and_one_that_is_short(tmp_path):
    data = stream(tmp_path / "data")
    for epochs in (None, 1):
        config = load_config(configured(tmp_path / "run", {**data, "epochs": epochs}))
        sample = mean_sample(config, share_prefix=True)
        assert (sample.tiles, sample.text_tokens) == (1, 3)  # "odd 3 <eos>"


# ---- truncation


def test_a_stage_cuts_conversations_to_its_max_length(tmp_path):
    """Pictures at 16 tokens do not fit: their samples have nothing left and are named."""
    data = tars(tmp_path / "data")
    stages = [stage(steps=2, batch_size=12, max_length=13)]
    train(configured(tmp_path / "run", data, stages=stages))
    assert metrics(tmp_path / "run")[-1]["broken_samples"] > 0
    assert max(line["tokens_per_image"] for line in metrics(tmp_path / "run")) <= 9


def test_a_run_whose_data_will_not_do_is_refused_before_it_begins(tmp_path):
    data = {**tars(tmp_path / "data"), "epochs": 2}
    with pytest.raises(ValueError, match="epochs end at 24"):
        TrainingRun(load_config(configured(tmp_path / "run", data)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
