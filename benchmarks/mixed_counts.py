"""``python -m benchmarks.mixed_counts``: how much of the arithmetic that mixed counts save is time.

Counts drawn per image (1/4 of the paper's 64, 144 and 256, at its odds 2:3:5) cost fewer operations
than the largest for all. Whether that is less time depends on how samples share a step: all ranks
wait for the slowest one. Three ways of sharing, each with mixed counts and with the largest alone:

* ``packed by cost``: bins of equal tokens + a * tiles, as `tokenflex train` deals them;
* ``packed by tokens``: bins of equal tokens, whatever the encoder has to do (a = 0);
* ``padded``: batches of equal numbers of samples, padded to the longest of a rank.

*Predicted* are operations of the slowest rank, for this model and for SigLIP-400M with the Qwen2.5
family; *measured* are seconds of forward and backward of a scaled model. The ranks of a step are
measured one after another on one device, and the step takes as long as the slowest: there is no
exchange of gradients in it, which is the same whatever the counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.environment import ROOT, environment, machine_name, read_csv, write_csv
from tokenflex.counts import TokenCounts
from tokenflex.data.balance import deal
from tokenflex.training.flops import Flops, training_flops
from tokenflex_kernels import plan_packing

SEED = 0
IMAGE = 0  # the placeholder's token id
NO_BOUND = 2**30
BY_COST, BY_TOKENS, PADDED = "packed by cost", "packed by tokens", "padded"
WAYS = (BY_COST, BY_TOKENS, PADDED)
MIXED, LARGEST = "mixed", "largest"
STAGES = {  # the paper's three, by what learns
    "alignment": ("projector",),
    "vision enhancement": ("vision", "projector"),
    "instruction tuning": ("vision", "projector", "text"),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model and its samples.

    Attributes:
        name: of the model.
        counts, weights: vision tokens of a tile and their odds.
        vision, text: fields of a SigLIP and of a Qwen2 configuration.
        median_text: tokens of the median sample; the distribution is log-normal.
        answer_share: of them, those that are learned.
    """

    name: str
    counts: tuple[int, ...]
    weights: tuple[float, ...]
    vision: dict[str, int]
    text: dict[str, Any]
    median_text: float = 150.0
    answer_share: float = 0.5


_SIGLIP_400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def _qwen(width: int, hidden: int, layers: int, heads: int, groups: int, vocabulary: int) -> Any:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


PAPER = ((64, 144, 256), (0.2, 0.3, 0.5), _SIGLIP_400M)
FAMILY = (
    Shape("SigLIP-400M + Qwen2.5-7B", *PAPER, _qwen(3584, 18944, 28, 28, 4, 152064)),
    Shape("SigLIP-400M + Qwen2.5-3B", *PAPER, _qwen(2048, 11008, 36, 16, 2, 151936)),
    Shape("SigLIP-400M + Qwen2.5-0.5B", *PAPER, _qwen(896, 4864, 24, 14, 2, 151936)),
)
# A quarter of the patches, counts and text; the encoder's tile is worth about as many rows of the
# language model, beside a quarter of the vision tokens, as in the 7B model.
SCALED = Shape(
    "scaled",
    (16, 36, 64),
    (0.2, 0.3, 0.5),
    {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "image_size": 14 * 16,
        "patch_size": 16,
    },
    _qwen(512, 1408, 2, 8, 8, 512),
    median_text=37.5,
)


# ---- samples, and how they share a step


