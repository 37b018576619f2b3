"""Argument checks shared by the ops: errors name the argument, the value and what is expected."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

Grid = tuple[int, int]
MAX_SIDE = 2**16  # patches or cells along an axis, whose tables are O(side)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT_DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def check_tensor(name: str, value: object, *, ndim: int | None = None) -> torch.Tensor:
    """Check that ``value`` is a dense tensor, of ``ndim`` dimensions if given, and return it."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    return value


def check_float(name: str, value: torch.Tensor) -> None:
    """Check that the ops compute in the dtype of ``value``."""
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def check_like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that a tensor is on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}"
        )


def check_shape(name: str, value: torch.Tensor, shape: tuple[int, ...], symbols: str) -> None:
    """Check the shape of a tensor; ``symbols`` spell it in errors, e.g. "H, C"."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape [{symbols}] = {shape}, got {tuple(value.shape)}")


def check_grids(name: str, grids: object) -> list[Grid]:
    """Return ``grids`` as a list of (height, width) pairs of positive host integers."""
    if isinstance(grids, torch.Tensor) or not isinstance(grids, Sequence):
        raise TypeError(
            f"{name} must be a sequence of (height, width) pairs of ints, one per image, "
            f"got {type(grids).__name__}"
        )
    if not torch.compiler.is_compiling() and _are_plain_grids(grids):
        return list(grids)
    checked: list[Grid] = []
    for index, grid in enumerate(grids):
        if (
            isinstance(grid, str)
            or not isinstance(grid, Sequence)
            or len(grid) != 2
            or not all(isinstance(side, Integral) and not isinstance(side, bool) for side in grid)
        ):
            raise TypeError(f"{name}[{index}] must be a (height, width) pair of ints, got {grid!r}")
        height, width = int(grid[0]), int(grid[1])
        if height < 1 or width < 1:
            raise ValueError(f"{name}[{index}] must have sides of at least 1, got {grid!r}")
        if not torch.compiler.is_compiling() and max(height, width) > MAX_SIDE:
            raise ValueError(f"{name}[{index}] must have sides of at most {MAX_SIDE}, got {grid!r}")
        checked.append((height, width))
    return checked


def _are_plain_grids(grids: Sequence[Any]) -> bool:
    """Return whether all are tuples of two positive ints, by loops in C for large batches."""
    if set(map(type, grids)) != {tuple} or set(map(len, grids)) != {2}:
        return False
    sides = list(chain.from_iterable(grids))
    return set(map(type, sides)) == {int} and min(sides) >= 1 and max(sides) <= MAX_SIDE


def check_count(name: str, value: object) -> int:
    """Return ``value`` as a host int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def check_eps(eps: object) -> float:
    """Return ``eps`` as a positive float."""
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps must be a float, got {eps!r}")
    value = float(eps)
    if not 0 < value < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}")
    return value


def autocast_enabled(device: torch.device) -> bool:
    """Return whether autocast chooses dtypes on ``device``; the meta device has no autocast."""
    kind = device.type
    return _has_autocast(kind) and torch.is_autocast_enabled(kind)


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# Up to torch 2.11, a compiler cannot look into it. It never changes: see select_backend.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def match_weight(name: str, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` in the dtype that a matrix product with ``x``, of floats, needs.

    Under autocast the product chooses the dtype itself. Outside it, float32 (master) weights
    serve float16 and bfloat16 activations; any other mixture is refused.
    """
    if weight.dtype == x.dtype:
        return weight
    check_float(name, weight)
    if autocast_enabled(x.device) and torch.float64 not in (weight.dtype, x.dtype):
        return weight
    if weight.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        return weight.to(x.dtype)
    raise TypeError(
        f"{name} must be {x.dtype} like x (or float32 where x is float16 or bfloat16, or any "
        f"float type but float64 under torch.autocast), got {weight.dtype}"
    )


def check_linear(
    name: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    width: int,
    symbols: str,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check a Linear of ``width`` inputs; return its parameters in the dtype for products with x.

    ``symbols`` spell the weight's shape in errors, e.g. "H, C"; ``rows`` of None take any number.
    """
    weight_name, bias_name = f"{name}_weight", f"{name}_bias"
    check_tensor(weight_name, weight, ndim=2)
    rows = weight.shape[0] if rows is None else rows
    check_shape(weight_name, weight, (rows, width), symbols)
    check_like(weight_name, weight, "x", x)
    weight = match_weight(weight_name, weight, x)
    if bias is not None:
        check_tensor(bias_name, bias)
        check_shape(bias_name, bias, (rows,), symbols[:1])
        check_like(bias_name, bias, "x", x)
        bias = match_weight(bias_name, bias, x)
    return weight, bias


