"""torchvision beside a CPU build of torch.

torchvision on the package index is built for CUDA. Beside a CPU torch its compiled library does
not load, and its Python then registers kernels for two operators that nobody has defined. Image
processors need neither of them, so a definition without a kernel is enough.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_definitions: list[torch.library.Library] = []  # an operator lives as long as its library


def make_torchvision_importable() -> None:
    """Import torchvision if it is installed; define its operators where its library does not."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + _SIGNATURE)
        _definitions.append(library)
        import torchvision  # noqa: F401
