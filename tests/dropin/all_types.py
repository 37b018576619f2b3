"""The page of all image-text types of transformers, docs/families.md.

    python -m tests.dropin.all_types

goes over the mapping of the installed transformers and writes the page.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.dropin.configs import CONFIGS, model_type
from tests.dropin.processors import NEED_TORCHVISION, PROCESSORS
from tokenflex.dropin import supported_families
from tokenflex.dropin.families import family_of
from tokenflex.dropin.unsupported import reason

PAGE = Path(__file__).parents[2] / "docs/families.md"

_HEAD = """# All image-text types of transformers

Every model type that `AutoModelForImageTextToText` of transformers {version} knows: {supported} are supported by
[`replace_projector`](dropin.md), {unsupported} are not, for the reason given. `python -m tests.dropin.all_types` writes this page.

Supported means: a tiny model of the type passes the tests of [the table of families](dropin.md#supported-families). Each image of
a batch is as if alone at its own count, in logits, greedy search and beams; all weights of the projector get gradients; the stock
model gives the same logits for precomputed tokens; saving, loading, restoring and LoRA work. *Processor* tells whether the type's own
processor is part of the tests: not where its image processor cannot be built from a few lines. *Refused* is what raises an error, with
its reason.

| model type | supported | processor | refused |
|---|---|---|---|
"""


def page() -> str:
    """Return the page for the installed transformers."""
    types = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    supported = [name for name in types if name in supported_families()]
    rows = [_row_of(name) if name in supported else _reason_row(name) for name in types]
    head = _HEAD.format(
        version=transformers.__version__,
        supported=len(supported),
        unsupported=len(types) - len(supported),
    )
    return head + "\n".join(rows) + "\n"


def _row_of(name: str) -> str:
    family = family_of(SimpleNamespace(model_type=name))
    refused = {
        "packing": family.no_packing,
        "fitting": family.no_fit,
        "`merged_embeddings`": family.no_prompt_embeds,
    }
    told = [f"{what}: {why}" for what, why in refused.items() if why]
    return f"| {name} | yes | {_processor(name)} | {'; '.join(told)} |"


def _reason_row(name: str) -> str:
    return f"| {name} | no | | {reason(name)} |"


def _processor(name: str) -> str:
    names = [config for config in CONFIGS if model_type(config) == name and config in PROCESSORS]
    if not names:
        return "no"
    return "beside torchvision" if set(names) <= {*NEED_TORCHVISION} else "yes"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
