"""Regimes: ways to choose the vision-token count in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

from experiments.ablation.scales import Scale

PAPER_ODDS = (0.2, 0.3, 0.5)
POSITIONS = {"projector_position": "normalized", "image_positions": "shared"}
SPREAD = 0.3
"""Share of the images at grids that are not evaluated."""
EXTRA_SHARE = 0.1
"""Share of the images at the grids that are added to "other grids"."""
LONGER = 2.5
"""Factor of the steps with which one model sees the vision tokens of three specialists."""
SIZES = ("small", "middle", "large")


@dataclass(frozen=True)
class Budget:
    """Data and steps of a comparison on limited data.

    Attributes:
        canvases: Canvases of the training data, seen again and again; None for fresh ones.
        factor: Steps, as a multiple of the scale's.
    """

    canvases: int | None
    factor: int

    @property
    def name(self) -> str:
        """Suffix of the regimes' names."""
        return f"{self.canvases or 'fresh'}-x{self.factor}"

    @property
    def data(self) -> str:
        """Name of the data in titles."""
        return "fresh canvases" if self.canvases is None else f"{self.canvases:,} canvases"

    @property
    def title(self) -> str:
        """Suffix of the regimes' titles."""
        return f"{self.data}, {self.factor} x the steps"


BUDGETS = tuple(
    Budget(canvases, factor) for factor in (1, 4) for canvases in (300, 1200, 5000, None)
)


@dataclass(frozen=True)
class Start:
    """Training before the regimes of a seed: the encoder's warm-up, then an alignment.

    Attributes:
        name: Name of the folders, and in ``report.json``.
        title: Name in tables.
        stage: Keys of the alignment (:class:`tokenflex.training.config.StageConfig`).
        model: Keys of the model (:class:`tokenflex.training.config.ModelConfig`) that differ from
            the scale's.
        canvases: Canvases of the training data, of the alignment and of all regimes that start
            here; None for the data set's own number, more than any regime sees.
    """

    name: str
    title: str
    stage: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    canvases: int | None = None


@dataclass(frozen=True)
class Regime:
    """One way to train, as its changes to a common configuration.

    Attributes:
        name: Name of the folders, and in ``report.json``.
        title: Name in tables and figures.
        start: Training before the regime.
        stage: Keys of the stage (:class:`tokenflex.training.config.StageConfig`).
        model: Keys of the model (:class:`tokenflex.training.config.ModelConfig`) that differ from
            the start's.
        canvases: Canvases of the training data; None for as many as the start has.
    """

    name: str
    title: str
    start: Start
    stage: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    canvases: int | None = None

    def but(
        self,
        name: str,
        title: str,
        *,
        start: Start | None = None,
        stage: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        canvases: int | None = None,
    ) -> Regime:
        """Return the regime with changes, whose name and title are added to its own."""
        return Regime(
            f"{self.name}-{name}",
            f"{self.title}, {title}",
            start or self.start,
            {**self.stage, **(stage or {})},
            {**self.model, **(model or {})},
            canvases or self.canvases,
        )


def regimes(scale: Scale) -> dict[str, Regime]:
    """Return every regime at the three counts of ``scale``, by name."""
    of_paper = _of_paper(scale)
    any_count = _any_count(scale, of_paper["stochastic"])
    closing = _closing_the_gap(scale, {**of_paper, **any_count})
    fewest = _at_the_fewest(scale, any_count)
    known = {**of_paper, **any_count, **closing, **fewest}
    return {**known, **_on_limited_data(scale, known)}


