"""Training of a converted stock model: its modules, its batches, and the loss of a step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoProcessor

from tokenflex.counts import TokenCount, TokenCounts, token_grid
from tokenflex.dropin.families import vision_encoder
from tokenflex.dropin.features import default_count
from tokenflex.dropin.processor import convert_processor
from tokenflex.dropin.replace import conversion_class, from_pretrained
from tokenflex.files import read_json
from tokenflex.hub import local_checkpoint
from tokenflex.models.loading import is_conversion
from tokenflex.packing import enable, vision_cost, why_not
from tokenflex.packing.collator import without_weights
from tokenflex.training.config import ConvertedModelConfig, StageConfig, TrainConfig
from tokenflex.training.converted_data import ConvertedCollator, check_conversations
from tokenflex.training.flops import Flops
from tokenflex.training.layers import Parts
from tokenflex.training.model_kind import ModelKind, check_positions, drawn_counts

_PIXELS = 16 * 16  # of a unit of vision work


@dataclass(frozen=True)
class StepLoss:
    """The output of :class:`ConvertedStep`.

    Attributes:
        loss: The weighted sum of the losses of all targets.
        losses: float32 [targets], the loss of each without its weight, detached.
    """

    loss: torch.Tensor
    losses: torch.Tensor


class ConvertedStep(nn.Module):
    """The forward pass of a converted model with the loss of its targets.

    Args:
        model: The converted model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._keeps_rows = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    def forward(
        self,
        *,
        inputs: dict[str, Any],
        target_rows: torch.Tensor,
        targets: torch.Tensor,
        target_weights: torch.Tensor,
        blank: dict[str, Any] | None = None,
    ) -> StepLoss:
        """Return the loss of a :class:`tokenflex.training.converted_data.ConvertedBatch`."""
        if self._keeps_rows and len(inputs["input_ids"]) == 1:
            logits = self.model(**inputs, logits_to_keep=target_rows).logits[0]
        else:
            logits = self.model(**inputs).logits.flatten(0, 1)[target_rows]
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        loss = (losses * target_weights).sum()
        if blank is not None:
            # Text alone has no gradient in what images pass, not even one of zero.
            images = self.model.base_model.get_image_features(**blank, return_dict=True)
            maps = [image for layer in images.deepstack_features or [] for image in layer]
            loss = loss + 0.0 * sum(image.sum() for image in [*images.pooler_output, *maps])
        return StepLoss(loss, losses.detach())


