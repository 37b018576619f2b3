"""Registration of the ops in torch.library: ``torch.ops.tokenflex``, and calls of them.

Ops are registered by ``Library.define`` and ``Library.impl``, and those with a gradient have one
``autograd.Function``: ``torch.library.custom_op`` adds several times their cost to every call.

In plain eager mode a call from Python passes the dispatcher by, see :class:`Op`. Compilers,
tracers, modes, transforms, tensor subclasses and profilers get the registered op.

Within ``torch.func`` each transform is a level, and a call passes through the levels from the
innermost outwards. The autograd kernel of an op runs once for each level of differentiation and
records that level alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction, once_differentiable

from tokenflex_kernels.backend import requested_backend, select_backend
from tokenflex_kernels.flops import tell_counters
from tokenflex_kernels.tracing import is_exporting

Overload = Callable[..., Any]
BatchingRule = Callable[..., tuple[Any, Any]]

_LIBRARY = torch.library.Library("tokenflex", "FRAGMENT")


# ---- Calls.


class Op:
    """An op as Python code calls it: positional arguments, tensors first.

    A call runs the kernel at once, or the op's ``autograd.Function`` where a tensor requires grad,
    if nobody but them has business with it: in plain eager mode, on plain tensors. Otherwise it is
    the registered op's, ``overload``.
    """

    def __init__(
        self,
        overload: Any,
        kernel: Callable[..., Any],
        at_once: Callable[..., Any] | None = None,
    ) -> None:
        self.overload = overload
        self._kernel = kernel
        self._at_once = at_once
        types = [str(argument.type) for argument in overload._schema.arguments]
        self._tensors = max((at for at, kind in enumerate(types, 1) if "Tensor" in kind), default=0)
        self._record = self.record_result = overload

    def set_function(self, function: Any) -> None:
        """Let ``function`` record the calls with tensors that require grad."""
        self._record = eager_apply(function)

    def set_result_function(self, function: Any, floats: int) -> None:
        """Let ``function`` record the results of such calls, see :meth:`recorded`.

        It gets the first ``floats`` arguments and a tuple: the result, the other arguments, and the
        number of rows of each of the first.
        """
        self._floats = floats
        self.record_result = record_apply(function)

    def __call__(self, *arguments: Any) -> Any:
        # By itself, because a compiler replaces this test by its result and looks no further.
        if torch.compiler.is_compiling():
            return self.overload(*arguments)
        if not is_plain_mode():
            tell_counters()
            return self.overload(*arguments)
        if self._at_once is not None:
            result = self._at_once(*arguments)
            if result is not None:
                return self.recorded(result, *arguments)
        tensors = arguments[: self._tensors]
        if not _are_plain(tensors):
            return self.overload(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            return self._record(*arguments)
        return self._kernel(*arguments)

    def recorded(self, result: Any, *arguments: Any) -> Any:
        """Return ``result``, which was computed eagerly, as that of a call of the op."""
        if torch.is_grad_enabled():
            floats = arguments[: self._floats]
            if torch._C._any_requires_grad(*floats):
                sizes = tuple(tensor.shape[0] for tensor in floats)
                return self.record_result(*floats, (result, arguments[self._floats :], sizes))
        return result

    def below(self, *arguments: Any) -> Any:
        """Call the op as the ``forward`` of a Function does, see :func:`below_autograd`."""
        if is_plain_mode() and _are_plain(arguments[: self._tensors]):
            return self._kernel(*arguments)
        with below_autograd():
            return self.overload(*arguments)


def eager_apply(function: Any) -> Callable[..., Any]:
    """Return ``function.apply`` without what it does for torch.func, which takes 3 us."""
    return super(torch.autograd.Function, function).apply


def record_apply(function: Any) -> Callable[..., Any]:
    """Return :func:`eager_apply` of a Function whose result was computed before its ``forward``.

    Its backward is called directly: the engine's own method looks for it first, which takes 1 us.
    """
    function._backward_cls.apply = function.backward
    return eager_apply(function)


# The keys that the dispatcher adds to those of the tensors in every call. Tracers, dispatch modes,
# transforms and batching add further ones for as long as they are active.
_USUAL_KEYS = DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(
    DispatchKey.ADInplaceOrView
)
_USUAL = _USUAL_KEYS.raw_repr()


def is_plain_mode() -> bool:
    """Return whether nobody but the dispatcher itself has business with calls; takes 0.5 us."""
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() | _USUAL == _USUAL
        and not torch._C._is_torch_function_mode_enabled()
        and forward_ad._current_level < 0
        and not torch.autograd._profiler_enabled()  # shows the calls of ops
    )


def is_eager() -> bool:
    """Return whether a function may compute at once, on ordinary tensors in memory."""
    return not torch.compiler.is_compiling() and is_plain_mode()


def _are_plain(tensors: Sequence[Any]) -> bool:
    """Return whether the memory of all holds their very numbers; 0.4 us for each plain tensor."""
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if kind is not torch.Tensor and kind is not torch.nn.Parameter:
            return False
        if tensor.is_neg() or tensor._is_zerotensor():
            return False
        # No parameters: on the meta device, or of a transform, which may have ended.
        if kind is torch.Tensor and (tensor.is_meta or is_functorch_wrapped_tensor(tensor)):
            return False
    return True


def define(
    name: str,
    shapes: Callable[..., Any],
    kernel: Callable[..., Any],
    *,
    keys: Sequence[str] = ("CPU", "CUDA"),
    at_once: Callable[..., Any] | None = None,
) -> Op:
    """Define the op ``tokenflex::<name>``, with the schema that the kernel's annotations state.

    Args:
        name: of the op.
        shapes: the op on fake tensors: returns results of the right shapes.
        kernel: the op on real tensors.
        keys: dispatch keys that the kernel is registered for.
        at_once: the kernel for eager calls, which looks at the tensors itself and returns None for
            any that it does not take. For ops with a derivative.

    Returns:
        The op.
    """
    # Evaluated here: releases of torch differ in the names that they find in annotations.
    kernel.__signature__ = inspect.signature(kernel, eval_str=True)  # type: ignore[attr-defined]
    _LIBRARY.define(name + torch.library.infer_schema(kernel, mutates_args=()))
    for key in keys:
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"tokenflex::{name}", shapes, lib=_LIBRARY)
    return Op(getattr(torch.ops.tokenflex, name).default, kernel, at_once)


def define_stage(name: str, shapes: Callable[..., Any], kernel: Callable[..., Any]) -> Op:
    """Define an op that is one step of a forward or backward pass and has no derivative."""
    op = define(name, shapes, kernel)
    refuse_derivatives(name, op)
    batch(name, one_by_one(op))
    return op


def define_fused(
    name: str, shapes: Callable[..., Any], kernel: Callable[..., Any], function: Any
) -> Op:
    """Define an op that has the derivative of the ``autograd.Function``."""
    op = define(name, shapes, kernel)
    differentiate(name, op, function)
    batch(name, one_by_one(op))
    return op


# ---- Derivatives.


def differentiate(name: str, op: Op, function: Any) -> None:
    """Give ``op`` the derivative of the ``autograd.Function``, at no cost where none is recorded.

    In forward mode the function is called too, and refuses: it has no jvp.
    """

    op.set_function(function)

    def autograd(*arguments: Any) -> Any:
        if has_tangent(arguments) or _requires_grad(arguments):
            return apply(function, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload(*arguments)

    _LIBRARY.impl(name, autograd, "Autograd")


def differentiate_linear(name: str, op: Op, function: Any, floats: int) -> None:
    """Give ``op`` the derivative of ``function``; its first ``floats`` arguments are float tensors.

    Forward mode needs no derivative: the op is linear in those tensors together, so its tangent is
    the op of their tangents.
    """
    op.set_function(function)
    record = _recorder(op, function, floats)

    def autograd(*arguments: Any) -> Any:
        if not has_tangent(arguments[:floats]):
            return record(*arguments)
        others = arguments[floats:]
        duals = [forward_ad.unpack_dual(tensor, level=0) for tensor in arguments[:floats]]
        tangents = [
            torch.zeros_like(dual.primal) if dual.tangent is None else dual.tangent
            for dual in duals
        ]
        result = record(*(dual.primal for dual in duals), *others)
        tangent = record(*tangents, *others)
        if isinstance(result, tuple):  # with a row map
            return forward_ad.make_dual(result[0], tangent[0], level=0), result[1]
        return forward_ad.make_dual(result, tangent, level=0)

    _LIBRARY.impl(name, autograd, "Autograd")


def refuse_derivatives(name: str, op: Op) -> None:
    """Make a derivative of ``op`` an error, where it would be zero otherwise."""
    message = (
        f"tokenflex::{name} has no derivative: it is a part of a kernel that was marked with "
        "@once_differentiable and has no jvp. TOKENFLEX_BACKEND=reference has all derivatives"
    )

    class Refusal(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            return op.below(*arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(message)

    record = _recorder(op, Refusal)

    def autograd(*arguments: Any) -> Any:
        if has_tangent(arguments):
            raise NotImplementedError(message)
        return record(*arguments)

    _LIBRARY.impl(name, autograd, "Autograd")


def _recorder(op: Op, function: Any, tensors: int | None = None) -> Overload:
    """Return ``function.apply`` where one of the first ``tensors`` requires grad, else the op."""

    def record(*arguments: Any) -> Any:
        if _requires_grad(arguments[:tensors]):
            return apply(function, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload(*arguments)

    return record


def _requires_grad(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in arguments
    )


def is_transformed() -> bool:
    """Return whether a ``torch.func`` transform is under way."""
    return torch._C._are_functorch_transforms_active()


def is_differentiated_by_levels() -> bool:
    """Return whether a ``torch.func`` transform or forward-mode differentiation is under way."""
    return is_transformed() or forward_ad._current_level >= 0


# Evaluated as a compiler traces: the levels that it traces within are then open.
is_differentiated_by_levels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(op: str, x: torch.Tensor, *, beyond_triton: str | None = None) -> str:
    """Return the implementation of ``op`` for these rows, see :func:`select_backend`.

    On host memory "auto" leaves ``torch.func`` and forward mode to the reference, which has all
    derivatives. What ``torch.export`` traces is the reference too: other runtimes know its ops.
    """
    if is_exporting() and requested_backend() == "auto":
        return "reference"
    backend = select_backend(op, x.device, beyond_triton=beyond_triton)
    if backend == "native" and is_differentiated_by_levels() and requested_backend() == "auto":
        return "reference"
    return backend


def is_ordinary(x: object) -> bool:
    """Return whether an eager call may read ``x`` from host memory, if the extension takes it."""
    kind = type(x)
    is_tensor = kind is torch.Tensor or kind is torch.nn.Parameter
    return is_tensor and x.is_cpu and is_eager()  # type: ignore[attr-defined]


def may_be_recorded(op: str, x: object) -> bool:
    """Return whether a call on the rows ``x`` may run recorded kernels: see ``call_records``."""
    kind = type(x)
    return (
        not torch.compiler.is_compiling()
        and (kind is torch.Tensor or kind is torch.nn.Parameter)
        and select_backend(op, x.device) == "triton"  # type: ignore[attr-defined]
    )


def apply(function: Any, *arguments: Any) -> Any:
    """Return ``function.apply(*arguments)``, for the level that the autograd kernel runs at.

    ``Function.apply`` itself would start again at the innermost level.
    """
    if not is_transformed():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return _single_level(function).apply(*arguments)


@functools.cache
def _single_level(function: Any) -> Any:
    """Return the same Function without what ``Function.apply`` adds for ``torch.func``."""
    methods = {name: staticmethod(getattr(function, name)) for name in ("forward", "backward")}
    return type(function.__name__, (_SingleLevelFunction,), methods)


def has_tangent(arguments: Sequence[Any]) -> bool:
    """Return whether any of the arguments is a dual tensor, of forward-mode differentiation.

    A compiled ``torch.func.jvp`` opens its level without ``forward_ad``, which then knows of none.
    """
    if forward_ad._current_level < 0 and not is_transformed():
        return False
    return any(
        forward_ad.unpack_dual(value, level=0).tangent is not None
        for value in arguments
        if isinstance(value, torch.Tensor)
    )


def below_autograd() -> AbstractContextManager[None]:
    """Call ops as the ``forward`` of a Function does: not recorded here, but at levels further out.

    An ``autograd.Function`` switches gradients off for all levels while its ``forward`` runs.
    """
    return _below_one_level() if is_transformed() else torch._C._AutoDispatchBelowAutograd()


@contextmanager
def _below_one_level() -> Iterator[None]:
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        yield


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Apply ``once_differentiable`` to ``backward`` outside of ``torch.func``.

    Inside of it, second derivatives would be zero. There the ops that ``backward`` calls have
    derivatives of their own, or refuse.
    """
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        return backward(ctx, *grads) if is_transformed() else refusing(ctx, *grads)

    return once


