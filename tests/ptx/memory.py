"""The two memories of a block, and what is checked as they are accessed.

Global memory is that of the tensors given: every access must lie within one of them and be
aligned. Shared memory belongs to a block, and three things are recorded about every two bytes of
it: which warps accessed it since the last barrier, whether it was written at all, and which
asynchronous operations still read or write it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tests.ptx.operands import Vector
from tests.ptx.parse import PtxError

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Region:
    """The memory of one tensor."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = f"{name}: {list(tensor.shape)}, strides {list(tensor.stride())}"
        self.tensor = tensor  # keeps the memory
        item = tensor.element_size()
        extents = zip(tensor.shape, tensor.stride(), strict=True)
        self.begin = tensor.data_ptr()
        self.end = self.begin + (sum((size - 1) * step for size, step in extents) + 1) * item
        # Between the rows of a strided matrix lies what is not its own.
        strided = tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) > tensor.shape[1]
        self.row = tensor.shape[1] * item if strided else 0
        self.pitch = tensor.stride(0) * item if strided else 0
        self.base = self.begin & ~15
        size = -(-(self.end - self.base) // 16) * 16
        self._bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(self.base), np.uint8)
        self._writers: np.ndarray | None = None

    def holds(self, addresses: Vector, size: int) -> Vector:
        inside = (addresses >= self.begin) & (addresses + size <= self.end)
        if self.pitch:
            inside &= (addresses - self.begin) % self.pitch + size <= self.row
        return inside

    def elements(self, size: int) -> np.ndarray:
        """The memory as elements of ``size`` bytes, the first at ``base``."""
        return self._bytes.view(_UNSIGNED[size])

    def writers(self) -> np.ndarray:
        """The program that wrote each byte, plus 1; 0 where none has."""
        if self._writers is None:
            self._writers = np.zeros(len(self._bytes), np.int32)
        return self._writers


