"""Settings of all tests: no network, no GPU tests without a GPU, no tests of absent extras.

``make test`` installs everything. ``make gpu`` uses the Python on PATH, which may have the core
alone: tests that need more are then left out, and the report's header names them.
"""

from __future__ import annotations

import os
from importlib import metadata

# Tensors here are tiny: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from packaging.requirements import Requirement

from tests.selection import ALL
from tests.torchvision_ops import make_torchvision_importable

make_torchvision_importable()

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_MODEL_TESTS = [
    *("data", "digits", "docs", "dropin", "evaluation", "experiments", "harnesses", "models"),
    *("routing", "serving", "training"),
    *("test_answers.py", "test_cli.py", "test_docs.py", "test_examples.py", "test_plots.py"),
    "test_videos.py",
    "test_front_door.py",
]
_TRAINING_TESTS = ["experiments/ablation", "training", "test_cli.py", "test_front_door.py"]
_TESTS_BY_REQUIREMENT = {
    "hypothesis": [
        "kernels/packing/test_bins.py",
        "kernels/packing/test_packing.py",
        "kernels/packing/test_plan.py",
        "kernels/pool_norm/test_pool_norm.py",
        "data/test_fuzz.py",
        "data/test_order.py",
        "routing/test_budget.py",
        "routing/test_router.py",
    ],
    "triton": ["ptx"],
    "transformers": _MODEL_TESTS,
    "transformers>=5.18": [
        *("docs", "dropin", "packing", "serving", "evaluation/test_converted.py"),
        *("test_docs.py", "test_examples.py", "test_front_door.py"),
        "training/test_conversions.py",
    ],
    "pillow": _MODEL_TESTS,
    "scikit-learn": [
        *(*_TRAINING_TESTS, "experiments/test_video.py"),
        *("digits", "evaluation", "routing", "serving"),
    ],
    "accelerate": _TRAINING_TESTS,
    "pydantic": [
        *_TRAINING_TESTS,
        *(
            "data",
            "digits/test_canvas_size.py",
            "digits/test_moving.py",
            "docs",
            "benchmarks/test_training_pace.py",
        ),
    ],
    "matplotlib": [
        "experiments",
        "training",
        "benchmarks/test_plots.py",
        "benchmarks/test_report.py",
        "routing/test_route.py",
        "serving/test_playground.py",
        "test_cli.py",
        "test_front_door.py",
        "test_plots.py",
    ],
    "datasets": ["models/test_ecosystem.py", "data/test_huggingface.py"],
    "peft": ["models/test_ecosystem.py"],
    "trl": ["models/test_ecosystem.py"],
}


def _is_missing(text: str) -> bool:
    requirement = Requirement(text)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return True
    return not requirement.specifier.contains(version, prereleases=True)


_MISSING = [requirement for requirement in _TESTS_BY_REQUIREMENT if _is_missing(requirement)]

collect_ignore = sorted({path for text in _MISSING for path in _TESTS_BY_REQUIREMENT[text]})


@pytest.fixture
def own_accelerator_and_threads():
    """Leave neither accelerate's global state nor a number of threads to the next test."""
    from accelerate.state import AcceleratorState

    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def pytest_report_header() -> str | None:
    if not _MISSING:
        return None
    return f"not installed: {', '.join(_MISSING)}; left out: {', '.join(collect_ignore)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not ALL:
        # Not by keywords, to which the names of folders belong: a clone may be in "release".
        left_out = [item for item in items if item.get_closest_marker("release")]
        items[:] = [item for item in items if not item.get_closest_marker("release")]
        config.hook.pytest_deselected(items=left_out)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
