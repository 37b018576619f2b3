"""The extension's threads: shared work, and callers at the same time.

`make sanitize-threads` runs this file with an instrumented extension. ThreadSanitizer knows nothing
of OpenMP, and PyTorch is not instrumented: so the extension starts threads of its own here, PyTorch
has one, and what either side does is ordered by calls that ThreadSanitizer sees.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.kernels.common import GATED, MODES, gated_of, parameters_of, rows_of
from tokenflex_kernels import (
    merge_vision,
    pack_embeddings,
    plan_packing,
    pool_norm,
    project_and_pack,
    project_tokens,
    swiglu,
    unpack_vision,
)
from tokenflex_kernels.backend import extension
from tokenflex_kernels.swiglu.native import transposed

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the extension")

IN_GRIDS, OUT_GRIDS = [(27, 27), (4, 4), (9, 30)], [(8, 8), (7, 7), (12, 12)]
WIDTH, HIDDEN, TEXT = 521, 517, 1033
IMAGE = 9
PLAN = plan_packing([[1, IMAGE, 2, IMAGE], [3, 3, IMAGE, 5]], [64, 49, 144], IMAGE)
NEIGHBOURS = plan_packing([[1, 2, IMAGE, IMAGE], [IMAGE, 3, 5]], [64, 49, 144], IMAGE)
WATCHED = hasattr(ctypes.CDLL(None), "__tsan_init")
Results = tuple[torch.Tensor, ...]


def with_gradients(op: Callable[..., torch.Tensor], **inputs: torch.Tensor) -> Results:
    """Return an op's result, the one that nothing is saved for, and the gradients of its inputs."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = op(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), out.detach().sin())
    return out.detach(), op(**inputs), *grads


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Results]]:
    """Return calls that share their work among several threads, all on the same inputs."""
    torch.manual_seed(0)
    grids = {"in_grids": IN_GRIDS, "out_grids": OUT_GRIDS}
    x = torch.randn(rows_of(IN_GRIDS), WIDTH).to(dtype)
    wide = dict(zip(GATED, gated_of(64, 4099, dtype), strict=True))
    parameters = parameters_of(WIDTH, HIDDEN, TEXT, dtype)
    norm = {name: parameters[f"norm_{name}"] for name in ("weight", "bias")}
    table, tokens = torch.randn(7, TEXT).to(dtype), torch.randn(rows_of(OUT_GRIDS), TEXT).to(dtype)
    packed = pack_embeddings(table, tokens, PLAN)
    pack, unpack = partial(pack_embeddings, plan=PLAN), partial(unpack_vision, plan=PLAN)
    merge = partial(merge_vision, vision_rows=PLAN.vision_rows)
    recompute = partial(project_tokens, **grids, save="input")
    fused = partial(project_and_pack, **grids, plan=NEIGHBOURS)
    gated = {name: parameters[name] for name in GATED}
    return {
        **{
            f"pool_norm {mode}": partial(
                with_gradients, partial(pool_norm, **grids, mode=mode), x=x, **norm
            )
            for mode in MODES
        },
        "swiglu": partial(with_gradients, swiglu, x=x, **gated),
        "swiglu of few rows": partial(with_gradients, swiglu, x=x[:32, :64].contiguous(), **wide),
        "transpose": lambda: (transposed(x),),
        "project_tokens": partial(
            with_gradients, partial(project_tokens, **grids), x=x, **parameters
        ),
        "recompute": partial(with_gradients, recompute, x=x, **parameters),
        "project_and_pack": partial(with_gradients, fused, x=x, embedding=table, **parameters),
        "pack": partial(with_gradients, pack, embedding=table, vision=tokens),
        "merge": partial(with_gradients, merge, inputs_embeds=packed, vision=tokens),
        "unpack": partial(with_gradients, unpack, packed=packed),
    }


NAMES = list(calls(torch.float32))


