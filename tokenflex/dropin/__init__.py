"""Token-adaptive projectors in existing vision-language models of transformers."""

# ruff: noqa: E402, F401  # an old release is refused before its modules lack a name

from tokenflex_kernels.versions import require

# The first release whose models all read images in get_image_features.
require("transformers", "5.18", "tokenflex.dropin")

import tokenflex.dropin.adapters  # registers the built-in families
from tokenflex.dropin.collation import ImageTextCollator, MaskImageLabels
from tokenflex.dropin.distillation import Agreement, DistillationReport, distill
from tokenflex.dropin.families import (
    Deepstack,
    chosen_layers,
    register_family,
    split_grids,
    square_grids,
    supported_families,
)
from tokenflex.dropin.fitting import FitReport, fit_projector
from tokenflex.dropin.packing import pack_inputs
from tokenflex.dropin.replace import (
    from_pretrained,
    projector_name,
    replace_projector,
    restore_projector,
)

__all__ = [
    "Agreement",
    "Deepstack",
    "DistillationReport",
    "FitReport",
    "ImageTextCollator",
    "MaskImageLabels",
    "chosen_layers",
    "distill",
    "fit_projector",
    "from_pretrained",
    "pack_inputs",
    "projector_name",
    "register_family",
    "replace_projector",
    "restore_projector",
    "split_grids",
    "square_grids",
    "supported_families",
]
