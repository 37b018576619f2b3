"""Token counts: what a user may write, and draws that depend on (seed, epoch, index) alone."""

from __future__ import annotations

import copy
import pickle
from argparse import ArgumentTypeError
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from math import sqrt

import numpy as np
import pytest
import torch

from tokenflex import TokenCounts
from tokenflex.cli.options import counts_or_grids
from tokenflex.counts import is_one_count, join_calls, token_grid, token_grids, tokens_of


class TestTokenGrid:
    @pytest.mark.parametrize(
        ("count", "grid"),
        [
            (1, (1, 1)),
            (64, (8, 8)),
            (144, (12, 12)),
            (256, (16, 16)),
            (10**12, (10**6, 10**6)),
            ((3, 5), (3, 5)),
            ([5, 3], (5, 3)),
            (np.int64(9), (3, 3)),
            ((np.int32(2), 7), (2, 7)),
        ],
    )
    def test_a_square_or_a_pair(self, count, grid):
        actual = token_grid(count)
        assert actual == grid
        assert all(type(side) is int for side in actual)

    @pytest.mark.parametrize(
        ("count", "error", "message"),
        [
            (63, ValueError, r"^num_tokens .*perfect square.*63.*49 and 64"),
            (65, ValueError, r"^num_tokens .*perfect square.*65.*64 and 81"),
            (0, ValueError, r"^num_tokens .*at least 1.*0"),
            (-4, ValueError, r"^num_tokens .*at least 1.*-4"),
            ((0, 3), ValueError, r"^num_tokens .*at least 1.*\(0, 3\)"),
            ((3, -1), ValueError, r"^num_tokens .*at least 1.*\(3, -1\)"),
            ((1, 2, 3), TypeError, r"^num_tokens .*\(1, 2, 3\)"),
            ((4,), TypeError, r"^num_tokens .*\(4,\)"),
            (64.0, TypeError, r"^num_tokens .*int.*64\.0"),
            ("64", TypeError, r"^num_tokens .*int.*'64'"),
            ("88", TypeError, r"^num_tokens .*int.*'88'"),
            (True, TypeError, r"^num_tokens .*int.*True"),
            ((True, 2), TypeError, r"^num_tokens .*\(True, 2\)"),
            ((2.0, 2), TypeError, r"^num_tokens .*\(2\.0, 2\)"),
            (None, TypeError, r"^num_tokens .*int.*None"),
        ],
        ids=str,
    )
    def test_misuse(self, count, error, message):
        with pytest.raises(error, match=message):
            token_grid(count)

    def test_errors_carry_the_callers_name(self):
        with pytest.raises(ValueError, match=r"^num_image_tokens .*8"):
            token_grid(8, name="num_image_tokens")


class TestTokensOf:
    """Of counts that :func:`token_grid` has admitted where they came in."""

    @pytest.mark.parametrize(
        ("count", "tokens"), [(16, 16), (np.int64(16), 16), ((3, 5), 15), ([2, 1], 2)]
    )
    def test_is_the_size_of_the_grid(self, count, tokens):
        height, width = token_grid(count)
        assert tokens_of(count) == tokens == height * width


