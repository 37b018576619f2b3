"""Branches of a shared prefix against the same conversations alone, unpacked and unshared."""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.test_packed_attention import (
    alone_logits,
    assert_same_gradients,
    boundaries,
    gradients,
    heads,
    largest_difference,
)
from tests.models.tiny import IMAGE, Prompt, prompt, text_config, tiny_model, vision_config
from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.models import attention
from tokenflex.models.attention import packed_attention_forward
from tokenflex.models.prefixes import SharedPrefixes, share_prefixes
from tokenflex_kernels import plan_packing


class Tree(NamedTuple):
    """A prefix and its branches; without branches, a sequence by itself."""

    prefix: Prompt
    branches: list[Prompt]


def trees() -> list[Tree]:
    """Mixed counts, several images, images in branches, text only, one and eight branches."""
    eight = [prompt([20 + i, 30, 31][: 1 + i % 3], []) for i in range(8)]
    return [
        Tree(prompt([5, 6, IMAGE], [16], seed=1), eight),
        Tree(prompt([7, IMAGE, 8], [4], seed=2), []),
        Tree(
            prompt([9, IMAGE, 10, IMAGE], [9, 16], seed=3),
            [prompt([11, 12], []), prompt([13, IMAGE, 14, 15], [4], seed=4)],
        ),
        Tree(prompt([40, 41, 42], []), [prompt([43], []), prompt([44, 45, 46, 47], [])]),
        Tree(prompt([IMAGE, 50], [16], seed=5), [prompt([51, 52], [])]),
    ]


def joined(a: Prompt, b: Prompt) -> Prompt:
    return Prompt(a.ids + b.ids, a.counts + b.counts, torch.cat([a.pixels, b.pixels]))


def conversations(forest: list[Tree]) -> list[Prompt]:
    """Every sequence with all that it sees, in the order of the packed row."""
    return [
        one for tree in forest for one in [tree.prefix, *(joined(tree.prefix, b) for b in tree[1])]
    ]


def shared_inputs(forest: list[Tree]) -> dict:
    sequences = [one for tree in forest for one in (tree.prefix, *tree.branches)]
    parents: list[int] = []
    for tree in forest:
        parents += [-1, *[len(parents)] * len(tree.branches)]
    counts = [count for one in sequences for count in one.counts]
    plan = plan_packing([one.ids for one in sequences], counts, IMAGE)
    return {
        "plan": plan,
        "shared_prefixes": share_prefixes(plan, parents),
        "pixel_values": torch.cat([one.pixels for one in sequences]),
        "num_image_tokens": counts,
    }


def in_dtype(inputs: dict, dtype: torch.dtype) -> dict:
    return {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}


def shared_logits(model, forest: list[Tree]) -> list[torch.Tensor]:
    inputs = in_dtype(shared_inputs(forest), model.dtype)
    return list(model(**inputs).logits[0].split(inputs["plan"].lengths))


def own_rows(logits: list[torch.Tensor], forest: list[Tree]) -> list[torch.Tensor]:
    """Of each conversation alone, the rows that a branch has for itself."""
    starts = [
        start
        for tree in forest
        for start in [0, *[len(tree.prefix.expanded())] * len(tree.branches)]
    ]
    return [one[start:] for one, start in zip(logits, starts, strict=True)]


