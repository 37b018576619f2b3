"""The entry point for lmms-eval; light, because it is loaded for every model there."""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """Return the ``ModelManifest`` of the model ``tokenflex``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="tokenflex", chat_class_path="tokenflex.harnesses.lmms_eval.TokenFlex"
    )
