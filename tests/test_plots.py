"""The plot of a report: squares are a line, all else is points with names, all of it legible."""

from __future__ import annotations

import warnings
from itertools import combinations
from typing import Any

import pytest
from matplotlib.text import Text

from tokenflex import plots
from tokenflex.plot_labels import spread
from tokenflex.plots import plot_accuracy, plot_baselines

KINDS = ("colour", "count", "majority", "odd", "read", "where")


def report_of(accuracy: dict[str, float], tokens: dict[str, float], **kinds: float) -> dict:
    """With all kinds at the same accuracy but for those that are named."""
    shares = dict.fromkeys(KINDS, 1.0) | kinds
    return {
        "accuracy": accuracy,
        "standard_error": dict.fromkeys(accuracy, 0.02),
        "vision_tokens_per_image": tokens,
        "accuracy_by_kind": {
            k: {c: v * share for c, v in accuracy.items()} for k, share in shares.items()
        },
    }


AUTO = report_of({"auto": 0.985}, {"auto": 9.5512}, read=0.95)
MIXED = report_of(
    {"4": 0.81, "9": 0.88, "2x8": 0.59, "16": 0.99, "auto": 0.985},
    {"4": 4.0, "9": 9.0, "2x8": 16.0, "16": 16.0, "auto": 9.5512},
    read=0.5,
)
SQUARES = report_of({"4": 0.81, "9": 0.88, "16": 1.0}, {"4": 4.0, "9": 9.0, "16": 16.0}, odd=0.9)
ONE = report_of({"64": 0.44}, {"64": 64.0}, read=0.1)
PERFECT = report_of({"4": 1.0, "auto": 1.0, "2x2": 1.0}, {"4": 4.0, "auto": 4.0, "2x2": 4.0})
TILED = report_of(
    {str(n): 0.1 for n in (1, 4, 9, 64, 256)},
    {str(n): 3.13333 * n for n in (1, 4, 9, 64, 256)},
)
MANY = {
    **SQUARES,
    "accuracy_by_kind": {
        f"a kind with a very long $name$ of {'many words ' * 12}{i}": SQUARES["accuracy"]
        for i in range(25)
    },
}
REPORTS = {
    "auto": AUTO,
    "mixed": MIXED,
    "squares": SQUARES,
    "one": ONE,
    "perfect": PERFECT,
    "tiled": TILED,
    "many kinds": MANY,
}


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """The two axes of a report's plot, as it is written; a warning is an error."""
    folder, close = tmp_path_factory.mktemp("plots"), plots.plt.close
    figures: dict[str, Any] = {}

    def draw(name: str):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            patch.setattr(plots.plt, "close", lambda figure: figures.setdefault(name, figure))
            if name not in figures:
                plot_accuracy(REPORTS[name], folder / "accuracy.png")
                figures[name].draw_without_rendering()
        return figures[name].axes

    yield draw
    for figure in figures.values():
        close(figure)


def points_of(axes) -> dict[str, list[tuple[float, float]]]:
    """Marker and line -> its points, of lines that hold any."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in axes.get_lines():
        if line.get_marker() != "None":
            style = f"{line.get_marker()} {line.get_linestyle()}"
            found.setdefault(style, []).extend(map(tuple, line.get_xydata().tolist()))
    return found


def test_squares_are_a_line_and_all_else_is_points_with_names(draw):
    left, right = draw("mixed")
    assert points_of(left) == {
        "o -": [(4.0, 0.81), (9.0, 0.88), (16.0, 0.99)],
        "s None": [(16.0, 0.59)],
        "* None": [(9.5512, 0.985)],
    }
    assert [text.get_text() for text in left.texts] == [
        *("0.81", "0.88", "auto 0.98", "2x8 0.59", "0.99"),
    ]
    drawn = points_of(right)
    assert {style: len(points) for style, points in drawn.items()} == {
        "o -": 3 * 6,
        "s None": 6,
        "* None": 6,
    }
    assert {"2x8", "auto"} < {text.get_text() for text in right.texts}


def test_a_label_is_beside_its_own_point(draw):
    left, right = draw("mixed")
    for text in left.texts:
        own = left.transData.transform(text.xy)
        box = Text.get_window_extent(text)
        gap = max(box.x0 - own[0], own[0] - box.x1, box.y0 - own[1], own[1] - box.y1)
        assert 0 <= gap < 25
    (name,) = [text for text in right.texts if text.get_text() == "2x8"]
    assert name.xy == (16.0, pytest.approx(0.59 * 0.5))


@pytest.mark.parametrize("name", REPORTS)
def test_every_word_is_on_the_picture(draw, name):
    axes = draw(name)
    page = axes[0].figure.bbox
    for one in axes:
        boxes = [Text.get_window_extent(word) for word in (*one.texts, one._left_title)]
        for box in (*boxes, one.xaxis.get_tightbbox(), one.yaxis.get_tightbbox()):
            if box is not None:
                assert page.x0 <= box.x0 < box.x1 <= page.x1
                assert page.y0 <= box.y0 < box.y1 <= page.y1


@pytest.mark.parametrize("name", ["auto", "mixed", "squares", "one", "perfect"])
def test_no_label_hides_another(draw, name):
    for axes in draw(name):
        words = [(text.get_text(), Text.get_window_extent(text)) for text in axes.texts]
        for (one, a), (other, b) in combinations(words, 2):
            assert not overlap(a, b), (one, other)


def overlap(a, b) -> bool:
    """Return True if they overlap by more than a pixel or two of leading."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 2 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2


