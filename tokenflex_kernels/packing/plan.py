"""Plan a packed batch on the host: where every row comes from.

Token counts are host ints from the moment they are chosen, so the layout of a batch is known before
anything reaches the device. The collator plans, the device only moves rows, and nothing ever waits
to read a length back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch

from tokenflex_kernels.backend import extension, select_backend
from tokenflex_kernels.checks import check_int, check_ints
from tokenflex_kernels.packing import reference
from tokenflex_kernels.set_once import SetOnce

Ints: TypeAlias = "Sequence[int] | np.ndarray | torch.Tensor"

_INT64 = np.dtype(np.int64)
_TENSORS = ("input_ids", "position_ids", "labels", "source", "vision_rows", "cu_seqlens")


@dataclass(eq=False, kw_only=True)
class PackPlan(SetOnce):
    """The layout of one padding-free batch, made by :func:`plan_packing`. Its fields never change.

    ``total`` is the number of rows of the batch, ``vision`` that of its vision rows. The tensors
    move with :meth:`to`; the other fields stay on the host.
    """

    input_ids: torch.Tensor
    """int64 [total]: token ids, ``image_token_id`` on vision rows."""
    position_ids: torch.Tensor
    """int64 [total]: 0, 1, 2, .. within each sample."""
    labels: torch.Tensor
    """int64 [total], unshifted: ``ignore_index`` on vision rows and on each sample's first row."""
    source: torch.Tensor
    """int32 [total]: the token id of a text row, ~v on a row of vision token v."""
    vision_rows: torch.Tensor
    """int32 [vision]: the row of each vision token, in the order of the vision tokens.

    Of an image that is shown several times, each token has its rows here, ascending."""
    cu_seqlens: torch.Tensor
    """int32 [samples + 1]: sample s is rows cu_seqlens[s] to cu_seqlens[s + 1]."""
    lengths: tuple[int, ...]
    """Rows per sample."""
    token_counts: tuple[int, ...]
    """Vision tokens per image, in the order of the vision tokens."""
    image_index: tuple[int, ...] | None = None
    """The image that each placeholder shows; None where each image is shown once, in order."""
    num_vision_tokens: int
    """Vision tokens of all images, shown or not."""
    shown_once: bool = True
    """Each vision token has exactly one row."""
    vision_start: int = -1
    """The row of the first vision token where all of them follow it in their order; else -1."""
    max_seqlen: int
    """Rows of the longest sample, 0 in an empty batch."""
    max_token_id: int
    """The largest token id of a text row, -1 if there is no text."""
    num_token_ids: int
    """Different token ids among the text rows."""

    @property
    def num_tokens(self) -> int:
        """Rows of the batch, text and vision."""
        return self.source.shape[0]

    @property
    def num_samples(self) -> int:
        """Samples of the batch, those of no rows included."""
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def bounds(self) -> tuple[int, int, int] | None:
        """Rows of vision, of the table (the least) and of the packed buffer that the row maps need.

        None where the maps are not as :func:`plan_packing` makes them.
        """
        maps = self.source, self.vision_rows
        if not all(rows.dtype == torch.int32 and rows.is_contiguous() for rows in maps):
            return None
        vision = self.vision_rows.shape[0] if self.shown_once else self.num_vision_tokens
        return vision, self.max_token_id + 1, self.num_tokens

    def vision_tokens(self) -> torch.Tensor:
        """Return the vision token that stands at each of ``vision_rows``, int32 [vision]."""
        return ~self.source[self.vision_rows]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackPlan:
        """Return the plan with its tensors on ``device``. Their dtypes stay.

        Raises:
            TypeError: ``device`` is no device, for example a dtype.
        """
        if not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"device must be a torch.device, str or int, got {device!r}")
        return replace(
            self,
            **{
                name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS
            },
        )

    def pin_memory(self) -> PackPlan:
        """Return the plan in pinned memory, for ``to(device, non_blocking=True)``.

        A DataLoader calls it.
        """
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})


