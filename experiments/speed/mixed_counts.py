"""``python -m experiments.speed.mixed_counts``: how much of the saved arithmetic becomes time.

Counts drawn per image cost fewer operations than the largest for all. Whether that is less time
depends on how samples share a step, because all ranks wait for the slowest. Three ways are
compared, each with mixed counts and with the largest alone:

* ``packed by cost``: bins of equal tokens + a * tiles, as `tokenflex train` deals them;
* ``packed by tokens``: bins of equal tokens, without the encoder's cost (a = 0);
* ``padded``: batches of equal numbers of samples, padded to the longest of a rank.

*Predicted* are operations of the slowest rank, for a scaled model and for SigLIP-400M with the
Qwen2.5 family; *measured* are seconds of forward and backward of the scaled model. The ranks of a
step are measured one after another on one device, and the step takes as long as the slowest. The
exchange of gradients is left out: it takes as long for all counts.

All ways and counts take turns, rank by rank and in alternating order. A rank's time is the median
of its ratio to those (their median) that it took turns with, so that a change of the machine's
speed cancels; the interval of a saving is that of the bootstrap over rounds. A CPU counts its time,
not others'.
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.benchmark

from benchmarks.harness import SEED
from benchmarks.results import NewRow, Row
from experiments.speed.models import Samples, Step, fields, parse_options, publish, random_model
from tokenflex.counts import TokenCounts
from tokenflex.training.flops import Flops, training_flops
from tokenflex_kernels import balance_bins

NO_BOUND = 2**30
TARGET = 0.95  # of the arithmetic saving, packed by cost
BY_COST, BY_TOKENS, PADDED = "packed by cost", "packed by tokens", "padded"
WAYS = (BY_COST, BY_TOKENS, PADDED)
RESAMPLES = 400  # of the bootstrap
CONFIDENCE = 0.95
STAGES = {  # the paper's three, and the parts that each trains
    "alignment": ("projector",),
    "vision enhancement": ("vision", "projector"),
    "instruction tuning": ("vision", "projector", "text"),
}


@dataclass(frozen=True)
class Shape:
    """A model and its samples."""

    name: str
    text: dict[str, Any]  # fields of the Qwen2 configuration
    vision: dict[str, Any]  # fields of the SigLIP configuration
    counts: tuple[int, ...] = (64, 144, 256)  # vision tokens of a tile, at 2 : 3 : 5
    median_text: float = 150.0  # tokens of a log-normal distribution; half of a text has a loss


def qwen(vocab_size: int, num_key_value_heads: int, *sizes: int) -> dict[str, Any]:
    width, hidden, layers, heads = sizes
    others = {"vocab_size": vocab_size, "num_key_value_heads": num_key_value_heads}
    return fields(width, hidden, layers, heads, **others, tie_word_embeddings=False)


SIGLIP = fields(1152, 4304, 27, 16, image_size=384, patch_size=14)
FAMILY = (
    Shape("SigLIP-400M + Qwen2.5-7B", qwen(152064, 4, 3584, 18944, 28, 28), SIGLIP),
    Shape("SigLIP-400M + Qwen2.5-3B", qwen(151936, 2, 2048, 11008, 36, 16), SIGLIP),
    Shape("SigLIP-400M + Qwen2.5-0.5B", qwen(151936, 2, 896, 4864, 24, 14), SIGLIP),
)
# A quarter of the patches, counts and text; the encoder's tile is worth about as many rows of the
# language model, beside a quarter of the vision tokens, as in the 7B model.
SCALED = Shape(
    "scaled",
    qwen(512, 8, 512, 1408, 2, 8),
    fields(192, 768, 1, 3, image_size=224, patch_size=16),
    counts=(16, 36, 64),
    median_text=37.5,
)


# ---- samples, and how they share a step


def draw_step(shape: Shape, step: int, samples: int, *, tiled: bool) -> Samples:
    """Draw a step of mixed counts; text and tiles are long-tailed."""
    rng = np.random.default_rng((SEED, step))
    text = np.clip(rng.lognormal(np.log(shape.median_text), 0.9, samples), 8, 2048).astype(int)
    tiles = np.clip(rng.geometric(0.45, samples), 1, 12)
    policy = TokenCounts(shape.counts, (0.2, 0.3, 0.5), seed=SEED)
    counts = np.array([policy.draw(step * samples + i) for i in range(samples)])
    return Samples(text, tiles if tiled else np.ones_like(tiles), counts, np.maximum(1, text // 2))


def with_largest(shape: Shape, samples: Samples) -> Samples:
    return replace(samples, counts=np.full_like(samples.counts, max(shape.counts)))


def share_step(way: str, samples: Samples, ranks: int, tile_cost: float) -> list[list[int]]:
    """Return the sample numbers of each rank."""
    if way == PADDED:
        return [rank.tolist() for rank in np.array_split(np.arange(len(samples.rows)), ranks)]
    return balance_bins(
        samples.rows,
        samples.tiles,
        max_tokens=NO_BOUND,
        max_tiles=NO_BOUND,
        tile_cost=tile_cost if way == BY_COST else 0.0,
        multiple_of=ranks,
        exchange=True,
    )


# ---- predictions and measurements


def predict(
    shape: Shape, flops: Flops, *, steps: int, ranks: int, per_rank: int, tiled: bool
) -> list[NewRow]:
    """Return a row for each way: the share that the arithmetic saves, and the slowest rank."""
    rows = []
    for way in WAYS:
        # Mixed counts, then the largest. ``needed``: without padding, if all ranks were equal.
        slowest, needed, computed = np.zeros(2), np.zeros(2), np.zeros(2)
        for step in range(steps):
            mixed = draw_step(shape, step, ranks * per_rank, tiled=tiled)
            for regime, samples in enumerate((mixed, with_largest(shape, mixed))):
                shares = share_step(way, samples, ranks, flops.tile_cost)
                done = [samples.operations(flops, rank, way == PADDED) for rank in shares]
                slowest[regime] += max(done)
                computed[regime] += sum(done) / ranks
                needed[regime] += samples.operations(flops, range(len(samples.rows))) / ranks
        arithmetic, saving = 1 - needed[0] / needed[1], 1 - slowest[0] / slowest[1]
        figures = {
            "balance": slowest[0] / computed[0],
            "padding": 1 - needed[0] / computed[0],
            "arithmetic_saving": arithmetic,
            "predicted_saving": saving,
            "predicted_share": saving / arithmetic,
            "times_ideal": slowest[0] / needed[0],
        }
        row: NewRow = {"model": shape.name, "way": way, "tiled": tiled, "ranks": ranks}
        row |= {"samples_per_rank": per_rank, "steps": steps}
        row["tile_cost"] = round(flops.tile_cost, 1)
        rows.append(row | {name: round(float(value), 4) for name, value in figures.items()})
    return rows


def family_predictions(*, steps: int = 40, ranks: int = 64, per_rank: int = 8) -> list[NewRow]:
    """Predict the paper's model and its smaller sisters, in each of the paper's stages."""
    rows = []
    for member in FAMILY:
        model = random_model(member.vision, member.text, "meta")
        for (stage, parts), tiled in product(STAGES.items(), (False, True)):
            flops = training_flops(model, parts)
            ways = predict(member, flops, steps=steps, ranks=ranks, per_rank=per_rank, tiled=tiled)
            rows += [{"stage": stage, **row} for row in ways]
    return rows


def measure(
    shape: Shape, device: str, *, steps: int, ranks: int, per_rank: int, rounds: int, tiled: bool
) -> list[NewRow]:
    """Return the rows of :func:`predict` for a model that runs, with seconds beside them."""
    model = random_model(shape.vision, shape.text, device)
    flops = training_flops(model, STAGES["instruction tuning"])
    keys = list(product(WAYS, (0, 1)))  # mixed counts, then the largest
    seconds = np.empty((len(keys), steps, rounds, ranks))
    clock = time.process_time if device == "cpu" else torch.utils.benchmark.timer
    for step in range(steps):
        mixed = draw_step(shape, step, ranks * per_rank, tiled=tiled)
        regimes = (mixed, with_largest(shape, mixed))
        work = [
            [
                Step(model, regimes[regime], rank, packed=way != PADDED)
                for rank in share_step(way, regimes[regime], ranks, flops.tile_cost)
            ]
            for way, regime in keys
        ]
        if step == 0:  # the first calls of all allocate
            for key in range(len(keys)):
                work[key][0]()
        for turn, rank in product(range(rounds), range(ranks)):
            for key in range(len(keys))[:: -1 if turn % 2 else 1]:
                timer = timeit.Timer(work[key][rank], timer=clock)
                seconds[key, step, turn, rank] = timer.timeit(1)
    rows = predict(shape, flops, steps=steps, ranks=ranks, per_rank=per_rank, tiled=tiled)
    slowest, average = slowest_ranks(seconds)
    savings, low, high = savings_of(seconds)
    for at, row in enumerate(rows):
        figures = {
            "seconds_mixed": slowest[2 * at],
            "seconds_largest": slowest[2 * at + 1],
            "measured_balance": slowest[2 * at] / average[2 * at],
            "measured_saving": savings[at],
            "measured_share": savings[at] / row["arithmetic_saving"],
            "share_low": low[at] / row["arithmetic_saving"],
            "share_high": high[at] / row["arithmetic_saving"],
        }
        row |= {name: round(float(value), 4) for name, value in figures.items()}
        row["rounds"] = rounds
    return [{"stage": "instruction tuning", **row} for row in rows]


def slowest_ranks(seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds of each key's slowest ranks, and of its ranks on average, over all steps.

    Args:
        seconds: [keys, steps, rounds, ranks]; keys took turns at each of the others.
    """
    neighbours = np.median(seconds, axis=0)
    ranks = np.median(seconds / neighbours, axis=2) * np.median(neighbours, axis=1)
    return ranks.max(axis=2).sum(axis=1), ranks.mean(axis=2).sum(axis=1)