def branch_loss(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Summed cross entropy of the text after a branch's first row; ``logits`` are its own rows."""
    labels = torch.tensor(ids[1:], dtype=torch.int64)
    labels[labels == IMAGE] = -100
    return F.cross_entropy(logits[:-1], labels, reduction="sum")


def forest_loss(own: list[torch.Tensor], forest: list[Tree]) -> torch.Tensor:
    """Of every branch, and of every sequence that is no prefix."""
    logits, losses = iter(own), []
    for tree in forest:
        losses.append(branch_loss(next(logits), tree.prefix.expanded()) * (not tree.branches))
        losses += [branch_loss(next(logits), one.expanded()) for one in tree.branches]
    return sum(losses)


# ---- the model


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", [("qwen2", "siglip"), ("llama", "clip")], ids="-".join)
def test_logits_are_those_of_each_conversation_alone(family, training):
    model, forest = tiny_model(*family).train(training), trees()
    with torch.no_grad():
        shared = shared_logits(model, forest)
        alone = own_rows(alone_logits(model, conversations(forest)), forest)
    assert largest_difference(shared, alone) < 1e-5


def test_logits_are_those_of_each_conversation_alone_in_float64():
    model, forest = tiny_model().double(), trees()
    with torch.no_grad():
        shared = shared_logits(model, forest)
        alone = own_rows(alone_logits(model, conversations(forest)), forest)
    assert largest_difference(shared, alone) < 1e-12


def test_gradients_are_the_sum_of_those_of_each_conversation_alone():
    """Those of the image's projected tokens, of the projector and the encoder among them."""
    model, forest = tiny_model().train(), trees()
    shared = gradients(model, forest_loss(shared_logits(model, forest), forest))
    own = own_rows(alone_logits(model, conversations(forest)), forest)
    alone = gradients(model, forest_loss(own, forest))
    assert_same_gradients(shared, alone)
    assert len(shared) > 40
    for name in ("projector.gate", "vision_model.embeddings.patch_embedding"):
        assert float(shared[f"model.{name}.weight"].abs().max()) > 1e-4


def test_gradient_checkpointing_does_not_change_gradients():
    model, forest = tiny_model().train(), trees()
    plain = gradients(model, forest_loss(shared_logits(model, forest), forest))
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, forest_loss(shared_logits(model, forest), forest))
    assert_same_gradients(checkpointed, plain)


@pytest.mark.release
def test_compiled_model_gives_the_same_logits_and_gradients():
    forest = trees()
    plain, model = tiny_model().train(), tiny_model().train()
    compiled = torch.compile(model, backend="aot_eager")
    expected, actual = shared_logits(plain, forest), shared_logits(compiled, forest)
    with torch.no_grad():
        assert largest_difference(actual, expected) < 1e-5
    assert_same_gradients(
        gradients(model, forest_loss(actual, forest)),
        gradients(plain, forest_loss(expected, forest)),
    )


def test_bfloat16_stays_near_float32():
    model, forest = tiny_model(), trees()
    with torch.no_grad():
        exact = torch.cat(shared_logits(model, forest))
        rounded = torch.cat(shared_logits(model.to(torch.bfloat16), forest))
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("changed", range(8))
def test_changing_a_branch_changes_no_other_row(changed):
    model, before, after = tiny_model(), trees(), trees()
    after[0].branches[changed] = prompt([t + 5 for t in before[0].branches[changed].ids], [])
    with torch.no_grad():
        old, new = shared_logits(model, before), shared_logits(model, after)
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if i == 1 + changed:
            assert float((a - b).abs().max()) > 1e-2
        else:
            assert torch.equal(a, b)


def test_changing_a_prefix_changes_its_branches_and_no_other_row():
    model, before, after = tiny_model(), trees(), trees()
    after[2] = Tree(prompt([9, IMAGE, 10, IMAGE], [9, 16], seed=77), before[2].branches)
    with torch.no_grad():
        old, new = shared_logits(model, before), shared_logits(model, after)
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if i in (10, 11, 12):
            assert float((a - b)[-1].abs().max()) > 1e-2
        else:
            assert torch.equal(a, b)


def test_the_comparison_would_see_branches_without_their_prefix():
    """The control: the same plan with no word of prefixes is far off."""
    model, forest = tiny_model(), trees()
    inputs = shared_inputs(forest)
    inputs.pop("shared_prefixes")
    with torch.no_grad():
        unshared = list(model(**inputs).logits[0].split(inputs["plan"].lengths))
        alone = own_rows(alone_logits(model, conversations(forest)), forest)
    assert largest_difference(unshared[1:2], alone[1:2]) > 1e-2


