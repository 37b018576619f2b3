"""The extras of the distribution, and the hint for a package that is not installed."""

from __future__ import annotations

PACKAGES = {
    "hf": ("transformers", "huggingface_hub", "PIL", "safetensors"),
    "train": ("accelerate", "datasets", "matplotlib", "pydantic", "yaml", "sklearn", "tqdm"),
    "video": ("av",),
    "serve": ("starlette", "uvicorn"),
    "demo": ("gradio", "matplotlib"),
    "export": ("onnx", "onnxruntime", "onnxscript", "openvino"),
    "bench": ("pytest_benchmark", "matplotlib"),
}
"""Extra -> the packages that it installs, by their names in imports; all but bench include hf."""


def install_hint(module: str, extra: str) -> str:
    """Return the command that installs a missing module.

    Args:
        module: Name of the module, such as "transformers.models".
        extra: The extra of the command that needs it, which is preferred.
    """
    package = module.partition(".")[0]
    if package in (*PACKAGES["hf"], *PACKAGES[extra]):
        return f"pip install 'tokenflex[{extra}]'"
    for name, packages in PACKAGES.items():
        if package in packages:
            return f"pip install 'tokenflex[{name}]'"
    return f"pip install {package}"
