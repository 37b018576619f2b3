"""The order of training: each sample once an epoch, the same positions wherever one starts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.data.order import EpochOrder, StepSampler, load_in_order
from tokenflex.data.samples import DataExhaustedError


def walk(order: EpochOrder, first: int, last: int) -> list[tuple[int, int]]:
    return [order[position] for position in range(first, last)]


@given(size=st.integers(1, 30), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=40)
def test_each_epoch_is_a_permutation(size, seed):
    keys = walk(EpochOrder(size, seed), 0, 3 * size)
    for epoch in range(3):
        part = keys[epoch * size : (epoch + 1) * size]
        assert [key[0] for key in part] == [epoch] * size
        assert sorted(key[1] for key in part) == list(range(size))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(index for _, index in walk(EpochOrder(50, seed), 50 * epoch, 50 * (epoch + 1)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert tuple(range(50)) not in orders


@given(size=st.integers(1, 20), positions=st.lists(st.integers(0, 100), min_size=1, max_size=20))
@settings(deadline=None, max_examples=40)
def test_a_position_is_the_same_in_whatever_order_it_is_asked(size, positions):
    straight = walk(EpochOrder(size, 3), 0, 101)
    jumping = EpochOrder(size, 3)
    assert [jumping[p] for p in positions] == [straight[p] for p in positions]


@given(
    size=st.integers(1, 20),
    steps=st.integers(0, 8),
    batch_size=st.integers(1, 9),
    skipped=st.integers(0, 8),
)
@settings(deadline=None, max_examples=60)
def test_starting_anywhere_gives_the_tail_of_the_whole_walk(size, steps, batch_size, skipped):
    skipped = min(skipped, steps)

    def batches(done: int) -> list[list[tuple[int, int]]]:
        sampler = StepSampler(
            EpochOrder(size, 0),
            first_position=5 + done * batch_size,
            steps=steps - done,
            batch_size=batch_size,
        )
        assert len(sampler) == steps - done
        return list(sampler)

    assert batches(skipped) == batches(0)[skipped:]
    flat = [key for batch in batches(0) for key in batch]
    assert flat == walk(EpochOrder(size, 0), 5, 5 + steps * batch_size)


def test_a_bound_on_epochs_changes_nothing_before_it_and_gives_nothing_after():
    bounded = EpochOrder(7, 3, epochs=2)
    assert bounded.end == 14
    assert walk(bounded, 0, 14) == walk(EpochOrder(7, 3), 0, 14)
    for position in (14, 15, 100):
        with pytest.raises(DataExhaustedError, match=f"2 epochs of 7 samples hold no.*{position}"):
            bounded[position]


def test_a_step_larger_than_the_data_takes_each_sample_once_an_epoch():
    (step,) = StepSampler(EpochOrder(3, 0), first_position=0, steps=1, batch_size=8)
    assert sorted(step)[:6] == [(epoch, index) for epoch in (0, 1) for index in range(3)]
    assert len(set(step)) == 8


def test_an_empty_data_set_has_no_order():
    with pytest.raises(ValueError, match="num_samples must be at least 1 to train on, got 0"):
        EpochOrder(0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_steps_before_the_data_runs_out_are_all_given(workers):
    """A loader asks for keys ahead: the end of the data must not swallow what was asked for."""
    sampler = StepSampler(EpochOrder(10, 0, epochs=2), first_position=0, steps=99, batch_size=3)
    steps = load_in_order(list, sampler, workers=workers)
    assert sum(len(next(steps)) for _ in range(6)) == 18
    with pytest.raises(DataExhaustedError, match="2 epochs of 10 samples"):
        next(steps)
