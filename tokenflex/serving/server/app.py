"""The HTTP server: OpenAI's chat completions, with a vision-token count per request and image.

Its own application on Starlette. transformers' server answers one request with images at a time,
turns every error of the model's into a bare 500 and keeps no features of the encoder; docs/serving
says more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenflex.errors import ReportedError
from tokenflex.serving.server.batching import (
    Answers,
    Batcher,
    Event,
    Job,
    Piece,
    shutting_down,
)
from tokenflex.serving.server.chat_request import ChatRequest, RequestError, parse_request
from tokenflex.serving.server.metrics import CONTENT_TYPE, Metrics
from tokenflex.serving.server.readers import Readers
from tokenflex.serving.server.served import ServedModel

_LOGGER = logging.getLogger(__name__)
_T = TypeVar("_T")

HUNG_UP = 499
"""Status of requests whose client hung up, as nginx writes it; nobody receives it."""

HEAD_SECONDS = 20.0
"""Time for the head of a request to arrive; a connection that does not send it is closed."""

BACKLOG = 128
"""Connections that are accepted at a stroke."""

LAST_SECONDS = 2.0
"""Time after the grace for the model's last step; what is unanswered then is refused."""


@dataclass(frozen=True)
class Options:
    """Settings of a server.

    Attributes:
        names: names of the model in requests; the first is listed.
        max_rows: the most answers that are written side by side.
        max_requests: the most requests in the house, waiting ones included; others get 503.
        max_bytes: the most bytes of bodies that are not read yet; others get 503.
        body_seconds: time for a body to arrive.
        grace_seconds: time for answers in flight when the server is told to end.
        threads: that read pictures and texts.
    """

    names: tuple[str, ...]
    max_rows: int = 32
    max_requests: int = 512
    max_bytes: int = 2**29
    body_seconds: float = 60.0
    grace_seconds: float = 30.0
    threads: int = 2


