"""Kernels run without a GPU: an executor of the PTX that Triton emits for NVIDIA's architectures.

``execute`` runs one kernel on CPU tensors; ``executing`` runs all kernels that stages launch::

    with executing("sm_90") as executions:
        product, gate, up = launch_gate_up(x, gate_weight, up_weight, None, None, True, True)
    assert executions[0].races == []

An execution has the results of the GPU's instructions, the races and unordered accesses that no
result shows, and counts of instructions and bytes. It has no notion of time.

Threads of a block run in step, and wait for an mbarrier once it can end. So these are not seen: the
order of accesses within a warp, a barrier object that the copy engine uses before a fence, and what
only other interleavings of warps would show. A ``wgmma`` is refused if a thread wrote one of its
registers after the last ``wgmma.fence``; that an accumulator comes from a product of another shape
is not looked at.

``parse`` reads PTX; ``machine`` runs a block; ``operands`` and ``arithmetic`` hold what a thread
computes with; ``memory`` checks every access; ``accesses``, ``asynchronous`` and ``tensor_cores``
are the instructions that move data; ``launching`` joins it to the stages.
"""

from tests.ptx import accesses as accesses
from tests.ptx import arithmetic as arithmetic
from tests.ptx import asynchronous as asynchronous
from tests.ptx import control as control
from tests.ptx import tensor_cores as tensor_cores
from tests.ptx.asynchronous import TensorMap
from tests.ptx.launching import compile_kernel, execute, executing
from tests.ptx.machine import Execution, class_of
from tests.ptx.parse import PtxError, parse

__all__ = [
    "Execution",
    "PtxError",
    "TensorMap",
    "class_of",
    "compile_kernel",
    "execute",
    "executing",
    "parse",
]