def plan_packing(
    input_ids: Sequence[Ints],
    token_counts: Ints,
    image_token_id: int,
    *,
    labels: Sequence[Ints] | None = None,
    ignore_index: int = -100,
    expanded: bool = False,
    image_index: Ints | None = None,
) -> PackPlan:
    """Plan one padding-free batch in which every image has its own number of vision tokens.

    Runs on the host in O(tokens + rows), in the collator or a DataLoader worker; needs no device.
    A plan takes 28 bytes a row, 4 more a vision row and 4 a sample.

    Args:
        input_ids: one 1-D sequence of token ids per sample: ints, a numpy array or a CPU tensor. A
            token equal to ``image_token_id`` is a placeholder; any other is text, in [0, 2^31).
        token_counts: vision tokens per image, one int for each image of the batch, in the order in
            which the vision tokens lie. At 0 the placeholder vanishes; with ``expanded`` it must be
            at least 1.
        image_token_id: the placeholder's id, any int64 (LLaVA's is -200).
        labels: one 1-D sequence per sample, aligned with ``input_ids`` and unshifted, as Hugging
            Face models expect; None supervises every text token. Placeholders' labels are not read.
        ignore_index: the label of rows without loss.
        expanded: False for one placeholder per image; True where placeholders are repeated already,
            once per vision token. Neighbouring placeholders may then belong to several images, but
            text never splits an image and no image straddles two samples.
        image_index: the image of ``token_counts`` that each placeholder shows (with ``expanded``,
            each of its runs), in order of appearance. Images may be shown in any order, several
            times, or not at all. None: each once, in order of appearance.

    Returns:
        The :class:`PackPlan`, in CPU memory.

    Raises:
        ValueError: a text token outside [0, 2^31), a negative count, counts or an ``image_index``
            that do not match the placeholders, labels that do not match ``input_ids``, more than
            2^31 - 1 rows, or a tensor that is not on the CPU.
        TypeError: an argument is not made of ints, or ``expanded`` is not a bool.
    """
    samples = _check_samples("input_ids", input_ids)
    # Copies, so that nobody can change what was checked before it is used.
    counts = check_ints("token_counts", token_counts).copy()
    images = None if image_index is None else check_ints("image_index", image_index).copy()
    given = None if labels is None else _check_labels(labels, samples)
    image_token_id = check_int("image_token_id", image_token_id)
    ignore_index = check_int("ignore_index", ignore_index)
    if not isinstance(expanded, bool):
        raise TypeError(f"expanded must be a bool, got {expanded!r}")

    if select_backend("plan_packing") == "reference":
        fields = reference.plan_packing(
            [sample.tolist() for sample in samples],
            counts.tolist(),
            None if images is None else images.tolist(),
            image_token_id,
            None if given is None else [sample.tolist() for sample in given],
            ignore_index,
            expanded,
        )
    else:
        compiled = extension()
        assert compiled is not None, "select_backend chose an extension that is not built"
        offsets = np.zeros(len(samples) + 1, np.int64)
        np.cumsum([sample.size for sample in samples], out=offsets[1:])
        ids = _joined(samples)
        targets = None if given is None else _joined(given)
        fields = compiled.plan(
            ids, offsets, counts, images, image_token_id, expanded, targets, ignore_index
        )
    lengths = tuple(np.diff(fields["cu_seqlens"]).tolist())
    # numpy's memory: torch would allocate on the default device, or not at all under a
    # FakeTensorMode.
    vision_start = _start_of_run(fields["vision_rows"])
    fields |= {name: torch.from_numpy(fields[name]) for name in _TENSORS}
    return PackPlan(
        **fields,
        lengths=lengths,
        token_counts=tuple(counts.tolist()),
        image_index=None if images is None else tuple(images.tolist()),
        num_vision_tokens=int(counts.sum()),
        shown_once=images is None or np.array_equal(np.sort(images), np.arange(counts.size)),
        vision_start=vision_start,
        max_seqlen=max(lengths, default=0),
    )


def _start_of_run(rows: np.ndarray) -> int:
    """Return the first of row numbers that ascend by 1, else -1."""
    if rows.size == 0 or rows[-1] - rows[0] + 1 != rows.size or not (np.diff(rows) == 1).all():
        return -1
    return int(rows[0])


def _check_samples(name: str, samples: Sequence[Ints]) -> list[np.ndarray]:
    if not isinstance(samples, (Sequence, np.ndarray, torch.Tensor)) or isinstance(samples, str):
        raise TypeError(
            f"{name} must have one 1-D sequence of ints per sample, got {type(samples).__name__}"
        )
    if isinstance(samples, (np.ndarray, torch.Tensor)) and samples.ndim == 0:
        raise ValueError(f"{name} must have one 1-D sequence of ints per sample, got shape ()")
    # A collator gives hundreds of arrays that need no conversion.
    return [
        sample
        if type(sample) is np.ndarray and sample.dtype == _INT64 and sample.ndim == 1
        else check_ints(f"{name}[{index}]", sample)
        for index, sample in enumerate(samples)
    ]


def _check_labels(labels: Sequence[Ints], samples: list[np.ndarray]) -> list[np.ndarray]:
    checked = _check_samples("labels", labels)
    if len(checked) != len(samples):
        raise ValueError(
            f"labels must have one sequence per sample of input_ids, {len(samples)}, "
            f"but has {len(checked)}"
        )
    for index, (sample, label) in enumerate(zip(samples, checked, strict=True)):
        if label.size != sample.size:
            raise ValueError(
                f"labels[{index}] must be as long as input_ids[{index}], {sample.size}, "
                f"but has {label.size}"
            )
    return checked


def _joined(samples: list[np.ndarray]) -> np.ndarray:
    """Copy the samples into one array."""
    return np.concatenate(samples) if samples else np.empty(0, np.int64)
