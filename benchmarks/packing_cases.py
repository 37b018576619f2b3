"""Packing: batches of prompts and images, and what other models do instead."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import SEED, Batch, Case, Leaves, Variant, Work
from tokenflex_kernels import PackPlan, merge_vision, pack_embeddings, plan_packing

# What is only moved must come out bit by bit.
EXACT = {"result": 0.0, "vision": 0.0, "embeds": 0.0}
IMAGE = 0  # peers look the placeholder up in the table too, so it must be one of its ids


@dataclass(frozen=True)
class Prompts:
    """``samples`` prompts of ``text`` tokens and one image each, of 64, 144, 256, 64, .. tokens
    (or all of ``count``), ``width`` wide, over a table of ``vocabulary`` rows."""

    samples: int
    text: int
    width: int
    vocabulary: int
    count: int | None = None

    @property
    def name(self) -> str:
        count = "64/144/256" if self.count is None else self.count
        return f"{self.samples}x({self.text} text + {count} vision) D={self.width}"

    @property
    def counts(self) -> list[int]:
        counts = [(64, 144, 256)[i % 3] for i in range(self.samples)]
        return counts if self.count is None else [self.count] * self.samples

    @property
    def tokens(self) -> int:
        return self.samples * self.text + sum(self.counts)

    def arguments(self, seed: int = 0) -> tuple[list[torch.Tensor], list[int]]:
        """The first arguments of ``plan_packing``: the image stands in the middle of its text."""
        generator = torch.Generator().manual_seed(seed)
        prompts = []
        for _ in range(self.samples):
            ids = torch.randint(1, self.vocabulary, (self.text + 1,), generator=generator)
            ids[self.text // 2] = IMAGE
            prompts.append(ids)
        return prompts, self.counts


@dataclass(frozen=True)
class Packed:
    """A plan, and what the peers are given in its place.

    Attributes:
        rows: int64 [vision], the vision rows' numbers.
        text_ids: int64 [text], the ids of the text rows alone.
        text_pieces: how many text rows stand before and after each image, on the host.
        padded_ids: int64 [samples, longest], the samples side by side.
        padded_mask: bool [samples, longest], False on padding.
    """

    plan: PackPlan
    rows: torch.Tensor
    text_ids: torch.Tensor
    text_pieces: list[int]
    padded_ids: torch.Tensor
    padded_mask: torch.Tensor


def packed(prompts: Prompts, device: str, seed: int) -> Packed:
    plan = plan_packing(*prompts.arguments(seed), IMAGE)
    samples = plan.input_ids.split(plan.lengths)
    ones = [torch.ones(length, dtype=torch.bool) for length in plan.lengths]
    before = prompts.text // 2
    return Packed(
        plan=plan.to(device),
        rows=plan.vision_rows.long().to(device),
        text_ids=plan.input_ids[plan.source >= 0].to(device),
        text_pieces=[before, prompts.text - before] * prompts.samples,
        padded_ids=pad_sequence(samples, batch_first=True, padding_value=1).to(device),
        padded_mask=pad_sequence(ones, batch_first=True).to(device),
    )


# ---- packing


def ours(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    return pack_embeddings(leaves["table"], leaves["vision"], fixed.plan)


def ours_sparse(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    return pack_embeddings(leaves["table"], leaves["vision"], fixed.plan, sparse_grad=True)


def masked_scatter(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    """As most Hugging Face models have it: look up every row, then overwrite by a mask."""
    embeds = F.embedding(fixed.plan.input_ids, leaves["table"])
    mask = (fixed.plan.input_ids == IMAGE).unsqueeze(1).expand_as(embeds)
    return embeds.masked_scatter(mask, leaves["vision"])


def index_put(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    """The same by row number, known beforehand; in place where autograd allows it."""
    embeds = F.embedding(fixed.plan.input_ids, leaves["table"])
    if embeds.requires_grad:
        return embeds.index_put((fixed.rows,), leaves["vision"])
    return embeds.index_put_((fixed.rows,), leaves["vision"])


def index_put_sparse(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    """Its table gradient has a row for every row of the batch, not yet added up."""
    embeds = F.embedding(fixed.plan.input_ids, leaves["table"], sparse=True)
    return embeds.index_put((fixed.rows,), leaves["vision"])


def vllm_merge(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    """As vLLM merges, for inference: in place, by a mask of one column."""
    embeds = F.embedding(fixed.plan.input_ids, leaves["table"])
    return embeds.masked_scatter_((fixed.plan.input_ids == IMAGE).unsqueeze(1), leaves["vision"])


def nested_jagged(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    """A nested tensor of the samples: text, image, text of each put together, then all of them."""
    text = iter(F.embedding(fixed.text_ids, leaves["table"]).split(fixed.text_pieces))
    samples = [
        torch.cat([next(text), image, next(text)])
        for image in leaves["vision"].split(fixed.plan.token_counts)
    ]
    return torch.nested.as_nested_tensor(samples, layout=torch.jagged).values()


def flash_attn_unpad(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    """A padded batch merged as Hugging Face does, then flash-attn's way to drop the padding."""
    unpad_input = importlib.import_module("flash_attn.bert_padding").unpad_input
    embeds = F.embedding(fixed.padded_ids, leaves["table"])
    mask = (fixed.padded_ids == IMAGE).unsqueeze(2).expand_as(embeds)
    return unpad_input(embeds.masked_scatter(mask, leaves["vision"]), fixed.padded_mask)[0]