def savings_of(seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each way's saving of time, and its bounds by a bootstrap over rounds."""

    def savings(rounds: np.ndarray) -> np.ndarray:
        slowest, _ = slowest_ranks(seconds[:, :, rounds])
        return 1 - slowest[::2] / slowest[1::2]

    number, rng = seconds.shape[2], np.random.default_rng(SEED)
    picks = rng.integers(number, size=(RESAMPLES, number))
    resampled = [savings(rounds) for rounds in picks]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail), axis=0)
    return savings(np.arange(number)), low, high


# ---- the report


def verdict(rows: Sequence[Row]) -> str:
    """Judge the target by every row that is packed by cost."""
    parts = []
    for kind in ("predicted", "measured"):
        judged = [row for row in rows if row["way"] == BY_COST and row[f"{kind}_share"]]
        if shares := [float(row[f"{kind}_share"]) for row in judged]:
            met = sum(share >= TARGET for share in shares)
            worst = judged[shares.index(min(shares))]
            interval = f" ({worst['share_low']} to {worst['share_high']})"
            interval = interval if kind == "measured" else ""
            text = f"{kind} {min(shares):.3f}{interval} at worst"
            parts.append(f"{text}, met on {met} of {len(shares)} cases")
    return f"packed by cost: >= {TARGET:.0%} of the arithmetic saving: {'; '.join(parts)}"


