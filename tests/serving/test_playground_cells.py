"""Windows of the tokens, as the projector pools them, and the places where they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflex.serving.playground.cells import COLOURS, draw_cells, draw_panels, windows
from tokenflex.serving.playground.subjects import Panel
from tokenflex_kernels import pool_norm

RED, BLUE, ORANGE, _ = COLOURS


def is_frame(drawn: Image.Image, colour: tuple) -> np.ndarray:
    """bool [height, width]: the pixels of exactly a frame's colour."""
    return (np.asarray(drawn) == colour).all(-1)


def white(width: int = 64, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


@pytest.mark.parametrize("mode", ["adaptive", "resize"])
@pytest.mark.parametrize(("patches", "tokens"), [(8, 2), (8, 3), (27, 16), (3, 5), (1, 4)])
def test_a_window_holds_the_patches_that_its_token_depends_on(mode, patches, tokens):
    features = torch.rand(patches, 1, requires_grad=True)
    pooled = pool_norm(features, [(patches, 1)], [(tokens, 1)], mode=mode)
    for token, (first, end) in enumerate(windows(patches, tokens, mode)):
        (gradient,) = torch.autograd.grad(pooled[token, 0], features, retain_graph=True)
        assert gradient.nonzero()[:, 0].tolist() == [*range(first, end)]


def test_windows_overlap_where_the_count_does_not_divide_the_patches():
    assert windows(8, 2) == [(0, 4), (4, 8)]
    assert windows(8, 3) == [(0, 3), (2, 6), (5, 8)]


def test_pictures_are_enlarged_and_keep_their_shape():
    assert draw_cells(white(32, 16), (8, 8), (2, 2), side=480).size == (480, 240)
    assert draw_cells(white(1600, 2400), (8, 8), (2, 2), side=480).size == (320, 480)
    assert draw_cells(white(1, 900), (8, 8), (2, 2), side=480).size == (1, 480)


def test_single_pixels_of_a_tiny_picture_stay_sharp():
    checks = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8))
    drawn = np.asarray(draw_cells(checks, (1, 1), (1, 1), side=480))
    assert len(np.unique(drawn[100:300, 100:300].reshape(-1, 3), axis=0)) == 2


def test_a_frame_stands_at_the_edges_of_its_window():
    drawn = draw_cells(white(), (8, 8), (2, 2), side=480)
    rows, columns = is_frame(drawn, RED).nonzero()  # token 1
    assert rows.max() < 240
    assert columns.max() < 240
    assert rows.max() > 234
    assert columns.max() > 234
    rows, columns = is_frame(drawn, ORANGE).nonzero()  # token 3, below it
    assert 240 <= rows.min() < 246
    assert columns.max() < 240


def test_where_windows_overlap_the_fill_is_denser():
    """Of 8 patches, three tokens see 0-2, 2-5 and 5-7: patches 2 and 5 are seen twice."""
    drawn = np.asarray(draw_cells(white(), (8, 1), (3, 1), side=480)).astype(int)
    darkness = [255 * 3 - drawn[round(60 * (row + 0.4)), 240].sum() for row in range(8)]
    once, twice = [darkness[row] for row in (0, 1, 3, 4, 6, 7)], [darkness[2], darkness[5]]
    assert min(once) > 0
    assert min(twice) > 1.4 * max(once)
    assert is_frame(Image.fromarray(drawn.astype(np.uint8)), RED).any()


def test_all_tiles_are_drawn_each_with_its_own_windows():
    drawn = draw_cells(white(96, 64), (8, 8), (1, 2), tiles=(2, 3), side=480)
    framed = is_frame(drawn, RED) | is_frame(drawn, BLUE)
    framed |= is_frame(drawn, ORANGE) | is_frame(drawn, COLOURS[3])
    for row in range(2):
        for column in range(3):
            tile = framed[160 * row : 160 * (row + 1), 160 * column : 160 * (column + 1)]
            for half in (tile[:, :80], tile[:, 80:]):  # two tokens side by side
                rows, columns = half.nonzero()
                assert rows.max() - rows.min() > 140
                assert columns.max() - columns.min() > 60


def test_every_tile_of_every_panel_is_on_the_sheet():
    panels = [Panel(white(), (1, 1), (8, 8)) for _ in range(5)]
    sheet = draw_panels(panels, 4, side=480)
    assert sheet.size == (3 * 160 + 24, 2 * 160 + 12)
    red = is_frame(sheet, RED)
    drawn = [
        red[172 * row : 172 * row + 160, 172 * column : 172 * column + 160].any()
        for row in range(2)
        for column in range(3)
    ]
    assert drawn == [True] * 5 + [False]


def test_tokens_are_numbered_through_all_panels_where_there_is_room():
    first = draw_panels([Panel(white(), (1, 1), (8, 8))], 4, side=240)
    pair = draw_panels([Panel(white(), (1, 1), (8, 8))] * 2, 4, side=480)
    assert pair.crop((0, 0, 240, 240)).tobytes() == first.tobytes()
    second = draw_cells(white(), (8, 8), (2, 2), side=240, first_number=5)
    assert second.tobytes() != first.tobytes()
    assert pair.crop((252, 0, 492, 240)).tobytes() == second.tobytes()


def test_a_fine_grid_is_drawn_too():
    drawn = draw_cells(white(), (32, 32), (32, 32), side=128)
    assert is_frame(drawn, RED).any()
