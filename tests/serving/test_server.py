"""The server over HTTP: answers are the model's own, and each mistake gets one clear answer."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.tiny import WIDTH, picture
from tests.serving.server_tools import (
    COUNTS,
    QUESTION,
    Client,
    alone,
    bytes_url,
    chat,
    data_url,
    image_part,
    pieces,
    running,
    streamed_text,
    tiny_served,
)
from tokenflex import images
from tokenflex.routing.router import Router
from tokenflex.routing.storage import attach_router
from tokenflex.serving.server import app, chat_request
from tokenflex.serving.server.chat_request import Limits


@pytest.fixture(scope="module")
def served():
    return tiny_served()


@pytest.fixture(scope="module")
def client(served):
    with running(served, body_seconds=5.0) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_failed(client, caplog):
    """No request may reach the log as a fault of the server."""
    yield
    assert not [record for record in caplog.records if "failed" in record.getMessage()]


# ---- answers


@pytest.mark.parametrize("count", [4, 9, 16, (2, 3)])
def test_the_answer_at_a_count_is_the_models_own(client, served, count):
    answer = client.post(chat(image_part(1), num_image_tokens=count, model="tiny"))
    assert answer.status == 200
    assert answer.text == alone(served, [1], count)
    tokens = count if isinstance(count, int) else count[0] * count[1]
    assert (answer.usage["vision_tokens"], answer.usage["image_tokens"]) == (tokens, [tokens])
    assert answer.usage["prompt_tokens"] == tokens + 2
    assert answer.usage["completion_tokens"] == 6
    assert answer.usage["total_tokens"] == tokens + 8
    assert answer.json["object"] == "chat.completion"
    assert answer.json["choices"][0]["finish_reason"] == "length"


def test_counts_change_the_answer(served):
    assert len({alone(served, [1], count) for count in (1, 4, 9, 16)}) > 1


@pytest.mark.parametrize("shared", [4, 9, [4, 9], [[2, 3], 16], [9, "auto"]])
def test_each_image_has_its_own_count(client, served, shared):
    budget = {"budget": 9 + 4} if "auto" in [*np.atleast_1d(np.array(shared, object))] else {}
    answer = client.post(chat(image_part(1), image_part(2), num_image_tokens=shared, **budget))
    counts = [
        4 if n == "auto" else tuple(n) if isinstance(n, list) else n
        for n in (shared if isinstance(shared, list) else [shared] * 2)
    ]
    assert answer.text == alone(served, [1, 2], counts)
    sizes = [n if isinstance(n, int) else n[0] * n[1] for n in counts]
    assert answer.usage["image_tokens"] == sizes
    assert answer.usage["vision_tokens"] == sum(sizes)


@pytest.mark.parametrize(
    ("image", "request_count", "expected"),
    [
        ({"detail": "low"}, None, 4),
        ({"detail": "high"}, None, 16),
        ({"detail": "auto"}, None, 9),
        ({}, None, 9),
        ({"detail": "auto"}, 16, 16),
        ({"detail": "low"}, 16, 4),
        ({"num_image_tokens": 16}, 4, 16),
        ({"num_image_tokens": [3, 2]}, None, 6),
        ({"num_image_tokens": 16, "detail": "auto"}, None, 16),
    ],
)
def test_an_image_says_its_count_or_detail(client, image, request_count, expected):
    answer = client.post(chat(image_part(1, **image), num_image_tokens=request_count))
    assert answer.usage["image_tokens"] == [expected]


@pytest.mark.parametrize(
    ("budget", "counts"), [(8, [4, 4]), (13, None), (25, None), (32, [16, 16]), (999, [16, 16])]
)
def test_a_budget_is_spread_over_the_images(client, served, budget, counts):
    answer = client.post(chat(image_part(1), image_part(2), budget=budget))
    assert answer.usage["vision_tokens"] <= budget
    assert set(answer.usage["image_tokens"]) <= {*COUNTS}
    if counts:
        assert answer.usage["image_tokens"] == counts
    else:
        assert sum(answer.usage["image_tokens"]) == budget
    assert answer.text == alone(served, [1, 2], answer.usage["image_tokens"])


def test_another_count_of_a_picture_runs_no_encoder(client):
    passes = client.metric("encoder_passes_total")
    numbers = [
        client.post(chat(image_part(77), num_image_tokens=count)).usage["encoder_passes"]
        for count in (4, 9, 4)
    ]
    both = client.post(chat(image_part(77), image_part(78))).usage["encoder_passes"]
    assert [*numbers, both] == [1, 0, 0, 1]
    assert client.metric("encoder_passes_total") == passes + 2


def test_a_chat_of_several_turns_and_one_without_images(client, served):
    turns = [
        {"role": "system", "content": "count"},
        {"role": "user", "content": [image_part(1), {"type": "text", "text": "read r1c1"}]},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": [{"type": "text", "text": "read r1c2"}, image_part(2)]},
    ]
    answer = client.post({"messages": turns, "max_tokens": 6, "num_image_tokens": [4, 9]})
    assert answer.usage["image_tokens"] == [4, 9]
    text = client.post({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 6})
    assert text.text == alone(served, [], None)
    assert text.usage["image_tokens"] == []
    assert text.usage["vision_tokens"] == text.usage["encoder_passes"] == 0
    budget = client.post({"messages": [{"role": "user", "content": QUESTION}], "budget": 4})
    assert budget.status == 200


def test_a_router_chooses_where_nothing_is_said(served):
    """``"auto"``, ``detail`` "auto" and nothing at all are then the same."""
    routed = tiny_served()
    router = Router(COUNTS, WIDTH, WIDTH)
    with torch.no_grad():
        router.right.weight.zero_()
        router.right.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))  # 16 is right most often
    attach_router(routed.model, router)
    with running(routed) as client:
        for body in (
            chat(image_part(1), num_image_tokens="auto"),
            chat(image_part(1, detail="auto")),
            chat(image_part(1)),
            chat(image_part(1, num_image_tokens="auto"), num_image_tokens=4),
        ):
            assert client.post(body).usage["image_tokens"] == [16]
        answer = client.post(chat(image_part(1), image_part(2), num_image_tokens=["auto", 4]))
        assert answer.usage["image_tokens"] == [16, 4]
        assert answer.text == alone(served, [1, 2], [16, 4])


# ---- sampling


def test_a_seed_repeats_draws_and_n_gives_several(client):
    body = chat(image_part(1), temperature=1.5, seed=7, n=3, max_tokens=8)
    first, second = client.post(body), client.post(body)
    texts = [choice["message"]["content"] for choice in first.json["choices"]]
    assert texts == [choice["message"]["content"] for choice in second.json["choices"]]
    assert [choice["index"] for choice in first.json["choices"]] == [0, 1, 2]
    assert len({*texts}) == 3
    other = client.post({**body, "seed": 8})
    assert texts != [choice["message"]["content"] for choice in other.json["choices"]]


def test_a_tiny_top_p_is_greedy(client, served):
    body = chat(image_part(1), temperature=2, top_p=1e-6, seed=3, num_image_tokens=4)
    assert client.post(body).text == alone(served, [1], 4)


def test_a_stop_ends_the_answer_before_it(client, served):
    whole = alone(served, [1], 16, max_tokens=12)
    words = whole.split()
    stop = " ".join(words[3:5])
    body = chat(image_part(1), num_image_tokens=16, max_tokens=12, stop=[stop, "never"])
    answer = client.post(body)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    assert answer.usage["completion_tokens"] < 12
    chunks = pieces(client.post({**body, "stream": True}))
    assert streamed_text(chunks) == answer.text


# ---- streams


@pytest.mark.parametrize("count", [4, 16])
def test_a_stream_holds_the_same_answer_in_pieces(client, served, count):
    chunks = pieces(client.post(chat(image_part(1), num_image_tokens=count, stream=True)))
    assert streamed_text(chunks) == alone(served, [1], count)
    assert len(chunks) > 4
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {piece["object"] for piece in chunks} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in chunks}) == 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["image_tokens"] == [count]


def test_a_stream_ends_with_the_usage_alone_on_request(client):
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
    chunks = pieces(client.post(chat(image_part(1), **options)))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] <= 12
    assert not any("usage" in piece for piece in chunks[:-1])
    ends = [c["index"] for p in chunks for c in p["choices"] if c["finish_reason"]]
    assert ends == [0, 1]


def test_a_mistake_in_a_stream_is_still_a_400(client):
    answer = client.post(chat(image_part(1), num_image_tokens=100, stream=True))
    assert answer.status == 400
    assert "8 x 8" in answer.error["message"]


def raw_request(client: Client, body: dict, pause: float = 0.0) -> socket.socket:
    """A connection that has sent a request, with a pause between head and body."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=30)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode())
    time.sleep(pause)
    connection.sendall(content)
    return connection


