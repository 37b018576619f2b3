"""``python -m experiments.serving.server CHECKPOINT``: requests per second of ``tokenflex serve``.

The server is a process of its own, its clients are threads of this one. Workloads take turns, so
that a slow minute of the machine meets all of them. A model of the digits answers questions about
canvases of the test split: each request shows a new picture, or one of a few that are asked again
and again at other counts, which the feature cache then has. All answers are compared with those of
``model.generate``, one prompt at a time.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.results import environment
from experiments.serving.pages import RESULTS, write_pages
from tokenflex.counts import tokens_of
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.evaluation.generation import special_tokens
from tokenflex.files import write_json
from tokenflex.models.loading import load_checkpoint
from tokenflex.routing.ladder import trained_counts

RESULT = RESULTS / "server.json"
MAX_TOKENS = 4
AGAIN = 8
"""Pictures of the workload that asks about the same ones again."""


@dataclass
class Question:
    """One request, and what came of it."""

    image: Any
    text: str
    count: int
    body: bytes = b""
    answer: str = ""
    seconds: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        file = BytesIO()
        self.image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        content = [image, {"type": "text", "text": self.text}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS}
        self.body = json.dumps({**body, "num_image_tokens": self.count}).encode()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m experiments.serving.server")
    parser.add_argument("checkpoint", type=Path, help="of a model of the digits")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--requests", type=int, default=64, help="of a workload in a round")
    parser.add_argument("--clients", type=int, default=16, help="at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the server's arithmetic")
    options = parser.parse_args(arguments)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = measure(**settings)
    write_json(options.out, result)
    if options.out == RESULT:
        write_pages()
    print(f"written to {options.out}")


def measure(
    checkpoint: Path, requests: int, clients: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Return the machine, the settings and one row per workload."""
    model, processor = load_checkpoint(checkpoint)
    counts = [tokens_of(count) for count in trained_counts(model)]
    workloads = {str(count): [count] for count in counts} | {"mixed": counts}
    pictures = iter(DigitsDataset("test", size=10**6, questions=1))
    asked: dict[tuple[str, str], list[list[Question]]] = {}
    with serving(checkpoint, threads) as server:
        run(server, questions(pictures, requests, counts), clients)  # a warm-up
        for _ in range(rounds):
            for name, of in workloads.items():
                batch = questions(pictures, requests, of)
                asked.setdefault((name, "new"), []).append(batch)
                run(server, batch, clients)
            few = itertools.cycle(list(itertools.islice(pictures, AGAIN)))
            batch = questions(few, requests, counts)
            asked.setdefault(("mixed", "asked again"), []).append(batch)
            run(server, batch, clients)
    surroundings = environment("cpu")
    torch.set_num_threads(1)  # the comparison is not timed
    total = [q for batches in asked.values() for batch in batches for q in batch]
    different = sum(q.answer != alone(model, processor, q) for q in total)
    return {
        "environment": surroundings,
        "threads": threads,
        "clients": clients,
        "requests_a_round": requests,
        "rounds": rounds,
        "answers": len(total),
        "answers_unlike_generate": different,
        "rows": [row(name, pictures, batches) for (name, pictures), batches in asked.items()],
    }


def questions(pictures: Iterator[Any], number: int, counts: Sequence[int]) -> list[Question]:
    """Return requests about the next pictures, at the counts in turn."""
    samples = itertools.islice(pictures, number)
    return [
        Question(s.images[0], s.conversations[0].turns[0].text, count)
        for s, count in zip(samples, itertools.cycle(counts), strict=False)
    ]


@contextmanager
def serving(checkpoint: Path, threads: int) -> Iterator[tuple[int, int]]:
    """Yield the port and the process id of a server."""
    command = [sys.executable, "-m", "tokenflex", "serve", str(checkpoint), "--port", "0"]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield int(line.rsplit(":", 1)[1].split("/")[0]), process.pid
        finally:
            process.terminate()


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process so far, as Linux tells it."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(server: tuple[int, int], batch: Sequence[Question], clients: int) -> None:
    """Ask all questions, ``clients`` at a time."""
    port, process = server

    def ask(question: Question) -> None:
        started = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.request("POST", "/v1/chat/completions", question.body)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {content[:500]!r}")
        answer = json.loads(content)
        question.answer = answer["choices"][0]["message"]["content"]
        question.usage = answer["usage"]
        question.seconds = time.perf_counter() - started
        ends.append(time.perf_counter())

    ends: list[float] = []
    begin, cpu_before = time.perf_counter(), cpu_seconds(process)
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, batch))
    seconds = max(ends) - begin
    for question in batch:
        question.usage["round_seconds"] = seconds
        question.usage["cpu_seconds"] = (cpu_seconds(process) - cpu_before) / len(batch)


def alone(model: Any, processor: Any, question: Question) -> str:
    """Return the answer of ``model.generate``."""
    content = [{"type": "image", "image": question.image}, {"type": "text", "text": question.text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"num_image_tokens": question.count},
    )
    options = special_tokens(model, processor.tokenizer)
    output = model.generate(**inputs, **options, do_sample=False, max_new_tokens=MAX_TOKENS)
    new = output[0, inputs["input_ids"].shape[1] :]
    text: str = processor.tokenizer.decode(new, skip_special_tokens=True)
    return text


def row(name: str, pictures: str, batches: Sequence[Sequence[Question]]) -> dict[str, Any]:
    """Return the figures of one workload over all rounds."""
    rates = [len(batch) / batch[0].usage["round_seconds"] for batch in batches]
    asked = [question for batch in batches for question in batch]
    return {
        "counts": name,
        "pictures": pictures,
        "requests": len(asked),
        "requests_per_second": round(median(rates), 1),
        "slowest_round": round(min(rates), 1),
        "fastest_round": round(max(rates), 1),
        "cpu_milliseconds": round(1000 * median(b[0].usage["cpu_seconds"] for b in batches)),
        "median_milliseconds": round(1000 * median(q.seconds for q in asked)),
        "vision_tokens": sum(q.usage["vision_tokens"] for q in asked),
        "encoder_passes": sum(q.usage["encoder_passes"] for q in asked),
    }


if __name__ == "__main__":
    main()
