"""The model in other libraries: shards, devices, pipelines, trainers, adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from datasets import Dataset
from packaging import version
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    Trainer,
    TrainingArguments,
    pipeline,
)
from trl import SFTConfig, SFTTrainer

from tests.models.parallel import results
from tests.models.test_modeling import GENERATION, one_image
from tests.models.tiny import (
    IMAGE,
    PIXELS,
    padded_batch,
    picture,
    pixels,
    prompts,
    tiny_config,
    tiny_model,
)
from tokenflex import TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.digits.processor import digits_processor
from tokenflex.images import load_image
from tokenflex.models.modeling import TokenFlexModel
from tokenflex_kernels import plan_packing

LORA = {"r": 2, "lora_alpha": 16}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A tiny model in eleven files, with its processor."""
    folder = tmp_path_factory.mktemp("shards")
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    digits_processor(9).save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**padded_batch(prompts())).logits


# ---- loading


def test_shards_load_exactly(shards):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 4
    loaded, info = AutoModelForImageTextToText.from_pretrained(shards, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(tiny_model()))


def test_load_in_bfloat16(shards):
    loaded = AutoModelForImageTextToText.from_pretrained(shards, dtype=torch.bfloat16)
    for name, weight in tiny_model().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(torch.bfloat16)), name
    assert logits(loaded).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "devices",
    [
        {"device_map": "auto", "max_memory": {"cpu": 60_000}},
        {
            "device_map": {
                "model.vision_model": "cpu",
                "model.projector": "disk",
                "model.language_model": "cpu",
                "lm_head": "cpu",
            }
        },
    ],
    ids=["auto", "named"],
)
def test_device_map_moves_weights_and_changes_nothing(shards, tmp_path, devices):
    """With the disk as the second device, as there is one CPU."""
    loaded = AutoModelForImageTextToText.from_pretrained(shards, offload_folder=tmp_path, **devices)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    # With hooks on its parts the projector runs them one by one, rounded by PyTorch's own ops.
    torch.testing.assert_close(logits(loaded), logits(tiny_model()))
    inputs = padded_batch(prompts())
    expected = tiny_model().generate(**inputs, **GENERATION)
    assert torch.equal(loaded.generate(**inputs, **GENERATION), expected)


VARIANTS = [(text, tied) for text in ("qwen2", "llama") for tied in (True, False)]


@pytest.fixture(scope="module")
def parallel(tmp_path_factory) -> dict[tuple[str, bool], tuple[dict, list[dict]]]:
    """The results of each variant in this process, and those of two that share it.

    Starting two takes longer than all that they do.
    """
    folders, expected = {}, {}
    for text, tied in VARIANTS:
        config = tiny_config(text)
        config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied
        model = TokenFlexForConditionalGeneration(config)
        folders[text, tied] = tmp_path_factory.mktemp(text)
        model.save_pretrained(folders[text, tied])
        expected[text, tied] = results(model.eval())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [sys.executable, *launcher, "tests.models.parallel", *map(str, folders.values())],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        variant: (expected[variant], [torch.load(folder / f"{rank}.pt") for rank in range(2)])
        for variant, folder in folders.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("text", "tied"), VARIANTS)
def test_tensor_parallel_processes_compute_what_one_does(parallel, text, tied):
    expected, ranks = parallel[text, tied]
    for actual in ranks:
        assert actual.pop("rows of q_proj here") == 16
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(actual[name], value, atol=1e-5), name


# ---- generating


def test_samples_are_those_of_the_seed():
    model, inputs = tiny_model(), padded_batch(prompts())
    options = {**GENERATION, "do_sample": True, "num_return_sequences": 3}
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.generate(**inputs, **options))
    assert draws[0].shape[0] == 3 * len(prompts())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_samples_of_a_batch_follow_their_own_images():
    """Sampling from the one most likely token is greedy: each sequence saw its own picture."""
    model, inputs = tiny_model(), padded_batch(prompts())
    options = {**GENERATION, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    sampled = model.generate(**inputs, **options)
    greedy = model.generate(**inputs, **GENERATION)
    assert torch.equal(sampled, greedy.repeat_interleave(2, 0))


def test_answers_never_hold_the_placeholder():
    model, inputs = tiny_model(), one_image(4, 4)

    def prefer_the_placeholder(_head, _inputs, logits):
        logits[..., IMAGE], logits[..., 7] = 200, 100
        return logits

    model.lm_head.register_forward_hook(prefer_the_placeholder)
    start = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, **GENERATION)[0, start:].tolist() == [7] * 4
    # Unless somebody has a list of their own.
    own = model.generate(**inputs, suppress_tokens=[5], **GENERATION)
    assert own[0, start:].tolist() == [IMAGE] * 4


