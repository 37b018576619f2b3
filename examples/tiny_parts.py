"""The data and models that docs/how-to/own-data.md begins with, made without a download.

    python examples/tiny_parts.py here

writes ``here/models/siglip`` and ``here/models/qwen``, tiny and with random weights, and 60
pictures with two questions each: of 50 in ``here/data.jsonl``, of 10 in ``here/held_out.jsonl``.
Every command of the page then runs in ``here``. A model of these parts answers at random until it
has been trained for many steps.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 70, 220),
    "yellow": (230, 210, 50),
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_data(folder: Path, pictures: int = 60, held_out: int = 10, seed: int = 0) -> None:
    """Draw pictures of a square or a circle; write their questions, a sample a line."""
    draws = random.Random(seed)
    (folder / "photos").mkdir(parents=True)
    lines = []
    for i in range(pictures):
        colour, shape = draws.choice([*COLOURS]), draws.choice(["square", "circle"])
        image = Image.new("RGB", (draws.randint(80, 200), draws.randint(80, 200)), "white")
        left, top = draws.randint(0, 30), draws.randint(0, 30)
        pen = ImageDraw.Draw(image)
        draw = pen.rectangle if shape == "square" else pen.ellipse
        draw((left, top, left + 45, top + 45), fill=COLOURS[colour])
        image.save(folder / f"photos/{i:02}.png")
        for question, answer in (
            ("What colour is the shape?", colour),
            ("What shape is it?", shape),
        ):
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            lines.append(json.dumps({"images": [f"photos/{i:02}.png"], "messages": messages}))
    first = 2 * (pictures - held_out)
    for name, part in (("data.jsonl", lines[:first]), ("held_out.jsonl", lines[first:])):
        (folder / name).write_text("\n".join(part) + "\n", encoding="utf-8")


def write_encoder(folder: Path) -> None:
    """Save a SigLIP encoder with 8 x 8 patches, and its image processor."""
    config = SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        vision_use_head=False,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def write_language_model(folder: Path, texts: list[str]) -> None:
    """Save a Qwen2, and a tokenizer of these texts with a chat template."""
    words = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words.train_from_iterator(texts, vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to make; it must not exist")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder} exists; give another folder, or delete it")
    torch.manual_seed(0)
    write_data(folder)
    write_encoder(folder / "models/siglip")
    texts = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()
    write_language_model(folder / "models/qwen", texts)
    print(
        f"{folder} has pictures, questions and two tiny models; in it, for example\n"
        "  tokenflex init --vision models/siglip --text models/qwen --data data.jsonl\n"
        "  tokenflex train train.yaml --set stages.0.steps=100 --set stages.1.steps=100"
    )


if __name__ == "__main__":
    main()
