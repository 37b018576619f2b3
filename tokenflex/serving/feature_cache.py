"""Encoder features kept by their pixels, so that another count of a picture runs no encoder.

The vision encoder does not know how many tokens an image will have, so its features serve every
count. A server that keeps them encodes a picture once, whatever counts its requests ask for.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

import torch

from tokenflex.counts import Grid
from tokenflex.models.vision import EncodedImages
from tokenflex_kernels.checks import check_count

Features = TypeVar("Features", torch.Tensor, EncodedImages)


class FeatureCache(Generic[Features]):
    """The most recently used encoder features, by the pixels they were made of; thread-safe.

    Features are kept as they come, on their device. Pictures that are being encoded are waited
    for: two threads that need the same one at once run one pass.

    Args:
        max_bytes: the most bytes of features to keep, at least 1. Features of more bytes are
            returned and not kept. A tensor that is a view counts with all that it views.

    Attributes:
        passes: images that were encoded so far.
        hits: images that were not, as they were kept or being encoded.

    Raises:
        TypeError: ``max_bytes`` is not an int.
        ValueError: ``max_bytes`` is below 1.

    Example:
        >>> cache = FeatureCache(max_bytes=64 << 20)
        >>> features = cache.features(pixels, encoder)  # runs the encoder
        >>> features = cache.features(pixels, encoder)  # does not
        >>> cache.passes, cache.hits
        (1, 1)
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = check_count("max_bytes", max_bytes)
        self.passes = 0
        self.hits = 0
        self._features: OrderedDict[bytes, Features] = OrderedDict()
        self._bytes = 0
        self._running: dict[bytes, Future[Features]] = {}
        self._lock = Lock()

    def features(
        self,
        pixels: torch.Tensor,
        encode: Callable[[torch.Tensor], Features],
        grids: Sequence[Grid] = (),
    ) -> Features:
        """Return ``encode(pixels)``, from the cache where the same pixels were encoded before.

        The result is shared by all who asked for these pixels and must not be written to.

        Args:
            pixels: [tiles, 3, H, W], all tiles of one image, or the patches that the encoder takes
                in their place.
            encode: called with ``pixels`` at most once. What it raises is raised to every thread
                that waits for it, and the next call encodes again.
            grids: the (height, width) in patches of each tile, where ``pixels`` do not tell it.

        Returns:
            What ``encode`` returned: a tensor or :class:`~tokenflex.models.vision.EncodedImages`.
        """
        return self.features_of([pixels], lambda _: [encode(pixels)], [grids])[0]

    def features_of(
        self,
        images: Sequence[torch.Tensor],
        encode: Callable[[list[int]], list[Features]],
        grids: Sequence[Sequence[Grid]] | None = None,
    ) -> list[Features]:
        """Return the features of several images, encoding together those that are not kept.

        Args:
            images: the pixels of each, as :meth:`features` takes them.
            encode: called at most once, with the indices of images to encode, each another
                picture; returns the features of each.
            grids: of each image, as :meth:`features` takes them.
        """
        per_image = [()] * len(images) if grids is None else grids
        keys = [digest(pixels, own) for pixels, own in zip(images, per_image, strict=True)]
        mine: dict[bytes, int] = {}
        found: dict[bytes, Features | Future[Features]] = {}
        with self._lock:
            for i, key in enumerate(keys):
                if key in self._features:
                    self._features.move_to_end(key)
                    found[key] = self._features[key]
                elif key not in self._running:
                    mine[key] = i
                    self._running[key] = Future()
                if key not in found:
                    found[key] = self._running[key]
            self.passes += len(mine)
            self.hits += len(keys) - len(mine)
        if mine:
            self._encode(mine, encode)
        return [
            value.result() if isinstance(value, Future) else value
            for value in (found[key] for key in keys)
        ]

    def _encode(
        self, missing: dict[bytes, int], encode: Callable[[list[int]], list[Features]]
    ) -> None:
        """Encode what this thread has announced, and tell those who wait for it."""
        try:
            encoded = encode([*missing.values()])
        except BaseException as error:
            with self._lock:
                futures = [self._running.pop(key) for key in missing]
            for future in futures:
                future.set_exception(error)
            raise
        with self._lock:
            futures = [self._running.pop(key) for key in missing]
            for key, features in zip(missing, encoded, strict=True):
                self._keep(key, features)
        for future, features in zip(futures, encoded, strict=True):
            future.set_result(features)

    def _keep(self, key: bytes, features: Features) -> None:
        size = _bytes_held(features)
        if size > self.max_bytes:
            return
        self._features[key] = features
        self._bytes += size
        while self._bytes > self.max_bytes:
            _, oldest = self._features.popitem(last=False)
            self._bytes -= _bytes_held(oldest)

    def __len__(self) -> int:
        """Return the number of pictures whose features are kept."""
        return len(self._features)

    def clear(self) -> None:
        """Forget all features, as after a change of the encoder's weights."""
        with self._lock:
            self._features.clear()
            self._bytes = 0


def digest(pixels: torch.Tensor, grids: Sequence[Grid] = ()) -> bytes:
    """Return 32 bytes that stand for a tensor's dtype, shape and values, and for the grids."""
    values = pixels.detach().cpu().contiguous()
    header = f"{values.dtype} {tuple(values.shape)} {[tuple(grid) for grid in grids]} "
    hashed = hashlib.sha256(header.encode())
    hashed.update(values.flatten().view(torch.uint8).numpy().data)
    return hashed.digest()


def _bytes_held(features: torch.Tensor | EncodedImages) -> int:
    if isinstance(features, EncodedImages):
        return features.nbytes
    return features.untyped_storage().nbytes()
