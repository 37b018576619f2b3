"""Models, prompts and batches for the tests of packing: every family of the table, both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tests.dropin.table import CONFIGS, END, IMAGE, START, image_inputs, tiles_per_image
from tests.dropin.tiny import Prompt, batch, stock_model
from tokenflex import replace_projector
from tokenflex.dropin.families import family_of
from tokenflex.dropin.packing import is_per_token

NAMES = sorted(CONFIGS)
REFUSED = [name for name in NAMES if family_of(CONFIGS[name]()).no_packing]
PACKED = [name for name in NAMES if name not in REFUSED]
KINDS = ("stock", "converted")

# Of different lengths and numbers of images; the last one is text alone.
PROMPTS = [
    Prompt([3, 4, START, IMAGE, END, 5, 6], [9], [1]),
    Prompt([7, START, IMAGE, END, 8, START, IMAGE, END, 9, 10, 11], [25, 16], [2, 3]),
    Prompt([12, 13, 14, 15, 16], [], []),
]


def model_of(name: str, kind: str) -> Any:
    """Return a model of fixed weights, in evaluation mode."""
    model = stock_model(name)
    if kind == "converted":
        with torch.random.fork_rng():
            torch.manual_seed(1)
            replace_projector(model, num_image_tokens=16)
    return model.eval()


def padded(name: str, kind: str, model: Any, prompts: Sequence[Prompt] = PROMPTS) -> dict[str, Any]:
    """Return prompts as a right-padded batch with labels, as the kind of model takes them."""
    if kind == "stock":
        count = _stock_tokens(name, model)
        prompts = [p._replace(counts=[count] * len(p.counts)) for p in prompts]
        inputs = _stock_batch(name, prompts)
    else:
        inputs = batch(name, prompts, labels=True)
    return _right_padded(inputs)


def _stock_tokens(name: str, model: Any) -> int:
    """Return the tokens of a test image in the stock model."""
    outputs = model.base_model.get_image_features(**image_inputs(name, [1]), return_dict=True)
    tokens = outputs.pooler_output
    parts = tokens if isinstance(tokens, (list, tuple)) else [tokens]
    return sum(part.flatten(0, -2).shape[0] for part in parts)


def _stock_batch(name: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    # ``batch`` repeats counts for each tile, and those of a stock image are of all its tiles.
    tiles = tiles_per_image(name)
    assert all(count % tiles == 0 for p in prompts for count in p.counts)
    of_tiles = [p._replace(counts=[count // tiles for count in p.counts]) for p in prompts]
    inputs = batch(name, of_tiles, labels=True)
    inputs.pop("num_image_tokens", None)
    return inputs


def _right_padded(inputs: dict[str, Any]) -> dict[str, Any]:
    order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    columns = [name for name in inputs if is_per_token(name)]
    return {k: v.gather(1, order) if k in columns else v for k, v in inputs.items()}


def logits_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, float, Any]:
    """Return a forward's logits, the sum of its losses, and the gradient of each parameter."""
    labels = inputs["labels"]
    model.zero_grad(set_to_none=True)
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), float(loss.detach()), gradients


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
