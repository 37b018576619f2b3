"""The order of training: each sample once an epoch, the same positions wherever one starts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.data.order import EpochOrder, StepSampler


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
