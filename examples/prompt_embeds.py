"""Pictures for any server of a plain language model: embeddings of the prompt in place of text.

    tokenflex train configs/demo.yaml --set model.image_positions=sequential --output runs/text
    tokenflex export runs/text/checkpoint --to language-model --output runs/text/language

(a server numbers tokens one by one, so those of an image may not share a position); in this
process, with transformers:

    python examples/prompt_embeds.py runs/text/checkpoint runs/text/language

or by a server, here vLLM's:

    vllm serve runs/text/language --enable-prompt-embeds --dtype float32
    python examples/prompt_embeds.py runs/text/checkpoint --url http://localhost:8000

The encoder runs once, in this process, for all counts.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import tokenflex  # noqa: F401  (the Auto classes learn our model)

NEW_TOKENS = 16


def request(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Post JSON, or get it without a body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as response:
        return json.load(response)


def ask_server(url: str, embeds: torch.Tensor, image_token_id: int) -> str:
    """Return the answer of a server with vLLM's ``prompt_embeds``."""
    buffer = io.BytesIO()
    torch.save(embeds.cpu(), buffer)  # [L, D], in the dtype of the server's model
    completion = request(
        f"{url}/v1/completions",
        {
            "model": request(f"{url}/v1/models")["data"][0]["id"],
            "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "logit_bias": {str(image_token_id): -100},  # servers ignore what we suppress
        },
    )
    return completion["choices"][0]["text"]


def ask_transformers(language_model: Any, embeds: torch.Tensor, tokenizer: Any) -> str:
    """Return the answer of the plain language model in this process."""
    mask = torch.ones(1, len(embeds), dtype=torch.int64)
    answer = language_model.generate(
        inputs_embeds=embeds[None], attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return tokenizer.decode(answer[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="the whole model")
    parser.add_argument("language_model", nargs="?", type=Path, help="its exported language model")
    parser.add_argument("--url", help="a server of that language model, in place of its folder")
    parser.add_argument("--image", type=Path, default=Path("examples/digits.png"))
    parser.add_argument("--prompt", default="read r2c3")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 9, 16])
    options = parser.parse_args()
    if (options.url is None) == (options.language_model is None):
        parser.error("give the folder of the language model, or --url of a server")

    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": options.prompt}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    data, tiles = processor.process_images([Image.open(options.image)])
    images = model.encode_images(**data)
    if options.language_model is not None:
        language_model = AutoModelForCausalLM.from_pretrained(options.language_model).eval()

    for count in options.counts:
        inputs = processor.encode_text([prompt], tiles, num_image_tokens=count)
        [embeds] = model.merged_embeddings(**inputs, encoded_images=images)
        if options.url is not None:
            answer = ask_server(options.url, embeds, model.config.image_token_id)
        else:
            answer = ask_transformers(language_model, embeds, processor.tokenizer)
        print(f"{count:>4} vision tokens: {answer.strip()}")


if __name__ == "__main__":
    main()