def test_a_client_that_hangs_up_frees_its_place():
    """In the middle of a long answer, streamed or not; the next client is served at once."""
    served = tiny_served()
    with running(served, max_rows=1) as client:
        steps = []
        decode = served.model.forward
        slow = threading.Event()

        def forward(*args, **kwargs):
            steps.append(1)
            if slow.is_set():
                time.sleep(0.05)
            return decode(*args, **kwargs)

        served.model.forward = forward
        for stream in (True, False):
            steps.clear()
            slow.set()
            connection = raw_request(client, chat(image_part(1), max_tokens=200, stream=stream))
            if stream:
                assert connection.recv(1024)
            while len(steps) < 3:
                time.sleep(0.01)
            connection.close()
            deadline = time.monotonic() + 100
            while client.metric("requests_running") and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(steps) < 150
            slow.clear()
            assert client.post(chat(image_part(1))).status == 200
        assert client.metric('requests_total{status="499"}') == 2
        assert client.metric("requests_in_house") == 0


# ---- mistakes


def error_of(client: Client, body) -> dict:
    answer = client.post(body)
    assert answer.status == 400, answer.body[:500]
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.error["message"]) < 1500
    return answer.error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_image_tokens": 5}, ["num_image_tokens", "5", "4 and 9"]),
        ({"num_image_tokens": 0}, ["num_image_tokens", "at least 1", "got 0"]),
        ({"num_image_tokens": -4}, ["num_image_tokens", "got -4"]),
        ({"num_image_tokens": 81}, ["num_image_tokens", "8 x 8", "9 x 9"]),
        ({"num_image_tokens": [1, 9]}, ["num_image_tokens", "8 x 8", "1 x 9"]),
        ({"num_image_tokens": [0, 9]}, ["num_image_tokens", "(0, 9)"]),
        ({"num_image_tokens": 10**18}, ["num_image_tokens", "at most", str(10**18)]),
        ({"num_image_tokens": 256 * 256}, ["num_image_tokens", "256 vision tokens", "65536"]),
        ({"num_image_tokens": "auto"}, ["num_image_tokens", "router", "'auto'"]),
        ({"num_image_tokens": "many"}, ["num_image_tokens", "'many'", "perfect square"]),
        ({"num_image_tokens": 4.0}, ["num_image_tokens", "4.0"]),
        ({"num_image_tokens": True}, ["num_image_tokens", "True"]),
        ({"num_image_tokens": {"a": 1}}, ["num_image_tokens", "an object with keys a"]),
        ({"num_image_tokens": [4, 4, 4]}, ["num_image_tokens", "3 entries", "1 images"]),
        ({"num_image_token": 4}, ["num_image_token ", "did you mean num_image_tokens"]),
        ({"num_tokens": 4}, ["num_tokens ", "did you mean max_tokens or num_image_tokens?"]),
        ({"budget": 3}, ["budget", "at least 4", "got 3"]),
        ({"budget": 0}, ["budget", "got 0"]),
        ({"budget": "8"}, ["budget", "'8'"]),
        ({"budget": 8, "num_image_tokens": 16}, ["budget", "at least 16", "got 8"]),
        ({"temperature": float("nan")}, ["temperature", "from 0 to 2", "nan"]),
        ({"temperature": float("inf")}, ["temperature", "inf"]),
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"temperature": "hot"}, ["temperature", "'hot'"]),
        ({"top_p": 0}, ["top_p", "above 0"]),
        ({"top_p": 2}, ["top_p", "got 2"]),
        ({"max_tokens": 0}, ["max_tokens", "from 1 to 1024", "got 0"]),
        ({"max_tokens": 10**9}, ["max_tokens", "from 1 to 1024", str(10**9)]),
        ({"max_tokens": 1024}, ["messages", "256", "1024 of the answer"]),
        ({"max_tokens": 4, "max_completion_tokens": 5}, ["max_completion_tokens", "4 and 5"]),
        ({"n": 0}, ["n must", "from 1 to 8", "got 0"]),
        ({"n": 9}, ["n must", "got 9"]),
        ({"seed": 2**64}, ["seed", "integer"]),
        ({"seed": 1.5}, ["seed", "1.5"]),
        ({"stop": ["a"] * 5}, ["stop", "at most 4"]),
        ({"stop": ""}, ["stop", "''"]),
        ({"stop": [1]}, ["stop", "[1]"]),
        ({"stream": "yes"}, ["stream", "'yes'"]),
        ({"stream_options": {"include_usage": True}}, ["stream_options", "stream true"]),
        ({"stream": True, "stream_options": 3}, ["stream_options", "object", "3"]),
        ({"tools": [{"type": "function"}]}, ["tools", "not supported"]),
        ({"logprobs": True}, ["logprobs", "not supported"]),
        ({"response_format": {"type": "json_object"}}, ["response_format", "not supported"]),
        ({"frequency_penalty": 1}, ["frequency_penalty", "not supported"]),
        ({"model": 3}, ["model", "a string", "3"]),
        ({"messages": []}, ["messages", "at least one", "an empty list"]),
        ({"messages": None}, ["messages", "None"]),
        ({"messages": "hello"}, ["messages", "'hello'"]),
        ({"messages": [3]}, ["messages[0]", "role and content", "3"]),
        ({"messages": [{"role": "judge", "content": "x"}]}, ["messages[0].role", "'judge'"]),
        ({"messages": [{"role": "user"}]}, ["messages[0].content", "None"]),
        ({"messages": [{"role": "user", "content": []}]}, ["messages[0].content", "empty list"]),
        ({"messages": [{"role": "user", "content": ""}]}, ["messages", "neither"]),
        ({"messages": [{"role": "user", "content": "x"}] * 1001}, ["messages", "1000", "1001"]),
        ({"messages": [{"role": "user", "content": [3]}]}, ["messages[0].content[0]", "3"]),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            ["messages[0].tool_calls"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            ["messages[0].content[0]", "input_audio"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            ["messages[0].content[0].text", "a string", "5"],
        ),
        ({"messages": [{"role": "user", "content": "what <image> is"}]}, ["<image>"]),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ["surrogate"]),
        ({"messages": [{"role": "user", "content": "read " * 300}]}, ["messages", "256", "300"]),
        ({"messages": [{"role": "user", "content": "a" * 40000}]}, ["messages", "40000"]),
    ],
)
def test_a_mistake_of_the_caller_is_named(client, settings, words):
    message = error_of(client, chat(image_part(1), **settings))["message"]
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (3, ["image_url", "an object with a url", "3"]),
        ({}, ["image_url.url", "None"]),
        ({"url": 3}, ["image_url.url", "3"]),
        ({"url": "file:///etc/hostname"}, ["image_url.url", "data URL", "file:///etc/hostname"]),
        ({"url": "/etc/hostname"}, ["data URL", "/etc/hostname"]),
        ({"url": "DATA:image/png;base64,AAAA"}, ["must be a data URL"]),
        ({"url": "http://127.0.0.1/a.png"}, ["data URL", "--allow-urls"]),
        ({"url": "data:image/png,abc"}, ["base64"]),
        ({"url": "data:image/png;base64,???"}, ["base64"]),
        ({"url": "data:image/png;base64,"}, ["image_url.url", "cannot be read"]),
        ({"detail": "medium"}, ["image_url.detail", "low, high, auto", "'medium'"]),
        ({"num_image_tokens": 7}, ["image_url.num_image_tokens", "7", "4 and 9"]),
        ({"num_image_tokens": 4, "detail": "low"}, ["one of detail and num_image_tokens"]),
        ({"size": 3}, ["image_url.size", "no argument"]),
    ],
)
def test_a_mistake_in_an_image_is_named(client, image, words):
    if isinstance(image, dict) and image and "url" not in image:
        image = {"url": data_url(picture(1)), **image}
    body = chat({"type": "image_url", "image_url": image})
    message = error_of(client, body)["message"]
    assert all(word in message for word in ["messages[0].content[0]", *words]), message


