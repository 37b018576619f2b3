"""Random bodies: whatever comes, the answer is a completion or one clear error, and no fault."""

from __future__ import annotations

import base64
import copy
import json
import math
import random
from typing import Any

import pytest

from tests.models.tiny import picture
from tests.serving.server_tools import bytes_url, chat, data_url, image_part, running, tiny_served
from tests.serving.test_server import noise_file
from tokenflex.serving.server.chat_request import Limits, RequestError, Sampling, parse_request

BODIES = 250
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 4, 9, 2**31, 2**63, 10**40, 0.5, 4.0, -0.0, 1e308),
    *(
        math.nan,
        math.inf,
        -math.inf,
        "",
        "auto",
        "low",
        "4",
        "\x00",
        "\ud800",
        "é" * 300,
        "<image>",
    ),
    *("<eos>", "data:", "data:image/png;base64,", "file:///etc/passwd", "http://[", "{{ 7 * 7 }}"),
    *([], {}, [[]], [None], [4], [2, 3], [4, 9], ["auto"], {"url": "x"}, {"type": "text"}),
    [[[[[[]]]]]],
]


PLAUSIBLE: dict[str, list[Any]] = {
    "num_image_tokens": [4, 16, [2, 3], [4, 9], ["auto", 4], "auto", None],
    "budget": [8, 30, 1000],
    "temperature": [0, 0.7, 2],
    "top_p": [0.1, 1],
    "max_tokens": [1, 8],
    "stop": ["r", ["3", "blank"]],
    "seed": [0, -5],
    "n": [1, 3],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "model": ["tiny"],
    "tools": [[], None],
    "user": ["somebody", 3],
}


def values_of(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.8:
        return rng.choice(ODD)
    if kind < 0.9:
        return [values_of(rng) for _ in range(rng.randrange(4))]
    return {rng.choice(["url", "type", "text", "detail"]): values_of(rng)}


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every part of a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, (dict, list)):
            found += places(inner, (*path, key))
    return found


def mutated(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Replace, remove or add a few parts of a body."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.randrange(1, 3)):
        if rng.random() < 0.5:
            name = rng.choice([*PLAUSIBLE])
            body[name] = rng.choice(PLAUSIBLE[name])
            continue
        path = rng.choice(places(body) or [("messages",)])
        owner = body
        for key in path[:-1]:
            owner = owner[key]
        if rng.random() < 0.15 and isinstance(owner, dict) and path[-1] in owner:
            del owner[path[-1]]
        else:
            owner[path[-1]] = copy.deepcopy(values_of(rng))  # or a body could hold itself
    return body


def seeds_of_bodies() -> list[dict[str, Any]]:
    return [
        chat(image_part(1), num_image_tokens=4),
        chat(image_part(1, detail="low"), image_part(2, num_image_tokens=[2, 3]), stream=True),
        chat(image_part(1), image_part(2), budget=20, n=2, seed=1, temperature=1.0),
        {"messages": [{"role": "system", "content": "read"}, {"role": "user", "content": "r1c1"}]},
    ]


@pytest.fixture(scope="module")
def client():
    with running(tiny_served(Limits(max_tokens=8)), body_seconds=5.0) as client:
        yield client


def check(answer, sent: Any) -> None:
    assert answer.status in (200, 400, 404, 413), (answer, sent)
    if answer.status == 200:
        return
    error = answer.error
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 2000
    assert "Traceback" not in error["message"]


def test_mutated_requests_are_answered_or_refused(client, caplog):
    rng = random.Random(0)
    bodies = seeds_of_bodies()
    statuses = []
    for _ in range(BODIES):
        body = mutated(rng.choice(bodies), rng)
        content = json.dumps(body).encode("utf-8", "surrogatepass")
        answer = client.post(content)
        check(answer, body)
        statuses.append(answer.status)
    assert 0.1 < statuses.count(200) / BODIES < 0.9  # both sides were reached
    assert not caplog.records
    assert client.post(bodies[0]).status == 200


def test_damaged_json_is_answered_or_refused(client, caplog):
    rng = random.Random(1)
    for _ in range(60):
        content = bytearray(json.dumps(rng.choice(seeds_of_bodies())).encode())
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(content))
            content[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        check(client.post(bytes(content)), content)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_damaged_pictures_are_answered_or_refused(client, caplog, kind):
    rng = random.Random(kind)
    whole = data_url(picture(1), kind)
    content = bytearray(base64.b64decode(whole.partition(",")[2]))
    for _ in range(15):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        damaged = damaged[: rng.randrange(1, len(damaged) + 1)]
        check(client.post(chat(image_part(bytes_url(bytes(damaged))))), damaged)
    assert not caplog.records
    assert client.post(chat(image_part(bytes_url(noise_file())))).status == 200


def test_anything_parses_or_is_refused():
    """Thousands of bodies, without a server: nothing but a RequestError leaves the parser."""
    rng = random.Random(2)
    bodies = seeds_of_bodies()
    refused = 0
    for _ in range(2000):
        content = json.dumps(mutated(rng.choice(bodies), rng)).encode("utf-8", "surrogatepass")
        try:
            request = parse_request(content, Limits(), Sampling())
        except RequestError as error:
            refused += 1
            json.dumps(error.body()).encode()
        else:
            assert request.messages
            assert 1 <= request.sampling.n <= 8
            assert 0 <= request.sampling.temperature <= 2
    assert 500 < refused < 1950
