"""``tokenflex serve`` as a process: it starts, ends in order, and names a mistake in one line."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.forked import Command
from tests.serving.server_tools import Client, alone, chat, image_part, pieces, tiny_served
from tests.serving.test_server import raw_request
from tokenflex.cli import main
from tokenflex.serving.server import served
from tokenflex.serving.server.address import bind

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "checkpoint"
    served = tiny_served()
    served.model.save_pretrained(folder)
    served.processor.save_pretrained(folder)
    return folder


@contextmanager
def process(*arguments: object, before: Callable[[], None] | None = None):
    """Run the command, after a function."""
    started = Command("serve", *arguments, "--port", 0, folder=ROOT, before=before)
    try:
        line = started.first_line(timeout=120)
        assert line.startswith(f"{arguments[0]} is served at http://127.0.0.1:"), (
            line,
            started.poll() is not None and started.stderr.read(),
        )
        port = int(line.rsplit(":", 1)[1].removesuffix("/v1\n"))
        yield started, Client(None, port)
    finally:
        started.kill()
        started.wait(60)


def read_to_end(connection: socket.socket) -> bytes:
    content = b""
    while piece := connection.recv(2**16):
        content += piece
    return content


def test_a_server_answers_and_ends_in_order(checkpoint):
    """SIGTERM in the middle of two answers: both are finished, new ones refused, exit code 0."""
    served = tiny_served()
    with process(checkpoint) as (started, client):
        assert client.get("/health").status == 200
        assert client.get("/v1/models").json["data"][0]["id"] == str(checkpoint)
        for name in (str(checkpoint), "checkpoint"):
            answer = client.post(chat(image_part(1), num_image_tokens=4, model=name))
            assert answer.text == alone(served, [1], 4)
        assert client.post(chat(image_part(1), model="other")).status == 404
        body = chat(image_part(1), max_tokens=150, num_image_tokens=16)
        connections = [raw_request(client, {**body, "stream": stream}) for stream in (True, False)]
        first = connections[0].recv(2**12)  # the answer has begun
        started.send_signal(signal.SIGTERM)
        streamed = first + read_to_end(connections[0])
        whole = read_to_end(connections[1])
        assert started.wait(60) == 0
        assert b"[DONE]" in streamed
        expected = alone(served, [1], 16, max_tokens=150)
        (content,) = [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        assert content["choices"][0]["message"]["content"] == expected
        assert started.stderr.read() == ""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", client.port), timeout=1)


def slow_pictures() -> None:
    served.load_image = lambda *arguments, **options: time.sleep(300)


def test_a_shutdown_does_not_wait_for_bodies_and_pictures(checkpoint):
    """Both are refused in OpenAI's form, and a reader that is busy keeps no process alive."""
    with process(checkpoint, "--grace-seconds", "0", before=slow_pictures) as (started, client):
        connections = [
            raw_request(client, chat(image_part(1), stream=stream)) for stream in (True, False)
        ]
        half = socket.create_connection(("127.0.0.1", client.port), timeout=30)
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        deadline = time.monotonic() + 30
        while client.metric("requests_in_house") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        start = time.monotonic()
        started.send_signal(signal.SIGTERM)
        for connection in (*connections, half):
            head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
            assert b" 503 " in head.splitlines()[0]
            assert json.loads(body)["error"]["code"] == "shutting_down"
        assert started.wait(60) == 0
        assert time.monotonic() - start < 15
        assert started.stderr.read() == ""


def run_command(capsys, *arguments: object) -> tuple[int, list[str]]:
    try:
        code = main(["serve", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err.splitlines()


@pytest.fixture
def environment(monkeypatch):
    """The command sets the limit of pixels; later tests must not see it."""
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", "")


@pytest.mark.usefixtures("environment")
def test_a_full_port_is_one_line_before_anything_is_imported(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenflex.serving.server.app", None)  # cannot be imported
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    code, lines = run_command(capsys, checkpoint, "--port", port)
    taken.close()
    assert code == 2
    (line,) = lines
    assert f"port {port} of 127.0.0.1 cannot be used" in line
    assert "--port" in line


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "folder nowhere does not exist"),
        ([".", "--host", "256.1.1.1"], "--host 256.1.1.1 cannot be used"),
        (["."], "config.json does not exist"),
        (["stock"], "holds a stock llava: convert it first"),
        (["broken"], "not JSON"),
        ([".", "--port", "70000"], "at most 65535"),
        ([".", "--counts", "5"], "perfect square"),
        ([".", "--max-pixels", "0"], "at least 1"),
        ([], "MODEL"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name, content in (("stock", '{"model_type": "llava"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    port = [] if "--port" in arguments else ["--port", "0"]
    code, lines = run_command(capsys, *arguments, *port)
    assert code == 2
    (line,) = lines
    assert words in line


@pytest.mark.usefixtures("environment")
def test_a_missing_extra_is_named(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.delitem(sys.modules, "tokenflex.serving.server.app", raising=False)
    for name in [name for name in sys.modules if name.startswith("starlette.")]:
        monkeypatch.delitem(sys.modules, name)
    code, lines = run_command(capsys, checkpoint)
    assert code == 2
    assert "pip install 'tokenflex[serve]'" in lines[0]


def test_a_rough_life_leaves_no_traceback(checkpoint):
    """Bad bodies, broken HTTP, clients that hang up, and Ctrl-C with no time for answers."""
    options = ["--max-pixels", "900", "--grace-seconds", "0"]
    with process(checkpoint, *options) as (started, client):
        large = client.post(chat(image_part(1)))  # 32 x 32 = 1024 pixels
        assert large.status == 400
        assert "900" in large.error["message"]
        assert client.post(b"\xff" * 1000).status == 400
        for content in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat"):
            connection = socket.create_connection(("127.0.0.1", client.port), timeout=30)
            connection.sendall(content)
            connection.close()
        body = chat(question="read r1c1", stream=True, max_tokens=200)
        raw_request(client, body).close()
        assert pieces(client.post(chat(question="read r1c1", stream=True)))
        connection = raw_request(client, {**body, "n": 8, "temperature": 1, "seed": 1})
        content = connection.recv(2**12)
        started.send_signal(signal.SIGINT)
        content += read_to_end(connection)
        assert started.wait(60) == 0
        assert b"shutting down" in content
        lines = started.stderr.read().splitlines()
        assert all("Invalid HTTP request" in line for line in lines), lines
