"""The registry of supported families of vision-language models.

A family is one function, which turns the output of its vision encoder into patch grids, and a few
facts about its projector and its processor. :mod:`tokenflex.dropin.adapters` holds the built-in
families. Everything else in this package is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from tokenflex.counts import token_grid
from tokenflex.dropin.unsupported import reason
from tokenflex_kernels.versions import require

# [images, H, W, C], or one [H, W, C] per image where sizes differ.
PatchGrids: TypeAlias = "torch.Tensor | list[torch.Tensor]"


NO_STOCK_VIDEOS = "its stock processor takes none"
NO_VIDEOS_YET = "not built yet"


@dataclass(frozen=True)
class Deepstack:
    """Patch grids, and further feature maps for the first layers of the language model.

    Attributes:
        grids: The patch grids.
        layers: For each language-model layer, one [h, w, D] map per image in the language model's
            width. Each map is pooled to the token grid of its image.
    """

    grids: PatchGrids
    layers: list[list[torch.Tensor]]


@dataclass(frozen=True)
class Clips:
    """The frames of clips, before the projector.

    Attributes:
        grids: The patch grids of the frames, one clip after another.
        frames: The number of frames of each clip. Where the encoder joins two pictures to one patch
            in time, these are one frame.
    """

    grids: PatchGrids | Deepstack
    frames: list[int]


Adapter: TypeAlias = "Callable[..., PatchGrids | Deepstack]"


@dataclass(frozen=True)
class Family:
    """Description of the models of one ``model_type``.

    Attributes:
        model_type: ``config.model_type`` of the models.
        patch_grids: The decorated function, see :func:`register_family`.
        projector: Attribute of the base model that will hold the new projector.
        stock_projector: Dotted path, from the base model, of the module that the new projector
            replaces; the same as ``projector`` by default.
        stand_in: Called with the base model; returns the module to leave at ``stock_projector``
            where the new projector goes elsewhere (a projector inside the vision encoder).
        merge: Converts the list of one [N, D] per image to the ``pooler_output`` that the base
            model's forward expects: ``list``, or ``torch.cat`` for a flat tensor.
        vision_width: Field of ``vision_config`` that holds C, the width of a patch; or a function
            of the config that returns C.
        patch_merge: m, where the stock projector concatenates m x m patches before it projects
            them: a number, or the field of the config that holds m, (m, m) or 1/m.
        stock_tokens: Called with the base model and the image inputs; returns the stock
            projector's tokens, flat [sum of tokens, D] in row-major order. By default the output of
            the stock projector is recorded, so this is needed only where that has another order.
        tiles: Called with the processor, the output of its image processor and the index of an
            image; returns how many inputs of the vision encoder the image becomes. Needed only
            where several tiles share one run of placeholders; the default is one tile per run.
        more_outputs: Called with the base model; returns further fields that its forward reads from
            the outputs of ``get_image_features``.
        flat_images: Whether the processor takes the images of several prompts as one flat list,
            with one image per prompt.
        no_packing: Reason why samples cannot be packed into one row; empty if they can.
        no_prompt_embeds: Reason why its language model needs more of a prompt than embeddings;
            empty if it does not.
        no_fit: Reason why a new projector cannot imitate the stock one; empty if it can.
        transformers: The oldest release of transformers whose models of this type can be converted,
            for example "5.21"; empty if all can that :mod:`tokenflex.dropin` admits.
        videos: Called as the decorated function, with the inputs of ``get_video_features``; returns
            the frames. Where the encoder takes all clips as one [clips, frames, 3, H, W], it is
            given a list of [frames, 3, H, W]. None if the family takes no videos.
        merge_frames: Converts the list of one [N, D] per frame as ``merge`` does that of images.
        clip_end: Called with the base model; returns learned tokens [M, D] after each clip.
        clip_end_tokens: M.
        frames_are_images: The processor puts frames among the images, and the model sees nothing
            else.
        frames_share_placeholder: Frames have the placeholder of images.
        no_mixture: Reason why a call takes images or videos alone; empty if it takes both.
        no_videos: Reason why it takes no videos, without ``videos`` and ``frames_are_images``.
    """

    model_type: str
    patch_grids: Adapter
    projector: str = "multi_modal_projector"
    stock_projector: str = "multi_modal_projector"
    stand_in: Callable[[nn.Module], nn.Module] | None = None
    merge: Callable[[list[torch.Tensor]], Any] = list
    vision_width: str | Callable[[Any], int] = "hidden_size"
    patch_merge: str | int = 1
    stock_tokens: Callable[..., torch.Tensor] | None = None
    tiles: Callable[[Any, Any, int], int] | None = None
    more_outputs: Callable[[Any], dict[str, Any]] | None = None
    flat_images: bool = False
    no_packing: str = ""
    no_prompt_embeds: str = ""
    no_fit: str = ""
    transformers: str = ""
    videos: Callable[..., Clips] | None = None
    merge_frames: Callable[[list[torch.Tensor]], Any] = list
    clip_end: Callable[[Any], torch.Tensor] | None = None
    clip_end_tokens: int = 0
    frames_are_images: bool = False
    frames_share_placeholder: bool = False
    no_mixture: str = ""
    no_videos: str = NO_STOCK_VIDEOS

    @property
    def takes_videos(self) -> bool:
        """True if a conversion takes videos."""
        return self.videos is not None or self.frames_are_images

    def stock_patch_merge(self, config: Any) -> int:
        """Return m, where the stock projector concatenates m x m patches."""
        if isinstance(self.patch_merge, int):
            return self.patch_merge
        value = config
        for name in self.patch_merge.split("."):
            value = getattr(value, name)
        if isinstance(value, (list, tuple)):
            return int(value[0])
        return value if isinstance(value, int) else round(1 / value)  # a ratio: 0.5 is 2 x 2

    def width(self, config: Any) -> int:
        """Return C, the width of a patch: that of the encoder, times the concatenated layers."""
        if not isinstance(self.vision_width, str):
            return self.vision_width(config)
        layers = feature_layers(config)
        concatenated = len(layers) if isinstance(layers, (list, tuple)) else 1
        return getattr(config.vision_config, self.vision_width) * concatenated

    def videos_refused(self) -> NotImplementedError:
        """Return the error for a call with videos."""
        return NotImplementedError(
            f"{self.model_type} with a token-adaptive projector takes no videos: {self.no_videos}; "
            "give the frames of a video as images"
        )


_FAMILIES: dict[str, Family] = {}


def register_family(*model_types: str, **options: Any) -> Callable[[Adapter], Adapter]:
    """Register a family of models for :func:`tokenflex.replace_projector`.

    The decorated function is called with the base model (``model.base_model``) and, by name, the
    image inputs of its ``get_image_features``. It returns the features of the vision encoder before
    the stock projector: [inputs, H, W, C], or a list with one [H, W, C] for each input of the
    encoder (an image or a tile), in order of appearance.

    A model needs ``base.get_image_features``, whose ``pooler_output`` its forward scatters into the
    placeholders and its ``generate`` computes once before the prompt, as the models of
    transformers >= 5.18 do; and a config with ``image_token_id``, ``vision_config`` and a text
    config.

    Args:
        model_types: ``config.model_type`` of the models. A registered one is replaced.
        **options: Attributes of :class:`tokenflex.dropin.families.Family`: ``projector``,
            ``stock_projector``, ``stand_in``, ``merge``, ``vision_width``, ``patch_merge``,
            ``stock_tokens``, ``tiles``, ``more_outputs``, ``flat_images``, ``no_packing``,
            ``no_prompt_embeds``, ``no_fit``, ``videos``, ``merge_frames``, ``clip_end``,
            ``clip_end_tokens``, ``frames_are_images``, ``frames_share_placeholder``,
            ``no_mixture``, ``no_videos`` and ``transformers``.

    Raises:
        TypeError: There is no model type, one is not a string, or an option is unknown.

    Example:
        >>> @register_family("my_vlm", merge=torch.cat)
        ... def my_vlm(base, pixel_values, **_):
        ...     return square_grids(base.vision_tower(pixel_values).last_hidden_state)
    """
    if not model_types or not all(isinstance(name, str) for name in model_types):
        raise TypeError(f"model_types must be one string or more, got {model_types!r}")
    if options.get("stock_projector") is None:
        options["stock_projector"] = options.get("projector", Family.projector)

    def register(patch_grids: Adapter) -> Adapter:
        for model_type in model_types:
            _FAMILIES[model_type] = Family(model_type, patch_grids, **options)
        return patch_grids

    return register


def supported_families() -> list[str]:
    """Return the model types that :func:`tokenflex.replace_projector` supports."""
    return sorted(_FAMILIES)


def family_of(config: Any) -> Family:
    """Return the family of a model's config.

    Raises:
        ValueError: Its ``model_type`` is not supported; the message lists those that are.
        ImportError: The installed transformers is older than the family needs.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model must be of a supported family, got model_type {model_type!r} "
            f"({reason(str(model_type))}); supported are {', '.join(supported_families())} "
            "(register_family adds one)"
        )
    family = _FAMILIES[model_type]
    if family.transformers:
        require("transformers", family.transformers, f"{model_type} in tokenflex.dropin")
    return family


