"""Options of ``tokenflex serve``: each reaches what it bounds."""

from __future__ import annotations

import os
import socket

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
pytest.importorskip("uvicorn", reason="needs the extra [serve]")

from tests.serving.server_tools import tiny_served
from tokenflex.cli import main
from tokenflex.serving.server import app, served
from tokenflex.serving.server.app import Options
from tokenflex.serving.server.chat_request import Limits

MEGABYTE = 2**20


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Run the command up to the server; return loading, settings and address."""
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", "")
    monkeypatch.chdir(tmp_path)
    model = tiny_served()

    def start(*arguments: str):
        found: list = []

        def load(path, **options):
            found.extend([str(path), options])
            return model

        def run(server, bound: socket.socket, tell):
            found.extend([server, bound.getsockname()])

        monkeypatch.setattr(served, "load_served", load)
        monkeypatch.setattr(app, "run", run)
        assert main(["serve", "runs/model", "--port", "0", "--device", "cpu", *arguments]) == 0
        path, options, server, address = found
        assert path == "runs/model"
        assert server.served is model
        return options, server.options, address

    return start


def test_the_defaults_are_those_of_the_library(started):
    loading, settings, address = started()
    assert loading == {
        "device": "cpu",
        "limits": Limits(),
        "cache_bytes": 256 * MEGABYTE,
        "counts": None,
    }
    assert settings == Options(names=("runs/model", "model"))
    assert address[0] == "127.0.0.1"
    assert os.environ["TOKENFLEX_MAX_PIXELS"] == str(2**24)


LIMITS = {
    "--max-body-mb": ("max_body_bytes", 3 * MEGABYTE),
    "--max-image-mb": ("max_image_bytes", 3 * MEGABYTE),
    "--max-images": ("max_images", 3),
    "--max-prompt-tokens": ("max_prompt_tokens", 3),
    "--max-tokens": ("max_tokens", 3),
    "--max-answers": ("max_n", 3),
}


@pytest.mark.parametrize("option", LIMITS)
def test_a_bound_of_requests_is_set_alone(started, option):
    name, value = LIMITS[option]
    loading, settings, _ = started(option, "3")
    assert loading["limits"] == Limits(**{name: value})
    assert settings == Options(names=("runs/model", "model"))


SETTINGS = {
    "--max-batch": ("max_rows", 20),
    "--max-queue": ("max_requests", 20),
    "--grace-seconds": ("grace_seconds", 20),
}


@pytest.mark.parametrize("option", SETTINGS)
def test_a_setting_of_the_server_is_set_alone(started, option):
    name, value = SETTINGS[option]
    loading, settings, _ = started(option, "20")
    assert settings == Options(**{"names": ("runs/model", "model"), name: value})
    assert loading["limits"] == Limits()


def test_other_options_reach_their_place(started):
    loading, _, _ = started("--allow-urls", "--cache-mb", "7", "--counts", "4,9")
    assert loading["limits"] == Limits(allow_urls=True)
    assert loading["cache_bytes"] == 7 * MEGABYTE
    assert [*loading["counts"]] == [4, 9]
    assert started("--name", "mine")[1].names == ("mine",)
    started("--max-pixels", "77")
    assert os.environ["TOKENFLEX_MAX_PIXELS"] == "77"


def test_answers_of_a_request_fit_into_a_batch(started):
    loading, _, _ = started("--max-batch", "2")
    assert loading["limits"].max_n == 2
