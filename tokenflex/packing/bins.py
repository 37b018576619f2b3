"""Rows of nearly equal cost: the samples of a data set, sorted into bins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch.utils.data import Dataset

from tokenflex.dropin.families import vision_encoder
from tokenflex.dropin.variants import unwrapped
from tokenflex.packing.collator import SAMPLES
from tokenflex_kernels import balance_bins

_PIXEL_VALUES = 3 * 16 * 16
"""Values of a unit of vision work, 16 x 16 pixels."""


@dataclass(frozen=True)
class SampleSizes:
    """Sizes of the samples of a data set.

    Attributes:
        tokens: Rows of the language model for each sample, image tokens included.
        vision: Vision work of each sample: its pixels, in units of 16 x 16. Two frames that share
            patches count once, for the encoder sees one patch.
    """

    tokens: list[int]
    vision: list[int]


def measure(dataset: Sequence[Any], collator: Callable[[Any], Any]) -> SampleSizes:
    """Return the sizes of a data set's samples.

    Args:
        dataset: Of samples with a length.
        collator: Makes a padded batch of samples, as that of
            :class:`tokenflex.packing.PackingCollator`. It is called once a sample, images included.
    """
    tokens, vision = [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        batch = collator([dict(sample) if isinstance(sample, Mapping) else sample])
        tokens.append(int(batch["attention_mask"].sum()))
        values = sum(
            value.numel() // _frames_of_patches(value)
            for name, value in batch.items()
            if name.startswith("pixel_values") and isinstance(value, torch.Tensor)
        )
        vision.append(-(-values // _PIXEL_VALUES))
    return SampleSizes(tokens, vision)


def _frames_of_patches(values: torch.Tensor) -> int:
    """Return the frames that each patch of a flat list [patches, 3 * frames * side * side] holds.

    Qwen-like processors write an image twice, as two frames. Twice a square is never a square.
    """
    area = values.shape[-1] // 3
    return 2 if values.ndim == 2 and area % 2 == 0 and isqrt(area // 2) ** 2 == area // 2 else 1


def vision_cost(model: Any) -> float:
    """Return the cost of a unit of vision work in rows of the language model.

    It is the ratio of their parameters, which each patch and each row pass once, and holds for
    encoders whose patches have 14 to 16 pixels a side.

    Raises:
        ValueError: The model's vision encoder has none of the usual names.
    """
    base = unwrapped(model).base_model
    encoder = vision_encoder(base)
    if encoder is None:
        raise ValueError(f"model must have a vision encoder, got {type(base).__name__}")
    of_encoder, of_decoder = (
        sum(p.numel() for p in part.parameters()) for part in (encoder, base.get_decoder())
    )
    return of_encoder / max(of_decoder, 1)


class PackedDataset(Dataset[dict[str, Any]]):
    """Map-style data set of rows: each item holds the samples of one packed row.

    Give it to a trainer with ``per_device_train_batch_size=1`` and a
    :class:`tokenflex.packing.PackingCollator`. Rows have nearly equal costs, tokens plus vision
    work, so that the processes of a step wait for each other as little as possible. The samples of
    a row are the same in every epoch; the trainer shuffles rows. TRL takes :meth:`to_datasets`.

    Args:
        dataset: Map-style, of samples.
        sizes: Of its samples, see :func:`measure`.
        max_tokens: Tokens of a row at most.
        vision_cost: Cost of a unit of vision work in tokens, see :func:`vision_cost`.
        max_vision: Vision work of a row at most, which bounds its memory; None for no bound.
        multiple_of: The number of rows is a multiple of this: processes times accumulated steps.

    Raises:
        ValueError: ``sizes`` are of another number of samples, or a sample is larger than a row.
    """

    def __init__(
        self,
        dataset: Any,
        sizes: SampleSizes,
        *,
        max_tokens: int,
        vision_cost: float = 0.0,
        max_vision: int | None = None,
        multiple_of: int = 1,
    ) -> None:
        if len(sizes.tokens) != len(dataset):
            raise ValueError(
                f"sizes must be of the data set's {len(dataset)} samples, got {len(sizes.tokens)}"
            )
        self.dataset = dataset
        bins = balance_bins(
            sizes.tokens,
            sizes.vision,
            max_tokens=max_tokens,
            max_tiles=2**31 - 1 if max_vision is None else max_vision,
            tile_cost=vision_cost,
            multiple_of=multiple_of,
        )
        # Empty ones exist only where there are fewer samples than multiple_of.
        self.rows = [members for members in bins if members]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the samples of a row, under one key."""
        return {SAMPLES: [self.dataset[member] for member in self.rows[index]]}

    def to_datasets(self) -> Any:
        """Return the rows as a ``datasets.Dataset``, which TRL insists on.

        Samples are read when a row is, and nothing is copied.
        """
        from datasets import Dataset as TableDataset

        def read(batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
            rows = [self[index][SAMPLES] for index in batch["row"]]
            # TRL knows data with images by the key.
            return {SAMPLES: rows, "images": [[] for _ in rows]}

        return TableDataset.from_dict({"row": [*range(len(self))]}).with_transform(read)
