"""The training loop: stages, stochastic counts, packed batches, exact resume.

Every batch is a pure function of (seed, stage, step), so a run that was killed continues from its
last state with the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from tqdm import tqdm

from tokenflex.counts import TokenCounts, tokens_of
from tokenflex.data.order import StepSampler, load_in_order
from tokenflex.data.packing import PackingCollator
from tokenflex.data.steps import PackedStep, StepPacker
from tokenflex.files import write_json
from tokenflex.formats import FRESH_PARTS
from tokenflex.interruption import Interruption
from tokenflex.models.loading import check_length
from tokenflex.training.agreement import AgreedStop
from tokenflex.training.build import (
    build_dataset,
    build_model,
    build_order,
    build_processor,
    check_dropout,
    check_processes,
    check_supply,
    modules_of,
)
from tokenflex.training.checkpoint import Sizes, save_model
from tokenflex.training.config import StageConfig, TrainConfig
from tokenflex.training.data_digests import check_unchanged, digests_of
from tokenflex.training.engine import (
    StepOutcome,
    build_accelerator,
    optimize,
    prepare,
    stop_without_data,
)
from tokenflex.training.evaluations import Evaluator, interrupted_anywhere
from tokenflex.training.faults import BrokenSamples, check_finite
from tokenflex.training.flops import teacher_flops, tile_cost, training_flops
from tokenflex.training.layers import adapted_layers
from tokenflex.training.output import (
    BROKEN_SAMPLES,
    CHECKPOINT,
    EVALUATIONS,
    METRICS,
    NON_FINITE,
    REPORT,
    RunFolder,
    finished_report,
)
from tokenflex.training.peaks import peak_flops
from tokenflex.training.records import (
    COUNTED,
    Meter,
    MetricsFile,
    StageRecord,
    progress_bar,
    summary,
    tokens_per_image,
    training_report,
)
from tokenflex.training.schedule import learning_rate_factor
from tokenflex.training.sharding import shard
from tokenflex.training.states import (
    RunStates,
    fingerprint,
    from_main,
    model_weights,
    optimizer_state,
    random_state,
    restore_optimizer,
    restore_random_state,
    without_weights,
)
from tokenflex.training.trackers import check_installed, flat, start_trackers


class TrainingRun:
    """One run of a configuration, in ``config.output``:

    ``metrics.jsonl`` (a line every ``log_every`` steps), ``evaluations.jsonl`` (a line for every
    evaluation during training), ``trackers/`` (where there are any), ``state.pt`` and the states
    before it (while it runs),
    ``non_finite.json`` (the samples of a step whose loss was NaN or infinite),
    ``broken_samples.json`` (those that were skipped, with the reason),
    ``config.json`` (what it was made by), ``checkpoint/`` (the model and processor, at the end),
    ``report.json`` (with ``evaluation``).

    From here until :meth:`run` has ended, no other run can write into that folder.

    Args:
        config: what to do.
        fresh: begin anew even if there is a state, or a finished run.
        accept_changed_data: continue although data files are not those that the state was made
            with.

    Raises:
        FolderInUseError: another run is at work in the output folder.
        ValueError: the output folder holds something else than a run, the state of another
            configuration, or states of which none can be read; data has changed since the state
            was saved; a stage has fewer samples a step than there are processes; or the package of
            a tracker is not installed.
    """

    def __init__(
        self, config: TrainConfig, *, fresh: bool = False, accept_changed_data: bool = False
    ) -> None:
        self.config = config
        check_installed(config.trackers)
        self.accelerator = build_accelerator(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        set_seed(config.seed)
        ranks = self.accelerator.num_processes
        check_processes(config, ranks)
        self.interruption = Interruption()
        self.output = config.output
        self.folder = RunFolder(self.output, keep_states=config.keep_states)
        self.states = RunStates(config)
        self.metrics = MetricsFile(self.output / METRICS)
        self.evaluations = MetricsFile(self.output / EVALUATIONS)
        self.non_finite_path = self.output / NON_FINITE
        self.broken = BrokenSamples(self.output / BROKEN_SAMPLES, config.max_broken_samples)
        self.is_main = self.accelerator.is_main_process
        from_main(self.folder.claim, self.is_main)
        try:
            self._set_up(fresh, accept_changed_data)
        except BaseException:
            self.folder.release(undo=True)
            raise

    def _set_up(self, fresh: bool, accept_changed_data: bool) -> None:
        """Read the state, build data and model, then touch what is in the output folder."""
        config, ranks = self.config, self.accelerator.num_processes
        self.finished: dict[str, Any] | None = None
        """The report of the run, where it was finished before and is not to begin anew."""
        self.resumed = None
        if not fresh:
            self.finished = from_main(
                lambda: finished_report(config, fingerprint(config)), self.is_main
            )
        if not fresh and self.finished is None:
            self.resumed = self._read_state()
        # Data first: its errors should not wait for a model, nor those of evaluation for training.
        used = dict.fromkeys(config.data_of(stage) for stage in config.stages)
        saved_digests = None if self.resumed is None else self.resumed.get("data")

        def check_data() -> None:
            self.states.data = digests_of(used)
            if saved_digests is not None and not accept_changed_data:
                check_unchanged(saved_digests, self.states.data)

        if self.finished is None:
            from_main(check_data, self.is_main)
        self.datasets = {data: build_dataset(data) for data in used}
        self.orders = {
            data: build_order(data, dataset, config.seed) for data, dataset in self.datasets.items()
        }
        check_supply(config, self.orders)
        evaluation = config.evaluation
        asked = None if evaluation is None else build_dataset(evaluation.data)
        self.processor = build_processor(config.model)
        trained = {count for stage in config.stages for count in stage.drawn_counts}
        model = build_model(config.model, self.processor, trained)
        check_dropout(model, config)
        self.shards = config.sharding == "full" and ranks > 1
        # One that is to be sharded goes to the device in shards.
        self.model = model if self.shards else model.to(self.accelerator.device)
        counts = [count for stage in config.stages for count in stage.counts]
        if evaluation is not None:
            counts += evaluation.counts
        check_length(self.model.config, max(map(tokens_of, counts)))
        # Everything is there: only now touch what may lie in the output folder.
        self.accelerator.wait_for_everyone()
        if self.finished is None:
            from_main(lambda: self._take_folder(fresh), self.is_main)
        self.evaluator = None
        if evaluation is not None and asked is not None:
            self.evaluator = Evaluator(
                evaluation,
                asked,
                self.processor,
                self.accelerator,
                self.interruption,
                shards=self.shards,
                workers=config.workers,
                max_broken_samples=config.max_broken_samples,
            )
        # One record a stage, the encoder's warm-up first: what the report says about training.
        self.records: list[dict[str, Any]] = []

    def _take_folder(self, fresh: bool) -> None:
        resumed = self.resumed is not None
        self.folder.prepare(fingerprint(self.config), resumed=resumed, fresh=fresh)
        self.states.put_unreadable_aside()

    def run(self) -> dict[str, Any]:
        """Train every stage, save the model, evaluate. Returns the report.

        A run that was finished before only returns its report.

        Raises:
            KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP came; the state of the last whole step is
                saved.
            WorkerDiedError, DataExhaustedError, StreamError: there is no more data; the state of
                the last whole step is saved.
            NonFiniteLossError: the loss or the gradients are NaN or infinite.
            BrokenSamplesError: more than ``max_broken_samples`` cannot be read.
            OtherProcessError: another process of the run has stopped.
            RuntimeError: the connection to another process is lost.
        """
        try:
            if self.finished is not None:
                return self.finished
            with self.interruption:
                return self._run()
        except AgreedStop as stop:
            raise stop.reason from stop.reason.__cause__
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.folder.release()

    def _run(self) -> dict[str, Any]:
        first_stage = 0
        if self.resumed is not None:
            first_stage = self.resumed["stage"]
            self.records = self.resumed["records"]
            self.broken.reasons = self.resumed["broken"]
            if self.is_main:  # the others are sent the weights before the first step
                self.model.load_state_dict(self.resumed["model"])
        self.broken.add_known(self.datasets.values(), writes=self.is_main)
        self._continue_files()
        start_trackers(
            self.accelerator,
            self.config.model_dump(mode="json", exclude_none=True),
            first_step=0 if self.resumed is None else self._global_step() + 1,
        )
        if self.resumed is None:
            self._warm_up_encoder()
        if self.shards:
            shard(self.model, self.accelerator.device, self.config.precision)
        for stage_index in range(first_stage, len(self.config.stages)):
            self._run_stage(stage_index)
        return self._finish()

    def _continue_files(self) -> None:
        """Keep of what was logged what the state knows of: nothing, in a run that begins."""
        if not self.is_main:
            return
        if self.resumed is None:
            self.folder.begin_records()
            return
        for file in (self.metrics, self.evaluations):
            file.cut(self.resumed["stage"], self.resumed["step"])

    # ------------------------------------------------------------------ stages

    def _warm_up_encoder(self) -> None:
        warm_up = self.config.encoder_warm_up
        if warm_up is None:
            return
        assert self.config.model.processor is not None  # checked by TrainConfig
        fresh_parts = FRESH_PARTS[self.config.model.processor]
        record = StageRecord.begin("encoder warm-up")
        began = time.perf_counter()
        with self._progress("encoder warm-up", warm_up.steps) as bar:

            def on_step(loss: float) -> None:
                record.counts["steps"] += 1
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                self.interruption.check()

            fresh_parts.warm_up(
                self.model.model.vision_model,
                self.processor,
                steps=warm_up.steps,
                batch_size=warm_up.batch_size,
                learning_rate=warm_up.learning_rate,
                seed=self.config.seed,
                on_step=on_step,
            )
        record.counts["seconds"] = time.perf_counter() - began
        self.records.append(record.counts)

    def _run_stage(self, stage_index: int) -> None:
        stage = self.config.stages[stage_index]
        optimizer = torch.optim.AdamW(
            self._learning_modules(stage), betas=stage.betas, weight_decay=stage.weight_decay
        )
        if self.resumed is None:
            self.records.append(StageRecord.begin(stage.name).counts)
        record = StageRecord(self.records[-1])
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda _: learning_rate_factor(stage, record.counts["steps"], record.counts["tokens"]),
        )
        first_step = record.counts["steps"]
        if self.resumed is not None:
            restore_optimizer(self.model, optimizer, self.resumed["optimizer"])
            scheduler.load_state_dict(self.resumed["scheduler"])
            if self.accelerator.scaler is not None and self.resumed["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(self.resumed["scaler"])
            accelerator = self.accelerator
            restore_random_state(self.resumed["rng"], accelerator.process_index, accelerator.device)
            self.resumed = None
        meter = self._meter(stage, record)
        model, optimizer = prepare(self.accelerator, self.model, optimizer)
        if first_step and not interrupted_anywhere(self.accelerator, self.interruption):
            self._evaluate_if_due(stage_index, only_missing=True)
        adapted = adapted_layers(self.model, self.config, stage.learning)
        progress = self._progress(
            stage.name,
            stage.budget,
            done=record.done(stage),
            unit="step" if stage.tokens is None else "token",
        )

        saved = first_step  # where a stage begins, the one before it has ended and was saved

        def save() -> None:
            nonlocal saved
            if saved != record.counts["steps"]:
                saved = record.counts["steps"]
                self._save_state(stage_index, saved, optimizer, scheduler)

        with adapted, progress as bar, closing(self._steps(stage_index, first_step)) as data:
            steps = _with_error(meter.waiting(data))
            for step, packed in enumerate(steps, first_step + 1):
                try:
                    if isinstance(packed, Exception):
                        raise self._stop_without_data(packed)
                    outcome = self._step(model, optimizer, packed, stage)
                except AgreedStop:
                    save()
                    raise
                loss, norm = outcome.loss.item(), outcome.norm.item()
                meter.add(packed)
                scheduler.step()
                place = stage.name, step
                check_finite(self.accelerator, loss, norm, packed, place, self.non_finite_path)
                last = record.done(stage) >= stage.budget
                bar.update(1 if stage.tokens is None else packed.tokens)
                if step % self.config.log_every == 0 or last:
                    self._log(stage_index, outcome, packed, scheduler, meter, bar)
                if step % self.config.save_every == 0 or outcome.interrupted or last:
                    save()
                if outcome.interrupted:
                    raise KeyboardInterrupt
                try:
                    self._evaluate_if_due(stage_index)
                except AgreedStop:
                    save()
                    raise
                if last:
                    break  # with a budget in tokens there is more to read
        self.accelerator.free_memory()

    def _meter(self, stage: StageConfig, record: StageRecord) -> Meter:
        device, peak = self.accelerator.device, self.config.peak_tflops
        each = None if peak is None else 1e12 * peak
        if each is None and device.type == "cuda":
            each = peak_flops(torch.cuda.get_device_name(device), self.config.precision)
        return Meter(
            record,
            training_flops(self.model, stage.learning),
            teacher_flops=teacher_flops(self.model) if stage.distillation else None,
            peak=None if each is None else each * self.accelerator.num_processes,
            device=device,
        )

    def _learning_modules(self, stage: StageConfig) -> list[dict[str, Any]]:
        """Optimiser groups of the modules that learn in this stage; the others are frozen."""
        modules = modules_of(self.model)
        self.model.requires_grad_(False)
        self.model.eval()  # a frozen module answers as it will when the model is used
        groups = []
        for name, rate in stage.learning_rate.items():
            if rate > 0:
                for module in modules[name]:
                    module.train()
                # The head may share its weight with the embedding: each tensor once.
                parameters = {p for module in modules[name] for p in module.parameters()}
                ordered = [p for p in self.model.parameters() if p in parameters]
                for parameter in ordered:
                    parameter.requires_grad_(True)
                groups.append({"params": ordered, "lr": rate})
        return groups

    def _steps(self, stage_index: int, first_step: int) -> Generator[PackedStep, None, None]:
        stage = self.config.stages[stage_index]
        data = self.config.data_of(stage)
        # A later stage goes on where an earlier one on the same data stopped.
        before = sum(
            record["steps"] * earlier.samples_read
            for earlier, record in zip(
                self.config.stages[:stage_index], self._stage_records(), strict=False
            )
            if self.config.data_of(earlier) == data
        )
        counts = TokenCounts(stage.counts, stage.weights, seed=self.config.seed)
        teacher = stage.teacher_count
        sampler = StepSampler(
            self.orders[data],
            first_position=before + first_step * stage.samples_read,
            steps=self._most_steps(stage, first_step),
            batch_size=stage.samples_read,
        )
        packer = StepPacker(
            self.datasets[data],
            PackingCollator(
                self.processor,
                counts,
                share_prefix=self.model.takes_shared_prefixes,
                max_length=stage.max_length,
                teacher_count=teacher,
            ),
            draw=stage.draw,
            max_tokens=stage.max_tokens,
            max_tiles=stage.max_tiles,
            tile_cost=tile_cost(
                self.model, stage.learning, 0 if teacher is None else tokens_of(teacher)
            ),
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
        )
        # Not prepared by accelerate: the packer already gives each rank its own share.
        yield from load_in_order(packer, sampler, workers=self.config.workers)

    def _most_steps(self, stage: StageConfig, first_step: int) -> int:
        """Steps left of a stage; with a budget in tokens, at most: each has at least one token."""
        if stage.steps is not None:
            return stage.steps - first_step
        done = self.records[-1]["tokens"] if first_step else 0
        return max(0, math.ceil(stage.budget - done))

    def _stage_records(self) -> list[dict[str, Any]]:
        """The records of the stages alone, those that have begun."""
        return self.records[self.config.encoder_warm_up is not None :]

    def _global_step(self) -> int:
        """Optimiser steps done in all stages."""
        return sum(record["steps"] for record in self._stage_records())

    def _stop_without_data(self, error: Exception) -> AgreedStop:
        return stop_without_data(self.accelerator, error, interrupted=self.interruption.requested)

    def _step(
        self, model: Any, optimizer: Any, packed: PackedStep, stage: StageConfig
    ) -> StepOutcome:
        outcome = optimize(
            self.accelerator,
            model,
            optimizer,
            packed,
            stage,
            interrupted=self.interruption.requested,
        )
        if outcome.broken:
            data = list(self.datasets).index(self.config.data_of(stage))
            self.broken.add(data, packed.broken, writes=self.is_main)
        return outcome

    # ------------------------------------------------------------------ records

    def _log(
        self,
        stage_index: int,
        outcome: StepOutcome,
        packed: PackedStep,
        scheduler: Any,
        meter: Meter,
        bar: tqdm,
    ) -> None:
        shared = torch.tensor([meter.shared(packed)], device=self.accelerator.device)
        measured = meter.rates(self.accelerator.gather(shared).tolist())
        if not self.is_main:
            return
        stage, record = self.config.stages[stage_index], self.records[-1]
        norm, distilled = outcome.norm.item(), outcome.distillation_loss
        line = {
            **self._place(stage_index),
            "loss": outcome.loss.item(),
            **({} if distilled is None else {"distillation_loss": distilled.item()}),
            # float16 has steps whose gradients overflowed, and JSON has no infinity.
            "gradient_norm": norm if math.isfinite(norm) else None,
            "learning_rate": dict(zip(stage.learning, scheduler.get_last_lr(), strict=True)),
            "tokens_per_image": tokens_per_image([record]),
            **{name: getattr(packed, name) for name in COUNTED},
            **{f"stage_{name}": record[name] for name in COUNTED},
            "counts": packed.counts,
            "bins": len(packed.bins) * self.accelerator.num_processes,
            "cost_balance": packed.cost_balance,
            "broken_samples": len(self.broken),
            **measured,
        }
        bar.set_postfix_str(summary(line), refresh=False)
        self.metrics.append(line)
        self._track("training", line)

    def _place(self, stage_index: int) -> dict[str, Any]:
        """Where training is, as lines say it."""
        return {
            "stage": stage_index,
            "stage_name": self.config.stages[stage_index].name,
            "step": self.records[-1]["steps"],
            "global_step": self._global_step(),
        }

    def _track(self, kind: str, line: dict[str, Any]) -> None:
        step = line["global_step"]
        values = {k: v for k, v in line.items() if k not in ("step", "global_step")}
        self.accelerator.log(dict(flat(values, kind)), step=step)

    def _progress(self, name: str, total: float, **options: Any) -> tqdm:
        return progress_bar(name, total, shown=self.is_main, **options)

    # ------------------------------------------------------------------ state

    def _read_state(self) -> dict[str, Any] | None:
        """The newest state; its weights are the main process's alone."""
        state = None

        def read() -> dict[str, Any] | None:
            nonlocal state
            state = self.states.read()
            return without_weights(state)

        shared = from_main(read, self.is_main)
        return state if self.is_main else shared

    def _save_state(self, stage: int, step: int, optimizer: Any, scheduler: Any) -> None:
        """On every process: each has a part of the state, and all stop if it cannot be written."""
        scaler = self.accelerator.scaler
        state = {
            "stage": stage,
            "step": step,
            "model": model_weights(self.model, keep=self.is_main),
            "optimizer": optimizer_state(self.model, optimizer, keep=self.is_main),
            "scheduler": scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": gather_object([random_state(self.accelerator.device)]),
            "records": self.records,
            "broken": self.broken.reasons,
        }

        def save() -> None:
            self.folder.sync()  # lines of the steps that the state knows of
            self.states.save(state)

        from_main(save, self.is_main)

    def _finish(self) -> dict[str, Any]:
        report = training = training_report(self.records)
        weights = model_weights(self.model, keep=self.is_main)
        written: Sizes = {}
        if self.is_main:
            written = save_model(
                self.output / CHECKPOINT,
                self.model,
                self.processor,
                weights,
                replaced=self.folder.checkpoint_files,
            )
        if self.evaluator is not None:
            report = {**self.evaluator.run_last(self.model, weights), **report}
        if self.is_main:
            if self.evaluator is not None:
                write_json(self.output / REPORT, report)
            else:
                (self.output / REPORT).unlink(missing_ok=True)  # of an earlier checkpoint
            self.folder.sync()
            self.folder.finish(fingerprint(self.config), training, written)
            self.states.remove()
        return report

    # ------------------------------------------------------------------ evaluation

    def _evaluate_if_due(self, stage_index: int, *, only_missing: bool = False) -> None:
        """Accuracy at every count after the step that was just done, if it is time for it.

        ``only_missing``: not if that was done before the run was stopped.
        """
        settings, stage = self.config.evaluation, self.config.stages[stage_index]
        if settings is None:
            return
        record = StageRecord(self.records[-1])
        step, last = record.counts["steps"], record.done(stage) >= stage.budget
        if not (last and settings.at_stage_end) and step % (settings.every or step + 1):
            return
        if only_missing:
            done = [self.is_main and self.evaluations.has(stage_index, step)]
            if broadcast_object_list(done)[0]:
                return
        began = time.perf_counter()
        assert self.evaluator is not None
        report = self.evaluator.run(self.model, settings.samples)
        if not self.is_main:
            return
        place = self._place(stage_index)
        kept = ("accuracy", "accuracy_by_kind", "questions", "broken_samples")
        found = {key: report[key] for key in kept if key in report}
        line = {**place, **found, "seconds": round(time.perf_counter() - began, 3)}
        self.evaluations.append(line)
        self._track("evaluation", {**place, "accuracy": report["accuracy"]})
        shown = "  ".join(f"{count}: {one:.3f}" for count, one in report["accuracy"].items())
        tqdm.write(f"{stage.name}, step {step}: accuracy at {shown}")


def _with_error(steps: Iterator[PackedStep]) -> Iterator[PackedStep | Exception]:
    """``steps``, and at their end the error that there is in place of the next."""
    try:
        yield from steps
    except Exception as error:
        yield error
