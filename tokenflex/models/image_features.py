"""Images to vision tokens: the encoder, once, and the projector at each tile's own count."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from tokenflex.counts import Grid, ImageTokenCounts, token_grid, token_grids
from tokenflex.models.auto_counts import refuse_auto
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.exporting import UniformTokens, traces_one_count
from tokenflex.models.placeholders import (
    ImageTokens,
    UnprojectedImages,
    check_device,
    in_order,
)
from tokenflex.models.vision import EncodedImages, encode, encode_tiles, takes_patches
from tokenflex.projector import TokenAdaptiveProjector
from tokenflex_kernels import plan_pooling


def build_projector(config: TokenFlexConfig) -> TokenAdaptiveProjector:
    """Return a new projector for a model of this config."""
    return TokenAdaptiveProjector(
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        hidden_width=config.projector_hidden_width,
        num_tokens=config.num_image_tokens,
        pooling=config.pooling,
        eps=config.projector_eps,
        position=config.projector_position,
    )


class ImageFeatures:
    """The image side of :class:`tokenflex.models.modeling.TokenFlexModel`."""

    if TYPE_CHECKING:
        config: TokenFlexConfig
        dtype: torch.dtype
        vision_model: Any
        projector: TokenAdaptiveProjector
        _known_counts: set[Grid]

    def encode_images(
        self, pixel_values: torch.Tensor, grids: Grid | Sequence[Grid] | None = None
    ) -> EncodedImages:
        """Run the encoder, once for any number of counts.

        Args:
            pixel_values: [tiles, 3, height, width]; for a NaFlex encoder (SigLIP 2) [images,
                patches, 3 * patch size^2], as its image processor gives them.
            grids: (height, width) in patches, of all tiles or of each: needed by NaFlex encoders,
                and where tiles are of another shape than the encoder's ``image_size``.

        Returns:
            The patch features of the encoder's last layer, without special tokens or padding.

        Raises:
            TypeError: ``pixel_values`` are not floats.
            ValueError: pixels, grids and encoder do not fit together.
        """
        encoded_images, _ = self._encode(pixel_values, grids)
        return encoded_images

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        num_image_tokens: ImageTokenCounts | None = None,
        grids: Grid | Sequence[Grid] | None = None,
        encoded_images: EncodedImages | None = None,
        image_index: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Project every tile to its own number of vision tokens.

        Args:
            pixel_values: as :meth:`encode_images` takes them.
            num_image_tokens: one count for all tiles or one per tile; the config's if None.
            grids: as :meth:`encode_images` takes them.
            encoded_images: the output of :meth:`encode_images`, in place of pixels and grids.
            image_index: as :meth:`TokenFlexForConditionalGeneration.forward` takes it.
            **kwargs: for the encoder, for example ``output_hidden_states``; and ``return_dict``.

        Returns:
            ``last_hidden_state``, patch features [sum of H*W, C], and ``pooler_output``, a list
            with [count, D] vision tokens for each tile, or for each entry of ``image_index``; on
            request ``hidden_states`` and ``attentions`` of the encoder. While ``torch.export``
            traces a call with pixels and one count, ``pooler_output`` is a tensor
            [tiles, count, D], so that the number of tiles may be dynamic.

        Raises:
            ValueError: counts and tiles do not fit together.

        Warns:
            UserWarning: once for a count that the model was not trained with, where the config
                names those it was trained with.
        """
        if (pixel_values is None) == (encoded_images is None):
            raise ValueError("give exactly one of pixel_values and encoded_images")
        outputs = None
        if pixel_values is not None and traces_one_count(num_image_tokens, image_index):
            traced, outputs = self._trace_one_count(pixel_values, num_image_tokens, grids, **kwargs)
            return BaseModelOutputWithPooling(
                pooler_output=traced.per_tile,
                hidden_states=getattr(outputs, "hidden_states", None),
                attentions=getattr(outputs, "attentions", None),
            )
        if encoded_images is None:
            assert pixel_values is not None
            encoded_images, outputs = self._encode(pixel_values, grids, **kwargs)
        else:
            for name, value in {"grids": grids, **kwargs}.items():
                if value is not None and value is not False:
                    raise ValueError(
                        f"encoded_images come from an encoder that has run: give no {name} with "
                        "them"
                    )
        images = self._unprojected(encoded_images, num_image_tokens).project()
        per_image = list(images.tokens.split(images.counts))
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded_images.features,
            pooler_output=per_image if image_index is None else in_order(per_image, image_index),
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )

    def _image_tokens(
        self,
        pixel_values: torch.Tensor | None,
        num_image_tokens: ImageTokenCounts | None,
        grids: Grid | Sequence[Grid] | None,
        encoded_images: EncodedImages | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        image_index: Sequence[int] | None,
        project: bool,
    ) -> ImageTokens | UnprojectedImages | None:
        """Return the vision tokens of a call's images as they are shown, None without images.

        With ``project=False`` they may be left to be computed as they are packed.
        """
        images = self._images(
            pixel_values, num_image_tokens, grids, encoded_images, mm_encoder_outputs
        )
        if isinstance(images, UnprojectedImages):
            if not project and image_index is None:
                return images
            images = images.project()
        if image_index is None:
            return images
        if images is None:
            raise ValueError("image_index tells where images are shown: give the images with it")
        return images.shown(image_index)

    def _images(
        self,
        pixel_values: torch.Tensor | None,
        num_image_tokens: ImageTokenCounts | None,
        grids: Grid | Sequence[Grid] | None,
        encoded_images: EncodedImages | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
    ) -> ImageTokens | UnprojectedImages | None:
        outputs = (mm_encoder_outputs or {}).get("image")
        sources = [outputs, pixel_values, encoded_images]
        if sum(source is not None for source in sources) > 1:
            raise ValueError(
                "give the images as one of pixel_values, encoded_images and mm_encoder_outputs"
            )
        if outputs is not None:
            return ImageTokens.from_outputs(outputs, self.config.text_config.hidden_size)
        if pixel_values is not None:
            encoded_images, _ = self._encode(pixel_values, grids)
        elif encoded_images is None:
            return None
        elif grids is not None:
            raise ValueError("encoded_images hold their grids: give no grids with them")
        return self._unprojected(encoded_images, num_image_tokens)

    def _encode(
        self, pixel_values: torch.Tensor, grids: Grid | Sequence[Grid] | None, **options: Any
    ) -> tuple[EncodedImages, Any]:
        check_device("pixel_values", pixel_values, self.vision_model)
        if pixel_values.is_floating_point():
            pixel_values = pixel_values.to(self.dtype)
        return encode(self.vision_model, self.config.vision_config, pixel_values, grids, **options)

    def _trace_one_count(
        self,
        pixel_values: torch.Tensor,
        num_image_tokens: ImageTokenCounts | None,
        grids: Grid | Sequence[Grid] | None,
        **options: Any,
    ) -> tuple[UniformTokens, Any]:
        """Return the vision tokens of tiles of one grid and one count, and the encoder's output."""
        if takes_patches(self.vision_model):
            name = type(self.vision_model).__name__
            raise ValueError(
                f"torch.export needs an encoder that takes pixels, got {name}, which takes patches "
                "and their shapes as values"
            )
        pixel_values = pixel_values.to(self.dtype)
        per_tile = None if grids is None else [token_grid(grids, name="grids")]
        features, grid, outputs = encode_tiles(
            self.vision_model, self.config.vision_config, pixel_values, per_tile, options
        )
        dtype = next(self.projector.parameters()).dtype
        if dtype != torch.float32:
            features = features.to(dtype)
        return UniformTokens(self.projector(features, num_image_tokens, grid)), outputs

    def _unprojected(
        self, encoded_images: EncodedImages, num_image_tokens: ImageTokenCounts | None
    ) -> UnprojectedImages:
        refuse_auto(num_image_tokens)
        counts = self.projector.num_tokens if num_image_tokens is None else num_image_tokens
        out_grids = token_grids(counts, len(encoded_images), name="num_image_tokens")
        self._warn_of_unknown(out_grids)
        # Without images too: in distributed training every rank must run the same modules.
        features, dtype = encoded_images.features, next(self.projector.parameters()).dtype
        if dtype != torch.float32:  # float32 weights serve any features, others their own type
            features = features.to(dtype)
        pooling = plan_pooling(encoded_images.grids, out_grids)
        per_image = [height * width for height, width in out_grids]
        return UnprojectedImages(self.projector, features, pooling, per_image)

    def _warn_of_unknown(self, grids: list[Grid]) -> None:
        if not self._known_counts or self._known_counts.issuperset(grids):
            return
        unknown = sorted(set(grids) - self._known_counts)
        self._known_counts.update(unknown)  # warn once
        names = ", ".join(str(h * w) if h == w else f"{h} x {w}" for h, w in unknown)
        warnings.warn(
            f"num_image_tokens asks for {names} vision tokens, but the model was "
            f"trained with {self.config.trained_num_image_tokens}: answers may be worse",
            stacklevel=2,
        )
