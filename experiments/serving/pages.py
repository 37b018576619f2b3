"""``python -m experiments.serving.pages``: the measured tables of docs/serving, from their JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("docs/results/serving")
FOLDER = Path("docs/serving")
BEGIN, END = "<!-- measured: written by experiments/serving/pages.py -->\n", "<!-- end -->"
ENGINES = {
    "[`tokenflex serve`](server.md)": ("yes", "yes", "with a router", "yes", "yes"),
    "[vLLM](vllm.md)": ("yes", "yes", "with a router", "yes", "yes, beside its own caches"),
    "[a language-model server, `prompt_embeds`](export.md)": (
        *("yes", "yes", "with a router", "yes"),
        "yes: `encode_images` of your process",
    ),
    "[exported graphs](export.md)": (
        *("among the exported", "among the exported", "no", "no"),
        "yes: the encoder is a graph of its own",
    ),
    "[`tokenflex play`](playground.md)": (
        *("several at a time", "one image", "with a router", "no"),
        "yes: one pass for all answers",
    ),
    "`transformers serve` 5.23": ("in `chat_template_kwargs`", "no", "no", "no", "no"),
}
"""Abilities of each way to serve: a count per request, per image, auto, budget, shared encoder."""


def load(name: str) -> dict[str, Any]:
    """Return a committed result, "server" or "vllm"."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def overview() -> str:
    """Return the table of docs/serving/README.md."""
    measured = {
        "[`tokenflex serve`](server.md)": _rates(load("server"), "encoder_passes", "requests"),
        "[vLLM](vllm.md)": _rates(load("vllm"), "encoder_passes_per_request"),
    }
    heads = ["engine", "count per request", "count per image", "`auto`", "`budget`"]
    heads += ["one encoder pass for all counts", "requests/s at 4 / 9 / 16 / mixed"]
    heads += [
        "encoder passes a request: new picture / asked again",
    ]
    return _table(
        heads,
        [(name, *can, *measured.get(name, ("", ""))) for name, can in ENGINES.items()],
    )


def _rates(result: dict[str, Any], passes: str, per: str | None = None) -> tuple[str, str]:
    *new, again = result["rows"]
    each = [row[passes] / (row[per] if per else 1) for row in (new[-1], again)]
    return (
        " / ".join(str(row["requests_per_second"]) for row in new),
        " / ".join(f"{value:.2g}" for value in each),
    )


def server_table() -> str:
    """Return the table of docs/serving/server.md."""
    result = load("server")
    machine = result["environment"]
    rows = []
    for row in result["rows"]:
        asked = row["requests"]
        rows.append(
            (
                row["counts"],
                row["pictures"],
                f"{row['requests_per_second']} ({row['slowest_round']} to {row['fastest_round']})",
                row["median_milliseconds"],
                row["cpu_milliseconds"],
                f"{row['vision_tokens']} in {asked} requests",
                f"{row['encoder_passes']} in {asked} requests",
            )
        )
    heads = ["counts", "pictures", "requests/s, median (range) of rounds", "ms of a request"]
    heads += ["CPU ms of the server", "vision tokens", "encoder passes"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, at a load of {machine['load']}; "
        f"threads of the server's arithmetic: {result['threads']}; {result['clients']} clients; "
        f"{result['rounds']} rounds of {result['requests_a_round']} requests. "
        f"{result['answers_unlike_generate']} of {result['answers']} answers differ from those of "
        f"`model.generate` alone.\n\n{_table(heads, rows)}"
    )


def vllm_table() -> str:
    """Return the table of docs/serving/vllm.md."""
    result = load("vllm")
    rows = [
        (
            row["counts"],
            f"{row['requests_per_second']} ({row['slowest_round']} to {row['fastest_round']})",
            row["cpu_ms_per_request"],
            row["vision_tokens_per_request"],
            row["encoder_passes_per_request"],
        )
        for row in result["rows"]
    ]
    heads = ["counts", "requests/s, median (range) of rounds", "CPU ms a request"]
    heads += ["vision tokens", "encoder passes"]
    return (
        f"Two cores of an AMD EPYC at a load of {result['load']} (the engine's own threads are "
        f"part of it); {result['rounds']} rounds of {result['requests']} requests.\n\n"
        f"{_table(heads, rows)}"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


TABLES = {"README.md": overview, "server.md": server_table, "vllm.md": vllm_table}


def with_table(page: str, table: str) -> str:
    """Return a page with its measured table replaced."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END, 1)[1]


def write_pages() -> None:
    """Write the tables into their pages."""
    for name, table in TABLES.items():
        path = FOLDER / name
        page = with_table(path.read_text(encoding="utf-8"), table())
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_pages()
