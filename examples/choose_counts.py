"""Choose the number of vision tokens of an existing model at each call.

    python examples/choose_counts.py
    python examples/choose_counts.py --model PATH_OR_NAME --image a.png b.png --counts 64 256

The default model is a tiny LLaVA with random weights, whose answers are meaningless. --model takes
stock weights of any supported family, or a saved conversion.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from PIL import Image
from tiny_llava import tiny_llava

import tokenflex
from tokenflex.images import open_image

DIGITS = Path(__file__).with_name("digits.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name; default: a tiny random LLaVA")
    parser.add_argument("--image", nargs="+", type=Path, default=[DIGITS, DIGITS])
    parser.add_argument("--prompt", default="which colour is this")
    parser.add_argument("--counts", nargs="+", type=int, default=[4, 16, 64])
    options = parser.parse_args()
    images = [open_image(path) for path in options.image]

    if options.model:
        model, processor = tokenflex.from_pretrained(options.model, images=images)
        model.eval()
    else:
        model, processor = tiny_llava()
        # The new projector starts as an imitation of the stock one on these pictures.
        tokenflex.replace_projector(model, processor, num_image_tokens=64, images=images)

    def answer(pictures: list[Image.Image], counts: int | list[int]) -> None:
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, text]}]
            for picture in pictures
        ]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_image_tokens": counts, "padding": True, "padding_side": "left"},
        ).to(model.device)
        start = time.perf_counter()
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        seconds = time.perf_counter() - start
        answers = processor.batch_decode(
            new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        print(f"{counts!s:>12}  {inputs['input_ids'].shape[1]:6d}  {seconds:7.2f}  {answers}")

    text = {"type": "text", "text": options.prompt}
    print(f"{'counts':>12}  {'prompt':>6}  {'seconds':>7}  answers")
    for count in options.counts:  # one count for all images of a call
        answer(images, count)
    mixed = [options.counts[i % len(options.counts)] for i in range(len(images))]
    answer(images, mixed)  # one per image, in one batch


if __name__ == "__main__":
    main()
