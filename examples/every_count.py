"""Run your own benchmark at every count, into the same table as the public harnesses.

    python examples/every_count.py
    python examples/every_count.py --model CHECKPOINT --counts 4 2x3 16

The default model is tiny and has random weights, so its scores are meaningless. The benchmark is a
stub with a few questions about pictures of digits. For lmms-eval and VLMEvalKit, see
`tokenflex harness --help`.
"""

from __future__ import annotations

import argparse
import tempfile
from math import sqrt
from pathlib import Path

from transformers import Qwen2Config, SiglipVisionConfig

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.evaluation.scoring import exact
from tokenflex.harnesses.assistant import Assistant
from tokenflex.harnesses.driver import every_count
from tokenflex.harnesses.table import Score, Scores, merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: tiny and random")
    parser.add_argument("--counts", nargs="+", default=["4", "9", "16"])
    parser.add_argument("--canvases", type=int, default=8, help="questions of the stub benchmark")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.model or random_checkpoint(Path(folder))

        def run(count: str) -> Scores:
            """Answer every question of the benchmark at one count."""
            assistant = Assistant(checkpoint, count)
            data = DigitsDataset("test", size=options.canvases, questions=1)
            right = tokens = 0
            for index in range(len(data)):
                sample = data[index]
                question, answer = sample.conversations[0].turns
                content = [
                    {"type": "image", "image": sample.images[0]},
                    {"type": "text", "text": question.text},
                ]
                conversation = [{"role": "user", "content": content}]
                (reply,) = assistant.reply([conversation], max_new_tokens=2)
                right += exact(reply.text, answer.text)
                tokens += reply.vision_tokens
            share = right / options.canvases
            error = sqrt(share * (1 - share) / options.canvases)
            return {
                "digits": {
                    "exact_match": Score(share, error),
                    "vision tokens": Score(tokens / options.canvases),
                }
            }

        print(merge(every_count(run, options.counts), ["digits"]).markdown(), end="")


def random_checkpoint(folder: Path) -> Path:
    """Save an untrained model for pictures of digits."""
    processor = digits_processor()
    sides = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = TokenFlexConfig(
        SiglipVisionConfig(
            **sides, num_attention_heads=2, image_size=32, patch_size=4, vision_use_head=False
        ),
        Qwen2Config(
            **sides,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=len(processor.tokenizer),
        ),
        image_token_id=processor.image_token_id,
        num_image_tokens=16,
    )
    TokenFlexForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
