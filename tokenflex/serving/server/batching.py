"""Requests that wait, taken together: one thread runs the model, on whatever has arrived.

The thread takes requests in the order of their arrival, up to a number of rows, reads their images
and writes all answers in one ``generate``. Requests that arrive meanwhile are the next batch. A
request that nobody waits for any more is dropped, also in the middle of its answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tokenflex.serving.server.chat_request import RequestError, Sampling
from tokenflex.serving.server.metrics import Metrics
from tokenflex.serving.server.rows import Row, RowMonitor
from tokenflex.serving.server.served import Prompt, ServedModel

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """New text of one answer of a request."""

    index: int
    text: str


@dataclass(frozen=True)
class Answers:
    """The end of a request: its answers, and what they cost.

    Attributes:
        texts: of the answers.
        reasons: "stop" or "length" for each.
        usage: OpenAI's numbers, and ``vision_tokens``, ``image_tokens`` and ``encoder_passes``.
    """

    texts: list[str]
    reasons: list[str]
    usage: dict[str, Any]


Event = Piece | Answers | RequestError


@dataclass(eq=False)
class Job:
    """A request on its way through the batcher.

    Attributes:
        prompt: what the model reads.
        sampling: the way in which answers are written.
        tell: called in the batcher's thread with each event; the last is an :class:`Answers` or a
            :class:`RequestError`.
        stream: tell pieces of text.
        arrived: of the request, by ``time.perf_counter``.
        cancelled: set by whoever waited.
    """

    prompt: Prompt
    sampling: Sampling
    tell: Callable[[Event], None]
    stream: bool
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)
    started: bool = False
    rows: list[Row] = field(default_factory=list)


class Batcher:
    """The thread that runs the model.

    Args:
        served: the model.
        metrics: counts what happens.
        max_rows: the most answers that are written side by side.
    """

    def __init__(self, served: ServedModel, metrics: Metrics, max_rows: int = 32) -> None:
        self.served, self.metrics, self.max_rows = served, metrics, max_rows
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="tokenflex-batcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests of the current batch."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Queue a request; it is refused after the end."""
        with self._changed:
            if not self._is_over:
                self._waiting.append(job)
                self._changed.notify()
                return
        job.tell(shutting_down())

    def finish(self, seconds: float) -> None:
        """End all answers within ``seconds``: what is not written by then is refused."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()

    def stop(self) -> None:
        """End at once, and wait for the thread."""
        self.finish(0.0)
        self._thread.join()

    @property
    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _run(self) -> None:
        while True:
            jobs = self._take()
            if not jobs:
                return
            self._running = jobs
            self._encode_ahead(jobs)
            self._answer([job for job in jobs if self._read(job)])
            self._running = []
            del jobs  # before the next wait: pictures are large

    def _take(self) -> list[Job]:
        """Return the next requests; none at the end."""
        with self._changed:
            while not self._waiting and not self._is_over:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                self._changed.wait(left)
            jobs: list[Job] = []
            rows = 0
            while self._waiting and (
                not jobs or rows + self._waiting[0].sampling.n <= self.max_rows
            ):
                jobs.append(self._waiting.popleft())
                rows += jobs[-1].sampling.n
            return jobs

    def _encode_ahead(self, jobs: Sequence[Job]) -> None:
        wanted = [job.prompt for job in jobs if not job.cancelled.is_set()]
        # What fails here fails again where a request is read, and is told there.
        with suppress(Exception):
            if not self._is_over:
                self.served.encode_ahead(wanted)

    def _read(self, job: Job) -> bool:
        """Read the images of a request; return False if it ends here."""
        if job.cancelled.is_set():
            return False
        if self._is_over:
            job.tell(shutting_down())
            return False
        try:
            self.served.read(job.prompt)
        except RequestError as error:
            job.tell(error)
            return False
        except Exception as error:
            job.tell(self._fault(error))
            return False
        return True

    def _answer(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            job.rows = [self._row(job, index) for index in range(job.sampling.n)]
        rows = [row for job in jobs for row in job.rows]
        prompts = [job.prompt for job in jobs for _ in job.rows]
        unfinished = [*jobs]

        def after_step() -> None:
            for job in [job for job in unfinished if self._is_finished(job)]:
                unfinished.remove(job)

        try:
            self.served.generate(prompts, rows, RowMonitor(rows, after_step))
        except Exception as error:
            if len(jobs) > 1 and not any(job.started for job in jobs):
                for job in jobs:  # one request must not fail another
                    self._answer([job])
                return
            fault = self._fault(error)
            for job in unfinished:
                job.tell(fault)
            return
        self.metrics.add("batches_total")
        self.metrics.observe(self.metrics.batch_rows, len(rows))

    def _row(self, job: Job, index: int) -> Row:
        return self.served.row(
            job.sampling,
            job.prompt,
            index,
            tell=(lambda text: job.tell(Piece(index, text))) if job.stream else None,
            is_cancelled=lambda: job.cancelled.is_set() or self._is_over,
        )

    def _is_finished(self, job: Job) -> bool:
        """Answer a request whose rows have all ended, without waiting for those of others."""
        if not job.started:
            job.started = True
            self.metrics.observe(
                self.metrics.first_token_seconds, time.perf_counter() - job.arrived
            )
        if any(row.reason is None for row in job.rows):
            return False
        reasons = [str(row.reason) for row in job.rows]
        if "cancelled" in reasons:
            job.tell(shutting_down())
            return True
        prompt = job.prompt
        tokens, new = len(prompt.ids), sum(len(row.ids) for row in job.rows)
        vision_tokens = sum(prompt.image_tokens)
        usage = {
            "prompt_tokens": tokens,
            "completion_tokens": new,
            "total_tokens": tokens + new,
            "vision_tokens": vision_tokens,
            "image_tokens": prompt.image_tokens,
            "encoder_passes": prompt.encoder_passes,
        }
        self.metrics.add("prompt_tokens_total", tokens)
        self.metrics.add("vision_tokens_total", vision_tokens)
        self.metrics.add("completion_tokens_total", new)
        job.tell(Answers([row.text for row in job.rows], reasons, usage))
        return True

    def _fault(self, error: Exception) -> RequestError:
        kind = type(error).__name__
        _LOGGER.error("a request failed: %s: %s", kind, " ".join(str(error).split())[:500])
        return RequestError(
            f"the server failed to answer ({kind})", status=500, code="internal_error"
        )


def shutting_down() -> RequestError:
    """Return the error of requests that a shutdown does not wait for."""
    return RequestError("the server is shutting down", status=503, code="shutting_down")