class UnpackedContext(SimpleNamespace):
    """The context of a backward whose tensors are unpacked already: checkpoints allow it once."""


# ---- torch.vmap.


def batch(name: str, rule: BatchingRule) -> None:
    """Run an op under ``torch.vmap`` by ``rule``, see :func:`torch.library.register_vmap`."""
    torch.library.register_vmap(f"tokenflex::{name}", rule, lib=_LIBRARY)


def one_by_one(op: Op) -> BatchingRule:
    """Return the rule that calls ``op`` once for each example."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        results = [
            op(
                *(
                    value if dim is None else value.select(dim, example).contiguous()
                    for value, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for example in range(info.batch_size)
        ]
        if isinstance(results[0], tuple):
            return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
        return torch.stack(results), 0

    return rule


def side_by_side(op: Op, floats: int) -> BatchingRule:
    """Return the rule that calls ``op`` once, with the examples side by side in its rows.

    For ops that treat the columns of their rows alike: the first ``floats`` arguments, and the
    result, or the first of two. Where other arguments differ between examples, ``op`` is called
    once for each.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        size = info.batch_size
        if any(dim is not None for dim in in_dims[floats:]):
            return one_by_one(op)(info, in_dims, *arguments)
        rows = [
            _side_by_side(value, dim, size)
            for value, dim in zip(arguments[:floats], in_dims[:floats], strict=True)
        ]
        result = op(*rows, *arguments[floats:])
        if isinstance(result, tuple):  # with a row map, which all examples share
            return (_split_columns(result[0], size), result[1]), (result[0].ndim - 1, None)
        return _split_columns(result, size), result.ndim - 1

    return rule


def _side_by_side(rows: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """Return [.., size * D]: ``size`` examples [.., D] along ``dim``, or one that all share."""
    if dim is None:
        rows = rows.unsqueeze(-2).expand(*rows.shape[:-1], size, -1)
    else:
        rows = rows.movedim(dim, -2)
    return rows.flatten(-2)


def _split_columns(rows: torch.Tensor, size: int) -> torch.Tensor:
    return rows.unflatten(-1, (size, rows.shape[-1] // size))
