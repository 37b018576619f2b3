"""The registry of runtimes that a model is exported to: one class each.

A target writes a traced part as a file, and runs that file again: what is checked is what was
written. Packages are imported inside of the methods, so that the command line can list targets.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from tokenflex.serving.export.parts import Part

    Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class Target(Protocol):
    """A runtime for graphs.

    Attributes:
        suffix: of its files.
        packages: modules that it needs beside PyTorch, of the extra ``export``.
        attention: transformers' attention of the language model while it is traced. PyTorch's own
            defines the result of a padded token, which sees no token; in other runtimes it may be
            NaN, which then spreads. "eager" has finite masks.
    """

    suffix: str
    packages: tuple[str, ...]
    attention: str

    def save(self, program: torch.export.ExportedProgram, part: Part, path: Path) -> None:
        """Write the graph of a part, which ``program`` has traced."""

    def load(self, path: Path, part: Part) -> Run:
        """Return a function from the part's inputs to its outputs, by what :meth:`save` wrote."""


class Onnx:
    """ONNX files, run by ONNX Runtime."""

    suffix = ".onnx"
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    attention = "eager"

    def save(self, program: torch.export.ExportedProgram, part: Part, path: Path) -> None:
        """Write ``path``, and beside it the weights of a part of more than 2 GB."""
        import torch

        logger = logging.getLogger("torch.onnx")  # tells of packages that are not needed
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PyTorch's own exporter, about itself
                written = torch.onnx.export(
                    program,
                    dynamo=True,
                    verbose=False,
                    input_names=[*part.inputs],
                    output_names=[*part.outputs],
                )
        finally:
            logger.setLevel(level)
        assert written is not None
        written.save(str(path))

    def load(self, path: Path, part: Part) -> Run:
        """Open a session on the CPU."""
        import torch
        from onnxruntime import InferenceSession, SessionOptions

        options = SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            arrays = [tensor.numpy() for tensor in inputs]
            feeds = dict(zip(part.inputs, arrays, strict=True))
            return [torch.from_numpy(array) for array in session.run([*part.outputs], feeds)]

        return run


class Pt2:
    """Programs of ``torch.export``, run by PyTorch without this package."""

    suffix = ".pt2"
    packages: tuple[str, ...] = ()
    attention = "sdpa"

    def save(self, program: torch.export.ExportedProgram, part: Part, path: Path) -> None:
        """Write ``path``."""
        import torch

        torch.export.save(program, path)

    def load(self, path: Path, part: Part) -> Run:
        """Load the program."""
        import torch

        module = torch.export.load(path).module()

        def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            outputs = module(*inputs)
            return list(outputs) if isinstance(outputs, tuple) else [outputs]

        return run


class OpenVino:
    """OpenVINO's .xml and .bin files."""

    suffix = ".xml"
    packages: tuple[str, ...] = ("openvino",)
    attention = "eager"

    def save(self, program: torch.export.ExportedProgram, part: Part, path: Path) -> None:
        """Write ``path`` and the weights beside it, in float32."""
        import openvino

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its use of PyTorch
            model = openvino.convert_model(program)
        for ports, names in ((model.inputs, part.inputs), (model.outputs, part.outputs)):
            for port, name in zip(ports, names, strict=True):
                port.get_tensor().set_names({name})
        openvino.save_model(model, path, compress_to_fp16=False)

    def load(self, path: Path, part: Part) -> Run:
        """Compile for the CPU, in float32."""
        import openvino
        import torch

        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 on processors that have it
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = openvino.compile_model(path, "CPU", options)

        def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            arrays = [tensor.numpy() for tensor in inputs]
            outputs: Any = compiled(dict(zip(part.inputs, arrays, strict=True)))
            return [torch.from_numpy(outputs[name].copy()) for name in part.outputs]

        return run


TARGETS: dict[str, Target] = {"onnx": Onnx(), "pt2": Pt2(), "openvino": OpenVino()}
"""Name on the command line -> target."""
LANGUAGE_MODEL = "language-model"
"""The target that is no graph: a checkpoint of transformers."""
