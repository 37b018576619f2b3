"""The training loop: stages, stochastic counts, packed batches, exact resume.

Every batch is a pure function of (seed, stage, step), so a run that was killed continues from its
last state with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from tqdm import tqdm
from transformers import get_scheduler

from tokenflex.counts import TokenCounts
from tokenflex.data.order import StepSampler, load_in_order
from tokenflex.data.packing import PackingCollator
from tokenflex.data.steps import BrokenSample, PackedStep, StepPacker
from tokenflex.digits.encoder import warm_up_encoder
from tokenflex.evaluation import evaluate
from tokenflex.interruption import Interruption
from tokenflex.models.loading import check_length, load_checkpoint
from tokenflex.training.build import (
    build_dataset,
    build_model,
    build_order,
    build_processor,
    modules_of,
)
from tokenflex.training.checkpoint import remove_leftovers, save_model, write_json
from tokenflex.training.config import StageConfig, TrainConfig
from tokenflex.training.engine import StepOutcome, build_accelerator, optimize, prepare
from tokenflex.training.flops import training_flops
from tokenflex.training.layers import adapted_layers
from tokenflex.training.records import (
    MetricsFile,
    StageRecord,
    progress_bar,
    tokens_per_image,
    training_report,
)
from tokenflex.training.sharding import is_sharded, shard
from tokenflex.training.states import (
    RunStates,
    from_main,
    model_weights,
    optimizer_state,
    random_state,
    restore_optimizer,
    restore_random_state,
    without_weights,
)

# The configuration's name -> transformers'; both warm up.
SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the file of its samples."""


class BrokenSamplesError(ValueError):
    """More samples than the configuration allows could not be read; the message names one."""


