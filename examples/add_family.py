"""Register a family of models for replace_projector: LightOnOCR, in one function.

    python examples/add_family.py

LightOnOCR's Pixtral tower encodes all images in one row of patches, each image at its own size. Its
``vision_projection`` merges 2 x 2 patches into a token. The function splits that row into one patch
grid per image. The model here is tiny, with random weights.
"""

from __future__ import annotations

import torch
from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

import tokenflex
from tokenflex.dropin import fit_projector, split_grids


@tokenflex.register_family(
    "lighton_ocr", projector="vision_projection", patch_merge="spatial_merge_size"
)
def lighton_ocr(base, pixel_values, image_sizes, **_):
    rows = base.vision_encoder(pixel_values.to(base.dtype), image_sizes=image_sizes)
    patch = base.config.vision_config.patch_size
    sizes = torch.as_tensor(image_sizes).tolist()
    grids = [(height // patch, width // patch) for height, width in sizes]
    return split_grids(rows.last_hidden_state.squeeze(0), grids)


def tiny_model() -> LightOnOcrForConditionalGeneration:
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LightOnOcrConfig(
        vision_config={
            "model_type": "pixtral",
            **layers,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 96,
            "patch_size": 8,
        },
        text_config={
            "model_type": "qwen3",
            **layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=3,
    )
    torch.manual_seed(0)
    return LightOnOcrForConditionalGeneration(config).eval()


def main() -> None:
    model = tiny_model()
    tokenflex.replace_projector(model, num_image_tokens=16)
    images = {  # two images of 8 x 8 and 12 x 6 patches, padded to one size
        "pixel_values": torch.randn(2, 3, 96, 64),
        "image_sizes": torch.tensor([[64, 64], [96, 48]]),
    }
    report = fit_projector(model, images)
    print(f"relative error of the projector: {report.before:.2f}, fitted {report.after:.2f}")

    counts = [9, (6, 3)]  # a square, and a grid with the shape of the second image
    prompts = [[5, 6, *[3] * 9, 7], [5, *[3] * 18, 8, 7]]
    length = max(map(len, prompts))
    padded = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    inputs = {
        "input_ids": torch.tensor(padded),
        "attention_mask": (torch.tensor(padded) != 0).long(),
        "num_image_tokens": counts,
        **images,
    }
    print("logits", tuple(model(**inputs).logits.shape))
    new = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    print("generated", tuple(new.shape))


if __name__ == "__main__":
    main()
