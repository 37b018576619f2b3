"""Trace a part for any batch, and compare what was written with the part itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenflex.errors import ReportedError
from tokenflex.serving.export.parts import Part

BATCHES = (1, 3, 5)
"""Batch sizes of the comparison; the graph was traced with another."""
_TRACED_BATCH = 2


def trace(part: Part) -> torch.export.ExportedProgram:
    """Return the part's graph, with plain PyTorch ops alone and all named sizes dynamic."""
    sizes = {size for shape in part.inputs.values() for size in shape if isinstance(size, str)}
    # The sum of two others, which a Dim of its own could not be.
    dims = {size: torch.export.Dim(size) for size in sorted(sizes - {"total"})}
    dims["total"] = torch.export.Dim.AUTO
    shapes = [
        {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for shape in part.inputs.values()
    ]
    example = part.example(_TRACED_BATCH)
    dynamic_shapes: tuple[Any, ...] = tuple(shapes)
    if part.name == "language":  # its last parameter takes all that follow
        dynamic_shapes = (*shapes[:3], tuple(shapes[3:]))
    with torch.no_grad():
        return torch.export.export(part.module, example, dynamic_shapes=dynamic_shapes)


def largest_error(
    part: Part, run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
) -> tuple[float, float]:
    """Compare a written graph with its part, on random inputs at several batch sizes.

    Returns:
        The largest difference, and the largest value of the part's outputs. The difference is
        infinite where one of the two is not finite.

    Raises:
        ReportedError: the shapes of the outputs differ.
    """
    error = scale = 0.0
    generator = torch.random.get_rng_state()
    try:
        for batch in BATCHES:
            torch.manual_seed(batch)
            inputs = part.example(batch)
            with torch.no_grad():
                expected = part.module(*inputs)
            expected = expected if isinstance(expected, tuple) else (expected,)
            outputs = run(inputs)
            for name, mine, other in zip(part.outputs, expected, outputs, strict=True):
                if mine.shape != other.shape:
                    raise ReportedError(
                        f"the graph of {part.name} gives {name} of shape {list(other.shape)} where "
                        f"the model gives {list(mine.shape)}"
                    )
                mine, other = (_of_real_tokens(part, inputs, x) for x in (mine, other))
                difference = float((mine - other).abs().max())
                error = max(error, difference if difference == difference else float("inf"))
                scale = max(scale, float(mine.abs().max()))
    finally:
        torch.random.set_rng_state(generator)
    return error, scale


def _of_real_tokens(
    part: Part, inputs: Sequence[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    """Return the rows of an output that are no padding, whose values may be anything."""
    if part.name != "language":
        return output
    mask = inputs[1].bool()
    if output.ndim == 3:  # logits, of the new tokens
        return output[mask[:, -output.shape[1] :]]
    return output.transpose(1, 2)[mask]