# ---- what is refused


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_another_attention_is_refused(implementation):
    model = tiny_model()
    assert model.takes_shared_prefixes
    model.model.language_model.set_attn_implementation(implementation)
    assert not model.takes_shared_prefixes
    with pytest.raises(ValueError, match=f"'tokenflex_varlen', got '{implementation}'"):
        shared_logits(model, trees())


def test_prefixes_of_another_plan_are_refused():
    inputs = shared_inputs(trees())
    inputs["shared_prefixes"] = shared_inputs(trees()[:2])["shared_prefixes"]
    with pytest.raises(ValueError, match="18 sequences and 102 rows, got 10 and 39"):
        tiny_model()(**inputs)


def test_prefixes_without_a_plan_are_refused():
    shared = shared_inputs(trees())["shared_prefixes"]
    with pytest.raises(ValueError, match="give the plan"):
        tiny_model()(input_ids=torch.tensor([[5, 6]]), shared_prefixes=shared)


def test_sliding_window_counts_the_prefix():
    text = text_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    config = TokenFlexConfig(vision_config(), text, image_token_id=IMAGE)
    model = TokenFlexForConditionalGeneration(config).eval()
    fits = [Tree(prompt([5, IMAGE, 6], [4]), [prompt([7, 8], []), prompt([9], [])])]
    with torch.no_grad():
        alone = own_rows(alone_logits(model, conversations(fits)), fits)
        assert largest_difference(shared_logits(model, fits), alone) < 1e-5
        exceeds = [Tree(fits[0].prefix, [prompt([7, 8, 9], [])])]
        with pytest.raises(ValueError, match="sliding_window=8 for sequences of up to 9 rows"):
            shared_logits(model, exceeds)


# ---- what is planned on the host


def test_plan_of_the_written_out_example():
    plan = plan_packing([[1, 2, 3, 4], [5, 6], [7, 8, 9], [10, 11]], [], IMAGE + 99)
    shared = share_prefixes(plan, [-1, 0, 0, -1])
    assert shared.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1]
    assert shared.key_rows.tolist() == [
        *[0, 1, 2, 3],
        *[0, 1, 2, 3, 4, 5],
        *[0, 1, 2, 3, 6, 7, 8],
        *[9, 10],
    ]
    assert shared.cu_seqlens.tolist() == [0, 4, 10, 17, 19]
    assert shared.cu_seqlens.dtype == torch.int32
    assert shared.lengths == (4, 6, 7, 2)
    moved = shared.to("meta")
    assert moved.key_rows.is_meta
    assert moved.position_ids.is_meta
    assert moved.cu_seqlens.is_meta
    assert moved.lengths == shared.lengths


def test_a_branch_of_no_rows_sees_none():
    shared = share_prefixes(plan_packing([[5, 6], [], [7]], [], IMAGE), [-1, 0, 0])
    assert shared.lengths == (2, 0, 3)
    assert shared.key_rows.tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("parents", "match"),
    [
        ([-1, 0], "3 sequences, got 2"),
        ([-1, 0, 1], r"parents\[2\].*got 1"),  # a branch of a branch
        ([-1, 2, -1], r"parents\[1\].*got 2"),
        ([0, -1, -1], r"parents\[0\].*got 0"),
        ([-1, -2, -1], r"parents\[1\].*got -2"),
    ],
)
def test_parents_that_are_refused(parents, match):
    plan = plan_packing([[5], [6], [7]], [], IMAGE)
    with pytest.raises(ValueError, match=match):
        share_prefixes(plan, parents)


# ---- the attention function itself, over random trees

forests = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(0, 4), max_size=4)), max_size=4
)


def layout(forest: list[tuple[int, list[int]]]) -> tuple[tuple[int, ...], SharedPrefixes]:
    lengths: list[int] = []
    parents: list[int] = []
    for prefix, branches in forest:
        parents += [-1, *[len(lengths)] * len(branches)]
        lengths += [prefix, *branches]
    plan = plan_packing([[1] * length for length in lengths], [], IMAGE)
    return tuple(lengths), share_prefixes(plan, parents)


