"""The page of ``tokenflex play`` in a headless Chromium: upload a picture, ask, read the table.

``make test-play`` runs it. With ``TOKENFLEX_PLAY_MODEL`` it asks that checkpoint in place of a tiny
random one, and with ``TOKENFLEX_PLAY_SCREENSHOT`` it writes the photograph of the page there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.dropin.processors import stock_processor
from tests.dropin.tiny import stock_model
from tests.models.tiny import tiny_model
from tests.serving.test_playground_command import free_port
from tests.serving.test_playground_replies import EPS, bomb
from tokenflex.checkpoints import load_model
from tokenflex.digits.processor import digits_processor
from tokenflex.dropin.replace import replace_projector
from tokenflex.serving.playground.asking import ask_at_counts
from tokenflex.training.checkpoint import save_model

pytest.importorskip("gradio", reason="the page needs gradio: make test-play")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page's tests need playwright: make test-play"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("the page's tests need Debian's chromium", allow_module_level=True)

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples/digits.png"
START_SECONDS = 300
ANSWER_MILLISECONDS = 120_000
WATCH = """
import os, socket
_connect = socket.socket.connect

def connect(self, address):
    host = str(address[0] if isinstance(address, tuple) else address)
    if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
        with open(os.environ["CONNECTIONS"], "a") as log:
            log.write(host + "\\n")
    return _connect(self, address)

socket.socket.connect = connect
"""
"""``sitecustomize`` of a server: it notes every connection to another machine."""


@dataclass
class Server:
    """A running ``tokenflex play``."""

    process: subprocess.Popen
    port: int
    model: Path
    connections: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


def command(model: Path, port: int, folder: Path) -> subprocess.Popen:
    """Start ``tokenflex play`` in ``folder``, which holds the model."""
    (folder / "watch").mkdir(exist_ok=True)
    (folder / "watch/sitecustomize.py").write_text(WATCH)
    path = [str(folder / "watch"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    changes = {
        "PYTHONPATH": os.pathsep.join(path),
        "CONNECTIONS": str(folder / "connections"),
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tokenflex", "play", str(model), "--port", str(port)],
        cwd=folder,
        env={**os.environ, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def serve(model: Path, folder: Path) -> Iterator[Server]:
    port = free_port()
    process = command(model, port, folder)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # pytest's own time limit is that of the whole job
        assert line.startswith(f"playground of {model}: http://127.0.0.1:{port}"), line
        yield Server(process, port, folder / model, folder / "connections")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("play")
    run = folder / "runs/demo"
    if given := os.environ.get("TOKENFLEX_PLAY_MODEL"):
        shutil.copytree(Path(given), run / "checkpoint")
        shutil.copy(Path(given).parent / "report.json", run)
    else:
        model = tiny_model(trained_num_image_tokens=[4, 9, 16])
        save_model(run / "checkpoint", model, digits_processor())
        report = {"accuracy": {"4": 0.5, "9": 0.75, "16": 0.875}}
        (run / "report.json").write_text(json.dumps(report))
    yield from serve(Path("runs/demo/checkpoint"), folder)


@pytest.fixture(scope="module")
def converted_server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("converted")
    model, processor = stock_model("llava"), stock_processor("llava")
    replace_projector(model, processor, num_image_tokens=4)
    for part in (model, processor):
        part.save_pretrained(folder / "llava")
    yield from serve(Path("llava"), folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens a server's page; all requests of the browser must go to that server."""
    pages, requests = [], []

    def open_at(server: Server) -> Any:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(ANSWER_MILLISECONDS)
        page.on("request", lambda request: requests.append((server.address, request.url)))
        page.goto(server.address, wait_until="domcontentloaded")
        page.locator("#ask").wait_for()
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.close()
    assert requests
    local = ("data:", "blob:")
    assert [url for address, url in requests if not url.startswith((address, *local))] == []


