"""Packed training of vision-language models of transformers, stock and converted, in any trainer.

:func:`enable` prepares a model, :class:`PackingCollator` makes one row without padding of a
trainer's samples, and :class:`PackedDataset` sorts the samples of a data set into rows of nearly
equal cost. :func:`verify` compares packed with unpacked rows of a model.
"""

from tokenflex.dropin.packing import pack_inputs
from tokenflex.packing.attention import disable, enable, is_enabled, why_not
from tokenflex.packing.bins import PackedDataset, SampleSizes, measure, vision_cost
from tokenflex.packing.collator import PackingCollator, join_outputs
from tokenflex.packing.verification import PackingReport, verify

__all__ = [
    "PackedDataset",
    "PackingCollator",
    "PackingReport",
    "SampleSizes",
    "disable",
    "enable",
    "is_enabled",
    "join_outputs",
    "measure",
    "pack_inputs",
    "verify",
    "vision_cost",
    "why_not",
]
