"""The training configuration: a YAML file, checked whole before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator

from tokenflex.counts import TokenCount, TokenCounts, token_grid, tokens_of
from tokenflex.data.steps import Draw
from tokenflex.formats import FRESH_PARTS
from tokenflex.hub import is_absent, is_hub_name
from tokenflex.models.loading import is_conversion
from tokenflex.positions import check_image_positions
from tokenflex.training.data_config import DATA, DataConfig
from tokenflex.training.strict import Float, Int, Strict, read_yaml, reason_of, validated
from tokenflex.training.trackers import check_names
from tokenflex_kernels.pool_norm.axis_weights import MODES

MAX_INT32 = 2**31 - 1

# Kinds of files that a configuration names, beside data: parts of a model, and whole models.
PARTS = "parts"
STARTS = "starts"


# Marks a key that may change between two halves of a run.
FREE: dict[str, Any] = {"free": True}
free = partial(Field, json_schema_extra=FREE)


def _has_no_weight(data: DataConfig) -> DataConfig:
    if data.weight != 1:
        raise ValueError(
            f"weight is for the parts of a mixture: give data by itself none, got {data.weight}"
        )
    return data


WholeData = Annotated[DataConfig, AfterValidator(_has_no_weight)]


class PartConfig(Strict):
    """The vision encoder or language model, pretrained or fresh.

    With both keys the weights come from ``path``, and their architecture must be that of
    ``config``; a dry run then needs neither the weights nor the path.
    """

    path: str | None = None
    """Folder or hub name of pretrained weights."""
    config: dict[str, Any] | None = None
    """Architecture: the keys of a transformers config, ``model_type`` among them."""

    def contradictions(self) -> Iterator[str]:
        if self.path is None and self.config is None:
            yield "give a path, a config or both, got neither"

    def absent_files(self, needed: Collection[str]) -> Iterator[str]:
        # A dry run takes the architecture from ``config``.
        is_read = PARTS in needed and (self.config is None or STARTS in needed)
        if is_read and self.path is not None and is_absent(self.path):
            yield f"path {self.path!r} does not exist"


class ModelConfig(Strict):
    """The model that is trained, and its processor."""

    vision: PartConfig
    """The vision encoder."""
    text: PartConfig
    """The language model."""
    start: Path | None = None
    """TokenFLEX checkpoint to take all weights from, a folder or ``org/name`` on the Hub. Its parts
    must be those described here."""
    processor: Literal[(*FRESH_PARTS,)] | None = None  # type: ignore[valid-type]
    """Data format that brings a processor; None for the image processor of ``vision.path`` and the
    tokenizer of ``text.path``."""
    image_token: str = "<image>"
    """Placeholder of an image in texts. It is added to a tokenizer that does not know it."""
    pooling: Literal[(*MODES,)] = "adaptive"  # type: ignore[valid-type]
    """Pooling of the patch grid, as in :func:`tokenflex_kernels.pool_norm`."""
    projector_hidden_width: Int | None = Field(default=None, ge=1)
    """Width between gate/up and down of the projector; None for 3 x the encoder's width."""
    projector_position: Literal["normalized"] | None = None
    """Position term of vision tokens, as in :class:`tokenflex.TokenFlexConfig`."""
    image_positions: Literal["sequential", "shared"] = "sequential"
    """Text positions of an image's tokens, as in :class:`tokenflex.TokenFlexConfig`."""
    num_image_tokens: Int = 256
    """Vision tokens per image by default, a perfect square. Stages draw from their own counts."""
    max_tiles: Int = Field(default=1, ge=1)
    """Most tiles that an image is cut into; each tile has the count of its sample."""
    use_thumbnail: bool = False
    """Add a thumbnail of the whole image to the tiles of an image that is cut."""

    def contradictions(self) -> Iterator[str]:
        checks: tuple[Callable[[], object], ...] = (
            partial(token_grid, self.num_image_tokens, name="num_image_tokens"),
            partial(check_image_positions, self.image_positions, self.projector_position),
        )
        yield from filter(None, map(reason_of, checks))
        if self.start is not None and _is_saved_conversion(self.start):
            yield (
                "vision and text must not be given with start of a converted stock model, got both "
                f"and start={str(self.start)!r}"
            )
        if self.processor is None and (self.vision.path is None or self.text.path is None):
            names = " or ".join(map(repr, FRESH_PARTS))
            yield (
                f"processor must be {names} unless vision and text both have a path, got "
                f"processor={self.processor!r}"
            )
        if self.max_tiles > 1 and self.processor and not FRESH_PARTS[self.processor].takes_tiles:
            yield (f"max_tiles must be 1 with processor {self.processor!r}, got {self.max_tiles}")
        if self.processor is not None and self.image_token != "<image>":
            yield (
                f"image_token must not be given with processor {self.processor!r}, which has its "
                f"own, got {self.image_token!r}"
            )
        if self.use_thumbnail and self.max_tiles == 1:
            yield "use_thumbnail needs max_tiles above 1, got max_tiles=1"

    def absent_files(self, needed: Collection[str]) -> Iterator[str]:
        if STARTS in needed and self.start is not None and _is_absent_start(self.start):
            yield f"start: checkpoint folder {self.start} does not exist"


