"""Baselines of an evaluation: a fixed number of vision tokens made fewer without any training.

All of them use the model at its largest count, the *full* count, as a model of one fixed count
would be used. With h x w tokens of H x W at the full count, and the picture that the encoder reads,

* ``resized`` shows a picture whose sides have h / H and w / W of the patches, rounded down. The
  encoder interpolates its positions, and as many patches become a token as at the full count;
* ``enlarged`` shows a picture made as small and then as large again as the encoder's own. It costs
  the tokens of the full count: it tells what so little detail answers, by an encoder at its size;
* ``strided`` and ``random`` keep h * w of the H * W tokens, evenly spaced or drawn for each tile;
* ``pooled`` averages the H * W tokens to h x w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tokenflex.counts import Grid, TokenCount, token_grid, tokens_of
from tokenflex.evaluation.counts import AskedCount, label_of, selector_of
from tokenflex.evaluation.pictures import (
    read_pictures,
    resize,
    with_detail_of,
)
from tokenflex.evaluation.statistics import Verdict, accuracy_of, group_by_kind, vision_tokens_of
from tokenflex.models.vision import EncodedImages
from tokenflex_kernels import pool_norm

RESIZED, ENLARGED = "resized", "enlarged"
STRIDED, RANDOM, POOLED = "strided", "random", "pooled"
RESIZING = (RESIZED, ENLARGED)
METHODS = (*RESIZING, STRIDED, RANDOM, POOLED)
OURS = "model"
"""Name of the model's own tokens beside the baselines."""


# ---- Fewer tokens.


def strided_tokens(full: Grid, grid: Grid) -> torch.Tensor:
    """Return the indices of evenly spaced tokens, int64 [h * w], row by row.

    Each token is the one at the centre of its cell, where ``grid`` divides ``full`` in equal cells.

    Args:
        full: The (height, width) to choose from.
        grid: The (height, width) of the choice, no side longer than that of ``full``.

    Raises:
        ValueError: ``grid`` does not fit in ``full``.
    """
    if grid[0] > full[0] or grid[1] > full[1]:
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} evenly spaced tokens does not fit in {full[0]} x "
            f"{full[1]}"
        )
    rows, columns = (
        (2 * torch.arange(side) + 1) * of_full // (2 * side)
        for side, of_full in zip(grid, full, strict=True)
    )
    return (rows[:, None] * full[1] + columns).flatten()


def random_tokens(full: Grid, grid: Grid, key: Sequence[int]) -> torch.Tensor:
    """Return the indices of h * w different tokens in rising order, a pure function of ``key``.

    Args:
        full: The (height, width) to choose from.
        grid: The (height, width) of the choice, of no more tokens than ``full``.
        key: Non-negative numbers, such as a seed and the index of a tile.
    """
    chosen = np.random.default_rng(key).permutation(tokens_of(full))[: tokens_of(grid)]
    return torch.from_numpy(np.sort(chosen))


def pooled_tokens(tokens: torch.Tensor, tiles: int, full: Grid, grid: Grid) -> torch.Tensor:
    """Return averages of the tokens of each cell of a grid, [tiles * h * w, D].

    Args:
        tokens: [tiles * H * W, D].
        tiles: Number of tiles.
        full: The (H, W) of each.
        grid: The (h, w) that each becomes.
    """
    pooled: torch.Tensor = pool_norm(tokens, [full] * tiles, [grid] * tiles)
    return pooled


@contextmanager
def ready_tokens(model: Any) -> Iterator[None]:
    """Let ``model`` take the features of encoded images for their vision tokens as they are."""
    projector = model.projector
    before = vars(projector).get("forward")
    projector.forward = lambda features, *_, **__: features
    try:
        yield
    finally:
        del projector.forward
        if before is not None:
            projector.forward = before


# ---- Less detail.


