"""`bin_pack`: first-fit-decreasing, the same from both backends."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex_kernels import bin_pack

BACKENDS = ("reference", "auto")


def pack_with(backend, lengths, capacity):
    with patch.dict("os.environ", TOKENFLEX_BACKEND=backend):
        return bin_pack(lengths, capacity)


@pytest.mark.parametrize("backend", BACKENDS)
@given(lengths=st.lists(st.integers(0, 20), max_size=60), capacity=st.integers(20, 50))
@settings(deadline=None, max_examples=100)
def test_bins_hold_every_sample_once_within_capacity(backend, lengths, capacity):
    bins = pack_with(backend, lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in members) for members in bins]
    assert all(members for members in bins)
    assert all(load <= capacity for load in loads)
    # First fit: whatever lies in a later bin found no room in an earlier one.
    for earlier in range(len(bins)):
        for later in bins[earlier + 1 :]:
            assert (
                loads[earlier] + lengths[later[0]] > capacity
                or lengths[later[0]] > lengths[bins[earlier][-1]]
            )


@given(lengths=st.lists(st.integers(0, 30), max_size=80), capacity=st.integers(30, 90))
@settings(deadline=None, max_examples=150)
def test_the_tree_finds_the_bins_of_the_plain_scan(lengths, capacity):
    assert pack_with("auto", lengths, capacity) == pack_with("reference", lengths, capacity)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_index(backend):
    assert pack_with(backend, [4, 6, 6, 4, 0], 10) == [[1, 0, 4], [2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(3, 5, 2), np.array([3, 5, 2]), torch.tensor([3, 5, 2])])
def test_lengths_may_be_a_sequence_an_array_or_a_tensor(backend, lengths):
    assert pack_with(backend, lengths, 5) == [[1], [0, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_lengths_are_read_by_their_stride(backend):
    assert pack_with(backend, np.array([3, 9, 5, 9, 2, 9])[::2], 5) == [[1], [0, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples_make_no_bins(backend):
    assert pack_with(backend, [], 8) == []


def test_a_hundred_thousand_samples_take_no_quadratic_time():
    lengths = np.random.default_rng(0).integers(1, 2049, 100_000)
    bins = bin_pack(lengths, 4096)
    assert sum(len(members) for members in bins) == 100_000
    assert len(bins) <= 1.01 * np.ceil(lengths.sum() / 4096)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "capacity", "error", "message"),
    [
        ([3, 9], 8, ValueError, r"lengths\[1\] = 9 does not fit a capacity of 8"),
        ([3, -2], 8, ValueError, r"lengths\[1\] must be at least 0, got -2"),
        ([3], 0, ValueError, "capacity must be at least 1, got 0"),
        ([], -5, ValueError, "capacity must be at least 1, got -5"),
        ([1.5], 8, TypeError, "lengths must hold ints, got float64"),
        ([1], 8.0, TypeError, "capacity must be an int, got 8.0"),
    ],
)
def test_refuses(backend, lengths, capacity, error, message):
    with pytest.raises(error, match=message):
        pack_with(backend, lengths, capacity)
