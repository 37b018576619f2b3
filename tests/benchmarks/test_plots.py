"""The content of the pictures: directions, units and lines."""

from __future__ import annotations

from benchmarks import plots
from tests.benchmarks.rows import row


def widths(axes):
    return [round(bar.get_width(), 6) for bar in axes.patches]


def labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_right_of_one_means_that_we_are_faster():
    """The bar is the worst case, each case a dot, small and narrow ones too."""
    rows = [
        row("pack_embeddings", "16x D=2048", "tokenflex", 10),
        row("pack_embeddings", "16x D=2048", "index_put", 30),
        row("pack_embeddings", "2x D=64", "tokenflex", 10, tokens=16),
        row("pack_embeddings", "2x D=64", "index_put", 5, tokens=16),
        row("pack_embeddings", "16x D=2048", "nested", 20),
    ]
    (axes,) = plots.speed_up(rows).axes
    assert widths(axes) == [0.5 - 1, 2 - 1]
    assert [bar.get_x() for bar in axes.patches] == [1, 1]
    assert [text.get_text() for text in axes.texts] == ["0.50 at T=16", "2.00 at T=8192"]
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[3, 0.5], [2]]
    assert labels(axes)[0] == "pack_embeddings, forward (triton):  index_put"


def test_a_speed_up_by_the_wall_clock_says_so():
    rows = [
        row("merge_vision", "4x", "tokenflex", 1, eager_us=60),
        row("merge_vision", "4x", "masked_scatter", 100, eager_us=120, timing="eager"),
    ]
    (axes,) = plots.speed_up(rows).axes
    assert widths(axes) == [1]
    assert labels(axes) == ["merge_vision, forward (triton):  masked_scatter, wall clock"]


def test_throughput_has_the_measured_ceiling_as_a_line():
    rows = [
        row("ceiling", "2 GiB", "copy", 1, gb_per_s=4300),
        row("ceiling", "8192^3", "matmul", 1, tflop_per_s=780),
        row("pool_norm", "128 images, n=8", "tokenflex", 1, tokens=64, gb_per_s=3000),
        row("pool_norm", "128 images, n=16", "tokenflex", 1, tokens=256, gb_per_s=4000),
        row("swiglu", "T=8192", "tokenflex", 1, tflop_per_s=700),
    ]
    pooling, gate_up = plots.throughput(rows).axes
    series, ceiling = pooling.lines
    assert (list(series.get_xdata()), list(series.get_ydata())) == ([64, 256], [3000, 4000])
    assert (set(ceiling.get_ydata()), ceiling.get_linestyle()) == ({4300}, "--")
    assert "measured copy: 4.3e+03 GB/s" in [text.get_text() for text in pooling.texts]
    assert set(gate_up.lines[-1].get_ydata()) == {780}
