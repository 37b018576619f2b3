"""A plugin for axolotl: packed rows of samples with images.

axolotl itself refuses ``sample_packing`` for multimodal models. This plugin prepares the model, and
packs what axolotl's own multimodal collator pads. It was written against axolotl's source and was
not run in axolotl: only its two hooks are tested, with a stand-in for ``BasePlugin``.

Put this file where Python finds it, and into the configuration, beside what axolotl asks for of
multimodal models:

    plugins:
      - axolotl_packing.ImagePacking
    processor_type: AutoProcessor
    skip_prepare_dataset: true
    remove_unused_columns: false
    sample_packing: false       # axolotl's own, for text
    micro_batch_size: 8         # samples of a row
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from tokenflex import packing


class ImagePacking(BasePlugin):
    """Packs each micro-batch into one row."""

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Prepare the model, adapters included. axolotl calls this once it is loaded."""
        packing.enable(model)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Wrap axolotl's collators, which decide what is learned, once it has made its trainer."""
        for name in ("data_collator", "eval_data_collator"):
            collator = getattr(trainer, name, None)
            if collator is not None:
                setattr(trainer, name, packing.PackingCollator(trainer.model, collator))
