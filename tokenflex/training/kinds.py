"""The kinds of models that the loop can train, and what it needs to know of each.

Our own model is :class:`OwnModel`. A converted stock model is
:class:`tokenflex.training.conversions.ConvertedKind`, which needs a newer transformers and is
imported for it alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

from torch import nn

from tokenflex.counts import TokenCount, TokenCounts, tokens_of
from tokenflex.data.packing import PackingCollator
from tokenflex.models.loading import check_length
from tokenflex.training.build import (
    build_model,
    build_processor,
    check_dropout,
    empty_model,
    modules_of,
)
from tokenflex.training.config import ConvertedModelConfig, StageConfig, TrainConfig
from tokenflex.training.flops import Flops, teacher_flops, tile_cost, training_flops
from tokenflex.training.layers import Parts


class ModelKind(ABC):
    """A model of some kind with its processor, as the loop sees it.

    What a step needs of the kind is in the batches that its collator makes, see
    :class:`tokenflex.data.steps.Bin`, and in :attr:`step_module`.

    Attributes:
        config: The configuration of the run.
        model: The model.
    """

    config: TrainConfig
    model: Any

    @property
    @abstractmethod
    def processor(self) -> Any:
        """The processor."""

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """The parts of the model."""

    @property
    @abstractmethod
    def modules(self) -> dict[str, list[nn.Module]]:
        """The modules that the names of a stage's ``learning_rate`` stand for."""

    @property
    def step_module(self) -> nn.Module:
        """A module whose forward takes a batch's ``model_inputs()``, ``targets`` and
        ``target_weights``, and returns an object with the weighted sum of losses as ``loss``."""
        module: nn.Module = self.model
        return module

    @abstractmethod
    def collator(
        self,
        counts: TokenCounts,
        *,
        max_length: int | None = None,
        teacher_count: TokenCount | None = None,
    ) -> PackingCollator:
        """Return what encodes samples and makes batches of them.

        See :class:`tokenflex.data.packing.PackingCollator` for the arguments.
        """

    @abstractmethod
    def training_flops(self, stage: StageConfig) -> Flops | None:
        """Return the operations of a forward and backward pass; None if they are not known."""

    @abstractmethod
    def teacher_flops(self, stage: StageConfig) -> Flops | None:
        """Return the operations of a teacher's pass; None without a teacher."""

    @abstractmethod
    def tile_cost(self, stage: StageConfig) -> float:
        """Return the cost of encoding a tile, in rows of the language model."""

    def notes(self) -> list[str]:
        """Return sentences that a user should read before a run."""
        return []


def load_kind(config: TrainConfig) -> ModelKind:
    """Return the model of a run with its weights, and its processor.

    Raises:
        FileNotFoundError: ``model.start`` does not exist.
        ValueError: A part cannot be loaded, or is not as the configuration says.
    """
    return _kind_of(config).load(config)


def empty_kind(config: TrainConfig) -> ModelKind:
    """Return the model of a run on the meta device, from configurations alone.

    Raises:
        FileNotFoundError: ``model.start`` of a conversion does not exist.
        ValueError: A part is not as the configuration says.
    """
    return _kind_of(config).empty(config)


def _kind_of(config: TrainConfig) -> Any:
    if isinstance(config.model, ConvertedModelConfig):
        from tokenflex.training.conversions import ConvertedKind

        return ConvertedKind
    return OwnModel


def drawn_counts(config: TrainConfig) -> set[Any]:
    """Return the counts that the stages of a run draw."""
    return {count for stage in config.stages for count in stage.drawn_counts}


def check_positions(config: TrainConfig, model: Any) -> None:
    """Raise ValueError for a count that exceeds the positions of a model's language model."""
    counts = [count for stage in config.stages for count in stage.counts]
    counts += () if config.evaluation is None else config.evaluation.counts
    check_length(model.config, max(map(tokens_of, counts)))


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
        return training_flops(self.model, stage.learning)

    def teacher_flops(self, stage: StageConfig) -> Flops | None:
        """Return the operations of a teacher's pass; None without a teacher."""
        return teacher_flops(self.model) if stage.distillation else None

    def tile_cost(self, stage: StageConfig) -> float:
        """Return the cost of encoding a tile, in rows of the language model."""
        teacher = stage.teacher_count
        return tile_cost(self.model, stage.learning, 0 if teacher is None else tokens_of(teacher))