# ---- the pipeline


@pytest.mark.parametrize("count", [None, 4])
def test_pipeline_answers_as_generate_does(shards, count):
    ask = pipeline("image-text-to-text", model=str(shards))
    model, processor, image = tiny_model(), digits_processor(9), picture(1)
    inputs = processor(images=image, text="<image> odd", num_image_tokens=count)
    output = model.generate(**inputs, **GENERATION)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(output, skip_special_tokens=True)
    options = {"processor_kwargs": {"num_image_tokens": count}} if count else {}
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": " odd"}],
        }
    ]
    from_chat = ask(chat, generate_kwargs={**GENERATION}, return_full_text=False, **options)
    from_text = ask(
        images=image,
        text="<image> odd",
        generate_kwargs={**GENERATION},
        return_full_text=False,
        **options,
    )
    assert from_chat[0]["generated_text"].split() == expected.split()
    assert from_text[0]["generated_text"].split() == expected.split()


@pytest.mark.parametrize("kind", ["transparent", "16-bit"])
def test_a_pipeline_shows_pictures_as_the_processor_reads_them(shards, tmp_path, monkeypatch, kind):
    """Chats do, and pictures that were read before; docs/models.md says so."""
    generator = np.random.default_rng(0)
    values = {
        "transparent": generator.integers(0, 256, (PIXELS, PIXELS, 4), dtype=np.uint8),
        "16-bit": generator.integers(0, 65536, (PIXELS, PIXELS), dtype=np.uint16),
    }
    path = str(tmp_path / "a.png")
    Image.fromarray(values[kind]).save(path)
    seen = []
    encode = TokenFlexModel._encode

    def watch(self, pixel_values, *args, **options):
        seen.append(pixel_values)
        return encode(self, pixel_values, *args, **options)

    monkeypatch.setattr(TokenFlexModel, "_encode", watch)
    ask = pipeline("image-text-to-text", model=str(shards))
    parts = [{"type": "image", "path": path}, {"type": "text", "text": " odd"}]
    ask([{"role": "user", "content": parts}], max_new_tokens=1)
    ask(images=load_image(path), text="<image> odd", max_new_tokens=1)
    expected = ask.processor(images=path, text="<image> odd")["pixel_values"]
    assert len(seen) == 2
    assert all(torch.equal(pixel_values, expected) for pixel_values in seen)


def conversation(*parts) -> list[dict]:
    """A question of texts and images."""
    content = [
        {"type": kind, kind: part}
        for part in parts
        for kind in ["text" if isinstance(part, str) else "image"]
    ]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, {}),
        ({}, {"num_image_tokens": 9}),
        ({"max_tiles": 4, "use_thumbnail": True}, {"num_image_tokens": (2, 3)}),
        ({"patch_size": 4}, {"size": {"height": 32, "width": 64}}),
        ({"max_tiles": 4}, {"num_image_tokens": "auto"}),
    ],
)
def test_pipeline_answers_chats_in_batches_as_one_by_one(options, asked, batch_size):
    """With other numbers of images, other lengths, tiles and grids in one batch."""
    base = digits_processor(4)
    processor = TokenFlexProcessor(
        base.image_processor, base.tokenizer, num_image_tokens=4, **options
    )
    model = tiny_model(trained_num_image_tokens=[4, 9])
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [
        conversation(picture(1), " odd"),
        conversation(picture(2, (32, 64)), " odd ", picture(3), " read r1c1"),
        conversation(picture(4, (64, 64)), " even blank"),
    ]
    call = {
        "processor_kwargs": asked,
        "return_full_text": False,
        "generate_kwargs": {**GENERATION, "max_new_tokens": 3},
    }
    if asked.get("num_image_tokens") == "auto":
        call["generate_kwargs"] |= {"budget": 40}
    alone = [ask(chat, **call)[0]["generated_text"] for chat in chats]
    together = ask(chats, batch_size=batch_size, **call)
    assert [answer[0]["generated_text"] for answer in together] == alone


# ---- torch.compile


