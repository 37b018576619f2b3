"""One pass of the encoder for a picture, whoever asks and however often."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.models.tiny import pixels, tiny_model
from tokenflex.dropin.features import Patches
from tokenflex.models.vision import EncodedImages
from tokenflex.serving.feature_cache import FeatureCache, digest


def double(pixels: torch.Tensor) -> torch.Tensor:
    return pixels * 2


def test_the_same_pixels_are_encoded_once():
    cache = FeatureCache(1 << 20)
    first = cache.features(pixels(2, seed=1), double)
    again = cache.features(pixels(2, seed=1), double)
    assert torch.equal(first, pixels(2, seed=1) * 2)
    assert again is first
    assert (cache.passes, cache.hits, len(cache)) == (1, 1, 1)


@pytest.mark.parametrize(
    "other",
    [
        pixels(1, seed=2),
        pixels(1, seed=1).double(),
        pixels(1, seed=1).flatten(0, 1),
        pixels(1, seed=1).transpose(2, 3),
    ],
    ids=["values", "dtype", "shape", "order"],
)
def test_other_pixels_are_other_pictures(other):
    cache = FeatureCache(1 << 20)
    cache.features(pixels(1, seed=1), double)
    assert torch.equal(cache.features(other, double), other * 2)
    assert (cache.passes, cache.hits) == (2, 0)


def test_patches_of_another_grid_are_another_picture():
    cache = FeatureCache(1 << 20)
    patches = torch.randn(1, 6, 48)
    cache.features(patches, double, grids=[(2, 3)])
    cache.features(patches, double, grids=[(3, 2)])
    cache.features(patches, double, grids=[[3, 2]])
    assert (cache.passes, cache.hits) == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_pixels_of_any_type_and_layout_have_a_digest(dtype):
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    strided = values.transpose(0, 2).contiguous().transpose(0, 2)
    assert digest(values) == digest(strided)
    assert len(digest(values)) == 32
    assert digest(values[:0]) != digest(values)


def test_the_least_recently_used_features_are_dropped():
    size = pixels(1).nbytes
    cache = FeatureCache(2 * size)
    for seed in (1, 2, 1, 3):  # 2 was used longest ago when 3 comes
        cache.features(pixels(1, seed=seed), double)
    assert (cache.passes, cache.hits, len(cache)) == (3, 1, 2)
    cache.features(pixels(1, seed=1), double)
    assert (cache.passes, cache.hits) == (3, 2)
    cache.features(pixels(1, seed=2), double)
    assert (cache.passes, cache.hits) == (4, 2)


def test_what_is_larger_than_the_cache_is_returned_and_not_kept():
    cache = FeatureCache(2 * pixels(1).nbytes)
    cache.features(pixels(1, seed=1), double)
    large = pixels(3, seed=2)
    assert torch.equal(cache.features(large, double), large * 2)
    assert len(cache) == 1  # and nothing was dropped for it


def test_a_view_counts_with_all_that_it_views():
    cache = FeatureCache(2 * pixels(1).nbytes)
    cache.features(pixels(1), lambda values: torch.cat([values] * 8)[:1])
    assert len(cache) == 0


def test_threads_that_need_a_picture_at_once_encode_it_once():
    cache = FeatureCache(1 << 20)
    started, go_on = threading.Event(), threading.Event()

    def slow(values: torch.Tensor) -> torch.Tensor:
        started.set()
        assert go_on.wait(10)
        return values * 2

    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(cache.features, pixels(1), slow)
        assert started.wait(10)
        others = [pool.submit(cache.features, pixels(1), slow) for _ in range(7)]
        different = pool.submit(cache.features, pixels(1, seed=5), double)
        assert different.result(10) is not None  # another picture does not wait
        assert not any(other.done() for other in others)
        go_on.set()
        results = [future.result(10) for future in (first, *others)]
    assert all(result is results[0] for result in results)
    assert (cache.passes, cache.hits) == (2, 7)


def test_a_failed_pass_is_told_to_all_and_tried_again():
    cache = FeatureCache(1 << 20)
    started, go_on = threading.Event(), threading.Event()

    def failing(values: torch.Tensor) -> torch.Tensor:
        started.set()
        assert go_on.wait(10)
        raise RuntimeError("no memory")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.features, pixels(1), failing)
        assert started.wait(10)
        second = pool.submit(cache.features, pixels(1), double)
        while not cache.hits:  # the second waits by now
            pass
        go_on.set()
        for future in (first, second):
            with pytest.raises(RuntimeError, match="no memory"):
                future.result(10)
    assert torch.equal(cache.features(pixels(1), double), pixels(1) * 2)
    assert len(cache) == 1


def test_images_of_a_batch_are_encoded_together_and_once_each():
    cache: FeatureCache[torch.Tensor] = FeatureCache(1 << 20)
    images = [pixels(1, seed=seed) for seed in (1, 2, 1, 3)]
    calls = []

    def encode(indices: list[int]) -> list[torch.Tensor]:
        calls.append(indices)
        return [images[i] * 2 for i in indices]

    cache.features(images[1], double)
    features = cache.features_of(images, encode)
    assert calls == [[0, 3]]
    assert all(torch.equal(one, image * 2) for one, image in zip(features, images, strict=True))
    assert (cache.passes, cache.hits) == (3, 2)
    cache.features_of(images, encode)
    assert len(calls) == 1


def test_two_batches_may_wait_for_each_other():
    """Each encodes its own image before it waits for the other's."""
    cache: FeatureCache[torch.Tensor] = FeatureCache(1 << 20)
    first, second = pixels(1, seed=1), pixels(1, seed=2)
    both_started = threading.Barrier(2, timeout=10)

    def ask(images: list[torch.Tensor]) -> list[torch.Tensor]:
        def encode(indices: list[int]) -> list[torch.Tensor]:
            both_started.wait()
            return [images[i] * 2 for i in indices]

        return cache.features_of(images, encode)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(ask, [first])
        while not cache.passes:
            pass
        other = pool.submit(ask, [first, second])
        assert torch.equal(one.result(10)[0], first * 2)
        features = other.result(10)
    assert torch.equal(torch.cat(features), torch.cat([first, second]) * 2)
    assert cache.passes == 2


def test_features_of_a_model_serve_every_count():
    model = tiny_model()
    cache: FeatureCache[EncodedImages] = FeatureCache(1 << 20)
    for count in (4, 9, 16):
        encoded = cache.features(pixels(2), model.encode_images)
        output = model.get_image_features(encoded_images=encoded, num_image_tokens=count)
        assert [len(tokens) for tokens in output.pooler_output] == [count] * 2
    assert (cache.passes, cache.hits, len(cache)) == (1, 2, 1)


def test_features_of_layers_count():
    layers = ((torch.zeros(4, 6), [(2, 2)]),)
    patches = Patches(torch.zeros(4, 5), ((2, 2),), layers)
    for room in (0, 1):
        cache: FeatureCache[EncodedImages] = FeatureCache(4 * (4 * 5 + 4 * 6) - 1 + room)
        cache.features(pixels(1), lambda _: patches)
        assert len(cache) == room


def test_a_cleared_cache_encodes_again():
    cache = FeatureCache(pixels(1).nbytes)
    cache.features(pixels(1), double)
    cache.clear()
    assert len(cache) == 0
    cache.features(pixels(1), double)
    assert cache.passes == 2
    assert len(cache) == 1  # its bytes were given back too


@pytest.mark.parametrize(
    ("max_bytes", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)]
)
def test_a_cache_without_room_is_refused(max_bytes, error):
    with pytest.raises(error, match="max_bytes"):
        FeatureCache(max_bytes)