class TestTokenGrids:
    @pytest.mark.parametrize(
        ("counts", "grids"),
        [
            (64, [(8, 8), (8, 8)]),
            ((2, 3), [(2, 3), (2, 3)]),
            ([64, 144], [(8, 8), (12, 12)]),
            ([4, 9], [(2, 2), (3, 3)]),
            ([(2, 3), 16], [(2, 3), (4, 4)]),
            (((2, 3), (4, 1)), [(2, 3), (4, 1)]),
            ([[2, 3], [4, 1]], [(2, 3), (4, 1)]),
            (torch.tensor([64, 144]), [(8, 8), (12, 12)]),
            (np.array([64, 144]), [(8, 8), (12, 12)]),
        ],
    )
    def test_one_for_all_or_one_each(self, counts, grids):
        assert token_grids(counts, 2) == grids

    def test_a_tuple_of_two_ints_is_a_grid_and_a_list_is_not(self):
        assert is_one_count((4, 9))
        assert not is_one_count([4, 9])
        assert token_grids((4, 9), 2) == [(4, 9), (4, 9)]
        assert token_grids([4, 9], 2) == [(2, 2), (3, 3)]

    def test_no_images(self):
        assert token_grids([], 0) == token_grids(64, 0) == []

    @pytest.mark.parametrize(
        ("counts", "error", "message"),
        [
            ([64], ValueError, r"^num_tokens .*1 entries.*2 images"),
            ([64, 64, 64], ValueError, r"^num_tokens .*3 entries.*2 images"),
            ([], ValueError, r"^num_tokens .*0 entries.*2 images"),
            ([64, 65], ValueError, r"^num_tokens\[1\].*65.*64 and 81"),
            ([64, 0], ValueError, r"^num_tokens\[1\].*at least 1.*0"),
            ([64, 9.0], TypeError, r"^num_tokens\[1\].*9\.0"),
            ([True, 64], TypeError, r"^num_tokens\[0\].*True"),
            (["64", 64], TypeError, r"^num_tokens\[0\].*'64'"),
            (torch.tensor([64.0, 64.0]), TypeError, r"^num_tokens\[0\].*64\.0"),
            ("44", TypeError, r"^num_tokens .*'44'"),
            (6.5, TypeError, r"^num_tokens .*6\.5"),
            (None, TypeError, r"^num_tokens .*None"),
            (True, TypeError, r"^num_tokens .*True"),
            (np.array(64), (TypeError, ValueError), r"^num_tokens"),
            ({64, 144}, TypeError, r"^num_tokens .*(set|64, 144|144, 64)"),  # has no order
        ],
        ids=str,
    )
    def test_misuse(self, counts, error, message):
        with pytest.raises(error, match=message):
            token_grids(counts, 2)

    def test_errors_carry_the_callers_name(self):
        with pytest.raises(ValueError, match=r"^num_image_tokens\[0\] .*8"):
            token_grids([8], 1, name="num_image_tokens")


