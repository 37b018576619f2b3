"""``python -m experiments.speed.seconds``: accuracy against measured seconds, not tokens alone.

Models of the ablation's small scale answer questions and take training steps, and their times are
set beside the accuracies of the ablation's regimes and of the baselines of ``tokenflex evaluate``.
Time depends on shapes and counts, not on weights: weights are random, and models of one shape are
measured once. One thread of the CPU computes, and the page has its milliseconds, which are those of
a machine that does nothing else; the CSV has those of the clock too.

``--page`` measures nothing: it writes the page and the picture again, beside other reports say.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness import SEED
from benchmarks.results import ROOT, NewRow, environment, machine_name, read_csv
from benchmarks.training_pace import WARM_UP, OurRun, Turn, alternate
from experiments.ablation.jobs import plan_jobs
from experiments.ablation.regimes import POSITIONS, regimes
from experiments.ablation.scales import SMALL, Scale
from experiments.speed.models import Taken, publish, take_turns
from experiments.speed.seconds_page import (
    MODEL,
    PLAIN,
    POSITIONED,
    Reports,
    draw,
    format_page,
)
from tokenflex.counts import Grid, TokenCount, token_grid, tokens_of
from tokenflex.evaluation.baselines import METHODS, RESIZING, Baselines
from tokenflex.files import write_text
from tokenflex.training.build import build_model, build_processor
from tokenflex.training.config import ModelConfig, TrainConfig

OUT = ROOT / "docs/results/seconds"
ABLATION = ROOT / "docs/results/ablate"
BASELINES = ROOT / "docs/results/baselines/report.json"
BATCHES = (1, 16)
QUESTION_TOKENS = 2  # a task and a cell
ANSWER_TOKENS = 2  # a word and the end


# ---- answers


def build(scale: Scale, model: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build a model of random weights of the ablation's shape, and its processor."""
    parts = ModelConfig.model_validate({**scale.model(), **model})
    processor = build_processor(parts)
    torch.manual_seed(SEED)
    return build_model(parts, processor, scale.counts).eval(), processor


class Answers:
    """Calls that answer a question about each of several pictures, from their pixels.

    Args:
        scale: Of the pictures and the counts.
        model: The model.
        processor: Its processor.
        batch: Number of pictures, of one question each.
    """

    def __init__(self, scale: Scale, model: Any, processor: Any, batch: int) -> None:
        self.scale, self.model, self.batch = scale, model, batch
        generator = torch.Generator().manual_seed(SEED)
        side = model.config.vision_config.image_size
        self.pixels = torch.randn(batch, 3, side, side, generator=generator)
        vocabulary = model.config.text_config.vocab_size
        image = model.config.image_token_id
        words = (batch, QUESTION_TOKENS)
        self.text = torch.randint(image + 1, vocabulary, words, generator=generator)
        *counts, full = scale.counts
        self.baselines = Baselines(model, processor.image_processor, tuple(counts), full)

    def calls(self, methods: Iterable[str]) -> dict[tuple[str, int, int], Callable[[], object]]:
        """Return calls by method, vision tokens of a picture, and tokens of the answer."""
        calls: dict[tuple[str, int, int], Callable[[], object]] = {}
        for tokens in (1, ANSWER_TOKENS):
            for count in self.scale.counts:
                calls[MODEL, count, tokens] = partial(
                    self._generate, count, tokens, pixel_values=self.pixels
                )
            for method in methods:
                for count in self.scale.counts[:-1]:
                    calls[method, count, tokens] = partial(self._baseline, method, count, tokens)
        return calls

    def _generate(self, count: TokenCount, tokens: int, **images: Any) -> Any:
        placeholders = (self.batch, tokens_of(count))
        ids = torch.cat(
            [self.text.new_full(placeholders, self.model.config.image_token_id), self.text], dim=1
        )
        return self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_image_tokens=count,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            **images,
        )

    @torch.no_grad()
    def _baseline(self, method: str, count: int, tokens: int) -> Any:
        grid: Grid = token_grid(count)
        inputs = {"pixel_values": self.pixels}
        if method in RESIZING:  # the encoder sees the resized pictures alone
            shown = self.baselines.resized(method, grid, inputs)
        else:
            full = self.baselines.at_full_count(self.model.encode_images(**inputs))
            tiles = [(i, 0) for i in range(self.batch)]
            fewer = self.baselines.images(method, count, inputs, full, tiles)
            assert fewer is not None, self.baselines.left_out
            shown = fewer
        with shown.context:
            return self._generate(shown.grid, tokens, encoded_images=shown.encoded)


