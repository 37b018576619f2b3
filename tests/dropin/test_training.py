"""Fine-tuning a converted model with what others train with: Trainer, PEFT, TRL."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests.dropin.processors import image_text, picture, stock_processor
from tests.dropin.table import IMAGE, image_inputs
from tests.dropin.test_model import converted, logits, projector_of
from tests.dropin.tiny import PROMPTS, batch, stock_model
from tokenflex import TokenCounts, replace_projector, restore_projector
from tokenflex.dropin import (
    ImageTextCollator,
    MaskImageLabels,
    fit_projector,
    pack_inputs,
    projector_name,
)
from tokenflex.dropin.sampling import CountStream

COUNTS = TokenCounts((4, 9, 16), (2, 3, 5))


def pair(name: str):
    model, processor = stock_model(name), stock_processor(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return replace_projector(model, processor, num_image_tokens=16), processor


class Samples(Dataset):
    """A picture and a caption each."""

    def __init__(self, name: str, number: int, *, chat: bool = True) -> None:
        self.name, self.number, self.chat = name, number, chat

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict:
        image = picture(index)
        if not self.chat:
            text = f"{image_text(self.name)} this is a cat"
            return {"text": text, "images": [image], "index": index}
        question = [{"type": "image", "image": image}, {"type": "text", "text": "what is this"}]
        answer = [{"type": "text", "text": "a cat"}]
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }


# ---- the collator


@pytest.mark.parametrize("chat", [True, False], ids=["messages", "text"])
def test_collator_draws_a_count_per_sample_and_masks_placeholders(processor_name, chat):
    family = processor_name
    if chat and family == "got_ocr2":
        pytest.skip("its stock processor takes no chats with images")
    model, processor = pair(family)
    collate = ImageTextCollator(processor, COUNTS)
    samples = Samples(family, 12, chat=chat)
    inputs = collate([samples[i] for i in range(12)])
    assert {*inputs["num_image_tokens"]} == {4, 9, 16}
    labels, ids = inputs["labels"], inputs["input_ids"]
    hidden = (ids == IMAGE) | (inputs["attention_mask"] == 0)
    assert bool((labels[hidden] == -100).all())
    assert torch.equal(labels[~hidden], ids[~hidden])
    assert torch.isfinite(model(**inputs).loss)


def test_indexed_samples_have_their_own_counts():
    _, processor = pair("llava")
    samples = Samples("llava", 8, chat=False)
    counts = [COUNTS.draw(i) for i in range(8)]
    collate = ImageTextCollator(processor, COUNTS)
    for indices in ([3, 1], [5], [1, 3, 7]):
        inputs = collate([samples[i] for i in indices])
        assert inputs["num_image_tokens"] == [counts[i] for i in indices]
    later = collate([{**samples[i], "epoch": 1} for i in range(8)])
    assert later["num_image_tokens"] == [COUNTS.draw(i, epoch=1) for i in range(8)] != counts


def test_collator_leaves_the_count_to_the_processor_or_fixes_it():
    _, processor = pair("llava")
    samples = [Samples("llava", 2)[i] for i in range(2)]
    assert ImageTextCollator(processor)(samples)["num_image_tokens"] == [16, 16]
    assert ImageTextCollator(processor, 25)(samples)["num_image_tokens"] == [25, 25]
    processor.image_token_counts = TokenCounts((9,), (1,))
    assert ImageTextCollator(processor)(samples)["num_image_tokens"] == [9, 9]


def test_text_without_images_may_stand_beside():
    model, processor = pair("llava")
    collate = ImageTextCollator(processor, COUNTS)
    plain = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]}
    inputs = collate([plain, Samples("llava", 1)[0]])
    assert len(inputs["num_image_tokens"]) == 1
    assert torch.isfinite(model(**inputs).loss)
    assert "num_image_tokens" not in collate([{"text": "a cat"}])


def test_counts_are_drawn_per_sample_not_per_image():
    _, processor = pair("llava")
    collate = ImageTextCollator(processor, TokenCounts((4, 9, 16), (1, 1, 1)))
    number = [1, 3, 2, 1, 2]
    samples = [
        {"text": "<image> " * n, "images": [picture(i) for i in range(n)], "index": index}
        for index, n in enumerate(number)
    ]
    drawn = [collate.counts.draw(index) for index in range(5)]
    expected = [count for count, n in zip(drawn, number, strict=True) for _ in range(n)]
    assert collate(samples)["num_image_tokens"] == expected
    without_index = [{k: v for k, v in sample.items() if k != "index"} for sample in samples]
    assert collate(without_index)["num_image_tokens"] == expected  # the first draws of a stream


def test_ranks_draw_rows_of_their_own(monkeypatch):
    counts, distributed = TokenCounts((4, 9, 16), (1, 1, 1)), torch.distributed
    monkeypatch.setattr(distributed, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        stream = CountStream(counts)
        drawn = [stream.next() for _ in range(20)]
        assert drawn == [counts.draw(2 * i + rank) for i in range(20)]


def test_what_the_collator_refuses():
    _, got_ocr2 = pair("got_ocr2")
    two = {"text": "<imgpad> <imgpad>", "images": [picture(1), picture(2)]}
    with pytest.raises(ValueError, match=r"got_ocr2 must have one image each, got \[2\]"):
        ImageTextCollator(got_ocr2, COUNTS)([two])
    with pytest.raises(ValueError, match="image_token_id must be given for a stock processor"):
        ImageTextCollator(stock_processor("llava"))
    _, processor = pair("llava")
    with pytest.raises(ValueError, match="'messages'"):
        ImageTextCollator(processor)([{"text": "a"}, {"caption": "b"}])


# ---- Trainer


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


@pytest.mark.parametrize("family", ["llava", "smolvlm", "gemma3", "qwen2_vl"])
def test_trainer(family, tmp_path):
    model, processor = pair(family)
    before = copy.deepcopy(projector_of(model).state_dict())
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, gradient_checkpointing=True),
        train_dataset=Samples(family, 12),
        data_collator=ImageTextCollator(processor, COUNTS),
    )
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    for key, value in projector_of(model).state_dict().items():
        assert not torch.equal(value, before[key]), key
    model.eval()
    inputs = batch(family, PROMPTS)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0) is not None


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_onevision"])
def test_packed_batches_have_the_loss_of_padded_ones(family, tmp_path):
    def loss(packed: bool) -> float:
        model, processor = pair(family)
        collate = ImageTextCollator(processor, COUNTS)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, gradient_accumulation_steps=2, dataloader_num_workers=packed),
            train_dataset=Samples(family, 24, chat=False),
            data_collator=(lambda rows: pack_inputs(model, collate(rows))) if packed else collate,
        )
        return float(trainer.train().training_loss)

    assert loss(True) == pytest.approx(loss(False), rel=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
def test_smoothed_labels_are_the_next_tokens(family, lora, tmp_path):
    def loss(smoothing):
        model, processor = pair(family)
        data = Samples(family, 4)
        trainer = Trainer(
            model=with_lora(model) if lora else model,
            args=arguments(tmp_path, label_smoothing_factor=smoothing),
            train_dataset=data,
            data_collator=ImageTextCollator(processor, 4),
        )
        inputs = trainer.data_collator([data[i] for i in range(4)])
        return float(trainer.compute_loss(trainer.model, inputs).detach())

    assert loss(1e-9) == pytest.approx(loss(0.0), rel=1e-5)


# ---- PEFT


def with_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        # PEFT knows no adapter for layers of a type's own, such as Gemma 4's clipped ones.
        target_modules=[
            name
            for name, module in model.named_modules()
            if name.split(".")[-1] in ("q_proj", "v_proj") and isinstance(module, torch.nn.Linear)
        ],
        modules_to_save=[projector_name(model)],
        init_lora_weights=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return peft.get_peft_model(model, config)


def test_peft_trains_and_saves_its_copy_of_the_projector(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_lora(converted(name)).train()
    model(**batch(name, PROMPTS, labels=True)).loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    copies = [key for key in trained if "modules_to_save" in key]
    assert len(copies) == 8
    for key in copies:
        assert trained[key].grad is not None, key
        assert float(trained[key].grad.abs().max()) > 0, key
    with torch.no_grad():
        for key in copies:
            trained[key].add_(0.1)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(converted(name), tmp_path).eval()
    inputs = batch(name, PROMPTS)
    expected = logits(model, inputs)
    assert float((logits(loaded, inputs) - expected).abs().max()) < 1e-5
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), loaded.generate(**inputs, **options))
    merged = loaded.merge_and_unload()
    assert float((logits(merged, inputs) - expected).abs().max()) < 1e-4


def test_packed_rows_under_peft():
    model = with_lora(converted("llava")).eval()
    inputs = batch("llava", PROMPTS)
    packed = pack_inputs(model, inputs)
    together = logits(model, packed)[0].split(packed["cu_seq_lens_q"].diff().tolist())
    for rows, prompt in zip(together, PROMPTS, strict=True):
        alone = logits(model, batch("llava", [prompt]))[0]
        assert float((rows - alone).abs().max()) < 1e-5
    assert projector_name(model) == "model.multi_modal_projector"


def test_projector_under_peft_is_fitted_and_restored():
    model = with_lora(converted("llava")).eval()
    report = fit_projector(model, image_inputs("llava", [1, 2]))
    assert report.after < report.before
    fitted = fit_projector(model, image_inputs("llava", [1, 2]))
    assert fitted.before == pytest.approx(report.after)
    assert restore_projector(model) is model
    restored, stock = model.unload(), stock_model("llava")
    assert type(restored) is type(stock)
    for key, value in stock.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value), key


def test_lora_inside_the_projector():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["gate", "up", "down"], init_lora_weights=False)
    plain, model = converted("llava"), peft.get_peft_model(converted("llava"), config).train()
    inputs = batch("llava", PROMPTS, labels=True)
    model(**inputs).loss.backward()
    adapters = [p for key, p in model.named_parameters() if "lora_" in key]
    assert len(adapters) == 6
    assert all(float(p.grad.abs().max()) > 0 for p in adapters)
    assert not torch.equal(logits(model, inputs), logits(plain, inputs))


# ---- TRL


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
def test_trl(lora, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    collation = pytest.importorskip("trl.trainer.sft_trainer")
    peft = pytest.importorskip("peft")
    model, processor = pair("llava")
    processor.image_token_counts = COUNTS
    seen = []

    class Watched(MaskImageLabels):
        def __call__(self, samples):
            inputs = super().__call__(samples)
            seen.extend(inputs["num_image_tokens"])
            assert not bool((inputs["labels"] == IMAGE).any())
            return inputs

    rows = [
        {
            "messages": [
                {"role": "user", "content": "what is this"},
                {"role": "assistant", "content": "a cat"},
            ],
            "images": [picture(i)],
        }
        for i in range(12)
    ]
    collator = collation.DataCollatorForVisionLanguageModeling(processor)
    options = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj"])} if lora else {}
    if lora:
        options["peft_config"].modules_to_save = [projector_name(model)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            max_length=None,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        data_collator=Watched(collator, processor),
        **options,
    )
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert len(seen) >= 12
    assert len(set(seen)) > 1
    inputs = batch("llava", PROMPTS)
    trainer.model.eval()
    new = trainer.model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert new.shape[1] == inputs["input_ids"].shape[1] + 2
