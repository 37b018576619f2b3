"""A server in a thread on a real socket, and requests for it."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("starlette", reason="needs the extra [serve]")
pytest.importorskip("uvicorn", reason="needs the extra [serve]")

from tests.models.tiny import picture, tiny_config
from tokenflex import TokenFlexForConditionalGeneration
from tokenflex.digits.processor import digits_processor
from tokenflex.serving.server.address import bind
from tokenflex.serving.server.app import Options, Server, run
from tokenflex.serving.server.chat_request import Limits
from tokenflex.serving.server.served import ServedModel, TokenFlexServed

COUNTS = (4, 9, 16)
QUESTION = "read r2c3"


class Answer(NamedTuple):
    """The status of a response, its body, and its JSON where it is JSON."""

    status: int
    body: bytes
    json: Any

    @property
    def text(self) -> str:
        return self.json["choices"][0]["message"]["content"]

    @property
    def usage(self) -> dict[str, Any]:
        return self.json["usage"]

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


class Client:
    """Requests to a server; each has a connection of its own."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return Answer(response.status, content, json.loads(content) if is_json else None)

    def get(self, path: str) -> Answer:
        return self.send("GET", path)

    def post(self, body: Any) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", "/v1/chat/completions", content)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").body.decode().splitlines()
        (value,) = (line.split()[-1] for line in lines if line.startswith(f"tokenflex_{name} "))
        return float(value)


@contextmanager
def running(served: ServedModel, **options: Any) -> Iterator[Client]:
    server = Server(served, Options(names=("tiny",), **options))
    bound = bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    ready = threading.Event()
    inner: list[Any] = []

    def tell(uvicorn_server: Any) -> None:
        inner.append(uvicorn_server)
        ready.set()

    thread = threading.Thread(target=run, args=(server, bound, tell))
    thread.start()
    assert ready.wait(30)
    try:
        yield Client(server, port)
    finally:
        inner[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def tiny_served(limits: Limits | None = None, **changes: Any) -> TokenFlexServed:
    """A model of random weights whose answers depend on picture, question and count."""
    config = tiny_config(trained_num_image_tokens=[*COUNTS], **changes)
    config.text_config.tie_word_embeddings = False  # or it would repeat the question's last word
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = TokenFlexForConditionalGeneration(config).eval()
    return TokenFlexServed(model, digits_processor(9), limits or Limits(), 2**24)


def data_url(image: Any, kind: str = "PNG") -> str:
    file = BytesIO()
    image.save(file, kind)
    return bytes_url(file.getvalue())


def bytes_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def image_part(seed: int | str = 1, **settings: Any) -> dict[str, Any]:
    url = seed if isinstance(seed, str) else data_url(picture(seed))
    return {"type": "image_url", "image_url": {"url": url, **settings}}


def chat(*parts: dict[str, Any], question: str = QUESTION, **options: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 6, **options}


def alone(
    served: ServedModel,
    seeds: Sequence[int],
    counts: Any,
    question: str = QUESTION,
    max_tokens: int = 6,
) -> str:
    """The greedy answer of ``model.generate``, without a server."""
    content = [{"type": "image", "image": picture(seed)} for seed in seeds]
    content.append({"type": "text", "text": question})
    inputs = served.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        **({"processor_kwargs": {"num_image_tokens": counts}} if seeds else {}),
    )
    output = served.model.generate(
        **inputs, **served.special_tokens, do_sample=False, max_new_tokens=max_tokens
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    return served.processor.tokenizer.decode(new, skip_special_tokens=True)


def pieces(answer: Answer) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, which must end as OpenAI's do."""
    lines = [line for line in answer.body.decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def streamed_text(chunks: Sequence[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for piece in chunks for choice in piece["choices"]]
    return "".join(c["delta"].get("content", "") for c in choices if c["index"] == index)
