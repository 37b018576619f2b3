"""Page and picture of :mod:`experiments.speed.seconds`, from its CSV and from reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.results import Row
from experiments.ablation.results import spread_of
from experiments.ablation.suites import POSITIONED as POSITIONED_SPECIALISTS
from experiments.ablation.suites import SPECIALISTS
from experiments.ablation.tables import markdown_table, points
from tokenflex.files import read_json

MODEL = "model"
PLAIN, POSITIONED = "as in the paper", "with positions"
SHAPES = {
    PLAIN: ("stochastic", SPECIALISTS),
    POSITIONED: ("positions", POSITIONED_SPECIALISTS),
}
"""Names of the one model and of the specialists of each measured shape."""
COLOURS = {PLAIN: "#1f4e79", POSITIONED: "#4c9f70"}
BASELINE_COLOURS = ("#e07b39", "#b5495b", "#7a6bb0", "#c2a03a", "#8c6d5a")


@dataclass(frozen=True)
class Reports:
    """Accuracies to set beside seconds.

    Attributes:
        counts: The three counts.
        seeds: Seeds of the regimes.
        regimes: By name, rows of :func:`experiments.ablation.results.collect`, without the starts.
        budget: The budget whose suffix the names have lost; empty for others.
        baselines: Accuracy by method and count over the evaluated models, their own at ``MODEL``.
    """

    counts: tuple[str, ...]
    seeds: int
    regimes: dict[str, Any]
    budget: str
    baselines: dict[str, dict[str, dict[str, Any]]]

    @classmethod
    def read(cls, ablations: Sequence[Path], baselines: Sequence[Path], budget: str) -> Reports:
        """Read reports of ``tokenflex ablate`` and of ``tokenflex evaluate --baselines``.

        Raises:
            ValueError: A file is no such report, or has no regime of the budget.
        """
        reports = [_read(path, ("regimes", "counts", "seeds")) for path in ablations]
        rows = {name: row for report in reports for name, row in report["regimes"].items()}
        end = f"-{budget}" if budget else ""
        regimes = {
            name.removesuffix(end): row
            for name, row in rows.items()
            if not row["is_start"] and name.endswith(end)
        }
        if not regimes:
            ends = sorted({"-".join(name.split("-")[-2:]) for name in rows})
            raise ValueError(f"budget must be one of the report's, {', '.join(ends)}, got {budget}")
        evaluated = [_read(path, ("accuracy", "baselines")) for path in baselines]
        of_methods = [
            {MODEL: report["accuracy"], **report["baselines"]["accuracy"]} for report in evaluated
        ]
        return cls(
            counts=tuple(reports[0]["counts"]),
            seeds=len(reports[0]["seeds"]),
            regimes=regimes,
            budget=budget,
            baselines={
                method: {
                    count: spread_of([of_method[method][count] for of_method in of_methods])
                    for count in by_count
                }
                for method, by_count in of_methods[0].items()
            },
        )

    def shapes(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Yield the shapes whose one model and specialists are all there, with their names."""
        for shape, (general, specialists) in SHAPES.items():
            if {general, *specialists} <= {*self.regimes}:
                yield shape, general, specialists

    def at_own(self, specialists: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the accuracy of each specialist at its own count."""
        return {
            count: self.regimes[name]["accuracy"][count]
            for count, name in zip(self.counts, specialists, strict=True)
        }


def _read(path: Path, keys: Sequence[str]) -> Any:
    report = read_json(path, "report file")
    missing = [key for key in keys if not isinstance(report, dict) or key not in report]
    if missing:
        raise ValueError(f"report file {path} must have {', '.join(missing)}, and has not")
    return report


class Seconds:
    """The rows of a CSV of :mod:`experiments.speed.seconds`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.machine = rows[0]
        self.answers = {
            (row["name"], row["way"], row["vision_tokens"], int(row["batch"])): row
            for row in rows
            if row["measured"] == "answer"
        }
        self.batches = sorted({batch for *_, batch in self.answers})
        self._steps = {
            row["name"]: float(row["step_processor_ms"])
            for row in rows
            if row["measured"] == "training"
        }

    def answer(self, name: str, shape: str, way: str, count: str, batch: int) -> float:
        """Return an answer's milliseconds; ``name`` is "first_token" or "answer"."""
        row = self.answers[shape, way, count, batch]
        return float(row[f"{name}_processor_ms"]) / batch

    def step(self, regime: str) -> float:
        """Return the milliseconds of a training step.

        Raises:
            ValueError: The regime was not measured.
        """
        if regime not in self._steps:
            raise ValueError(f"the CSV has no training step of {regime}: measure again")
        return self._steps[regime]

    def training(self, reports: Reports, regime: str) -> float:
        """Return the seconds of a regime's own training, without its start."""
        return self.step(regime) * reports.regimes[regime]["steps"] / 1000

    def waiting(self) -> float:
        """Return how many times the processor's time an answer took by the clock, the median."""
        return median(
            float(row["answer_ms"]) / float(row["answer_processor_ms"])
            for row in self.answers.values()
        )


# ---- the page


def format_page(reports: Reports, rows: Sequence[Row], picture: str) -> str:
    """Return the page of rows as they stand in the CSV."""
    seconds = Seconds(rows)
    machine = seconds.machine
    budget = f", on the budget {reports.budget} of the suite `limited`" if reports.budget else ""
    sections = [
        "# Accuracy against seconds",
        f"Models of the ablation's small scale on one thread of {machine['cores']} cores of an "
        f"{machine['cpu']}, load {machine['load']}, commit {machine['commit']}. Times are medians "
        "of the processor's milliseconds; all calls took turns in one process. By the clock an "
        f"answer took {seconds.waiting():.2f} times its processor's time. Accuracies in percent "
        f"are of the digits task, {reports.seeds} seed{'s' * (reports.seeds > 1)}{budget}, and "
        "were not measured here.",
        f"![Accuracy against seconds]({picture})",
        "## Answers",
        "From the pixels of a picture to the first token, and to the end of an answer of "
        "one word and its end; a batch has one question about each of its pictures, and its time "
        "is divided by them. A specialist has the shape of the one model, and so its time.",
        markdown_table(
            _answer_head(seconds, "one model", "specialist"), _answers(reports, seconds)
        ),
        "\n".join(f"- {line}" for line in _count_lines(reports, seconds)),
        "## Baselines",
        "The same for the baselines of `tokenflex evaluate --baselines`, timed on the shape "
        "without positions. Their accuracies are those of the demo's model, which has positions "
        "([report](../baselines/report.md)); the rows `model` are its own tokens. `resized` "
        "pictures are resized from the encoder's pixels within the time; the other methods run the "
        "encoder and the projector at the largest count first.",
        markdown_table(_answer_head(seconds, "accuracy"), _baselines(reports, seconds)),
        "\n".join(f"- {line}" for line in _baseline_lines(reports, seconds)),
        "## Training",
        "Of a regime's own stage, after the common start. A step draws its canvases too.",
        _training_table(reports, seconds),
        "\n".join(f"- {line}" for line in _training_lines(reports, seconds)),
    ]
    return "\n\n".join(sections) + "\n"


def _answer_head(seconds: Seconds, *accuracies: str) -> list[str]:
    times = [
        f"{name}, ms, {batch} at a time"
        for batch in seconds.batches
        for name in ("first token", "answer")
    ]
    return ["", "vision tokens", *times, *accuracies]


def _times(seconds: Seconds, shape: str, way: str, count: str) -> list[str]:
    return [
        f"{seconds.answer(name, shape, way, count, batch):.2f}"
        for batch in seconds.batches
        for name in ("first_token", "answer")
    ]


def _answers(reports: Reports, seconds: Seconds) -> list[list[str]]:
    return [
        [
            shape,
            count,
            *_times(seconds, shape, MODEL, count),
            points(reports.regimes[general]["accuracy"][count]),
            points(reports.at_own(specialists)[count]),
        ]
        for shape, general, specialists in reports.shapes()
        for count in reports.counts
    ]


def _count_lines(reports: Reports, seconds: Seconds) -> Iterator[str]:
    """Say what the largest count costs over the smallest one."""
    small, large = reports.counts[0], reports.counts[-1]
    for shape, *_ in reports.shapes():
        costs = []
        for batch in seconds.batches:
            low, high = (
                seconds.answer("answer", shape, MODEL, count, batch) for count in (small, large)
            )
            costs.append(
                f"{high / low:.2f} times as long ({low:.2f} and {high:.2f} ms) {batch} at a time"
            )
        yield f"{shape}: at {large} tokens an answer takes, beside {small}, {', '.join(costs)}."


def _baselines(reports: Reports, seconds: Seconds) -> list[list[str]]:
    return [
        [method, count, *_times(seconds, PLAIN, method, count), points(by_count[count])]
        for method, by_count in reports.baselines.items()
        for count in reports.counts
        if (PLAIN, method, count, seconds.batches[0]) in seconds.answers and count in by_count
    ]


def _baseline_lines(reports: Reports, seconds: Seconds) -> Iterator[str]:
    """Say which baselines are both quicker and no worse than the model at a count."""
    batch = seconds.batches[-1]
    for count in reports.counts[:-1]:
        own = reports.baselines[MODEL][count]["mean"]
        time = seconds.answer("answer", PLAIN, MODEL, count, batch)
        said = []
        for method, by_count in reports.baselines.items():
            if method == MODEL or count not in by_count:
                continue
            ratio = seconds.answer("answer", PLAIN, method, count, batch) / time
            gain = by_count[count]["mean"] - own
            said.append(f"{method} {ratio:.2f} times its time, {100 * gain:+.1f} points")
        yield f"Beside the model at {count} tokens, {batch} at a time: {'; '.join(said)}."


def _training_table(reports: Reports, seconds: Seconds) -> str:
    head = ["trained with", *(f"at {count}" for count in reports.counts)]
    rows = [
        [
            row["title"],
            *(points(row["accuracy"][count]) for count in reports.counts),
            f"{row['steps']:,}",
            f"{seconds.step(name):.1f}",
            f"{seconds.training(reports, name):.0f}",
        ]
        for name, row in reports.regimes.items()
    ]
    return markdown_table([*head, "steps", "ms a step", "seconds"], rows)


def _training_lines(reports: Reports, seconds: Seconds) -> Iterator[str]:
    """Compare one model with three specialists."""
    for shape, general, specialists in reports.shapes():
        one = seconds.training(reports, general)
        three = sum(seconds.training(reports, name) for name in specialists)
        largest = seconds.training(reports, specialists[-1])
        mean, own = _means(reports, general, specialists)
        yield (
            f"{shape}: one model for all counts takes {one:.0f} s, {one / largest:.2f} times the "
            f"largest specialist's {largest:.0f} s, and answers {mean:.1f} % (the mean over "
            f"counts); three specialists take {three:.0f} s and answer {own:.1f} %, each at its "
            "own."
        )


def _means(reports: Reports, general: str, specialists: Sequence[str]) -> tuple[float, float]:
    """Return the mean accuracy over counts of the one model and of the specialists, in percent."""
    one = reports.regimes[general]["accuracy"]
    own = reports.at_own(specialists)
    means = (
        100 * sum(row[count]["mean"] for count in reports.counts) / len(reports.counts)
        for row in (one, own)
    )
    first, second = means
    return first, second


# ---- the picture


def draw(reports: Reports, rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy against the time of an answer, alone and in a batch, and of training."""
    from tokenflex.plots import finish, plt, save_figure

    seconds = Seconds(rows)
    figure, panels = plt.subplots(
        1, len(seconds.batches) + 1, figsize=(13.5, 5.0), layout="constrained"
    )
    for axes, batch in zip(panels, seconds.batches, strict=False):
        _draw_answers(axes, reports, seconds, batch)
        axes.set_xlabel("milliseconds of an answer")
        question = "one question" if batch == 1 else f"{batch} questions"
        axes.set_title(f"{question} at a time", loc="left", fontsize=10)
    _draw_training(panels[-1], reports, seconds)
    panels[-1].set_xlabel("seconds of training, after the common start")
    panels[-1].set_title("training, mean over the counts", loc="left", fontsize=10)
    for axes in panels:
        axes.set_ylabel("accuracy, %")
        finish(axes, grid="both")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    save_figure(figure, path)


def _draw_answers(axes: Any, reports: Reports, seconds: Seconds, batch: int) -> None:
    def line(
        shape: str, way: str, accuracies: Mapping[str, Mapping[str, Any]], **style: Any
    ) -> None:
        drawn = [c for c in accuracies if (shape, way, c, batch) in seconds.answers]
        axes.errorbar(
            [seconds.answer("answer", shape, way, count, batch) for count in drawn],
            [100 * accuracies[count]["mean"] for count in drawn],
            [100 * (accuracies[count]["spread"] or 0.0) for count in drawn],
            capsize=2.5,
            elinewidth=1,
            **style,
        )

    for shape, general, specialists in reports.shapes():
        accuracies = {c: reports.regimes[general]["accuracy"][c] for c in reports.counts}
        style: dict[str, Any] = {"color": COLOURS[shape], "marker": "o"}
        line(shape, MODEL, accuracies, label=f"one model, {shape}", linestyle="-", **style)
        own = reports.at_own(specialists)
        style |= {"markerfacecolor": "white", "linestyle": "none"}
        line(shape, MODEL, own, label=f"specialists, {shape}", **style)
    methods = [method for method in reports.baselines if method != MODEL]
    style = {"color": "#808080", "marker": "s", "linestyle": ":", "markersize": 4}
    line(PLAIN, MODEL, reports.baselines[MODEL], label="the baselines' model", **style)
    for method, colour in zip(methods, BASELINE_COLOURS, strict=False):
        style |= {"color": colour, "linestyle": "--"}
        line(PLAIN, method, reports.baselines[method], label=method, **style)
    axes.set_xlim(0, 1.05 * axes.get_xlim()[1])


def _draw_training(axes: Any, reports: Reports, seconds: Seconds) -> None:
    from tokenflex.plot_labels import label_points

    named = []

    def point(text: str, x: float, y: float, **style: Any) -> None:
        axes.plot([x], [y], "o", **style)
        named.append((text, x, y))

    for shape, general, specialists in reports.shapes():
        mean, own = _means(reports, general, specialists)
        title = reports.regimes[general]["title"].split(", ")[0]
        kind = "" if shape == PLAIN else f", {shape}"
        point(
            f"one model{kind}" if kind else f"one model, {title}",
            seconds.training(reports, general),
            mean,
            color=COLOURS[shape],
        )
        three = sum(seconds.training(reports, name) for name in specialists)
        style = {"color": COLOURS[shape], "markerfacecolor": "white"}
        point(f"three specialists{kind}", three, own, **style)
    if "positions-longer" in reports.regimes:
        row = reports.regimes["positions-longer"]["accuracy"]
        mean = 100 * sum(row[count]["mean"] for count in reports.counts) / len(reports.counts)
        time = seconds.training(reports, "positions-longer")
        point("one model, longer", time, mean, color=COLOURS[POSITIONED])
    axes.set_xlim(left=0, right=1.35 * max(x for _, x, _ in named))
    axes.margins(y=0.15)
    axes.figure.draw_without_rendering()
    label_points(axes, named)