@dataclass(frozen=True)
class Sizes:
    """The samples of a step: text tokens, tiles, and vision tokens of each tile."""

    text: np.ndarray
    tiles: np.ndarray
    counts: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Rows of the language model."""
        return self.text + self.tiles * self.counts


def draw_step(shape: Shape, step: int, samples: int, *, tiled: bool) -> Sizes:
    """A step of mixed counts; text and tiles are long-tailed."""
    rng = np.random.default_rng((SEED, step))
    text = np.clip(rng.lognormal(np.log(shape.median_text), 0.9, samples), 8, 2048).astype(int)
    tiles = np.clip(rng.geometric(0.45, samples), 1, 12)
    drawn = TokenCounts(shape.counts, shape.weights, seed=SEED)
    counts = np.array([drawn.draw(step * samples + i) for i in range(samples)])
    return Sizes(text, tiles if tiled else np.ones(samples, int), counts)


def share_step(way: str, sizes: Sizes, ranks: int, tile_cost: float) -> list[list[int]]:
    """Sample indices of each rank."""
    if way == PADDED:
        return [members.tolist() for members in np.array_split(np.arange(len(sizes.rows)), ranks)]
    return deal(
        sizes.rows.tolist(),
        sizes.tiles.tolist(),
        max_tokens=NO_BOUND,
        max_tiles=NO_BOUND,
        tile_cost=tile_cost if way == BY_COST else 0.0,
        num_ranks=ranks,
    )


def operations(way: str, shape: Shape, sizes: Sizes, members: list[int], flops: Flops) -> float:
    """Of one rank, padding included."""
    rows, tiles = sizes.rows[members], sizes.tiles[members]
    computed = rows.max() * len(rows) if way == PADDED else rows.sum()
    return flops.total(
        tiles=float(tiles.sum()),
        vision_tokens=float((tiles * sizes.counts[members]).sum()),
        tokens=float(computed),
        targets=float(_answers(shape, sizes.text[members]).sum()),
    )


def _answers(shape: Shape, text: np.ndarray) -> np.ndarray:
    return np.maximum(1, (shape.answer_share * text).astype(int))


def _largest(shape: Shape, sizes: Sizes) -> Sizes:
    return replace(sizes, counts=np.full_like(sizes.counts, max(shape.counts)))


# ---- predictions


def predict(
    shape: Shape, flops: Flops, *, steps: int, ranks: int, per_rank: int, tiled: bool
) -> list[Row]:
    """One row a way: what the arithmetic saves, and what of it the slowest rank saves."""
    drawn = [draw_step(shape, step, ranks * per_rank, tiled=tiled) for step in range(steps)]
    rows = []
    for way in WAYS:
        slowest, needed, computed = {}, {}, {}
        for regime in (MIXED, LARGEST):
            slowest[regime] = needed[regime] = computed[regime] = 0.0
            for sizes in drawn:
                sizes = sizes if regime == MIXED else _largest(shape, sizes)
                shares = share_step(way, sizes, ranks, flops.tile_cost)
                done = [operations(way, shape, sizes, m, flops) for m in shares]
                slowest[regime] += max(done)
                computed[regime] += sum(done) / ranks
                # What would have to be done without padding, were all ranks equal.
                needed[regime] += (
                    sum(operations(BY_COST, shape, sizes, m, flops) for m in shares) / ranks
                )
        saving = 1 - needed[MIXED] / needed[LARGEST]
        rows.append(
            {
                "model": shape.name,
                "way": way,
                "tiled": tiled,
                "ranks": ranks,
                "samples_per_rank": per_rank,
                "steps": steps,
                "tile_cost": round(flops.tile_cost, 1),
                "balance": round(slowest[MIXED] / computed[MIXED], 4),
                "padding": round(1 - needed[MIXED] / computed[MIXED], 4),
                "arithmetic_saving": round(saving, 4),
                "predicted_saving": round(1 - slowest[MIXED] / slowest[LARGEST], 4),
                "predicted_share": round((1 - slowest[MIXED] / slowest[LARGEST]) / saving, 4),
                "times_ideal": round(slowest[MIXED] / needed[MIXED], 4),
            }
        )
    return rows


def family_predictions(*, steps: int = 40, ranks: int = 64, per_rank: int = 8) -> list[Row]:
    """The paper's model and its smaller sisters, each of the paper's stages."""
    rows = []
    for shape in FAMILY:
        model = build(shape, "meta")
        for stage, learning in STAGES.items():
            flops = training_flops(model, learning)
            for tiled in (False, True):
                many = {"steps": steps, "ranks": ranks, "per_rank": per_rank, "tiled": tiled}
                rows += [{"stage": stage, **row} for row in predict(shape, flops, **many)]
    return rows


# ---- measurements


def build(shape: Shape, device: str) -> Any:
    """The model with random weights, in training mode."""
    from transformers import Qwen2Config, SiglipVisionConfig

    from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration

    config = TokenFlexConfig(
        SiglipVisionConfig(**shape.vision, vision_use_head=False),
        Qwen2Config(**shape.text),
        image_token_id=IMAGE,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        return TokenFlexForConditionalGeneration(config).train()


class RankShare:
    """One rank's forward and backward, ready to run.

    Args:
        model: of :func:`build`.
        shape: its shape.
        way: how the step is shared.
        sizes: the step.
        members: this rank's samples.
    """

    def __init__(
        self, model: Any, shape: Shape, way: str, sizes: Sizes, members: list[int]
    ) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(SEED)
        pixels = shape.vision["image_size"]
        size = (int(sizes.tiles[members].sum()), 3, pixels, pixels)
        self.images = torch.randn(size, generator=generator).to(model.device)
        self.tile_counts = np.repeat(sizes.counts[members], sizes.tiles[members]).tolist()
        vocabulary = shape.text["vocab_size"]
        self.sequences, labels = [], []
        for i in members:
            vision = [IMAGE] * int(sizes.tiles[i])
            length = int(sizes.text[i])
            text = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
            answer = int(_answers(shape, sizes.text[[i]])[0])
            self.sequences.append([*vision, *text])
            hidden = [-100] * (len(vision) + length - answer)
            labels.append([*hidden, *text[length - answer :]])
        self.plan = plan_packing(self.sequences, self.tile_counts, IMAGE, labels=labels)
        self.targets = (self.plan.labels[1:] != -100).nonzero().squeeze(1)
        self.answers = self.plan.labels[self.targets + 1].to(model.device)
        self.padded = self._padded() if way == PADDED else None

    def _padded(self) -> dict[str, Any]:
        """Rows [B, L] of expanded prompts, and where the packed targets lie in them."""
        lengths = self.plan.lengths
        longest = max(lengths)
        ids = torch.full((len(lengths), longest), 1)
        mask = torch.zeros_like(ids)
        row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        column = self.plan.position_ids
        ids[row, column], mask[row, column] = self.plan.input_ids, 1
        places = row[self.targets] * longest + column[self.targets]
        device = self.model.device
        return {"ids": ids.to(device), "mask": mask.to(device), "places": places.to(device)}

    def run(self) -> float:
        """Forward and backward once; the mean loss."""
        inputs = {"pixel_values": self.images, "num_image_tokens": self.tile_counts}
        if self.padded is None:
            plan = self.plan.to(self.model.device)
            targets = self.targets.to(self.model.device)
            logits = self.model(**inputs, plan=plan, logits_to_keep=targets).logits[0]
        else:
            hidden = self.model.model(
                input_ids=self.padded["ids"],
                attention_mask=self.padded["mask"],
                use_cache=False,
                **inputs,
            ).last_hidden_state
            # At answer tokens only, as in a packed step: its saving is not that of packing.
            logits = self.model.lm_head(hidden.flatten(0, 1)[self.padded["places"]])
        loss = F.cross_entropy(logits.float(), self.answers)
        loss.backward()
        return loss.item()  # waits for the device


def measure(
    shape: Shape, device: str, *, steps: int, ranks: int, per_rank: int, rounds: int, tiled: bool
) -> list[Row]:
    """The rows of :func:`predict` for the scaled model, with seconds beside them."""
    model = build(shape, device)
    flops = training_flops(model, STAGES["instruction tuning"])
    many = {"steps": steps, "ranks": ranks, "per_rank": per_rank, "tiled": tiled}
    predicted = predict(shape, flops, **many)
    slowest = {(way, regime): 0.0 for way in WAYS for regime in (MIXED, LARGEST)}
    mean = dict(slowest)
    for step in range(steps):
        mixed = draw_step(shape, step, ranks * per_rank, tiled=tiled)
        shares: dict[tuple[str, str], list[RankShare]] = {}
        for way, regime in slowest:
            sizes = mixed if regime == MIXED else _largest(shape, mixed)
            dealt = share_step(way, sizes, ranks, flops.tile_cost)
            shares[way, regime] = [RankShare(model, shape, way, sizes, m) for m in dealt]
        taken = {key: [[] for _ in range(ranks)] for key in shares}
        if step == 0:  # the first call of all allocates
            shares[BY_COST, LARGEST][0].run()
        for _ in range(rounds):
            for rank in range(ranks):  # neighbours in time are what is compared
                for key, work in shares.items():
                    model.zero_grad(set_to_none=True)
                    started = time.perf_counter()
                    work[rank].run()
                    taken[key][rank].append(time.perf_counter() - started)
        for key, seconds in taken.items():
            medians = [statistics.median(rank) for rank in seconds]
            slowest[key] += max(medians)
            mean[key] += statistics.mean(medians)
    for row in predicted:
        saved = 1 - slowest[row["way"], MIXED] / slowest[row["way"], LARGEST]
        row |= {
            "seconds_mixed": round(slowest[row["way"], MIXED], 3),
            "seconds_largest": round(slowest[row["way"], LARGEST], 3),
            "measured_balance": round(slowest[row["way"], MIXED] / mean[row["way"], MIXED], 4),
            "measured_saving": round(saved, 4),
            "measured_share": round(saved / row["arithmetic_saving"], 4),
            "rounds": rounds,
        }
    return [{"stage": "instruction tuning", **row} for row in predicted]


# ---- what is printed, drawn and written

TARGET = 0.95  # of the arithmetic saving, packed by cost
COLOURS = {BY_COST: "#1f4e79", BY_TOKENS: "#e07b39", PADDED: "#808080"}


def verdict(rows: Sequence[dict[str, str]]) -> str:
    """The target, as written, over every row that is packed by cost."""
    kinds = {"predicted": "predicted_share", "measured": "measured_share"}
    parts = []
    for kind, column in kinds.items():
        shares = [float(row[column]) for row in rows if row["way"] == BY_COST and row[column]]
        if shares:
            met = sum(share >= TARGET for share in shares)
            parts.append(f"{kind} {min(shares):.3f} at worst, met on {met} of {len(shares)} cases")
    return f"packed by cost: >= {TARGET:.0%} of the arithmetic saving: {'; '.join(parts)}"


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Savings of time beside that of arithmetic: the measured model, then the predictions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(1, 2.6)
    )
    measured = [row for row in rows if row["measured_saving"]]
    predicted = [row for row in rows if not row["measured_saving"] and row["tiled"] == "True"]
    _bars(left, measured, "measured_saving", lambda row: "tiles" if _tiled(row) else "one tile")
    _bars(
        right,
        predicted,
        "predicted_saving",
        lambda row: f"{row['model'].rpartition('-')[2]}\n{row['stage']}".replace(" ", "\n"),
    )
    one = measured[0]
    left.set_title(f"measured: scaled model, {one['ranks']} ranks", loc="left", fontsize=10)
    many = predicted[0]
    title = f"predicted: SigLIP-400M + Qwen2.5, tiled images, {many['ranks']} ranks"
    right.set_title(title, loc="left", fontsize=10)
    left.set_ylabel("time saved against the largest count")
    right.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Any, rows: Sequence[dict[str, str]], column: str, name: Any) -> None:
    groups = list(dict.fromkeys(name(row) for row in rows))
    for place, way in enumerate(WAYS):
        found = {name(row): row for row in rows if row["way"] == way}
        heights = [float(found[group][column]) for group in groups]
        at = np.arange(len(groups)) + (place - 1) * 0.27
        axes.bar(at, heights, 0.25, color=COLOURS[way], label=way)
    ideal = {name(row): float(row["arithmetic_saving"]) for row in rows if row["way"] == BY_COST}
    for place, group in enumerate(groups):
        label = "arithmetic" if not place else None
        ends = place - 0.42, place + 0.42
        axes.hlines(ideal[group], *ends, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _tiled(row: dict[str, str]) -> bool:
    return row["tiled"] == "True"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_counts", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--ranks", type=int, default=8, help="ranks of a measured step")
    results = ROOT / "benchmarks/results/mixed-counts"
    parser.add_argument("--out", type=Path, default=results, help="folder for CSV and plot")
    options = parser.parse_args(arguments)
    for name in ("steps", "rounds", "ranks"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.device == "cpu":
        torch.set_num_threads(1)  # on a shared machine threads wait for each other's core
    shared = environment(options.device)
    rows: list[Row] = []
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
    unmeasured = dict.fromkeys(set(rows[0]), "")
    rows += [{**unmeasured, **row} for row in family_predictions()]
    rows = [{name: row[name] for name in rows[0]} for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{machine_name(shared)}.csv"
    write_csv(path, rows, shared)
    written = read_csv(path)
    draw(written, path.with_suffix(".png"))
    print(format_table(written))
    print(verdict(written))
    return 0


def format_table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: what each way of sharing a step saves, measured where it was, else predicted."""
    lines = [
        f"| model | stage | tiles | arithmetic | {' | '.join(WAYS)} | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for place in range(0, len(rows), len(WAYS)):
        ways = rows[place : place + len(WAYS)]
        one = ways[0]
        shown = [one["model"], one["stage"], "many" if _tiled(one) else "one"]
        shown.append(f"{float(one['arithmetic_saving']):.1%}")
        columns = ["predicted_saving"]
        if one["measured_saving"]:
            columns.append("measured_saving")
        for column in columns:
            cells = [f"{float(row[column]):.1%}" for row in ways]
            kind = column.partition("_")[0]
            lines.append(f"| {' | '.join([*shown, *cells, kind])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
