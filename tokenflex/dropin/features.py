"""Image features of a converted model: from the image inputs of a family to vision tokens."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.counts import (
    Grid,
    ImageTokenCounts,
    TokenCount,
    is_one_count,
    token_grid,
    token_grids,
)
from tokenflex.dropin.families import VISION_ENCODERS, Deepstack, PatchGrids, vision_encoder
from tokenflex.models.auto_counts import refuse_auto
from tokenflex.models.placeholders import in_order
from tokenflex.models.vision import EncodedImages
from tokenflex_kernels import pool_norm

_ENCODER_OPTIONS = ("output_hidden_states", "output_attentions")
_ENCODER_FIELDS = ("last_hidden_state", "hidden_states", "attentions")


@dataclass
class ImageOutputs(BaseModelOutputWithPooling):
    """The outputs of ``get_image_features`` of a converted model.

    Attributes:
        pooler_output: The vision tokens, a list with one [N, D] per input of the vision encoder.
        last_hidden_state: Of the vision encoder, as the stock model returns it.
        hidden_states: Likewise, where the stock model returns them.
        attentions: Likewise.
        deepstack_features: Feature maps for the first layers of the language model, or None.
        visual_indicator_features: Embeddings of Ovis2's tokens around images, or None.
        router_logits: None: Granite Docling's choice between two counts is not made.
    """

    deepstack_features: Any = None
    visual_indicator_features: Any = None
    router_logits: Any = None


@dataclass
class CheckedOutputs(ImageOutputs):
    """Outputs whose counts fit the whole prompt, so that a chunk of it need not be checked."""


def tokens_per_image(outputs: Any) -> list[torch.Tensor] | None:
    """Return the list of vision tokens in ``outputs``; None without images or a list."""
    tokens = getattr(outputs, "pooler_output", None)
    return list(tokens) if isinstance(tokens, (list, tuple)) else None


def with_tokens(outputs: Any, tokens: Any, kind: Any = ImageOutputs) -> Any:
    """Return new outputs with other vision tokens, and the deepstack features of ``outputs``."""
    layers = getattr(outputs, "deepstack_features", None)
    return kind(pooler_output=tokens, deepstack_features=layers)


@functools.cache
def image_input_names(stock: Any) -> list[str]:
    """Return the names of the arguments of a stock base class's ``get_image_features``."""
    parameters = inspect.signature(stock.get_image_features).parameters
    return [name for name in parameters if name not in ("self", "kwargs")]


def default_count(config: Any) -> TokenCount:
    """Return the count that a converted model uses where a call gives none."""
    count = config.tokenflex["num_image_tokens"]
    return tuple(count) if isinstance(count, list) else count  # JSON has no tuples