def smaller_side(side: int, count: int, full: int) -> int:
    """Return the part of a side that ``count`` of ``full`` tokens would be made of, rounded down.

    It is at least 1.
    """
    return max(1, side * count // full)


# ---- The baselines of one evaluation.


def baseline_counts(counts: Sequence[AskedCount]) -> tuple[tuple[TokenCount, ...], TokenCount]:
    """Return the counts below the largest one, and that; selectors are none of them.

    Raises:
        ValueError: There is no count below the largest one.
    """
    fixed: Any = [count for count in counts if selector_of(count) is None]
    full = max(fixed, key=tokens_of, default=1)
    below = tuple(count for count in fixed if tokens_of(count) < tokens_of(full))
    if not below:
        raise ValueError(
            "baselines need a count and a larger one whose tokens become fewer, got counts "
            f"{', '.join(map(label_of, counts))}"
        )
    return below, full


@dataclass(frozen=True)
class BaselineImages:
    """The images of a batch as a baseline shows them.

    Attributes:
        encoded: The tiles.
        grid: (height, width) vision tokens of each tile.
        context: Within which the model answers.
    """

    encoded: EncodedImages
    grid: Grid
    context: AbstractContextManager[None]


@dataclass
class Baselines:
    """The baselines of an evaluation at every count below the full one.

    Attributes:
        model: The model.
        image_processor: Of its processor.
        counts, full: As :func:`baseline_counts` returns them.
        seed: Of ``random``.
        left_out: By method, why it cannot run; by method and count where only some cannot.
    """

    model: Any
    image_processor: Any
    counts: tuple[TokenCount, ...]
    full: TokenCount
    seed: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def full_grid(self) -> Grid:
        """(height, width) vision tokens of a tile at the full count."""
        return token_grid(self.full)

    def __len__(self) -> int:
        """Return the number of runs of each batch."""
        return len(METHODS) * len(self.counts)

    def runs(
        self,
        image_inputs: Mapping[str, Any],
        encoded: EncodedImages,
        tiles: Sequence[tuple[int, int]],
    ) -> Iterator[tuple[str, TokenCount, BaselineImages | None]]:
        """Yield each method at each count, with the images of a batch; None where it cannot run.

        Args:
            image_inputs: Inputs of the encoder, on the model's device.
            encoded: What the model's encoder made of them.
            tiles: The sample of each tile and its number there, by which ``random`` chooses.
        """
        tokens = self.at_full_count(encoded) if len(encoded) else encoded
        for method in METHODS:
            for count in self.counts:
                yield method, count, self.images(method, count, image_inputs, tokens, tiles)

    def images(
        self,
        method: str,
        count: TokenCount,
        image_inputs: Mapping[str, Any],
        tokens: EncodedImages,
        tiles: Sequence[tuple[int, int]],
    ) -> BaselineImages | None:
        """Return the images of a batch as a method shows them; None where it cannot run.

        Args:
            method: One of ``METHODS``.
            count: A count below the full one.
            image_inputs, tiles: As in :meth:`runs`.
            tokens: What :meth:`at_full_count` returns.
        """
        name = f"{method} at {label_of(count)}"
        if method in self.left_out or name in self.left_out:
            return None
        grid, full, number = token_grid(count), self.full_grid, len(tokens)
        if not number:  # a batch without images
            return BaselineImages(tokens, grid, nullcontext())
        if method in RESIZING:
            try:
                return self.resized(method, grid, image_inputs)
            except ValueError as error:
                self.left_out[method] = str(error)
                return None
        if method == POOLED:
            fewer = replace_features(
                tokens, grid, lambda rows: pooled_tokens(rows, number, full, grid)
            )
        else:
            try:
                chosen = [
                    strided_tokens(full, grid)
                    if method == STRIDED
                    else random_tokens(full, grid, (self.seed, *tile))
                    for tile in tiles
                ]
            except ValueError as error:
                self.left_out[name] = str(error)
                return None
            firsts = [first * tokens_of(full) for first in range(number)]
            rows = [of_tile + first for of_tile, first in zip(chosen, firsts, strict=True)]
            index = torch.cat(rows).to(tokens.features.device)
            fewer = replace_features(tokens, grid, lambda rows: rows.index_select(0, index))
        return BaselineImages(fewer, grid, ready_tokens(self.model))

    def resized(self, method: str, grid: Grid, image_inputs: Mapping[str, Any]) -> BaselineImages:
        """Return pictures with the detail of a grid of tokens: ``resized`` or ``enlarged`` ones.

        Raises:
            ValueError: The encoder's inputs cannot be resized.
        """
        patch = None
        if hasattr(self.model, "takes_shared_prefixes"):  # no converted model
            size = self.model.config.vision_config.patch_size
            patch = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        read = read_pictures(image_inputs, self.image_processor, patch)
        if read is None:
            raise ValueError("the encoder's inputs are patches of an order that is not known")
        if method == ENLARGED:
            pictures = [with_detail_of(p, self._smaller(p, grid)) for p in read.pictures]
        elif read.unit is None:
            raise ValueError("the converted encoder takes pictures of its own size only")
        else:
            pictures = [resize(p, self._smaller(p, grid, read.unit)) for p in read.pictures]
        encoded = self.model.encode_images(**read.inputs_of(pictures))
        return BaselineImages(
            encoded, self.full_grid if method == ENLARGED else grid, nullcontext()
        )

    def _smaller(self, picture: torch.Tensor, grid: Grid, unit: Grid = (1, 1)) -> Grid:
        """Return the sides of a picture of as much detail as a grid of tokens has."""
        height, width = (
            of_unit * smaller_side(side // of_unit, count, full)
            for side, of_unit, count, full in zip(
                picture.shape[-2:], unit, grid, self.full_grid, strict=True
            )
        )
        return height, width

    def at_full_count(self, encoded: EncodedImages) -> EncodedImages:
        """Return images whose features are the vision tokens at the full count."""
        projector, grid = self.model.projector, self.full_grid
        grids = [grid] * len(encoded)
        features, dtype = encoded.features, next(projector.parameters()).dtype
        if dtype.is_floating_point and dtype != torch.float32:
            features = features.to(dtype)
        tokens = projector(features, grids, grids=list(encoded.grids))
        fields: dict[str, Any] = {"features": tokens, "grids": tuple(grids)}
        if hasattr(encoded, "layers"):  # of a converted model: features for its first layers
            fields["layers"] = tuple(
                (pool_norm(maps, of_maps, grids), grids) for maps, of_maps in encoded.layers
            )
        return replace(encoded, **fields)


def replace_features(
    encoded: EncodedImages, grid: Grid, change: Callable[[torch.Tensor], torch.Tensor]
) -> EncodedImages:
    """Return images with their features, and those of layers, changed to another grid."""
    grids = [grid] * len(encoded)
    fields: dict[str, Any] = {"features": change(encoded.features), "grids": tuple(grids)}
    if hasattr(encoded, "layers"):
        fields["layers"] = tuple((change(maps), grids) for maps, _ in encoded.layers)
    return replace(encoded, **fields)


# ---- The report.


def baseline_report(
    full: str,
    of_model: Mapping[str, Sequence[Verdict]],
    of_methods: Mapping[str, Mapping[str, Sequence[Verdict]]],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """Return accuracies of the baselines, and of all on questions that resizing cannot answer.

    Those *difficult* questions are, for each count, the ones that the model answers right at the
    full count, and that no resized picture which was shown answers (after VTC-Bench, arXiv
    2510.07143).

    Args:
        full: Label of the full count.
        of_model: Verdicts of the model by count, always about the same questions in one order.
        of_methods: Verdicts by method and count.
        left_out: Reasons by method.

    Returns:
        ``full``; by method and count ``accuracy``, ``standard_error`` and
        ``vision_tokens_per_image``; ``accuracy_by_kind`` by method, kind and count; ``left_out``;
        and ``difficult``: by count ``questions``, ``samples`` and ``questions_by_kind``, and by
        method and count ``accuracy`` (of all questions alike, whatever their kind) and
        ``standard_error``, None without questions, and ``accuracy_by_kind``. The methods are the
        model and those that keep or average tokens.
    """
    # A method may have failed after batches without images.
    complete = {
        method: {k: rows for k, rows in of_labels.items() if len(rows) == len(of_model[full])}
        for method, of_labels in of_methods.items()
        if method not in left_out
    }
    of_methods = {method: of_labels for method, of_labels in complete.items() if of_labels}
    labels = [label for label in of_model if any(label in rows for rows in of_methods.values())]
    # No resized picture answers a difficult question, by definition.
    others = {method: rows for method, rows in of_methods.items() if method not in RESIZING}
    difficult = {
        label: difficult_questions(
            of_model[full],
            [of_methods[m][label] for m in RESIZING if label in of_methods.get(m, {})],
        )
        for label in labels
    }
    groups = {
        label: group_by_kind([of_model[label][i] for i in indices])
        for label, indices in difficult.items()
    }
    return {
        "full": full,
        **_shares(of_methods, labels),
        "vision_tokens_per_image": {
            method: {label: vision_tokens_of(rows).per_image for label, rows in of_labels.items()}
            for method, of_labels in of_methods.items()
        },
        "left_out": dict(left_out),
        "difficult": {
            "questions": {label: len(indices) for label, indices in difficult.items()},
            "samples": {
                label: len({of_model[label][i].sample for i in indices})
                for label, indices in difficult.items()
            },
            "questions_by_kind": {
                label: {kind: len(rows) for kind, rows in of_label.items()}
                for label, of_label in groups.items()
            },
            **_shares({OURS: of_model, **others}, labels, difficult),
        },
    }


def difficult_questions(
    at_full_count: Sequence[Verdict], resized: Sequence[Sequence[Verdict]]
) -> list[int]:
    """Return the indices of questions that are right at the full count and wrong when resized.

    Args:
        at_full_count: Verdicts of the questions.
        resized: Verdicts of the same questions by each way to resize; without any, no question is
            known to be difficult.
    """
    if not resized:
        return []
    return [
        i
        for i, verdict in enumerate(at_full_count)
        if verdict.right and not any(rows[i].right for rows in resized)
    ]


def _shares(
    methods: Mapping[str, Mapping[str, Sequence[Verdict]]],
    labels: Sequence[str],
    subsets: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Return accuracy, its standard error and accuracy by kind, of subsets of the questions."""
    shares: dict[str, Any] = {"accuracy": {}, "standard_error": {}, "accuracy_by_kind": {}}
    for method, of_labels in methods.items():
        for key in shares:
            shares[key][method] = {}
        for label in labels:
            if label not in of_labels:
                continue
            rows = of_labels[label]
            if subsets is not None:
                rows = [rows[i] for i in subsets[label]]
            # A kind may have hardly any question in a subset, and must not count for more.
            counted = rows if subsets is None else [replace(row, kind="") for row in rows]
            accuracy = accuracy_of(counted) if rows else None
            shares["accuracy"][method][label] = accuracy and accuracy.value
            shares["standard_error"][method][label] = accuracy and accuracy.standard_error
            for kind, of_kind in group_by_kind(rows).items():
                by_kind = shares["accuracy_by_kind"][method].setdefault(kind, {})
                by_kind[label] = accuracy_of(of_kind).value
    return shares
