"""``tokenflex play``: a page in the browser that answers a question at several counts."""

from __future__ import annotations

import argparse
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenflex.cli.common import device, quiet_libraries
from tokenflex.cli.options import positive
from tokenflex.cli.parser import CommandLine
from tokenflex.interruption import Interruption


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    play = commands.add(
        "play",
        _play,
        "open a page that answers a question about a picture at several counts, side by side",
        "tokenflex play runs/demo/checkpoint --port 7860",
        extra="demo",
    )
    play.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a checkpoint or a conversion: a folder, or org/name on the Hugging Face Hub",
    )
    play.add_argument("--port", type=_port, default=7860, help="port of the page (%(default)s)")
    play.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    play.add_argument("--max-tiles", type=positive, help="the most tiles of a picture")
    play.add_argument("--max-new-tokens", type=positive, default=64, help="longest answer (64)")


def _port(text: str) -> int:
    port = positive(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"expected at most 65535, got {port}")
    return port


def _play(options: argparse.Namespace) -> int:
    _check_free(options.host, options.port)  # before the model is loaded
    import gradio  # noqa: F401  # likewise

    quiet_libraries()
    from tokenflex.checkpoints import load_model
    from tokenflex.hub import local_checkpoint
    from tokenflex.serving.playground.page import build_page, launch_page
    from tokenflex.serving.playground.replies import Playground
    from tokenflex.serving.playground.reports import draw_accuracy

    checkpoint = local_checkpoint(options.model)
    model, processor = load_model(checkpoint)
    playground = Playground(
        model.to(device()),
        processor,
        max_new_tokens=options.max_new_tokens,
        max_tiles=options.max_tiles,
    )
    with TemporaryDirectory() as folder:
        accuracy = draw_accuracy(checkpoint, Path(folder))
        page = build_page(playground, str(options.model), accuracy)
        address = launch_page(page, options.host, options.port)
        print(f"playground of {options.model}: {address} (Ctrl-C ends it)", flush=True)
        try:
            with Interruption() as interruption:
                while not interruption.requested:
                    time.sleep(0.1)
        finally:
            page.close()
    return 0


def _check_free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at.

    Raises:
        OSError: The port is taken, or the host is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(
                f"--host {host} --port {port} cannot be listened at: {error.strerror or error}; "
                "give another port"
            ) from None
