"""The training loop: stages -> steps -> optimise -> log -> save.

Every batch is a pure function of (seed, stage, step), so a run that was killed continues from its
last state with the same numbers.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import torch

from tokenflex.data.steps import PackedStep
from tokenflex.files import write_json
from tokenflex.terminal import progress_bar, say, working
from tokenflex.training.adapters import Adapters
from tokenflex.training.agreement import AgreedStop, from_main, interrupted_anywhere
from tokenflex.training.best import best_record, compared, in_words, is_better, read_best
from tokenflex.training.checkpoint import replace_folder, save_model
from tokenflex.training.config import EvaluationConfig, StageConfig, TrainConfig
from tokenflex.training.engine import StepOutcome, optimize, prepare, stop_without_data
from tokenflex.training.faults import check_finite
from tokenflex.training.layers import adapted_layers
from tokenflex.training.metrics import bar_text, metrics_line
from tokenflex.training.output import ADAPTER, BEST, CHECKPOINT, NON_FINITE, REPORT
from tokenflex.training.records import (
    Meter,
    StageRecord,
    position_of,
    training_report,
)
from tokenflex.training.setup import Setup, warm_up
from tokenflex.training.sharding import model_weights, shard
from tokenflex.training.stages import build_meter, build_optimizer, build_scheduler, load_steps
from tokenflex.training.states import gather_state, restore_state
from tokenflex.training.trackers import log_to_trackers, start_trackers


class TrainingRun:
    """One run of a configuration, in the folder ``config.output``.

    The folder holds ``metrics.jsonl`` (a line every ``log_every`` steps), ``evaluations.jsonl`` (a
    line for every evaluation during training), ``trackers/``, ``state.pt`` and the states before it
    (while the run is not finished), ``non_finite.json`` (the samples of a step whose loss was NaN
    or infinite), ``broken_samples.json`` (the samples that were skipped, with the reason),
    ``config.json``, and at the end ``checkpoint/`` (model and processor), ``adapter/`` (with
    ``peft``, as PEFT saves it) and ``report.json``. With ``keep_best`` it holds ``best/``, a
    checkpoint as well, from the first evaluation on.

    No other run can write into the folder until :meth:`run` has ended.

    Args:
        config: The configuration.
        fresh: Begin anew even if a state or a finished run exists.
        accept_changed_data: Continue although data files are not those that the state was made
            with.

    Raises:
        FolderInUseError: Another run is at work in the output folder.
        ValueError: The output folder holds something other than a run, the state of another
            configuration, or only states that cannot be read; data has changed since the state was
            saved; a stage has fewer samples a step than there are processes; or the package of a
            tracker is not installed.
    """

    def __init__(
        self, config: TrainConfig, *, fresh: bool = False, accept_changed_data: bool = False
    ) -> None:
        self.config = config
        self.setup = setup = Setup(config, fresh=fresh, accept_changed_data=accept_changed_data)
        self.accelerator, self.interruption = setup.accelerator, setup.interruption
        self.model, self.processor = setup.model, setup.processor
        self.evaluator, self.broken, self.is_main = setup.evaluator, setup.broken, setup.is_main
        self.resumed, setup.resumed = setup.resumed, None
        """The state to continue from, until it is restored: it is large."""
        self.records: list[dict[str, Any]] = []
        """Counts of the encoder's warm-up, if there is one, and of each stage that has begun."""
        self.best: dict[str, Any] | None = None
        """The best evaluation so far, with ``keep_best``."""
        self.saved_step = 0
        """The step of the current stage at which the last state was saved."""
        self.ended_together = False
        """True once :meth:`run` has ended at the same place in all processes."""

    def run(self) -> dict[str, Any]:
        """Train every stage, save the model, evaluate it.

        Returns:
            The report. A run that was finished before only returns its report.

        Raises:
            KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP came; the state of the last whole step is
                saved.
            WorkerDiedError, DataExhaustedError, StreamError: There is no more data; the state of
                the last whole step is saved.
            NonFiniteLossError: The loss or the gradients are NaN or infinite.
            BrokenSamplesError: More than ``max_broken_samples`` cannot be read.
            OtherProcessError: Another process of the run has stopped.
            RuntimeError: The connection to another process is lost.
        """
        try:
            report = self.setup.finished
            if report is None:
                with self.interruption:
                    for stage_index in range(self._begin(), len(self.config.stages)):
                        self._run_stage(stage_index)
                    report = self._finish()
        except AgreedStop as stop:
            self.ended_together = True
            raise stop.reason from stop.reason.__cause__
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.setup.folder.release()
        self.ended_together = True
        return report

    def leave_group(self) -> None:
        """End the communication with the other processes, if all have ended :meth:`run` alike.

        A process that is about to end calls this. The threads of its group would otherwise end with
        the interpreter, in any order, which can abort it.
        """
        if self.ended_together:
            self.accelerator.state.destroy_process_group()

    def _begin(self) -> int:
        """Restore weights, counts and files of a resumed run; return the index of its stage."""
        state = self.resumed
        if state is not None:
            self.records, self.broken.reasons = state["records"], state["broken"]
            if self.config.evaluation is not None:
                settings, place = self.config.evaluation, (state["stage"], state["step"])
                path = self.config.output / BEST
                self.best = from_main(lambda: read_best(path, settings, place), self.is_main)
            if self.is_main:  # the other processes get the weights before the first step
                self.model.load_state_dict(state["model"])
        if self.is_main:
            for note in self.setup.kind.notes():
                say(note)
        self.broken.add_known(self.setup.datasets.values(), writes=self.is_main)
        if self.is_main and state is None:
            self.setup.folder.begin_records()
        elif self.is_main and state is not None:
            for file in (self.setup.metrics, self.setup.evaluations):
                file.cut(state["stage"], state["step"])
        first_step = 0 if state is None else self._position()["global_step"] + 1
        start_trackers(self.accelerator, self.config, first_step=first_step)
        if state is None and self.config.encoder_warm_up is not None:
            self.records.append(warm_up(self.setup, self.config.encoder_warm_up))
        if self.setup.is_sharded:
            shard(self.model, self.accelerator.device, self.config.precision)
        return 0 if state is None else state["stage"]

    def _run_stage(self, stage_index: int) -> None:
        """Train a stage, from its beginning or from the state of a resumed run."""
        stage, is_resumed = self.config.stages[stage_index], self.resumed is not None
        if not is_resumed:
            self.records.append(StageRecord.begin(stage.name).counts)
        record = StageRecord(self.records[-1])
        optimizer = build_optimizer(self.setup.kind, stage)
        scheduler = build_scheduler(optimizer, stage, record)
        if self.resumed is not None:
            restore_state(self.resumed, self.accelerator, self.model, optimizer, scheduler)
            self.resumed = None
        self.saved_step = record.counts["steps"]
        meter = build_meter(self.setup, stage, record)
        model, optimizer = prepare(self.accelerator, self.setup.kind.step_module, optimizer)
        if is_resumed and not interrupted_anywhere(self.accelerator, self.interruption):
            self._evaluate_if_due(stage, only_missing=True)
        unit = "step" if stage.tokens is None else "token"
        bar: Any = progress_bar(
            stage.name, stage.budget, done=record.done(stage), unit=unit, shown=self.is_main
        )
        layers = adapted_layers(self.setup.kind.parts, self.config, stage.learning)
        with layers, bar, closing(load_steps(self.setup, stage_index, self._stages())) as data:
            try:
                for packed in meter.waiting(data):
                    if isinstance(packed, Exception):
                        interrupted = self.interruption.requested
                        raise stop_without_data(self.accelerator, packed, interrupted=interrupted)
                    outcome = self._step(model, optimizer, packed, stage)
                    meter.add(packed)
                    scheduler.step()
                    step, is_last = record.counts["steps"], record.done(stage) >= stage.budget
                    path = self.config.output / NON_FINITE
                    check_finite(self.accelerator, outcome, packed, stage.name, step, path)
                    bar.update(1 if stage.tokens is None else packed.tokens)
                    if step % self.config.log_every == 0 or is_last:
                        self._log(stage, outcome, packed, scheduler, meter, bar)
                    if step % self.config.save_every == 0 or outcome.interrupted or is_last:
                        self._save_state(optimizer, scheduler)
                    if outcome.interrupted:
                        raise AgreedStop(KeyboardInterrupt())
                    self._evaluate_if_due(stage)
                    if is_last:
                        break  # a stage with a budget in tokens has more data
            except AgreedStop:
                self._save_state(optimizer, scheduler)
                raise
        self.accelerator.free_memory()

    def _step(
        self, model: Any, optimizer: Any, packed: PackedStep, stage: StageConfig
    ) -> StepOutcome:
        interrupted = self.interruption.requested
        outcome = optimize(
            self.accelerator, model, optimizer, packed, stage, interrupted=interrupted
        )
        if outcome.broken:
            data = list(self.setup.datasets).index(self.config.data_of(stage))
            self.broken.add(data, packed.broken, writes=self.is_main)
        return outcome

    def _stages(self) -> list[dict[str, Any]]:
        return self.records[self.config.encoder_warm_up is not None :]

    def _position(self) -> dict[str, Any]:
        return position_of(self._stages())

    def _log(
        self,
        stage: StageConfig,
        outcome: StepOutcome,
        packed: PackedStep,
        scheduler: Any,
        meter: Meter,
        bar: Any,
    ) -> None:
        shared = torch.tensor([meter.shared(packed)], device=self.accelerator.device)
        rates = meter.rates(self.accelerator.gather(shared).tolist())
        if self.is_main:
            line = metrics_line(
                self._position(),
                stage,
                self.records[-1],
                outcome,
                packed,
                learning_rates=scheduler.get_last_lr(),
                processes=self.accelerator.num_processes,
                broken_samples=len(self.broken),
                rates=rates,
            )
            bar.set_postfix_str(bar_text(line), refresh=False)
            self.setup.metrics.append(line)
            self._track("training", line)

    def _track(self, kind: str, line: dict[str, Any]) -> None:
        log_to_trackers(self.accelerator, kind, line)

    def _evaluate_if_due(self, stage: StageConfig, *, only_missing: bool = False) -> None:
        """Evaluate after the step that was just done, if the configuration says so.

        With ``only_missing`` not if that was done before the run was stopped.
        """
        position, record = self._position(), StageRecord(self.records[-1])
        is_last = record.done(stage) >= stage.budget
        if self.evaluator is None or not self.evaluator.is_due(position["step"], is_last):
            return
        lines = self.setup.evaluations
        if only_missing and from_main(
            lambda: lines.has(position["stage"], position["step"]), self.is_main
        ):
            return
        began = time.perf_counter()
        settings = self.evaluator.settings
        report = self.evaluator.run(self.model, settings.samples)
        if settings.keep_best == "loss":
            report["loss"] = self.evaluator.loss(self.model, stage, report)
        # Before the line that says it is done: a run that dies in between does both again.
        self._keep_if_best(settings, position, report)
        if self.is_main:
            kept = ("accuracy", "loss", "accuracy_by_kind", "questions", "broken_samples")
            values = {key: report[key] for key in kept if key in report}
            lines.append({**position, **values, "seconds": round(time.perf_counter() - began, 3)})
            tracked: dict[str, Any] = {
                key: report[key] for key in ("accuracy", "loss") if key in report
            }
            self._track("evaluation", {**position, **tracked})
            shown = "  ".join(f"{n}: {share:.3f}" for n, share in report["accuracy"].items())
            say(f"{stage.name}, step {position['step']}: accuracy at {shown}")

    def _keep_if_best(
        self, settings: EvaluationConfig, position: dict[str, Any], report: dict[str, Any]
    ) -> None:
        """Save the model in ``best`` if its evaluation is the best so far."""
        if not is_better(settings, report, self.best):
            return
        self.best = best = best_record(settings, position, report)
        weights, folder = model_weights(self.model), self.setup.folder
        if self.setup.kind.adapters is not None and weights:
            weights = self.setup.kind.adapters.merged(weights)

        def save() -> None:
            folder.saved_files[BEST] = save_model(
                self.config.output / BEST,
                self.model,
                self.processor,
                weights,
                replaced=folder.saved_files.get(BEST),
                moment=in_words(best),
                record={"best": best, "evaluation": compared(settings)},
            )
            folder.note_saved(self.config.fingerprint())

        from_main(save, self.is_main)

    def _save_state(self, optimizer: Any, scheduler: Any) -> None:
        """Save the state of the last step, if that has not been done; all have a part of it."""
        position = self._position()
        if position["step"] == self.saved_step:
            return
        self.saved_step = position["step"]
        state = {
            **{key: position[key] for key in ("stage", "step")},
            **gather_state(self.accelerator, self.model, optimizer, scheduler),
            "records": self.records,
            "broken": self.broken.reasons,
        }

        def save() -> None:
            self.setup.folder.sync()  # lines of the steps that the state knows of
            self.setup.states.save(state)

        from_main(save, self.is_main)

    def _finish(self) -> dict[str, Any]:
        """Save the model, evaluate it, and note that the run is finished."""
        report = training = training_report(self.records)
        if self.best is not None:
            training["best"] = self.best
        weights, folder = model_weights(self.model), self.setup.folder
        checkpoint, report_path = (self.config.output / name for name in (CHECKPOINT, REPORT))
        if self.setup.kind.adapters is not None:
            weights = self._merge_adapters(weights, self.setup.kind.adapters)
        if self.is_main:
            replaced = folder.saved_files.get(CHECKPOINT)
            with working(f"saving {checkpoint}"):
                folder.saved_files[CHECKPOINT] = save_model(
                    checkpoint, self.model, self.processor, weights, replaced=replaced
                )
        if self.evaluator is not None:
            report = {**self.evaluator.run_last(self.model, weights), **report}
        if self.is_main:
            if self.evaluator is not None:
                write_json(report_path, report)
            else:
                report_path.unlink(missing_ok=True)  # of an earlier checkpoint
            folder.sync()
            folder.finish(self.config.fingerprint(), training)
            self.setup.states.remove()
        return report

    def _merge_adapters(self, weights: dict[str, Any], adapters: Adapters) -> dict[str, Any]:
        """Save the adapters, then make them a part of the model's weights; return these.

        Every process must call it: each merges its own copy of the model.
        """
        folder, others = self.setup.folder, self.setup.kind.trained_whole()

        def save() -> None:
            start = self.config.model.start
            base = None if start is None else str(start)
            folder.saved_files[ADAPTER] = replace_folder(
                self.config.output / ADAPTER,
                lambda temporary: adapters.save(temporary, others, weights, base),
            )

        from_main(save, self.is_main)
        adapters.merge()
        self.setup.kind.adapters = None
        return model_weights(self.model)
