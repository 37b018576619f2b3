"""The page of all image-text types of transformers, docs/families.md.

    python -m tests.dropin.all_types

goes over the mapping of the installed transformers and writes the page.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from tests.dropin.configs import model_type
from tests.dropin.processors import NEED_TORCHVISION, PROCESSORS
from tests.dropin.report import with_tables
from tokenflex import TokenFlexConfig
from tokenflex.dropin import supported_families
from tokenflex.dropin.families import NO_STOCK_VIDEOS, NO_VIDEOS_YET, Family, family_of
from tokenflex.dropin.unsupported import reason

PAGE = Path(__file__).parents[2] / "docs/families.md"


def image_text_types() -> list[str]:
    """Return the model types of the installed transformers, without our own."""
    return sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - {TokenFlexConfig.model_type})


def page() -> str:
    """Return the page with the table of the installed transformers."""
    types = image_text_types()
    supported = [name for name in types if name in supported_families()]
    numbers = (
        f"transformers {transformers.__version__}: {len(types)} types, {len(supported)} supported."
    )
    table = ["| model type | supported | processor | videos | refused |", "|---|---|---|---|---|"]
    table += [_row_of(name) if name in supported else _reason_row(name) for name in types]
    text = PAGE.read_text(encoding="utf-8")
    return with_tables(text, {"types": "\n".join([numbers, "", *table])})


def _row_of(name: str) -> str:
    family = family_of(SimpleNamespace(model_type=name))
    refused = {
        "packing": family.no_packing,
        "fitting": family.no_fit,
        "`merged_embeddings`": family.no_prompt_embeds,
    }
    told = [f"{what}: {why}" for what, why in refused.items() if why]
    since = f", from transformers {family.transformers} on" if family.transformers else ""
    return f"| {name} | yes{since} | {_processor(name)} | {_videos(family)} | {'; '.join(told)} |"


def _reason_row(name: str) -> str:
    return f"| {name} | no | | | {reason(name)} |"


def _videos(family: Family) -> str:
    if family.takes_videos:
        alone = f", without images beside them: {family.no_mixture}"
        return f"yes{alone if family.no_mixture else ''}"
    if family.no_videos == NO_STOCK_VIDEOS:
        return "stock takes none"
    return "not yet" if family.no_videos == NO_VIDEOS_YET else f"not yet: {family.no_videos}"


def _processor(name: str) -> str:
    if name in _TESTED:
        names = {config for config in PROCESSORS if model_type(config) == name}
        return "beside torchvision" if names <= {*NEED_TORCHVISION} else "its own"
    same = [tested for tested in _TESTED if _class(tested) == _class(name)]
    return f"as {same[0]}" if same and _class(name) else "not tested"


def _class(name: str) -> str | None:
    """Return the name of the processor's class of a model type."""
    names = PROCESSOR_MAPPING_NAMES.get(name)
    return names if names is None or isinstance(names, str) else names[0]


_TESTED = sorted({model_type(name) for name in PROCESSORS})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
