"""Batches of text and images, and PyTorch's own ops that project and pack them."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tests.kernels.common import eager_project, parameters_of, rows_of
from tokenflex_kernels import PackPlan, plan_packing, project_and_pack

IMAGE = 11  # the placeholder
VOCABULARY = 11


class Batch(NamedTuple):
    """The patch grids of images, their grids of tokens, and the prompts that show them."""

    in_grids: list
    out_grids: list
    plan: PackPlan

    @property
    def tokens(self) -> int:
        return rows_of(self.out_grids)


def batch_of(prompts, out_grids, in_grids=None, **options) -> Batch:
    """Return a batch of prompts, lists of ids with IMAGE where an image is."""
    in_grids = [(3, 4)] * len(out_grids) if in_grids is None else in_grids
    counts = [height * width for height, width in out_grids]
    return Batch(in_grids, out_grids, plan_packing(prompts, counts, IMAGE, **options))


BATCHES = {
    "interleaved": batch_of(
        [[1, IMAGE, 5, IMAGE, 1], [IMAGE, 7], [2, 3]], [(2, 2), (3, 1), (1, 2)]
    ),
    "one image": batch_of([[4, IMAGE, 2, 4]], [(2, 3)]),
    "neighbours": batch_of([[4, IMAGE, IMAGE], [IMAGE, 6]], [(2, 2), (1, 1), (2, 1)]),
    "other order": batch_of([[4, IMAGE, 2, IMAGE]], [(2, 2), (1, 3)], image_index=[1, 0]),
    # The first token has the first row and the last token the last, but others have not.
    "two exchanged": batch_of([[IMAGE] * 4], [(1, 2)] * 4, image_index=[0, 2, 1, 3]),
    "vision alone": batch_of([[IMAGE], [IMAGE]], [(2, 2), (3, 1)]),
    "samples of no rows": batch_of([[], [1, IMAGE], []], [(2, 2)]),
}
WITHOUT_IMAGES = {
    "text alone": batch_of([[1, 2], [3]], []),
    "no samples": batch_of([], []),
}


def random_batch(draw: random.Random) -> Batch:
    """Return 1 to 4 images among samples of any text."""
    images = draw.randint(1, 4)
    grids = [[(draw.randint(1, 5), draw.randint(1, 5)) for _ in range(images)] for _ in "io"]
    prompts: list[list[int]] = [[] for _ in range(draw.randint(1, 3))]
    shown = sorted(draw.randrange(len(prompts)) for _ in range(images))
    for sample in shown:
        prompts[sample] += [*draw.choices(range(VOCABULARY), k=draw.randint(0, 4)), IMAGE]
    prompts[-1] += draw.choices(range(VOCABULARY), k=draw.randint(0, 4))
    return batch_of(prompts, grids[1], grids[0])


def inputs_of(
    batch, width=12, hidden=20, text=8, dtype=torch.float32, device="cpu", missing=()
) -> dict:
    """Return x, the table and the weights by name."""
    return {
        "x": torch.randn(rows_of(batch.in_grids), width).to(device, dtype),
        "embedding": torch.randn(VOCABULARY, text).to(device, dtype),
        **parameters_of(width, hidden, text, dtype, device, missing),
    }


def gradient_of(batch, text=8, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(batch.plan.num_tokens, text).to(device, dtype)


def ours(batch, **options):
    """Return `project_and_pack` of the batch as a function of its inputs by name."""

    def op(x, embedding, **parameters):
        plan = batch.plan.to(embedding.device)
        grids = batch.in_grids, batch.out_grids
        return project_and_pack(x, *grids, embedding=embedding, plan=plan, **parameters, **options)

    return op


def peer(batch, **options):
    """Return the same by PyTorch's ops."""

    def op(x, embedding, **parameters):
        tokens = eager_project(x, batch.in_grids, batch.out_grids, **parameters, **options)
        plan = batch.plan.to(embedding.device)
        text = F.embedding(plan.source.clamp(min=0), embedding)
        return text.index_copy(0, plan.vision_rows.long(), tokens.to(text.dtype))

    return op