class ConvertedModelConfig(Strict):
    """A converted stock model that is trained, and its processor: a ``start`` and no parts."""

    start: Path
    """Conversion that ``tokenflex convert`` wrote, a folder or ``org/name`` on the Hub."""
    num_image_tokens: TokenCount | None = None
    """Vision tokens per tile by default, a perfect square or a [height, width] pair; None for the
    conversion's own."""

    def contradictions(self) -> Iterator[str]:
        if self.num_image_tokens is not None:
            check = partial(token_grid, self.num_image_tokens, name="num_image_tokens")
            yield from filter(None, [reason_of(check)])
        if _is_saved_conversion(self.start) is False:
            yield (
                "start without vision and text must be a conversion made by `tokenflex convert`, "
                f"got {str(self.start)!r}"
            )

    def absent_files(self, needed: Collection[str]) -> Iterator[str]:
        if needed and _is_absent_start(self.start):
            yield f"start: checkpoint folder {self.start} does not exist"


def _is_absent_start(folder: Path) -> bool:
    return not folder.exists() and not is_hub_name(folder)


def _is_saved_conversion(folder: Path) -> bool | None:
    """Return whether a folder holds a conversion; None if it cannot be read, or is on the Hub.

    A configuration is checked without network: what is fetched is checked when it is loaded.
    """
    try:
        return is_conversion(folder)
    except (OSError, ValueError):
        return None


def _kind_of_model(values: Any) -> str:
    """Return the tag of the configuration of a model, given as a mapping or as an object."""
    if isinstance(values, dict):
        is_converted = "start" in values and values.keys().isdisjoint(("vision", "text"))
    else:
        is_converted = isinstance(values, ConvertedModelConfig)
    return "[converted]" if is_converted else "[own]"


AnyModelConfig = Annotated[
    Annotated[ModelConfig, Tag("[own]")] | Annotated[ConvertedModelConfig, Tag("[converted]")],
    Discriminator(_kind_of_model),
]


class EncoderWarmUpConfig(Strict):
    """The warm-up of a fresh encoder, in place of pretrained weights."""

    steps: Int = Field(ge=1)
    """Optimiser steps."""
    batch_size: Int = Field(default=32, ge=1)
    """Images a step."""
    learning_rate: Float = Field(default=3e-3, gt=0)
    """Learning rate of AdamW."""


