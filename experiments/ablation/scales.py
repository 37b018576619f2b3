"""Scales of an ablation: the canvas, the model, and the budget of every regime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokenflex.counts import TokenCount
from tokenflex.digits.canvas import CELL_PIXELS


@dataclass(frozen=True)
class Scale:
    """Task, model and budget.

    Attributes:
        name: Name in the report.
        cells: Cells of 8 pixels along a side of a picture.
        counts: Trained counts: small, middle, large.
        unseen: Counts that no regime trains, numbers or (height, width) grids.
        width, layers, heads: Sizes of the encoder and the language model.
        vocabulary: Rows of the language model's embedding.
        initializer_range: Initializer range of the language model.
        warm_up_steps, warm_up_batch: Steps and batch size of the encoder's warm-up.
        start_steps: Steps of the alignment before all regimes, at the largest count.
        steps: Steps of each regime.
        batch_size: Images shown per step, a multiple of the three counts.
        learning_rate: Highest learning rate.
        evaluated: Canvases of the test split that are evaluated, with eight questions each.
        precision: Precision of training on a GPU; a CPU trains in float32.
        seeds: Default number of seeds.
        regimes: Trained regimes of the suite `suite`; all if empty.
        suite: The suite of which `regimes` are a part.
        shared_start: Whether regimes on limited data continue from the start on fresh canvases, in
            place of one on their own.
        task: Name of the data and of the processor: "digits" or "reading".
        patch_size: Pixels of the encoder's patches.
        max_tiles: Most tiles of a picture.
        warm_up_learning_rate: Highest learning rate of the encoder's warm-up.
        encoder_learning_rate: Highest learning rate of the encoder in each regime, which is frozen
            in the alignment; None to train it as the other modules, in the alignment too.
        questions: Questions of a training sample; None for the data's own number.
    """

    name: str
    cells: int
    counts: tuple[int, int, int]
    unseen: tuple[TokenCount, ...]
    width: int
    layers: int
    heads: int
    vocabulary: int
    initializer_range: float
    warm_up_steps: int
    warm_up_batch: int
    start_steps: int
    steps: int
    batch_size: int
    learning_rate: float
    evaluated: int
    precision: str = "no"
    seeds: int = 3
    regimes: tuple[str, ...] = ()
    suite: str = "paper"
    shared_start: bool = False
    task: str = "digits"
    patch_size: int = 4
    max_tiles: int = 1
    warm_up_learning_rate: float = 0.003
    encoder_learning_rate: float | None = None
    questions: int | None = None

    @property
    def asked(self) -> list[int | list[int]]:
        """Every evaluated count, in the form of a configuration."""
        unseen = [count if isinstance(count, int) else [*count] for count in self.unseen]
        return [*self.counts, *unseen]

    @property
    def patches_per_side(self) -> int:
        """Number of the encoder's patches along a side of a picture."""
        return self.cells * CELL_PIXELS // self.patch_size

    @property
    def data(self) -> dict[str, Any]:
        """The keys of the configuration's ``data`` but its split."""
        return {"name": self.task, **({"cells": self.cells} if self.task == "digits" else {})}

    @property
    def training_data(self) -> dict[str, Any]:
        """The keys of the configuration's ``data``."""
        questions = {} if self.questions is None else {"questions": self.questions}
        return {**self.data, "split": "train", **questions}

    def model(self) -> dict[str, Any]:
        """Return the configuration's ``model``: small SigLIP and Qwen2 models of transformers."""
        part = {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }
        return {
            "processor": self.task,
            "num_image_tokens": self.counts[-1],
            **({"max_tiles": self.max_tiles} if self.max_tiles > 1 else {}),
            "projector_hidden_width": 2 * self.width,
            "vision": {
                "config": {
                    "model_type": "siglip_vision_model",
                    **part,
                    "intermediate_size": 3 * self.width,
                    "image_size": self.cells * CELL_PIXELS,
                    "patch_size": self.patch_size,
                    "vision_use_head": False,
                }
            },
            "text": {
                "config": {
                    "model_type": "qwen2",
                    "vocab_size": self.vocabulary,
                    **part,
                    "intermediate_size": 2 * self.width,
                    "num_key_value_heads": self.heads // 2,
                    "max_position_embeddings": 512,
                    "tie_word_embeddings": True,
                    "initializer_range": self.initializer_range,
                }
            },
        }

    def stage(self, name: str, steps: int, **changes: Any) -> dict[str, Any]:
        """Return a stage that trains all modules."""
        rates = dict.fromkeys(("vision", "projector", "text"), self.learning_rate)
        if self.encoder_learning_rate is not None:
            rates["vision"] = self.encoder_learning_rate
        return {
            "name": name,
            "steps": steps,
            "batch_size": self.batch_size,
            "learning_rate": rates,
            "warmup_steps": min(50, steps // 10),
            **changes,
        }

    def alignment(self, **changes: Any) -> dict[str, Any]:
        """Return the stage before all regimes."""
        stage = self.stage("alignment", **{"steps": self.start_steps, **changes})
        if self.encoder_learning_rate is not None:
            del stage["learning_rate"]["vision"]
        return stage


SMALL = Scale(
    name="small",
    cells=4,
    counts=(4, 9, 16),
    unseen=(1, 25, 36, (2, 3), (3, 2), (3, 4), (4, 3), (2, 4)),
    width=64,
    layers=2,
    heads=4,
    vocabulary=64,
    initializer_range=0.08,
    warm_up_steps=300,
    warm_up_batch=32,
    start_steps=500,
    steps=800,
    batch_size=18,
    learning_rate=2e-3,
    evaluated=1024,
)

# For the suite `limited`, whose many runs are evaluated at the trained counts alone.
LIMITED = replace(SMALL, name="limited", unseen=(), steps=400, evaluated=512)

# For the suite `extremes`: one token, and up to a token for each patch.
EXTREMES = replace(SMALL, name="extremes", unseen=(1, 36, 64))

# For CI: one seed, and as few steps as the checks need.
QUICK = replace(
    SMALL,
    name="quick",
    unseen=(),
    warm_up_steps=200,
    start_steps=400,
    steps=180,
    evaluated=256,
    seeds=1,
    regimes=("fixed-large", "stochastic"),
)

# The same for the suite `limited`, at the smallest count, from the start of `quick` in the same
# folder: a start on the limited canvases themselves would double the time.
QUICK_LIMITED = replace(
    QUICK,
    name="quick-limited",
    regimes=tuple(
        f"{name}-{data}-x1"
        for data in ("300", "fresh")
        for name in ("fixed-small-positions", "positions")
    ),
    suite="limited",
    shared_start=True,
)

# For a GPU; not measured yet.
LARGE = Scale(
    name="large",
    cells=8,
    counts=(16, 36, 64),
    unseen=(4, 25, 49, 100, (4, 6), (6, 4), (6, 8), (8, 6), (4, 8)),
    width=256,
    layers=6,
    heads=4,
    vocabulary=128,
    initializer_range=0.04,
    warm_up_steps=300,
    warm_up_batch=128,
    start_steps=500,
    steps=1000,
    batch_size=510,
    learning_rate=1e-3,
    evaluated=2048,
    precision="bf16",
    seeds=1,
)

# The second task, with the learning rates and questions of configs/reading.yaml and half of its
# steps. Odds and ways to mix counts are
# compared on the first.
READING = replace(
    SMALL,
    name="reading",
    task="reading",
    cells=12,
    patch_size=12,
    max_tiles=2,
    counts=(16, 36, 64),
    unseen=(4, 25, 49, (4, 8), (8, 4)),
    width=96,
    vocabulary=128,
    warm_up_steps=3000,
    warm_up_batch=8,
    warm_up_learning_rate=2e-3,
    start_steps=1200,
    steps=1500,
    batch_size=9,
    learning_rate=2e-3,
    encoder_learning_rate=2e-4,
    questions=20,
    evaluated=512,
    regimes=(
        "fixed-small",
        "fixed-middle",
        "fixed-large",
        "stochastic",
        "positions",
        "fixed-small-positions",
        "fixed-middle-positions",
        "fixed-large-positions",
    ),
)

SCALES = {
    scale.name: scale for scale in (SMALL, LARGE, LIMITED, EXTREMES, QUICK, QUICK_LIMITED, READING)
}
