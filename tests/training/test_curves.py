"""Curves of a run: finished, still going, or not a run at all."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from tests.training.runs import temporary_files
from tokenflex.cli import main
from tokenflex.training import curves
from tokenflex.training.curves import plot_curves, smooth


def line(step: int, **changes) -> dict:
    """Two stages of 20 steps."""
    values = {
        "stage": int(step > 20),
        "stage_name": "second" if step > 20 else "first",
        "step": (step - 1) % 20 + 1,
        "global_step": step,
        "loss": 3.0 / step,
        "learning_rate": {"projector": 1e-3, "text": 1e-4} if step > 20 else {"projector": 1e-3},
        "tokens_per_second": 1e4,
        "mfu": 0.4,
        "cost_balance": 1.01,
    }
    return {**values, **changes}


def evaluation(step: int, **accuracy: float) -> dict:
    counts = {name[1:]: value for name, value in accuracy.items()}
    return {"stage": 0, "step": step, "global_step": step, "accuracy": counts}


def write(path: Path, lines: list[dict], more: str = "") -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + more)


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, still open."""
    drawn = []
    draw = curves._draw
    monkeypatch.setattr(curves, "_draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    yield drawn
    plt.close("all")


def titles(figure) -> set[str]:
    return {axes.get_title(loc="left") for axes in figure.axes} - {""}


def curve(figure, title: str, place: int) -> tuple[list, list]:
    (axes,) = [one for one in figure.axes if one.get_title(loc="left") == title]
    drawn = axes.get_lines()[place]
    return list(drawn.get_xdata()), list(drawn.get_ydata())


def test_a_finished_run_has_every_curve(tmp_path, figures):
    lines = [line(step) for step in range(1, 41)]
    write(tmp_path / "metrics.jsonl", lines)
    write(
        tmp_path / "evaluations.jsonl",
        [evaluation(20, n4=0.1, n16=0.2), evaluation(40, n4=0.3, n16=0.6)],
    )
    assert plot_curves(tmp_path) == tmp_path / "curves.png"
    (figure,) = figures
    assert titles(figure) == {
        "loss",
        "learning rate",
        "tokens a second",
        "cost balance",
        "accuracy",
    }
    steps = list(range(1, 41))
    assert curve(figure, "loss", 0) == (steps, [3.0 / step for step in steps])
    assert curve(figure, "learning rate", 0) == (steps, [1e-3] * 40)
    rates = curve(figure, "learning rate", 1)[1]
    assert np.isnan(rates[:20]).all()
    assert rates[20:] == [1e-4] * 20
    assert curve(figure, "accuracy", 0) == ([20, 40], [0.1, 0.3])
    assert curve(figure, "accuracy", 1) == ([20, 40], [0.2, 0.6])
    shares = [
        axes.get_lines()[0].get_ydata() for axes in figure.axes if not axes.get_title(loc="left")
    ]
    assert np.allclose(shares, 40)
    loss = next(axes for axes in figure.axes if axes.get_title(loc="left") == "loss")
    assert [text.get_text().strip() for text in loss.texts] == ["first", "second"]
    (shade,) = loss.patches
    assert (shade.get_x(), shade.get_width()) == (20, 20)
    with Image.open(tmp_path / "curves.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert temporary_files(tmp_path) == []


def test_grids_of_tokens_have_a_curve_each(tmp_path, figures):
    write(tmp_path / "metrics.jsonl", [line(step) for step in (1, 2)])
    write(tmp_path / "evaluations.jsonl", [evaluation(2, n16=0.9, n2x3=0.6, n4=0.5)])
    curves.plot_curves(tmp_path)
    (axes,) = [a for a in figures[0].axes if a.get_title(loc="left") == "accuracy"]
    assert [drawn.get_label() for drawn in axes.get_lines()] == ["4", "2x3", "16"]


def test_a_run_that_still_goes_is_drawn_as_far_as_it_is(tmp_path, figures, capsys):
    """No report, no evaluation yet, no known peak, and half a line at the end."""
    lines = [line(step, mfu=None) for step in range(1, 4)]
    write(tmp_path / "metrics.jsonl", lines, '{"stage": 0, "step": 4, "lo')
    assert main(["plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    (figure,) = figures
    assert "accuracy" not in titles(figure)
    assert curve(figure, "loss", 0)[0] == [1, 2, 3]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_has_just_begun(tmp_path, steps):
    write(tmp_path / "metrics.jsonl", [line(step) for step in range(1, steps + 1)])
    plot_curves(tmp_path)


def test_with_a_report_both_pictures_are_drawn(tmp_path, capsys):
    write(tmp_path / "metrics.jsonl", [line(1), line(2)])
    (tmp_path / "report.json").write_text(json.dumps({"accuracy": {"4": 0.5}}))
    assert main(["plot", str(tmp_path)]) == 0
    names = [Path(one).name for one in capsys.readouterr().out.splitlines()]
    assert names == ["curves.png", "accuracy.png"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"[1, 2]\n", b"a,b\n1,2\n", b"\xff\xfe\x00", b'{"stage": 0, "step": 1}\n'],
)
def test_a_file_that_is_no_run_is_one_line(tmp_path, capsys, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert main(["plot", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl holds no line of a training run" in error
    assert not (tmp_path / "curves.png").exists()


def test_a_folder_of_neither_is_one_line(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "report.json does not exist, nor metrics.jsonl" in error


def test_smoothing_is_a_mean_that_keeps_a_constant_to_its_ends():
    assert smooth(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    values = np.arange(200.0)
    assert smooth(values)[100] == pytest.approx(values[90:110].mean(), abs=0.51)
    assert list(smooth(np.array([1.0, 5.0]))) == [1.0, 5.0]


def test_smoothing_leaves_gaps():
    values = np.ones(40)
    values[10] = np.nan
    assert np.isnan(smooth(values)).nonzero()[0].tolist() == [10]
