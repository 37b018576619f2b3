"""The interface between the training loop and a model of any kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from tokenflex.counts import TokenCount, TokenCounts, tokens_of
from tokenflex.data.packing import PackingCollator
from tokenflex.models.loading import check_length
from tokenflex.training.adapters import Adapters
from tokenflex.training.config import StageConfig, TrainConfig
from tokenflex.training.flops import Flops
from tokenflex.training.layers import Parts


class ModelKind(ABC):
    """A model of some kind with its processor, as the loop sees it.

    What a step needs of the kind is in the batches that its collator makes, see
    :class:`tokenflex.data.steps.Bin`, and in :attr:`step_module`.

    Attributes:
        config: The configuration of the run.
        model: The model.
        adapters: Its adapters, once :meth:`add_adapters` has put them into it.
    """

    config: TrainConfig
    model: Any
    adapters: Adapters | None = None

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
    @abstractmethod
    def head(self) -> nn.Module | None:
        """The output layer of the language model."""

    def add_adapters(self) -> None:
        """Put the adapters of ``config.peft`` into the model, if there are any.

        Raises:
            ValueError: PEFT is not installed, or a layer that is named does not exist.
        """
        if self.config.peft is not None:
            self.adapters = Adapters(self.model, self.config.peft, self.modules, self.head)

    def learned(self, name: str) -> list[nn.Parameter]:
        """Return the weights that learn in a stage with a learning rate for a module.

        Each is returned once, in the order of the model: the head may share its weight with the
        embedding.
        """
        weights = {weight for module in self.modules[name] for weight in module.parameters()}
        if self.adapters is not None and name in self.adapters.modules:
            weights &= self.adapters.learned
        return [weight for weight in self.model.parameters() if weight in weights]

    def learned_by(self, stage: StageConfig) -> set[nn.Parameter]:
        """Return all weights that learn in a stage."""
        return {weight for name in stage.learning for weight in self.learned(name)}

    def trained_whole(self) -> list[nn.Module]:
        """Return the modules without adapters that learn in a stage."""
        adapted = () if self.adapters is None else self.adapters.modules
        learning = {name for stage in self.config.stages for name in stage.learning}
        names = [name for name in self.modules if name in learning - {*adapted}]
        return [module for name in names for module in self.modules[name]]

    @property
    def step_module(self) -> nn.Module:
        """The module that a step calls.

        It takes the ``model_inputs()`` of a batch, ``targets`` and ``target_weights``, and returns
        an object whose ``loss`` is the weighted sum of the losses of all targets.
        """
        module: nn.Module = self.model
        return module

    @property
    def patch_grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches of a tile; None if they differ or are not known."""
        return None

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


def drawn_counts(config: TrainConfig) -> set[Any]:
    """Return the counts that the stages of a run draw."""
    return {count for stage in config.stages for count in stage.drawn_counts}


def check_positions(config: TrainConfig, model: Any) -> None:
    """Raise ValueError for a count that exceeds the positions of a model's language model."""
    counts = [count for stage in config.stages for count in stage.counts]
    counts += () if config.evaluation is None else config.evaluation.counts
    check_length(model.config, max(map(tokens_of, counts)))
