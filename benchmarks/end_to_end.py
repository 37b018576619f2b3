"""Encoder -> projector -> packed language model: one training step, end to end.

At the shapes of SigLIP-400M and Qwen2.5-3B cut to a few layers; tiny ones on the CPU.

The same images and text four times: every image at 256 tokens, or 64, 144 and 256 at 2 : 3 : 5; and
as one packed row, or padded to the longest sample. Depth is cut by the same factor in encoder and
language model, so that their shares of the time stay about right; the output layer is not cut, but
runs on the answer's rows only, an eighth of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import COLUMNS, SEED, Deadline, Effort, Row, Work, reason, times
from benchmarks.timing import HostClock, peak_bytes, sample_in_turn
from tokenflex_kernels import plan_packing
from tokenflex_kernels._backend import select_backend

TRAINING = 3  # forward, and a backward of twice its work
LOSS_LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """Sizes of encoder, language model and batch: one image and ``text`` tokens a sample."""

    layers: int
    vision_width: int
    vision_hidden: int
    vision_heads: int
    pixels: int
    patch: int
    text_width: int
    text_hidden: int
    heads: int
    key_heads: int
    vocabulary: int
    samples: int
    text: int
    counts: tuple[int, int, int]

    @property
    def patches(self) -> int:
        return (self.pixels // self.patch) ** 2

    @property
    def answer(self) -> int:
        """Tokens of each sample that have a loss: the last of its text."""
        return self.text // 8

    @property
    def mixed(self) -> list[int]:
        """The three counts at 2 : 3 : 5, shuffled."""
        small, middle, large = self.counts
        ten = [large, middle, large, small, large, middle, large, small, middle, large]
        return [ten[i % 10] for i in range(self.samples)]

    @property
    def fixed(self) -> list[int]:
        return [self.counts[2]] * self.samples


def shape_of(device: str, quick: bool) -> Shape:
    if device == "cpu":
        return Shape(
            layers=1 if quick else 2,
            vision_width=64,
            vision_hidden=128,
            vision_heads=4,
            pixels=32 if quick else 64,
            patch=4,
            text_width=128,
            text_hidden=512,
            heads=4,
            key_heads=2,
            vocabulary=1_000,
            samples=10,
            text=56,
            counts=(16, 36, 64),
        )
    return Shape(
        layers=3,
        vision_width=1152,
        vision_hidden=4304,
        vision_heads=16,
        pixels=384,
        patch=14,
        text_width=2048,
        text_hidden=11_008,
        heads=16,
        key_heads=2,
        vocabulary=151_936,
        samples=20 if quick else 40,
        text=220,
        counts=(64, 144, 256),
    )


def build(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """The model with random weights."""
    from transformers import Qwen2Config, SiglipVisionConfig

    from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration

    vision = SiglipVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.pixels,
        patch_size=shape.patch,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.text_width,
        intermediate_size=shape.text_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )
    config = TokenFlexConfig(vision, text, image_token_id=0, num_image_tokens=shape.counts[2])
    torch.manual_seed(SEED)
    with torch.device(device):
        model = TokenFlexForConditionalGeneration(config)
    return model.to(dtype).train()


def prompts_of(shape: Shape) -> list[torch.Tensor]:
    """Token ids with one placeholder (0) in the middle of the question."""
    generator = torch.Generator().manual_seed(SEED)
    prompts = []
    for _ in range(shape.samples):
        ids = torch.randint(2, shape.vocabulary, (shape.text + 1,), generator=generator)
        ids[shape.text // 2] = 0
        prompts.append(ids)
    return prompts


def image_of(shape: Shape, sample: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + sample)
    return torch.randn(3, shape.pixels, shape.pixels, generator=generator)


def inputs_of(
    shape: Shape,
    counts: list[int],
    packed: bool,
    dtype: torch.dtype,
    device: str,
    samples: Sequence[int] | None = None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """The model's arguments, and the answer tokens to predict, ``shape.answer`` a sample.

    Args:
        samples: those of the batch to take; all if None.
    """
    samples = range(shape.samples) if samples is None else samples
    everyone = prompts_of(shape)
    prompts, counts = [everyone[i] for i in samples], [counts[i] for i in samples]
    pixels = torch.stack([image_of(shape, i) for i in samples]).to(device, dtype)
    inputs: dict[str, Any] = {"pixel_values": pixels, "num_image_tokens": counts}
    answers = torch.cat([ids[-shape.answer :] for ids in prompts]).to(device)
    steps = torch.arange(-shape.answer - 1, -1)  # a token is predicted one position before it
    plan = plan_packing(prompts, counts, 0)
    if packed:
        ends = plan.cu_seqlens[1:, None].long()
        inputs |= {"plan": plan.to(device), "logits_to_keep": (ends + steps).flatten().to(device)}
        return inputs, answers
    rows = plan.input_ids.split(plan.lengths)
    longest = max(plan.lengths)
    # On the left, so that all answers end in the last column.
    inputs["input_ids"] = torch.stack(
        [F.pad(ids, (longest - len(ids), 0), value=1) for ids in rows]
    ).to(device)
    inputs["attention_mask"] = torch.stack(
        [F.pad(torch.ones_like(ids), (longest - len(ids), 0)) for ids in rows]
    ).to(device)
    inputs["logits_to_keep"] = (longest + steps).to(device)
    return inputs, answers


def step(model: Any, inputs: dict[str, Any], answers: torch.Tensor) -> torch.Tensor:
    """Forward and backward; the gradients stay in the parameters until the next step."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, inputs, answers)
    loss.backward()
    return loss.detach()


