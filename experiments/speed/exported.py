"""``python -m experiments.speed.exported``: milliseconds of exported graphs beside the model's.

    tokenflex export runs/demo/checkpoint --to onnx --output runs/demo/export/onnx
    python -m experiments.speed.exported runs/demo/checkpoint runs/demo/export out.json

The exports of all targets in one folder, named like them, take turns with the model. One picture,
one thread; ``vision`` is encoder and projector at a count, ``prompt`` the language model over that
many vision tokens and 8 of text, without a cache before it. The JSON has the best and the median
time.
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tokenflex.files import write_json
from tokenflex.models.loading import load_checkpoint
from tokenflex.serving.export.language_model import plain_language_model
from tokenflex.serving.export.manifest import MANIFEST, tile_size
from tokenflex.serving.export.parts import Part, language_parts, vision_parts
from tokenflex.serving.export.targets import TARGETS

COUNTS = (4, 9, 16)
TEXT_TOKENS = 8
Call = Callable[[], object]
Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


def prompt_inputs(part: Part, width: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Return inputs of the language model for one prompt of that many tokens, and no cache."""
    states = [torch.zeros(1, shape[1], 0, shape[3]) for shape in [*part.inputs.values()][3:]]  # type: ignore[arg-type]
    mask = torch.ones(1, tokens, dtype=torch.int64)
    return torch.randn(1, tokens, width), mask, torch.arange(tokens)[None], *states


def calls(model: Any, processor: Any, exports: Path) -> dict[tuple[str, str], Call]:
    """Return what is timed, by the name of the runtime and of the work."""
    language_model = plain_language_model(model)
    parts = vision_parts(model, tile_size(model, processor), COUNTS)
    parts += language_parts(language_model)
    by_name = {part.name: part for part in parts}
    runs = {"model": {part.name: partial(_run_part, part) for part in parts}}
    for name, target in TARGETS.items():
        folder = exports / name
        if (folder / MANIFEST).exists():
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            projectors = {f"projector-{c}": entry for c, entry in manifest["projectors"].items()}
            files = {**manifest["graphs"], **projectors}
            runs[name] = {
                part.name: partial(target.load(folder / files[part.name]["file"], part))
                for part in parts
            }
    pixels = by_name["encoder"].example(1)
    timed: dict[tuple[str, str], Call] = {}
    width = model.config.text_config.hidden_size
    for name, run in runs.items():
        for count in COUNTS:
            prompt = prompt_inputs(by_name["language"], width, count + TEXT_TOKENS)
            vision = partial(_run_vision, run["encoder"], run[f"projector-{count}"], pixels)
            timed[name, f"vision {count}"] = vision
            timed[name, f"prompt {count}"] = partial(run["language"], prompt)
    return timed


def _run_part(part: Part, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    outputs = part.module(*inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _run_vision(encoder: Run, projector: Run, pixels: Sequence[torch.Tensor]) -> object:
    return projector(encoder(pixels))


def measure(timed: dict[tuple[str, str], Call], rounds: int) -> list[dict[str, Any]]:
    """Return the best and the median milliseconds of each call."""
    milliseconds: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    with torch.no_grad():
        for turn in range(rounds + 3):
            for key, call in timed.items():
                seconds = timeit.timeit(call, number=1)
                if turn >= 3:  # the first warm up
                    milliseconds[key].append(1000 * seconds)
    return [
        {
            "runtime": runtime,
            "work": work,
            "best_ms": round(min(times), 3),
            "median_ms": round(median(times), 3),
            "rounds": rounds,
        }
        for (runtime, work), times in milliseconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("exports", type=Path, help="folder with an export named like its target")
    parser.add_argument("output", type=Path, help="JSON to write")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_checkpoint(options.checkpoint)
    timed = calls(model.requires_grad_(False), processor, options.exports)
    write_json(options.output, measure(timed, options.rounds))


if __name__ == "__main__":
    main()
