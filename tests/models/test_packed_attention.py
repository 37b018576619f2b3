"""No sample of a packed row sees another: packed logits and gradients against each sample alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.models.tiny import (
    IMAGE,
    Prompt,
    prompt,
    prompts,
    text_config,
    tiny_model,
    vision_config,
)
from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.models.attention import packed_attention_forward
from tokenflex.models.attention_blocks import AttentionBlocks
from tokenflex_kernels import plan_packing

TOLERANCE = 1e-5
IMPLEMENTATIONS = ("tokenflex_varlen", "sdpa", "eager")


def packed_inputs(batch: list[Prompt]) -> dict:
    counts = [count for one in batch for count in one.counts]
    plan = plan_packing([one.ids for one in batch], counts, IMAGE)
    pixel_values = torch.cat([one.pixels for one in batch]) if batch else torch.zeros(0, 3, 1, 1)
    return {"plan": plan, "pixel_values": pixel_values, "num_image_tokens": counts}


def packed_logits(model, batch: list[Prompt]) -> list[torch.Tensor]:
    inputs = packed_inputs(batch)
    return list(model(**inputs).logits[0].split(inputs["plan"].lengths))


def alone_logits(model, batch: list[Prompt]) -> list[torch.Tensor]:
    return [model(**one.inputs()).logits[0] for one in batch]


def largest_difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    assert [len(a) for a in actual] == [len(e) for e in expected]
    return max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True) if len(a))


def text_loss(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Summed cross entropy of every text token after the first row."""
    labels = torch.tensor(ids[1:])
    labels[labels == IMAGE] = -100
    return F.cross_entropy(logits[:-1], labels, reduction="sum")


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((actual[name] - gradient).abs().max()) < TOLERANCE * scale, name


@pytest.fixture(params=["qwen2-siglip", "llama-clip"])
def family(request) -> tuple[str, str]:
    text, vision = request.param.split("-")
    return text, vision