def _of_paper(scale: Scale) -> dict[str, Regime]:
    start = _start_at(scale.counts[-1])
    every = [*scale.counts]
    return _by_name(
        *(
            Regime(f"fixed-{size}", f"fixed {count}", start, _at(count))
            for size, count in zip(SIZES, scale.counts, strict=True)
        ),
        *(
            Regime(name, title, start, {"counts": every, "weights": [*odds], **stage})
            for name, title, odds, stage in (
                ("stochastic", "stochastic 2:3:5", PAPER_ODDS, {}),
                ("odds-1-1-1", "stochastic 1:1:1", (1.0, 1.0, 1.0), {}),
                ("odds-5-3-2", "stochastic 5:3:2", (0.5, 0.3, 0.2), {}),
                # One count for a batch: what MQT does on each rank, and the released code asserts.
                ("per-step", "one count a step, 2:3:5", PAPER_ODDS, {"draw": "step"}),
                # Every image at every count: what M3 does.
                ("all-counts", "every image at all counts", (1.0, 1.0, 1.0), {"draw": "all"}),
            )
        ),
    )


def _any_count(scale: Scale, stochastic: Regime) -> dict[str, Regime]:
    """Return the regimes for counts that were not trained, and each of their parts alone."""
    grids = other_grids(scale.counts)
    spread = {
        "counts": [*scale.counts, *map(list, grids)],
        "weights": [
            *((1 - SPREAD) * odds for odds in PAPER_ODDS),
            *[SPREAD / len(grids)] * len(grids),
        ],
    }
    at_projector = {"projector_position": POSITIONS["projector_position"]}
    positions = replace(stochastic, name="positions", title="2:3:5, positions", model=POSITIONS)
    # Shared text positions need the projector's, or an image's tokens could not be told apart.
    plain = replace(stochastic, title="2:3:5")
    projector = plain.but("projector", "positions at the projector alone", model=at_projector)
    every_part = positions.but("spread", "other grids", stage=spread)
    return _by_name(
        positions,
        every_part,
        *_up_to_the_patches(scale, every_part),
        plain.but("spread", "other grids alone", stage=spread),
        projector,
        projector.but("spread", "other grids", stage=spread),
    )


def _up_to_the_patches(scale: Scale, spread: Regime) -> list[Regime]:
    """Return the regime whose other grids reach the encoder's; none if the large count does.

    A token of a finer grid is pooled from fewer patches than any that was trained.
    """
    side = scale.patches_per_side
    if isqrt(scale.counts[-1]) >= side:
        return []
    middle = (isqrt(scale.counts[-1]) + side) // 2
    finer = [[middle, side], [side, middle]]
    title = f"{100 * EXTRA_SHARE:g} % at {_named(finer)}"
    return [spread.but("finer", title, stage=_with_more(spread, finer))]


def _at_the_fewest(scale: Scale, any_count: Mapping[str, Regime]) -> dict[str, Regime]:
    """Return the specialists for fewer tokens than the small count, and one model near them."""
    fewest, spread = fewest_count(scale.counts[0]), any_count["positions-spread"]
    start = _start_at(scale.counts[-1])
    specialist = Regime("fixed-fewest", f"fixed {fewest}", start, _at(fewest)).but(
        "positions", "positions", model=POSITIONS
    )
    narrowest = [[*grid] for grid in other_grids(scale.counts)[:2]]
    share = f"{100 * EXTRA_SHARE:g} %"
    near = spread.but("fewest", f"{share} at {fewest}", stage=_with_more(spread, [fewest]))
    return _by_name(
        specialist,
        specialist.but("ready", "started from all counts", start=_ready_start(scale, any_count)),
        near,
        near.but("longer", f"{LONGER:g} x the steps", stage=_longer(scale)),
        spread.but(
            "narrow",
            f"{share} more at {_named(narrowest)}",
            stage=_with_more(spread, narrowest),
        ),
    )


def _ready_start(scale: Scale, any_count: Mapping[str, Regime]) -> Start:
    """Return a start that can read already: longer training, at all counts and with positions.

    A specialist that begins with a single token learns to count and hardly to read.
    """
    positions = any_count["positions"]
    stage = {**positions.stage, "steps": scale.start_steps + 2 * scale.steps}
    return Start("start-ready", f"the start: {positions.title}", stage, POSITIONS)


def _named(grids: Sequence[Sequence[int]]) -> str:
    """Return "1 x 2, 2 x 1" for two grids."""
    return ", ".join(f"{height} x {width}" for height, width in grids)


