"""Runs of a packed row, and their masks, against a mask of the whole row."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.test_packed_attention import boundaries, heads
from tests.models.test_shared_prefixes import masked_attention
from tokenflex.models import attention_blocks
from tokenflex.models.attention import packed_attention_forward
from tokenflex.models.attention_blocks import AttentionBlocks, Run


@st.composite
def rows(draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths, and parents: each -1 or any earlier sequence that has none itself."""
    lengths = draw(st.lists(st.integers(0, 7), max_size=10))
    parents: list[int] = []
    for _ in lengths:
        roots = [i for i, parent in enumerate(parents) if parent == -1]
        parents.append(draw(st.sampled_from([-1, *roots, *roots[-1:] * 3])))
    return tuple(lengths), tuple(parents)


@settings(deadline=None, max_examples=150)
@given(rows(), st.sampled_from([1, 6, 12, 96]))
def test_any_cut_gives_the_attention_and_gradients_of_the_whole_mask(row, most_rows):
    lengths, parents = row
    inputs = [heads(sum(lengths), count=n, seed=n).double().requires_grad_() for n in (4, 2, 2)]
    with mock.patch.object(attention_blocks, "ROWS", most_rows):
        ours = boundaries(lengths, parents)
        output, _ = packed_attention_forward(torch.nn.Module(), *inputs, None, **ours)
    expected = masked_attention(*inputs, lengths, parents)
    assert torch.allclose(output, expected, rtol=0, atol=1e-12)
    if sum(lengths):
        towards = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).double()
        for a, b in zip(
            torch.autograd.grad(output, inputs, towards),
            torch.autograd.grad(expected, inputs, towards),
            strict=True,
        ):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=150)
@given(rows(), st.sampled_from([1, 6, 12, 96]))
def test_runs_cover_the_row_and_are_short(row, most_rows):
    lengths, parents = row
    with mock.patch.object(attention_blocks, "ROWS", most_rows):
        blocks = AttentionBlocks(lengths, parents)
        assert sum(blocks.sizes) == sum(lengths)
    for run, size, prefix in zip(blocks.runs, blocks.sizes, blocks.prefixes, strict=True):
        assert size <= max(most_rows, *lengths[run.first : run.stop])
        before = 0 if prefix is None else blocks.sizes[prefix]
        assert before == (0 if run.prefix == -1 else lengths[run.prefix])


def test_the_written_out_example():
    blocks = AttentionBlocks((30, 40, 250, 20, 70, 120), (-1, -1, -1, 2, 2, -1))
    assert blocks.runs == [Run(0, 2), Run(2, 3), Run(3, 5, 2), Run(5, 6)]
    assert blocks.sizes == [70, 250, 90, 120]
    assert blocks.prefixes == [None, None, 1, None]
    masks = blocks.masks(torch.zeros(()))
    assert [None if mask is None else tuple(mask.shape) for mask in masks] == [
        *[(70, 70), None, (90, 340), None]
    ]


def test_short_prefixes_stay_with_their_branches():
    blocks = AttentionBlocks((9, 3, 4, 16, 3, 80, 10), (-1, 0, 0, -1, 3, -1, 5))
    assert blocks.runs == [Run(0, 5), Run(5, 7)]
    visible = blocks.masks(torch.zeros(()))[1] == 0
    assert visible[80:, :80].all()
    assert not visible[:80, 80:].any()


def test_masks_are_made_once_for_a_type():
    blocks = AttentionBlocks((2, 3))
    narrow = torch.zeros((), dtype=torch.bfloat16)
    assert blocks.masks(narrow)[0] is blocks.masks(narrow)[0]
    assert blocks.masks(narrow)[0].dtype == torch.bfloat16
    assert blocks.masks(torch.zeros(()))[0].dtype == torch.float32


@pytest.mark.parametrize("masked", [0, 1])
def test_large_numbers_of_one_sequence_leave_the_others_bit_by_bit(masked):
    lengths = (20, 30)
    query, key, value = (heads(50, seed=seed) for seed in range(3))
    ours = boundaries(lengths)
    before, _ = packed_attention_forward(torch.nn.Module(), query, key, value, None, **ours)
    changed = slice(0, 20) if masked == 0 else slice(20, 50)
    key[:, :, changed] *= 1e4
    value[:, :, changed] *= 1e30
    after, _ = packed_attention_forward(torch.nn.Module(), query, key, value, None, **ours)
    kept = slice(20, 50) if masked == 0 else slice(0, 20)
    assert torch.equal(before[:, kept], after[:, kept])
