"""The training configuration: a YAML file, checked whole before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from tokenflex.counts import TokenCount, TokenCounts, token_grid, tokens_of
from tokenflex.data.steps import Draw
from tokenflex.formats import FRESH_PARTS
from tokenflex.positions import check_image_positions
from tokenflex.training.data_config import DataConfig
from tokenflex.training.strict import Float, Int, Strict, read_yaml, reason_of
from tokenflex.training.trackers import check_names

MAX_INT32 = 2**31 - 1


def _has_no_weight(data: DataConfig) -> DataConfig:
    if data.weight != 1:
        raise ValueError(
            f"weight is for the parts of a mixture: give data by itself none, got {data.weight}"
        )
    return data


WholeData = Annotated[DataConfig, AfterValidator(_has_no_weight)]


class PartConfig(Strict):
    """The vision encoder or language model: pretrained from ``path``, or fresh from ``config``.

    With both, the weights come from ``path`` and must be of the architecture that ``config``
    states; a dry run then needs neither the weights nor the path.
    """

    path: str | None = None
    config: dict[str, Any] | None = None

    def contradictions(self) -> Iterator[str]:
        if self.path is None and self.config is None:
            yield "give a path, a config or both, got neither"


class ModelConfig(Strict):
    """What is trained.

    ``processor`` names a data format that brings one, or is None to take the image processor of
    ``vision.path`` and the tokenizer of ``text.path``; ``image_token`` is added to the tokenizer if
    it is not there.
    Images are cut into at most ``max_tiles`` tiles, each at the sample's count.
    With ``start`` all weights come from that TokenFLEX checkpoint folder, whose parts must be those
    that are described here.
    ``projector_position`` and ``image_positions`` are those of :class:`tokenflex.TokenFlexConfig`.
    """

    vision: PartConfig
    text: PartConfig
    start: Path | None = None
    processor: Literal[(*FRESH_PARTS,)] | None = None  # type: ignore[valid-type]
    image_token: str = "<image>"
    pooling: Literal["adaptive", "resize"] = "adaptive"
    projector_hidden_width: Int | None = Field(default=None, ge=1)
    projector_position: Literal["normalized"] | None = None
    image_positions: Literal["sequential", "shared"] = "sequential"
    num_image_tokens: Int = 256
    max_tiles: Int = Field(default=1, ge=1)
    use_thumbnail: bool = False

    def contradictions(self) -> Iterator[str]:
        checks: tuple[Callable[[], object], ...] = (
            partial(token_grid, self.num_image_tokens, name="num_image_tokens"),
            partial(check_image_positions, self.image_positions, self.projector_position),
        )
        yield from filter(None, map(reason_of, checks))
        if self.processor is None and (self.vision.path is None or self.text.path is None):
            names = " or ".join(map(repr, FRESH_PARTS))
            yield (
                f"processor must be {names} unless vision and text both have a path, got "
                f"processor={self.processor!r}"
            )
        if self.processor is not None and self.max_tiles > 1:
            yield (f"max_tiles must be 1 with processor {self.processor!r}, got {self.max_tiles}")
        if self.processor is not None and self.image_token != "<image>":
            yield (
                f"image_token must not be given with processor {self.processor!r}, which has its "
                f"own, got {self.image_token!r}"
            )
        if self.use_thumbnail and self.max_tiles == 1:
            yield "use_thumbnail needs max_tiles above 1, got max_tiles=1"


class EncoderWarmUpConfig(Strict):
    """The warm-up of a fresh encoder, in place of pretrained weights."""

    steps: Int = Field(ge=1)
    batch_size: Int = Field(default=32, ge=1)
    learning_rate: Float = Field(default=3e-3, gt=0)


class StageConfig(Strict):
    """One stage of training, on ``data`` or, without it, on that of the whole run.

    ``learning_rate`` names the modules that learn; a module that is not named is frozen.
    It lasts ``steps`` optimiser steps, or until it has seen ``tokens`` rows of the language model,
    text and vision: it then ends with the first step that reaches them, and the schedule follows
    the rows, not the steps. The learning rate rises over ``warmup_steps`` steps, or over
    ``warmup_share`` of the stage.
    ``counts`` and ``weights`` are the token counts, perfect squares or [height, width] pairs, and
    their odds; ``draw`` says whether a count is drawn for each "sample", as in the paper, or once
    for a "step", or every sample is shown at "all" counts, each a sample of its own in
    ``batch_size``. Conversations of more than ``max_length`` rows, text and vision, are cut off.
    The ``batch_size`` samples of a step, over all processes, are dealt into forward passes of equal
    cost that hold at most ``max_tokens`` rows and ``max_tiles`` tiles each.
    ``loss`` says how answer tokens weigh: all the same ("token"), or by one over the square root of
    their answer's length ("square"), as the released model was trained.
    With ``distillation`` the loss of an answer token is its cross entropy plus so many times
    KL(teacher || student), where the teacher is the same model at the same step, without a
    gradient, shown the sample at the largest count that has odds.
    """

    name: str
    steps: Int | None = Field(default=None, ge=1)
    tokens: Float | None = Field(default=None, gt=0, lt=float("inf"))
    batch_size: Int = Field(ge=1)
    learning_rate: dict[Literal["vision", "projector", "text"], Float]
    data: WholeData | None = None
    counts: tuple[TokenCount, ...] = (64, 144, 256)
    weights: tuple[Float, ...] = (0.2, 0.3, 0.5)
    draw: Draw = "sample"
    max_tokens: Int | None = Field(default=None, ge=1, le=MAX_INT32)
    max_tiles: Int | None = Field(default=None, ge=1, le=MAX_INT32)
    max_length: Int | None = Field(default=None, ge=2)
    loss: Literal["token", "square"] = "token"
    distillation: Float = Field(default=0.0, ge=0, lt=float("inf"))
    warmup_steps: Int = Field(default=0, ge=0)
    warmup_share: Float = Field(default=0.0, ge=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: Float = Field(default=0.02, ge=0, lt=float("inf"))
    betas: tuple[Float, Float] = (0.9, 0.98)
    max_grad_norm: Float = Field(default=1.0, gt=0)

    @property
    def learning(self) -> tuple[str, ...]:
        """The modules that learn."""
        return tuple(name for name, rate in self.learning_rate.items() if rate)

    @property
    def drawn_counts(self) -> tuple[TokenCount, ...]:
        """The counts that have odds."""
        return tuple(n for n, odds in zip(self.counts, self.weights, strict=True) if odds)

    @property
    def teacher_count(self) -> TokenCount | None:
        """The count that the teacher of ``distillation`` sees; None where there is none."""
        return max(self.drawn_counts, key=tokens_of) if self.distillation else None

    @property
    def budget(self) -> float:
        """How long the stage is: in tokens where it has ``tokens``, else in steps."""
        budget = self.steps if self.tokens is None else self.tokens
        assert budget is not None  # checked below
        return budget

    @property
    def samples_read(self) -> int:
        """Different samples a step; with ``draw`` "all" each is shown at every count."""
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
        # Of counts that are right, so that their number and the weights are looked at in any case.
        wrong = reason_of(lambda: TokenCounts((1,) * len(self.counts), self.weights))
        if wrong is not None:
            yield wrong


class SampleConfig(Strict):
    """The mean sample, for a dry run where the data is not at hand.

    ``text_tokens`` are all but images, ``answer_tokens`` those of them that are learned, ``tiles``
    what its images are cut into, ``shown_tiles`` those that stand in the language model's rows:
    more than ``tiles`` where conversations each show them instead of sharing them.
    """

    text_tokens: Float = Field(ge=1)
    answer_tokens: Float = Field(ge=1)
    tiles: Float = Field(ge=0)
    shown_tiles: Float | None = Field(default=None, ge=0)

    @property
    def shown(self) -> float:
        """Tiles that stand in the language model's rows."""
        return self.tiles if self.shown_tiles is None else self.shown_tiles

    def contradictions(self) -> Iterator[str]:
        if self.answer_tokens > self.text_tokens:
            yield (
                f"answer_tokens must not exceed text_tokens, got {self.answer_tokens} and "
                f"{self.text_tokens}"
            )


