"""The kinds of models that the loop can train.

Our own model is :class:`OwnModel`. A converted stock model is
:class:`tokenflex.training.conversions.ConvertedKind`, which needs a newer transformers and is
imported for it alone.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from tokenflex.counts import TokenCount, TokenCounts, tokens_of
from tokenflex.data.packing import PackingCollator
from tokenflex.training.build import (
    build_model,
    build_processor,
    check_dropout,
    empty_model,
    modules_of,
    patch_grid,
)
from tokenflex.training.config import ConvertedModelConfig, StageConfig, TrainConfig
from tokenflex.training.flops import Flops, teacher_flops, tile_cost, training_flops
from tokenflex.training.layers import Parts
from tokenflex.training.model_kind import ModelKind, check_positions, drawn_counts


def load_kind(config: TrainConfig) -> ModelKind:
    """Return the model of a run with its weights, and its processor.

    Raises:
        FileNotFoundError: ``model.start`` does not exist.
        ValueError: A part cannot be loaded, or is not as the configuration says.
    """
    kind: ModelKind = _kind_of(config).load(config)
    kind.add_adapters()
    return kind


def empty_kind(config: TrainConfig) -> ModelKind:
    """Return the model of a run on the meta device, from configurations alone.

    Raises:
        FileNotFoundError: ``model.start`` of a conversion does not exist.
        ValueError: A part is not as the configuration says.
    """
    kind: ModelKind = _kind_of(config).empty(config)
    kind.add_adapters()
    return kind


def _kind_of(config: TrainConfig) -> Any:
    if isinstance(config.model, ConvertedModelConfig):
        from tokenflex.training.conversions import ConvertedKind

        return ConvertedKind
    return OwnModel


class OwnModel(ModelKind):
    """A :class:`tokenflex.TokenFlexForConditionalGeneration` with its processor.

    Args:
        config: The configuration of the run.
        model: The model, which may be on the meta device.
    """

    def __init__(self, config: TrainConfig, model: Any = None) -> None:
        assert not isinstance(config.model, ConvertedModelConfig)
        self.config = config
        self._model_config = config.model
        self.model = model

    @classmethod
    def load(cls, config: TrainConfig) -> OwnModel:
        """Build or load the model and its processor."""
        kind = cls(config)
        kind.model = build_model(kind._model_config, kind.processor, drawn_counts(config))
        check_dropout(kind.model, config)
        check_positions(config, kind.model)
        return kind

    @classmethod
    def empty(cls, config: TrainConfig) -> OwnModel:
        """Build the model on the meta device; its processor only when it is used."""
        kind = cls(config)
        kind.model = empty_model(kind._model_config)
        check_positions(config, kind.model)
        return kind

    @cached_property
    def processor(self) -> Any:
        """The processor."""
        return build_processor(self._model_config, self.config.stage_data)

    @property
    def parts(self) -> Parts:
        """The parts of the model."""
        inner = self.model.model
        return Parts(inner.vision_model, inner.projector, inner.language_model)

    @property
    def modules(self) -> dict[str, list[nn.Module]]:
        """The modules that the names of a stage's ``learning_rate`` stand for."""
        return modules_of(self.model)

    @property
    def head(self) -> nn.Module:
        """The output layer of the language model."""
        head: nn.Module = self.model.lm_head
        return head

    @property
    def patch_grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches of a tile; None if the encoder's pictures have no size."""
        return patch_grid(self.model.config.vision_config)

    def collator(
        self,
        counts: TokenCounts,
        *,
        max_length: int | None = None,
        teacher_count: TokenCount | None = None,
    ) -> PackingCollator:
        """Return the collator of padding-free rows, which share what conversations have alike."""
        return PackingCollator(
            self.processor,
            counts,
            share_prefix=self.model.takes_shared_prefixes,
            max_length=max_length,
            teacher_count=teacher_count,
        )

    def training_flops(self, stage: StageConfig) -> Flops:
        """Return the operations of a forward and backward pass."""
        return training_flops(self.model, stage.learning, self.learned_by(stage))

    def teacher_flops(self, stage: StageConfig) -> Flops | None:
        """Return the operations of a teacher's pass; None without a teacher."""
        return teacher_flops(self.model) if stage.distillation else None

    def tile_cost(self, stage: StageConfig) -> float:
        """Return the cost of encoding a tile, in rows of the language model."""
        teacher = stage.teacher_count
        seen = 0 if teacher is None else tokens_of(teacher)
        return tile_cost(self.model, stage.learning, seen, self.learned_by(stage))
