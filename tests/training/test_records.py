"""Records of a run: counts are exact, and rates are over the right seconds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import get_scheduler

from tests.training.runs import ROOT, demo_values, metrics, stage, tiny_values, untimed
from tokenflex import TokenCounts
from tokenflex.data.encoding import IGNORE
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.steps import PackedStep, StepPacker
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.training.config import StageConfig, TrainConfig
from tokenflex.training.flops import Flops, peak_flops
from tokenflex.training.loop import TrainingRun
from tokenflex.training.metrics import METRICS, TIMING_KEYS, bar_text, metrics_table
from tokenflex.training.records import (
    Meter,
    MetricsFile,
    StageRecord,
    read_lines,
)
from tokenflex.training.stages import learning_rate_factor


def step_of(**changes) -> PackedStep:
    values = {
        "bins": [],
        "samples": 2,
        "tokens": 100,
        "tiles": 3,
        "vision_tokens": 40,
        "targets": 10,
        "counts": {4: 2},
        "rank_tokens": 100,
        "cost_balance": 1.0,
        "broken": [],
    }
    return PackedStep(**{**values, **changes})


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def meter() -> Meter:
    flops = Flops(tile=1e9, vision_token=2e6, token=3e7, target=4e5)
    record = StageRecord.begin("all")
    device = torch.device("cpu")
    return Meter(record, flops, peak=1e10, device=device, clock=Clock())


def run_steps(meter: Meter, steps: list[PackedStep], wait: float, work: float, rest: float) -> None:
    """Each step waits, works and is followed by seconds that nobody should count."""

    def loader():
        for one in steps:
            meter._clock.now += wait
            yield one

    for one in meter.waiting(loader()):
        meter._clock.now += work
        meter.add(one)
        meter._clock.now += rest


# ---- rates


def test_rates_are_over_waiting_and_working_alone(meter):
    """Saving, evaluating and logging (the 1000 seconds) are not on the clock."""
    run_steps(meter, [step_of(), step_of()], wait=1, work=4, rest=1000)
    line = meter.rates([[0, 100, 2.0, 0]])
    assert line["tokens_per_second"] == pytest.approx(20)
    assert line["vision_tokens_per_second"] == pytest.approx(8)
    assert line["tiles_per_second"] == pytest.approx(0.6)
    assert line["samples_per_second"] == pytest.approx(0.4)
    assert (line["data_seconds"], line["step_seconds"]) == pytest.approx((1, 4))
    assert line["seconds"] == pytest.approx(10)
    assert line["peak_memory_gib"] is None


def test_rates_are_over_the_steps_since_the_last_ones(meter):
    run_steps(meter, [step_of()] * 3, wait=0, work=100, rest=0)
    meter.rates([[0, 100, 0, 0]])
    run_steps(meter, [step_of()], wait=0, work=1, rest=0)
    line = meter.rates([[0, 100, 0, 0]])
    assert line["tokens_per_second"] == pytest.approx(100)
    assert line["seconds"] == pytest.approx(301)  # of the stage, not of the window


def test_mfu_is_the_arithmetic_over_what_all_processes_could_do(meter):
    """By hand: 3e9 for tiles, 8e7 for vision tokens, 3e9 for tokens, 4e6 for targets."""
    run_steps(meter, [step_of()], wait=0, work=2, rest=0)
    line = meter.rates([[0, 100, 0, 0]])
    assert line["tflops_per_second"] == pytest.approx(6.084e9 / 2 / 1e12)
    assert line["mfu"] == pytest.approx(6.084e9 / 2 / 1e10)


def test_without_a_known_peak_there_is_no_mfu(meter):
    meter._peak = None
    run_steps(meter, [step_of()], wait=0, work=2, rest=0)
    line = meter.rates([[0, 100, 0, 0]])
    assert line["mfu"] is None
    shown = bar_text({**line, "loss": 1.0, "cost_balance": 1.0, "broken_samples": 0})
    assert "MFU" not in shown
    assert "3.04GFLOP/s" in shown


def test_waiting_is_the_mean_and_memory_the_most_of_all_processes(meter):
    run_steps(meter, [step_of()] * 2, wait=1, work=4, rest=0)
    line = meter.rates([[0, 100, 2.0, 1.5], [0, 100, 6.0, 7.5]])
    assert (line["data_seconds"], line["step_seconds"]) == pytest.approx((2, 3))
    assert line["peak_memory_gib"] == 7.5


def test_the_bar_is_short(meter):
    run_steps(meter, [step_of(tokens=12_340_000)], wait=0, work=2, rest=0)
    line = meter.rates([[5, 100, 0, 0]])
    text = bar_text({**line, "loss": 1.23456, "cost_balance": 1.0449, "broken_samples": 3})
    assert text.startswith("loss 1.235, 6.17M tok/s, 1.50 tiles/s, MFU ")
    assert text.endswith("pad 5%, balance 1.045, broken 3")
    assert len(text) < 100


# ---- padding, from what is computed


@pytest.fixture
def packer() -> StepPacker:
    dataset = DigitsDataset("train", size=20, questions=2)
    counts = TokenCounts((4, 9, 16), (0.2, 0.3, 0.5), seed=0)
    return StepPacker(dataset, PackingCollator(digits_processor(), counts), tile_cost=3.0)


KEYS = [(0, index) for index in range(6)]


def test_a_step_is_counted_as_it_is_packed(packer):
    packed = packer(KEYS)
    (batch,) = packed.bins
    drawn = [packer.collator.counts.draw(index, 0) for _, index in KEYS]
    assert packed.samples == 6
    assert packed.counts == dict(sorted(Counter(drawn).items()))
    assert packed.vision_tokens == sum(drawn)
    assert packed.targets == len(batch.targets) == int((batch.plan.labels != IGNORE).sum())
    assert packed.tokens == packed.rank_tokens == packed.rows == batch.plan.num_tokens


def test_packed_rows_hold_no_padding(packer, meter):
    packed = packer(KEYS)
    run_steps(meter, [packed], wait=0, work=1, rest=0)
    assert meter.rates([meter.shared(packed)])["padding_share"] == 0


def test_rows_that_nobody_planned_are_padding(packer, meter, monkeypatch):
    """A collator that fills each sample up to the longest: what it adds is measured."""
    collate = PackingCollator.__call__

    def padding(collator, drawn):
        longest = max(drawn, key=lambda one: collator.counts.draw(one.index, one.epoch))
        same = [DrawnSample(longest.index, longest.epoch, one.sample) for one in drawn]
        return collate(collator, same)

    monkeypatch.setattr(PackingCollator, "__call__", padding)
    packed = packer(KEYS)
    run_steps(meter, [packed], wait=0, work=1, rest=0)
    share = meter.rates([meter.shared(packed)])["padding_share"]
    assert share == pytest.approx(1 - packed.tokens / packed.rows)
    assert share > 0.1


def test_a_rank_without_samples_computes_padding(packer, meter):
    packer.num_ranks, packer.rank = 2, 1
    packed = packer(KEYS[:1])
    assert (packed.rank_tokens, packed.rows) == (0, packed.tokens)
    run_steps(meter, [packed], wait=0, work=1, rest=0)
    own = meter.shared(packed)
    other = [0, packed.rows, 0, 0]  # the rank that has the sample
    assert meter.rates([own, other])["padding_share"] == 0.5


# ---- peaks


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.5),
        ("NVIDIA H100 80GB HBM3", "no", 67),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA A1000 Laptop GPU", "bf16", None),
        ("cpu", "bf16", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, precision, teraflops):
    expected = None if teraflops is None else teraflops * 1e12
    assert peak_flops(name, precision) == expected


def test_float32_products_that_may_be_tf32_have_its_peak(monkeypatch):
    matmul = SimpleNamespace(fp32_precision="tf32")
    cuda = SimpleNamespace(backends=SimpleNamespace(cuda=SimpleNamespace(matmul=matmul)))
    monkeypatch.setattr("tokenflex.training.flops.torch", cuda)
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no") == 156e12


# ---- the file


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": 0, "step": 1}\n[1]\nnothing\n{"step": 2}\n{"stage": 0, "st')
    assert read_lines(path) == [{"stage": 0, "step": 1}]


def test_cutting_drops_what_came_after(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for place in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        file.append(dict(zip(("stage", "step"), place, strict=True)))
    assert file.has(1, 1)
    file.cut(1, 1)
    assert [(line["stage"], line["step"]) for line in read_lines(file.path)] == [
        (0, 1),
        (0, 2),
        (1, 1),
    ]
    assert file.has(1, 1)
    assert not file.has(1, 2)


# ---- schedules


def stage_config(**changes) -> StageConfig:
    values = stage(**{"warmup_steps": 0, **changes})
    return StageConfig(**{key: value for key, value in values.items() if value is not None})


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_in_steps_the_schedule_is_that_of_transformers(schedule, warmup):
    config = stage_config(steps=40, warmup_steps=warmup, schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    name = {"cosine": "cosine", "constant": "constant_with_warmup"}[schedule]
    expected = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(41):
        assert learning_rate_factor(config, step, tokens=3) == expected.get_last_lr()[0]
        optimizer.step()
        expected.step()


def test_in_tokens_the_schedule_follows_the_tokens():
    config = stage_config(steps=None, tokens=1000, warmup_share=0.1)

    def factors(*tokens):
        return [learning_rate_factor(config, steps=1, tokens=one) for one in tokens]

    # A tenth of warm-up, half a cosine, and zero however far the last step overshoots.
    assert factors(0, 50, 100, 550, 1000, 1200) == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_a_warm_up_in_steps_over_a_budget_in_tokens():
    config = stage_config(steps=None, tokens=1000, warmup_steps=4, schedule="constant")
    rates = [learning_rate_factor(config, step, tokens=300 * step) for step in range(6)]
    assert rates == [0, 0.25, 0.5, 0.75, 1, 1]


# ---- a budget in tokens


def token_stages() -> list[dict]:
    first = stage(name="first", tokens=700, warmup_share=0.2)
    del first["steps"], first["warmup_steps"]
    return [first, stage(name="second", steps=3)]


def trained(folder, **changes) -> TrainingRun:
    common = {"encoder_warm_up": None, "evaluation": None}
    config = TrainConfig.model_validate(tiny_values(folder, **common, **changes))
    training = TrainingRun(config)
    training.seen = []
    original = training._step

    def recording(model, optimizer, packed, stage):
        names = sorted(name for batch in packed.bins for name in batch.sample_ids)
        training.seen.append(names)
        return original(model, optimizer, packed, stage)

    training._step = recording
    training.run()
    return training


@pytest.fixture(scope="module")
def in_tokens(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("tokens") / "run"
    training = trained(folder, stages=token_stages())
    return SimpleNamespace(folder=folder, training=training)


def test_a_stage_ends_with_the_first_step_that_reaches_its_tokens(in_tokens):
    lines = [line for line in metrics(in_tokens.folder) if line["stage"] == 0]
    assert lines[-1]["stage_tokens"] == sum(line["tokens"] for line in lines) >= 700
    assert lines[-2]["stage_tokens"] < 700
    assert lines[-1]["learning_rate"]["text"] == 0


def test_the_next_stage_goes_on_where_the_tokens_ended(in_tokens):
    steps = len([line for line in metrics(in_tokens.folder) if line["stage"] == 0])
    order = in_tokens.training.setup.orders[in_tokens.training.config.data]
    for place, names in enumerate(in_tokens.training.seen[steps:], steps):
        expected = [f"digits-train-{order[3 * place + one][1]}" for one in range(3)]
        assert names == sorted(expected)


@pytest.mark.parametrize("died_at", [5, -2])
def test_a_run_in_tokens_that_died_continues_with_the_same_numbers(
    in_tokens, tmp_path, monkeypatch, died_at
):
    """In the middle of its first stage, and in the next one."""
    total = len(in_tokens.training.seen)
    values = tiny_values(tmp_path / "run", stages=token_stages())
    values |= {"encoder_warm_up": None, "evaluation": None, "save_every": 2}
    config = TrainConfig.model_validate(values)
    left, step = [died_at % total], torch.optim.AdamW.step

    def dying(optimizer, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(optimizer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            TrainingRun(config).run()
    TrainingRun(config).run()
    assert metrics(tmp_path / "run") == metrics(in_tokens.folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokens": 10}, "exactly one of steps and tokens"),
        ({"steps": None}, "exactly one of steps and tokens"),
        ({"steps": None, "tokens": 0}, "greater than 0"),
        ({"warmup_steps": 1, "warmup_share": 0.5}, "at most one of warmup_steps and warmup_share"),
        ({"warmup_share": 1}, "less than 1"),
    ],
)
def test_budgets_that_say_two_things_or_none(changes, expected):
    with pytest.raises(ValueError, match=expected):
        stage_config(**{"steps": 4, **changes})


def test_a_budget_may_be_written_as_a_power_of_ten():
    values = demo_values()
    del values["stages"][0]["steps"]
    values["stages"][0]["tokens"] = "2.0e9"  # YAML 1.1 reads it as text
    assert TrainConfig.model_validate(values).stages[0].budget == 2e9


# ---- a whole run


def test_a_line_has_every_metric_in_order(in_tokens):
    raw = json.loads((in_tokens.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert raw.keys() >= TIMING_KEYS
    assert [*raw] == [one.key for one in METRICS if one.key != "distillation_loss"]


def test_the_documentation_has_the_table_of_metrics():
    """After a change of METRICS put what metrics_table() returns into docs/training.md."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"\n\n{metrics_table()}\n\n" in text