class Server:
    """The application, and the threads behind it.

    Args:
        served: the model.
        options: settings.

    Attributes:
        app: for an ASGI server. Its lifespan starts and stops the threads.
        batcher: the thread that runs the model.
        metrics: the numbers of ``GET /metrics``.
    """

    def __init__(self, served: ServedModel, options: Options) -> None:
        self.served, self.options = served, options
        self.metrics = Metrics()
        self.batcher = Batcher(served, self.metrics, options.max_rows)
        self._pool = Readers(options.threads)
        self._over: asyncio.Future[None] | None = None
        self._in_house = 0
        self._bytes = 0
        self._started = int(time.time())
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: self._http_error}
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._over = asyncio.get_running_loop().create_future()
        self.batcher.start()
        yield
        self.batcher.stop()
        self._pool.shutdown()

    def finish(self) -> None:
        """End all requests within the grace; what is not answered by then is refused."""
        seconds = self.options.grace_seconds
        self.batcher.finish(seconds)

        def end(over: asyncio.Future[None]) -> None:
            if not over.done():
                over.set_result(None)

        if self._over is not None:
            asyncio.get_running_loop().call_later(seconds + LAST_SECONDS, end, self._over)

    async def _wait(self, work: Awaitable[_T], hung_up: asyncio.Future[None] | None = None) -> _T:
        """Return the result of some work, unless nobody waits for it or the server ends.

        Raises:
            ClientDisconnect: the client hung up before it.
            RequestError: the server has ended before it.
        """
        task = asyncio.ensure_future(work)
        pending: set[asyncio.Future[Any]] = {task}
        pending.update(end for end in (hung_up, self._over) if end is not None)
        try:
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if hung_up is not None and hung_up.done():
                raise ClientDisconnect
            if not task.done():
                raise shutting_down()
            return task.result()
        finally:
            task.cancel()

    # ---- small endpoints

    async def _health(self, request: Request) -> Response:
        is_alive = self.batcher.is_alive
        return JSONResponse({"status": "ok" if is_alive else "dead"}, 200 if is_alive else 503)

    async def _metrics(self, request: Request) -> Response:
        gauges = {
            "requests_waiting": ("Requests that no batch has taken.", self.batcher.waiting),
            "requests_running": ("Requests of the current batch.", self.batcher.running),
            "requests_in_house": ("Requests that have arrived and not left.", self._in_house),
        }
        counters = {
            "encoder_passes_total": float(self.served.encoded_images),
            "feature_cache_hits_total": float(self.served.cache.hits),
        }
        return PlainTextResponse(self.metrics.text(gauges, counters), media_type=CONTENT_TYPE)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        try:
            self._check_model(request.path_params["name"])
        except RequestError as error:
            return JSONResponse(error.body(), error.status)
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "id": self.options.names[0],
            "object": "model",
            "created": self._started,
            "owned_by": "tokenflex",
            "max_model_len": self.served.positions,
            "num_image_tokens": self.served.default_count,
            "trained_num_image_tokens": self.served.trained_counts(),
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.options.names:
            raise RequestError(
                f"model must be {self.options.names[0]!r}, which this server serves, got "
                f"{name[:100]!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        """Answer unknown paths and methods in OpenAI's form."""
        known = ", ".join(
            f"{'POST' if 'POST' in (route.methods or ()) else 'GET'} {route.path}"
            for route in self.app.routes
            if isinstance(route, Route) and "{" not in route.path
        )
        given = f"{request.method} {request.url.path[:100]}"
        found = RequestError(
            f"{given} is not served: known are {known}", status=error.status_code, code="not_found"
        )
        return JSONResponse(found.body(), found.status, headers=error.headers)

    # ---- chat completions

    async def _chat(self, request: Request) -> Response:
        return _Answer(lambda send: self._answer(request, send))

    async def _answer(self, request: Request, send: Send) -> None:
        """Answer one chat completion, whatever happens."""
        arrived = time.perf_counter()
        status = 500
        self._in_house += 1
        job: Job | None = None
        hung_up: asyncio.Future[None] | None = None
        content = bytearray()
        try:
            if self._in_house > self.options.max_requests:
                raise overloaded(f"{self.options.max_requests} requests")
            await self._wait(self._read_body(request, content))
            hung_up = asyncio.ensure_future(_hung_up(request.receive))
            loop = asyncio.get_running_loop()
            read = loop.run_in_executor(self._pool, self._prepare, content, loop, arrived)
            chat, new_job, events = await self._wait(read, hung_up)
            job = new_job
            self._forget(content)
            self.batcher.submit(job)
            status = await self._send_events(request, send, chat, events, hung_up)
        except RequestError as error:
            status = error.status
            headers = {"retry-after": "1"} if status == 503 else {}
            await JSONResponse(error.body(), status, headers)(request.scope, request.receive, send)
        except ClientDisconnect:
            status = HUNG_UP
        except asyncio.CancelledError:  # by uvicorn, at the end: the client takes no answer
            status = shutting_down().status
        except Exception as error:  # an answer of one line, and no traceback for strangers to fill
            kind = type(error).__name__
            _LOGGER.error("a request failed: %s: %s", kind, " ".join(str(error).split())[:500])
            fault = RequestError(f"the server failed ({kind})", status=500, code="internal_error")
            await JSONResponse(fault.body(), 500)(request.scope, request.receive, send)
        finally:
            self._forget(content)
            if hung_up is not None:
                hung_up.cancel()
            if job is not None:
                job.cancelled.set()  # has an effect only where nobody waits any more
            self._in_house -= 1
            self.metrics.add(f'requests_total{{status="{status}"}}')
            self.metrics.observe(self.metrics.request_seconds, time.perf_counter() - arrived)

    def _forget(self, content: bytearray) -> None:
        """Give back the room of a body."""
        self._bytes -= len(content)
        content.clear()

    async def _read_body(self, request: Request, content: bytearray) -> None:
        """Append the body to ``content``, or drop it where it is too large.

        A client that sends all before it reads would miss an answer that comes earlier.
        """
        limit = self.served.limits.max_body_bytes
        refusal: RequestError | None = None
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > limit:
            refusal = too_large(limit)
            if request.headers.get("expect", "").lower() == "100-continue":
                raise refusal  # nothing was sent yet

        async def read() -> None:
            nonlocal refusal
            async for piece in request.stream():
                if refusal is not None:
                    continue
                content.extend(piece)
                self._bytes += len(piece)
                if len(content) > limit:
                    refusal = too_large(limit)
                elif self._bytes > self.options.max_bytes:
                    refusal = overloaded(f"{self.options.max_bytes} bytes of requests")
                if refusal is not None:
                    self._forget(content)

        try:
            await asyncio.wait_for(read(), self.options.body_seconds)
        except asyncio.TimeoutError:
            seconds = f"{self.options.body_seconds:g} seconds"
            refusal = refusal or RequestError(
                f"the body must arrive within {seconds}", status=408, code="timeout"
            )
        if refusal is not None:
            raise refusal

    def _prepare(
        self, content: bytearray, loop: asyncio.AbstractEventLoop, arrived: float
    ) -> tuple[ChatRequest, Job, asyncio.Queue[Event]]:
        # Not copied before: of a client that hung up, what waits for this thread is empty.
        chat = parse_request(bytes(content), self.served.limits, self.served.defaults)
        self._check_model(chat.model)
        prompt = self.served.prepare(chat)
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(events.put_nowait, event)

        return chat, Job(prompt, chat.sampling, tell, chat.stream, arrived), events

    async def _send_events(
        self,
        request: Request,
        send: Send,
        chat: ChatRequest,
        events: asyncio.Queue[Event],
        hung_up: asyncio.Future[None],
    ) -> int:
        """Send the answer of a request; return the status."""
        first = await self._wait(events.get(), hung_up)
        if isinstance(first, RequestError):
            raise first
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": chat.model or self.options.names[0],
        }
        if isinstance(first, Answers) and not chat.stream:
            response = JSONResponse(completion(head, first))
            await response(request.scope, request.receive, send)
            return 200
        return await self._stream(send, chat, head, first, events, hung_up)

    async def _stream(
        self,
        send: Send,
        chat: ChatRequest,
        head: dict[str, Any],
        event: Event,
        events: asyncio.Queue[Event],
        hung_up: asyncio.Future[None],
    ) -> int:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def emit(*chunks: dict[str, Any] | str) -> None:
            texts = [c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in chunks]
            body = "".join(f"data: {text}\n\n" for text in texts).encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        await emit(
            *(chunk(head, i, {"role": "assistant", "content": ""}) for i in range(chat.sampling.n))
        )
        while isinstance(event, Piece):
            await emit(chunk(head, event.index, {"content": event.text}))
            try:
                event = await self._wait(events.get(), hung_up)
            except RequestError as error:
                event = error
        if isinstance(event, Answers):
            ends = [chunk(head, i, {}, reason) for i, reason in enumerate(event.reasons)]
            if chat.include_usage:
                usage = {**head, "object": "chat.completion.chunk", "choices": []}
                await emit(*ends, {**usage, "usage": event.usage}, "[DONE]")
            else:
                ends[-1]["usage"] = event.usage
                await emit(*ends, "[DONE]")
        else:
            await emit(event.body(), "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return 200 if isinstance(event, Answers) else event.status


class _Answer(Response):
    """A response that writes itself."""

    def __init__(self, write: Callable[[Send], Awaitable[None]]) -> None:
        self.write = write
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.write(send)


async def _hung_up(receive: Receive) -> None:
    """Return when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def too_large(limit: int) -> RequestError:
    """Return the error of a body of more than ``limit`` bytes."""
    return RequestError(
        f"the body must be of at most {limit} bytes, got more", status=413, code="body_too_large"
    )


def overloaded(what: str) -> RequestError:
    """Return the error of a request for which there is no room."""
    return RequestError(
        f"the server has {what} already: try again later", status=503, code="overloaded"
    )


def completion(head: dict[str, Any], answers: Answers) -> dict[str, Any]:
    """Return an answer in OpenAI's form."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": text},
            "finish_reason": reason,
            "logprobs": None,
        }
        for i, (text, reason) in enumerate(zip(answers.texts, answers.reasons, strict=True))
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": answers.usage}


