"""The content of the picture: directions, marks and labels."""

from __future__ import annotations

import re

import pytest
from matplotlib.colors import same_color

from benchmarks import plots
from benchmarks.results import ROOT
from tests.benchmarks.rows import row


def axes_of(*machine, other=()):
    return plots.speed_up(plots.panels_of(machine) + plots.panels_of(other)).axes


def dots(axes):
    """Return (x, whether it is marked as slower) of each dot."""
    lines = [line for line in axes.lines if line.get_marker() != "None"]
    colours = [line.get_markeredgecolor() for line in lines]
    slower = [same_color(colour, plots.LOSS) for colour in colours]
    return sorted((line.get_xdata()[0], at) for line, at in zip(lines, slower, strict=True))


def labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_right_of_one_means_that_we_are_faster_and_every_case_is_a_dot():
    rows = [
        row("pack_embeddings", "16x D=2048", "tokenflex", 10),
        row("pack_embeddings", "16x D=2048", "embedding + index_put", 30),
        row("pack_embeddings", "2x D=64", "tokenflex", 10, tokens=16),
        row("pack_embeddings", "2x D=64", "embedding + index_put", 5, tokens=16),
        row("pack_embeddings", "16x D=2048", "embedding + nested jagged", 20),
    ]
    (axes,) = axes_of(*rows)
    assert dots(axes) == [(0.5, True), (2, False), (3, False)]
    assert labels(axes) == ["pack_embeddings\nforward"]
    assert axes.get_title("left").endswith("faster 2, within noise 0, slower 1")
    names = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert names[:2] == ["index_put", "nested jagged"]


def test_a_case_within_noise_is_no_loss_and_its_interval_is_drawn():
    interval = {"over_ours": "0.9", "over_ours_low": "0.7", "over_ours_high": "1.1"}
    rows = [
        row("merge_vision", "4x", "tokenflex", 10),
        row("merge_vision", "4x", "index_put", 9, **interval),
    ]
    (axes,) = axes_of(*rows)
    assert dots(axes) == [(0.9, False)]
    assert [0.7, 1.1] in [list(line.get_xdata()) for line in axes.lines]


def test_each_number_of_threads_and_each_machine_has_a_panel():
    rows = [
        row("swiglu", "T=8", variant, p50, device="cpu", threads=threads)
        for threads in (1, 2)
        for variant, p50 in (("tokenflex", 1), ("PyTorch eager", 2))
    ]
    gpu = [row("swiglu", "T=8", "tokenflex", 1), row("swiglu", "T=8", "PyTorch eager", 3)]
    titles = [axes.get_title("left").splitlines()[0] for axes in axes_of(*rows, other=gpu)]
    assert titles == ["Some CPU, threads: 1", "Some CPU, threads: 2", "Some GPU"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv", "--out", "x.png"], "csv must be results of benchmarks: .*nowhere.csv"),
        (["README.md", "--out", "x.png"], "csv must be results .* got none called op"),
        (["x.csv", "--out", "x.pdf"], "--out: expected a name that ends in .png or .svg, got 'x.p"),
        (["x.csv", "--out", "README.md/x.png"], "--out: expected a file .*README.md is a file"),
    ],
)
def test_misuse_is_one_clear_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plots, "speed_up", lambda panels: pytest.fail("drew"))
    with pytest.raises(SystemExit) as stop:
        plots.main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