@pytest.mark.parametrize("name", REPORTS)
def test_the_axis_of_accuracy_ends_at_one_and_holds_all_points(draw, name):
    for axes in draw(name):
        bottom, top = axes.get_ylim()
        assert top == 1
        for points in points_of(axes).values():
            assert all(bottom <= y <= 1 for _, y in points)
        for bars in axes.collections:
            for path in bars.get_paths():
                assert path.vertices[:, 1].min() >= 0
                assert path.vertices[:, 1].max() <= 1


@pytest.mark.parametrize(
    ("name", "ticks"),
    [
        ("mixed", ["16", "9", "4"]),
        ("one", ["64"]),
        ("tiled", ["802.1", "200.5", "28.2"]),  # 1 and 4 are too near to 9
    ],
)
def test_ticks_are_the_square_counts_that_have_room(draw, name, ticks):
    for axes in draw(name):
        assert [label.get_text() for label in axes.get_xticklabels()] == ticks


def test_without_squares_ticks_are_whole_numbers_around_the_points(draw):
    for axes in draw("auto"):
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert len(ticks) > 1
        assert all(tick == int(tick) for tick in ticks)
        assert min(ticks) < 9.5512 < max(ticks)


def test_heights_are_moved_apart_as_little_as_it_takes():
    assert spread([]) == []
    assert spread([0.9, 0.5], 0.1) == [0.9, 0.5]
    assert spread([1.0, 1.0, 0.5], 0.1) == pytest.approx([1.0, 0.9, 0.5])
    assert spread([0.0, 0.0], 0.1) == pytest.approx([0.1, 0.0])
    assert spread([0.5] * 5, 0.9) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


# ---- Baselines.


def with_baselines(report: dict, **left_out: str) -> dict:
    """A report in which no question is difficult at the least count."""
    squares = sorted(report["accuracy"], key=report["vision_tokens_per_image"].__getitem__)
    *below, full = squares
    methods = {
        name: dict.fromkeys(below, share)
        for name, share in (("resized", 0.5), ("enlarged", 0.9), ("random", 0.2))
        if name not in left_out
    }
    tokens = report["vision_tokens_per_image"]
    costs = {name: {c: tokens[c] for c in below} for name in methods}
    costs["enlarged"] = dict.fromkeys(below, tokens[full])
    shares: dict = dict.fromkeys(below, 0.4) | {below[0]: None}
    return report | {
        "baselines": {
            "full": full,
            "accuracy": methods,
            "standard_error": {name: dict.fromkeys(below, 0.01) for name in methods},
            "vision_tokens_per_image": costs,
            "left_out": left_out,
            "difficult": {
                "questions": {label: i for i, label in enumerate(below)},
                "accuracy": {"model": shares, "random": shares},
                "standard_error": {"model": shares, "random": dict.fromkeys(below)},
            },
        }
    }


@pytest.mark.parametrize("left_out", [{}, {"resized": "a reason"}])
def test_baselines_are_drawn_beside_the_model(tmp_path, monkeypatch, left_out):
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_baselines(with_baselines(SQUARES, **left_out), tmp_path / "baselines.png")
        (figure,) = drawn
        figure.draw_without_rendering()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [
        *(["resized"] if not left_out else []),
        "enlarged (costs 16)",
        "random",
        "model",
    ]
    every, difficult = figure.axes
    lines = {tuple(line.get_xdata()) for line in every.lines if len(line.get_xdata()) > 1}
    assert lines == {(4.0, 9.0, 16.0), (4.0, 9.0)}  # the model also at the full count
    assert {tuple(line.get_ydata()) for line in difficult.lines} == {(0.4,)}
    texts = [text.get_text() for text in difficult.texts]
    assert texts == ["0 questions", "1 question"]


def test_a_report_without_baselines_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report must hold baselines, got None"):
        plot_baselines(SQUARES, tmp_path / "baselines.png")


def test_lines_show_every_accuracy_with_its_interval(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    lines = {"fitted": [(9, 0.5, 0.01), (4, 0.02, 0.05)], "distilled": [(16, 1.0, 0.1)]}
    plots.plot_lines(lines, tmp_path / "a.png", logarithmic=True)
    [axes] = figures[0].axes
    drawn = {bars.get_label(): bars for bars in axes.containers}
    assert [*drawn] == ["fitted", "distilled"]
    assert drawn["fitted"][0].get_xydata().tolist() == [[4, 0.02], [9, 0.5]]
    ends = [bar.get_segments() for bars in drawn.values() for bar in bars[2]]
    heights = [end[1] for bar in ends for segment in bar for end in segment]
    assert heights == pytest.approx([0, 0.118, 0.4804, 0.5196, 0.804, 1])  # none below 0, above 1
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "9", "16"]
    plots.plt.close(figures[0])
    with pytest.raises(ValueError, match="at least one point"):
        plots.plot_lines({"fitted": []}, tmp_path / "a.png")