class EvaluationConfig(Strict):
    """The data set and the counts to report accuracy at, after training and, if asked, during it.

    During training the first ``samples`` of the data set are asked, ``every`` so many steps of a
    stage and, with ``at_stage_end``, after its last; after training all of them are.
    """

    data: WholeData
    counts: tuple[TokenCount, ...]
    batch_size: Int = Field(default=64, ge=1)
    every: Int | None = Field(default=None, ge=1)
    at_stage_end: bool = False
    samples: Int = Field(default=256, ge=1)

    def contradictions(self) -> Iterator[str]:
        if any(one.streaming for one in (self.data, *self.data.parts)):
            yield "data of an evaluation must not be streaming, got streaming=True"
        if any(one.epochs is not None for one in (self.data, *self.data.parts)):
            yield "data of an evaluation is asked once: give it no epochs"
        if not self.counts:
            yield f"counts must name at least one count, got {self.counts}"
        checks = (partial(token_grid, count, name="counts") for count in self.counts)
        yield from filter(None, map(reason_of, checks))


class TrainConfig(Strict):
    """A whole run. ``output`` is relative to the working directory.

    ``sample`` is for ``--dry-run`` alone.
    Of several processes each holds the whole model (``sharding: none``, DDP) or a share of it
    (``full``, FSDP2). ``gradient_checkpointing`` keeps of a layer its input alone and computes the
    rest again in backward; ``compile`` has torch.compile compile each layer. None of the three
    changes what is learned, and all may change between two halves of a run.
    A state to resume from is saved every ``save_every`` steps; the last ``keep_states`` are kept.
    Samples that cannot be read are named in ``broken_samples.json`` and skipped, at most
    ``max_broken_samples`` of them.
    ``trackers`` are told what ``metrics.jsonl`` is told: names that accelerate knows
    ("tensorboard", "wandb", ...). ``peak_tflops`` is what a process's device can do at most, for
    the share that is done of it (MFU); known GPUs have their data sheet's.
    """

    output: Path
    model: ModelConfig
    data: WholeData
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    encoder_warm_up: EncoderWarmUpConfig | None = None
    evaluation: EvaluationConfig | None = None
    sample: SampleConfig | None = None
    seed: Int = Field(default=0, ge=0, lt=2**32)
    precision: Literal["no", "bf16", "fp16"] = "no"
    sharding: Literal["none", "full"] = "none"
    gradient_checkpointing: bool = False
    compile: bool = False
    workers: Int = Field(default=1, ge=0)
    threads: Int | None = Field(default=None, ge=1)
    log_every: Int = Field(default=10, ge=1)
    save_every: Int = Field(default=200, ge=1)
    keep_states: Int = Field(default=2, ge=1)
    max_broken_samples: Int = Field(default=100, ge=0)
    trackers: tuple[str, ...] = ()
    peak_tflops: Float | None = Field(default=None, gt=0, lt=float("inf"))

    def data_of(self, stage: StageConfig) -> DataConfig:
        """What ``stage`` is trained on."""
        return self.data if stage.data is None else stage.data

    def contradictions(self) -> Iterator[str]:
        yield from self._pictures_that_do_not_fit()
        if self.encoder_warm_up is not None and self.model.start is not None:
            yield (
                "encoder_warm_up must not be given with model.start, whose encoder is trained, "
                f"got start={str(self.model.start)!r}"
            )
        if self.encoder_warm_up is not None and self.model.processor is None:
            names = " or ".join(FRESH_PARTS)
            yield f"encoder_warm_up needs model.processor: {names}, got None"

    def _pictures_that_do_not_fit(self) -> Iterator[str]:
        """Compare the pictures of a format with the image size of the encoder it brings."""
        name, vision = self.model.processor, self.model.vision.config
        if name not in FRESH_PARTS or vision is None:
            return
        used = [self.data_of(stage) for stage in self.stages]
        used += [] if self.evaluation is None else [self.evaluation.data]
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


def load_config(path: str | Path) -> TrainConfig:
    """Read and check a YAML configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, gives a key twice, has an unknown one or a value that is not
            allowed; one line names the key, what came and what was expected.
    """
    return read_yaml(path, TrainConfig)