# ---- packed is the same as alone


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_logits_are_those_of_each_sample_alone(family, implementation, training):
    model = tiny_model(*family).train(training)
    model.set_attn_implementation(implementation)

    with torch.no_grad():
        packed, alone = packed_logits(model, prompts()), alone_logits(model, prompts())

    assert largest_difference(packed, alone) < TOLERANCE


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_gradients_are_the_sum_of_those_alone(family, implementation, training):
    model = tiny_model(*family).train(training)
    model.set_attn_implementation(implementation)
    batch = prompts()

    inputs = packed_inputs(batch)
    logits, labels = model(**inputs).logits[0], inputs["plan"].labels
    packed = gradients(model, F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
    alone = gradients(
        model,
        sum(
            text_loss(logits, one.expanded())
            for logits, one in zip(alone_logits(model, batch), batch, strict=True)
        ),
    )

    assert_same_gradients(packed, alone)
    assert float(packed["model.projector.gate.weight"].abs().max()) > 1e-4


def test_default_language_attention_is_the_packed_one():
    model = tiny_model()
    assert model.model.language_model.config._attn_implementation == "tokenflex_varlen"


def test_the_comparison_would_see_a_leak():
    """The control: with the boundaries taken away, the same numbers are far apart."""
    model, batch = tiny_model(), prompts()
    joined = Prompt(
        [token for one in batch for token in one.ids],
        [count for one in batch for count in one.counts],
        torch.cat([one.pixels for one in batch]),
    )
    with torch.no_grad():
        leaking = model(**joined.inputs()).logits[0]
        alone = alone_logits(model, batch)
    leaked = list(leaking.split([len(one) for one in alone]))
    assert largest_difference(leaked[:1], alone[:1]) < TOLERANCE  # nothing stands before it
    for i in range(1, len(batch)):
        assert largest_difference([leaked[i]], [alone[i]]) > 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("changed", range(4))
def test_changing_one_sample_changes_no_other(implementation, changed):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    before, after = prompts(), prompts()
    tokens = [IMAGE if token == IMAGE else token + 30 for token in before[changed].ids]
    after[changed] = prompt(tokens, before[changed].counts, seed=99)

    with torch.no_grad():
        old, new = packed_logits(model, before), packed_logits(model, after)

    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        difference = float((a - b).abs().max())
        assert difference > 1e-2 if i == changed else difference < 1e-6


def test_changing_the_length_of_one_sample_changes_no_other():
    model = tiny_model()
    before, after = prompts(), prompts()
    after[1] = prompt([8, IMAGE, 9], [4], seed=2)
    with torch.no_grad():
        old, new = packed_logits(model, before), packed_logits(model, after)
    assert largest_difference(old[:1] + old[2:], new[:1] + new[2:]) < 1e-6


def test_order_of_the_samples_does_not_matter():
    model, order = tiny_model(), [2, 0, 3, 1]
    with torch.no_grad():
        straight = packed_logits(model, prompts())
        shuffled = packed_logits(model, [prompts()[i] for i in order])
    assert largest_difference(shuffled, [straight[i] for i in order]) < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_samples_of_no_rows_between_others(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    empty, one_token = prompt([], []), prompt([9], [])
    batch = [empty, prompts()[0], empty, one_token, one_token, prompts()[3], empty]

    with torch.no_grad():
        packed = packed_logits(model, batch)

    full = [1, 3, 4, 5]
    with torch.no_grad():
        alone = alone_logits(model, [batch[i] for i in full])
    assert [len(one) for one in packed] == [0, 7, 0, 1, 1, 18, 0]
    assert largest_difference([packed[i] for i in full], alone) < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "batch",
    [
        [prompt([5, 6], []), prompt([7, 8, 9], []), prompt([10], [])],
        [prompt([IMAGE], [4], 1), prompt([IMAGE, IMAGE], [9, 4], 2), prompt([IMAGE], [4], 3)],
    ],
    ids=["only text", "only images"],
)
def test_batches_of_one_modality(implementation, batch):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        assert largest_difference(packed_logits(model, batch), alone_logits(model, batch)) < 1e-5


def test_text_only_plan_needs_no_pixels():
    model = tiny_model()
    plan = plan_packing([[5, 6], [7, 8, 9]], [], IMAGE)
    with torch.no_grad():
        bare = model(plan=plan).logits
        with_none = model(
            plan=plan, pixel_values=torch.zeros(0, 3, 1, 1), num_image_tokens=[]
        ).logits
    assert torch.equal(bare, with_none)


def test_gradient_checkpointing_does_not_change_packed_gradients():
    model, inputs = tiny_model().train(), packed_inputs(prompts())
    labels = inputs["plan"].labels[None]
    plain = gradients(model, model(**inputs, labels=labels).loss)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, model(**inputs, labels=labels).loss)
    assert_same_gradients(checkpointed, plain)


def test_loss_of_a_packed_row_is_the_mean_over_all_text_tokens():
    model, batch = tiny_model(), prompts()
    inputs = packed_inputs(batch)
    with torch.no_grad():
        loss = model(**inputs, labels=inputs["plan"].labels[None]).loss
        total = sum(
            text_loss(logits, one.expanded())
            for logits, one in zip(alone_logits(model, batch), batch, strict=True)
        )
    tokens = sum(sum(i != IMAGE for i in one.expanded()[1:]) for one in batch)
    assert float(loss) == pytest.approx(float(total) / tokens, abs=1e-5)


def test_bfloat16_stays_near_float32():
    model, inputs = tiny_model(), packed_inputs(prompts())
    with torch.no_grad():
        exact = model(**inputs).logits
        rounded = model.to(torch.bfloat16)(**inputs).logits
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


# ---- what the plan and the model must agree on


def test_plan_with_input_ids_is_refused():
    model, inputs = tiny_model(), packed_inputs(prompts())
    with pytest.raises(ValueError, match="input_ids"):
        model(**inputs, input_ids=torch.tensor([[1, 2]]))


