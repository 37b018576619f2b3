"""Records of eager calls: what an op allocates and launches for one kind of call, to do it again.

On a GPU an op's call is Python: checks, choices, tables, allocations and launches. All of it but
the addresses depends on the kind of the call alone: the op, the dtype, shape, strides, device and
alignment of each tensor, the plan of the batch, options, the tensors that require grad, and the
stream. So the second call of a kind is recorded, and later ones look the record up, allocate the
results and launch: one key instead of all checks.

A record is made by watching a stage. It holds what the stage passed to ``launch``: numbers as they
are, and for a tensor its place among the stage's inputs and results, or the tensor itself if it is
one of the batch's tables. A stage that does anything else, such as a product of PyTorch's, a copy,
or a launch on a temporary tensor, is not recorded: later calls of its kind spare the checks and run
it as it is.

**What a stage must keep to**: all that it computes on the host may depend on the kind of the call,
and on nothing else of its tensors. The distance between two addresses, for one, is no part of it.

Calls while a CUDA graph is captured are never recorded or repeated: the tables of a captured graph
must stay for as long as it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflex_kernels import launch_configs, relaunch
from tokenflex_kernels.backend import extension
from tokenflex_kernels.launch import (
    Launch,
    dot_precision,
    interpret,
    is_interpreted,
    observed_launches,
)
from tokenflex_kernels.library import is_plain_mode

MAX_RECORDS = 256
MAX_SEEN = 4096  # kinds of calls that came once
MAX_TABLE_BYTES = 2**20  # of a record, which keeps the tables of its batch

Tensors = Sequence[torch.Tensor | None]
Stage = Callable[..., tuple[torch.Tensor, ...]]
Key = tuple[Any, ...]

# ---- The kind of a call.


def call_key(op: str, tensors: tuple[Any, ...], *others: Any) -> Key | None:
    """Return the kind of a call, or None for a call that is not recorded.

    Args:
        op: its name.
        tensors: of the call, the rows first; they may be None.
        others: all else that the call depends on, hashable.
    """
    like = tensors[0]
    stream = 0
    if relaunch.is_on_gpu(like):
        index = like.device.index
        if index != relaunch.current_device() or relaunch.is_capturing():
            return None
        stream = relaunch.current_stream(index)
    # Of any device: the question about one takes twice as long.
    if launch_configs.is_overridden() or torch._C._is_any_autocast_enabled():
        return None
    compiled = extension()
    described = _described(tensors) if compiled is None else compiled.tensor_key(*tensors)
    if described is None or like.numel() == 0:  # no rows launch nothing that could be repeated
        return None
    precision = dot_precision(torch.float32) if like.dtype is torch.float32 else None
    # Results that are the same in every call were made in the mode of the first.
    return op, described, stream, precision, torch.is_inference_mode_enabled(), *others


def describe(tensors: tuple[Any, ...]) -> Any:
    """Return all that an eager call depends on of ``tensors`` but their numbers, hashable.

    That is the dtype, device, shape and strides of each, its address modulo 16, and whether the
    call is differentiated by it. The result is None outside of plain eager mode, and if one is
    neither None nor an ordinary tensor.
    """
    compiled = extension()
    return _described(tensors) if compiled is None else compiled.tensor_key(*tensors)


def _described(tensors: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not is_plain_mode():
        return None
    described: list[Any] = [needs_grad(tensors)]
    for tensor in tensors:
        kind = type(tensor)
        if tensor is None:
            described.append(None)
            continue
        if kind is not torch.Tensor and kind is not torch.nn.Parameter:
            return None
        if (
            tensor.is_meta
            or tensor.is_neg()
            or tensor._is_zerotensor()
            or tensor.layout is not torch.strided
            or is_functorch_wrapped_tensor(tensor)
        ):
            return None
        described.append(
            (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr() & 15)
        )
    return tuple(described)


def needs_grad(tensors: tuple[Any, ...]) -> tuple[bool, ...]:
    """Return the tensors that a call is differentiated by; () where no backward is recorded."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        return tuple(tensor is not None and tensor.requires_grad for tensor in tensors)
    return ()


