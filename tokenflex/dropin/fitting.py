"""Initialisation of a new projector that imitates the stock one, by least squares.

Training then starts from a model that can already describe images. At each count, the targets are
the stock projector's tokens, averaged to the grid of that count.

Hidden units of the gated unit silu(gate x) * (up x) are of two kinds. Some are linear in x (a
constant gate; along the directions that the best linear map needs most). The others are those of a
network with one layer (up is 1, the gate is random). ``down`` on top of them is a linear
least-squares problem, which is solved in float64 with a ridge that is chosen on held-out images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenflex.counts import Grid, TokenCount, token_grid
from tokenflex.dropin.features import (
    default_count,
    fitted_counts,
    flat_grids,
    image_input_names,
)
from tokenflex.dropin.model import as_stock, stock_projector_of
from tokenflex.dropin.variants import is_converted, unwrapped
from tokenflex.terminal import work_bar
from tokenflex_kernels import pool_norm
from tokenflex_kernels.swiglu.reference import activation

_RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)
_DEFAULT_RIDGE = 1e-4
_PARTS = 5
"""Parts of the work: encoding, the stock tokens, hidden units, the ridge and the solution."""


@dataclass(frozen=True)
class FitReport:
    """Errors of a projector against the stock one.

    Errors are relative: |projector - stock| / |stock|, both as Frobenius norms over all tokens.

    Attributes:
        before: Error of the projector as it was.
        after: Error of the fitted projector, on the images it was fitted on.
        held_out: Error on the last quarter of the images, of a projector fitted on the others; None
            for fewer than two images.
        tokens: Number of vision tokens that were fitted.
        patch_grid: Largest grid (height, width) that the new projector pools, of all images.
        stock_grid: Largest grid of the stock projector's tokens.
    """

    before: float
    after: float
    held_out: float | None
    tokens: int
    patch_grid: Grid
    stock_grid: Grid


def fit_projector(
    model: Any,
    images: Any,
    processor: Any = None,
    *,
    counts: Sequence[TokenCount] | None = None,
) -> FitReport:
    """Fit the projector of a model that was converted in place to the stock one, in closed form.

    Costs one pass of the vision encoder over ``images`` and the solution of a linear system of the
    projector's hidden width.

    Args:
        model: Converted by :func:`tokenflex.replace_projector`, which kept the stock projector;
            with or without PEFT.
        images: A few pictures for ``processor``, or image inputs of the model as a dict
            ("pixel_values" and what belongs to them).
        processor: The model's processor; may be None for a dict.
        counts: The counts to fit at; by default the model's default count, a quarter and a ninth of
            it, as far as its sides divide.

    Returns:
        The errors before and after.

    Raises:
        ValueError: The model was not converted in place, its family has no tokens to imitate, or
            there are no images.
    """
    model = unwrapped(model)
    stock = stock_projector_of(model) if is_converted(model) else None
    if stock is None:
        raise ValueError(
            "model must be converted in place by replace_projector: the stock projector to imitate "
            "is not there"
        )
    base, config = model.base_model, model.config
    family = type(base)._tokenflex_family
    if family.no_fit:
        raise ValueError(
            f"a projector cannot imitate that of {family.model_type}: {family.no_fit}; use "
            "init='random'"
        )
    projector: Any = base.get_submodule(family.projector)
    reference = next(projector.parameters())
    stock.to(reference.device, reference.dtype)
    inputs = _image_inputs(base, images, processor, reference.device)
    if counts is None:
        counts = fitted_counts(default_count(config))[::-1]
    grids = [token_grid(count) for count in counts]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), work_bar("fitting", _PARTS, unit="part", delay=0) as bar:
            patches = family.patch_grids(base, **inputs)
            bar.update()
            target = _stock_tokens(model, inputs, flat_grids(patches)[1])
            bar.update()
            rows = flat_grids(patches, config.tokenflex["patch_merge"])
            return _fit(projector, rows, target, grids, bar)
    finally:
        for module, training in modes.items():
            module.training = training


def _image_inputs(base: Any, images: Any, processor: Any, device: Any) -> dict[str, Any]:
    """Return the arguments of the base model's ``get_image_features`` for pictures or inputs."""
    if not isinstance(images, Mapping):
        if processor is None:
            raise ValueError("pictures need a processor; give one, or image inputs as a dict")
        if isinstance(images, (str, Path)) and Path(images).is_dir():
            raise ValueError(
                f"images must be pictures or image inputs, got the folder {images}: open its "
                "files, or use `tokenflex convert STOCK OUT --images FOLDER`"
            )
        pictures = list(images) if isinstance(images, (list, tuple)) else [images]
        if not pictures:
            raise ValueError("images must hold at least one picture, got none")
        options = {}
        if (merge := getattr(processor, "spatial_merge_size", 1)) > 1:
            # Mistral3's processor resizes images to whole groups of patches.
            options["patch_size"] = processor.patch_size * merge
        images = processor.image_processor(pictures, return_tensors="pt", **options)
    return {
        name: images[name].to(device) if isinstance(images[name], torch.Tensor) else images[name]
        for name in image_input_names(type(base)._tokenflex_stock_class)
        if name in images
    }


