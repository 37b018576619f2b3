"""Train a stock vision-language model on packed rows, with Trainer or TRL.

    python examples/pack_stock_model.py
    python examples/pack_stock_model.py --trainer trl
    python examples/pack_stock_model.py --model PATH_OR_NAME --max-tokens 8192

Needs pip install 'tokenflex[hf,train]', and TRL for --trainer trl.

The projector stays as it is: packing needs no conversion. The task is generated: the colour of a
square among up to three, with answers of different lengths. The tiny default model is random.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from typing import Any

from PIL import Image
from tiny_llava import COLOURS, tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from tokenflex import packing
from tokenflex.dropin import ImageTextCollator


def conversations(number: int) -> list[dict[str, Any]]:
    """Return conversations in TRL's form: images beside messages."""
    rng, samples = random.Random(0), []
    for _ in range(number):
        names = [rng.choice(list(COLOURS)) for _ in range(rng.randint(1, 3))]
        answer = " ".join(f"this is {name}" for name in names)
        samples.append(
            {
                "images": [Image.new("RGB", (64, 64), COLOURS[name]) for name in names],
                "messages": [
                    {"role": "user", "content": "which colour"},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name; default: a tiny random LLaVA")
    parser.add_argument("--trainer", choices=("transformers", "trl"), default="transformers")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()

    if options.model:
        model = AutoModelForImageTextToText.from_pretrained(options.model)
        processor = AutoProcessor.from_pretrained(options.model)
    else:
        model, processor = tiny_llava()
    samples = conversations(160)
    padding = padding_collator(model, processor, options.trainer)

    # Packed rows must give what their samples give alone: checked on four of them.
    packing.enable(model, padding([dict(sample) for sample in samples[:4]]))
    sizes = packing.measure(samples, padding)
    rows = packing.PackedDataset(
        samples, sizes, max_tokens=options.max_tokens, vision_cost=packing.vision_cost(model)
    )
    print(f"{len(samples)} samples in {len(rows)} rows, {sum(sizes.tokens)} tokens")
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "max_steps": options.steps,
            "per_device_train_batch_size": 1,  # a row
            "learning_rate": 3e-3 if options.model is None else 1e-5,
            "logging_steps": max(1, options.steps // 3),
            "remove_unused_columns": False,  # the collator takes whole samples
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        trainer = trainer_of(options.trainer, model, processor, arguments, rows, padding)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


def padding_collator(model: Any, processor: Any, trainer: str) -> Any:
    """Return the collator that the trainer would have used; it decides what is learned."""
    if trainer == "trl":
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        return DataCollatorForVisionLanguageModeling(processor)
    return ImageTextCollator(processor, image_token_id=model.config.image_token_id)


def trainer_of(
    name: str, model: Any, processor: Any, arguments: dict[str, Any], rows: Any, padding: Any
) -> Any:
    collator = packing.PackingCollator(model, padding)
    if name == "transformers":
        return Trainer(
            model, TrainingArguments(**arguments), train_dataset=rows, data_collator=collator
        )
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model,
        SFTConfig(**arguments, bf16=False, max_length=None),  # TRL's own packing stays off
        train_dataset=rows.to_datasets(),
        processing_class=processor,
        data_collator=collator,
    )


if __name__ == "__main__":
    main()