def are_same(tensors: Tensors, others: Tensors) -> bool:
    """Return whether these are the same objects, such as tensors that no check has converted."""
    return all(tensor is other for tensor, other in zip(tensors, others, strict=True))


# ---- One stage.


class _Repeat(NamedTuple):
    """One launch without the tensors of its call.

    Attributes:
        kernel, programs, options, binary: of the launch.
        args: its arguments; tensors of the call are missing.
        places: for each missing one its position in ``args``, its index among the call's tensors
            and results, and the fields of its tensor-map descriptor if it is passed by one.
    """

    kernel: Any
    programs: int
    options: dict[str, Any]
    binary: relaunch.Binary | None  # None in the interpreter
    args: tuple[Any, ...]
    places: tuple[tuple[int, int, dict[str, Any] | None], ...]


class RecordedStage:
    """A stage for calls of one kind."""

    def __init__(
        self,
        stage: Stage,
        others: tuple[Any, ...],
        results: tuple[torch.Tensor, ...],
        repeats: list[_Repeat] | None,
        tables: Tensors,
        tensors: Tensors,
    ) -> None:
        self._stage, self._others = stage, others
        self._tables = tables  # kept as long as their addresses
        self.launches = None
        if repeats is not None:
            like: Any = tensors[0]
            on_gpu = relaunch.is_on_gpu(like)
            stream = relaunch.current_stream(like.device.index) if on_gpu else 0
            # Nothing is written to a tensor of no elements: all calls may share it.
            made: list[Any] = [
                (tuple(result.shape), result.stride(), result.dtype)
                if result.numel() > 0
                else result
                for result in results
            ]
            rows = _Rows(len(tensors), like.dtype, like.data_ptr() & 15, stream)
            self.launches = RecordedLaunches(repeats, made, rows)

    @property
    def is_repeatable(self) -> bool:
        """True if calls repeat launches; otherwise they run the stage."""
        return self.launches is not None

    def repeat(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        """Return the stage's results for a call's tensors."""
        results = None if self.launches is None else self.launches.repeat(tensors)
        return self._run_stage(tensors) if results is None else results

    def _run_stage(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return self._stage(*tensors, *self._others)


class _Rows(NamedTuple):
    """The part of a kind of calls that their launches depend on beside the arguments.

    Attributes:
        num_tensors: of a call, the rows first.
        dtype, offset: of the rows, and of their address from a multiple of 16.
        stream: that the launches go to.
    """

    num_tensors: int
    dtype: torch.dtype
    offset: int
    stream: int


class RecordedLaunches:
    """The launches of one stage or of several, for calls of one kind.

    Args:
        repeats: the launches, whose places count the call's tensors, and its results after them.
        results: shape, strides and dtype of each, or a tensor that all calls share.
        rows: of the calls.
    """

    def __init__(self, repeats: list[_Repeat], results: list[Any], rows: _Rows) -> None:
        self.repeats, self.results, self.rows = repeats, results, rows
        self._kernels = list({repeat.kernel: None for repeat in repeats})
        self._is_interpreted = any(repeat.binary is None for repeat in repeats)
        self._compiled: Any = None
        compiled = extension()
        if compiled is not None and not self._is_interpreted and not self._has_descriptors():
            self._compiled = self._prepare(compiled)
            self._repeat_compiled = compiled.repeat_launches

    def repeat(self, tensors: Tensors) -> tuple[torch.Tensor, ...] | None:
        """Allocate the results for a call's tensors, launch, and return the results.

        Returns None, and has launched nothing, where launches must be left to the stages.
        """
        if not self._is_interpreted and not relaunch.is_ordinary(self._kernels):
            return None
        if self._compiled is not None and not relaunch.has_launch_hooks():
            made: tuple[torch.Tensor, ...] | None = self._repeat_compiled(self._compiled, *tensors)
            return made
        like: Any = tensors[0]
        results: list[Any] = [
            like.new_empty_strided(result[0], result[1], dtype=result[2])
            if type(result) is tuple
            else result
            for result in self.results
        ]
        return tuple(results) if self._launch([*tensors, *results]) else None

    def _has_descriptors(self) -> bool:
        return any(fields is not None for repeat in self.repeats for _, _, fields in repeat.places)

    def _prepare(self, compiled: Any) -> Any:
        """Return the launches as the extension repeats them."""
        launches = []
        for repeat in self.repeats:
            binary: Any = repeat.binary
            head, tail = relaunch.launcher_arguments(binary, repeat.programs, self.rows.stream)
            places = [(len(head) + position, place) for position, place, _ in repeat.places]
            launches.append((binary.run, (*head, *repeat.args, *tail), places))
        results = [
            (*result[:2], None if result[2] == self.rows.dtype else result[2])
            if type(result) is tuple
            else result
            for result in self.results
        ]
        return compiled.prepare_launches(self.rows.num_tensors, self.rows.offset, results, launches)

    def _launch(self, tensors: Tensors) -> bool:
        """Launch on tensors and results; return whether that was possible."""
        if self._is_interpreted:
            for repeat in self.repeats:
                args = _with_tensors(repeat, tensors, tensors)
                interpret(repeat.kernel, repeat.programs, tuple(args), repeat.options)
            return True
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        # An allocator may align results less than PyTorch's; rows may be the result of a stage.
        if addresses[0] & 15 != self.rows.offset:
            return False
        for address in addresses[self.rows.num_tensors :]:
            if address & 15:
                return False
        for repeat in self.repeats:
            binary: Any = repeat.binary
            args = _with_tensors(repeat, addresses, tensors)
            relaunch.run(binary, repeat.programs, self.rows.stream, args)
        return True


def chain_launches(
    stages: Sequence[tuple[RecordedStage, Sequence[int]]], num_tensors: int
) -> RecordedLaunches | None:
    """Return the launches of stages in turn, or None where one of them is not repeatable.

    Args:
        stages: each with the places of its tensors: those of the call, followed by the results of
            the stages before. The first one's rows are the call's; those of the others are results,
            which are aligned, as a repeatable stage must have made them.
        num_tensors: of the call.
    """
    repeats: list[_Repeat] = []
    results: list[Any] = []
    for stage, places in stages:
        launches = stage.launches
        if launches is None:
            return None
        made = range(num_tensors + len(results), num_tensors + len(results) + len(launches.results))
        moved = [*places, *made]
        repeats += [
            repeat._replace(
                places=tuple((at, moved[place], fields) for at, place, fields in repeat.places)
            )
            for repeat in launches.repeats
        ]
        results += launches.results
    first: Any = stages[0][0].launches
    return RecordedLaunches(repeats, results, first.rows._replace(num_tensors=num_tensors))


def _with_tensors(repeat: _Repeat, values: Sequence[Any], tensors: Tensors) -> list[Any]:
    """Return the arguments of a launch, with ``values`` in the places of the call's tensors."""
    args = list(repeat.args)
    for position, place, fields in repeat.places:
        if fields is None:
            args[position] = values[place]
        else:
            # Not checked again: it is of the kind that was checked.
            descriptor = object.__new__(relaunch.descriptor_type())
            descriptor.__dict__.update(fields, base=tensors[place])
            args[position] = descriptor
    return args


def record_stage(
    stage: Stage, tensors: tuple[Any, ...], others: tuple[Any, ...], tables: Tensors = ()
) -> tuple[tuple[torch.Tensor, ...], RecordedStage]:
    """Run a stage and record it.

    Args:
        stage: takes ``tensors`` and ``others``, and returns new tensors.
        tensors: ordinary ones or None, the rows first.
        others: its other arguments.
        tables: tensors that its launches read beside ``tensors``.

    Returns:
        The results of this call, and the stage for later ones.
    """
    # An object for each argument, though the call may have passed a tensor twice.
    arguments = [None if tensor is None else tensor.detach() for tensor in tensors]
    with observed_launches() as launches, _Watch() as watch:
        results = stage(*arguments, *others)
    small = sum(table.nbytes for table in tables if table is not None) <= MAX_TABLE_BYTES
    repeats = None
    if small and not watch.has_computed:
        repeats = _repeats(launches, arguments, results, tables)
    return results, RecordedStage(stage, others, results, repeats, tables, tensors)


class _Watch(TorchDispatchMode):
    """Watch a stage for operations of PyTorch that a record does not repeat."""

    HARMLESS = (
        torch.ops.aten.detach,  # of the grids, which are read on the host
        # Of tables on another stream than that which copied them: it holds for later calls too.
        torch.ops.aten.record_stream,
        torch.ops.aten.empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.empty_strided,
        torch.ops.aten.new_empty,
        torch.ops.aten.new_empty_strided,
    )

    def __init__(self) -> None:
        super().__init__()
        self.has_computed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Inference mode shows conversions that have nothing to convert, as of the grids to numbers.
        is_given = len(args) > 0 and result is args[0] and not func._schema.is_mutable
        self.has_computed |= not is_given and func.overloadpacket not in self.HARMLESS
        return result


def _repeats(
    launches: Sequence[Launch],
    tensors: Tensors,
    results: tuple[torch.Tensor, ...],
    tables: Tensors,
) -> list[_Repeat] | None:
    """Return the launches of a stage without its tensors, or None if they cannot be repeated."""
    places = {id(tensor): i for i, tensor in enumerate((*tensors, *results)) if tensor is not None}
    kept = {id(table) for table in tables}
    repeats: list[_Repeat] = []
    launched: set[int] = set()
    for launch in launches:
        repeat = _without_tensors(launch, places, kept)
        if repeat is None:
            return None
        repeats.append(repeat)
        launched.update(place for _, place, _ in repeat.places)
    written = range(len(tensors), len(tensors) + len(results))
    for place, result in zip(written, results, strict=True):
        if result.numel() > 0 and (
            place not in launched or not result.is_contiguous() or result.data_ptr() & 15
        ):
            return None  # computed in another way, or allocated
    return repeats


def _without_tensors(launch: Launch, places: dict[int, int], kept: set[int]) -> _Repeat | None:
    if launch.binary is None and not is_interpreted(launch.kernel):
        return None  # left to Triton
    args, missing = list(launch.args), []
    for position, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            if id(value) in places:
                missing.append((position, places[id(value)], None))
                args[position] = None
            elif id(value) not in kept:
                return None
            elif launch.binary is not None:
                args[position] = value.data_ptr()
        elif type(value) is relaunch.descriptor_type():
            base = value.base
            described = [*base.shape, *base.stride()]
            if id(base) not in places or [*value.shape, *value.strides] != described:
                return None  # its numbers may depend on more than the kind of the call
            missing.append((position, places[id(base)], vars(value) | {"base": None}))
            args[position] = None
        elif value is not None and type(value) is not int:
            return None
    return _Repeat(
        *(launch.kernel, launch.programs, launch.options, launch.binary),
        *(tuple(args), tuple(missing)),
    )


# ---- All records.

SEEN = object()
"""The answer of :func:`find_record` to the second call of a kind, which may be recorded."""

_records: dict[Key, Any] = {}
_seen: set[Key] = set()
_lock = Lock()


def find_record(key: Key) -> Any:
    """Return what was kept for calls of this kind, ``SEEN``, or None for the first of them."""
    record = _records.get(key)
    if record is not None:
        return record
    with _lock:
        if key in _seen:
            return SEEN
        if len(_seen) >= MAX_SEEN:
            _seen.clear()
        _seen.add(key)
    return None


def keep_record(key: Key, record: Any) -> None:
    """Keep ``record`` for later calls of this kind, in the place of the oldest one if need be."""
    with _lock:
        while len(_records) >= MAX_RECORDS:
            _records.pop(next(iter(_records)))
        _records[key] = record


def forget_records() -> None:
    """Forget all kinds of calls."""
    with _lock:
        _records.clear()
        _seen.clear()