def in_autocast_dtype(
    device: torch.device, *tensors: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Return the tensors in the dtype that autocast gives a Linear on ``device``, if it is on.

    Autocast leaves float64 alone.
    """
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    )


def check_int(name: str, value: object) -> int:
    """Return ``value`` as a host int that fits int64."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit int64, got {number}")
    return number


def check_ints(name: str, values: object) -> np.ndarray:
    """Return a 1-D sequence, array or CPU tensor of ints as a contiguous int64 array.

    The result may share memory with ``values``: copy what must not change.
    """
    if isinstance(values, torch.Tensor):
        array = _tensor_of_ints(name, values)
    elif isinstance(values, np.ndarray):
        array = values
    elif isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        array = _sequence_of_ints(name, values)
    else:
        raise TypeError(f"{name} must be a 1-D sequence of ints, got {type(values).__name__}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {array.shape}")
    if array.dtype.kind not in "iu" and array.size > 0:
        # numpy has dtype object for ints beyond 64 bits
        for index, value in enumerate(array if array.dtype.kind == "O" else ()):
            check_int(f"{name}[{index}]", value)
        raise TypeError(f"{name} must hold ints, got {array.dtype}")
    if array.dtype == np.uint64 and array.size > 0 and int(array.max()) >= 2**63:
        index = int(array.argmax())
        raise ValueError(f"{name}[{index}] must fit int64, got {array[index]}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _tensor_of_ints(name: str, values: torch.Tensor) -> np.ndarray:
    """Return the memory of a host tensor as an array; refuse tensors without such memory."""
    if values.device.type != "cpu":
        raise ValueError(f"{name} is read on the host: expected the CPU, got {values.device}")
    if values.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor of ints, got layout {values.layout}")
    if values.numel() == 0:  # torch.tensor([]) is of floats
        return np.empty(tuple(values.shape), np.int64)
    if values.dtype not in INT_DTYPES:
        raise TypeError(f"{name} must hold ints, got {values.dtype}")
    try:
        return values.numpy()
    except (RuntimeError, TypeError, AssertionError) as error:  # fake and wrapped tensors
        raise TypeError(
            f"{name} must be a tensor whose numbers can be read, got {type(values).__name__} "
            f"({error})"
        ) from None


def _sequence_of_ints(name: str, values: Sequence[object]) -> np.ndarray:
    """Return a sequence as an array, of a given dtype because numpy would guess: it makes floats
    of large ints beside negative ones, and ints of bools beside ints."""
    kinds = set(map(type, values))
    if kinds & {bool, np.bool_}:
        index = next(at for at, value in enumerate(values) if isinstance(value, (bool, np.bool_)))
        raise TypeError(f"{name} must hold ints, got bool: {name}[{index}] is {values[index]}")
    try:
        if kinds and all(issubclass(kind, Integral) for kind in kinds):
            # Python ints raise an error on overflow; numpy ints would wrap.
            ints = values if kinds == {int} else [int(value) for value in values]  # type: ignore[call-overload]
            return np.array(ints, np.int64)
        return np.asarray(values)
    except OverflowError:
        for index, value in enumerate(values):
            check_int(f"{name}[{index}]", value)
        raise
    except ValueError:  # rows of different lengths
        raise TypeError(f"{name} must be a 1-D sequence of ints, got nested sequences") from None
    except (RuntimeError, TypeError) as error:  # tensors that numpy cannot read
        raise TypeError(f"{name} must be a 1-D sequence of ints, got {error}") from None