class PeftConfig(Strict):
    """LoRA adapters, by the library PEFT (``pip install peft``): small matrices that learn beside
    weights that do not. Keys are named as in PEFT's ``LoraConfig``.

    A stage that gives a learning rate to a module named here trains its adapters; other modules,
    such as the projector, are trained whole.
    """

    modules: tuple[Literal["vision", "text"], ...] = ("text",)
    """Modules whose linear layers get adapters."""
    r: Int = Field(default=16, ge=1)
    """Rank of an adapter."""
    lora_alpha: Float | None = Field(default=None, gt=0, lt=float("inf"))
    """Scale of an adapter's output, which is multiplied by ``lora_alpha`` / ``r``; None for 2 x
    ``r``."""
    lora_dropout: Float = Field(default=0.0, ge=0, lt=1)
    """Dropout before an adapter."""
    target_modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Linear layers that get adapters, by the ends of their names; None for all of them but the
    output layer."""
    modules_to_save: tuple[str, ...] = ()
    """Layers that are trained whole beside the adapters, by the ends of their names."""

    def contradictions(self) -> Iterator[str]:
        if not self.modules or len({*self.modules}) < len(self.modules):
            yield f"modules must name vision, text or both, each once, got {[*self.modules]}"


class StageConfig(Strict):
    """One stage of training: which modules learn, how long, on what, at which token counts."""

    name: str
    """Name of the stage in logs and reports."""
    steps: Int | None = Field(default=None, ge=1)
    """Length of the stage in optimiser steps. Exactly one of ``steps`` and ``tokens`` is given."""
    tokens: Float | None = Field(default=None, gt=0, lt=float("inf"))
    """Length of the stage in rows of the language model, text and vision. The stage ends with the
    first step that reaches them, and the schedule follows the rows, not the steps."""
    batch_size: Int = Field(ge=1)
    """Samples a step, over all processes."""
    learning_rate: dict[Literal["vision", "projector", "text"], Float]
    """Learning rate of each module that learns. A module without one, or with 0, is frozen."""
    data: WholeData | None = None
    """Data of this stage; None for that of the whole run."""
    counts: tuple[TokenCount, ...] = (64, 144, 256)
    """Vision tokens per tile: perfect squares or [height, width] pairs."""
    weights: tuple[Float, ...] = (0.2, 0.3, 0.5)
    """Odds of the counts."""
    draw: Draw = "sample"
    """Draw a count for each "sample", as in the paper, or once for a "step"; or show every sample
    at "all" counts, where each view counts as a sample of ``batch_size``."""
    max_tokens: Int | None = Field(default=None, ge=1, le=MAX_INT32)
    """Most rows of the language model in one forward pass."""
    max_tiles: Int | None = Field(default=None, ge=1, le=MAX_INT32)
    """Most tiles in one forward pass."""
    max_length: Int | None = Field(default=None, ge=2)
    """Most rows of a conversation, text and vision. Longer ones are cut off."""
    loss: Literal["token", "square"] = "token"
    """Weight of an answer token: "token" for 1, "square" for one over the square root of its
    answer's length, as the released model was trained."""
    distillation: Float = Field(default=0.0, ge=0, lt=float("inf"))
    """Weight of KL(teacher || student) in an answer token's loss, beside its cross entropy. The
    teacher is the model itself at the same step, without gradients, at the largest drawn count."""
    warmup_steps: Int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero."""
    warmup_share: Float = Field(default=0.0, ge=0, lt=1)
    """Share of the stage over which the learning rate rises from zero; not with
    ``warmup_steps``."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine down to zero, or constant."""
    weight_decay: Float = Field(default=0.02, ge=0, lt=float("inf"))
    """Weight decay of AdamW."""
    betas: tuple[Float, Float] = (0.9, 0.98)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: Float = Field(default=1.0, gt=0)
    """Norm to which gradients are clipped."""

    @property
    def learning(self) -> tuple[str, ...]:
        """The names of the modules that learn."""
        return tuple(name for name, rate in self.learning_rate.items() if rate)

    @property
    def drawn_counts(self) -> tuple[TokenCount, ...]:
        """The counts that have odds."""
        return tuple(n for n, odds in zip(self.counts, self.weights, strict=True) if odds)

    @property
    def teacher_count(self) -> TokenCount | None:
        """The count at which the teacher of ``distillation`` sees a sample; None without one."""
        return max(self.drawn_counts, key=tokens_of) if self.distillation else None

    @property
    def budget(self) -> float:
        """The length of the stage, in tokens if it has ``tokens``, else in steps."""
        budget = self.steps if self.tokens is None else self.tokens
        assert budget is not None  # checked below
        return budget

    @property
    def samples_read(self) -> int:
        """Different samples a step. With ``draw: all`` each is shown at every count."""
        return self.batch_size // (len(self.counts) if self.draw == "all" else 1)

    def contradictions(self) -> Iterator[str]:
        if (self.steps is None) == (self.tokens is None):
            yield (
                "exactly one of steps and tokens must be given, got "
                f"steps={self.steps} and tokens={self.tokens}"
            )
        if self.warmup_steps and self.warmup_share:
            yield (
                "at most one of warmup_steps and warmup_share may be given, got "
                f"{self.warmup_steps} and {self.warmup_share}"
            )
        if self.steps is not None and self.warmup_steps > self.steps:
            yield (
                f"warmup_steps must not exceed the stage's {self.steps} steps, got "
                f"{self.warmup_steps}: it would never reach its learning rate"
            )
        if self.max_length and self.max_tokens and self.max_length > self.max_tokens:
            yield (
                f"max_length must not exceed max_tokens of {self.max_tokens}, which a conversation "
                f"must fit, got {self.max_length}"
            )
        wrong_counts = [*self._wrong_counts()]
        yield from wrong_counts
        if not wrong_counts and len({*map(token_grid, self.counts)}) < len(self.counts):
            yield f"counts must differ from each other, got {self.counts}"
        if self.draw == "all":
            if self.counts and self.batch_size % len(self.counts):
                yield (
                    f"batch_size must be a multiple of the {len(self.counts)} counts with draw: "
                    f"all, got {self.batch_size}"
                )
            if len({*self.weights}) > 1:
                yield (
                    "weights must be equal with draw: all, which shows every count as often, got "
                    f"{self.weights}"
                )
        if self.distillation and self.draw == "all":
            yield (
                "distillation must be 0 with draw: all, which shows the largest count itself, got "
                f"{self.distillation}"
            )
        sizes = set() if wrong_counts else {*map(tokens_of, self.drawn_counts)}
        if self.distillation and not wrong_counts and len(sizes) < 2:
            yield (
                f"distillation of {self.distillation} needs counts of at least two sizes with odds "
                f"above 0, got counts {self.counts} with weights {self.weights}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas must be in [0, 1), got {self.betas}"
        if not all(0 <= rate < float("inf") for rate in self.learning_rate.values()):
            yield (f"learning_rate must not be negative, and be finite, got {self.learning_rate}")
        if not any(self.learning_rate.values()):
            yield (
                f"learning_rate must be above 0 for at least one module, got {self.learning_rate}"
            )

    def _wrong_counts(self) -> Iterator[str]:
        for index, count in enumerate(self.counts):
            wrong = reason_of(partial(token_grid, count, name=f"counts[{index}]"))
            if wrong is not None:
                yield wrong
        # Valid counts in their place, to check their number and the weights in any case.
        wrong = reason_of(lambda: TokenCounts((1,) * len(self.counts), self.weights))
        if wrong is not None:
            yield wrong


class SampleConfig(Strict):
    """The mean sample, for a dry run (``--dry-run``) on a machine that does not have the data."""

    text_tokens: Float = Field(ge=1)
    """Rows of the language model that are text."""
    answer_tokens: Float = Field(ge=1)
    """Those of them that are learned."""
    tiles: Float = Field(ge=0)
    """Tiles that the sample's images are cut into."""
    shown_tiles: Float | None = Field(default=None, ge=0)
    """Tiles in the rows of the language model; more than ``tiles`` where several conversations each
    repeat them. None for ``tiles``."""

    @property
    def shown(self) -> float:
        """Tiles in the rows of the language model."""
        return self.tiles if self.shown_tiles is None else self.shown_tiles

    def contradictions(self) -> Iterator[str]:
        if self.answer_tokens > self.text_tokens:
            yield (
                f"answer_tokens must not exceed text_tokens, got {self.answer_tokens} and "
                f"{self.text_tokens}"
            )


class EvaluationConfig(Strict):
    """Accuracy at several counts, after training and, if wanted, during it."""

    data: WholeData
    """The questions."""
    counts: tuple[TokenCount, ...]
    """Vision tokens per tile to evaluate at."""
    batch_size: Int = Field(default=64, ge=1)
    """Questions in one forward pass."""
    every: Int | None = Field(default=None, ge=1)
    """Steps of a stage between two evaluations during training; None for no such evaluations."""
    at_stage_end: bool = False
    """Evaluate after the last step of every stage as well."""
    keep_best: Literal["accuracy", "loss"] | None = None
    """Keep a copy of the model, in ``best``, as it was at the best evaluation during training: of
    the highest accuracy or the lowest loss of an answer token, the mean over ``counts``. None for
    no copy. "loss" takes another pass through the samples at each count."""
    samples: Int = Field(default=256, ge=1)
    """Samples of an evaluation during training, the first of the data. After training all of the
    data is evaluated."""

    def contradictions(self) -> Iterator[str]:
        parts = (self.data, *self.data.parts)
        if any(part.streaming for part in parts):
            yield "data of an evaluation must not be streaming, got streaming=True"
        if any(part.epochs is not None for part in parts):
            yield "data of an evaluation is asked once: give it no epochs"
        if self.keep_best and self.every is None and not self.at_stage_end:
            yield (
                f"keep_best needs evaluations during training: give every or at_stage_end, got "
                f"keep_best={self.keep_best!r} alone"
            )
        if not self.counts:
            yield f"counts must name at least one count, got {self.counts}"
        checks = (partial(token_grid, count, name="counts") for count in self.counts)
        yield from filter(None, map(reason_of, checks))


class TrainConfig(Strict):
    """A whole run.

    A run may be stopped and continued. Keys whose comment says so (*free*) may change in between:
    they say where a run writes, how fast it is and how much it logs, and change no number that is
    learned.
    """

    output: Path = free()
    """Folder of the run, relative to the working directory. *Free.*"""
    model: AnyModelConfig
    """The model and its processor. One with ``start`` and neither ``vision`` nor ``text`` is a
    converted stock model, see :class:`ConvertedModelConfig`."""
    data: WholeData
    """Training data of all stages that have none of their own."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """The stages, in order."""
    peft: PeftConfig | None = None
    """LoRA adapters in place of training a module whole; None for none."""
    encoder_warm_up: EncoderWarmUpConfig | None = None
    """Warm-up of the encoder before the first stage; None for none."""
    evaluation: EvaluationConfig | None = free(default=None)
    """Evaluation during and after training; None for none. *Free.*"""
    sample: SampleConfig | None = free(default=None)
    """The mean sample, for ``--dry-run`` alone; None to measure it on the data. *Free.*"""
    seed: Int = Field(default=0, ge=0, lt=2**32)
    """Seed of initial weights, the order of samples, and drawn counts."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Type of matrix products: "no" for float32. Weights and optimiser states are float32."""
    sharding: Literal["none", "full"] = free(default="none")
    """Share of the model on each process: all of it ("none", DDP) or a shard ("full", FSDP2).
    *Free.*"""
    gradient_checkpointing: bool = free(default=False)
    """Keep only the input of a layer and compute the rest again in the backward pass. *Free.*"""
    compile: bool = free(default=False)
    """Compile each layer with ``torch.compile``. *Free.*"""
    workers: Int = free(default=1, ge=0)
    """Data loader processes of each training process; 0 to load in the training process. *Free.*"""
    threads: Int | None = free(default=None, ge=1)
    """CPU threads of PyTorch; None for its default. *Free.*"""
    log_every: Int = free(default=10, ge=1)
    """Steps between two lines of ``metrics.jsonl``. *Free.*"""
    save_every: Int = free(default=200, ge=1)
    """Steps between two saved states. *Free.*"""
    keep_states: Int = free(default=2, ge=1)
    """Number of the newest states to keep. *Free.*"""
    max_broken_samples: Int = free(default=100, ge=0)
    """Most samples that cannot be read. They are skipped and named in ``broken_samples.json``;
    one more stops the run. *Free.*"""
    trackers: tuple[str, ...] = free(default=())
    """Trackers that get every logged line: names that accelerate knows ("tensorboard", "wandb").
    *Free.*"""
    peak_tflops: Float | None = free(default=None, gt=0, lt=float("inf"))
    """Peak of one process's device in 10^12 operations a second, for MFU; None for the data sheet
    of a known GPU. *Free.*"""

    def data_of(self, stage: StageConfig) -> DataConfig:
        """Return the data that ``stage`` is trained on."""
        return self.data if stage.data is None else stage.data

    @property
    def stage_data(self) -> tuple[DataConfig, ...]:
        """Data of all stages, each once."""
        return tuple(dict.fromkeys(self.data_of(stage) for stage in self.stages))

    def fingerprint(self) -> str:
        """Return as JSON all keys that the numbers of a run depend on, to compare two runs by."""
        free_keys = {
            key for key, field in type(self).model_fields.items() if field.json_schema_extra == FREE
        }
        if self.peft is None:
            free_keys.add("peft")  # runs of versions without the key continue
        return self.model_dump_json(exclude=free_keys)

    def contradictions(self) -> Iterator[str]:
        keeps_by_loss = self.evaluation is not None and self.evaluation.keep_best == "loss"
        if self.sharding != "none" and keeps_by_loss:
            yield (
                "keep_best of evaluation must be accuracy with sharding: full, whose model is put "
                "together to be evaluated, got 'loss'"
            )
        if self.peft is not None:
            yield from self._refused_for_adapters(self.peft)
        if isinstance(self.model, ConvertedModelConfig):
            yield from self._refused_for_conversions()
            return
        yield from self._pictures_that_do_not_fit(self.model)
        if self.encoder_warm_up is not None and self.model.start is not None:
            yield (
                "encoder_warm_up must not be given with model.start, whose encoder is trained, "
                f"got start={str(self.model.start)!r}"
            )
        if self.encoder_warm_up is not None and self.model.processor is None:
            names = " or ".join(FRESH_PARTS)
            yield f"encoder_warm_up needs model.processor: {names}, got None"

    def _refused_for_adapters(self, peft: PeftConfig) -> Iterator[str]:
        """Name what adapters cannot be trained with."""
        if self.sharding != "none":
            yield f"sharding must be none with peft, got {self.sharding!r}"
        if self.compile:
            yield f"compile must be false with peft, got {self.compile}"
        if self.encoder_warm_up is not None and "vision" in peft.modules:
            yield (
                "encoder_warm_up must not be given with peft of vision: adapters are for an "
                "encoder that has learned"
            )
        for name in peft.modules:
            if not any(name in stage.learning for stage in self.stages):
                yield (
                    f"peft of {name} needs a stage with a learning_rate for {name}, and there is "
                    "none"
                )

    def _refused_for_conversions(self) -> Iterator[str]:
        """Name what a converted stock model cannot be trained with."""
        of_conversion = f"for the conversion {str(self.model.start)!r}"
        if self.encoder_warm_up is not None:
            yield f"encoder_warm_up must not be given {of_conversion}, whose encoder is trained"
        if self.sharding != "none":
            yield (
                f"sharding must be none {of_conversion}: where stock models can be cut is known of "
                f"ours only, got {self.sharding!r}"
            )
        if self.compile:
            yield (
                f"compile must be false {of_conversion}: not all stock layers compile, got "
                f"{self.compile}"
            )
        for stage in self.stages:
            if stage.distillation:
                yield (
                    f"distillation of stage {stage.name!r} must be 0 {of_conversion}: `tokenflex "
                    f"convert --distill` learns its stock model's answers, got {stage.distillation}"
                )

    def _pictures_that_do_not_fit(self, model: ModelConfig) -> Iterator[str]:
        """Compare the pictures of a format with the image size of the encoder it brings."""
        name, vision = model.processor, model.vision.config
        if name not in FRESH_PARTS or vision is None:
            return
        used = [*self.stage_data, *([] if self.evaluation is None else [self.evaluation.data])]
        parts = [part for data in used for part in (data, *data.parts) if part.name == name]
        problems = (
            FRESH_PARTS[name].image_problem(part, vision.get("image_size")) for part in parts
        )
        yield from dict.fromkeys(filter(None, problems))

    @field_validator("sharding")
    @classmethod
    def _shards_take_no_loss_scaler(cls, sharding: str, before: ValidationInfo) -> str:
        if sharding == "full" and before.data.get("precision") == "fp16":
            raise ValueError("precision must be 'bf16' or 'no' with sharding: full, got 'fp16'")
        return sharding

    @field_validator("trackers")
    @classmethod
    def _trackers_are_known(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        check_names(trackers)
        if len({*trackers}) < len(trackers):
            raise ValueError(f"trackers must differ from each other, got {', '.join(trackers)}")
        return trackers


def load_config(
    path: str | Path, changes: Sequence[str] = (), *, plans: bool = False
) -> TrainConfig:
    """Read and check a YAML configuration; takes and raises what :func:`read_yaml` does.

    Where something is wrong, files that do not exist are named as well: those of a run, or with
    ``plans`` those of a dry run. By themselves they are the task of :func:`check_files`.
    """
    return read_yaml(
        path, TrainConfig, changes, needed=lambda values: _needed(values.get("sample"), plans=plans)
    )


def check_files(config: TrainConfig, *, plans: bool = False) -> None:
    """Raise ValueError that names all files which a run needs and which do not exist.

    Args:
        config: The configuration of the run.
        plans: The run is only planned, which needs fewer of them.
    """
    needed = _needed(config.sample, plans=plans)
    validated(config.model_dump(exclude_unset=True), TrainConfig, "configuration", needed=needed)


def _needed(sample: Any, *, plans: bool) -> set[str]:
    """Return the kinds of files that a run needs, or that a dry run with such a sample needs."""
    if not plans:
        return {DATA, PARTS, STARTS}
    return {PARTS} if sample else {DATA, PARTS}
