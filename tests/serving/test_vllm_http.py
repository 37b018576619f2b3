"""``vllm serve`` over HTTP: counts in requests, errors with status 400, a server that lives on."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.models.tiny import IMAGE, picture
from tests.serving.checkpoints import save_checkpoint
from tokenflex.models.loading import load_checkpoint

pytest.importorskip("vllm", reason="vllm is not installed; make test-vllm installs it")

NEW_TOKENS = 4
SECONDS_TO_START = 400
A, B = picture(1), picture(2)


def data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


class Server:
    """A running server, and the same checkpoint in transformers."""

    def __init__(self, port: int, folder: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.name = str(folder)
        self.model, self.processor = load_checkpoint(folder)

    def get(self, path: str) -> int:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=60) as response:
            return response.status

    def post(self, messages: Any, **options: Any) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of a chat completion."""
        return self._post("/v1/chat/completions", messages=messages, **options)

    def complete(self, prompt: Any) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of a completion of a text, or of token ids."""
        return self._post("/v1/completions", prompt=prompt)

    def _post(self, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        body = {
            "model": self.name,
            "temperature": 0,
            "max_tokens": NEW_TOKENS,
            "ignore_eos": True,
            "return_token_ids": True,
            **options,
        }
        request = urllib.request.Request(
            f"{self.address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def ask(self, *parts: Any, counts: Any = None) -> list[int]:
        """Return the new tokens of an answer to texts and images."""
        options = {} if counts is None else {"mm_processor_kwargs": {"num_image_tokens": counts}}
        status, body = self.post(conversation(*parts), **options)
        assert status == 200, body
        return body["choices"][0]["token_ids"]

    def expected(self, *parts: Any, counts: Any) -> list[int]:
        """Return what transformers generates."""
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part}
            for part in parts
        ]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            num_image_tokens=counts,
        )
        output = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None
        )
        return output[0, -NEW_TOKENS:].tolist()


def image_part(image: Image.Image, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image), **options}}


def conversation(*parts: Any) -> list[dict[str, Any]]:
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append(part if isinstance(part, dict) else image_part(part))
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = save_checkpoint(tmp_path_factory.mktemp("served") / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(folder), "--port", str(port), "--host", "127.0.0.1"]
    arguments += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
    arguments += ["--enforce-eager", "--trust-request-mm-kwargs"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    log_path = folder.parent / "server.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        served = Server(port, folder)
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while True:
                assert process.poll() is None, log_path.read_text()[-4000:]
                assert time.monotonic() < deadline, log_path.read_text()[-4000:]
                try:
                    served.get("/health")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.5)
            yield served
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.parametrize("counts", [4, 9, 16, [[2, 3]], "default"])
def test_answers_are_those_of_transformers(server, counts):
    given = None if counts == "default" else counts
    ours = [(2, 3)] if counts == [[2, 3]] else given
    assert server.ask(A, " odd", counts=given) == server.expected(A, " odd", counts=ours)


def test_images_of_a_request_have_counts_of_their_own(server):
    parts = ("odd ", A, " where ", B)
    answers = [server.ask(*parts, counts=counts) for counts in ([4, 16], [16, 4])]
    assert answers == [server.expected(*parts, counts=counts) for counts in ([4, 16], [16, 4])]
    assert answers[0] != answers[1]


def test_a_count_at_the_top_of_a_request_is_not_seen(server):
    """As the page says; a vLLM that shows it to us should have it honoured."""
    status, body = server.post(conversation(A, " odd"), num_image_tokens=4)
    assert status == 200, body
    assert body["choices"][0]["token_ids"] == server.ask(A, " odd", counts=16)


def test_openais_detail_is_the_smallest_or_largest_count(server):
    for detail, count in (("low", 4), ("high", 16)):
        assert server.ask(image_part(A, detail=detail), " odd") == server.expected(
            A, " odd", counts=count
        )
    mixed = server.ask(image_part(A, detail="high"), " odd ", image_part(B, detail="low"))
    assert mixed == server.expected(A, " odd ", B, counts=[16, 4])


def test_an_images_detail_goes_before_the_requests_count(server):
    status, body = server.post(
        conversation(image_part(A, detail="low"), " odd ", B),
        mm_processor_kwargs={"num_image_tokens": 9},
    )
    assert status == 200, body
    expected = server.expected(A, " odd ", B, counts=[4, 9])
    assert body["choices"][0]["token_ids"] == expected


def test_an_image_may_name_its_count(server):
    answer = server.ask(image_part(A, num_image_tokens=9), " odd ", B)
    assert answer == server.expected(A, " odd ", B, counts=[9, 16])


def test_automatic_counts_are_served(server):
    inputs = server.processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": A}, {"type": "text", "text": " where 3"}],
            }
        ],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        num_image_tokens="auto",
    )
    chosen = server.model.choose_counts(**inputs)["num_image_tokens"]
    expected = server.expected(A, " where 3", counts=chosen)
    assert server.ask(A, " where 3", counts="auto") == expected


def test_a_budget_is_shared_by_images_without_a_count(server):
    parts = (image_part(A, detail="low"), " odd ", B)
    status, body = server.post(conversation(*parts), mm_processor_kwargs={"budget": 13})
    assert status == 200, body
    answers = [server.expected(A, " odd ", B, counts=[4, count]) for count in (4, 9)]
    assert body["choices"][0]["token_ids"] in answers
    status, body = server.post(conversation(*parts), mm_processor_kwargs={"budget": 7})
    assert status == 400
    assert "budget must be at least 8" in body["error"]["message"]


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (5, "num_image_tokens must be a perfect square"),
        (0, "num_image_tokens must be at least 1, got 0"),
        (100, "num_image_tokens[0] must be at most the 8 x 8 patches of a tile, in height and"),
        ([1, 64], "in height and in width, got 1 x 64 = 64"),
        ("many", "num_image_tokens must be a count or 'auto', got 'many'"),
        ([4, 9, 16], "got 3 entries for 1 images"),
        ({"low": 4}, "num_image_tokens must be an int"),
    ],
)
def test_a_bad_count_is_status_400_with_our_message(server, counts, words):
    status, body = server.post(
        conversation(A, " odd"), mm_processor_kwargs={"num_image_tokens": counts}
    )
    assert status == 400
    assert words in body["error"]["message"]
    assert server.ask(A, " odd", counts=4) == server.expected(A, " odd", counts=4)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},), "image"),
        ((image_part(A, detail="medium"),), "detail"),
        ((A, " <image> odd"), "<image>"),
    ],
)
def test_a_bad_message_is_status_400(server, parts, words):
    status, body = server.post(conversation(*parts))
    assert status == 400
    assert words in body["error"]["message"]
    assert server.get("/health") == 200


@pytest.mark.parametrize("prompt", ["<image> odd", [IMAGE, 20], ["odd", "odd <image>"]])
def test_a_placeholder_in_a_completion_is_status_400(server, prompt):
    status, body = server.complete(prompt)
    assert status == 400
    assert "'<image>' once per image, got 1 for 0 images" in body["error"]["message"]
    status, body = server.complete("odd")
    assert status == 200, body


def test_requests_of_mixed_counts_are_answered_side_by_side(server):
    counts = [1, 4, 9, 16, 25, [[2, 3]], "auto", [4]] * 3
    alone = [server.ask(A, " odd", counts=count) for count in counts[:8]] * 3
    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(server.ask, A, " odd", counts=count) for count in counts]
        assert [future.result() for future in futures] == alone
