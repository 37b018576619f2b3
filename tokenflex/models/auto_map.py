"""The ``auto_map`` of saved checkpoints, by which transformers' Auto classes find tokenflex.

In a process that has imported tokenflex the Auto classes know our classes. In any other they read
the ``auto_map`` of ``config.json`` and ``processor_config.json``, which names a module beside the
weights. That module only imports tokenflex, and runs only with ``trust_remote_code=True``. Without
that, transformers refuses to load; without an ``auto_map`` it would return a bare tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

STUB = "tokenflex_auto.py"
_STUB_SOURCE = '''\
"""Find the classes of this checkpoint in the installed tokenflex: pip install 'tokenflex[hf]'."""

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.models.modeling import TokenFlexModel

__all__ = [
    "TokenFlexConfig",
    "TokenFlexForConditionalGeneration",
    "TokenFlexModel",
    "TokenFlexProcessor",
]
'''


class InstalledClass:
    """A class whose source transformers must not copy into checkpoints."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing; transformers would save a copy of the source file with each checkpoint."""


class SavedWithStub(InstalledClass):
    """A class whose JSON file has an ``auto_map``, with the module that it names beside it."""

    auto_classes: ClassVar[dict[str, str]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return the values that transformers saves, and the ``auto_map``."""
        stub = STUB.removesuffix(".py")
        auto_map = {auto: f"{stub}.{name}" for auto, name in self.auto_classes.items()}
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**values, "auto_map": auto_map}

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the module beside the file."""
        super().to_json_file(json_file_path, *args, **kwargs)  # type: ignore[misc]
        Path(json_file_path).with_name(STUB).write_text(_STUB_SOURCE, encoding="utf-8")