def _with_more(regime: Regime, grids: Sequence[int | Sequence[int]]) -> dict[str, Any]:
    """Return counts and weights of ``regime`` with ``EXTRA_SHARE`` of the images at ``grids``."""
    counts, weights = regime.stage["counts"], regime.stage["weights"]
    share_of = {
        str(count): (1 - EXTRA_SHARE) * weight
        for count, weight in zip(counts, weights, strict=True)
    }
    for grid in grids:
        share_of[str(grid)] = share_of.get(str(grid), 0) + EXTRA_SHARE / len(grids)
    every = [*counts, *(grid for grid in grids if grid not in counts)]
    return {"counts": every, "weights": [share_of[str(count)] for count in every]}


def _closing_the_gap(scale: Scale, known: Mapping[str, Regime]) -> dict[str, Regime]:
    """Return the regimes of :data:`experiments.ablation.suites.LEVERS` and their specialists."""
    positions = known["positions"]
    specialists = [
        known[f"fixed-{size}"].but("positions", "positions", model=POSITIONS) for size in SIZES
    ]
    longer = _longer(scale)
    wide = replace(scale, width=2 * scale.width, initializer_range=scale.initializer_range / 2**0.5)
    base = _start_at(scale.counts[-1])
    wide_start = Start(
        f"{base.name}-wide", f"{base.title}, twice as wide", base.stage, wide.model()
    )
    closing = [*specialists]
    for name in ("odds-1-1-1", "odds-5-3-2"):
        closing.append(known[name].but("positions", "positions", model=POSITIONS))
    closing.append(positions.but("distilled", "KL to its largest", stage={"distillation": 1.0}))
    for regime in (positions, *specialists[:2]):  # at the largest count there is no gap
        closing.append(regime.but("longer", f"{LONGER:g} x the steps", stage=longer))
        closing.append(regime.but("wide", "twice as wide", start=wide_start))
    for specialist, size, count in zip(specialists[:2], SIZES, scale.counts, strict=False):
        start = _start_at(count, f"-{size}")
        closing.append(specialist.but("own-start", f"aligned at {count}", start=start))
    return _by_name(*closing)


def _on_limited_data(scale: Scale, known: Mapping[str, Regime]) -> dict[str, Regime]:
    """Return one model and three specialists, with positions and without, for each budget."""
    limited = []
    for budget in BUDGETS:
        start = _start_at(scale.counts[-1])
        if budget.canvases is not None and not scale.shared_start:
            start = replace(start, canvases=budget.canvases)
            title = f"{start.title}, {budget.data}"
            start = replace(start, name=f"{start.name}-{budget.canvases}", title=title)
        stage = {"steps": round(budget.factor * scale.steps)}
        for positions in ("", "-positions"):
            general = "positions" if positions else "stochastic"
            for name in (general, *(f"fixed-{size}{positions}" for size in SIZES)):
                regime = known[name].but(
                    budget.name, budget.title, start=start, stage=stage, canvases=budget.canvases
                )
                limited.append(regime)
    return _by_name(*limited)


def _longer(scale: Scale) -> dict[str, Any]:
    return {"steps": round(LONGER * scale.steps)}


def _at(count: int) -> dict[str, Any]:
    return {"counts": [count], "weights": [1.0]}


def _start_at(count: int, suffix: str = "") -> Start:
    return Start(f"start{suffix}", f"the start: {count} alone, before the regimes", _at(count))


def _by_name(*regimes: Regime) -> dict[str, Regime]:
    return {regime.name: regime for regime in regimes}


def fewest_count(small: int) -> int:
    """Return a quarter of the small count, which no regime for other counts trains."""
    return small // 4


def other_grids(counts: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Return eight grids around the trained squares that no scale evaluates.

    For 4, 9 and 16 they are 1 x 2, 2 x 5, 3 x 5 and 4 x 5, and the same with sides exchanged.
    """
    small, middle, large = map(isqrt, counts)
    pairs = [(small - 1, small), *((side, large + 1) for side in (small, middle, large))]
    return [grid for height, width in pairs for grid in ((height, width), (width, height))]
