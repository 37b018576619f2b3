"""``tokenflex serve``: a model behind OpenAI's chat completions, with vision-token counts."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tokenflex.cli.common import device, quiet_libraries
from tokenflex.cli.options import counts_or_grids, non_negative, positive
from tokenflex.cli.parser import CommandLine

if TYPE_CHECKING:
    from tokenflex.serving.server.app import Options
    from tokenflex.serving.server.chat_request import Limits

MEGABYTE = 2**20


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    serve = commands.add(
        "serve",
        _serve,
        "serve a model over HTTP, as OpenAI's chat completions with a vision-token count per "
        "request and image",
        "tokenflex serve runs/demo/checkpoint --port 8000",
        extra="serve",
    )
    serve.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a checkpoint or a conversion: a folder, or org/name on the Hugging Face Hub",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    serve.add_argument("--port", type=_port, default=8000, help="0 for any free one (%(default)s)")
    serve.add_argument(
        "--name", help="name of the model in requests (MODEL and its last part by default)"
    )
    serve.add_argument("--device", help="cuda, cpu, ... (a GPU by default, if there is one)")
    serve.add_argument(
        "--counts",
        type=counts_or_grids,
        help="counts for detail and budgets, in place of those of the model's training, for "
        "example 64,144,256",
    )
    serve.add_argument(
        "--cache-mb",
        type=positive,
        default=256,
        help="encoder features to keep, so that another count of a picture costs no encoding "
        "(%(default)s)",
    )
    serve.add_argument(
        "--max-batch", type=positive, default=32, help="answers written side by side (%(default)s)"
    )
    serve.add_argument(
        "--max-queue",
        type=positive,
        default=512,
        help="requests in the house; others get 503 (%(default)s)",
    )
    serve.add_argument(
        "--max-tokens", type=positive, default=1024, help="longest answer (%(default)s)"
    )
    serve.add_argument(
        "--max-prompt-tokens",
        type=positive,
        metavar="TOKENS",
        help="text and vision tokens of a prompt (the model's positions)",
    )
    serve.add_argument(
        "--max-images", type=positive, default=16, help="pictures of a request (%(default)s)"
    )
    serve.add_argument(
        "--max-pixels",
        type=positive,
        default=2**24,
        help="width times height of a picture (%(default)s)",
    )
    serve.add_argument(
        "--max-image-mb", type=positive, default=20, help="a picture's file (%(default)s)"
    )
    serve.add_argument(
        "--max-body-mb", type=positive, default=64, help="a request's body (%(default)s)"
    )
    serve.add_argument(
        "--max-answers", type=positive, default=8, help="n of a request (%(default)s)"
    )
    serve.add_argument(
        "--allow-urls",
        action="store_true",
        help="fetch pictures from http(s) URLs: callers then choose addresses that this machine "
        "connects to, also inside your network",
    )
    serve.add_argument(
        "--grace-seconds",
        type=non_negative,
        default=30,
        help="time for answers in flight on SIGTERM or Ctrl-C (%(default)s)",
    )


def _port(text: str) -> int:
    port = non_negative(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"expected at most 65535, got {port}")
    return port


def limits_of(options: argparse.Namespace) -> Limits:
    """Return the bounds of requests that the command line asks for."""
    from tokenflex.serving.server.chat_request import Limits

    return Limits(
        max_body_bytes=options.max_body_mb * MEGABYTE,
        max_image_bytes=options.max_image_mb * MEGABYTE,
        max_images=options.max_images,
        max_prompt_tokens=options.max_prompt_tokens,
        max_tokens=options.max_tokens,
        max_n=min(options.max_answers, options.max_batch),
        allow_urls=options.allow_urls,
    )


def settings_of(options: argparse.Namespace) -> Options:
    """Return the settings of the server that the command line asks for."""
    from tokenflex.serving.server.app import Options

    given = str(options.model)
    names = [options.name] if options.name else [given, Path(given).resolve().name]
    return Options(
        names=tuple(dict.fromkeys(names)),
        max_rows=options.max_batch,
        max_requests=options.max_queue,
        grace_seconds=options.grace_seconds,
    )


def _serve(options: argparse.Namespace) -> int:
    from tokenflex.serving.server.address import bind

    bound = bind(options.host, options.port)  # first: a full port is told at once
    try:
        from tokenflex.serving.server.app import Server, run

        quiet_libraries()
        from tokenflex.serving.server.served import load_served

        warnings.filterwarnings("ignore", module=r"PIL\.")  # about the files of strangers
        os.environ["TOKENFLEX_MAX_PIXELS"] = str(options.max_pixels)
        served = load_served(
            options.model,
            device=options.device or device(),
            limits=limits_of(options),
            cache_bytes=options.cache_mb * MEGABYTE,
            counts=options.counts,
        )
        server = Server(served, settings_of(options))
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host

        def tell(_: object) -> None:
            print(f"{server.options.names[0]} is served at http://{shown}:{port}/v1", flush=True)

        run(server, bound, tell)
    finally:
        bound.close()
    return 0