def masked_attention(query, key, value, lengths, parents):
    """[1, heads, T, width] x 3 -> [1, T, heads, width], with a written-out T x T mask."""
    sequence = [i for i, length in enumerate(lengths) for _ in range(length)]
    seen = torch.tensor(
        [
            [
                (owner == other and k <= q) or parents[owner] == other
                for k, other in enumerate(sequence)
            ]
            for q, owner in enumerate(sequence)
        ],
        dtype=torch.bool,
    ).reshape(len(sequence), len(sequence))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


@settings(deadline=None, max_examples=60)
@given(forests, st.sampled_from([(2, 2), (4, 2), (3, 1)]))
def test_attention_is_the_masked_softmax_over_random_trees(forest, num_heads):
    lengths, shared = layout(forest)
    query, key, value = (
        heads(sum(lengths), count=count, seed=seed).double().requires_grad_()
        for seed, count in enumerate((num_heads[0], num_heads[1], num_heads[1]))
    )
    ours = {**boundaries(lengths, shared.parents), "shared_prefixes": shared}
    output, _ = packed_attention_forward(torch.nn.Module(), query, key, value, None, **ours)
    expected = masked_attention(query, key, value, lengths, shared.parents)
    assert output.shape == expected.shape
    assert torch.allclose(output, expected, rtol=0, atol=1e-12)

    towards = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).double()
    inputs = (query, key, value)
    for a, b in zip(
        torch.autograd.grad(output, inputs, towards, allow_unused=True),
        torch.autograd.grad(expected, inputs, towards),
        strict=True,
    ):
        assert torch.allclose(b if a is None else a, b, rtol=0, atol=1e-12)
        assert a is not None or not sum(lengths)


def varlen_stand_in(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size,
    enable_gqa=False,
):
    """Compute ``torch.nn.attention.varlen`` sequence by sequence, as on a device."""
    assert window_size == (-1, 0)
    assert max_q == max(cu_seq_q.diff().tolist(), default=0)
    assert max_k == max(cu_seq_k.diff().tolist(), default=0)
    outputs = [query[:0]]
    for q, k, v in zip(
        query.tensor_split(cu_seq_q[1:-1].long()),
        key.tensor_split(cu_seq_k[1:-1].long()),
        value.tensor_split(cu_seq_k[1:-1].long()),
        strict=True,
    ):
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        heads_first = [x.transpose(0, 1) for x in (q, k, v)]
        output = F.scaled_dot_product_attention(
            *heads_first, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@settings(deadline=None, max_examples=40)
@given(forests, st.sampled_from([(2, 2), (4, 2)]))
def test_the_call_made_on_a_device_is_the_same_attention(forest, num_heads):
    """All but the kernel, which the GPU tests run: rows gathered, boundaries, gradients."""
    lengths, shared = layout(forest)
    ours = {**boundaries(lengths, shared.parents), "shared_prefixes": shared}
    query, key, value = inputs = [
        heads(sum(lengths), count=count, seed=seed).double().requires_grad_()
        for seed, count in enumerate((num_heads[0], num_heads[1], num_heads[1]))
    ]
    expected, _ = packed_attention_forward(torch.nn.Module(), query, key, value, None, **ours)
    with mock.patch("torch.nn.attention.varlen.varlen_attn", varlen_stand_in):
        attention._varlen_parameters.cache_clear()
        actual = attention._flash(
            query,
            key,
            value,
            ours["cu_seq_lens_q"],
            ours["max_length_q"],
            shared,
            None,
        )
    attention._varlen_parameters.cache_clear()
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    if sum(lengths):
        towards = torch.randn(actual.shape, generator=torch.Generator().manual_seed(9)).double()
        for a, b in zip(
            torch.autograd.grad(actual, inputs, towards),
            torch.autograd.grad(expected, inputs, towards),
            strict=True,
        ):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
