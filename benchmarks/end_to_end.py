"""One training step, end to end: encoder, projector and packed language model.

The same images and text four times: each image at the largest count, or the three counts at
2 : 3 : 5; and as one packed row, or padded to the longest sample. At the shapes of SigLIP-400M and
Qwen2.5-3B, both cut to the same few layers, so that their shares of the time stay about right; tiny
ones on the CPU. The output layer is not cut, but runs on the answers only, an eighth of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.costs import peak_bytes
from benchmarks.harness import SEED, Entry, Run, Work, failure_in, measure
from benchmarks.models import Samples, Step, fields, random_model
from benchmarks.results import NewRow, new_row
from tokenflex.training.flops import training_flops
from tokenflex_kernels import info

LOSS_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """A model, and a batch of one image and ``prompt`` text tokens a sample."""

    vision: dict[str, Any]  # fields of the SigLIP configuration
    text: dict[str, Any]  # fields of the Qwen2 configuration
    samples: int  # a multiple of ten
    prompt: int  # the last eighth is learned
    counts: tuple[int, int, int]  # vision tokens of an image, at 2 : 3 : 5

    def batch(self, mixed: bool) -> Samples:
        """Return samples of the largest count, or of all three, shuffled."""
        order = (2, 1, 2, 0, 2, 1, 2, 0, 1, 2) if mixed else (2,)
        counts = np.resize([self.counts[i] for i in order], self.samples)
        text, tiles = np.full_like(counts, self.prompt), np.ones_like(counts)
        return Samples(text, tiles, counts, text // 8)


def shape_of(run: Run) -> Shape:
    if run.device == "cpu":
        layers, pixels = (1, 32) if run.quick else (2, 64)
        vision, text = fields(64, 128, layers, 4), fields(128, 512, layers, 4)
        sizes = {"samples": 10, "prompt": 56, "counts": (16, 36, 64)}
        patch, vocabulary = 4, 1_000
    else:
        vision, text = fields(1152, 4304, 3, 16), fields(2048, 11_008, 3, 16)
        sizes = {"samples": 20 if run.quick else 40, "prompt": 220, "counts": (64, 144, 256)}
        pixels, patch, vocabulary = 384, 14, 151_936
    vision |= {"image_size": pixels, "patch_size": patch}
    text |= {"num_key_value_heads": 2, "vocab_size": vocabulary, "tie_word_embeddings": True}
    return Shape(vision, text, **sizes)


@torch.no_grad()
def loss_of_each_alone(model: Any, samples: Samples) -> float:
    """Return the loss that a step must have: the mean over samples, each run by itself, so that
    none is padded or packed. (All have as many answer tokens.)"""
    losses = [Step(model, samples, [i], packed=False).loss() for i in range(len(samples.rows))]
    return float(torch.stack(losses).mean())


def loss_error(losses: Sequence[torch.Tensor], wanted: float, limit: float) -> float:
    loss = float(losses[0])
    error = abs(loss - wanted) / wanted
    if not error <= limit:
        raise ValueError(
            f"loss must be that of each sample alone, {wanted:.6g}, got {loss:.6g}: off by "
            f"{error:.2g}, expected at most {limit:.2g}"
        )
    return float(f"{error:.3g}")


def step_flops(model: Any, samples: Samples) -> int:
    """Return the operations that a step needs, the causal half of attention included and padding
    not; backward is twice forward."""
    flops = training_flops(model, ("vision", "projector", "text"))
    config = model.config.text_config
    attention = 2 * int((samples.rows**2).sum()) * config.hidden_size
    rest = samples.operations(flops, range(len(samples.rows)))
    return int(rest) + 3 * config.num_hidden_layers * attention


def suite(run: Run) -> None:
    run.emit(rows(shape_of(run), run))


def rows(shape: Shape, run: Run) -> list[NewRow]:
    """Return a row for each of {fixed, mixed} x {padded, packed}; ``error`` is the loss's."""
    failure = row_of(shape, run, "")
    run.begin(failure)
    with failure_in(failure, run):
        model = random_model(shape.vision, shape.text, run.device, run.dtype)
        entries = []
        for name in ("fixed", "mixed"):
            samples = shape.batch(mixed=name == "mixed")
            wanted = loss_of_each_alone(model, samples)
            for variant in ("padded", "packed"):
                step = Step(model, samples, range(shape.samples), variant == "packed")
                entry = Entry(
                    row=row_of(shape, run, name, samples) | {"variant": variant},
                    calls=partial(list, [step]),  # a step touches more than any cache holds
                    work=Work(flops=step_flops(model, samples)),
                    check=partial(loss_error, wanted=wanted, limit=LOSS_LIMITS[run.dtype]),
                    costs=partial(peak_of, step, run.device),
                    timing="host",
                )
                entries.append(entry)
        return measure(entries, run, seconds=run.deadline.left / 3)
    return [failure]


def peak_of(step: Step, device: str) -> NewRow:
    step()
    step.model.zero_grad(set_to_none=True)
    return {"peak_bytes": peak_bytes(step, device)}


def row_of(shape: Shape, run: Run, name: str, samples: Samples | None = None) -> NewRow:
    vision, text = shape.vision, shape.text
    small, middle, large = shape.counts
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return new_row(
        op="end_to_end",
        case=f"mixed {small}/{middle}/{large} 2:3:5" if name == "mixed" else f"{name} {large}",
        tokens=int(samples.rows.sum()) if samples else "",
        mode="forward+backward",
        backend=info()["ops"]["project_tokens"],
        dtype=run.dtype_name,
        sets=1,
        seed=SEED,
        note=(
            f"{shape.samples} samples; {text['num_hidden_layers']} layers each; encoder "
            f"{vision['hidden_size']} wide, {patches} patches; language model "
            f"{text['hidden_size']} wide; {torch.get_num_threads()} threads"
        ),
    )