def measure_answers(scale: Scale, rounds: int) -> list[NewRow]:
    """Return the milliseconds to the first token and of whole answers, a row a way and count."""
    calls = {}
    sizes = {}
    for shape, changes, methods in ((PLAIN, {}, METHODS), (POSITIONED, POSITIONS, ())):
        model, processor = build(scale, changes)
        sizes[shape] = sum(parameter.numel() for parameter in model.parameters())
        for batch in BATCHES:
            answers = Answers(scale, model, processor, batch)
            for (way, count, tokens), call in answers.calls(methods).items():
                calls[shape, batch, way, count, tokens] = call
    taken = take_turns(calls, rounds)
    return [
        {
            "measured": "answer",
            "name": shape,
            "way": way,
            "vision_tokens": count,
            "batch": batch,
            **_milliseconds("first_token", taken[shape, batch, way, count, 1]),
            **_milliseconds("answer", taken[shape, batch, way, count, ANSWER_TOKENS]),
            "rounds": rounds,
            "parameters": sizes[shape],
            "seed": SEED,
        }
        for shape, batch, way, count, tokens in calls
        if tokens == 1
    ]


def _milliseconds(name: str, taken: Sequence[Taken]) -> dict[str, float]:
    return {
        f"{name}_ms": round(1000 * median(turn.seconds for turn in taken), 3),
        f"{name}_processor_ms": round(1000 * median(turn.processor_seconds for turn in taken), 3),
    }


# ---- training


def measure_training(scale: Scale, names: Iterable[str], rounds: int) -> list[NewRow]:
    """Return the processor milliseconds of a training step of each regime.

    Regimes whose steps are alike are measured once: they may differ in their number of steps and in
    their start.
    """
    known = regimes(scale)
    jobs = plan_jobs(scale, [known[name] for name in names], [0], on_gpu=False)
    alike: dict[str, list[str]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for job in jobs:
        if job.needs is None:
            continue
        config = _step_config(job.config, WARM_UP + rounds + 2)
        key = json.dumps([config["model"], config["stages"]], sort_keys=True)
        alike.setdefault(key, []).append(job.regime)
        configs[key] = config
    # The progress bars of all runs would be drawn over each other.
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        turns = {}
        for number, (key, config) in enumerate(configs.items()):
            output = str(Path(folder) / str(number))
            run = OurRun(TrainConfig.model_validate({**config, "output": output}), fresh=True)
            run.steps, run.losses = [], []
            turns[key] = Turn(partial(_train, run))
        for turn in turns.values():
            turn.step()  # to the begin of the first step
        seconds = [*alternate(turns, WARM_UP + rounds)][WARM_UP:]
        for turn in turns.values():
            turn.finish()
    return [
        {
            "measured": "training",
            "name": name,
            "step_processor_ms": round(1000 * median(times[key] for times in seconds), 3),
            "rounds": rounds,
            "seed": 0,
        }
        for key, of_key in alike.items()
        for name in of_key
    ]


def _step_config(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return a run's configuration from random weights, for so many steps and no evaluation."""
    rest = {key: value for key, value in config.items() if key != "evaluation"}
    model = {key: value for key, value in config["model"].items() if key != "start"}
    (stage,) = config["stages"]
    changed = {"name": "pace", "steps": steps, "warmup_steps": 1}
    return {**rest, "model": model, "stages": [{**stage, **changed}]}


def _train(run: OurRun, begin_step: Callable[[], None]) -> None:
    run.begin_step = begin_step
    run.run()


# ---- the command


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(1)
    path = options.out / f"{machine_name(environment('cpu'))}.csv"
    try:
        reports = Reports.read(options.reports, options.baselines, options.budget)
        if options.page:
            rows = read_csv(path)
            draw(reports, rows, path.with_suffix(".png"))
        else:
            measured = measure_answers(SMALL, options.rounds)
            measured += measure_training(SMALL, reports.regimes, options.steps)
            rows = publish(measured, "cpu", options.out, partial(draw, reports))
        page = options.out / "report.md"
        write_text(page, format_page(reports, rows, path.with_suffix(".png").name))
    except (OSError, ValueError) as error:
        raise SystemExit(f"experiments.speed.seconds: {error}") from error
    print(f"the page is {page}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.seconds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder for CSV, picture and page")
    parser.add_argument("--rounds", type=int, default=25, help="measurements of each answer")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each regime")
    parser.add_argument(
        "--reports",
        type=Path,
        nargs="+",
        default=[ABLATION / "report.json", ABLATION / "gap.json"],
        help="JSON files of tokenflex ablate, of one folder: the accuracies of the regimes",
    )
    parser.add_argument(
        "--budget", default="", help="of the suite limited: take the regimes of it, as 1200-x4"
    )
    parser.add_argument(
        "--baselines",
        type=Path,
        nargs="+",
        default=[BASELINES],
        help="report.json of tokenflex evaluate --baselines, of one model or a model a seed",
    )
    parser.add_argument(
        "--page", action="store_true", help="measure nothing, read the CSV in --out"
    )
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
