"""What all tests share: no network, no GPU tests without a GPU, no tests of extras that are absent.

``make test`` installs everything. ``make gpu`` uses the Python at hand, which may hold the core
alone: what needs more is then left out, and the report's header says so.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

# Tensors here are tiny: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.torchvision_ops import make_torchvision_importable
from tokenflex_kernels.versions import require

make_torchvision_importable()

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_OF_THE_MODEL = [
    "experiments",
    "models",
    "dropin",
    "data",
    "digits",
    "training",
    "routing",
    "test_cli.py",
    "evaluation",
    "harnesses",
    "test_answers.py",
    "test_docs.py",
    "benchmarks/test_first_token.py",
    "test_examples.py",
    "test_plots.py",
]
_NEEDED_BY = {
    "hypothesis": [
        "kernels/test_bin_packing.py",
        "kernels/test_pack_plan.py",
        "kernels/test_packing.py",
        "kernels/pool_norm/test_pool_norm.py",
        "data/test_fuzz.py",
        "data/test_order.py",
        "routing/test_budget.py",
        "routing/test_router.py",
    ],
    "transformers": _OF_THE_MODEL,
    "transformers>=5.18": ["dropin", "test_docs.py", "test_examples.py"],
    "PIL": _OF_THE_MODEL,
    "sklearn": ["experiments", "digits", "training", "evaluation", "routing", "test_cli.py"],
    "accelerate": ["experiments", "training", "test_cli.py"],
    "pydantic": ["experiments", "training", "test_cli.py"],
    "matplotlib": [
        "experiments",
        "training",
        "routing/test_curve.py",
        "routing/test_route.py",
        "test_cli.py",
        "test_plots.py",
        "benchmarks/test_first_token.py",
    ],
    "datasets": ["models/test_ecosystem.py", "data/test_huggingface.py"],
    "peft": ["models/test_ecosystem.py"],
    "trl": ["models/test_ecosystem.py"],
}


def _is_missing(requirement: str) -> bool:
    package, _, oldest = requirement.partition(">=")
    if find_spec(package) is None:
        return True
    try:
        require(package, oldest or "0")
    except ImportError:
        return True
    return False


_MISSING = [requirement for requirement in _NEEDED_BY if _is_missing(requirement)]

collect_ignore = sorted({path for requirement in _MISSING for path in _NEEDED_BY[requirement]})


def pytest_report_header() -> str | None:
    if not _MISSING:
        return None
    return f"not installed: {', '.join(_MISSING)}; left out: {', '.join(collect_ignore)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
