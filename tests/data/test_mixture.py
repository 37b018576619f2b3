"""Mixtures: weights kept in every block, each part's epochs complete, positions known at once."""

from __future__ import annotations

from collections import Counter

import pytest

from tokenflex.data.mixture import BLOCK, Mixture, MixtureOrder
from tokenflex.data.order import EpochOrder
from tokenflex.data.samples import DataExhaustedError, Sample
from tokenflex.digits.dataset import DigitsDataset


def drawn(order: MixtureOrder, first: int, last: int) -> list[tuple[int, int]]:
    return [order[position] for position in range(first, last)]


def test_each_block_holds_the_weights_whatever_the_sizes():
    order = MixtureOrder([10, 500], [3, 1], seed=0)
    for block in range(3):
        keys = drawn(order, block * BLOCK, (block + 1) * BLOCK)
        assert Counter(index < 10 for _, index in keys) == {True: 750, False: 250}


def test_weights_that_do_not_divide_a_block_fill_it():
    keys = drawn(MixtureOrder([9, 9, 9], [1, 1, 1], seed=0), 0, BLOCK)
    assert sorted(Counter(index // 9 for _, index in keys).values()) == [333, 333, 334]


def test_each_part_shows_every_sample_once_an_epoch_of_its_own():
    keys = drawn(MixtureOrder([40, 500], [3, 1], seed=1), 0, 3 * BLOCK)
    for first, last in ((0, 40), (40, 540)):
        of_part = [key for key in keys if first <= key[1] < last]
        size = last - first
        for epoch in range(len(of_part) // size):
            seen = of_part[epoch * size : (epoch + 1) * size]
            assert sorted(seen) == [(epoch, index) for index in range(first, last)]


def test_a_position_is_the_same_in_whatever_order_it_is_asked():
    straight = drawn(MixtureOrder([7, 30, 4], [1, 2, 5], seed=3), 0, 2 * BLOCK + 50)
    jumping = MixtureOrder([7, 30, 4], [1, 2, 5], seed=3)
    for position in (2 * BLOCK + 49, 3, BLOCK, 0, BLOCK - 1, 2 * BLOCK):
        assert jumping[position] == straight[position]


def test_parts_are_mixed_within_a_block_and_seeds_differ():
    parts = [
        tuple(index < 10 for _, index in drawn(MixtureOrder([10, 10], [1, 1], seed), 0, 60))
        for seed in range(3)
    ]
    assert len(set(parts)) == 3
    assert all(10 < sum(part) < 50 for part in parts)


def test_a_weight_too_small_for_a_block_is_refused():
    with pytest.raises(ValueError, match=r"at least 1/1000 of their sum, got \(1, 5000\)"):
        MixtureOrder([5, 5], [1, 5000], seed=0)


def test_a_mixture_holds_its_parts_one_after_another():
    parts = [DigitsDataset("train", size=3), DigitsDataset("test", size=2)]
    mixture = Mixture(parts)
    assert len(mixture) == 5
    names = [mixture[index].id for index in range(5)]
    assert names == [part[i].id for part in parts for i in range(len(part))]
    assert [mixture.outline(index).id for index in range(5)] == names
    assert mixture.outline(4) == Sample(names[4], ((32, 32),), mixture[4].conversations)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=r"0\.\.4"):
            mixture[index]


class Endless:
    """A stream: a sample for every index, and no length."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        raise TypeError("a stream")

    def __getitem__(self, index: int) -> str:
        return f"{self.name}{index}"

    def outline(self, index: int) -> str:
        return f"outline of {self[index]}"


def test_streams_take_part_and_go_on_where_they_were():
    parts = [Endless("a"), [f"s{i}" for i in range(10)], Endless("b")]
    mixture, order = Mixture(parts), MixtureOrder([None, 10, None], [1, 1, 2], seed=0)
    keys = drawn(order, 0, 2 * BLOCK)
    names = [mixture[index] for _, index in keys]
    assert [name for name in names if name[0] == "a"] == [f"a{i}" for i in range(500)]
    assert [name for name in names if name[0] == "b"] == [f"b{i}" for i in range(1000)]
    sized = [(epoch, name) for (epoch, _), name in zip(keys, names, strict=True) if name[0] == "s"]
    plain = EpochOrder(10, 1)  # the part's place is added to the seed
    assert sized == [(plain[i][0], f"s{plain[i][1]}") for i in range(500)]
    assert len({index for _, index in keys}) == 10 + 500 + 1000  # one index, one sample
    assert mixture.outline(keys[names.index("b7")][1]) == "outline of b7"


def test_a_mixture_with_a_stream_has_no_length():
    mixture = Mixture([[1, 2], Endless("a")])
    with pytest.raises(TypeError, match="a mixture with a stream in it has no length"):
        len(mixture)
    with pytest.raises(IndexError, match="got -1"):
        mixture[-1]


@pytest.mark.parametrize("epochs", [(2, None), (None, 3), (2, 3), (50, 60)])
def test_a_mixture_ends_where_its_first_part_does(epochs):
    sizes, weights = [40, 100], [1, 3]
    order = MixtureOrder(sizes, weights, 5, epochs)
    free = MixtureOrder(sizes, weights, 5)
    assert free.end is None
    used, end = [0, 0], 0  # by hand: walk until a part is asked for more than it may give
    while True:
        part = int(free[end][1] >= 40)
        used[part] += 1
        if epochs[part] is not None and used[part] > epochs[part] * sizes[part]:
            break
        end += 1
    assert order.end == end
    assert drawn(order, max(0, end - 50), end) == drawn(free, max(0, end - 50), end)
    with pytest.raises(DataExhaustedError):
        order[end]
