"""Images of one shape share passes of the encoder, and each keeps its own features."""

from __future__ import annotations

import torch

from tokenflex.models.vision import EncodedImages
from tokenflex.serving.passes import encode_in_passes

SIZES = ((2, 4), (1, 8), (1, 4), (3, 4), (2, 8), (1, 4))  # tiles and width of images


def images() -> list[torch.Tensor]:
    return [torch.full((tiles, 3, 4, width), float(i)) for i, (tiles, width) in enumerate(SIZES)]


def encoded(most_tiles) -> tuple[list[EncodedImages], list[list[int]]]:
    passes = []

    def encode(pixels, batch):
        passes.append(batch)
        return EncodedImages(pixels[:, 0, 0, :1], ((1, 1),) * len(pixels))

    return encode_in_passes(images(), encode, most_tiles), passes


def test_a_pass_has_images_of_one_shape_and_at_most_its_tiles():
    assert encoded(lambda _: 100)[1] == [[0, 2, 3, 5], [1, 4]]
    assert encoded(lambda _: 3)[1] == [[0, 2], [3], [5], [1, 4]]
    assert encoded(lambda pixels: 100 if pixels.shape[-1] == 4 else 1)[1] == [
        [0, 2, 3, 5],
        [1],
        [4],  # more tiles than a pass may have
    ]


def test_each_image_gets_its_own_features():
    features, _ = encoded(lambda _: 3)
    for i, (own, (tiles, _)) in enumerate(zip(features, SIZES, strict=True)):
        assert own.features.tolist() == [[float(i)]] * tiles
        assert own.nbytes == 4 * tiles  # not a view of the pass


def test_no_images_need_no_pass():
    assert encode_in_passes([], lambda *_: None, lambda _: 1) == []