def test_plan_whose_counts_are_not_the_images_is_refused():
    inputs = packed_inputs(prompts())
    inputs["num_image_tokens"] = [4, 9, 16, 9]
    with pytest.raises(ValueError, match=r"\(4, 9, 16, 16\), got \(4, 9, 16, 9\)"):
        tiny_model()(**inputs)


def test_dropout_of_the_language_model_is_refused_in_training_only():
    model = tiny_model()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    inputs = packed_inputs(prompts())
    assert torch.isfinite(model.eval()(**inputs).logits).all()
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        model.train()(**inputs)


def test_sliding_window_shorter_than_a_sample_is_refused_and_never_ignored():
    text = text_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    config = TokenFlexConfig(vision_config(), text, image_token_id=IMAGE)
    model = TokenFlexForConditionalGeneration(config).eval()
    assert set(text.layer_types) == {"sliding_attention"}
    short = [prompt([5, 6], []), prompt([IMAGE, 7, 8, 9], [4], 1)]
    with torch.no_grad():
        assert largest_difference(packed_logits(model, short), alone_logits(model, short)) < 1e-5
        with pytest.raises(ValueError, match="sliding_window=8"):
            packed_logits(model, prompts())


# ---- the attention function itself


def heads(length: int, *, count: int = 2, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, length, 8, generator=torch.Generator().manual_seed(seed))


def boundaries(lengths: tuple[int, ...], parents: tuple[int, ...] = ()) -> dict:
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "cu_seq_lens_q": starts,
        "max_length_q": max(lengths, default=0),
        "blocks": AttentionBlocks(lengths, parents),
    }


def naive_attention(query, key, value, lengths, scale):
    """[1, heads, T, width] x 3 -> [1, T, heads, width], with a written-out T x T mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1).double() for x in (key, value))
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(sample))
    seen = (sample[:, None] == sample[None]) & (place[None] <= place[:, None])
    scores = query.double() @ key.transpose(-1, -2) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(5,), (3, 3), (1, 4, 1, 2, 4), (0, 3, 0, 0, 2, 0)])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_attention_is_the_masked_softmax(lengths, query_heads, key_heads, scaling):
    total = sum(lengths)
    query, key, value = (
        heads(total, count=count, seed=seed)
        for seed, count in enumerate((query_heads, key_heads, key_heads))
    )
    output, weights = packed_attention_forward(
        torch.nn.Module(), query, key, value, None, scaling=scaling, **boundaries(lengths)
    )
    expected = naive_attention(query, key, value, lengths, scaling or 8**-0.5)
    assert weights is None
    assert output.shape == (1, total, query_heads, 8)
    assert float((output - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_attention_over_no_rows(lengths):
    empty = heads(0)
    output, _ = packed_attention_forward(
        torch.nn.Module(), empty, empty, empty, None, **boundaries(lengths)
    )
    assert output.shape == (1, 0, 2, 8)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch": 2}, "2 rows"),
        ({"keys": 9}, "5 queries and 9 keys"),
        ({"dropout": 0.5}, r"dropout=0\.5"),
        ({"sliding_window": 2}, "sliding_window=2"),
        ({"blocks": None}, "blocks=None"),
        ({"max_length_q": None}, "max_length_q"),
    ],
)
def test_what_packed_attention_refuses(changes, match):
    options = {"batch": 1, "keys": 5, **boundaries((2, 3)), **changes}
    batch, keys = options.pop("batch"), options.pop("keys")
    query, key = heads(5, batch=batch), heads(keys, batch=batch)
    with pytest.raises(ValueError, match=match):
        packed_attention_forward(torch.nn.Module(), query, key, key, None, **options)


def test_window_as_wide_as_the_longest_sequence_is_no_window():
    query = heads(5)
    wide, _ = packed_attention_forward(
        torch.nn.Module(), query, query, query, None, sliding_window=3, **boundaries((2, 3))
    )
    plain, _ = packed_attention_forward(
        torch.nn.Module(), query, query, query, None, **boundaries((2, 3))
    )
    assert torch.equal(wide, plain)