@pytest.mark.slow
def test_compiled_model_gives_the_same_logits_and_gradients():
    inputs = padded_batch(prompts())
    expected, model = tiny_model().train(), tiny_model().train()
    outputs = []
    for one in (expected, torch.compile(model, backend="aot_eager")):
        outputs.append(one(**inputs, labels=inputs["input_ids"]))
        outputs[-1].loss.backward()
    assert float((outputs[0].logits - outputs[1].logits).abs().max()) < 1e-5
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name


# ---- training by others


def training_options(folder: Path) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }


def test_trainer_takes_a_step_with_mixed_counts(tmp_path):
    processor, model = digits_processor(9), tiny_model()
    rows = [{"image": picture(i), "count": count} for i, count in enumerate((4, 9, 16))]

    def collate(rows):
        batch = processor(
            images=[row["image"] for row in rows],
            text=["<image> odd 7 <eos>"] * len(rows),
            num_image_tokens=[row["count"] for row in rows],
            padding_side="right",
        )
        ignored = (batch["input_ids"] == IMAGE) | (batch["attention_mask"] == 0)
        batch["labels"] = batch["input_ids"].masked_fill(ignored, -100)
        return batch

    with torch.no_grad():
        expected = float(model(**collate(rows)).loss)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(
        model,
        TrainingArguments(
            **training_options(tmp_path), remove_unused_columns=False, gradient_checkpointing=True
        ),
        train_dataset=rows,
        data_collator=collate,
    )
    result = trainer.train()
    assert result.training_loss == pytest.approx(expected, abs=1e-4)
    assert changed(model, before) == set(before)
    trainer.save_model(str(tmp_path / "saved"))
    saved = TokenFlexForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(saved), logits(model))


def test_sft_trainer_learns_the_completion_alone(tmp_path):
    processor, model = digits_processor(4), tiny_model()
    data = Dataset.from_list(
        [
            {
                "image": picture(i),
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": "7"}],
            }
            for i, question in enumerate(("odd", "odd", "read r1c1"))
        ]
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = SFTConfig(**training_options(tmp_path), max_length=None, bf16=False)
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=processor)
    batch = trainer.data_collator([dict(row) for row in data])
    words = processor.tokenizer.convert_tokens_to_ids(["7", "<eos>"])
    assert [[i for i in row if i != -100] for row in batch["labels"].tolist()] == [words] * 3
    assert batch["num_image_tokens"] == [4, 4, 4]

    with torch.no_grad():
        expected = float(model(**batch).loss)
    result = trainer.train()
    assert result.training_loss == pytest.approx(expected, abs=1e-4)
    assert changed(model, before) == set(before)
    # TRL replaces forward: counts must be an argument still.
    inputs = processor(images=picture(1), text="<image> odd", num_image_tokens=9)
    model.eval().gradient_checkpointing_disable()
    assert model.generate(**inputs, **GENERATION).shape[1] == 9 + 1 + 4


def test_sft_trainer_with_an_adapter(tmp_path):
    data = Dataset.from_list([{"image": picture(0), "prompt": "<image> odd", "completion": " 7"}])
    config = SFTConfig(**training_options(tmp_path), max_length=None, bf16=False)
    trainer = SFTTrainer(
        tiny_model(),
        args=config,
        train_dataset=data,
        processing_class=digits_processor(4),
        peft_config=LoraConfig(target_modules=["q_proj", "up", "down"], **LORA),
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert changed(trainer.model, before) == {name for name in before if "lora_B" in name}


def test_sft_trainer_loads_a_folder(tmp_path, shards):
    """It looks the class up by its name on the transformers package."""
    data = Dataset.from_list([{"image": picture(0), "prompt": "<image> odd", "completion": " 7"}])
    config = SFTConfig(**training_options(tmp_path), max_length=None, bf16=False)
    trainer = SFTTrainer(str(shards), args=config, train_dataset=data)
    assert type(trainer.model) is TokenFlexForConditionalGeneration
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert changed(trainer.model, before) == set(before)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("smoothing", [1e-9, 0.1])
def test_smoothed_labels_are_those_of_the_next_token(tmp_path, packed, adapter, smoothing):
    batch = prompts()
    if packed:
        counts = [count for prompt in batch for count in prompt.counts]
        plan = plan_packing([prompt.ids for prompt in batch], counts, IMAGE)
        inputs = {"plan": plan, "num_image_tokens": counts}
        inputs["pixel_values"] = torch.cat([prompt.pixels for prompt in batch])
        inputs["labels"] = plan.input_ids[None].masked_fill(plan.input_ids[None] == IMAGE, -100)
        # The first token of a sample follows none of its own.
        inputs["labels"][:, plan.cu_seqlens[:-1].long()] = -100
    else:
        inputs = padded_batch(batch)
        ignored = (inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0)
        inputs["labels"] = inputs["input_ids"].masked_fill(ignored, -100)
    model = tiny_model()
    with torch.no_grad():
        output = model(**inputs)
    labels = inputs["labels"][:, 1:].flatten()
    chances = output.logits[:, :-1].flatten(0, 1)[labels != -100].log_softmax(-1)
    likelihood = chances.gather(1, labels[labels != -100, None]).mean()
    expected = -(1 - smoothing) * likelihood - smoothing * chances.mean()
    if smoothing < 1e-6:
        assert float(expected) == pytest.approx(float(output.loss), abs=1e-5)
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **LORA))
    options = TrainingArguments(
        **training_options(tmp_path), label_smoothing_factor=smoothing, remove_unused_columns=False
    )
    trainer = Trainer(model, options, train_dataset=[0] * 3, data_collator=lambda _: dict(inputs))
    assert trainer.train().training_loss == pytest.approx(float(expected), abs=1e-4)