class TestDraws:
    DRAWS = 20_000

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"seed": 7},
            {"counts": (4, 9, 16, 25), "weights": (1, 1, 1, 1)},
            {"counts": (256, 64), "weights": (90, 10), "seed": 3},
        ],
    )
    @pytest.mark.parametrize("epoch", [0, 5])
    def test_frequencies_match_the_odds(self, options, epoch):
        counts = TokenCounts(**options)
        seen = Counter(counts.draw(index, epoch) for index in range(self.DRAWS))
        assert set(seen) == set(counts.counts)
        for count, weight in zip(counts.counts, counts.weights, strict=True):
            share = weight / sum(counts.weights)
            sigma = sqrt(share * (1 - share) / self.DRAWS)
            assert abs(seen[count] / self.DRAWS - share) < 3 * sigma

    def test_draws_do_not_depend_on_order_or_object(self):
        first = TokenCounts(seed=11)
        expected = {index: first.draw(index, 2) for index in range(200)}
        for other in (
            TokenCounts(seed=11),
            pickle.loads(pickle.dumps(first)),
            copy.deepcopy(first),
        ):
            assert {i: other.draw(i, 2) for i in reversed(range(200))} == expected
        assert {i: first.draw(i, 2) for i in range(200)} == expected

    @pytest.mark.parametrize(
        ("other", "epoch"), [(TokenCounts(seed=1), 0), (TokenCounts(), 1), (TokenCounts(seed=1), 1)]
    )
    def test_other_seeds_and_epochs_draw_independently(self, other, epoch):
        same = sum(
            other.draw(index, epoch) == TokenCounts().draw(index) for index in range(self.DRAWS)
        )
        # Independent draws agree with probability 0.2^2 + 0.3^2 + 0.5^2.
        sigma = sqrt(0.38 * 0.62 / self.DRAWS)
        assert abs(same / self.DRAWS - 0.38) < 4 * sigma

    def test_neighbouring_samples_draw_independently(self):
        counts = TokenCounts()
        draws = [counts.draw(index) for index in range(self.DRAWS + 1)]
        same = sum(a == b for a, b in pairwise(draws))
        assert abs(same / self.DRAWS - 0.38) < 4 * sqrt(0.38 * 0.62 / self.DRAWS)

    def test_seed_epoch_and_index_are_not_interchangeable(self):
        def draws(order):
            keys = ((a, b, c) for a in range(6) for b in range(6) for c in range(6))
            named = ({order[i]: key[i] for i in range(3)} for key in keys)
            return [TokenCounts(seed=k["s"]).draw(k["i"], epoch=k["e"]) for k in named]

        assert len({tuple(draws(order)) for order in ("sei", "esi", "ies", "sie")}) == 4

    def test_epoch_defaults_to_the_first(self):
        counts = TokenCounts(seed=5)
        assert [counts.draw(i) for i in range(99)] == [counts.draw(i, epoch=0) for i in range(99)]

    @pytest.mark.parametrize(
        ("seed", "epoch", "expected"),
        [
            (0, 0, [64, 144, 256, 256, 64, 256, 144, 144, 64, 256, 256, 256, 144, 256]),
            (0, 1, [256, 256, 256, 256, 256, 256, 256, 144, 256, 64, 256, 256, 144, 256]),
            (1, 0, [256, 144, 64, 64, 64, 64, 256, 256, 256, 144, 144, 256, 256, 256]),
            (2**63, 10, [256, 144, 256, 144, 256, 64, 64, 144, 256, 256, 64, 144, 256, 256]),
        ],
    )
    def test_pinned_draws(self, seed, epoch, expected):
        # A change here changes every training run that is resumed or repeated.
        counts = TokenCounts(seed=seed)
        indices = (*range(12), 10**6, 2**40)
        assert [counts.draw(index, epoch) for index in indices] == expected

    def test_a_count_of_no_weight_is_never_drawn(self):
        counts = TokenCounts(counts=(4, 9, 16), weights=(0, 1, 0))
        assert {counts.draw(index) for index in range(2000)} == {9}

    def test_odds_may_be_in_any_scale(self):
        shares, parts = TokenCounts(), TokenCounts(weights=(2, 3, 5))
        exact = TokenCounts(weights=(Fraction(1, 5), Fraction(3, 10), Fraction(1, 2)))
        for index in range(2000):
            assert shares.draw(index) == parts.draw(index) == exact.draw(index)

    @pytest.mark.parametrize("index", [np.int64(3), np.int32(3), np.uint8(3)])
    def test_numpy_indices_epochs_and_seeds_draw_as_python_ints(self, index):
        # Samplers hand out numpy's ints (np.random.permutation).
        counts = TokenCounts(seed=4)
        assert counts.draw(index) == counts.draw(3)
        assert counts.draw(0, epoch=index) == counts.draw(0, epoch=3)
        assert TokenCounts(seed=index).draw(0) == TokenCounts(seed=3).draw(0)

    @pytest.mark.parametrize("value", [1.5, "3", None], ids=repr)
    def test_index_and_epoch_must_be_ints(self, value):
        counts = TokenCounts()
        with pytest.raises(TypeError, match=r"^sample_index .*int"):
            counts.draw(value)
        with pytest.raises(TypeError, match=r"^epoch .*int"):
            counts.draw(0, epoch=value)


