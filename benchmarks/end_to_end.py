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

import torch

from benchmarks.costs import peak_bytes
from benchmarks.harness import SEED, Entry, Run, Work, failure_in, measure
from benchmarks.models import Step, fields, random_model
from benchmarks.prompts import IMAGE
from benchmarks.results import new_row
from tokenflex.training.flops import training_flops
from tokenflex_kernels import info

LOSS_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """A model, and a batch of one image and ``text`` tokens a sample.

    Attributes:
        vision, text: Fields of the SigLIP and the Qwen2 configuration.
        samples: Number of samples, a multiple of ten.
        prompt: Text tokens of each.
        counts: Vision tokens of an image, at 2 : 3 : 5.
    """

    vision: dict[str, int]
    text: dict[str, Any]
    samples: int
    prompt: int
    counts: tuple[int, int, int]

    @property
    def answer(self) -> int:
        """Tokens of each sample that have a loss: the last of its text."""
        return self.prompt // 8

    def batch(self, mixed: bool) -> list[int]:
        """Return the count of each sample: the largest, or the three shuffled."""
        small, middle, large = self.counts
        if not mixed:
            return [large] * self.samples
        ten = [large, middle, large, small, large, middle, large, small, middle, large]
        return [ten[i % 10] for i in range(self.samples)]


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


def step_of(
    model: Any, shape: Shape, counts: Sequence[int], packed: bool, samples: Sequence[int]
) -> Step:
    """Return the step of some of the batch's samples."""
    prompts, pixels = [], []
    for sample in samples:
        generator = torch.Generator().manual_seed(SEED + sample)
        vocabulary, side = shape.text["vocab_size"], shape.vision["image_size"]
        ids = torch.randint(2, vocabulary, (shape.prompt + 1,), generator=generator)
        ids[shape.prompt // 2] = IMAGE
        prompts.append(ids)
        pixels.append(torch.randn(3, side, side, generator=generator))
    answers = [shape.answer] * len(prompts)
    return Step(model, prompts, answers, torch.stack(pixels), [counts[i] for i in samples], packed)


@torch.no_grad()
def loss_of_each_alone(model: Any, shape: Shape, counts: Sequence[int]) -> float:
    """Return the loss that a step must have: the mean over samples, each run by itself, so that
    none is padded or packed. (All have as many answer tokens.)"""
    losses = [
        step_of(model, shape, counts, packed=False, samples=[i]).loss()
        for i in range(shape.samples)
    ]
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


def step_flops(model: Any, shape: Shape, counts: Sequence[int]) -> int:
    """Return the operations that a step needs, the causal half of attention included and padding
    not; backward is twice forward."""
    tokens = [shape.prompt + count for count in counts]
    total = training_flops(model, ("vision", "projector", "text")).total(
        tiles=shape.samples,
        vision_tokens=sum(counts),
        tokens=sum(tokens),
        targets=shape.samples * shape.answer,
    )
    attention = 2 * sum(length**2 for length in tokens) * shape.text["hidden_size"]
    return int(total) + 3 * shape.text["num_hidden_layers"] * attention


def suite(run: Run) -> None:
    run.emit(rows(shape_of(run), run))


def rows(shape: Shape, run: Run) -> list[dict[str, Any]]:
    """Return a row for each of {fixed, mixed} x {padded, packed}; ``error`` is the loss's."""
    failure = row_of(shape, run, "", "", [])
    run.begin(failure)
    with failure_in(failure, run):
        model = random_model(shape.vision, shape.text, run.device, run.dtype)
        entries = []
        for name in ("fixed", "mixed"):
            counts = shape.batch(mixed=name == "mixed")
            wanted = loss_of_each_alone(model, shape, counts)
            for variant in ("padded", "packed"):
                step = step_of(model, shape, counts, variant == "packed", range(shape.samples))
                entries.append(
                    Entry(
                        row=row_of(shape, run, name, variant, counts),
                        calls=partial(list, [step]),  # a step touches more than any cache holds
                        work=Work(flops=step_flops(model, shape, counts)),
                        check=partial(loss_error, wanted=wanted, limit=LOSS_LIMITS[run.dtype]),
                        costs=partial(peak_of, step, run.device),
                        timing="host",
                    )
                )
        return measure(entries, run, seconds=run.deadline.left / 3)
    return [failure]


def peak_of(step: Step, device: str) -> dict[str, Any]:
    step()
    step.model.zero_grad(set_to_none=True)
    return {"peak_bytes": peak_bytes(step, device)}


def row_of(shape: Shape, run: Run, name: str, variant: str, counts: list[int]) -> dict[str, Any]:
    mixed = name == "mixed"
    tokens = "/".join(map(str, shape.counts if mixed else shape.counts[2:]))
    vision, text = shape.vision, shape.text
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return new_row(
        op="end_to_end",
        case=f"{name} {tokens} {'2:3:5' if mixed else ''}".strip(),
        tokens=shape.samples * shape.prompt + sum(counts),
        mode="forward+backward",
        variant=variant,
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
