"""A fresh projector that imitates the one it replaces, by least squares.

Training then starts from a model that already speaks about images, not from noise. What is asked of
the projector at a count: the stock projector's tokens, averaged to that count's grid.

The gated unit silu(gate x) * (up x) is set so that its hidden units are of two kinds: some are
linear in x (no gate; along the directions that the best linear map needs most), the others are
those of an ordinary network of one layer (up is 1, gate random). ``down`` on top of them is a
linear least-squares problem, solved in float64 with a ridge that is chosen on images held out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenflex.counts import Grid, TokenCount, token_grid
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import default_count, flat_grids
from tokenflex.dropin.model import as_stock, stock_projector_of
from tokenflex.dropin.variants import is_converted, unwrapped
from tokenflex_kernels import pool_norm

_RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)


@dataclass(frozen=True)
class FitReport:
    """How well a fitted projector imitates the stock one.

    Errors are relative: |projector - stock| / |stock|, both as Frobenius norms over all tokens.

    Attributes:
        before: of the projector as it was.
        after: of the fitted one, on the images it was fitted on.
        held_out: of one fitted on the other images, on the last quarter of them; None for fewer
            than two images.
        tokens: vision tokens that were fitted.
    """

    before: float
    after: float
    held_out: float | None
    tokens: int


def fit_projector(
    model: Any,
    images: Any,
    processor: Any = None,
    *,
    counts: Sequence[TokenCount] | None = None,
) -> FitReport:
    """Make the projector of a model converted in place imitate the stock one, in closed form.

    Costs one pass of the vision tower over ``images``, and a linear system of the projector's
    hidden width.

    Args:
        model: converted by :func:`tokenflex.replace_projector`, which kept the stock projector;
            with or without PEFT.
        images: a handful of pictures for ``processor``, or image inputs of the model as a dict
            ("pixel_values" and what comes with them).
        processor: the model's; may be None for a dict.
        counts: the counts to imitate at; the default count, a quarter and a ninth of it (as far as
            its sides divide) if None.

    Returns:
        The errors before and after.

    Raises:
        ValueError: the model is not converted in place, or there are no images.
    """
    model = unwrapped(model)
    stock = stock_projector_of(model) if is_converted(model) else None
    if stock is None:
        raise ValueError(
            "model must be converted in place by replace_projector: the stock projector to imitate "
            "is not there"
        )
    base, family = model.base_model, family_of(model.config)
    projector: Any = base.get_submodule(family.projector)
    reference = next(projector.parameters())
    stock.to(reference.device, reference.dtype)
    inputs = _image_inputs(base, images, processor, reference.device)
    grids = _default_grids(model.config) if counts is None else [token_grid(c) for c in counts]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            patches = family.patch_grids(base, **inputs)
            rows, in_grids = flat_grids(patches, model.config.tokenflex["patch_merge"])
            target, target_grids = _stock_tokens(model, inputs, flat_grids(patches)[1])
            report = _fit(projector, rows, in_grids, target, target_grids, grids)
    finally:
        for module, training in modes.items():
            module.training = training
    return report


def _default_grids(config: Any) -> list[Grid]:
    height, width = token_grid(default_count(config))
    return [
        (height // divisor, width // divisor)
        for divisor in (1, 2, 3)
        if not height % divisor and not width % divisor
    ]


def _image_inputs(base: Any, images: Any, processor: Any, device: Any) -> dict[str, Any]:
    """What the base model's ``get_image_features`` takes, for pictures or given inputs."""
    if isinstance(images, Mapping):
        given = dict(images)
    else:
        if processor is None:
            raise ValueError("pictures need a processor; give one, or image inputs as a dict")
        pictures = list(images) if isinstance(images, (list, tuple)) else [images]
        if not pictures:
            raise ValueError("images must hold at least one picture, got none")
        options = {}
        if (merge := getattr(processor, "spatial_merge_size", 1)) > 1:
            # Mistral3's processor has images resized to whole groups of patches.
            options["patch_size"] = processor.patch_size * merge
        given = dict(processor.image_processor(pictures, return_tensors="pt", **options))
    names = inspect.signature(type(base).get_image_features).parameters
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
        if name in names and name != "num_image_tokens"
    }


