"""Registration of our model with transformers' Auto classes, without importing transformers.

``import tokenflex`` must be fast and work without transformers; yet after it,
``AutoModelForImageTextToText.from_pretrained`` must know a saved model. So our classes are
registered when transformers loads its registries. Trainers and servers that look the class of a
checkpoint up by its name find it as an attribute of the transformers package, loaded when first
used.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# transformers' registry -> our modules that register themselves when they are imported: classes in
# that registry, and tokenflex.routing.choice as the model's `count_chooser`, since the model must
# not import what stands above it. tokenflex.routing.choice must not import
# tokenflex.models.modeling, which loads the registry and so is only half imported at that time.
_REGISTRARS = {
    "transformers.models.auto.configuration_auto": ("tokenflex.models.configuration",),
    "transformers.models.auto.modeling_auto": (
        "tokenflex.models.modeling",
        "tokenflex.routing.choice",
    ),
    "transformers.models.auto.processing_auto": ("tokenflex.models.processing",),
}
PACKAGE = "transformers"
# class name -> our module that defines it
_CLASSES = {
    "TokenFlexConfig": "tokenflex.models.configuration",
    "TokenFlexForConditionalGeneration": "tokenflex.models.modeling",
    "TokenFlexModel": "tokenflex.models.modeling",
    "TokenFlexProcessor": "tokenflex.models.processing",
}


class _RegisterAfterImport(MetaPathFinder):
    """A finder that adds our registration to the end of a registry's import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != PACKAGE and name not in _REGISTRARS:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _register_at_the_end_of(spec.loader, name)
                return spec
        return None


def _register_at_the_end_of(loader: Loader, registry: str) -> None:
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        _register(registry)

    loader.exec_module = execute_and_register  # type: ignore[method-assign]


def _register(registry: str) -> None:
    if registry == PACKAGE:
        _offer_classes(sys.modules[PACKAGE])
        return
    try:
        for module in _REGISTRARS[registry]:
            importlib.import_module(module)
    except ImportError as error:  # an unsupported transformers must still work
        warnings.warn(f"tokenflex is not registered with transformers: {error}", stacklevel=2)


def _offer_classes(package: ModuleType) -> None:
    """Give the package our classes as attributes that are loaded when first used.

    They are added to its class, as transformers may make the package a second time.
    """
    lazy: Any = type(package)
    if lazy is ModuleType or hasattr(lazy, "_tokenflex_classes"):
        return
    look_up = lazy.__getattr__

    def __getattr__(self: ModuleType, name: str) -> Any:
        if name in _CLASSES and self.__name__ == PACKAGE:
            return getattr(importlib.import_module(_CLASSES[name]), name)
        return look_up(self, name)

    lazy.__getattr__ = __getattr__
    lazy._tokenflex_classes = tuple(_CLASSES)


def register_with_transformers() -> None:
    """Register with the loaded modules of transformers now, and with others when they load."""
    sys.meta_path.insert(0, _RegisterAfterImport())
    for registry in (PACKAGE, *_REGISTRARS):
        if sys.modules.get(registry) is not None:  # tests set None for "not installed"
            _register(registry)
