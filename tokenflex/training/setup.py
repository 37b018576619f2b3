"""Set a run up: claim its folder, read its state, open its data, build its model."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils import set_seed

from tokenflex.formats import FRESH_PARTS
from tokenflex.interruption import Interruption
from tokenflex.terminal import progress_bar, working
from tokenflex.training.adapters import check_adapter_folder, check_peft
from tokenflex.training.agreement import from_main
from tokenflex.training.build import (
    build_dataset,
    build_order,
    check_processes,
    check_supply,
)
from tokenflex.training.checkpoint import check_checkpoint_folder
from tokenflex.training.config import EncoderWarmUpConfig, ModelConfig, TrainConfig
from tokenflex.training.data_digests import check_unchanged, digests_of
from tokenflex.training.engine import build_accelerator
from tokenflex.training.evaluations import Evaluator
from tokenflex.training.faults import BrokenSamples
from tokenflex.training.kinds import load_kind
from tokenflex.training.output import (
    ADAPTER,
    BEST,
    BROKEN_SAMPLES,
    EVALUATIONS,
    METRICS,
    RunFolder,
    finished_report,
)
from tokenflex.training.records import MetricsFile, StageRecord
from tokenflex.training.states import RunStates, shared_part
from tokenflex.training.trackers import check_installed


class Setup:
    """Everything that a run needs before its first step. A failure changes nothing in its folder.

    Args:
        config: The configuration.
        fresh: Begin anew even if a state or a finished run exists.
        accept_changed_data: Continue although data files have changed.

    Attributes:
        folder: The output folder, locked.
        states: The saved states.
        finished: The report of a run that was finished before; None if there is something to do.
        resumed: The state to continue from; None for a new run. Only the main process has its
            tensors.
        datasets: The data sets of the stages, by their configurations.
        orders: The order of samples in each data set.
        kind: The model and its processor, as the loop sees them.
        is_sharded: The processes are to hold shards of the model.
        evaluator: Evaluates the model; None if the configuration has no evaluation.

    Raises:
        FolderInUseError, ValueError: See :class:`TrainingRun`.
    """

    def __init__(self, config: TrainConfig, *, fresh: bool, accept_changed_data: bool) -> None:
        check_installed(config.trackers)
        self.config = config
        self.accelerator = build_accelerator(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        set_seed(config.seed)
        check_processes(config, self.accelerator.num_processes)
        self.interruption = Interruption()
        self.folder = RunFolder(config.output, keep_states=config.keep_states)
        self.states = RunStates(config)
        self.metrics = MetricsFile(config.output / METRICS)
        self.evaluations = MetricsFile(config.output / EVALUATIONS)
        self.broken = BrokenSamples(config.output / BROKEN_SAMPLES, config.max_broken_samples)
        self.is_main = self.accelerator.is_main_process
        from_main(self.folder.claim, self.is_main)
        try:
            if config.peft is not None:
                check_peft("peft in the configuration")
                from_main(lambda: check_adapter_folder(config.output / ADAPTER), self.is_main)
            if config.evaluation is not None and config.evaluation.keep_best:
                from_main(lambda: check_checkpoint_folder(config.output / BEST), self.is_main)
            self.finished = (
                None if fresh else from_main(lambda: finished_report(config), self.is_main)
            )
            self.resumed = None
            if not fresh and self.finished is None:
                self.resumed = self._read_state()
            # Data before the model: its errors need not wait, nor those of evaluation for training.
            self._open_data(accept_changed_data)
            self._build_model()
            # Nothing can fail any more: now what lies in the output folder may change.
            self.accelerator.wait_for_everyone()
            if self.finished is None:
                from_main(lambda: self._take_folder(fresh), self.is_main)
            self.evaluator = self._build_evaluator()
        except BaseException:
            self.folder.release(undo=True)
            raise

    def _read_state(self) -> dict[str, Any] | None:
        state = None

        def read() -> dict[str, Any] | None:
            nonlocal state
            state = self.states.read()
            if state is None:
                self.folder.check_configuration(self.states.fingerprint)
            return shared_part(state)

        shared = from_main(read, self.is_main)
        return state if self.is_main else shared

    def _open_data(self, accept_changed_data: bool) -> None:
        config = self.config
        used = config.stage_data

        def check_data() -> None:
            self.states.data = digests_of(used)
            saved = None if self.resumed is None else self.resumed.get("data")
            if saved is not None and not accept_changed_data:
                check_unchanged(saved, self.states.data)

        if self.finished is None:
            from_main(check_data, self.is_main)
        self.datasets = {data: build_dataset(data) for data in used}
        self.orders = {data: build_order(data, self.datasets[data], config.seed) for data in used}
        check_supply(config, self.orders)
        evaluation = config.evaluation
        self.questions = None if evaluation is None else build_dataset(evaluation.data)

    def _build_model(self) -> None:
        config = self.config
        with working("loading the model"):
            self.kind = load_kind(config)
        self.model, self.processor = self.kind.model, self.kind.processor
        self.is_sharded = config.sharding == "full" and self.accelerator.num_processes > 1
        if not self.is_sharded:  # else it goes to the device in shards
            self.model.to(self.accelerator.device)

    def _take_folder(self, fresh: bool) -> None:
        is_resumed = self.resumed is not None
        self.folder.prepare(self.states.fingerprint, resumed=is_resumed, fresh=fresh)
        self.states.put_damaged_aside()

    def _build_evaluator(self) -> Evaluator | None:
        if self.config.evaluation is None or self.questions is None:
            return None
        return Evaluator(
            self.config.evaluation,
            self.questions,
            self.kind,
            self.accelerator,
            self.interruption,
            workers=self.config.workers,
            max_broken_samples=self.config.max_broken_samples,
        )


def warm_up(setup: Setup, settings: EncoderWarmUpConfig) -> dict[str, Any]:
    """Warm the vision encoder up, in place of pretrained weights; return the counts of it."""
    model = setup.config.model
    assert isinstance(model, ModelConfig)  # checked by TrainConfig, as is the next
    assert model.processor is not None
    fresh_parts = FRESH_PARTS[model.processor]
    record, began = StageRecord.begin("encoder warm-up"), time.perf_counter()
    with progress_bar("encoder warm-up", settings.steps, shown=setup.is_main) as bar:

        def on_step(loss: float) -> None:
            record.counts["steps"] += 1
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            setup.interruption.check()

        fresh_parts.warm_up(
            setup.model.model.vision_model,
            setup.processor,
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=setup.config.seed,
            on_step=on_step,
        )
    record.counts["seconds"] = time.perf_counter() - began
    return record.counts
