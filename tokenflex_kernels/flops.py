"""Operation counts of the ops, for PyTorch's ``FlopCounterMode``.

The counter knows PyTorch's own products, and an op only by its formula. Formulas are handed over as
the first op runs under a mode: to register them beforehand would import the counter, and Triton
with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]
COUNTER = "torch.utils.flop_counter"


def _product(rows: int, weight: Shape) -> int:
    return 2 * rows * weight[0] * weight[1]


def _gate_up(x: Shape, gate_weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * _product(x[0], gate_weight)


def _project_tokens(x: Shape, *arguments: Any, **_: Any) -> int:
    gate_weight, down_weight, cells = arguments[2], arguments[6], arguments[9]
    return 2 * _product(cells, gate_weight) + _product(cells, down_weight)


def _project_and_pack(x: Shape, *arguments: Any, **_: Any) -> int:
    gate_weight, down_weight, cells = arguments[2], arguments[6], arguments[12]
    return 2 * _product(cells, gate_weight) + _product(cells, down_weight)


def _down_gradient(dy: Shape, down_weight: Shape | None, *_: Any, **__: Any) -> int:
    return 0 if down_weight is None else _product(dy[0], down_weight)


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(x[0], weight)


def _transposed_product(left: Shape, right: Shape, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


# Operations of an op's matrix products by its name, from the shapes of its tensors and its other
# arguments. What else an op computes is not counted, as the counter does of PyTorch's.
FORMULAS: dict[str, Callable[..., int]] = {
    "swiglu": _gate_up,
    "project_tokens": _project_tokens,
    "project_and_pack": _project_and_pack,
    "packed_down": _linear,
    "gate_up": _gate_up,
    "down_gradient": _down_gradient,
    "input_gradient": _gate_up,
    "host_linear": _linear,
    "host_transposed_product": _transposed_product,
}


def tell_counters() -> None:
    """Give the formulas to the counters that are active, and to those that are made later."""
    module = sys.modules.get(COUNTER)
    if module is None:
        return
    counters = (getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack())
    registries = [c.flop_registry for c in counters if isinstance(c, module.FlopCounterMode)]
    for registry in (module.flop_registry, *registries):
        if torch.ops.tokenflex.swiglu in registry:
            continue
        for name, formula in FORMULAS.items():
            registry[getattr(torch.ops.tokenflex, name)] = module.shape_wrapper(formula)