def _stock_tokens(
    model: Any, inputs: dict[str, Any], in_grids: list[Grid]
) -> tuple[torch.Tensor, list[Grid]]:
    """Return the stock projector's tokens, flat [sum of h*w, D], and the (h, w) of each image."""
    family = type(model.base_model)._tokenflex_family
    recorded: list[torch.Tensor] = []
    # Not every stock model casts its pixels.
    inputs = {
        name: value.to(model.dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    with as_stock(model) as base:
        if family.stock_tokens is not None:
            recorded.append(family.stock_tokens(base, **inputs))
        else:
            hook = base.get_submodule(family.stock_projector).register_forward_hook(
                lambda module, args, output: recorded.append(output)
            )
            try:
                base.get_image_features(**inputs)
            finally:
                hook.remove()
    tokens = torch.cat([output.flatten(0, -2) for output in recorded])
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
    patches: tuple[torch.Tensor, list[Grid]],
    target: tuple[torch.Tensor, list[Grid]],
    counts: list[Grid],
    bar: Any,
) -> FitReport:
    """Fit ``projector`` to map flat patches to flat tokens, each with the grids of its images.

    ``bar`` advances by the last three of :data:`_PARTS`.
    """
    images = len(patches[1])
    x, y = (
        torch.cat(
            [
                pool_norm(rows.double(), grids, [count] * images, mode=projector.pooling)
                for count in counts
            ]
        )
        for rows, grids in (patches, target)
    )
    image_of_row = torch.cat(
        [torch.arange(images).repeat_interleave(height * width) for height, width in counts]
    ).to(y.device)

    before = _relative_error(_outputs(projector, x), y)
    _set_hidden_units(projector, x, y)
    hidden = _hidden(projector, x)
    bar.update()
    held_out, ridge = None, _DEFAULT_RIDGE
    if images > 1:
        fitted = image_of_row < images - max(1, images // 4)
        solve = _ridge_solver(hidden[fitted], y[fitted])
        others = _with_ones(hidden[~fitted])
        errors = {r: _relative_error(others @ solve(r), y[~fitted]) for r in _RIDGES}
        ridge, held_out = min(errors.items(), key=lambda item: item[1])
    bar.update()
    solution = _ridge_solver(hidden, y)(ridge)
    projector.down.weight.copy_(solution[:-1].T)
    projector.down.bias.copy_(solution[-1])
    after = _relative_error(_outputs(projector, x), y)
    bar.update()
    patch_grid, stock_grid = (max(grids, key=prod) for _, grids in (patches, target))
    return FitReport(before, after, held_out, len(y), patch_grid, stock_grid)


def _set_hidden_units(projector: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """Make up to half of the hidden units linear in the input, and the others random."""
    for name in ("layernorm", "gate", "up"):
        getattr(projector, name).reset_parameters()
    gate, up = projector.gate, projector.up
    normed = copy.deepcopy(projector.layernorm).double()(x)
    directions = _linear_directions(normed, y, projector.hidden_width // 2)
    linear = len(directions)
    gate.weight[:linear] = 0
    gate.bias[:linear] = 1
    up.weight[:linear] = directions.to(up.weight)
    up.bias[:linear] = 0
    # With entries of variance 1 / C, the gate's outputs are of size 1, where silu bends.
    nn.init.normal_(gate.weight[linear:], std=projector.vision_width**-0.5)
    up.weight[linear:] = 0
    up.bias[linear:] = 1


def _linear_directions(x: torch.Tensor, y: torch.Tensor, most: int) -> torch.Tensor:
    """Return [L, C], the directions of x that a linear map to y needs most (reduced rank)."""
    weight = _ridge_solver(x, y)(_DEFAULT_RIDGE)[:-1]
    mapped = x @ weight
    # Eigenvalues come in ascending order.
    axes = torch.linalg.eigh(mapped.T @ mapped).eigenvectors.flip(1)
    rows = (weight @ axes[:, : min(most, x.shape[1], y.shape[1])]).T
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def _hidden(projector: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the hidden units of pooled patches, in float64 with the weights as stored."""
    norm, gate, up = (
        copy.deepcopy(layer).double()
        for layer in (projector.layernorm, projector.gate, projector.up)
    )
    x = norm(x)
    return activation(gate(x)) * up(x)


def _outputs(projector: Any, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(projector.down).double()(_hidden(projector, x))


def _with_ones(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 1), value=1.0)


def _ridge_solver(x: torch.Tensor, y: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """Return a function from a ridge to [H + 1, D], the weights and the bias that fit y best."""
    x = _with_ones(x)
    gram, right = x.T @ x, x.T @ y
    scale = gram.diagonal().mean()

    def solve(ridge: float) -> torch.Tensor:
        damped = gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.cholesky_solve(right, torch.linalg.cholesky(damped))

    return solve


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
