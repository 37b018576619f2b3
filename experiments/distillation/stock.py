"""A tiny stock LLaVA that reads the digits task, trained here at several sizes of the picture.

LLaVA has a token per patch, so its number of tokens follows from the size of the picture. Training
at several sizes makes resizing as good as it can be: models that take any size are trained so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from tokenflex.digits.canvas import CELL_PIXELS, CELLS
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.encoder import warm_up_encoder
from tokenflex.digits.processor import digits_processor
from tokenflex.evaluation.pictures import resize

PIXELS, PATCH, WIDTH = CELLS * CELL_PIXELS, CELL_PIXELS, 64
SIDES = (4, 3, 2)  # of the grid of tokens, from the whole picture down
_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}{% endfor %}"
)


def new_model_and_processor(seed: int) -> tuple[Any, Any]:
    """Return a LLaVA of random weights and its processor."""
    digits = digits_processor()
    tokenizer = digits.tokenizer
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 192,
    }
    config = LlavaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **shape,
            "image_size": PIXELS,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            **shape,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "vocab_size": 64,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.08,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        digits.image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=_TEMPLATE,
        image_token="<image>",
    )
    return model, processor


def question(picture: Any, prompt: str) -> dict[str, Any]:
    """Return a sample for the processor: one question about one picture."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    return {"messages": [{"role": "user", "content": content}]}


def questions(split: str, canvases: int, seed: int = 0) -> list[tuple[Any, str, str, str]]:
    """Return (picture, kind, prompt, answer) of all questions about some canvases."""
    dataset = DigitsDataset(split, size=canvases, questions=8, seed=seed)
    return [
        (sample.images[0], talk.kind, talk.turns[0].text, talk.turns[1].text)
        for sample in (dataset[i] for i in range(canvases))
        for talk in sample.conversations
    ]


def resized(pixel_values: torch.Tensor, side: int) -> torch.Tensor:
    """Resize pictures so that the encoder makes side x side patches of each."""
    if side * PATCH == pixel_values.shape[-1]:
        return pixel_values
    return resize(pixel_values, (side * PATCH, side * PATCH))


def stock_logits(model: Any, processor: Any, side: int, asked: Sequence[Any]) -> torch.Tensor:
    """Return the logits [B, vocabulary] after each question, its picture resized.

    ``asked`` holds (picture, kind, prompt, answer). Pictures that follow each other and are the
    same object are encoded once.
    """
    pictures: list[Any] = []
    indices = []
    for picture, *_ in asked:
        if not pictures or pictures[-1] is not picture:
            pictures.append(picture)
        indices.append(len(pictures) - 1)
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    base = model.base_model
    encoded = base.get_image_features(
        pixel_values=resized(pixels, side),
        interpolate_pos_encoding=side * PATCH != PIXELS,
        return_dict=True,
    )
    encoded.pooler_output = [encoded.pooler_output[i] for i in indices]
    texts = ["<image> " * side**2 + prompt for _, _, prompt, _ in asked]
    ids = processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    outputs = model(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        mm_encoder_outputs={"image": encoded},
        use_cache=False,
        logits_to_keep=1,
    )
    logits: torch.Tensor = outputs.logits[:, -1]
    return logits


def train_stock(
    model: Any,
    processor: Any,
    *,
    warm_up: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[], object],
) -> None:
    """Train the stock model: its encoder on cells, then all of it on questions.

    The first third of the steps is at the whole picture; then each step draws a size, the whole
    picture half of the time.
    """
    warm_up_encoder(
        model.base_model.vision_tower,
        digits_processor(),
        steps=warm_up,
        batch_size=32,
        learning_rate=3e-3,
        seed=seed,
        on_step=lambda loss: on_step(),
    )
    dataset = DigitsDataset("train", questions=4, seed=seed)
    vocabulary = processor.tokenizer.get_vocab()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, (0.9, 0.98), weight_decay=0.02)
    model.train()
    for step in range(steps):
        side = SIDES[0]
        if 3 * step >= steps and torch.rand((), generator=generator) < 0.5:
            side = SIDES[int(torch.randint(1, len(SIDES), (), generator=generator))]
        samples = [dataset[step * batch_size + i] for i in range(batch_size)]
        asked = [
            (sample.images[0], talk.kind, talk.turns[0].text, talk.turns[1].text)
            for sample in samples
            for talk in sample.conversations
        ]
        targets = torch.tensor([vocabulary[answer] for *_, answer in asked])
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / 50) * cosine
        F.cross_entropy(stock_logits(model, processor, side, asked), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step()
    model.eval()