class TestTokenCounts:
    def test_default_is_the_papers(self):
        counts = TokenCounts()
        assert (counts.counts, counts.weights) == ((64, 144, 256), (0.2, 0.3, 0.5))
        assert counts.expected == pytest.approx(184, abs=1e-9)

    def test_expected_is_the_mean_under_the_odds(self):
        assert TokenCounts(counts=(4, 16), weights=(3, 1)).expected == 7
        assert TokenCounts(counts=(9,), weights=(0.1,)).expected == pytest.approx(9)

    def test_grids_beside_squares_are_drawn_as_given(self):
        counts = TokenCounts((4, (2, 3), [3, 2]), (1, 1, 2))
        assert counts.counts == (4, (2, 3), (3, 2))
        assert {counts.draw(index) for index in range(200)} == {4, (2, 3), (3, 2)}
        assert counts.expected == (4 + 6 + 2 * 6) / 4
        assert hash(counts) == hash(TokenCounts((4, (2, 3), (3, 2)), (1, 1, 2)))

    def test_a_grid_in_place_of_a_square_changes_no_draw(self):
        squares, grids = (TokenCounts((few, 9), (1, 1)) for few in (4, (1, 4)))
        names = {4: (1, 4), 9: 9}
        for index in range(200):
            assert grids.draw(index) == names[squares.draw(index)]

    def test_lists_are_taken_and_nothing_can_be_changed_later(self):
        counts = TokenCounts([4, 9], [1, 1])
        assert (counts.counts, counts.weights) == ((4, 9), (1, 1))
        assert hash(counts) == hash(TokenCounts((4, 9), (1, 1)))
        with pytest.raises(AttributeError):
            counts.seed = 1

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"counts": ()}, ValueError, r"counts and weights.*0 counts and 3 weights"),
            ({"counts": (), "weights": ()}, ValueError, r"counts.*0 counts and 0 weights"),
            ({"counts": (4, 9)}, ValueError, r"counts and weights.*2 counts and 3 weights"),
            ({"weights": (1, 1)}, ValueError, r"counts and weights.*3 counts and 2 weights"),
            ({"counts": (4, 9, 15)}, ValueError, r"^counts\[2\].*perfect square.*15"),
            ({"counts": (0, 4, 9)}, ValueError, r"^counts\[0\].*at least 1.*0"),
            ({"counts": (4, 9.0, 16)}, TypeError, r"^counts\[1\].*int.*9\.0"),
            ({"counts": (4, True, 16)}, TypeError, r"^counts\[1\].*int.*True"),
            ({"counts": (4, (3,), 16)}, TypeError, r"^counts\[1\].*\(height, width\).*\(3,\)"),
            ({"counts": (4, (3, 0), 16)}, ValueError, r"^counts\[1\].*at least 1.*\(3, 0\)"),
            ({"weights": (1, -1, 1)}, ValueError, r"^weights\[1\].*at least 0.*-1"),
            ({"weights": (1, float("nan"), 1)}, ValueError, r"^weights\[1\].*finite.*nan"),
            ({"weights": (1, 1, float("inf"))}, ValueError, r"^weights\[2\].*finite.*inf"),
            ({"weights": (1, "1", 1)}, TypeError, r"^weights\[1\].*number.*'1'"),
            ({"weights": (1, True, 1)}, TypeError, r"^weights\[1\].*number.*True"),
            ({"weights": (0, 0, 0)}, ValueError, r"^weights .*zero.*\(0, 0, 0\)"),
            ({"weights": (1e308, 1e308, 1e308)}, ValueError, r"^weights .*(sum|finite)"),
            ({"counts": 64, "weights": 1}, TypeError, r"^counts .*64"),
            ({"weights": None}, TypeError, r"^weights .*None"),
            ({"seed": 1.5}, TypeError, r"^seed .*int.*1\.5"),
            ({"seed": "0"}, TypeError, r"^seed .*int.*'0'"),
            ({"seed": None}, TypeError, r"^seed .*int.*None"),
        ],
        ids=lambda value: None if isinstance(value, type) else str(value)[:40],
    )
    def test_misuse(self, options, error, message):
        with pytest.raises(error, match=message):
            TokenCounts(**options)


@pytest.mark.parametrize(
    ("counts", "images", "grids"),
    [
        ([[4], [9]], 2, [(2, 2), (3, 3)]),
        ([[4, 9], [16]], 3, [(2, 2), (3, 3), (4, 4)]),
        ([[4, 9], [16, 1]], 4, [(2, 2), (3, 3), (4, 4), (1, 1)]),
        ([[4, 9]], 2, [(2, 2), (3, 3)]),
        ([[(2, 3)], [(1, 5), 4]], 3, [(2, 3), (1, 5), (2, 2)]),
        ([[], [4]], 1, [(2, 2)]),
        # Lists of two numbers that are as many as the images are grids.
        ([[4, 9], [16, 1]], 2, [(4, 9), (16, 1)]),
        ([[4, 9]], 1, [(4, 9)]),
    ],
)
def test_counts_of_several_calls_are_joined(counts, images, grids):
    """As a pipeline batches them: the number of images tells them from grids."""
    assert token_grids(counts, images) == grids


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(ValueError, match="1 entries for 3 images"):
        token_grids([[4, 9]], 3)
    assert join_calls([4, [9]], 2) == [4, [9]]
    assert join_calls("auto", 2) == "auto"


def test_a_wrong_count_of_an_option_names_its_list_where_there_is_one():
    for text, end in (("7", "squares are 4 and 9"), ("4,7", "squares are 4 and 9 in '4,7'")):
        with pytest.raises(ArgumentTypeError, match=f"{end}$"):
            counts_or_grids(text)