# ---- adapters


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": r".*(q_proj|v_proj|gate|up|down)$"},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["projector"]},
    ],
    ids=["everywhere", "projector whole"],
)
def test_lora_learns_and_comes_back(tmp_path, adapter):
    inputs = padded_batch(prompts())
    model = get_peft_model(tiny_model().train(), LoraConfig(**adapter, **LORA))
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("projector" in name for name in learning)
    optimizer = torch.optim.SGD(learning.values(), lr=0.1)
    for _ in range(2):  # the first moves B alone, as A meets zeros
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    for name, parameter in learning.items():
        assert float(parameter.grad.abs().max()) > 0, name
    trained = logits(model)
    assert float((trained - logits(tiny_model())).abs().max()) > 1e-2

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(again), trained)
    assert float((logits(again.merge_and_unload()) - trained).abs().max()) < 1e-5


def test_generation_with_an_adapter_encodes_once_for_all_counts():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "up"], **LORA))
    images = model.encode_images(pixels(1, seed=1))
    for count in (4, 9):
        inputs = one_image(count, count)
        expected = tiny_model().generate(**inputs, **GENERATION)  # B is zero: nothing learned yet
        inputs.pop("pixel_values")
        assert torch.equal(model.generate(**inputs, encoded_images=images, **GENERATION), expected)


def model_for_prompts(**changes) -> TokenFlexForConditionalGeneration:
    """PEFT takes the first table of as many rows as the vocabulary for the word embeddings."""
    config = tiny_config(**changes)
    config.text_config.vocab_size += 6
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TokenFlexForConditionalGeneration(config)


@pytest.mark.skipif(
    version.parse(transformers.__version__) >= version.parse("5.24")
    and version.parse(peft.__version__) <= version.parse("0.21.2"),
    reason="peft 0.21.2 loses learned prompts under transformers 5.24, of stock models too",
)
@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
@pytest.mark.parametrize("positions", [None, "normalized"])
def test_learned_prompts_stand_before_images(kind, positions):
    changes = {"image_positions": "shared"} if positions else {}
    model = model_for_prompts(projector_position=positions, **changes)
    model = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for inputs in (padded_batch(prompts()), one_image(9, 9)):
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        learning = [p for p in model.parameters() if p.requires_grad]
        assert learning
        assert all(float(p.grad.abs().max()) > 0 for p in learning)

    model.eval()
    answer = model.generate(**inputs, **GENERATION)
    if kind is PrefixTuningConfig:
        chunked = model.generate(**inputs, prefill_chunk_size=5, **GENERATION)
        assert torch.equal(chunked, answer)
    else:
        with pytest.raises(ValueError, match=r"prefill_chunk_size must be None .*got 5"):
            model.generate(**inputs, prefill_chunk_size=5, **GENERATION)
    expected = inputs.pop("input_ids")
    for _ in range(4):  # one token after the other, without a cache
        with torch.no_grad():
            chances = model(input_ids=expected, **inputs).logits[:, -1]
        chances[:, IMAGE] = -torch.inf
        expected = torch.cat([expected, chances.argmax(-1, keepdim=True)], 1)
    assert torch.equal(answer, expected)
