"""Answers that are written side by side: each row of a batch samples, stops and speaks for itself.

``generate`` of transformers has one temperature, one length and one seed for a whole batch. A
:class:`RowSampler` among its logits processors draws each row's token by that row's own settings
(and lets greedy search pick it), and a :class:`RowMonitor` among its stopping criteria ends each
row by its own rules and hands its text on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, TypeAlias

import torch
from transformers import LogitsProcessor, StoppingCriteria

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
_INCOMPLETE = "\ufffd"  # the decoding of half a character


class Row:
    """One answer while it is written.

    Args:
        decode: Called with token ids; returns their text without special tokens.
        ends: Ids of tokens that end an answer.
        max_tokens: Most tokens of the answer.
        temperature: 0 for the likeliest token.
        top_p: Share of the probability that a token is drawn from.
        seed: Of the draws; None for another one at each call.
        stops: Texts that end the answer, and are not part of it.
        tell: Called with each new piece of text; None where the text is read at the end.
        is_cancelled: True once nobody waits for the answer.

    Attributes:
        ids: Tokens so far, with the one that ended the answer.
        reason: Reason for the end; None until then.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        ends: Collection[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stops: Sequence[str] = (),
        tell: Callable[[str], None] | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.decode, self.ends, self.max_tokens = decode, ends, max_tokens
        self.temperature, self.top_p, self.stops = temperature, top_p, tuple(stops)
        self.tell, self.is_cancelled = tell, is_cancelled
        self.ids: list[int] = []
        self.reason: FinishReason | None = None
        self.generator = torch.Generator().manual_seed(
            random.getrandbits(63) if seed is None else seed % 2**63
        )
        self._read = ""  # the text of whole characters so far
        self._settled = 0  # tokens whose text is whole, and the first of those that give context
        self._context = 0
        self._told = 0  # characters of the answer that were handed on

    def push(self, token: int) -> bool:
        """Take the next token; return True once the answer has ended."""
        if self.reason is not None:
            return True
        self.ids.append(token)
        ended = token in self.ends
        if self.is_cancelled():
            self.reason = "cancelled"
        elif ended:
            self.reason = "stop"
        elif len(self.ids) == self.max_tokens:
            self.reason = "length"
        if self.stops or self.tell:
            self._read_on()
            if any(stop in self._read for stop in self.stops):
                self.reason = "stop"
        if self.tell:
            self._hand_on()
        return self.reason is not None

    @property
    def text(self) -> str:
        """The answer so far, up to the first stop."""
        return self._cut(self.decode(self.ids))

    def _read_on(self) -> None:
        """Decode the new tokens, after those before them, as words depend on their neighbours."""
        before = self.decode(self.ids[self._context : self._settled])
        now = self.decode(self.ids[self._context :])
        if len(now) > len(before) and not now.endswith(_INCOMPLETE):
            self._read += now[len(before) :]
            self._context, self._settled = self._settled, len(self.ids)

    def _hand_on(self) -> None:
        assert self.tell is not None
        if self.reason is not None:
            text = self.text
            # Decoded at once and piece by piece, an answer may differ in white space.
            text = text if text.startswith(self._read[: self._told]) else self._cut(self._read)
        else:
            text = self._read[: len(self._read) - self._held_back()]
        if len(text) > self._told:
            self.tell(text[self._told :])
            self._told = len(text)

    def _held_back(self) -> int:
        """Return the number of last characters that may be the beginning of a stop."""
        longest = max(map(len, self.stops), default=1) - 1
        for length in range(min(longest, len(self._read)), 0, -1):
            if any(stop.startswith(self._read[-length:]) for stop in self.stops):
                return length
        return 0

    def _cut(self, text: str) -> str:
        ends = [text.find(stop) for stop in self.stops if stop in text]
        return text[: min(ends)] if ends else text


class RowSampler(LogitsProcessor):
    """Draw the token of each row that samples: all other tokens of the row get -inf."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, float [rows, vocabulary], that greedy search reads."""
        drawing = [i for i, r in enumerate(self.rows) if r.temperature and r.reason is None]
        if not drawing:
            return scores
        scores = scores.clone()
        for i in drawing:
            token = draw(scores[i], self.rows[i])
            scores[i] = -torch.inf
            scores[i, token] = 0.0
        return scores


def draw(scores: torch.Tensor, row: Row) -> int:
    """Draw a token from the scores [vocabulary] of a row, on the host, by its own generator."""
    scores = scores.float().cpu()
    # The highest score is 0, and a temperature that float32 holds keeps it so: 0 / 0 is no number.
    temperature = max(row.temperature, torch.finfo(scores.dtype).tiny)
    probabilities = ((scores - scores.max()) / temperature).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    is_outside = before >= row.top_p
    is_outside[0] = False  # the likeliest token stays, also where float32 takes top_p for 0
    ordered[is_outside] = 0.0
    return int(tokens[torch.multinomial(ordered, 1, generator=row.generator)])


class RowMonitor(StoppingCriteria):
    """Hand each row its token, and end those rows that are done."""

    def __init__(self, rows: Sequence[Row], after_step: Callable[[], None]) -> None:
        self.rows, self.after_step = rows, after_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return bool [rows], True for those that are done."""
        tokens = input_ids[:, -1].tolist()
        done = [row.push(token) for row, token in zip(self.rows, tokens, strict=True)]
        self.after_step()
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