def test_a_budget_that_leaves_too_little_is_named_as_it_came(client):
    body = chat(image_part(1), image_part(2), num_image_tokens=[16, "auto"], budget=18)
    message = error_of(client, body)["message"]
    assert "at least 20" in message
    assert "got 18" in message


def test_counts_said_twice_are_refused(client):
    body = chat(image_part(1, detail="low"), image_part(2), num_image_tokens=[4, 9])
    assert "one of both" in error_of(client, body)["message"]
    pair = error_of(client, chat(image_part(1), image_part(2), num_image_tokens=[2, 3]))
    assert "[[2, 3], [2, 3]]" in pair["message"]


def test_too_many_images_are_refused(client):
    part = image_part(1)
    error = error_of(client, chat(*[part] * 17))
    assert "at most 16 images" in error["message"]
    assert "at most 1000 parts" in error_of(client, chat(*[part] * 10_000))["message"]


def test_detail_needs_the_counts_of_a_training():
    unnamed = tiny_served()
    unnamed.model.config.trained_num_image_tokens = None
    with running(unnamed) as client:
        message = error_of(client, chat(image_part(1, detail="low")))["message"]
        assert "--counts" in message
        assert client.post(chat(image_part(1, detail="auto"))).usage["image_tokens"] == [9]


def png_of_size(width: int, height: int) -> bytes:
    """The head of a PNG, and few of its pixels."""

    def block(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    blocks = block(b"IHDR", header), block(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks) + block(b"IEND", b"")


def noise_file() -> bytes:
    file = BytesIO()
    picture(1).save(file, "PNG")
    return file.getvalue()


def eps_file() -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png_of_size(60_000, 60_000), "pixels"),
        (png_of_size(4097, 4096), "pixels"),
        (eps_file(), "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        (b"hello", "no picture"),
        (b"", "no picture"),
        (noise_file()[:2000], "cannot be read"),
    ],
    ids=["bomb", "large", "eps", "eps head", "svg", "text", "empty", "cut off"],
)
def test_a_file_that_is_no_picture_is_refused(client, content, words, monkeypatch):
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", str(2**24))  # as the command line sets it
    error = error_of(client, chat(image_part(bytes_url(content))))
    assert words in error["message"]
    assert error["param"] == "messages[0].content[0].image_url.url"