def upload(page: Any, path: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(path)
    page.locator("#picture button[aria-label='Remove image'], #picture img").first.wait_for()
    page.wait_for_timeout(500)


def write_question(page: Any, question: str) -> None:
    page.locator("#question textarea, #question input").first.fill(question)


def rows_after_asking(page: Any, number: int) -> list[list[str]]:
    """Press the button, wait for all answers, and return the texts of the table's cells."""
    page.locator("#ask").click()
    rows = page.locator("table.answers tbody tr")
    rows.nth(number - 1).wait_for()
    return [row.locator("td").all_inner_texts() for row in rows.all()]


def message_after_asking(page: Any) -> str:
    page.locator("#ask").click()
    page.locator(".message").wait_for()
    return page.locator(".message").inner_text()


def test_upload_ask_and_read_the_table(server, open_page, tmp_path):
    page = open_page(server)
    assert page.locator("#counts label").all_inner_texts() == ["4", "9", "16"]
    upload(page, DIGITS)
    write_question(page, "read r2c3")
    size = page.locator("#side input[type=number]")
    size.fill("5")
    size.press("Tab")
    rows = rows_after_asking(page, 4)

    model, processor = load_model(server.model)
    expected = [*ask_at_counts(model, processor, DIGITS, "read r2c3", (4, 9, 16, 25))]
    assert [row[0] for row in rows] == ["4", "9", "16", "25"]
    assert [row[1] for row in rows] == [answer.text for answer in expected]
    for row, answer in zip(rows, expected, strict=True):
        assert float(row[2]) == pytest.approx(answer.certainty, abs=0.0011)
        encoder, first_token, whole = map(float, row[3:6])
        assert 0 < encoder < first_token <= whole
    assert len({row[3] for row in rows}) == 1  # one pass of the encoder
    assert [row[6] for row in rows] == ["", "", "", "never trained with"]

    drawn = page.locator("#windows .gallery-item img, #windows button img")
    drawn.nth(3).wait_for()
    assert "25 tokens" in page.locator("#windows").inner_text()
    page.locator("#accuracy img").wait_for()

    write_question(page, "read r2c3")
    size.fill("0")
    size.press("Tab")
    page.locator("table.answers tbody tr").nth(3).wait_for()
    page.locator("#ask").click()
    page.locator("table.answers tbody tr").nth(3).wait_for(state="detached")
    page.locator("table.answers tbody tr").nth(2).wait_for()
    page.wait_for_timeout(2000)  # the pictures fade in
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    with Image.open(tmp_path / "page.png") as photograph:
        assert photograph.width == 1280
        assert len(photograph.convert("RGB").getcolors(2**24)) > 500
    if wanted := os.environ.get("TOKENFLEX_PLAY_SCREENSHOT"):
        Image.open(tmp_path / "page.png").convert("RGB").save(wanted, optimize=True)


def test_a_mistake_is_a_message_and_the_server_lives_on(server, open_page, tmp_path):
    page = open_page(server)
    assert message_after_asking(page).startswith("There is no picture yet")
    for name, content in (("text.png", b"no picture"), ("eps.png", EPS), ("bomb.png", bomb())):
        (tmp_path / name).write_bytes(content)
        page = open_page(server)
        upload(page, tmp_path / name)
        write_question(page, "odd")
        assert message_after_asking(page).startswith(f"The picture {name} cannot be read: ")
    page = open_page(server)
    upload(page, DIGITS)
    assert message_after_asking(page).startswith("The question is empty")
    for label in page.locator("#counts label").all():
        label.click()
    write_question(page, "odd")
    page.locator(".message", has_text="empty").wait_for()
    page.locator("#ask").click()
    page.locator(".message", has_text="No count is chosen").wait_for()
    page.locator("#counts label").nth(1).click()
    assert [row[0] for row in rows_after_asking(page, 1)] == ["9"]
    assert page.locator(".message").count() == 0
    assert server.process.poll() is None


def test_a_text_file_is_refused_by_the_picture_s_field(server, open_page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    page = open_page(server)
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "notes.txt")
    page.locator(".toast-body", has_text="notes.txt").wait_for()


def test_a_converted_stock_model_has_a_page_too(converted_server, open_page):
    page = open_page(converted_server)
    assert page.locator("#counts label").all_inner_texts() == ["1", "4"]
    upload(page, DIGITS)
    write_question(page, "what is")
    rows = rows_after_asking(page, 2)
    model, processor = load_model(converted_server.model)
    expected = [*ask_at_counts(model, processor, DIGITS, "what is", (1, 4))]
    assert [row[1] for row in rows] == [answer.text for answer in expected]
    assert [row[6] for row in rows] == ["training counts not recorded"] * 2
    assert page.locator("#accuracy").count() == 0


def test_a_full_port_is_one_line_and_the_first_server_lives_on(server, tmp_path):
    second = command(server.model, server.port, tmp_path)
    out, _ = second.communicate(timeout=START_SECONDS)
    assert second.returncode == 2
    assert out.count("\n") == 1
    assert f"--port {server.port} cannot be listened at" in out
    assert server.process.poll() is None


def test_ctrl_c_ends_it_and_it_spoke_to_no_other_machine(server, converted_server):
    """The last test: it ends the servers."""
    for ended in (server, converted_server):
        ended.process.send_signal(signal.SIGINT)
    for ended in (server, converted_server):
        started = time.monotonic()
        assert ended.process.wait(timeout=60) == 0
        assert time.monotonic() - started < 60
        assert "Traceback" not in ended.process.stdout.read()
        assert not ended.connections.exists()
