"""The training step of the end-to-end study, with a few thousand parameters."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Deadline, Run
from benchmarks.results import COLUMNS, new_row, read_csv
from experiments.speed import end_to_end
from experiments.speed.end_to_end import Shape, measured, step_flops
from experiments.speed.models import RESULTS, Step, fields, random_model
from tests.benchmarks.rows import row

TINY = Shape(
    vision=fields(32, 64, 1, 4, image_size=32, patch_size=4),
    text=fields(32, 64, 1, 4, num_key_value_heads=2, vocab_size=50, tie_word_embeddings=True),
    samples=10,
    prompt=16,
    counts=(4, 9, 16),
)
RUN = Run("cpu", True, Deadline(0.3), emit=print)


@pytest.fixture(scope="module")
def model():
    return random_model(TINY.vision, TINY.text, "cpu")


def test_four_ways_and_the_same_loss(model, monkeypatch):
    monkeypatch.setattr(end_to_end, "peak_bytes", lambda call, device: 100 + call().ndim)
    four = measured(TINY, RUN)
    assert [(line["case"], line["variant"], line["status"]) for line in four] == [
        ("fixed 16", "padded", "ok"),
        ("fixed 16", "packed", "ok"),
        ("mixed 4/9/16 2:3:5", "padded", "ok"),
        ("mixed 4/9/16 2:3:5", "packed", "ok"),
    ]
    assert all(tuple(line) == COLUMNS for line in four)
    assert [line["tokens"] for line in four] == [320, 320, 160 + 115, 160 + 115]
    assert max(line["error"] for line in four) < 1e-4
    assert [line["peak_bytes"] for line in four] == [100] * 4  # of a step, which gives a number
    for line in four:
        samples = TINY.batch(mixed=line["case"].startswith("mixed"))
        assert line["flops"] == step_flops(model, samples)


def test_shapes_on_a_gpu_are_siglip_400m_and_qwen2_5_3b_cut_in_depth():
    shape = end_to_end.shape_of("cuda")
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    assert [shape.vision[name] for name in names] == [1152, 4304, 16]
    assert [shape.text[name] for name in names] == [2048, 11_008, 16]
    assert (shape.vision["image_size"], shape.vision["patch_size"]) == (384, 14)
    assert (shape.text["vocab_size"], shape.text["num_key_value_heads"]) == (151_936, 2)
    assert shape.vision["num_hidden_layers"] == shape.text["num_hidden_layers"] >= 3
    assert shape.counts == (64, 144, 256)
    assert [(shape.batch(mixed=True).counts == n).sum() for n in shape.counts] == [8, 12, 20]
    assert set(shape.batch(mixed=False).counts) == {256}


def test_the_loss_that_a_step_must_have_is_neither_padded_nor_packed(model, monkeypatch):
    masks = []
    loss = Step.loss

    def watched(step):
        masks.append((step.inputs["input_ids"].shape[0], bool(step.inputs["attention_mask"].all())))
        return loss(step)

    samples = TINY.batch(mixed=True)
    packed = Step(model, samples, range(TINY.samples), packed=True).loss()
    monkeypatch.setattr(Step, "loss", watched)
    alone = end_to_end.loss_of_each_alone(model, samples)
    assert masks == [(1, True)] * TINY.samples
    assert alone == pytest.approx(packed.item(), rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_on_what_follows_each_position(model, packed):
    step = Step(model, TINY.batch(mixed=True), range(TINY.samples), packed)
    ids = step.inputs["plan"].input_ids if packed else step.inputs["input_ids"].flatten()
    assert torch.equal(ids[step.learned + 1], step.answers)
    assert len(step.answers) == TINY.samples * 2


@pytest.mark.parametrize("wrong_one", ["packed", "padded"])
def test_another_loss_is_a_row_with_the_reason_and_no_time(monkeypatch, wrong_one):
    call = Step.__call__

    def wrong(step):
        off = 1.0005 if ("plan" in step.inputs) == (wrong_one == "packed") else 1
        return call(step) * off

    monkeypatch.setattr(Step, "__call__", wrong)
    for line in measured(TINY, RUN):
        failed = line["status"].startswith("failed: ValueError: loss must be that of each sample")
        assert failed is (line["variant"] == wrong_one)
        assert (line["p50_us"] == "") is failed


def test_how_far_a_loss_may_be_off():
    for limit in end_to_end.LOSS_LIMITS.values():
        loss = [torch.tensor(1 + 0.9 * limit, dtype=torch.float64)]
        assert end_to_end.loss_error(loss, 1.0, limit) == pytest.approx(0.9 * limit)
        with pytest.raises(ValueError, match="loss must be that of each sample alone, 1, got"):
            end_to_end.loss_error([1 + 1.1 * limit], 1.0, limit)
    limits = end_to_end.LOSS_LIMITS
    assert (limits[torch.bfloat16], limits[torch.float32]) == (2e-2, 1e-4)


def test_flops_are_those_that_pytorch_counts(monkeypatch):
    """Pooling, which counts as nothing, and attention to later rows are left out."""
    monkeypatch.setenv("TOKENFLEX_BACKEND", "reference")  # whose products are counted
    samples = TINY.batch(mixed=False)
    model = random_model(TINY.vision, TINY.text, "cpu")
    model.set_attn_implementation("eager")  # whose products are counted
    step = Step(model, samples, range(TINY.samples), packed=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step.loss()
    later = TINY.samples * 2 * (TINY.prompt + 16) ** 2 * TINY.text["hidden_size"]
    patches, cells = 8, 4  # of a side
    width = TINY.vision["hidden_size"]
    pooling = 2 * TINY.samples * width * (patches**2 * cells + patches * cells**2)
    forward = counter.get_total_flops() - pooling - later
    assert step_flops(model, samples) == pytest.approx(3 * forward, rel=0.01)


# ---- the report

STEPS = [
    row("end_to_end", "fixed 256", "packed", 100, tokens=1000, mode="forward+backward"),
    row("end_to_end", "mixed 64/144/256 2:3:5", "packed", 90, tokens=800, mode="forward+backward"),
]


def test_the_summary_has_each_step_and_the_share_of_the_saving_that_becomes_time():
    values = {"tokens_per_s": 500, "share_of_matmul": 0.4, "peak_bytes": 3 * 2**20}
    steps = [{**step, **{name: str(value) for name, value in values.items()}} for step in STEPS]
    *_, fixed, mixed, sentence = end_to_end.summary(steps).splitlines()
    cells = [cell.strip() for cell in fixed.strip("|").split("|")]
    assert cells == ["fixed 256", "packed", "0.1", "500", "40.0%", "3"]
    assert mixed.startswith("| mixed 64/144/256 2:3:5 | packed")
    assert sentence.startswith("packed: mixed counts save 20.0% of the sequence and 10.0% of the")
    assert sentence.endswith("50% of the saving becomes time")


def test_the_published_steps_stay_readable():
    (path,) = (RESULTS / "end-to-end").glob("*.csv")
    rows = read_csv(path)
    assert end_to_end.summary(rows).count("of the saving becomes time") == 2


def test_command_writes_ceilings_and_steps(monkeypatch, tmp_path, capsys):
    def ceilings(run):
        row = new_row(op="ceiling", variant="matmul", status="ok", dtype="float32")
        run.emit([row | {"tflop_per_s": 4.0}])

    monkeypatch.setattr(end_to_end.ceilings, "suite", ceilings)
    monkeypatch.setattr(end_to_end, "shape_of", lambda device: TINY)
    arguments = ["--device", "cpu", "--seconds", "1", "--out", str(tmp_path)]
    assert end_to_end.main(arguments) == 0
    (path,) = tmp_path.glob("*.csv")
    assert [bool(line["share_of_matmul"]) for line in read_csv(path)] == [True] * 5
    assert capsys.readouterr().out.count("of the saving becomes time") == 2
    with pytest.raises(SystemExit):
        end_to_end.main(["--seconds", "0"])