class GlobalMemory:
    """The tensors that a launch may access."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.numel() > 0:
            self.regions.append(Region(name, tensor))

    def _find(
        self, addresses: Vector, size: int, doing: str
    ) -> Iterator[tuple[Region, Vector | slice]]:
        """Yield the regions that hold accesses of ``size`` bytes, and which accesses."""
        if not len(addresses):
            return
        if (addresses % size).any():
            raise PtxError(f"{doing} of {size} bytes at {hex(addresses[addresses % size != 0][0])}")
        left = np.ones(len(addresses), np.bool_)
        for region in self.regions:
            inside = region.holds(addresses, size)
            if inside.all():
                yield region, slice(None)
                return
            inside &= left
            if inside.any():
                yield region, np.nonzero(inside)[0]
                left &= ~inside
                if not left.any():
                    return
        lost = int(addresses[left][0])
        near = min(
            self.regions,
            key=lambda region: max(region.begin - lost, lost - region.end),
            default=None,
        )
        where = f"; the nearest is {near.name}, offset {lost - near.begin}" if near else ""
        raise PtxError(
            f"{doing} of {size} bytes by {int(left.sum())} threads outside of all tensors{where}"
        )

    def check(self, addresses: Vector, size: int) -> None:
        """Refuse reads that are unaligned or out of bounds."""
        for _ in self._find(addresses, size, "load"):
            pass

    def load(self, addresses: Vector, size: int, count: int, block: Any) -> np.ndarray:
        """Return ``count`` elements of ``size`` bytes at each address, [addresses, count]."""
        values = np.empty((len(addresses), count), _UNSIGNED[size])
        for region, which in self._find(addresses, size * count, "load"):
            offsets = addresses[which] - region.base
            values[which] = region.elements(size)[offsets[:, None] // size + np.arange(count)]
            if region._writers is not None:
                writer = region._writers[offsets]
                if ((writer != 0) & (writer != block.number + 1)).any():
                    block.report("reads global memory that another program writes")
        return values

    def store(self, addresses: Vector, values: np.ndarray, block: Any) -> None:
        """Store values, [addresses, count] of unsigned integers, at the addresses."""
        count, size = values.shape[1], values.dtype.itemsize
        for region, which in self._find(addresses, size * count, "store"):
            offsets = addresses[which] - region.base
            index = offsets[:, None] // size + np.arange(count)
            region.elements(size)[index] = values[which]
            if (region.elements(size)[index] != values[which]).any():
                block.report("threads store different values to one global address")
            writers = region.writers()
            last = writers[offsets]
            if ((last != 0) & (last != block.number + 1)).any():
                block.report("stores to global memory that another program stores to")
            writers[offsets[:, None] + np.arange(size * count)] = block.number + 1


_SEVERAL = 255  # in a tag: more than one warp
_TAG = 2  # bytes that share one tag


def tags_of(addresses: np.ndarray, size: int) -> np.ndarray:
    """Return the tags of accesses of ``size`` bytes, ascending, each once."""
    return np.unique(addresses.reshape(-1, 1) // _TAG + np.arange(max(1, size // _TAG)))


class SharedMemory:
    """The shared memory of a block, and who accesses it.

    Races are between warps: a write and another access of the same two bytes without a barrier in
    between. Threads of a warp are taken to run in lockstep.
    """

    def __init__(self, size: int, block: Any) -> None:
        self.size = size = -(-size // 16) * 16
        self.block = block
        self._bytes = np.full(size, 0xCD, np.uint8)
        self._writer = np.zeros(size // _TAG, np.uint8)  # since the last barrier: warp + 1
        self._reader = np.zeros(size // _TAG, np.uint8)
        self._written = np.zeros(size // _TAG, np.bool_)
        self._unfenced = np.zeros(size // _TAG, np.bool_)
        self._being_read = np.zeros(size // _TAG, np.uint8)  # by asynchronous operations
        self._being_written = np.zeros(size // _TAG, np.uint8)

    def elements(self, size: int) -> np.ndarray:
        """The memory as elements of ``size`` bytes."""
        return self._bytes.view(_UNSIGNED[size])

    def barrier(self) -> None:
        """Order all accesses so far before all that follow."""
        self._writer[:] = 0
        self._reader[:] = 0

    def fence(self) -> None:
        """Make what threads wrote visible to asynchronous operations."""
        self._unfenced[:] = False

    def accesses(self, addresses: Vector, size: int) -> np.ndarray:
        """Return the tags of accesses of ``size`` bytes, [accesses, tags of one]."""
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise PtxError(
                f"{size} bytes at {int(addresses.min())}..{int(addresses.max())} are outside of "
                f"the {self.size} bytes of shared memory"
            )
        if (addresses % size).any():
            raise PtxError(f"unaligned access of {size} bytes of shared memory")
        return addresses[:, None] // _TAG + np.arange(max(1, size // _TAG))

    def load(self, addresses: Vector, size: int, count: int, warps: Vector) -> np.ndarray:
        """Return ``count`` elements of ``size`` bytes at each address, read by ``warps``."""
        tags = self.accesses(addresses, size * count)
        self._check_pending(
            tags, self._being_written, "reads shared memory that a copy still writes"
        )
        if not self._written[tags].all():
            self.block.report("reads shared memory that was never written")
        mine = (warps[:, None] + 1).astype(np.uint8)
        writer, reader = self._writer[tags], self._reader[tags]
        if ((writer != 0) & (writer != mine)).any():
            self.block.report("reads shared memory that another warp wrote since the last barrier")
        mine = np.where((reader == 0) | (reader == mine), mine, np.uint8(_SEVERAL))
        self._reader[tags] = mine
        shared = self._reader[tags] != mine  # by another warp in this very instruction
        self._reader[tags[shared]] = _SEVERAL
        return self.elements(size)[addresses[:, None] // size + np.arange(count)]

    def store(self, addresses: Vector, values: np.ndarray, warps: Vector) -> None:
        """Store values, [addresses, count] of unsigned integers, at the addresses."""
        count, size = values.shape[1], values.dtype.itemsize
        tags = self.accesses(addresses, size * count)
        self._check_write(tags, warps)
        index = addresses[:, None] // size + np.arange(count)
        self.elements(size)[index] = values
        if (self.elements(size)[index] != values).any():
            self.block.report("threads store different values to one shared address")
        self._unfenced[tags] = True

    def _check_write(self, tags: np.ndarray, warps: Vector) -> None:
        self._check_pending(
            tags, self._being_written, "writes shared memory that a copy still writes"
        )
        self._check_pending(
            tags,
            self._being_read,
            "writes shared memory that is still being read by an asynchronous operation",
        )
        mine = (warps[:, None] + 1).astype(np.uint8)
        for tagged, verb in ((self._writer[tags], "wrote"), (self._reader[tags], "read")):
            if ((tagged != 0) & (tagged != mine)).any():
                self.block.report(
                    f"writes shared memory that another warp {verb} since the last barrier"
                )
        self._writer[tags] = mine
        self._written[tags] = True

    def _check_pending(self, tags: np.ndarray, pending: np.ndarray, words: str) -> None:
        if pending[tags].any():
            self.block.report(words)

    # Asynchronous operations: what they access is marked when they are issued and released when
    # they complete. ``tags`` are those of ``tags_of``, or of ``accesses`` that do not overlap.

    def begin_read(self, tags: np.ndarray) -> None:
        """Begin an asynchronous read by a whole group of warps."""
        if tags[-1] >= len(self._written):
            raise PtxError(f"an operand ends after the {self.size} bytes of shared memory")
        self._check_pending(
            tags, self._being_written, "reads shared memory that a copy still writes"
        )
        if not self._written[tags].all():
            self.block.report("reads shared memory that was never written")
        if self._writer[tags].any():
            self.block.report("reads shared memory that was written since the last barrier")
        if self._unfenced[tags].any():
            self.block.report("reads shared memory asynchronously without fence.proxy.async")
        self._being_read[tags] += 1

    def end_read(self, tags: np.ndarray) -> None:
        self._being_read[tags] -= 1
        self._reader[tags] = _SEVERAL

    def begin_write(self, tags: np.ndarray, warps: Vector) -> None:
        """Begin asynchronous writes to tags, [accesses, tags of one], by threads of ``warps``."""
        self._check_write(tags, warps)
        self._being_written[tags] += 1

    def end_write(self, tags: np.ndarray, warps: Vector | None) -> None:
        """Complete asynchronous writes: of ``warps``, or ordered for all by a barrier object."""
        self._being_written[tags] -= 1
        self._unfenced[tags] = warps is not None
        self._writer[tags] = 0 if warps is None else (warps[:, None] + 1).astype(np.uint8)
