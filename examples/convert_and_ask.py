"""From a saved stock model to answers at three counts: by commands, and by Python.

    python examples/convert_and_ask.py
    python examples/convert_and_ask.py --model models/llava --images photos --tokens 256

Without --model a tiny LLaVA with random weights is saved and converted; its answers are
meaningless. The commands are printed before they run, as you would type them.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from tiny_llava import COLOURS, tiny_llava

import tokenflex
from tokenflex.cli import main as command

QUESTION = "which colour is this"


def run(*words: object) -> None:
    """Run one command, or stop with its exit code."""
    print("$", shlex.join(["tokenflex", *map(str, words)]))
    if code := command([str(word) for word in words]):
        raise SystemExit(code)


def tiny_stock_model(folder: Path) -> tuple[Path, Path]:
    """Save a stock model and a few pictures; return both folders."""
    for part in tiny_llava():
        part.save_pretrained(folder / "stock")
    (folder / "photos").mkdir()
    for name, colour in COLOURS.items():
        picture = Image.new("RGB", (64, 64), colour)
        picture.paste((128, 128, 128), (0, 0, 20, 40))
        picture.save(folder / "photos" / f"{name}.png")
    return folder / "stock", folder / "photos"


def ask_in_python(folder: Path, picture: Path, counts: list[int]) -> None:
    """Answer at each count and within a budget, with one pass of the vision encoder."""
    model, processor = tokenflex.from_pretrained(folder)
    model.eval()
    data, tiles = processor.process_images([picture])
    with torch.no_grad():
        encoded = model.encode_images(**data)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    options = {"add_special_tokens": processor.adds_special_tokens(prompt)}
    for count in [*counts, "auto"]:
        inputs = processor.encode_text(prompt, tiles, num_image_tokens=count, **options)
        more = {"budget": counts[-1] - 1} if count == "auto" else {}
        out = model.generate(
            **inputs, **more, encoded_images=encoded, max_new_tokens=5, do_sample=False
        )
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{count!s:>7}  {answer.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a stock model; default: a tiny LLaVA")
    parser.add_argument("--images", type=Path, help="folder of pictures, with --model")
    parser.add_argument("--tokens", type=int, default=64, help="default count, the largest asked")
    parser.add_argument(
        "--out", type=Path, help="folder of the conversion; by default a temporary one"
    )
    options = parser.parse_args()
    if (options.model is None) != (options.images is None):
        parser.error("--model and --images must be given together")
    with TemporaryDirectory() as temporary:
        if options.model is None:
            options.model, options.images = tiny_stock_model(Path(temporary))
        out = options.out or Path(temporary, "converted")
        run("convert", options.model, out, "--images", options.images, "--tokens", options.tokens)
        picture = sorted(options.images.glob("*.png"))[0]
        counts = [options.tokens // 16, options.tokens // 4, options.tokens]
        words = ["--tokens", ",".join(map(str, counts)), "--max-new-tokens", 5]
        run("generate", "--model", out, "--image", picture, "--prompt", QUESTION, *words)
        ask_in_python(out, picture, counts)


if __name__ == "__main__":
    main()