class Site(BaseHTTPRequestHandler):
    """A picture; with more bytes behind it than a picture may have; and byte by byte, for ever."""

    def do_GET(self):
        content = noise_file()
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(content if self.path != "/drip" else b"")
            self.wfile.write(bytes(20_000) if self.path == "/large" else b"")
            while self.path == "/drip":
                self.wfile.write(b"x")
                time.sleep(0.02)

    def log_message(self, *arguments):
        pass


def test_pictures_are_fetched_within_the_bounds(served, monkeypatch):
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", 2.0)
    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    limits = Limits(allow_urls=True, max_image_bytes=20_000)
    assert len(noise_file()) < 20_000
    try:
        with running(tiny_served(limits)) as client:

            def ask(path: str):
                url = f"http://127.0.0.1:{site.server_port}/{path}"
                return chat(image_part(url), num_image_tokens=9)

            assert client.post(ask("picture")).text == alone(served, [1], 9)
            assert "more than 20000 bytes" in error_of(client, ask("large"))["message"]
            assert "longer than 2 seconds" in error_of(client, ask("drip"))["message"]
    finally:
        site.shutdown()
        site.server_close()


def test_pictures_are_read_as_everywhere_else(client, served):
    """Upright, and transparent pixels on white: the same answer as for the picture so read."""
    turned = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(5).rotate(90).save(turned, "PNG", exif=exif)
    assert client.post(chat(image_part(5))).usage["encoder_passes"] == 1
    again = client.post(chat(image_part(bytes_url(turned.getvalue()))))
    assert again.usage["encoder_passes"] == 0  # the same pixels
    assert again.text == alone(served, [5], 9)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"{'messages': 1}",
        b"\x00" * 100,
    ],
)
def test_a_body_that_is_no_json_object_is_refused(client, content):
    message = error_of(client, content)["message"]
    assert "body" in message


