"""A budget is never exceeded, no image goes without, and tokens go where they are worth most."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.models.test_modeling import GENERATION
from tests.models.test_tiling import tiling_processor
from tests.models.tiny import picture, tiny_model
from tests.routing.planted import FixedRouter
from tokenflex.digits.processor import digits_processor
from tokenflex.models.vision import EncodedImages
from tokenflex.routing.budget import detail_kept, spread
from tokenflex.routing.storage import attach_router

CHOICES = (4, 9, 16)


@st.composite
def prompts(draw):
    """Worth of each image at each count, its costs, and a budget that is enough for the least."""
    tiles = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    worth = [draw(st.lists(st.floats(0, 1), min_size=3, max_size=3)) for _ in tiles]
    costs = [[count * n for count in CHOICES] for n in tiles]
    least = 4 * sum(tiles)
    return worth, costs, draw(st.integers(least, 5 * least))


@given(prompts())
def test_a_budget_is_kept_and_nothing_that_fits_and_gains_is_left(prompt):
    worth, costs, budget = prompt
    chosen = spread(worth, costs, budget, name="row 0")
    spent = sum(cost[j] for cost, j in zip(costs, chosen, strict=True))
    assert spent <= budget
    assert chosen == spread(worth, costs, budget, name="row 0")
    for image, now in enumerate(chosen):
        assert worth[image][now] >= worth[image][0]
        for j in range(now + 1, 3):
            fits = spent + costs[image][j] - costs[image][now] <= budget
            assert not fits or worth[image][j] <= worth[image][now]


@given(prompts())
def test_it_is_no_worse_than_half_of_the_best_there_is(prompt):
    """Greedy by density, or its single best upgrade: a known bound of knapsack."""
    worth, costs, budget = prompt
    chosen = spread(worth, costs, budget, name="row 0")
    base = sum(one[0] for one in worth)
    gained = sum(one[j] for one, j in zip(worth, chosen, strict=True)) - base
    single = max(
        [
            worth[i][j] - worth[i][0]
            for i, j in product(range(len(worth)), range(3))
            if costs[i][j] - costs[i][0] <= budget - sum(cost[0] for cost in costs)
        ]
    )
    best = max(
        sum(one[j] for one, j in zip(worth, combination, strict=True)) - base
        for combination in product(range(3), repeat=len(worth))
        if sum(cost[j] for cost, j in zip(costs, combination, strict=True)) <= budget
    )
    assert gained <= best + 1e-9
    assert max(gained, single) >= best / 2 - 1e-9


def test_the_first_tokens_go_where_they_are_worth_most():
    costs = [[4, 9, 16]] * 3
    worth = [[0.5, 0.5, 0.6], [0.1, 0.8, 0.9], [0.4, 0.5, 0.95]]
    by_budget = {n: spread(worth, costs, n, name="row 0") for n in (12, 16, 17, 29, 36, 48)}
    assert by_budget == {
        12: [0, 0, 0],
        16: [0, 0, 0],
        17: [0, 1, 0],  # .7 for 5
        29: [0, 1, 2],  # then .55 for 12, before .1 for 7
        36: [0, 2, 2],
        48: [2, 2, 2],
    }


def test_of_equal_images_the_first_is_upgraded():
    assert spread([[0, 1, 1]] * 3, [[4, 9, 16]] * 3, 22, name="row 0") == [1, 1, 0]


@pytest.mark.parametrize("budget", [11, 1])
def test_too_small_a_budget_names_both_numbers_and_the_prompt(budget):
    message = f"at least 12, .* the 3 images of row 2 can have, got {budget}"
    with pytest.raises(ValueError, match=message):
        spread([[0, 1]] * 3, [[4, 9]] * 3, budget, name="row 2")


@pytest.mark.parametrize("budget", [0, -3, 2.5, True])
def test_a_budget_is_a_positive_int(budget):
    with pytest.raises((ValueError, TypeError), match="budget must be"):
        spread([[0, 1]], [[4, 9]], budget, name="row 0")


# ---- by content


def pattern(side: int) -> torch.Tensor:
    """A checkerboard of squares of ``side`` patches, 16 x 16 patches of 4 features."""
    board = (torch.arange(16)[:, None] // side + torch.arange(16)[None] // side) % 2
    vectors = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    return vectors[board.flatten()]


def test_detail_is_kept_from_the_count_on_that_resolves_it():
    flat, coarse, fine = torch.ones(256, 4) * pattern(16)[:1], pattern(8), pattern(4)
    encoded = EncodedImages(torch.cat([flat, coarse, fine, fine]), ((16, 16),) * 4)
    kept = detail_kept(encoded, [1, 1, 2], [(2, 2), (4, 4)], "adaptive")
    assert kept[0] == pytest.approx([0, 0], abs=1e-9)
    assert kept[1] == pytest.approx([kept[1, 0]] * 2)
    assert kept[1, 0] > 0.1
    assert kept[2] == pytest.approx([0, 2 * kept[1, 0]], abs=1e-6)  # of two tiles


def test_without_a_router_a_page_of_print_gets_more_than_a_blank_one():
    model, processor = tiny_model(trained_num_image_tokens=[16, 4, 9]), digits_processor()
    blank = Image.new("RGB", (32, 32), "white")
    half = np.zeros((32, 32, 3), dtype=np.uint8)
    half[8:24, 8:24] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    text = "<image> <image> <image> odd"
    inputs = processor(
        images=[blank, Image.fromarray(half), blank], text=text, num_image_tokens="auto"
    )
    for budget, expected in ((12, [4, 4, 4]), (24, [4, 16, 4]), (48, [16, 16, 16])):
        chosen = model.choose_counts(**inputs, budget=budget)["num_image_tokens"]
        assert chosen == expected
    with pytest.raises(ValueError, match="at least 12"):
        model.choose_counts(**inputs, budget=11)


def test_without_a_router_and_unknown_counts_there_is_nothing_to_choose_from():
    inputs = digits_processor()(images=picture(1), text="<image> odd", num_image_tokens="auto")
    with pytest.raises(ValueError, match="trained_num_image_tokens must name the counts"):
        tiny_model().choose_counts(**inputs, budget=99)


# ---- in use


@pytest.mark.parametrize("budget", [28, 60, 63, 200])
def test_each_prompt_of_a_batch_has_the_budget_for_itself(budget):
    model, processor = tiny_model(), tiling_processor(6, use_thumbnail=True)
    attach_router(model, FixedRouter([0.2, 0.4, 0.9], [0.1, 0.8, 0.9]))
    images = [[picture(1, (32, 64)), picture(2)], [], [picture(3, (64, 96))]]
    texts = ["<image> odd <image>", "count", "read <image>"]
    inputs = processor(images=images, text=texts, num_image_tokens="auto")
    chosen = model.choose_counts(**inputs, budget=budget)
    per_row = (chosen["input_ids"] == 3).sum(-1).tolist()
    assert max(per_row) <= budget
    assert per_row[1] == 0
    alone = [
        model.choose_counts(
            **processor(images=one or None, text=text, num_image_tokens="auto"), budget=budget
        )["input_ids"]
        for one, text in zip(images, texts, strict=True)
    ]
    assert [int((ids == 3).sum()) for ids in alone][1:2] == per_row[1:2]
    output = model.generate(**inputs, budget=budget, **GENERATION)
    new = output[:, inputs["input_ids"].shape[1] :]
    expected = model.generate(**chosen, **GENERATION)[:, chosen["input_ids"].shape[1] :]
    assert torch.equal(new, expected)


def test_the_router_spreads_a_budget_where_there_is_one():
    model, processor = tiny_model(), digits_processor()
    attach_router(model, FixedRouter([0.5, 0.5, 0.5], [0.1, 0.2, 0.9], penalty=5.0))
    inputs = processor(
        images=[picture(1), picture(2)], text="<image> <image> odd", num_image_tokens="auto"
    )
    assert model.choose_counts(**inputs, budget=32)["num_image_tokens"] == [4, 16]
    assert model.choose_counts(**inputs, budget=19)["num_image_tokens"] == [4, 9]
    assert model.choose_counts(**inputs, budget=32, penalty=2.0)["num_image_tokens"] == [4, 4]
