"""``python -m experiments.speed.end_to_end``: one training step of a whole model.

Encoder, projector and language model process the same images and text four times: each image at the
largest count, or the three counts at 2 : 3 : 5; and as one packed row, or padded to the longest
sample. Shapes are those of SigLIP-400M and Qwen2.5-3B, both cut to the same few layers, so that
their shares of the time stay about right; tiny ones on the CPU. The output layer is not cut, but
runs on the answers only, an eighth of the text. The loss must be that of each sample run alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import ceilings
from benchmarks.costs import peak_bytes
from benchmarks.harness import DTYPES, SEED, Deadline, Entry, Run, Work, measure
from benchmarks.report import table
from benchmarks.results import NewRow, Row, add_shares, environment, new_row
from experiments.speed.models import Samples, Step, fields, parse_options, publish, random_model
from tokenflex.training.flops import training_flops
from tokenflex_kernels import info

LOSS_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """A model, and a batch of one image and ``prompt`` text tokens a sample."""

    vision: dict[str, Any]  # fields of the SigLIP configuration
    text: dict[str, Any]  # fields of the Qwen2 configuration
    samples: int  # a multiple of ten
    prompt: int  # the last eighth has a loss
    counts: tuple[int, int, int]  # vision tokens of an image, at 2 : 3 : 5

    def batch(self, mixed: bool) -> Samples:
        """Return samples of the largest count, or of all three, shuffled."""
        order = (2, 1, 2, 0, 2, 1, 2, 0, 1, 2) if mixed else (2,)
        counts = np.resize([self.counts[i] for i in order], self.samples)
        text, tiles = np.full_like(counts, self.prompt), np.ones_like(counts)
        return Samples(text, tiles, counts, text // 8)


def shape_of(device: str) -> Shape:
    shared = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    if device == "cpu":
        vision = fields(64, 128, 2, 4, image_size=64, patch_size=4)
        text = fields(128, 512, 2, 4, vocab_size=1_000, **shared)
        return Shape(vision, text, samples=10, prompt=56, counts=(16, 36, 64))
    vision = fields(1152, 4304, 3, 16, image_size=384, patch_size=14)
    text = fields(2048, 11_008, 3, 16, vocab_size=151_936, **shared)
    return Shape(vision, text, samples=40, prompt=220, counts=(64, 144, 256))


@torch.no_grad()
def loss_of_each_alone(model: Any, samples: Samples) -> float:
    """Return the mean of the losses of samples that run alone, neither padded nor packed.

    That is a step's loss, because all samples have the same number of answer tokens.
    """
    losses = [Step(model, samples, [i], packed=False).loss() for i in range(len(samples.rows))]
    return float(torch.stack(losses).mean())


def loss_error(losses: Sequence[torch.Tensor], expected: float, limit: float) -> float:
    loss = float(losses[0])
    error = abs(loss - expected) / expected
    if not error <= limit:
        raise ValueError(
            f"loss must be that of each sample alone, {expected:.6g}, got {loss:.6g}: off by "
            f"{error:.2g}, expected at most {limit:.2g}"
        )
    return float(f"{error:.3g}")


def step_flops(model: Any, samples: Samples) -> int:
    """Return the FLOPs of a step, counting causal attention as half and no padding."""
    flops = training_flops(model, ("vision", "projector", "text"))
    config = model.config.text_config
    attention = 2 * int((samples.rows**2).sum()) * config.hidden_size
    rest = samples.operations(flops, range(len(samples.rows)))
    return int(rest) + 3 * config.num_hidden_layers * attention


def measured(shape: Shape, run: Run) -> list[NewRow]:
    """Return a row for each of {fixed, mixed} x {padded, packed}; ``error`` is the loss's."""
    model = random_model(shape.vision, shape.text, run.device, run.dtype)
    entries = []
    for name in ("fixed", "mixed"):
        samples = shape.batch(mixed=name == "mixed")
        expected = loss_of_each_alone(model, samples)
        for variant in ("padded", "packed"):
            step = Step(model, samples, range(shape.samples), variant == "packed")
            entry = Entry(
                row=row_of(shape, run, name, samples) | {"variant": variant},
                calls=partial(list, [step]),  # a step touches more than any cache holds
                work=Work(flops=step_flops(model, samples)),
                check=partial(loss_error, expected=expected, limit=LOSS_LIMITS[run.dtype]),
                costs=partial(peak_of, step, run.device),
                timing="host",
            )
            entries.append(entry)
    return measure(entries, run, seconds=run.deadline.left / 3)


def peak_of(step: Step, device: str) -> NewRow:
    step()
    step.model.zero_grad(set_to_none=True)
    return {"peak_bytes": peak_bytes(step, device)}


def row_of(shape: Shape, run: Run, name: str, samples: Samples) -> NewRow:
    vision, text, counts = shape.vision, shape.text, shape.counts
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    mixed = f"mixed {'/'.join(map(str, counts))} 2:3:5"
    return new_row(
        op="end_to_end",
        case=mixed if name == "mixed" else f"fixed {counts[-1]}",
        tokens=int(samples.rows.sum()),
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


def summary(rows: Sequence[Row]) -> str:
    """Return a table of the steps, and the share of the saved tokens that becomes time."""
    steps = [row for row in rows if row["op"] == "end_to_end" and row["status"] == "ok"]
    lines = [
        (
            *(row["case"], row["variant"], f"{float(row['p50_us']) / 1000:.1f}"),
            *(row["tokens_per_s"], f"{100 * float(row['share_of_matmul'] or 0):.1f}%"),
            f"{int(row['peak_bytes'] or 0) / 2**20:.0f}",
        )
        for row in steps
    ]
    header = ("counts", "batch", "ms a step", "tokens a second", "of matmul", "peak MiB")
    parts = [table(header, *lines)]
    by_way = {(row["case"].split()[0], row["variant"]): row for row in steps}
    for variant in ("packed", "padded"):
        fixed, mixed = by_way.get(("fixed", variant)), by_way.get(("mixed", variant))
        if fixed and mixed:
            tokens = 1 - int(mixed["tokens"]) / int(fixed["tokens"])
            seconds = 1 - float(mixed["p50_us"]) / float(fixed["p50_us"])
            parts.append(
                f"{variant}: mixed counts save {tokens:.1%} of the sequence and {seconds:.1%} of "
                f"the time: {seconds / tokens:.0%} of the saving becomes time"
            )
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    seconds = (30, "time limit for the samples")
    options = parse_options("end_to_end", __doc__, arguments, seconds=seconds)
    rows: list[NewRow] = []
    dtype = DTYPES[options.device]
    run = Run(options.device, False, Deadline(options.seconds), emit=rows.extend, dtype=dtype)
    ceilings.suite(run)
    rows += measured(shape_of(options.device), run)
    add_shares(rows, environment(options.device))
    published = publish(rows, options.device, options.out)
    print(summary(published))
    return int(any(row["status"] != "ok" for row in published))


if __name__ == "__main__":
    sys.exit(main())