def test_a_body_of_endless_values_is_refused_before_it_is_parsed(client, monkeypatch):
    def parse(content: bytes, name: str):
        raise AssertionError("parsed")

    whole = json.dumps(chat(image_part(1), image_part(2)))
    assert sum(whole.count(mark) for mark in "{[,") < 50
    monkeypatch.setattr(chat_request, "parse_json", parse)
    for values in ("{}," * 100_001, "[" * 200_001, '"",' * 200_001, '{"":' * 200_001):
        error = error_of(client, f'{{"messages": [{values}'.encode())
        assert error["code"] == "too_many_values"
        assert "at most 200000" in error["message"]


def test_unknown_models_paths_and_methods(client):
    wrong = client.post(chat(image_part(1), model="gpt-4o"))
    assert wrong.status == 404
    assert wrong.error["code"] == "model_not_found"
    assert "'gpt-4o'" in wrong.error["message"]
    assert "'tiny'" in wrong.error["message"]
    for method, path, status in (
        ("GET", "/v1/models/gpt-4o", 404),
        ("POST", "/v1/completions", 404),
        ("GET", "/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
    ):
        answer = client.send(method, path)
        assert answer.status == status
        assert answer.error["type"] == "invalid_request_error"


def test_health_models_and_metrics(client):
    assert client.get("/health").json == {"status": "ok"}
    (model,) = client.get("/v1/models").json["data"]
    assert model["id"] == "tiny"
    assert model["trained_num_image_tokens"] == [*COUNTS]
    assert client.get("/v1/models/tiny").json == model
    before = client.metric("vision_tokens_total")
    client.post(chat(image_part(1), num_image_tokens=16))
    assert client.metric("vision_tokens_total") == before + 16
    lines = client.get("/metrics").body.decode().splitlines()
    assert all(line.startswith(("# HELP ", "# TYPE ", "tokenflex_")) for line in lines)
    names = [line.split("{")[0].split(" ")[0] for line in lines if line[0] != "#"]
    assert {"tokenflex_batch_rows_bucket", "tokenflex_first_token_seconds_sum"} <= {*names}


# ---- bodies and crowds


def test_a_body_that_is_too_large_gets_413(client):
    limit = Limits().max_body_bytes
    small = running(tiny_served(Limits(max_body_bytes=10_000)), body_seconds=5.0)
    with small as client:
        body = json.dumps(chat(image_part(1), question=" " * 10_000)).encode()
        declared = client.post(body)
        chunked = client.send("POST", "/v1/chat/completions", iter([body, body]))
        head = {"Expect": "100-continue", "Content-Length": str(10**9)}
        waiting = client.send("POST", "/v1/chat/completions", None, head)
        assert [a.status for a in (declared, chunked, waiting)] == [413] * 3
        assert "at most 10000 bytes" in declared.error["message"]
        assert client.post(chat(image_part(1))).status == 200
    assert limit == 64 * 2**20


@pytest.mark.slow
def test_a_gigabyte_is_answered_without_being_kept(client):
    block = b" " * 2**20
    sent = (block for _ in range(1024))
    head = {"Content-Length": str(2**30)}
    answer = client.send("POST", "/v1/chat/completions", sent, head)
    assert answer.status == 413
    assert client.server._bytes == 0


def test_a_body_that_never_ends_times_out():
    with running(tiny_served(), body_seconds=0.3) as client:
        connection = socket.create_connection(("127.0.0.1", client.port), timeout=30)
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(2**16).splitlines()[0]
        connection.close()
        assert client.get("/health").status == 200


def test_bodies_that_wait_are_bounded_together():
    """Bytes that were read are given back; a body for which there is no room gets 503."""
    size = len(json.dumps(chat(image_part(1))))
    with running(tiny_served(), max_bytes=2 * size) as client:
        for _ in range(4):
            assert client.post(chat(image_part(1))).status == 200
    with running(tiny_served(), max_bytes=size // 2) as client:
        assert client.post(chat(image_part(1))).error["code"] == "overloaded"
        assert client.post(chat(question="read r1c1")).status == 200


def closed_after(connection: socket.socket) -> float:
    start = time.monotonic()
    with suppress(ConnectionResetError):
        while connection.recv(2**12):
            pass
    return time.monotonic() - start


def test_a_head_that_never_ends_times_out(served, monkeypatch):
    """Of the first request of a connection and of the next; an answer may take longer."""
    monkeypatch.setattr(app, "HEAD_SECONDS", 0.5)
    half, whole = b"GET /health HTTP/1.1\r\nHost: x\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with running(tiny_served(), body_seconds=5.0) as client:
        for content in (b"", half, whole + half):
            connection = socket.create_connection(("127.0.0.1", client.port), timeout=30)
            connection.sendall(content)
            assert closed_after(connection) < 3  # before uvicorn ends an idle connection
            connection.close()
        slow = raw_request(client, chat(image_part(1)), pause=1.0)
        assert b" 200 " in slow.recv(2**12).splitlines()[0]
        slow.close()


def test_connections_beyond_the_bound_are_closed(monkeypatch):
    assert 64 <= app.most_connections() <= 2**31
    monkeypatch.setattr(app.Connection, "most", 3)
    with running(tiny_served()) as client:
        address = ("127.0.0.1", client.port)
        kept = [socket.create_connection(address, timeout=30) for _ in range(3)]
        time.sleep(0.2)
        assert closed_after(socket.create_connection(address, timeout=10)) < 5
        kept.pop().close()
        time.sleep(0.2)
        assert client.get("/health").status == 200
        for connection in kept:
            connection.close()


def test_a_client_that_hangs_up_while_its_picture_is_read_is_gone(monkeypatch):
    slow = tiny_served()
    release = threading.Event()
    monkeypatch.setattr(slow, "prepare", lambda chat: release.wait(60))
    with running(slow) as client:
        connection = raw_request(client, chat(image_part(1)))
        deadline = time.monotonic() + 10
        while client.metric("requests_in_house") < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        connection.close()
        while client.metric("requests_in_house") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.metric("requests_in_house") == 0
        assert client.server._bytes == 0
        assert client.metric('requests_total{status="499"}') == 1
        release.set()


def test_a_full_house_answers_503():
    with running(tiny_served(), max_requests=1) as client:
        connection = socket.create_connection(("127.0.0.1", client.port), timeout=30)
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        )
        deadline = time.monotonic() + 10
        while client.metric("requests_in_house") < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        full = client.post(chat(image_part(1)))
        assert full.status == 503
        assert full.error["code"] == "overloaded"
        assert full.error["type"] == "server_error"
        connection.close()
        while client.metric("requests_in_house") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.post(chat(image_part(1))).status == 200
