"""TokenFLEX: vision-language models whose vision-token count is chosen per image.

The names below are loaded when first used, so that importing this module is fast. The projector and
the counts need PyTorch only; the others need an extra, and name it when it is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenflex._auto_classes import register_with_transformers
from tokenflex.version import __version__ as __version__

if TYPE_CHECKING:
    from tokenflex.counts import TokenCounts as TokenCounts
    from tokenflex.data.trainer import DataCollatorWithPacking as DataCollatorWithPacking
    from tokenflex.dropin.families import register_family as register_family
    from tokenflex.dropin.replace import from_pretrained as from_pretrained
    from tokenflex.dropin.replace import replace_projector as replace_projector
    from tokenflex.dropin.replace import restore_projector as restore_projector
    from tokenflex.models.configuration import TokenFlexConfig as TokenFlexConfig
    from tokenflex.models.modeling import (
        TokenFlexForConditionalGeneration as TokenFlexForConditionalGeneration,
    )
    from tokenflex.models.processing import TokenFlexProcessor as TokenFlexProcessor
    from tokenflex.models.ristretto import load_ristretto as load_ristretto
    from tokenflex.projector import TokenAdaptiveProjector as TokenAdaptiveProjector

# name -> (module that defines it, extra that installs the module's imports; "" is the core)
_LAZY = {
    "TokenAdaptiveProjector": ("tokenflex.projector", ""),
    "TokenCounts": ("tokenflex.counts", ""),
    "DataCollatorWithPacking": ("tokenflex.data.trainer", "hf"),
    "TokenFlexConfig": ("tokenflex.models.configuration", "hf"),
    "TokenFlexForConditionalGeneration": ("tokenflex.models.modeling", "hf"),
    "TokenFlexProcessor": ("tokenflex.models.processing", "hf"),
    "load_ristretto": ("tokenflex.models.ristretto", "hf"),
    "from_pretrained": ("tokenflex.dropin.replace", "hf"),
    "register_family": ("tokenflex.dropin.families", "hf"),
    "replace_projector": ("tokenflex.dropin.replace", "hf"),
    "restore_projector": ("tokenflex.dropin.replace", "hf"),
}
__all__ = list(_LAZY)

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tokenflex' has no attribute {name!r}")
    module_name, extra = _LAZY[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not extra or error.name is None or error.name.startswith("tokenflex"):
            raise
        raise ImportError(
            f"tokenflex.{name} needs {error.name}: pip install 'tokenflex[{extra}]'"
        ) from error
    return getattr(module, name)
