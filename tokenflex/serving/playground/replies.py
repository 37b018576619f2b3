"""Replies of the page: a table of answers, pictures of what the tokens see, or one message.

Nothing here needs gradio.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tokenflex.counts import AUTO, TokenCount, parse_count
from tokenflex.errors import ReportedError
from tokenflex.images import open_image
from tokenflex.serving.playground.asking import CountAnswer, ask_at_counts, count_name
from tokenflex.serving.playground.cells import draw_panels
from tokenflex.serving.playground.subjects import by_size, subject_of

NEVER_TRAINED = "never trained with"
HEADERS = (
    "vision tokens",
    "answer",
    "certainty",
    "encoder ms",
    "first token ms",
    "answer ms",
    "note",
)
MOST_PER_SIDE = 32
"""Largest n of the page's n x n slider."""


@dataclass(frozen=True)
class Reply:
    """One state of the page.

    Attributes:
        message: What to mend, empty if nothing is wrong.
        answers: Answers so far.
        pictures: (picture, caption) of each answer.
    """

    message: str = ""
    answers: list[CountAnswer] = field(default_factory=list)
    pictures: list[tuple[Image.Image, str]] = field(default_factory=list)


class Playground:
    """A model, and what its page offers.

    Attributes:
        choices: (label, value) of each count that can be ticked, "auto" last.
        ticked: Values of the counts that are ticked at first.
        largest_side: Largest n of a grid of n x n.
    """

    def __init__(
        self, model: Any, processor: Any, *, max_new_tokens: int = 64, max_tiles: int | None = None
    ) -> None:
        """Ask the model once, about a blank picture.

        The first call of a process is slow, and a model that cannot be asked is found out before
        the page opens.
        """
        self._model, self._processor = model, processor
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_tiles": max_tiles}
        subject = subject_of(model, processor)
        self._trained = set(subject.trained_counts)
        self.choices = [
            (self._label(count), count_value(count)) for count in subject.offered_counts
        ]
        self.ticked = [value for _, value in self.choices]
        if subject.has_auto:
            self.choices.append((f"{AUTO} (the router chooses)", AUTO))
        blank = Image.new("RGB", (64, 64), "white")
        (answer,) = ask_at_counts(
            *(model, processor, blank, "?", subject.offered_counts[:1]),
            max_new_tokens=2,
            max_tiles=max_tiles,
        )
        sides = [side for panel in answer.panels for side in panel.patches]
        self.largest_side = min(max(sides), MOST_PER_SIDE)

    def _label(self, count: TokenCount) -> str:
        known = not self._trained or count in self._trained
        return count_name(count) if known else f"{count_name(count)} ({NEVER_TRAINED})"

    def ask(
        self, path: str | None, question: str, ticked: Sequence[str], side: int
    ) -> Iterator[Reply]:
        """Yield the page after each answer; the last one has a message if something is wrong.

        Args:
            path: File of the picture; None if there is none.
            question: The question.
            ticked: Values of the ticked counts.
            side: n of one more count of n x n tokens; 0 for none.
        """
        reply = Reply()
        try:
            for reply in self._ask(path, question, ticked, side):
                yield reply
        except (ValueError, OSError, ReportedError) as error:
            yield replace(reply, message=" ".join(str(error).split()))

    def _ask(
        self, path: str | None, question: str, ticked: Sequence[str], side: int
    ) -> Iterator[Reply]:
        if path is None:
            raise ValueError(
                "There is no picture yet: drop one into the field, or click to choose."
            )
        if not question.strip():
            raise ValueError("The question is empty: write one below the picture.")
        numbers = [parse_count(value) for value in ticked if value != AUTO]
        counts: list[TokenCount | str] = [*by_size([*numbers, *[side * side] * bool(side)])]
        counts += [AUTO] * (AUTO in ticked)
        if not counts:
            raise ValueError("No count is chosen: tick one, or move the slider.")
        picture = open_image(Path(path), f"The picture {Path(path).name}")
        reply = Reply()
        for answer in ask_at_counts(
            *(self._model, self._processor, picture, question, counts), **self._options
        ):
            drawn = draw_panels(answer.panels, answer.count, pooling=answer.pooling)
            caption = f"{answer.name} tokens: {answer.text}"
            if answer.tiles > 1:
                caption = f"{answer.tiles} tiles of {caption}"
            reply = Reply("", [*reply.answers, answer], [*reply.pictures, (drawn, caption)])
            yield reply


def count_value(count: TokenCount) -> str:
    """Return a count as :func:`tokenflex.counts.parse_count` reads it."""
    return count_name(count).replace(" ", "")


def remark(answer: CountAnswer) -> str:
    """Return what a reader of an answer should know about its count."""
    if answer.is_trained is None:
        return "training counts not recorded"
    return "" if answer.is_trained else NEVER_TRAINED


def cells_of(answer: CountAnswer) -> list[str]:
    """Return a row of the table, one text for each of :data:`HEADERS`."""
    tokens = answer.name
    if answer.tiles > 1:
        tokens = f"{answer.tiles} tiles x {tokens} = {answer.vision_tokens}"
    times = (answer.encoder_seconds, answer.first_token_seconds, answer.seconds)
    milliseconds = [f"{1000 * seconds:.1f}" for seconds in times]
    return [tokens, answer.text, f"{answer.certainty:.3f}", *milliseconds, remark(answer)]


def format_table(answers: Sequence[CountAnswer]) -> str:
    """Return the answers as an HTML table, whatever their texts hold; empty without answers."""
    if not answers:
        return ""
    head = "".join(f"<th>{header}</th>" for header in HEADERS)
    rows = []
    for answer in answers:
        cells = [escape(cell) for cell in cells_of(answer)]
        share = f"{100 * answer.certainty:.0f}%"
        cells[2] = f'<span class="bar" style="--share: {share}"></span>{cells[2]}'
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="answers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def format_message(message: str) -> str:
    """Return a message as HTML; empty if nothing is wrong."""
    return f'<div class="message" role="alert">{escape(message)}</div>' if message else ""
