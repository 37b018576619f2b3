"""`project_tokens` by CUDA graphs, for inference on few tokens, where the host's time counts.

One image of 64 to 256 tokens keeps a GPU busy for less time than the host needs to launch the
kernels one by one. A graph launches them all at once, after a copy of the patches to where the
graph reads them, and before one of the tokens to a new tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch

from tokenflex_kernels import relaunch
from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.call_records import describe
from tokenflex_kernels.checks import Grid, check_count, check_tensor
from tokenflex_kernels.launch import dot_precision
from tokenflex_kernels.pool_norm.plan import PoolPlan, plan_pooling
from tokenflex_kernels.project_tokens.op import project_tokens


class Graph(Protocol):
    """The part of a captured graph that is needed here."""

    def replay(self) -> None: ...


class _Captured(NamedTuple):
    """A graph, the patches that it reads and the tokens that it writes."""

    graph: Graph
    x: torch.Tensor
    tokens: torch.Tensor


class CapturedProjection:
    """:func:`project_tokens` for inference on CUDA tensors: a CUDA graph for each kind of batch.

    A call with new grids, dtype, options or weights runs the kernels once, waits for the device and
    captures a graph (tens of milliseconds); further ones copy the patches, replay the graph and
    copy the tokens. The graph reads the weights where they are: values changed in place count from
    the next call on, and other tensors in their place are captured anew.

    Each graph keeps a copy of the patches and of all that is computed from them, so this is for
    batches of one or a few images. Calls on several streams or threads run one after another.

    Args:
        max_graphs: that are kept, at least 1; the least recently used one makes room for another.

    Example:
        >>> project = CapturedProjection(max_graphs=4)
        >>> with torch.inference_mode():  # doctest: +SKIP
        ...     tokens = project(patches, [(27, 27)], [(16, 16)], **weights)
    """

    def __init__(self, max_graphs: int = 16) -> None:
        self.max_graphs = check_count("max_graphs", max_graphs)
        self._graphs: OrderedDict[Any, _Captured] = OrderedDict()
        self._lock = Lock()
        self._stream: torch.cuda.Stream | None = None  # of the last call

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedProjection, (self.max_graphs,)  # graphs are made anew where they are used

    def __len__(self) -> int:
        """Return the number of graphs that are kept."""
        return len(self._graphs)

    def takes(self, x: torch.Tensor) -> bool:
        """Return whether an eager call on ``x`` may be captured: on a GPU, without gradients."""
        return (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and relaunch.is_on_gpu(x)
        )

    def __call__(
        self,
        x: torch.Tensor,
        in_grids: Sequence[Grid] | PoolPlan,
        out_grids: Sequence[Grid] | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """Return what ``project_tokens`` returns for the same arguments, without a derivative.

        Raises:
            TypeError, ValueError: as of :func:`project_tokens`; and ``x`` is no CUDA tensor, or a
                derivative would be recorded.
        """
        check_tensor("x", x, ndim=2)
        if not relaunch.is_on_gpu(x):
            raise ValueError(
                f"x must be on a CUDA device to be projected by a CUDA graph, got {x.device}"
            )
        weights = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *weights):
            raise ValueError(
                "x and the weights must not require grad in a call that is captured: a CUDA graph "
                "of the projector has no derivative, so call it under torch.no_grad()"
            )
        if relaunch.is_capturing():  # by the caller, whose graph then has these kernels
            return project_tokens(x, in_grids, out_grids, **arguments)
        plan = in_grids
        if not isinstance(in_grids, PoolPlan) and out_grids is not None:
            plan, out_grids = plan_pooling(in_grids, out_grids), None
        key = (plan, out_grids, x.shape, x.dtype, x.device, _settings(x), *_identities(arguments))
        described = describe(tuple(weights))
        if described is None or not _is_hashable(key):  # the op takes it, or knows the right error
            return project_tokens(x, plan, out_grids, **arguments)
        with self._lock:
            self._follow_last_call(x)
            captured = self._graphs.get((described, key))
            if captured is None:
                project = partial(project_tokens, in_grids=plan, out_grids=out_grids, **arguments)
                captured = _capture(x, project)
                self._graphs[described, key] = captured
                while len(self._graphs) > self.max_graphs:
                    self._graphs.popitem(last=False)
            else:
                self._graphs.move_to_end((described, key))
                captured.x.copy_(x)
            captured.graph.replay()
            return captured.tokens.clone()

    def _follow_last_call(self, x: torch.Tensor) -> None:
        """Make the current stream wait for a call on another one: both use the same memory."""
        last = self._stream
        if last is None or last.cuda_stream != relaunch.current_stream(x.device.index):
            self._stream = torch.cuda.current_stream(x.device)
            if last is not None:
                self._stream.wait_stream(last)


def _capture(x: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor]) -> _Captured:
    """Capture ``project`` on a copy of ``x``, which any mode of PyTorch may write to later."""
    kind = x.device.type
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        # A cached cast of a weight would not see that the weight changes.
        torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ),
    ):
        rows = x.detach().clone(memory_format=torch.contiguous_format)
        graph, tokens = capture_graph(partial(project, rows), x.device)
    return _Captured(graph, rows, tokens)


def capture_graph(
    run: Callable[[], torch.Tensor], device: torch.device
) -> tuple[Graph, torch.Tensor]:
    """Capture what ``run`` launches; return the graph and the tensor that it writes.

    The first run, before the capture, compiles the kernels and copies their tables.
    """
    with torch.cuda.device(device):
        run()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
    return graph, result


def _identities(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return each argument as a graph depends on it: tensors by their address."""
    return [
        (name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
        for name, value in arguments.items()
    ]


def _is_hashable(key: tuple[Any, ...]) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _settings(x: torch.Tensor) -> tuple[Any, ...]:
    """Return the settings of PyTorch and ours that a graph depends on."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    precision = dot_precision(torch.float32) if x.dtype == torch.float32 else None
    return autocast, precision, select_backend("project_tokens", x.device)