def chunk(
    head: dict[str, Any], index: int, delta: dict[str, Any], reason: str | None = None
) -> dict[str, Any]:
    """Return a piece of an answer in OpenAI's form."""
    choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}


# ---------------------------------------------------------------------- the process


def most_connections() -> int:
    """Return the most connections that leave the process files of its own to open.

    Where they run out, asyncio tries to accept again and again.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return 2**31
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return 2**31
    return max(files - 2 * BACKLOG, files // 4)


class Connection(H11Protocol):
    """A connection whose heads of requests must arrive in time, one of a bounded number.

    uvicorn bounds neither.
    """

    most = most_connections()
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head, once it has begun."""
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        """Wait for the next head, of which a part may be here."""
        super().on_response_complete()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _await_head(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif not is_answering and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)


class _Uvicorn(uvicorn.Server):
    """A uvicorn that gives answers in flight some time, and then ends them in order."""

    def __init__(
        self, config: uvicorn.Config, server: Server, on_ready: Callable[[uvicorn.Server], None]
    ) -> None:
        super().__init__(config)
        self._server, self._on_ready = server, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.finish()
        await super().shutdown(sockets)


def run(server: Server, bound: socket.socket, on_ready: Callable[[uvicorn.Server], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Answers in flight are finished, for at most ``grace_seconds``. A second Ctrl-C does not wait.

    Args:
        server: the application.
        bound: a bound socket, see :func:`bind`. It is closed.
        on_ready: called with uvicorn's server once requests are answered; to end it, set its
            ``should_exit``.

    Raises:
        ReportedError: another process listens at the address.
    """
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        name = bound.getsockname()
        raise ReportedError(
            f"port {name[1]} of {name[0]} cannot be used: {error.strerror}"
        ) from None
    config = uvicorn.Config(
        server.app,
        http=Connection,
        ws="none",
        backlog=BACKLOG,
        log_level="warning",
        use_colors=False if os.environ.get("NO_COLOR") else None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=int(server.options.grace_seconds) + 5,
    )
    found: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signals that ended it once more, for the handlers that it found.
        found = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        _Uvicorn(config, server, on_ready).run(sockets=[bound])
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)