# ---- building blocks of adapters


MROPE = "its positions of image tokens have three axes (M-RoPE)"
RECURRENT = "its linear attention carries its state across the boundaries of samples"

# One per model.
VISION_ENCODERS = ("vision_tower", "vision_model", "vision_encoder", "visual", "image_tower")


def vision_encoder(base: Any) -> Any:
    """Return the vision encoder of a base model; None if it has another name."""
    return next((getattr(base, name) for name in VISION_ENCODERS if hasattr(base, name)), None)


def feature_layers(config: Any) -> Any:
    """Return the encoder layer, or layers, whose features the projector takes; None if unnamed."""
    layers = getattr(config, "vision_feature_layer", None)
    return getattr(config, "vision_feature_layers", None) if layers is None else layers


def square_grids(features: torch.Tensor) -> torch.Tensor:
    """Reshape [images, L, C] to [images, n, n, C], where L = n * n.

    Raises:
        ValueError: L is not a perfect square.
    """
    return features.unflatten(1, token_grid(features.shape[1], name="patches of an image"))


def chosen_layers(
    outputs: Any, layers: int | Sequence[int], *, drop_class_token: bool
) -> torch.Tensor:
    """Return the hidden states of one layer, or of several concatenated: [images, L, C]."""
    first = 1 if drop_class_token else 0
    chosen = [layers] if isinstance(layers, int) else layers
    return torch.cat([outputs.hidden_states[layer][:, first:] for layer in chosen], dim=-1)


def split_grids(rows: torch.Tensor, grids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Split flat [sum of H*W, C] into one [H, W, C] per image."""
    pieces = rows.split([height * width for height, width in grids])
    return [piece.unflatten(0, tuple(grid)) for piece, grid in zip(pieces, grids, strict=True)]
