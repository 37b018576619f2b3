"""A step of transformers' Trainer and of TRL's SFTTrainer is that of the padded run."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.dropin.processors import picture, stock_processor
from tests.dropin.table import IMAGE
from tests.packing.cases import PROMPTS, model_of, padded
from tokenflex import packing
from tokenflex.dropin import ImageTextCollator

WORDS = ["what is this", "a cat this is a cat", "this", "is this a cat what"]


def chats(number: int) -> list[dict]:
    """Conversations of different lengths, each with an image beside it."""
    return [
        {
            "messages": [
                {"role": "user", "content": WORDS[i % 4]},
                {"role": "assistant", "content": WORDS[(3 * i + 1) % 4]},
            ],
            "images": [picture(i)],
        }
        for i in range(number)
    ]


def options(folder, **others) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **others,
    }


def change(model, before) -> torch.Tensor:
    after = model.state_dict()
    return torch.cat([(after[k] - before[k]).flatten() for k in before]).double()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("kind", ["stock", "converted"])
def test_a_step_of_trainer(kind, tmp_path):
    """With accumulated batches, whose losses weigh by tokens, and gradient checkpointing."""

    def train(packed: bool) -> tuple[float, torch.Tensor]:
        model = model_of("qwen2_vl", kind)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        collator = packing.join_outputs
        samples = _outputs(model, kind)
        if packed:
            packing.enable(model)
            collator = packing.PackingCollator(model, collator)
        arguments = options(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
        )
        arguments = TrainingArguments(**arguments)
        trainer = Trainer(model, arguments, train_dataset=samples, data_collator=collator)
        return trainer.train().training_loss, change(model, before)

    (padded_loss, padded_step), (packed_loss, packed_step) = train(False), train(True)
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    assert cosine(packed_step, padded_step) > 0.99999
    assert float(packed_step.norm()) == pytest.approx(float(padded_step.norm()), rel=1e-4)


def _outputs(model, kind) -> list[dict]:
    prompts = [*PROMPTS, PROMPTS[0]._replace(images=[5])]
    return [padded("qwen2_vl", kind, model, [prompt]) for prompt in prompts]


def test_rows_of_a_data_set_in_trainer_with_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model, data = model_of("llava", "stock"), chats(8)
    collator = ImageTextCollator(stock_processor("llava"), image_token_id=IMAGE)
    sizes = packing.measure(data, collator)
    rows = packing.PackedDataset(data, sizes, max_tokens=400)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    packing.enable(adapted)
    seen = []
    adapted.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["cu_seq_lens_q"]) - 1),
        with_kwargs=True,
    )
    trainer = Trainer(
        adapted,
        TrainingArguments(**options(tmp_path, per_device_train_batch_size=1, max_steps=len(rows))),
        train_dataset=rows,
        data_collator=packing.PackingCollator(adapted, collator),
    )
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert sum(seen) == 8
    assert len(seen) == len(rows) < 8


@pytest.mark.slow
@pytest.mark.parametrize("form", ["messages", "prompt and completion", "LoRA"])
def test_a_step_of_trl(form, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    data = chats(4)
    if form == "prompt and completion":
        data = [
            {"prompt": r["messages"][:1], "completion": r["messages"][1:], "images": r["images"]}
            for r in data
        ]

    def train(packed: bool) -> tuple[dict, torch.Tensor]:
        model, processor = model_of("llava", "stock"), stock_processor("llava")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        collator = DataCollatorForVisionLanguageModeling(
            processor, completion_only_loss=form == "prompt and completion"
        )
        if packed:
            packing.enable(model)
            collator = packing.PackingCollator(model, collator, keep_placeholder_labels=True)
        adapters = {}
        if form == "LoRA":
            peft = pytest.importorskip("peft")
            adapters["peft_config"] = peft.LoraConfig(target_modules=["q_proj"])
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(**options(tmp_path, bf16=False, max_length=None)),
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=processor,
            data_collator=collator,
            **adapters,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        trained = {k: v for k, v in trainer.model.named_parameters() if v.requires_grad}
        if form == "LoRA":  # the first step moves what starts at zero alone
            return log, torch.cat([v.detach().flatten() for k, v in trained.items() if "_B" in k])
        return log, change(model, before)

    (padded_log, padded_step), (packed_log, packed_step) = train(False), train(True)
    for key in ("loss", "mean_token_accuracy", "entropy", "num_tokens"):
        assert packed_log[key] == pytest.approx(padded_log[key], rel=1e-4), key
    assert cosine(packed_step, padded_step) > 0.99999