def format_table(rows: Sequence[Row]) -> str:
    """Return the savings of each way as a table: predicted, and measured where possible."""
    lines: list[Sequence[str]] = [("model", "stage", "tiles", "arithmetic", *WAYS, "")]
    for at in range(0, len(rows), len(WAYS)):
        ways = rows[at : at + len(WAYS)]
        names = (ways[0]["model"], ways[0]["stage"], "many" if is_tiled(ways[0]) else "one")
        for kind in ("predicted", "measured"):
            cells = [row[f"{kind}_saving"] for row in ways]
            if cells[0]:
                savings = (ways[0]["arithmetic_saving"], *cells)
                lines.append((*names, *(f"{float(cell):.1%}" for cell in savings), kind))
    header, *body = ["".join(f"| {c} " if c else "| " for c in line) + "|" for line in lines]
    return "\n".join([header, "|---" * len(lines[0]) + "|", *body])


def is_tiled(row: Row) -> bool:
    return row["tiled"] == "True"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw savings of time beside that of arithmetic: the measured model, then predictions."""
    from benchmarks.plots import OUR_COLOUR, PEER_COLOURS, plt, save, tidy

    measured = [row for row in rows if row["measured_saving"]]
    predicted = [row for row in rows if not row["measured_saving"] and is_tiled(row)]
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(1, 2.6)
    )
    colours = dict(zip(WAYS, (OUR_COLOUR, PEER_COLOURS[0], PEER_COLOURS[-1]), strict=True))
    for axes, shown, kind in zip(
        panels, (measured, predicted), ("measured", "predicted"), strict=True
    ):
        groups = [shown[i : i + len(WAYS)] for i in range(0, len(shown), len(WAYS))]
        at = np.arange(len(groups))
        for offset, (way, colour) in zip((-0.27, 0, 0.27), colours.items(), strict=True):
            heights = [float(row[f"{kind}_saving"]) for row in shown if row["way"] == way]
            axes.bar(at + offset, heights, 0.25, color=colour, label=way)
        ideal = [float(group[0]["arithmetic_saving"]) for group in groups]
        style = {"color": "black", "linestyle": "--", "linewidth": 1, "label": "arithmetic"}
        axes.hlines(ideal, at - 0.42, at + 0.42, **style)
        names = [
            f"{row['model'].rpartition('-')[2]}\n{'tiles' if is_tiled(row) else 'one tile'}\n"
            + row["stage"].replace(" ", "\n")
            for row, *_ in groups
        ]
        axes.set_xticks(at, names, fontsize=8)
        axes.set_title(f"{kind}, {shown[0]['ranks']} ranks", loc="left", fontsize=10)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        tidy(axes, grid="y")
    panels[0].set_ylabel("time saved against the largest count")
    panels[1].legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(
        "mixed_counts",
        __doc__,
        arguments,
        steps=(2, "measured steps"),
        rounds=(7, "measurements of each step"),
        ranks=(4, "ranks of a measured step"),
    )
    if options.device == "cpu":
        torch.set_num_threads(1)  # on a shared CPU threads wait for the one without a core
    rows: list[NewRow] = []
    for tiled in (False, True):
        rows += measure(
            SCALED,
            options.device,
            steps=options.steps,
            ranks=options.ranks,
            per_rank=8,
            rounds=options.rounds,
            tiled=tiled,
        )
    rows += [dict.fromkeys(rows[0], "") | row for row in family_predictions()]
    published = publish(rows, options.device, options.out, draw)
    print(format_table(published))
    print(verdict(published))
    return 0


if __name__ == "__main__":
    sys.exit(main())
