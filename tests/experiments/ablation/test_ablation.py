"""Whole ablations of a tiny model; one is killed whose jobs are processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from transformers import AutoConfig

from experiments.ablation import run, scales
from experiments.ablation.jobs import CONFIG, TRAINED, Job
from experiments.ablation.results import spread_of
from experiments.ablation.run import ablate
from experiments.ablation.worker import ask_again
from tests.experiments.ablation.tiny import TINY, TINY_LARGE, canned_report
from tokenflex.cli import main
from tokenflex.training.metrics import TIMING_KEYS

pytestmark = pytest.mark.slow

PATIENCE = 180  # seconds before a subprocess counts as hanging
ABLATE = """
import sys
from pathlib import Path
from tests.experiments.ablation.tiny import TINY
from experiments.ablation.run import ablate
ablate(TINY, Path(sys.argv[1]), at_once=2, show_bar=False)
"""


def run_jobs_here(jobs: Sequence[Job], output: Path, **_: object) -> None:
    """``run_jobs`` in this process, which has imported everything: a process a job takes longer."""
    for job in jobs:
        if not job.is_done(output):
            job.write_config(output)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(output)
                assert main(["train", f"{job.name}/{CONFIG}"]) == 0
            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An ablation that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_jobs", run_jobs_here)
        ablate(TINY, output, show_bar=False)
    return output


def untimed(output: Path) -> dict[str, Any]:
    report = json.loads((output / "report.json").read_text())
    for row in report["regimes"].values():
        del row["seconds"]
    return report


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMING_KEYS}
        for line in text.splitlines()
    ]


def test_a_report_with_its_figures_is_left(whole):
    assert {path.name for path in whole.glob("*.*")} >= {
        *("report.md", "report.json", "figure1.png", "figure3.png")
    }
    report = untimed(whole)
    assert [*report["regimes"]] == ["start", "fixed-large", "all-counts"]
    for row in report["regimes"].values():
        assert [*row["accuracy"]] == ["4", "9", "16", "1", "2x3"]
    assert report["regimes"]["fixed-large"]["vision_tokens"]["mean"] == 40 * 3 * 16
    assert report["regimes"]["all-counts"]["vision_tokens"]["mean"] == 40 * (4 + 9 + 16)


def test_every_model_knows_the_counts_it_was_trained_with(whole):
    start = AutoConfig.from_pretrained(whole / "seed0/start/checkpoint")
    assert start.trained_num_image_tokens == [16]
    for name, counts in (("fixed-large", [16]), ("all-counts", [4, 9, 16])):
        config = AutoConfig.from_pretrained(whole / f"seed0/{name}/checkpoint")
        assert config.trained_num_image_tokens == counts


def test_a_trained_model_is_asked_about_its_own_canvases(whole, monkeypatch):
    """They are the training data's, not the test split's, and as many as wanted."""
    monkeypatch.chdir(whole)
    config = Path("seed0/fixed-large") / CONFIG
    asked = []

    def evaluate(model, processor, dataset, counts, **options):
        asked.append((dataset.split, len(dataset), list(counts)))
        return {"accuracy": {"4": 0.5}}

    monkeypatch.setattr("tokenflex.evaluation.evaluate", evaluate)
    ask_again(config, 2)
    assert asked == [("train", 2, [4, 9, 16, 1, (2, 3)])]
    assert json.loads((config.parent / TRAINED).read_text()) == {"accuracy": {"4": 0.5}}


@pytest.mark.release
def test_killed_and_started_again_it_gives_the_same_report(whole, tmp_path):
    """Killed while two regimes train: their processes save their states and end by themselves."""
    with subprocess.Popen([sys.executable, "-c", ABLATE, tmp_path]) as ablation:
        runs = [tmp_path / "seed0" / name for name in ("fixed-large", "all-counts")]
        give_up = time.monotonic() + PATIENCE
        while not any((one / "metrics.jsonl").exists() for one in runs):
            assert time.monotonic() < give_up
            assert ablation.poll() is None
            time.sleep(0.02)
        ablation.send_signal(signal.SIGKILL)
    done = [one for one in runs if (one / "report.json").exists()]
    assert len(done) < 2
    ablate(TINY, tmp_path, at_once=2, show_bar=False)
    assert untimed(tmp_path) == untimed(whole)
    for one in runs:
        assert lines(one) == lines(whole / "seed0" / one.name)


def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "tokenflex.cli", "ablate", "--quick", "--output", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as ablation:
        log = tmp_path / "seed0" / "start" / "train.log"
        give_up = time.monotonic() + PATIENCE
        while not log.exists():
            assert time.monotonic() < give_up
            time.sleep(0.02)
        time.sleep(1)
        os.kill(ablation.pid, signal.SIGINT)
        _, said = ablation.communicate(timeout=PATIENCE)
    assert ablation.returncode == 2
    last = said.strip().splitlines()[-1]
    assert last == (
        f"tokenflex: interrupted; the same command continues from what is in {tmp_path}"
    )


@pytest.mark.release
def test_larger_canvases_train_and_are_asked(tmp_path, monkeypatch):
    """The scale for a GPU, on a model of a few weights: 64 px, counts 16, 36 and 64."""
    monkeypatch.setattr(run, "run_jobs", run_jobs_here)
    monkeypatch.setitem(scales.SCALES, "large", TINY_LARGE)
    assert main(["ablate", "--scale", "large", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["counts"] == ["16", "36", "64"]
    assert report["unseen"] == ["4", "25", "49", "100", "4x6", "6x4", "6x8", "8x6", "4x8"]
    assert [*report["regimes"]["stochastic"]["accuracy"]] == [*report["counts"], *report["unseen"]]


def test_a_quick_ablation_that_shows_nothing_fails(tmp_path, monkeypatch, capsys):
    report = canned_report(seeds=1, names=("start", "fixed-large", "stochastic"))
    report["regimes"]["fixed-large"]["accuracy"]["4"] = spread_of([0.7])
    monkeypatch.setattr(run, "ablate", lambda scale, output, **options: report)
    assert main(["ablate", "--quick", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "FAILED: accuracy at 4, stochastic minus fixed 16 must exceed 0.15" in said.err


@pytest.mark.release
def test_the_reading_task_trains_and_is_asked(tmp_path, monkeypatch):
    """A model of a few weights on pages of one and two tiles; the report names the task."""
    monkeypatch.setattr(run, "run_jobs", run_jobs_here)
    tiny = replace(
        scales.READING,
        warm_up_steps=2,
        warm_up_batch=2,
        start_steps=2,
        steps=2,
        batch_size=3,
        evaluated=4,
        unseen=((4, 8),),
        seeds=1,
        regimes=("stochastic",),
    )
    monkeypatch.setitem(scales.SCALES, "reading", tiny)
    assert main(["ablate", "--task", "reading", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["task"], report["counts"], report["unseen"]) == (
        "reading",
        ["16", "36", "64"],
        ["4x8"],
    )
    assert {"word", "tall word", "pair page"} & {*report["questions"]}
    assert "Reading task, pages that training never saw" in (tmp_path / "report.md").read_text()
