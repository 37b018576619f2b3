"""Called by each process of ``torchrun -m tests.models.parallel FOLDER...``: models on two devices.

It loads the model in each FOLDER sharded over the processes, calls it in every way that
:func:`results` names, and saves what came of it as ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.models.tiny import IMAGE, padded_batch, prompts
from tokenflex import TokenFlexForConditionalGeneration
from tokenflex_kernels import plan_packing


def results(model: Any) -> dict[str, torch.Tensor]:
    """Logits of padded, packed and embedded prompts, a gradient of the projector, an answer."""
    inputs = padded_batch(prompts())
    counts = [count for prompt in prompts() for count in prompt.counts]
    plan = plan_packing([prompt.ids for prompt in prompts()], counts, IMAGE)
    images = {name: inputs[name] for name in ("pixel_values", "num_image_tokens")}
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embedded = {**images, "attention_mask": inputs["attention_mask"], "inputs_embeds": embeds}
        logits = {
            "padded": model(**inputs).logits,
            "packed": model(plan=plan, **images).logits,
            "embedded": model(**embedded).logits,
        }
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    gradient = model.model.projector.down.weight.grad
    return {**logits, "loss": loss.detach(), "gradient": gradient, "answer": answer}


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        model = TokenFlexForConditionalGeneration.from_pretrained(folder, tp_plan="auto").eval()
        saved = results(model)
        saved["rows of q_proj here"] = torch.tensor(
            len(model.model.language_model.layers[0].self_attn.q_proj.weight.to_local())
        )
        torch.save(saved, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
    os._exit(0)  # see tests/kernels/project_tokens/test_kernels_sharded.py
