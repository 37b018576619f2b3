"""From pixels to patch features, whatever the encoder: fixed tiles, other shapes, or NaFlex.

Counts play no part here: images that were encoded once can be pooled to any number of vision
tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tokenflex.counts import Grid, token_grids
from tokenflex_kernels.checks import check_grids

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class EncodedImages:
    """Patch features of images, or of tiles, for any number of vision tokens.

    Attributes:
        features: float [sum of H*W, C], image after image, row-major.
        grids: the (H, W) of each.
    """

    features: torch.Tensor
    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        check_grids("grids", self.grids)
        rows = sum(height * width for height, width in self.grids)
        if self.features.ndim != 2 or len(self.features) != rows:
            raise ValueError(
                f"features must be [{rows}, C] for the {len(self.grids)} grids, got shape "
                f"{tuple(self.features.shape)}"
            )

    def __len__(self) -> int:
        return len(self.grids)

    @classmethod
    def joined(cls, parts: Sequence[EncodedImages]) -> EncodedImages:
        """Return the images of all parts, one part after another."""
        features = torch.cat([part.features for part in parts])
        return cls(features, tuple(grid for part in parts for grid in part.grids))

    @property
    def nbytes(self) -> int:
        """Bytes that the features hold; of a view, all that it views."""
        return self.features.untyped_storage().nbytes()

    def to(self, *args: Any, **kwargs: Any) -> EncodedImages:
        """Return a copy with its features moved as ``torch.Tensor.to`` does."""
        return EncodedImages(self.features.to(*args, **kwargs), self.grids)

    def select(self, images: Sequence[int]) -> EncodedImages:
        """Return the images at these indices, in this order; an index may be repeated."""
        parts = self.features.split([height * width for height, width in self.grids])
        chosen = [parts[image] for image in images]
        features = torch.cat(chosen) if chosen else self.features[:0]
        return EncodedImages(features, tuple(self.grids[image] for image in images))


def on_device(image_inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what ``process_images`` of a processor gave, with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in image_inputs.items()
    }


def takes_patches(vision_model: PreTrainedModel) -> bool:
    """Return whether the encoder takes patches of images of any shape (NaFlex), not pixels."""
    return "spatial_shapes" in _parameters(vision_model)


def encode(
    vision_model: PreTrainedModel,
    config: PretrainedConfig,
    pixel_values: torch.Tensor,
    grids: Grid | Sequence[Grid] | None,
    **options: Any,
) -> tuple[EncodedImages, Any]:
    """Return the encoder's last layer, without special tokens or padding, and its whole output.

    Without images the features are [0, C], yet the encoder runs, on a blank tile: in distributed
    training every process must run the same modules, and each parameter gets its gradient, zero.

    Args:
        vision_model: a transformers vision encoder.
        config: its config.
        pixel_values: as :meth:`ImageFeatures.encode_images` takes them, as are ``grids``.
        **options: further arguments of the encoder, for example ``output_hidden_states``.

    Raises:
        TypeError: pixels are not floats.
        ValueError: pixels, grids and encoder do not fit together, or the encoder does not give a
            row of features per patch.
    """
    if not pixel_values.is_floating_point():
        raise TypeError(f"pixel_values must be normalised floats, got {pixel_values.dtype}")
    images = len(pixel_values)
    per_image = None if grids is None else token_grids(grids, images, name="grids")
    run_encoder = _encode_patches if takes_patches(vision_model) else _encode_pixels
    if not images:
        tile, grid = blank_tile(vision_model, config)
        blank, outputs = run_encoder(vision_model, config, tile.to(pixel_values), grid, options)
        return blank.select([]), outputs
    return run_encoder(vision_model, config, pixel_values, per_image, options)


def blank_tile(
    vision_model: PreTrainedModel, config: PretrainedConfig
) -> tuple[torch.Tensor, list[Grid]]:
    """Return zeros that :func:`encode` takes for one tile, and their grid."""
    channels = getattr(config, "num_channels", 3)
    patch_height, patch_width = _pair(config.patch_size)
    if takes_patches(vision_model):
        return torch.zeros(1, 1, channels * patch_height * patch_width), [(1, 1)]
    size = getattr(config, "image_size", None)
    height, width = (patch_height, patch_width) if size is None else _pair(size)
    grid = height // patch_height, width // patch_width
    return torch.zeros(1, channels, height, width), [grid]


def _encode_pixels(
    vision_model: PreTrainedModel,
    config: PretrainedConfig,
    pixel_values: torch.Tensor,
    grids: list[Grid] | None,
    options: dict[str, Any],
) -> tuple[EncodedImages, Any]:
    features, grid, outputs = encode_tiles(vision_model, config, pixel_values, grids, options)
    return EncodedImages(features.flatten(0, 1), (grid,) * len(pixel_values)), outputs


def encode_tiles(
    vision_model: PreTrainedModel,
    config: PretrainedConfig,
    pixel_values: torch.Tensor,
    grids: Sequence[Grid] | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, Grid, Any]:
    """Return the patch features of tiles of one shape, their patch grid, and the whole output.

    No list here has an entry per tile, unless the caller gives ``grids``: ``torch.export`` traces
    this for any number of tiles.

    Args:
        vision_model: a transformers vision encoder that takes pixels.
        config: its config.
        pixel_values: float [tiles, 3, height, width].
        grids: the (height, width) of each tile in patches, checked; or None.
        options: further arguments of the encoder.

    Returns:
        Features [tiles, H*W, C], (H, W), and the encoder's output.

    Raises:
        ValueError: pixels, grids and encoder do not fit together.
    """
    channels = getattr(config, "num_channels", 3)
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
        raise ValueError(
            f"pixel_values must be [tiles, {channels}, height, width], got shape "
            f"{tuple(pixel_values.shape)}"
        )
    images, _, height, width = pixel_values.shape
    patch_height, patch_width = _pair(config.patch_size)
    grid = height // patch_height, width // patch_width
    size = getattr(config, "image_size", None)
    expected_height, expected_width = (height, width) if size is None else _pair(size)
    resized = (height, width) != (expected_height, expected_width)
    if resized:
        if grids is None:
            raise ValueError(
                f"pixel_values must be {expected_height} x {expected_width} as the encoder's "
                f"image_size, or come with grids, got {height} x {width}"
            )
        if "interpolate_pos_encoding" in _parameters(vision_model):
            options = {"interpolate_pos_encoding": True, **options}
    for i, given in enumerate(grids or []):
        if given != grid:
            raise ValueError(
                f"grids[{i}] must be {grid} for pixel_values of {height} x {width} and patches of "
                f"{patch_height} x {patch_width}, got {given}"
            )
    encoder = type(vision_model).__name__
    try:
        outputs = vision_model(pixel_values=pixel_values, return_dict=True, **options)
    except RuntimeError as error:
        if not resized or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{encoder} of image_size {size} cannot encode pixel_values of {height} x {width}: "
            f"{error}"
        ) from error
    features = outputs.last_hidden_state
    patches = grid[0] * grid[1]
    if features.ndim != 3 or features.shape[0] != images or features.shape[1] < patches:
        raise ValueError(
            f"{encoder} must give last_hidden_state [{images}, at least {patches}, C] for patches "
            f"of {patch_height} x {patch_width}, got shape {tuple(features.shape)}"
        )
    # Class and register tokens, where an encoder has them, come before the patches.
    return features[:, features.shape[1] - patches :], grid, outputs


def _encode_patches(
    vision_model: PreTrainedModel,
    config: PretrainedConfig,
    pixel_values: torch.Tensor,
    grids: list[Grid] | None,
    options: dict[str, Any],
) -> tuple[EncodedImages, Any]:
    patch_height, patch_width = _pair(config.patch_size)
    values = config.num_channels * patch_height * patch_width
    if pixel_values.ndim != 3 or pixel_values.shape[2] != values:
        raise ValueError(
            f"pixel_values must be [images, patches, {values}] for this encoder, got shape "
            f"{tuple(pixel_values.shape)}"
        )
    if grids is None:
        raise ValueError("grids must name each image's (height, width) in patches, got None")
    length = pixel_values.shape[1]
    for i, (height, width) in enumerate(grids):
        if height * width > length:
            raise ValueError(
                f"grids[{i}] = {(height, width)} holds {height * width} patches, but pixel_values "
                f"have {length} per image"
            )
    # Computed from host numbers: nothing is read back from the device.
    patches = torch.tensor([height * width for height, width in grids])
    is_patch = torch.arange(length) < patches[:, None]
    outputs = vision_model(
        pixel_values=pixel_values,
        pixel_attention_mask=is_patch.to(pixel_values.device),
        spatial_shapes=torch.tensor(grids),
        return_dict=True,
        **options,
    )
    features = outputs.last_hidden_state
    rows = is_patch.flatten().nonzero().squeeze(1).to(features.device)
    return EncodedImages(features.flatten(0, 1).index_select(0, rows), tuple(grids)), outputs


def _pair(size: int | Sequence[int]) -> Grid:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _parameters(vision_model: PreTrainedModel) -> Any:
    # Of the class, as libraries replace the forward of an instance.
    return inspect.signature(type(vision_model).forward).parameters