@pytest.fixture
def own_threads(monkeypatch) -> Iterator[None]:
    """Let the native kernels start threads of their own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TOKENFLEX_BACKEND", "native")
    extension().allow_torch_team(False)
    yield
    extension().allow_torch_team(True)


@pytest.mark.usefixtures("own_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads_gives_the_same_bits(name, dtype):
    call = calls(dtype)[name]
    results = []
    for threads in (1, 2, 3, 4):
        with patch("torch.get_num_threads", lambda threads=threads: threads):
            results.append(call())
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.usefixtures("own_threads")
def test_callers_at_the_same_time_do_not_disturb_each_other():
    """Three threads on the same inputs, which share each call among two threads again."""
    work = calls(torch.float32)
    expected = {name: call() for name, call in work.items()}
    start = threading.Barrier(3)
    results: list[dict[str, Results]] = []

    def run(first: int) -> None:
        start.wait()
        names = NAMES[first:] + NAMES[:first]
        results.append({name: work[name]() for name in names})

    callers = [threading.Thread(target=run, args=(3 * number,)) for number in range(3)]
    with patch("torch.get_num_threads", lambda: 2):
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(results) == 3
    for result in results:
        assert all(all(map(torch.equal, result[name], expected[name])) for name in NAMES)


def test_callers_repeat_recorded_launches_at_the_same_time():
    """They share a record; each gets results of its own, and launches on its own tensors."""
    launched: list[tuple[int, ...]] = []
    given: list[tuple[torch.Tensor, torch.Tensor]] = []  # keeps them, and so their addresses
    start = threading.Barrier(3)

    def launch(*arguments: int) -> None:
        time.sleep(0)  # another caller's turn
        launched.append(arguments)

    prepared = extension().prepare_launches(
        1, 0, [((4, 4), (4, 1), None)], [(launch, (7, None, None), [(1, 0), (2, 1)])] * 2
    )

    def run() -> None:
        x = torch.zeros(4, 4)
        start.wait()
        for _ in range(50):
            (out,) = extension().repeat_launches(prepared, x)
            given.append((x, out))

    callers = [threading.Thread(target=run) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    expected = [(7, x.data_ptr(), out.data_ptr()) for x, out in given] * 2
    assert len(given) == len({out for *_, out in expected}) == 150
    assert sorted(launched) == sorted(expected)


FEWER_THREADS = """
from unittest.mock import patch

import torch
from tests.kernels.test_threads import calls, extension

assert extension().has_torch_team()
work = {name: calls(torch.float32)[name] for name in ("pool_norm adaptive", "swiglu", "pack")}
expected = {name: call() for name, call in work.items()}
with patch("torch.get_num_threads", lambda: 4):
    for name, call in work.items():
        assert all(map(torch.equal, call(), expected[name])), name
"""


@pytest.mark.skipif(WATCHED, reason="ThreadSanitizer knows nothing of PyTorch's threads")
def test_a_team_of_fewer_threads_than_parts_does_each_part_once():
    """A part that is done twice shows in the gradients of biases, which are added to."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_THREAD_LIMIT": "3",  # of the four that are asked for
        "OMP_WAIT_POLICY": "passive",  # or threads spin on cores that others need
        "TOKENFLEX_BACKEND": "native",
        "TRITON_INTERPRET": "0",
    }
    subprocess.run([sys.executable, "-c", FEWER_THREADS], env=environment, check=True, timeout=120)


RACE = """
import threading, torch
from tokenflex_kernels.backend import extension

gate, up, product = torch.randn(3, 64, 2**12)
places = gate.data_ptr(), up.data_ptr(), *gate.shape, False, product.data_ptr(), "float32", 1
multiply = lambda: [extension().gated_product(*places) for _ in range(10)]
callers = [threading.Thread(target=multiply) for _ in range(2)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
"""


@pytest.mark.skipif(not WATCHED, reason="needs make sanitize-threads")
def test_a_race_is_reported():
    """Two callers write to the same rows: a report that fails to come would prove nothing."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:symbolize=0:exitcode=66"}
    done = subprocess.run(
        [sys.executable, "-c", RACE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 66
    _, _, accesses = done.stderr.partition("data race")
    assert Path(extension().__file__).name in accesses.partition("Location")[0]
