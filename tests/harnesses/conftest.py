"""A tiny checkpoint, and the harnesses: stand-ins and installed packages."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tests.harnesses.standins import modules
from tests.models.tiny import PAD, tiny_model
from tokenflex import TokenFlexProcessor
from tokenflex.digits.processor import digits_processor
from tokenflex.training.checkpoint import save_model

ADAPTERS = ("tokenflex.harnesses.lmms_eval", "tokenflex.harnesses.vlmevalkit")


@pytest.fixture(scope="session")
def processor() -> TokenFlexProcessor:
    return digits_processor(9)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, processor) -> Path:
    folder = tmp_path_factory.mktemp("harnesses") / "checkpoint"
    save_model(folder, tiny_model(), processor)
    return folder


@pytest.fixture
def standins(monkeypatch) -> None:
    """Replace all harnesses by the stand-ins."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ADAPTERS:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture(params=["stand-in", "installed"])
def adapter(request, monkeypatch):
    """Our module for lmms-eval, with the stand-in and with the package."""
    if request.param == "stand-in":
        request.getfixturevalue("standins")
    else:
        pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed")
        monkeypatch.delitem(sys.modules, ADAPTERS[0], raising=False)
    return importlib.import_module(ADAPTERS[0])


@pytest.fixture(scope="session")
def greedy(processor):
    """Return (answer, prompt tokens, new tokens) by the processor and ``generate``."""
    model = tiny_model()

    def answer(images, text, count, length, **options):
        inputs = processor(
            images=list(images) or None,
            text=text,
            num_image_tokens=count,
            add_special_tokens=False,
            **options,
        )
        output = model.generate(
            **inputs,
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=PAD,
        )
        read = inputs["input_ids"].shape[1]
        said = processor.tokenizer.decode(output[0, read:], skip_special_tokens=True)
        return said.strip(), read, output.shape[1] - read

    return answer
