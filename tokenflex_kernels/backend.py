"""The implementation that an op runs, chosen for each call by device and ``TOKENFLEX_BACKEND``.

Every op has a ``reference`` in plain PyTorch (or plain Python for the host ops), which runs
anywhere. Some have faster implementations:

* ``native``: the compiled extension on host memory;
* ``cuda``: the compiled extension on CUDA tensors;
* ``triton``: Triton kernels on CUDA tensors.

``TOKENFLEX_BACKEND=auto`` (the default) takes the fastest implementation that runs on the tensors'
device. ``reference`` takes the reference for every op. ``native``, ``triton`` and ``cuda`` take
that implementation for every op that has one, leave the other ops at their automatic choice, and
refuse tensors that it cannot run on: an explicit choice is never replaced silently.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

BACKENDS = ("auto", "reference", "native", "triton", "cuda")

# Fastest first; `reference` is implied as the last of each row.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "pool_norm": ("triton", "native"),
    "swiglu": ("triton", "native"),
    "project_tokens": ("triton", "native"),
    "project_and_pack": ("triton", "native"),
    "plan_packing": ("native",),
    "pack_embeddings": ("cuda", "native"),
    "unpack_vision": ("cuda", "native"),
    "merge_vision": ("cuda", "native"),
    "bin_pack": ("native",),
    "balance_bins": ("native",),
}


# The memory of os.environ: a look-up takes 0.03 us here and 0.9 us through its methods.
_VARIABLES: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
_BACKEND, _INTERPRET = b"TOKENFLEX_BACKEND", b"TRITON_INTERPRET"


@cache
def extension() -> ModuleType | None:
    """Return the compiled extension ``tokenflex_kernels._C``, or None where it was not built."""
    try:
        return importlib.import_module("tokenflex_kernels._C")
    except ModuleNotFoundError as error:
        # Only a missing module means "not built"; a broken build must not hide.
        if error.name != "tokenflex_kernels._C":
            raise
        return None
    except ImportError as error:
        raise ImportError(
            f"the compiled extension of tokenflex cannot be loaded here: {error}; build it for "
            "this machine: pip install --force-reinstall --no-deps --no-binary tokenflex tokenflex",
            name=error.name,
            path=error.path,
        ) from error


def compiled_extension() -> ModuleType:
    """Return the compiled extension, or raise a RuntimeError where it was not built."""
    compiled = extension()
    if compiled is None:
        raise RuntimeError("this op needs the extension tokenflex_kernels._C, which is not built")
    return compiled


def requested_backend() -> str:
    """Return the value of ``TOKENFLEX_BACKEND``.

    Raises:
        ValueError: the value is not one of ``BACKENDS``.
    """
    value = os.environ.get("TOKENFLEX_BACKEND", "auto")
    if value not in BACKENDS:
        raise ValueError(
            f"TOKENFLEX_BACKEND must be one of {', '.join(BACKENDS)}, but is {value!r}"
        )
    return value


def _runs_on(implementation: str, device_type: str) -> bool:
    if implementation == "native":
        return device_type == "cpu" and extension() is not None
    if implementation == "cuda":
        compiled = extension()
        return device_type == "cuda" and compiled is not None and compiled.has_cuda
    if implementation == "triton":
        interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return (device_type == "cuda" or interpreted) and _has_triton()
    return True


@cache
def _has_triton() -> bool:
    """Return whether Triton is installed, and for NVIDIA: launches use options of its own."""
    return importlib.util.find_spec("triton") is not None and torch.version.hip is None


def select_backend(
    op: str, device: torch.device | str = "cpu", *, beyond_triton: str | None = None
) -> str:
    """Return the implementation of ``op`` to run on tensors of ``device``.

    Args:
        op: a key of ``IMPLEMENTATIONS``.
        device: of the op's tensors.
        beyond_triton: the property of these tensors that the Triton kernels do not support, or
            None. The reference takes such calls.

    Returns:
        One of "triton", "cuda", "native", "reference".

    Raises:
        ValueError: ``TOKENFLEX_BACKEND`` is not a known value, or names an implementation that
            this op has but that cannot run on ``device`` or on these tensors.
    """
    return _choose(op, device, beyond_triton, _VARIABLES.get(_BACKEND), _VARIABLES.get(_INTERPRET))


@cache
def _choose(
    op: str, device: torch.device | str, beyond_triton: str | None, *variables: bytes | None
) -> str:
    """Make the choice of :func:`select_backend`, once for each value of the ``variables``."""
    requested = requested_backend()
    if requested == "reference":
        return "reference"
    device_type = (device if isinstance(device, torch.device) else torch.device(device)).type
    candidates = IMPLEMENTATIONS[op]
    if requested in candidates:
        if not _runs_on(requested, device_type):
            raise ValueError(
                f"TOKENFLEX_BACKEND={requested} was asked for, but {op} cannot run it on "
                f"{device_type} tensors here; expected {_requirement(requested)}"
            )
        if requested == "triton" and beyond_triton:
            raise ValueError(
                f"TOKENFLEX_BACKEND=triton was asked for, but the kernels of {op} do not take "
                f"{beyond_triton}; the reference does"
            )
        return requested
    for implementation in candidates:
        if implementation == "triton" and beyond_triton:
            continue
        if _runs_on(implementation, device_type):
            return implementation
    return "reference"


# A compiled function makes the choice once, as it is traced: devices and environment variables are
# no part of a graph. This is all that torch.compiler.assume_constant_result does, but naming that
# imports the compiler, and Triton with it.
select_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
requested_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _requirement(implementation: str) -> str:
    if implementation == "native":
        return "CPU tensors and the compiled extension tokenflex_kernels._C"
    if implementation == "cuda":
        compiled = extension()
        state = "not built"
        if compiled is not None:
            state = "built with nvcc" if compiled.has_cuda else "built without nvcc"
        return (
            f"CUDA tensors and an extension built with nvcc (here the extension is {state}, and "
            f"PyTorch sees {torch.cuda.device_count()} CUDA devices)"
        )
    return "Triton, and CUDA tensors or CPU tensors with TRITON_INTERPRET=1"
