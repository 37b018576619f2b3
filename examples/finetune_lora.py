"""Fine-tune an existing model for any vision-token count: LoRA, the projector, a count per sample.

    python examples/finetune_lora.py
    python examples/finetune_lora.py --model PATH_OR_NAME --counts 64 144 256 --steps 1000

Needs pip install 'tokenflex[hf,train]' peft.

The task is generated: the colour and the side of a square. The tiny default model first learns it
with its stock projector, so that there is a trained model to convert.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageDraw
from tiny_llava import COLOURS, tiny_llava
from torch.utils.data import Dataset
from transformers import AutoConfig, Trainer, TrainingArguments

import tokenflex
from tokenflex import TokenCounts
from tokenflex.dropin import ImageTextCollator, fit_projector, projector_name


class Squares(Dataset):
    """A coloured square on the left or right of grey noise, as a conversation."""

    def __init__(self, number: int, seed: int) -> None:
        self.number, self.seed = number, seed

    def __len__(self) -> int:
        return self.number

    def picture(self, index: int) -> tuple[Image.Image, str]:
        rng = random.Random(self.seed * 1_000_003 + index)
        colour, side = rng.choice(list(COLOURS)), rng.choice(["left", "right"])
        image = Image.new("RGB", (64, 64), (rng.randrange(90, 160),) * 3)
        x, y = rng.randrange(0, 16) + (32 if side == "right" else 0), rng.randrange(0, 48)
        ImageDraw.Draw(image).rectangle((x, y, x + 15, y + 15), fill=COLOURS[colour])
        return image, f"{colour} {side}"

    def __getitem__(self, index: int) -> dict:
        image, answer = self.picture(index)
        question = [{"type": "image", "image": image}, {"type": "text", "text": "which colour"}]
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        }


def stock_batch(processor, samples: list[dict]) -> dict:
    """Make the same batches as ImageTextCollator, for a model that is not converted yet."""
    batch = processor.apply_chat_template(
        [sample["messages"] for sample in samples],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    ids = batch["input_ids"]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    batch["labels"] = ids.masked_fill((ids == image) | (batch["attention_mask"] == 0), -100)
    return batch


def train(model, collator, data: Dataset, steps: int, rate: float, folder: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,  # the collator takes whole samples
        report_to=[],
        save_strategy="no",
        logging_steps=max(1, steps // 4),
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()


@torch.no_grad()
def loss_at(model, processor, count: int, data: Squares) -> float:
    batch = ImageTextCollator(processor, count)([data[i] for i in range(len(data))])
    return float(model.eval()(**batch.to(model.device)).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name; default: a tiny random LLaVA")
    parser.add_argument("--counts", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, help="folder to save in; default: a temporary one")
    options = parser.parse_args()
    training, held_out = Squares(2000, seed=0), Squares(64, seed=1)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        if options.model:
            config = AutoConfig.from_pretrained(options.model)
            if getattr(config, "tokenflex", None) is not None:
                parser.error(
                    f"--model must be stock weights to imitate, {options.model} is a conversion"
                )
            model, processor = tokenflex.from_pretrained(options.model)
        else:
            model, processor = tiny_llava()
            train(model, partial(stock_batch, processor), training, options.steps, 3e-3, folder)
            tokenflex.replace_projector(model, processor, num_image_tokens=max(options.counts))
        pictures = [training.picture(i)[0] for i in range(32)]
        report = fit_projector(model, pictures, processor, counts=options.counts)
        print(f"relative error of the projector: {report.before:.2f}, fitted {report.after:.2f}")
        before = [loss_at(model, processor, count, held_out) for count in options.counts]

        # Small counts are less frequent, as in the paper.
        counts = TokenCounts(tuple(options.counts), tuple(range(2, 2 + len(options.counts))))
        linears = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = LoraConfig(r=8, target_modules=linears, modules_to_save=[projector_name(model)])
        adapted = get_peft_model(model, lora)
        collator = ImageTextCollator(processor, counts)
        train(adapted, collator, training, options.steps, 1e-3, folder)
        after = [loss_at(adapted, processor, count, held_out) for count in options.counts]

        adapted.save_pretrained(folder / "adapter")
        merged = PeftModel.from_pretrained(adapted.unload(), folder / "adapter").merge_and_unload()
        merged.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        loaded, processor = tokenflex.from_pretrained(folder / "model")
        again = [loss_at(loaded, processor, count, held_out) for count in options.counts]

    print(f"{'tokens':>8}  {'before':>8}  {'after':>8}  {'loaded':>8}   loss on held-out pictures")
    for row in zip(options.counts, before, after, again, strict=True):
        print("{:8d}  {:8.3f}  {:8.3f}  {:8.3f}".format(*row))


if __name__ == "__main__":
    main()
