"""``tokenflex play`` before the page opens: one line for each mistake, exit code 2."""

from __future__ import annotations

import socket
import sys

import pytest

from tests.models.tiny import tiny_model
from tokenflex.cli import main


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def port():
    """A port that another program listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_full_port_is_one_line_before_the_model_is_loaded(port, capsys):
    assert main(["play", "no/such/folder", "--port", str(port)]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.count("\n") == 1
    assert f"--host 127.0.0.1 --port {port} cannot be listened at" in errors
    assert "give another port" in errors


def test_a_host_of_another_machine_is_one_line(capsys):
    assert main(["play", "no/such/folder", "--host", "192.0.2.1", "--port", "9"]) == 2
    assert "--host 192.0.2.1 --port 9 cannot be listened at" in capsys.readouterr().err


def test_a_missing_gradio_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["play", "no/such/folder", "--port", str(free_port())]) == 2
    errors = capsys.readouterr().err
    assert errors == "tokenflex: play needs gradio; pip install 'tokenflex[demo]'\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0", "expected at least 1, got 0"),
        ("65536", "expected at most 65535, got 65536"),
        ("web", "expected a whole number, got 'web'"),
    ],
)
def test_a_port_that_does_not_exist_is_one_line(given, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["play", "no/such/folder", "--port", given])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", sys.modules[__name__])  # any module will do
    tiny_model().config.save_pretrained(tmp_path)
    for folder, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "holds no *.safetensors file"),
    ):
        assert main(["play", str(folder), "--port", str(free_port())]) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert message in errors