class ConvertedKind(ModelKind):
    """A converted stock model with its processor.

    Args:
        config: The configuration of the run.
        model: The model, which may be on the meta device.
        processor: Its processor; None to load it when it is used.
    """

    def __init__(self, config: TrainConfig, model: Any, processor: Any = None) -> None:
        self.config = config
        self.model = model
        self._processor = processor
        self._padding_reason = why_not(model)
        if not self._padding_reason:
            try:
                enable(model)
            except ValueError:
                self._padding_reason = (
                    "whether packed samples of its language model see each other is known only by "
                    "comparison"
                )

    @classmethod
    def load(cls, config: TrainConfig) -> ConvertedKind:
        """Load the conversion in float32."""
        folder = _folder_of(config)
        count = _default_count(config)
        try:
            model, processor = from_pretrained(folder, num_image_tokens=count, dtype=torch.float32)
        except Exception as error:  # weights, tokenizers and templates raise their own kinds
            raise _not_loaded(folder, error) from error
        check_positions(config, model)
        check_conversations(processor)
        counts = sorted(drawn_counts(config), key=token_grid)
        model.config.trained_num_image_tokens = counts
        return cls(config, model.eval(), processor)

    @classmethod
    def empty(cls, config: TrainConfig) -> ConvertedKind:
        """Build the model on the meta device; its processor only when it is used."""
        folder = _folder_of(config)
        try:
            stock = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                model = conversion_class(stock)._from_config(stock)
        except Exception as error:
            raise _not_loaded(folder, error) from error
        check_positions(config, model)
        return cls(config, model)

    @property
    def processor(self) -> Any:
        """The processor."""
        if self._processor is None:
            folder = _folder_of(self.config)
            try:
                processor = AutoProcessor.from_pretrained(folder)
            except Exception as error:
                raise _not_loaded(folder, error) from error
            count = _default_count(self.config) or default_count(self.model.config)
            convert_processor(processor, self.model.config, count)
            self._processor = processor
        return self._processor

    @property
    def packs(self) -> bool:
        """True if batches are rows without padding."""
        return not self._padding_reason

    @property
    def parts(self) -> Parts:
        """The parts of the model."""
        base = self.model.base_model
        return Parts(vision_encoder(base) or nn.Module(), self.model.projector, base.get_decoder())

    @property
    def modules(self) -> dict[str, list[nn.Module]]:
        """The modules that the names of a stage's ``learning_rate`` stand for.

        "text" is the language model with its head, and "vision" all that is left beside the
        projector: the encoder and what merges its patches.
        """
        projector, decoder = self.model.projector, self.model.base_model.get_decoder()
        text = [decoder, self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        text = [module for module in dict.fromkeys(text) if module is not None]
        return {
            "vision": [*_outside_of(self.model, {projector, *text})],
            "projector": [projector],
            "text": text,
        }

    @property
    def head(self) -> nn.Module | None:
        """The output layer of the language model."""
        head: nn.Module | None = self.model.get_output_embeddings()
        return head

    @cached_property
    def step_module(self) -> nn.Module:
        """The model with its loss."""
        return ConvertedStep(self.model)

    def collator(
        self,
        counts: TokenCounts,
        *,
        max_length: int | None = None,
        teacher_count: TokenCount | None = None,
    ) -> ConvertedCollator:
        """Return the collator of packed rows, or of padded ones where samples would mix."""
        assert teacher_count is None  # checked by TrainConfig
        return ConvertedCollator(
            self.processor,
            counts,
            base=without_weights(self.model.base_model),
            packs=self.packs,
            max_length=max_length,
        )

    def training_flops(self, stage: StageConfig) -> Flops | None:
        """Return None: families differ in experts, windows and sizes of images."""
        return None

    def teacher_flops(self, stage: StageConfig) -> Flops | None:
        """Return None: there is no teacher."""
        return None

    def tile_cost(self, stage: StageConfig) -> float:
        """Return the cost of an image of the encoder's usual size, in rows of the language model.

        It is an estimate by parameters, see :func:`tokenflex.packing.vision_cost`.
        """
        if vision_encoder(self.model.base_model) is None:
            return 0.0
        learns = {name: float(name in stage.learning) for name in ("vision", "projector", "text")}
        # Of weights with adapters no gradient is computed, and that of the adapters costs little.
        adapted = self.adapters.modules if self.adapters else ()
        whole = {name: 0.0 if name in adapted else share for name, share in learns.items()}
        through_vision = 1 + learns["vision"] + whole["vision"]
        through_text = 1 + max(learns.values()) + whole["text"]
        units = _usual_side(self.model.config.vision_config) ** 2 / _PIXELS
        return units * vision_cost(self.model) * through_vision / through_text

    def notes(self) -> list[str]:
        """Return why rows are padded, if they are."""
        if self.packs:
            return []
        model_type = self.model.config.model_type
        return [f"rows of {model_type} are padded, not packed: {self._padding_reason}"]


def _usual_side(vision_config: Any) -> float:
    """Return the side of the pictures that an encoder was made for, in pixels."""
    size = getattr(vision_config, "image_size", None)
    if isinstance(size, (list, tuple)):
        return math.sqrt(math.prod(size))
    return float(size) if isinstance(size, int) else 448.0


def _outside_of(module: nn.Module, others: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the largest modules within one that hold none of ``others``, and have parameters."""
    for child in module.children():
        if child in others:
            continue
        if others.isdisjoint(child.modules()):
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from _outside_of(child, others)


def _folder_of(config: TrainConfig) -> Any:
    """Return the folder of the conversion; one of the Hub is fetched.

    Raises:
        FileNotFoundError: It does not exist, or cannot be fetched.
        ValueError: It holds something else, or broken files.
    """
    assert isinstance(config.model, ConvertedModelConfig)
    folder = local_checkpoint(config.model.start)
    if not is_conversion(folder):
        raise ValueError(
            "model.start without vision and text must be a conversion made by `tokenflex convert`, "
            f"got {str(config.model.start)!r}"
        )
    for file in sorted(folder.glob("*.json")):
        read_json(file, "checkpoint file")  # transformers ignores a broken optional file
    return folder


def _default_count(config: TrainConfig) -> Any:
    assert isinstance(config.model, ConvertedModelConfig)
    return config.model.num_image_tokens


def _not_loaded(folder: Any, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0]
    return ValueError(f"conversion {folder} cannot be loaded: {type(error).__name__}: {reason}")