def pack_truth(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    """By indexing. The placeholder's row of the table is looked up, and given zeros."""
    text = F.embedding(fixed.plan.input_ids, leaves["table"])
    return text.index_copy(0, fixed.rows, leaves["vision"])


PACKERS = [
    Variant("tokenflex", ours, op="pack_embeddings"),
    # The gradient of masked_scatter counts the mask's ones, and waits for that count.
    Variant("embedding + masked_scatter", masked_scatter, waits=("backward", "forward+backward")),
    Variant("embedding + index_put", index_put),
    Variant("embedding + vLLM merge", vllm_merge, modes=("forward",)),
    Variant("embedding + nested jagged", nested_jagged),
]
FLASH_ATTN = Variant(
    "padded embedding + flash-attn unpad",
    flash_attn_unpad,
    waits=("forward", "backward", "forward+backward"),
)
SPARSE_PACKERS = [
    Variant("tokenflex, sparse_grad", ours_sparse, op="pack_embeddings"),
    Variant("embedding(sparse) + index_put", index_put_sparse),
]


# ---- merging into embeddings that are there


def our_merge(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    return merge_vision(leaves["embeds"], leaves["vision"], fixed.plan.vision_rows)


def masked_scatter_merge(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    mask = (fixed.plan.input_ids == IMAGE).unsqueeze(1).expand_as(leaves["embeds"])
    return leaves["embeds"].masked_scatter(mask, leaves["vision"])


def index_put_merge(leaves: Leaves, fixed: Packed) -> torch.Tensor:
    return leaves["embeds"].index_put((fixed.rows,), leaves["vision"])


MERGERS = [
    Variant("tokenflex", our_merge, op="merge_vision"),
    Variant("masked_scatter", masked_scatter_merge, waits=("backward", "forward+backward")),
    Variant("index_put", index_put_merge),
]


# ---- cases


def forward_case(prompts: Prompts) -> Case:
    """No gradient at all."""
    return _pack_case(prompts, prompts.name, _packers(), ("forward",), ())


def frozen_table_case(prompts: Prompts) -> Case:
    """The vision rows alone need a gradient: all that training a projector asks for."""
    name = f"{prompts.name}, frozen table"
    modes = ("backward", "forward+backward")
    return _pack_case(prompts, name, _packers(), modes, ("vision",))


def trained_table_case(prompts: Prompts, *, sparse: bool = False) -> Case:
    """The table's gradient too, dense or sparse."""
    name = f"{prompts.name}, {'sparse table gradient' if sparse else 'trained table'}"
    variants = SPARSE_PACKERS if sparse else _packers()
    modes = ("forward+backward",)
    return _pack_case(prompts, name, variants, modes, ("table", "vision"))


def has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _packers() -> list[Variant]:
    return [*PACKERS, FLASH_ATTN] if has_flash_attn() else PACKERS


def _pack_case(
    prompts: Prompts,
    name: str,
    variants: list[Variant],
    modes: tuple[str, ...],
    trained: tuple[str, ...],
) -> Case:
    def batch(dtype: torch.dtype, device: str, seed: int, first: Batch | None) -> Batch:
        fixed = packed(prompts, device, seed)
        generator = torch.Generator(device).manual_seed(seed)

        def rows(number: int) -> torch.Tensor:
            shape = (number, prompts.width)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        table = rows(prompts.vocabulary) if first is None else first.leaves["table"]
        vision = rows(len(fixed.rows))
        return Batch({"table": table, "vision": vision}, rows(prompts.tokens), fixed)

    ids = torch.cat(prompts.arguments(SEED)[0])
    distinct = ids[ids != IMAGE].unique().numel()
    return Case(
        op="pack_embeddings",
        name=name,
        tokens=prompts.tokens,
        batch=batch,
        truth=pack_truth,
        variants=variants,
        work=lambda itemsize: pack_work(
            prompts.tokens, sum(prompts.counts), distinct, prompts.width * itemsize, trained
        ),
        trained=trained,
        shared=("table",),
        modes=modes,
        limits=EXACT,
    )


def pack_work(
    rows: int, vision_rows: int, distinct_ids: int, row_bytes: int, trained: tuple[str, ...]
) -> dict[str, Work]:
    """Bytes that must move: no cache helps, nothing moves twice, row maps left out.

    Forward reads and writes every row. Backward reads and writes the vision rows' gradient; with a
    trained table it also reads the text rows' gradient and writes a row of sums for each id in use.
    (The zeros in the rest of a dense [V, D] gradient, which every variant writes, are not counted.)
    """
    forward = 2 * rows
    backward = 2 * vision_rows
    if "table" in trained:
        backward += rows - vision_rows + distinct_ids
    return _work(forward * row_bytes, backward * row_bytes)


def merge_case(prompts: Prompts) -> Case:
    """Embeddings and vision rows both need a gradient."""

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        fixed = packed(prompts, device, seed)
        generator = torch.Generator(device).manual_seed(seed)
        embeds, vision, grad = (
            torch.randn(number, prompts.width, generator=generator, device=device, dtype=dtype)
            for number in (prompts.tokens, len(fixed.rows), prompts.tokens)
        )
        return Batch({"embeds": embeds, "vision": vision}, grad, fixed)

    # Backward reads every row of the gradient; it writes the vision rows' and, with zeros in
    # their place, that of the embeddings.
    vision = sum(prompts.counts)
    return Case(
        op="merge_vision",
        name=prompts.name,
        tokens=prompts.tokens,
        batch=batch,
        truth=index_put_merge,
        variants=MERGERS,
        work=lambda itemsize: _work(
            2 * prompts.tokens * prompts.width * itemsize,
            (2 * prompts.tokens + vision) * prompts.width * itemsize,
        ),
        limits=EXACT,
    )


def _work(forward: int, backward: int) -> dict[str, Work]:
    return {
        "forward": Work(forward),
        "backward": Work(backward),
        "forward+backward": Work(forward + backward),
    }
