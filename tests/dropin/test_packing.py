"""Packed samples do not attend to each other; families where they would are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.dropin.configs import MROPE, model_type
from tests.dropin.table import IMAGE, START
from tests.dropin.test_model import TOLERANCE, converted, logits, shared
from tests.dropin.tiny import KINDS, MODELS, PROMPTS, Prompt, batch, stock_model
from tokenflex.dropin import model as converted_classes
from tokenflex.dropin import pack_inputs
from tokenflex.dropin.families import family_of
from tokenflex_kernels.versions import is_older

SAMPLES = [*PROMPTS, Prompt([5, 6, 7], [], []), Prompt([8, START, IMAGE, 9], [4], [7])]
REFUSED = [
    "gemma3",
    "gemma4",
    "glm5_next",
    "inkling2",
    "lfm2_vl",
    "lfm3_vl",
    "minicpm_ocr",
    "minicpmv4_6",
    "paligemma",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
    *(["cosmos3_edge"] if is_older("transformers", "5.23") else []),
]


@pytest.fixture(params=[name for name in MODELS if model_type(name) not in REFUSED])
def name(request) -> str:
    return request.param


def lengths_of(packed) -> list[int]:
    return packed["cu_seq_lens_q"].diff().tolist()


def test_packed_logits_are_those_of_each_sample_alone(name):
    model = shared(name)
    packed = pack_inputs(model, batch(name, SAMPLES))
    assert packed["input_ids"].shape == (1, sum(lengths_of(packed)))
    together = logits(model, packed)[0].split(lengths_of(packed))
    for rows, sample in zip(together, SAMPLES, strict=True):
        alone = logits(model, batch(name, [sample]))[0]
        assert float((rows - alone).abs().max()) < TOLERANCE


def test_boundaries_of_the_packed_row():
    packed = pack_inputs(converted("llava"), batch("llava", SAMPLES))
    lengths = batch("llava", SAMPLES)["attention_mask"].sum(1)
    expected = [0, *lengths.cumsum(0).tolist()]
    for side in "qk":
        assert packed[f"cu_seq_lens_{side}"].tolist() == expected
        assert packed[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert packed[f"max_length_{side}"] == int(lengths.max())


def without_boundaries(packed) -> dict:
    """Return a packed row in which only positions show where samples start."""
    boundaries = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache")
    return {key: value for key, value in packed.items() if key not in boundaries}


def test_the_comparison_would_see_a_leak(name, monkeypatch):
    """Control: with a cache and without our check, transformers joins the samples."""
    model = shared(name)
    packed = pack_inputs(model, batch(name, SAMPLES))
    monkeypatch.setattr(converted_classes, "check_packing", lambda base, kwargs: None)
    together = logits(model, without_boundaries(packed))[0].split(lengths_of(packed))
    alone = logits(model, batch(name, [SAMPLES[1]]))[0]
    assert float((together[1] - alone).abs().max()) > 1e-3


@pytest.mark.parametrize("name", [name for name in KINDS if model_type(name) not in REFUSED])
def test_a_packed_row_that_would_leak_is_refused(name):
    model = shared(name)
    packed = pack_inputs(model, batch(name, SAMPLES))
    mask = {"attention_mask": torch.ones_like(packed["input_ids"])}
    positions_alone = {**without_boundaries(packed), "use_cache": False}
    for row in (packed, positions_alone):
        for change in ({"use_cache": True}, {"use_cache": None}, mask):
            with pytest.raises(ValueError, match="see each other"):
                model(**row | change)


@pytest.mark.parametrize("name", [name for name in KINDS if model_type(name) not in REFUSED])
def test_positions_alone_keep_samples_apart_without_a_cache(name):
    model = shared(name)
    packed = pack_inputs(model, batch(name, SAMPLES))
    alone = {**without_boundaries(packed), "use_cache": False}
    assert float((logits(model, alone) - logits(model, packed)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", [name for name in MROPE if name not in REFUSED])
def test_frames_alone_do_not_keep_samples_apart(family):
    model = shared(family)
    packed = pack_inputs(model, batch(family, SAMPLES))
    packed["position_ids"] = packed["position_ids"][1:]
    with pytest.raises(ValueError, match=r"see each other; got shape \(3, 1, "):
        model(**packed)
    one = batch(family, [SAMPLES[1]])  # within a sample frames stand still, but do not go back
    expected = logits(model, one)
    one["position_ids"] = pack_inputs(model, one)["position_ids"][1:]
    del one["attention_mask"]
    assert torch.allclose(logits(model, one), expected, atol=TOLERANCE)


def test_samples_of_one_token_are_seen():
    ids, positions = torch.tensor([[3, 4, 5]]), torch.tensor([[0, 0, 1]])
    with pytest.raises(ValueError, match="see each other"):
        converted("llava")(input_ids=ids, position_ids=positions)


def test_padded_rows_with_positions_are_not_packed():
    model, inputs = converted("llava"), batch("llava", SAMPLES)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as generate counts them
    given = logits(model, {**inputs, "position_ids": positions})
    assert torch.allclose(given[:, -1], logits(model, inputs)[:, -1], atol=TOLERANCE)


def test_loss_is_the_mean_over_the_samples_targets(name):
    model = shared(name)
    packed = pack_inputs(model, batch(name, SAMPLES, labels=True))
    total, targets = 0.0, 0
    for sample in SAMPLES:
        alone = batch(name, [sample], labels=True)
        labels = alone.pop("labels")[0, 1:]
        total += float(F.cross_entropy(logits(model, alone)[0, :-1], labels, reduction="sum"))
        targets += int((labels != -100).sum())
    with torch.no_grad():
        assert float(model(**packed).loss) == pytest.approx(total / targets, abs=1e-5)


def test_padding_side_does_not_matter():
    model = converted("llava")
    left = batch("llava", SAMPLES)
    right = dict(left)
    for key in ("input_ids", "attention_mask"):
        rows = [
            torch.cat([row[mask.bool()], row[~mask.bool()]])
            for row, mask in zip(left[key], left["attention_mask"], strict=True)
        ]
        right[key] = torch.stack(rows)
    packed = pack_inputs(model, left), pack_inputs(model, right)
    for key in ("input_ids", "position_ids", "cu_seq_lens_q"):
        assert torch.equal(packed[0][key], packed[1][key])


@pytest.mark.parametrize("family", [name for name in REFUSED if name in MODELS])
def test_families_that_cannot_be_packed_say_why(family):
    model = shared(family)
    reason = family_of(model.config).no_packing
    assert len(reason) > 20
    with pytest.raises(ValueError, match=f"{family} cannot be packed: {reason[:20]}"):
        pack_inputs(model, batch(family, SAMPLES))
    boundaries = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="cannot be packed"):
        model(input_ids=torch.tensor([[3, 4, 5]]), cu_seq_lens_q=boundaries, use_cache=False)
    positions = torch.tensor([[0, 1, 0]])
    with pytest.raises(ValueError, match="cannot be packed"):
        model(input_ids=torch.tensor([[3, 4, 5]]), position_ids=positions, use_cache=False)


def test_what_pack_inputs_refuses():
    with pytest.raises(ValueError, match=r"packing\.enable"):
        pack_inputs(stock_model("llava"), batch("llava", SAMPLES))
    inputs = batch("llava", SAMPLES)
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match="attention_mask"):
        pack_inputs(converted("llava"), inputs)