def _stock_tokens(
    model: Any, inputs: dict[str, Any], in_grids: list[Grid]
) -> tuple[torch.Tensor, list[Grid]]:
    """The stock projector's tokens, flat [sum of h*w, D] and row-major, and each image's (h, w)."""
    family = family_of(model.config)
    caught: list[torch.Tensor] = []
    with as_stock(model) as base:
        if family.stock_tokens is not None:
            caught.append(family.stock_tokens(base, **inputs))
        else:
            handle = base.get_submodule(family.stock_projector).register_forward_hook(
                lambda module, args, output: caught.append(output)
            )
            try:
                base.get_image_features(**inputs)
            finally:
                handle.remove()
    tokens = torch.cat([output.flatten(0, -2) for output in caught])
    patches = sum(height * width for height, width in in_grids)
    # A stock projector keeps the grid, or merges m x m patches into a token.
    merge = isqrt(patches // len(tokens))
    grids = [(height // merge, width // merge) for height, width in in_grids]
    if sum(height * width for height, width in grids) != len(tokens):
        raise ValueError(
            f"the stock projector of {family.model_type} makes {len(tokens)} tokens of {patches} "
            "patches, which is no grid: register its family with stock_tokens, or use init='random'"
        )
    return tokens, grids


def _fit(
    projector: Any,
    rows: torch.Tensor,
    in_grids: list[Grid],
    target: torch.Tensor,
    target_grids: list[Grid],
    counts: list[Grid],
) -> FitReport:
    images = len(in_grids)
    # Per count and image: the tokens wanted, and the projector's own pooled and normed input.
    wanted, inputs, image_of_row = [], [], []
    rows, target = rows.double(), target.double()
    for grid in counts:
        wanted.append(pool_norm(target, target_grids, [grid] * images, mode=projector.pooling))
        inputs.append(pool_norm(rows, in_grids, [grid] * images, mode=projector.pooling))
        image_of_row.append(torch.arange(images).repeat_interleave(grid[0] * grid[1]))
    y, pooled = torch.cat(wanted), torch.cat(inputs)
    image = torch.cat(image_of_row).to(y.device)

    before = _relative_error(_outputs(projector, pooled), y)
    _set_hidden_units(projector, pooled, y)
    hidden = _hidden(projector, pooled)
    held_out, ridge = None, _RIDGES[len(_RIDGES) // 2]
    if images > 1:
        kept = image < images - max(1, images // 4)
        solve = _ridge_solver(hidden[kept], y[kept])
        errors = {
            r: _relative_error(_with_ones(hidden[~kept]) @ solve(r), y[~kept]) for r in _RIDGES
        }
        ridge = min(errors, key=lambda r: errors[r])
        held_out = errors[ridge]
    solution = _ridge_solver(hidden, y)(ridge)
    projector.down.weight.copy_(solution[:-1].T)
    projector.down.bias.copy_(solution[-1])
    after = _relative_error(_outputs(projector, pooled), y)
    return FitReport(before, after, held_out, len(y))


def _set_hidden_units(projector: Any, pooled: torch.Tensor, y: torch.Tensor) -> None:
    """Half of the hidden units or fewer linear in the input, the others a random network's."""
    for name in ("layernorm", "gate", "up"):
        getattr(projector, name).reset_parameters()
    gate, up = projector.gate, projector.up
    rows = _linear_directions(_normed(projector, pooled), y, projector.hidden_width // 2)
    linear = len(rows)
    gate.weight[:linear] = 0
    gate.bias[:linear] = 1
    up.weight[:linear] = rows.to(up.weight)
    up.bias[:linear] = 0
    # Entries of variance 1 / C: the gate's inputs are then of size 1, where silu bends.
    nn.init.normal_(gate.weight[linear:], std=projector.vision_width**-0.5)
    up.weight[linear:] = 0
    up.bias[linear:] = 1


def _linear_directions(x: torch.Tensor, y: torch.Tensor, most: int) -> torch.Tensor:
    """[L, C], the directions of the input that a linear map to ``y`` needs most (reduced rank)."""
    weight = _ridge_solver(x, y)(_RIDGES[len(_RIDGES) // 2])[:-1]
    fitted = x @ weight
    # Eigenvalues come in ascending order.
    axes = torch.linalg.eigh(fitted.T @ fitted).eigenvectors.flip(1)
    rows = (weight @ axes[:, : min(most, x.shape[1], y.shape[1])]).T
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def _hidden(projector: Any, pooled: torch.Tensor) -> torch.Tensor:
    """The gated unit in float64, of the weights as they are stored."""
    gate, up, x = projector.gate, projector.up, _normed(projector, pooled)
    gated = F.silu(F.linear(x, gate.weight.double(), gate.bias.double()))
    return gated * F.linear(x, up.weight.double(), up.bias.double())


def _normed(projector: Any, pooled: torch.Tensor) -> torch.Tensor:
    norm = projector.layernorm
    return F.layer_norm(
        pooled, norm.normalized_shape, norm.weight.double(), norm.bias.double(), norm.eps
    )


def _outputs(projector: Any, pooled: torch.Tensor) -> torch.Tensor:
    down = projector.down
    return F.linear(_hidden(projector, pooled), down.weight.double(), down.bias.double())


def _with_ones(hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)


def _ridge_solver(hidden: torch.Tensor, y: torch.Tensor) -> Any:
    """ridge -> [H + 1, D], the weights and the bias that fit ``y`` best."""
    x = _with_ones(hidden)
    gram, right = x.T @ x, x.T @ y
    scale = gram.diagonal().mean()

    def solve(ridge: float) -> torch.Tensor:
        damped = gram + torch.diag(torch.full_like(gram[0], float(ridge * scale)))
        return torch.cholesky_solve(right, torch.linalg.cholesky(damped))

    return solve


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
