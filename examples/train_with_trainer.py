"""Train with transformers' Trainer: packed batches, a vision-token count per sample.

    python examples/train_with_trainer.py
    python examples/train_with_trainer.py --steps 600 --out runs/trainer

Needs pip install 'tokenflex[hf,train]'. The task is that of `make demo`: questions about pictures
of digits. Each picture is encoded once for its eight questions.
"""

from __future__ import annotations

import argparse
import tempfile

from torch.utils.data import Dataset
from transformers import Qwen2Config, SiglipVisionConfig, Trainer, TrainingArguments

import tokenflex
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor


class Questions(Dataset):
    """Records as Trainer's and TRL's users have them: images and messages."""

    def __init__(self, split: str, size: int) -> None:
        self.samples = DigitsDataset(split, size=size)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        messages = [  # several conversations about the same images; one needs no outer list
            [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
            for conversation in sample.conversations
        ]
        return {"images": sample.images, "messages": messages}


def tiny_model() -> tokenflex.TokenFlexForConditionalGeneration:
    layers = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"intermediate_size": 192, "image_size": 32, "patch_size": 4, "vision_use_head": False}
    text = {"intermediate_size": 128, "num_key_value_heads": 2, "vocab_size": 64}
    config = tokenflex.TokenFlexConfig(
        SiglipVisionConfig(**layers, **vision),
        Qwen2Config(**layers, **text, initializer_range=0.08, tie_word_embeddings=True),
        image_token_id=digits_processor().image_token_id,
        num_image_tokens=16,
    )
    return tokenflex.TokenFlexForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", help="folder to save in; default: a temporary one")
    options = parser.parse_args()

    counts = tokenflex.TokenCounts((4, 9, 16), (0.2, 0.3, 0.5))
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            options.out or temporary,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            logging_steps=max(1, options.steps // 4),
            remove_unused_columns=False,  # the collator takes whole records
            report_to=[],
        )
        trainer = Trainer(
            tiny_model(),
            arguments,
            train_dataset=Questions("train", 4000),
            eval_dataset=Questions("validation", 64),
            data_collator=tokenflex.DataCollatorWithPacking(digits_processor(), counts),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        print(f"loss on held-out pictures: {before:.3f} before, ", end="")
        print(f"{trainer.evaluate()['eval_loss']:.3f} after")
        trainer.save_model()


if __name__ == "__main__":
    main()