class Trainer:
    """One run of a configuration, in ``config.output``:

    ``metrics.jsonl`` (a line every ``log_every`` steps), ``state.pt`` and the states before it
    (while it runs), ``non_finite.json`` (the samples of a step whose loss was NaN or infinite),
    ``broken_samples.json`` (those that were skipped, with the reason),
    ``checkpoint/`` (the model and processor, at the end), ``report.json`` (with ``evaluation``).

    Args:
        config: what to do.
        fresh: begin anew even if a state is there.

    Raises:
        ValueError: the output folder holds the state of another configuration, or states of which
            none can be read; or a stage has fewer samples a step than there are processes.
    """

    def __init__(self, config: TrainConfig, *, fresh: bool = False) -> None:
        self.config = config
        self.accelerator = build_accelerator(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        set_seed(config.seed)
        ranks = self.accelerator.num_processes
        for stage in config.stages:
            if stage.batch_size < ranks:
                raise ValueError(
                    f"batch_size of stage {stage.name!r} must be at least one sample a process, "
                    f"{ranks}, got {stage.batch_size}"
                )
        self.interruption = Interruption()
        self.output = config.output
        self.states = RunStates(config)
        self.metrics = MetricsFile(self.output / "metrics.jsonl")
        self.non_finite_path = self.output / "non_finite.json"
        self.broken_path = self.output / "broken_samples.json"
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output must be a folder, but {self.output} is a file")
        self.is_main = self.accelerator.is_main_process
        self.resumed = None if fresh else self._read_state()
        # Data first: its errors should not wait for a model, nor those of evaluation for training.
        used = dict.fromkeys(config.data_of(stage) for stage in config.stages)
        self.datasets = {data: build_dataset(data) for data in used}
        evaluation = config.evaluation
        self.evaluation_data = None if evaluation is None else build_dataset(evaluation.data)
        self.processor = build_processor(config.model)
        trained = {
            count
            for stage in config.stages
            for count, weight in zip(stage.counts, stage.weights, strict=True)
            if weight
        }
        model = build_model(config.model, self.processor, trained)
        self.shards = config.sharding == "full" and ranks > 1
        # One that is to be sharded goes to the device in shards.
        self.model = model if self.shards else model.to(self.accelerator.device)
        counts = [count for stage in config.stages for count in stage.counts]
        if evaluation is not None:
            counts += evaluation.counts
        check_length(self.model.config, max(counts))
        # Everything is there: only now touch what may lie in the output folder.
        self.accelerator.wait_for_everyone()
        self.output.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            remove_leftovers(self.output)
            self.non_finite_path.unlink(missing_ok=True)
            if self.resumed is None:
                self.broken_path.unlink(missing_ok=True)
            self.states.put_unreadable_aside()
            if fresh:
                self.states.remove()
        self.orders = {
            data: build_order(data, dataset, config.seed) for data, dataset in self.datasets.items()
        }
        # One record a stage, the encoder's warm-up first: what the report says about training.
        self.records: list[dict[str, Any]] = []
        self.broken: dict[tuple[int, int], str] = {}  # (data set, index) -> reason

    def run(self) -> dict[str, Any]:
        """Train every stage, save the model, evaluate. Returns the report.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM came; the state of the last whole step is saved.
            NonFiniteLossError: the loss or the gradients are NaN or infinite.
            BrokenSamplesError: more than ``max_broken_samples`` cannot be read.
        """
        with self.interruption:
            return self._run()

    def _run(self) -> dict[str, Any]:
        first_stage = 0
        if self.resumed is not None:
            first_stage = self.resumed["stage"]
            self.records = self.resumed["records"]
            self.broken = self.resumed["broken"]
            if self.is_main:  # the others are sent the weights before the first step
                self.model.load_state_dict(self.resumed["model"])
                self.metrics.cut(self.resumed["stage"], self.resumed["step"])
        else:
            if self.is_main:
                self.metrics.path.unlink(missing_ok=True)
            self._warm_up_encoder()
        if self.shards:
            shard(self.model, self.accelerator.device, self.config.precision)
        for stage_index in range(first_stage, len(self.config.stages)):
            self._run_stage(stage_index)
        return self._finish()

    # ------------------------------------------------------------------ stages

    def _warm_up_encoder(self) -> None:
        warm_up = self.config.encoder_warm_up
        if warm_up is None:
            return
        record = StageRecord.begin("encoder warm-up", warm_up.steps)
        with self._progress("encoder warm-up", warm_up.steps) as bar:

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                self.interruption.check()

            warm_up_encoder(
                self.model.model.vision_model,
                self.processor,
                steps=warm_up.steps,
                batch_size=warm_up.batch_size,
                learning_rate=warm_up.learning_rate,
                seed=self.config.seed,
                on_step=on_step,
            )
        record.stop_clock()
        self.records.append(record.counts)

    def _run_stage(self, stage_index: int) -> None:
        stage = self.config.stages[stage_index]
        optimizer = torch.optim.AdamW(
            self._learning_modules(stage), betas=stage.betas, weight_decay=stage.weight_decay
        )
        scheduler = get_scheduler(
            SCHEDULES[stage.schedule],
            optimizer,
            num_warmup_steps=stage.warmup_steps,
            num_training_steps=stage.steps,
        )
        first_step = 0
        if self.resumed is not None:
            first_step = self.resumed["step"]
            restore_optimizer(self.model, optimizer, self.resumed["optimizer"])
            scheduler.load_state_dict(self.resumed["scheduler"])
            if self.accelerator.scaler is not None and self.resumed["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(self.resumed["scaler"])
            accelerator = self.accelerator
            restore_random_state(self.resumed["rng"], accelerator.process_index, accelerator.device)
            self.resumed = None
        else:
            self.records.append(StageRecord.begin(stage.name, stage.steps).counts)
        record = StageRecord(self.records[-1])
        model, optimizer = prepare(self.accelerator, self.model, optimizer)
        adapted = adapted_layers(self.model, self.config, stage.learning)
        with adapted, self._progress(stage.name, stage.steps, first_step) as bar:
            for step, packed in enumerate(self._steps(stage_index, first_step), first_step + 1):
                outcome = self._step(model, optimizer, packed, stage)
                scheduler.step()
                record.add(packed)
                loss, norm = outcome.loss.item(), outcome.norm.item()
                self._check_finite(loss, norm, stage, step, packed)
                logs = step % self.config.log_every == 0 or step == stage.steps
                stops = outcome.interrupted or step == stage.steps
                saves = step % self.config.save_every == 0 or stops
                if logs:
                    self._log(stage_index, step, loss, packed, scheduler, bar)
                if saves:
                    self._save_state(stage_index, step, optimizer, scheduler)
                bar.update()
                if outcome.interrupted:
                    raise KeyboardInterrupt
        self.accelerator.free_memory()

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

    def _steps(self, stage_index: int, first_step: int) -> Iterator[PackedStep]:
        stage = self.config.stages[stage_index]
        data = self.config.data_of(stage)
        # A later stage goes on where an earlier one on the same data stopped.
        before = sum(
            earlier.steps * earlier.batch_size
            for earlier in self.config.stages[:stage_index]
            if self.config.data_of(earlier) == data
        )
        counts = TokenCounts(stage.counts, stage.weights, seed=self.config.seed)
        sampler = StepSampler(
            self.orders[data],
            first_position=before + first_step * stage.batch_size,
            steps=stage.steps - first_step,
            batch_size=stage.batch_size,
        )
        packer = StepPacker(
            self.datasets[data],
            PackingCollator(self.processor, counts),
            max_tokens=stage.max_tokens,
            max_tiles=stage.max_tiles,
            tile_cost=training_flops(self.model, stage.learning).tile_cost,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
        )
        # Not prepared by accelerate: the packer already gives each rank its own share.
        yield from load_in_order(packer, sampler, workers=self.config.workers)

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
            self._note_broken(stage, packed.broken)
        return outcome

    # ------------------------------------------------------------------ records

    def _check_finite(
        self, loss: float, norm: float, stage: StageConfig, step: int, packed: PackedStep
    ) -> None:
        """Stop at the step that broke the model: later ones would blame other samples."""
        # In float16 the loss scaler skips steps whose gradients overflowed, and goes on.
        norm_counts = self.config.precision != "fp16"
        if math.isfinite(loss) and (math.isfinite(norm) or not norm_counts):
            return
        # Loss and norm are the same on every rank, so all of them come here.
        sample_ids = gather_object([name for batch in packed.bins for name in batch.sample_ids])
        if self.is_main:
            write_json(
                self.non_finite_path,
                {
                    "stage": stage.name,
                    "step": step,
                    "loss": str(loss),  # JSON has no NaN
                    "gradient_norm": str(norm),
                    "sample_ids": sample_ids,
                },
            )
        raise NonFiniteLossError(
            f"loss and gradient norm must be finite, got {loss} and {norm} at step {step} of stage "
            f"{stage.name!r}; its {len(sample_ids)} samples, {sample_ids[0]} and so on, are in "
            f"{self.non_finite_path}"
        )

    def _note_broken(self, stage: StageConfig, found: list[BrokenSample]) -> None:
        """Name the samples that any rank left out, and stop when they are too many."""
        # Every rank plans the whole step: what a plan finds broken comes from all of them.
        data = list(self.datasets).index(self.config.data_of(stage))
        self.broken |= {(data, one.index): one.reason for one in gather_object(found)}
        if self.is_main:
            named = [
                {"data": data, "index": index, "reason": reason}
                for (data, index), reason in sorted(self.broken.items())
            ]
            write_json(self.broken_path, named)
        if len(self.broken) > self.config.max_broken_samples:
            raise BrokenSamplesError(
                f"{len(self.broken)} broken samples are more than max_broken_samples of "
                f"{self.config.max_broken_samples}; {self.broken_path} names them, the last is: "
                f"{list(self.broken.values())[-1]}"
            )

    def _log(
        self,
        stage_index: int,
        step: int,
        loss: float,
        packed: PackedStep,
        scheduler: Any,
        bar: tqdm,
    ) -> None:
        shown: dict[str, Any] = {"loss": f"{loss:.3f}", "balance": f"{packed.cost_balance:.3f}"}
        if self.broken:
            shown["broken"] = len(self.broken)
        bar.set_postfix(shown, refresh=False)
        if not self.is_main:
            return
        line = {
            "stage": stage_index,
            "step": step,
            "loss": loss,
            "learning_rate": scheduler.get_last_lr()[0],
            "tokens_per_image": tokens_per_image(self.records[-1:]),
            "tokens": packed.tokens,
            "tiles": packed.tiles,
            "bins": len(packed.bins) * self.accelerator.num_processes,
            "cost_balance": packed.cost_balance,
            "broken_samples": len(self.broken),
            "seconds": round(self.records[-1]["seconds"], 3),
        }
        self.metrics.append(line)

    def _progress(self, name: str, steps: int, done: int = 0) -> tqdm:
        return progress_bar(name, steps, done=done, shown=self.is_main)

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
            "broken": self.broken,
        }
        from_main(lambda: self.states.save(state), self.is_main)

    def _finish(self) -> dict[str, Any]:
        report = training_report(self.records)
        weights = model_weights(self.model, keep=self.is_main)
        if not self.is_main:
            return report
        folder = self.output / "checkpoint"
        save_model(folder, self.model, self.processor, weights)
        if self.config.evaluation is not None:
            if is_sharded(self.model):  # one process cannot run its shards
                self.model = load_checkpoint(folder)[0].to(self.accelerator.device)
            report = {**self._evaluate(), **report}
            write_json(self.output / "report.json", report)
        self.states.remove()
        return report

    def _evaluate(self) -> dict[str, Any]:
        settings, dataset = self.config.evaluation, self.evaluation_data
        assert settings is not None
        assert dataset is not None
        batches = -(len(dataset) // -settings.batch_size) * len(settings.counts)
        with self._progress("evaluation", batches) as bar:

            def on_batch() -> None:
                bar.update()
                self.interruption.check()

            return evaluate(
                self.model,
                self.processor,
                dataset,
                settings.counts,
                batch_size=settings.batch_size,
                workers=self.config.workers,
                on_batch=on_batch,
            )
