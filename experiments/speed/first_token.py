"""``python -m experiments.speed.first_token``: seconds to the first token against vision tokens.

A model of random weights, with the shapes of SigLIP-B at 384 px and Qwen2.5-0.5B, answers a prompt
about one image with one token, at several counts: from pixels, and from images encoded before.
Counts take turns; the CSV has the best and the median of all rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness import DTYPES, SEED
from benchmarks.prompts import IMAGE
from benchmarks.results import NewRow, Row
from experiments.speed.models import fields, parse_options, publish, random_model, take_turns

TEXT_TOKENS = 32
COUNTS = (16, 64, 144, 256, 400, 576)
FROM_PIXELS, ENCODED = "from pixels", "images encoded before"

VISION = fields(768, 3072, 12, 12, image_size=384, patch_size=16)
TEXT = fields(896, 4864, 24, 14, num_key_value_heads=2, vocab_size=151_936)
TEXT["tie_word_embeddings"] = True


def measure(model: Any, counts: Sequence[int], rounds: int) -> list[NewRow]:
    """Return the best and the median seconds to the first token, for each count and way."""
    vision = model.config.vision_config
    device, dtype = model.device, next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(SEED)
    side = vision.image_size
    pixels = torch.randn(1, vision.num_channels, side, side, generator=generator)
    pixels = pixels.to(device, dtype)
    vocabulary = model.config.text_config.vocab_size
    text = torch.randint(2, vocabulary, (TEXT_TOKENS,), generator=generator)
    with torch.no_grad():
        encoded = model.encode_images(pixels)
    calls = {}
    for count in counts:
        ids = torch.cat([torch.full((count,), IMAGE), text])[None].to(device)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        first_token = partial(model.generate, **prompt, num_image_tokens=count, max_new_tokens=1)
        for way, image in (
            (FROM_PIXELS, {"pixel_values": pixels}),
            (ENCODED, {"encoded_images": encoded}),
        ):
            calls[count, way] = partial(first_token, do_sample=False, **image)
    seconds = {
        key: [turn.seconds for turn in turns] for key, turns in take_turns(calls, rounds).items()
    }
    return [
        {
            "vision_tokens": count,
            "way": way,
            "prompt_tokens": count + TEXT_TOKENS,
            "best_s": round(min(taken), 4),
            "median_s": round(median(taken), 4),
            "rounds": rounds,
            "patches": encoded.features.shape[0],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(dtype).removeprefix("torch."),
            "seed": SEED,
        }
        for (count, way), taken in seconds.items()
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the best and the median seconds against vision tokens, a line for each way."""
    from benchmarks.plots import machine, plt, save, tidy

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for way, colour in ((FROM_PIXELS, "#1f4e79"), (ENCODED, "#e07b39")):
        points = sorted(
            (int(row["vision_tokens"]), float(row["best_s"]), float(row["median_s"]))
            for row in rows
            if row["way"] == way
        )
        tokens, best, middle = zip(*points, strict=True)
        label = f"{way}, best of {rows[0]['rounds']}"
        axes.plot(tokens, best, "o-", color=colour, label=label)
        axes.plot(tokens, middle, ":", color=colour, label="median")
        axes.set_xticks(tokens)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("vision tokens of the image")
    axes.set_ylabel("seconds to the first token")
    axes.legend(frameon=False)
    tidy(axes, grid="both")
    size, dtype = int(rows[0]["parameters"]) / 1e9, rows[0]["dtype"]
    title = f"random model of {size:.2f} B parameters, {dtype}; {machine(rows[0])}"
    axes.set_title(title, loc="left", fontsize=9, color="#555555")
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    rounds = (5, "measurements of each count")
    options = parse_options("first_token", __doc__, arguments, rounds=rounds)
    model = random_model(VISION, TEXT, options.device, DTYPES[options.device]).eval()
    rows = publish(measure(model, COUNTS, options.rounds), options.device, options.out, draw)
    for row in rows:
        print(f"{row['vision_tokens']:>5}  {row['best_s']:>8} s  {row['way']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