def test_counts_add_up_over_the_stage(in_tokens):
    for index in (0, 1):
        lines = [line for line in metrics(in_tokens.folder) if line["stage"] == index]
        for name in ("samples", "tokens", "vision_tokens", "tiles", "targets"):
            assert lines[-1][f"stage_{name}"] == sum(line[name] for line in lines)
        assert all(sum(line["counts"].values()) == line["samples"] == 3 for line in lines)
        drawn = [sum(int(c) * n for c, n in line["counts"].items()) for line in lines]
        assert drawn == [line["vision_tokens"] for line in lines]
    assert [line["global_step"] for line in metrics(in_tokens.folder)] == list(
        range(1, len(in_tokens.training.seen) + 1)
    )
    assert {line["padding_share"] for line in metrics(in_tokens.folder)} == {0.0}


def test_the_peak_may_be_given(tmp_path):
    trained(tmp_path / "run", stages=[stage(steps=2)], peak_tflops=0.5)
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert line["mfu"] == pytest.approx(line["tflops_per_second"] / 0.5)
    assert "mfu" not in untimed(tmp_path / "run" / "metrics.jsonl")[0]


def test_the_gradient_norm_is_logged(tmp_path):
    """Before clipping: a bound of nearly nothing does not change the first."""
    for name, bound in (("free", 1e9), ("bound", 1e-6)):
        trained(tmp_path / name, stages=[stage(steps=2, max_grad_norm=bound)])
    free, bound = (metrics(tmp_path / name)[0] for name in ("free", "bound"))
    assert free["gradient_norm"] == bound["gradient_norm"] > 1e-3


def test_replaced_steps_count_once(meter):
    packed = step_of()
    run_steps(meter, [packed, replace(packed, tokens=50)], wait=0, work=1, rest=0)
    assert meter.record.counts["tokens"] == 150
    assert meter.record.counts["steps"] == 2


def test_lines_that_are_no_line_of_ours_are_left_out(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"stage": 0, "step": 1})
    with file.path.open("a") as damaged:
        damaged.write('{"stage": null, "step": 1}\n[1]\n{"step": 2}\n{"stage": 0, "st')
    file.cut(0, 5)
    assert read_lines(file.path) == [{"stage": 0, "step": 1}]