def fitted_counts(count: TokenCount) -> list[TokenCount]:
    """Return a count, a quarter and a ninth of it, as far as its sides divide; rising.

    A projector is fitted at these by default.
    """
    height, width = token_grid(count)
    divisors = [d for d in (3, 2, 1) if not height % d and not width % d]
    grids = [(height // d, width // d) for d in divisors]
    return [h * w if h == w else (h, w) for h, w in grids]


def flat_grids(patches: PatchGrids | Deepstack, merge: int = 1) -> tuple[torch.Tensor, list[Grid]]:
    """Flatten patch grids to [sum of H*W / m**2, m * m * C], and (H / m, W / m) per image.

    m is ``merge``: m x m patches are concatenated to one.
    """
    if isinstance(patches, Deepstack):
        patches = patches.grids
    if isinstance(patches, torch.Tensor):
        patches = merge_patches(patches, merge)
        images, height, width, channels = patches.shape
        return patches.reshape(-1, channels), [(height, width)] * images
    grids = [merge_patches(grid, merge) for grid in patches]
    rows = torch.cat([grid.flatten(0, 1) for grid in grids])
    return rows, [(grid.shape[0], grid.shape[1]) for grid in grids]


def merge_patches(grid: torch.Tensor, merge: int) -> torch.Tensor:
    """Concatenate m x m patches to one: [.., H, W, C] -> [.., H / m, W / m, m * m * C]."""
    if merge == 1:
        return grid
    height, width = grid.shape[-3:-1]
    if height % merge or width % merge:
        raise ValueError(
            f"patch_merge={merge} must divide every patch grid, got one of {height} x {width}"
        )
    cells = grid.unflatten(-2, (-1, merge)).unflatten(-4, (-1, merge))
    return cells.transpose(-4, -3).flatten(-3)


@dataclass(frozen=True)
class Patches(EncodedImages):
    """Encoded images of a converted model, before its projector.

    Attributes:
        layers: For each language-model layer with features of its own, those features [sum of h*w,
            D] and their (h, w) per image.
    """

    layers: tuple[tuple[torch.Tensor, list[Grid]], ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Patches]) -> Patches:  # type: ignore[override]
        """Return the images of all parts, one part after another."""
        layers = [
            (torch.cat([maps for maps, _ in layer]), [grid for _, grids in layer for grid in grids])
            for layer in zip(*(part.layers for part in parts), strict=True)
        ]
        images = EncodedImages.joined(parts)
        return cls(images.features, images.grids, tuple(layers))

    @property
    def nbytes(self) -> int:
        """Bytes that the features hold, those of layers included."""
        return super().nbytes + sum(maps.untyped_storage().nbytes() for maps, _ in self.layers)

    def to(self, *args: Any, **kwargs: Any) -> Patches:
        """Return a copy with all features moved as ``torch.Tensor.to`` does."""
        layers = tuple((maps.to(*args, **kwargs), grids) for maps, grids in self.layers)
        return Patches(self.features.to(*args, **kwargs), self.grids, layers)

    def select(self, images: Sequence[int]) -> Patches:
        """Return the images at these indices, in this order; an index may be repeated."""
        chosen = super().select(images)
        layers = (EncodedImages(maps, tuple(grids)).select(images) for maps, grids in self.layers)
        return Patches(
            chosen.features,
            chosen.grids,
            tuple((layer.features, [*layer.grids]) for layer in layers),
        )


def encode_patches(base: Any, image_inputs: dict[str, Any]) -> Patches:
    """Run the vision encoder of a converted base model, for any number of counts."""
    patches = type(base)._tokenflex_family.patch_grids(base, **image_inputs)
    rows, grids = flat_grids(patches, base.config.tokenflex["patch_merge"])
    layers = patches.layers if isinstance(patches, Deepstack) else []
    return Patches(rows, tuple(grids), tuple(flat_grids(maps) for maps in layers))


def project_patches(base: Any, patches: Patches, counts: ImageTokenCounts | None) -> ImageOutputs:
    """Project the images of a converted base model, each to its own count."""
    refuse_auto(counts)
    family, config = type(base)._tokenflex_family, base.config
    counts = default_count(config) if counts is None else counts
    out_grids = token_grids(counts, len(patches), name="num_image_tokens")
    sizes = [height * width for height, width in out_grids]
    # Through __call__, and looked up at each call: PEFT and FSDP wrap the module.
    projector = base.get_submodule(family.projector)
    tokens = projector(patches.features, out_grids, grids=list(patches.grids))
    layers = [list(pool_norm(*maps, out_grids).split(sizes)) for maps in patches.layers]
    return ImageOutputs(pooler_output=list(tokens.split(sizes)), deepstack_features=layers or None)


def project_shown(
    base: Any,
    patches: Patches,
    counts: ImageTokenCounts | None,
    image_index: Sequence[int] | torch.Tensor | None,
) -> tuple[ImageOutputs, ImageTokenCounts | None]:
    """Project images, and bring them and their counts into the order in which prompts show them.

    Args:
        base: A converted base model.
        patches: The images.
        counts: One count for all images, or one per image.
        image_index: The image that each run of placeholders shows; None for each once, in order.

    Returns:
        The outputs, and one count for all or for each image shown.
    """
    outputs = project_patches(base, patches, counts)
    if image_index is None:
        return outputs, counts
    layers = outputs.deepstack_features
    shown = ImageOutputs(
        pooler_output=in_order(outputs.pooler_output, image_index),
        deepstack_features=layers and [in_order(layer, image_index) for layer in layers],
    )
    if counts is None or is_one_count(counts):
        return shown, counts
    grids = token_grids(counts, len(patches), name="num_image_tokens")
    return shown, in_order(grids, image_index)


def image_features(
    base: Any,
    image_inputs: dict[str, Any],
    counts: ImageTokenCounts | None,
    options: dict[str, bool],
) -> ImageOutputs:
    """Encode the image inputs of a converted base model to vision tokens.

    ``options`` may hold ``output_hidden_states`` and ``output_attentions``.
    """
    with recorded_encoder(base, options) as encoder_outputs:
        patches = encode_patches(base, image_inputs)
    outputs = project_patches(base, patches, counts)
    return ImageOutputs(**{**outputs, **encoder_fields(encoder_outputs)})


def encoder_fields(encoder_outputs: SimpleNamespace) -> dict[str, Any]:
    """Return what a vision encoder returned, as fields of :class:`ImageOutputs`."""
    return {name: getattr(encoder_outputs, name, None) for name in _ENCODER_FIELDS}


@contextmanager
def recorded_encoder(base: Any, options: dict[str, bool]) -> Iterator[SimpleNamespace]:
    """Give the vision encoder more options, and yield a namespace that gets its outputs.

    Calls from other threads are not affected: one model may serve several at a time.
    """
    encoder, outputs = vision_encoder(base), SimpleNamespace()
    options = {name: True for name in _ENCODER_OPTIONS if options.get(name)}
    if options and encoder is None:
        raise ValueError(
            f"{', '.join(options)} must be False for {type(base)._tokenflex_family.model_type}: "
            f"its vision encoder is none of {', '.join(VISION_ENCODERS)}"
        )
    if encoder is None or torch.compiler.is_compiling():  # a compiled forward needs tokens alone
        yield outputs
        return
    thread = threading.get_ident()

    def add_options(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, **options}) if threading.get_ident() == thread else None

    def record(_: Any, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and hasattr(output, "items"):
            vars(outputs).update(output.items())

    hooks = [
        encoder.register_forward_pre_hook(add_options, with_kwargs=True),
        encoder.register_forward_hook(record),
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
