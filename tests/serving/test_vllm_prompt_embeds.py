"""The exported language model behind a real ``vllm serve``: the example's answers are the model's.

vLLM's attention on a CPU needs a head_dim of 32.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, SiglipVisionConfig

from tests.models.tiny import IMAGE, picture
from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.digits.processor import digits_processor
from tokenflex.models.loading import load_checkpoint
from tokenflex.serving.export.run import export

pytest.importorskip("vllm", reason="vllm is not installed; make test-vllm installs it")

EXAMPLE = Path(__file__).parents[2] / "examples/prompt_embeds.py"
SECONDS_TO_START = 600


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompt_embeds") / "checkpoint"
    layers = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    vision = SiglipVisionConfig(
        **layers, num_attention_heads=2, image_size=32, patch_size=4, vision_use_head=False
    )
    text = {"vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"initializer_range": 0.15, "tie_word_embeddings": True, "eos_token_id": 2}
    text |= {"max_position_embeddings": 256}
    config = TokenFlexConfig(vision, Qwen2Config(**layers, **text), image_token_id=IMAGE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TokenFlexForConditionalGeneration(config).save_pretrained(folder)
    digits_processor(4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(checkpoint) -> Iterator[str]:
    """The address of a running server of the language model."""
    folder = checkpoint.parent / "language-model"
    export(checkpoint, folder, "language-model", report=str)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(folder), "--enable-prompt-embeds", "--dtype", "float32"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = checkpoint.parent / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("vllm")), *words, "--enforce-eager"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not _is_ready(address):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_the_example_gives_the_models_answers(checkpoint, address, tmp_path):
    picture(3).save(tmp_path / "picture.png")
    words = ["--url", address, "--image", str(tmp_path / "picture.png"), "--counts", "4", "9", "16"]
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), str(checkpoint), *words, "--prompt", "read r2c3"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers = dict(re.findall(r"(\d+) vision tokens: (.*)", result.stdout))
    model, processor = load_checkpoint(checkpoint)
    for count in (4, 9, 16):
        inputs = processor(images=picture(3), text="<image> read r2c3", num_image_tokens=count)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        new = output[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(new, skip_special_tokens=True)
        # vLLM puts no spaces between the words of this tokenizer.
        assert answers[str(count)].replace(" ", "") == expected.replace(" ", "")
    assert len(set(answers.values())) > 1  # counts matter to this model
