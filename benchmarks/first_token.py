"""``python -m benchmarks.first_token``: seconds to the first token against vision tokens.

A model of random weights (SigLIP-B at 384 px and Qwen2.5-0.5B in shape: 0.6 B parameters) answers
one prompt about one image with one token, at several counts; from its pixels, and from images that
were encoded before. Counts take turns, and the best and the median of all rounds are written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, environment, machine_name, read_csv, write_csv

SEED = 0
IMAGE = 0  # the placeholder's token id
TEXT_TOKENS = 32
COUNTS = (16, 64, 144, 256, 400, 576)
FROM_PIXELS, ENCODED = "from pixels", "images encoded before"

VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
    "vision_use_head": False,
}
TEXT = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 1,
}

Row = dict[str, Any]


def build(vision: dict[str, Any], text: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """The model with random weights, for inference."""
    from transformers import Qwen2Config, SiglipVisionConfig

    from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration

    config = TokenFlexConfig(
        SiglipVisionConfig(**vision), Qwen2Config(**text), image_token_id=IMAGE
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        return TokenFlexForConditionalGeneration(config).to(dtype).eval()


def measure(model: Any, counts: tuple[int, ...], rounds: int) -> list[Row]:
    """One row for each count and way: best and median seconds to the first token."""
    vision = model.config.vision_config
    device, dtype = model.device, model.dtype
    generator = torch.Generator().manual_seed(SEED)
    size = (1, vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.randn(size, generator=generator).to(device, dtype)
    vocabulary = model.config.text_config.vocab_size
    text = torch.randint(2, vocabulary, (TEXT_TOKENS,), generator=generator)
    with torch.no_grad():
        encoded = model.encode_images(pixels)

    def prompt(count: int) -> torch.Tensor:
        return torch.cat([torch.full((count,), IMAGE), text])[None].to(device)

    ways: dict[str, dict[str, Any]] = {
        FROM_PIXELS: {"pixel_values": pixels},
        ENCODED: {"encoded_images": encoded},
    }
    seconds: dict[tuple[int, str], list[float]] = {(n, way): [] for n in counts for way in ways}
    for turn in range(rounds + 1):  # the first is not counted
        for (count, way), taken in seconds.items():
            ids = prompt(count)
            _synchronise(device)
            started = time.perf_counter()
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_image_tokens=count,
                max_new_tokens=1,
                do_sample=False,
                **ways[way],
            )
            _synchronise(device)
            if turn:
                taken.append(time.perf_counter() - started)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        {
            "vision_tokens": count,
            "way": way,
            "prompt_tokens": count + TEXT_TOKENS,
            "best_s": round(min(taken), 4),
            "median_s": round(statistics.median(taken), 4),
            "rounds": rounds,
            "patches": encoded.features.shape[0],
            "parameters": parameters,
            "dtype": str(dtype).removeprefix("torch."),
            "seed": SEED,
        }
        for (count, way), taken in seconds.items()
    ]


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Seconds against vision tokens, from the CSV's rows: a line a way, best and median."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for way, colour in ((FROM_PIXELS, "#1f4e79"), (ENCODED, "#e07b39")):
        found = sorted((row for row in rows if row["way"] == way), key=_vision_tokens)
        tokens = [_vision_tokens(row) for row in found]
        best = [float(row["best_s"]) for row in found]
        median = [float(row["median_s"]) for row in found]
        axes.plot(tokens, best, "o-", color=colour, label=f"{way}, best of {found[0]['rounds']}")
        axes.plot(tokens, median, ":", color=colour, label="median")
    axes.set_xticks(sorted({_vision_tokens(row) for row in rows}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("vision tokens of the image")
    axes.set_ylabel("seconds to the first token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    one = rows[0]
    axes.set_title(
        f"random model of {int(one['parameters']) / 1e9:.2f} B parameters, {one['dtype']}; "
        f"{one['gpu'] or one['cpu']}, threads: {one['threads']}, load {one['load']}",
        loc="left",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_token", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    results = ROOT / "benchmarks/results/first-token"
    parser.add_argument("--out", type=Path, default=results, help="folder for CSV and plot")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    shared = environment(options.device)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    rows = measure(build(VISION, TEXT, options.device, dtype), COUNTS, options.rounds)
    path = options.out / f"{machine_name(shared)}.csv"
    write_csv(path, rows, shared)
    draw(read_csv(path), path.with_suffix(".png"))
    for row in rows:
        print(f"{row['vision_tokens']:>5}  {row['best_s']:>8.3f} s  {row['way']}")
    print(f"{len(rows)} rows in {path}")
    return 0


def _vision_tokens(row: dict[str, str]) -> int:
    return int(row["vision_tokens"])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