def loss_of(model: Any, inputs: dict[str, Any], answers: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs).logits.flatten(0, 1)
    return F.cross_entropy(logits.float(), answers)


@torch.no_grad()
def loss_of_each_alone(
    model: Any, shape: Shape, counts: list[int], dtype: torch.dtype, device: str
) -> float:
    """What the loss must be: the mean over samples, each run by itself, so neither padded nor
    packed. (All have as many answer tokens.)"""
    losses = [
        loss_of(model, *inputs_of(shape, counts, False, dtype, device, [at]))
        for at in range(shape.samples)
    ]
    return float(torch.stack(losses).mean())


def forward_flops(shape: Shape, counts: list[int], hidden_width: int | None = None) -> int:
    """Floating-point operations that a forward needs, encoder included and padding not."""
    c, d, layers = shape.vision_width, shape.text_width, shape.layers
    patches = shape.samples * shape.patches
    encoder = 2 * patches * (3 * shape.patch**2 * c)
    encoder += layers * 2 * patches * (4 * c * c + 2 * c * shape.vision_hidden)
    encoder += layers * 4 * patches * shape.patches * c  # QK^T and AV
    hidden = hidden_width or 3 * c
    projector = 2 * sum(counts) * (2 * c * hidden + hidden * d)
    lengths = [shape.text + count for count in counts]
    key_width = d // shape.heads * shape.key_heads
    weights = 2 * d * d + 2 * d * key_width + 3 * d * shape.text_hidden
    language = layers * 2 * sum(lengths) * weights
    language += layers * 2 * sum(length**2 for length in lengths) * d  # causal: half of both
    head = 2 * shape.samples * shape.answer * d * shape.vocabulary
    return encoder + projector + language + head


def suite(device: str, quick: bool, deadline: Deadline) -> Iterator[Row]:
    """One row for each of {fixed, mixed} x {packed, padded}."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield from measure(shape_of(device, quick), dtype, device, Effort(30, deadline.left / 3))


def measure(shape: Shape, dtype: torch.dtype, device: str, effort: Effort) -> list[Row]:
    """The rows of one shape. ``error`` is that of the loss, against each sample's alone."""
    runs = {
        (name, variant): (counts, variant == "packed")
        for name, counts in (("fixed", shape.fixed), ("mixed", shape.mixed))
        for variant in ("padded", "packed")
    }
    rows: dict[Any, Row] = {}
    clocks: dict[Any, HostClock] = {}
    try:
        model = build(shape, dtype, device)
        wanted = {
            name: loss_of_each_alone(model, shape, counts, dtype, device)
            for name, counts in (("fixed", shape.fixed), ("mixed", shape.mixed))
        }
    except Exception as error:
        return [_row(shape, "", "", [], dtype, device) | {"status": reason(error)}]
    for key, (counts, packed) in runs.items():
        row = rows[key] = _row(shape, *key, counts, dtype, device)
        try:
            call = partial(step, model, *inputs_of(shape, counts, packed, dtype, device))
            call()
            model.zero_grad(set_to_none=True)
            row["peak_bytes"] = peak_bytes(call, device)
            clock = HostClock(partial(_twice, call), device)
            _loss_error(float(clock.results[0]), wanted[key[0]], dtype)
            clocks[key] = clock  # what computes another loss is not timed at all
        except Exception as error:
            row["status"] = reason(error)
    failed = sample_in_turn(clocks, effort.samples, effort.seconds)
    for key, clock in clocks.items():
        row, (counts, _) = rows[key], runs[key]
        try:
            if key in failed:
                raise failed[key]
            row["error"] = _loss_error(float(clock.results[0]), wanted[key[0]], dtype)
            work = Work(flops=TRAINING * forward_flops(shape, counts))
            row |= times(clock, row["tokens"], work) | {"status": "ok"}
        except Exception as error:
            row["status"] = reason(error)
    return list(rows.values())


def _twice(call: Callable[[], Any]) -> list[Callable[[], Any]]:
    """One batch will do: what a step touches exceeds every cache."""
    return [call]


def _loss_error(loss: float, wanted: float, dtype: torch.dtype) -> float:
    error = abs(loss - wanted) / wanted
    if not error <= LOSS_LIMIT[dtype]:
        raise ValueError(
            f"loss must be that of each sample alone, {wanted:.6g}, got {loss:.6g}: off by "
            f"{error:.2g}, expected at most {LOSS_LIMIT[dtype]:.2g}"
        )
    return float(f"{error:.3g}")


def _row(
    shape: Shape, name: str, variant: str, counts: list[int], dtype: torch.dtype, device: str
) -> Row:
    ratio = "2:3:5" if name == "mixed" else ""
    tokens = "/".join(map(str, shape.counts if name == "mixed" else shape.counts[2:]))
    return dict.fromkeys(COLUMNS, "") | {
        "op": "end_to_end",
        "case": f"{name} {tokens} {ratio}".strip(),
        "tokens": shape.samples * shape.text + sum(counts),
        "mode": "forward+backward",
        "variant": variant,
        "backend": select_backend("project_tokens", device),
        "dtype": str(dtype).removeprefix("torch."),
        "sets": 1,
        "seed": SEED,
        "note": (
            f"{shape.samples} samples; {shape.layers} layers each; encoder {shape.vision_width} "
            f"wide, {shape.patches} patches; language model {shape.text_width} wide; "
            f"{torch.get_num_threads()} threads"
        ),
    }
