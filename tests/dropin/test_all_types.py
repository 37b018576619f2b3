"""The page of all image-text types is that of the installed transformers."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.dropin.all_types import PAGE, image_text_types, page
from tokenflex.dropin import supported_families
from tokenflex.dropin.families import family_of
from tokenflex.dropin.unsupported import _REASONS, NO_IMAGE_TEXT, NOT_TRIED, reason

TYPES = image_text_types()
UNSUPPORTED = [name for name in TYPES if name not in supported_families()]


def written_for() -> str:
    (version,) = re.findall(r"(?m)^transformers (\S+): \d+ types", text())
    return version


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_the_page_is_current():
    if transformers.__version__ != written_for():
        pytest.skip(f"the page is about transformers {written_for()}")
    assert text() == page(), "run python -m tests.dropin.all_types"
    assert set(re.findall(r"(?m)^\| ([\w.-]+) \| (?:yes|no)\b", text())) == {*TYPES}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_the_error_says_what_the_page_says(name):
    with pytest.raises(ValueError, match="got model_type") as error:
        family_of(SimpleNamespace(model_type=name))
    assert f"{name!r} ({reason(name)})" in str(error.value)


def test_reasons_are_of_unsupported_types():
    assert not {*_REASONS} & {*supported_families()}
    assert reason("bert") == NO_IMAGE_TEXT
    assert {reason(name) for name in UNSUPPORTED if name not in _REASONS} <= {NOT_TRIED}
    if transformers.__version__ == written_for():
        assert {*_REASONS} <= {*TYPES}


@pytest.mark.parametrize("name", ["mllama", "blip", "vision-encoder-decoder"])
def test_types_without_placeholders_have_no_seam(name):
    """Their classes have no method that returns the features of images for placeholders."""
    cls = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
    module = importlib.import_module(cls.__module__)
    methods = {n for c in vars(module).values() if isinstance(c, type) for n in vars(c)}
    assert "get_placeholder_mask" not in methods
