"""Images to encoder inputs: read, cut into tiles, processed, and what they cost beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers import ProcessorMixin
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import MultiModalData

from tokenflex.counts import Grid, ImageTokenCounts, TokenCount, token_grids, tokens_of_images
from tokenflex.images import load_image
from tokenflex.models.call_options import sort_options
from tokenflex.models.image_inputs import name_images, read_images
from tokenflex.models.tiling import best_tile_grid, check_tile_limits, cut_tiles, num_tiles


class ImagePreparation(ProcessorMixin):
    """The part of the processor that prepares images."""

    if TYPE_CHECKING:
        num_image_tokens: TokenCount
        max_tiles: int
        min_tiles: int
        use_thumbnail: bool
        patch_size: int | None

    def process_images(
        self,
        images: Sequence[Any],
        max_tiles: int | Sequence[int | None] | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], list[int]]:
        """Return the encoder's inputs, and the number of tiles that each image became.

        Args:
            images: as :func:`tokenflex.images.load_image` takes them.
            max_tiles: in place of the processor's own; a list has one for each image, None for the
                processor's own.
            **options: for the image processor; ``return_tensors`` is "pt" by default.

        Returns:
            A dict with ``pixel_values`` and, where the encoder needs it, ``grids``; and a list
            with the tiles of each image.
        """
        data_format = options.pop("data_format", None)
        if data_format not in (None, "channels_first"):
            raise ValueError(
                f"data_format must be 'channels_first', as encoders take it, got {data_format!r}"
            )
        named, _ = name_images(list(images))
        limits = self._tile_limits(max_tiles, len(named))
        inputs = read_images(named, self.image_processor, options)
        options.pop("input_data_format", None)
        tiles = [1] * len(inputs)
        if any(limit > 1 for limit in limits):
            cut = [
                self._cut(image, limit, options)
                for image, limit in zip(inputs, limits, strict=True)
            ]
            tiles = [len(tiles_of_image) for tiles_of_image in cut]
            inputs = [tile for tiles_of_image in cut for tile in tiles_of_image]
            if any(isinstance(tile, np.ndarray) for tile in inputs):
                # They have their size; resizing may accept floats of 0..1 alone, and bicubic
                # filters overshoot at edges.
                options["do_resize"] = False
        if self._have_size(inputs, options):
            options["do_resize"] = False  # resizing would copy them
        processed = self.image_processor(inputs, **{"return_tensors": "pt", **options})
        pixel_values = processed["pixel_values"]
        if "spatial_shapes" in processed:  # NaFlex: patches of images of any shape
            shapes = processed["spatial_shapes"]
            grids: list[Grid] | None = [(int(height), int(width)) for height, width in shapes]
        else:
            sizes = [(int(np.shape(p)[-2]), int(np.shape(p)[-1])) for p in pixel_values]
            grids = self._patch_grids(sizes)
        data = {"pixel_values": pixel_values}
        return (data if grids is None else {**data, "grids": grids}), tiles

    def _have_size(self, images: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Return whether all images are 8-bit ones of the size that they would be resized to."""
        if not getattr(self.image_processor, "do_resize", False):
            return False
        size = self._configured_size(options, ("size",))
        return size is not None and all(
            isinstance(image, Image.Image) and image.size == size[::-1] for image in images
        )

    def _cut(self, image: Any, max_tiles: int, options: Mapping[str, Any]) -> list[Any]:
        tile_size = self._tile_size(options)
        size = image.shape[-2:] if isinstance(image, np.ndarray) else image.size[::-1]
        resample = options.get("resample")
        if resample is None:
            resample = getattr(self.image_processor, "resample", None)
        return cut_tiles(
            image,
            tile_size,
            self._tile_grid(size, max_tiles, tile_size),
            use_thumbnail=self.use_thumbnail,
            resample=int(PILImageResampling.BICUBIC if resample is None else resample),
        )

    def _patch_grids(self, sizes: list[Grid]) -> list[Grid] | None:
        """Return each tile's grid in patches, or None where the model can tell it from the pixels.

        It can where tiles are square, and of the size that the image processor gives by default.
        """
        not_square = [size for size in sizes if size[0] != size[1]]
        if self.patch_size is None:
            if not_square:
                raise ValueError(
                    "patch_size must be given to a processor whose tiles are not square, got None "
                    f"and tiles of {not_square[0][0]} x {not_square[0][1]}"
                )
            return None
        usual = self._configured_size({})
        if not not_square and (usual is None or set(sizes) <= {usual}):
            return None
        return [(height // self.patch_size, width // self.patch_size) for height, width in sizes]

    def image_tokens(
        self,
        images: Sequence[Any],
        num_image_tokens: ImageTokenCounts | None = None,
        max_tiles: int | Sequence[int | None] | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the number of vision tokens of each image, all its tiles together.

        Args:
            images: images, or their (height, width) in pixels.
            num_image_tokens: as the processor is called with it.
            max_tiles: as :meth:`process_images` takes it.
            **options: for the image processor, for example ``size``.
        """
        grids = self._count_grids(num_image_tokens, len(images))
        tiles = self._num_tiles(images, max_tiles, options)
        return tokens_of_images(tiles, grids)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Grid] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return the tokens and tiles of images of these sizes, as servers ask for them.

        Args:
            image_sizes: (height, width) in pixels.
            **kwargs: options that the processor will be called with.
        """
        options = sort_options(self, kwargs)
        counts = options.num_image_tokens
        if isinstance(counts, str):
            raise ValueError(
                f"num_image_tokens must be counts where tokens are counted before images are seen, "
                f"got {counts!r}"
            )
        if image_sizes is None:
            return MultiModalData()
        max_tiles, images_kwargs = options.max_tiles, options.images_kwargs
        return MultiModalData(
            num_image_tokens=self.image_tokens(image_sizes, counts, max_tiles, **images_kwargs),
            num_image_patches=self._num_tiles(image_sizes, max_tiles, images_kwargs),
        )

    def _count_grids(self, counts: ImageTokenCounts | None, images: int) -> list[Grid]:
        counts = self.num_image_tokens if counts is None else counts
        return token_grids(counts, images, name="num_image_tokens")

    def tile_grid(self, image_size: Grid, max_tiles: int | None = None) -> Grid:
        """Return the (rows, columns) of tiles that an image of (height, width) pixels is cut into.

        Args:
            image_size: (height, width) in pixels.
            max_tiles: as the processor is called with it.
        """
        limit = self._max_tiles(max_tiles)
        return (1, 1) if limit == 1 else self._tile_grid(image_size, limit, self._tile_size({}))

    def _max_tiles(self, max_tiles: int | None) -> int:
        # A call may go below the processor's own minimum.
        return self.max_tiles if max_tiles is None else check_tile_limits(1, max_tiles)[1]

    def _tile_limits(
        self, max_tiles: int | Sequence[int | None] | None, num_images: int
    ) -> list[int]:
        """Return the most tiles of each image.

        Raises:
            TypeError, ValueError: a limit is none, or a list has not one for each image.
        """
        if max_tiles is None or not isinstance(max_tiles, (list, tuple)):
            return [self._max_tiles(max_tiles)] * num_images  # type: ignore[arg-type]
        if len(max_tiles) != num_images:
            raise ValueError(
                f"max_tiles must have one entry for each of {num_images} images, got "
                f"{len(max_tiles)}"
            )
        return [self._max_tiles(limit) for limit in max_tiles]

    def _num_tiles(
        self,
        images: Sequence[Any],
        max_tiles: int | Sequence[int | None] | None,
        options: Mapping[str, Any],
    ) -> list[int]:
        limits = self._tile_limits(max_tiles, len(images))
        if all(limit == 1 for limit in limits):
            return [1] * len(images)
        tile_size = self._tile_size(options)
        tiles = []
        for i, (image, limit) in enumerate(zip(images, limits, strict=True)):
            if limit == 1:
                tiles.append(1)
                continue
            is_size = isinstance(image, (tuple, list))
            size = image if is_size else load_image(image, f"images[{i}]").size[::-1]
            tiles.append(num_tiles(self._tile_grid(size, limit, tile_size), self.use_thumbnail))
        return tiles

    def _tile_grid(self, size: Sequence[int], max_tiles: int, tile_size: Grid) -> Grid:
        height, width = size
        lowest = min(self.min_tiles, max_tiles)
        return best_tile_grid((int(height), int(width)), tile_size, max_tiles, lowest)

    def _configured_size(
        self, options: Mapping[str, Any], names: Sequence[str] = ("crop_size", "size")
    ) -> Grid | None:
        """Return the (height, width) that the image processor gives, None if it depends on images.

        Args:
            options: those of a call; without a size among them the image processor's own counts.
            names: the sizes to look for; the first one that is configured counts.
        """
        for name in names:
            size = options.get(name)
            size = getattr(self.image_processor, name, None) if size is None else size
            if isinstance(size, int):
                return size, size
            if isinstance(size, (list, tuple)) and len(size) == 2:
                return int(size[0]), int(size[1])
            height, width = dict(size or {}).get("height"), dict(size or {}).get("width")
            if height and width:
                return height, width
        return None

    def _tile_size(self, options: Mapping[str, Any]) -> Grid:
        size = self._configured_size(options)
        if size is None:
            raise ValueError(
                "max_tiles above 1 needs an image_processor with a size of height and width, got "
                f"{type(self.image_processor).__name__} with size "
                f"{getattr(self.image_processor, 'size', None)}"
            )
        return size
