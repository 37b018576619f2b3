"""The released checkpoint's layout, on a synthetic one: random weights, its names and config.

The real weights are not here. What is expected of them is written out from the public description:
names and config keys, the projector's formula, the tiles, the prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import tokenflex
from tests.models.test_modeling import GENERATION
from tests.models.tiny import check_same_pixels, picture
from tokenflex import TokenFlexForConditionalGeneration, load_ristretto
from tokenflex.cli import main
from tokenflex.models.conversion import convert
from tokenflex.models.loading import load_checkpoint

WIDTH, TEXT_WIDTH = 24, 32
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 384,  # and patches of 14: the grid of the release, 27 x 27
    "patch_size": 14,
}
TEXT = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIG = {
    "architectures": ["RistrettoModel"],
    "auto_map": {"AutoModel": "modeling_ristretto.RistrettoModel"},
    "model_type": "ristretto",
    "num_image_token": 256,
    "select_layer": -1,
    "force_image_size": 384,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
    "template": "a-chat",
    "torch_dtype": "float32",
    "vision_config": VISION,
    "llm_config": TEXT,
}
WORDS = ["<pad>", "<unk>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
WORDS += ["\n", " ", "user", "assistant", "system", "What", "is", "it", "?", "A", "cat"]
IMG, END, CONTEXT = 4, 5, 6


def released_tensors(use_head: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a release, by its own names."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vision = SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=use_head))
        language = Qwen2ForCausalLM(Qwen2Config(**TEXT))
        layers = {
            "layernorm": torch.nn.LayerNorm(WIDTH),
            "f1": torch.nn.Linear(WIDTH, 3 * WIDTH),
            "f2": torch.nn.Linear(WIDTH, 3 * WIDTH),
            "g": torch.nn.Linear(3 * WIDTH, TEXT_WIDTH),
        }
        torch.nn.init.normal_(layers["layernorm"].weight)
        torch.nn.init.normal_(layers["layernorm"].bias)
    tensors = {
        f"vision_model.vision_model.{name}": value for name, value in vision.state_dict().items()
    }
    for layer, module in layers.items():
        tensors |= {f"projector.mlp.{layer}.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"language_model.{k}": v for k, v in language.state_dict().items()}
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def write_release(folder: Path, tensors: dict[str, torch.Tensor], **changes) -> Path:
    """A release in three shards, with its index, config and tokenizer."""
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({n: tensors[n] for n in names[i::3]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(r" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
    )
    special = [AddedToken(word, normalized=False, special=True) for word in WORDS[:7]]
    tokenizer.add_tokens([*special, AddedToken("\n", normalized=False)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("released") / "Ristretto", released_tensors())


@pytest.fixture(scope="module")
def loaded(release):
    return load_ristretto(release)


# ---- formulas, written from the public description


def projected(tensors: dict[str, torch.Tensor], features: torch.Tensor, n: int) -> torch.Tensor:
    """n*n vision tokens of [B, 27*27, C]: resize to the next multiple of n, pool, norm, SwiGLU."""
    grid = features.transpose(1, 2).unflatten(2, (27, 27))
    side = -(-27 // n) * n
    if side != 27:
        grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=True)
    x = F.avg_pool2d(grid, side // n).flatten(2).transpose(1, 2)
    weight = {name.removeprefix("projector.mlp."): t for name, t in tensors.items()}
    x = F.layer_norm(x, (WIDTH,), weight["layernorm.weight"], weight["layernorm.bias"], 1e-5)
    gate = F.silu(F.linear(x, weight["f1.weight"], weight["f1.bias"]))
    up = F.linear(x, weight["f2.weight"], weight["f2.bias"])
    return F.linear(gate * up, weight["g.weight"], weight["g.bias"])


def encoder_of(tensors: dict[str, torch.Tensor]) -> SiglipVisionModel:
    encoder = SiglipVisionModel(SiglipVisionConfig(**VISION)).eval()
    prefix = "vision_model.vision_model."
    encoder.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return encoder


def tiles_of(image: Image.Image, columns: int, rows: int) -> torch.Tensor:
    """[tiles, 3, 384, 384]: resized, cut row by row, the whole image last; mean and std 0.5."""
    whole = image.resize((384 * columns, 384 * rows), Image.Resampling.BICUBIC)
    tiles = [
        whole.crop((384 * c, 384 * r, 384 * (c + 1), 384 * (r + 1)))
        for r in range(rows)
        for c in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(image.resize((384, 384), Image.Resampling.BICUBIC))
    pixels = np.stack([np.asarray(tile, dtype=np.float32) for tile in tiles]) / 255
    return torch.from_numpy((pixels - 0.5) / 0.5).permute(0, 3, 1, 2)


# ---- loading


@pytest.mark.parametrize("count", [64, 144, 256, 576, 81])
def test_vision_tokens_are_those_of_the_formula(loaded, count):
    model, _ = loaded
    tensors = released_tensors()
    pixel_values = torch.randn(2, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder_of(tensors)(pixel_values=pixel_values).last_hidden_state
        expected = projected(tensors, features, int(count**0.5))
        tokens = torch.stack(model.get_image_features(pixel_values, count).pooler_output)
    assert tokens.shape == (2, count, TEXT_WIDTH)
    assert float((tokens - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("counts", [64, [144, 64]])
def test_logits_are_those_of_the_parts(loaded, counts):
    """One run of placeholders an image, tiles in order, between <img> and </img>."""
    model, processor = loaded
    images = [picture(1, (300, 700)), picture(2, (500, 480))]
    text = "<IMG_CONTEXT>\nWhat is<img><IMG_CONTEXT></img>\n?"
    inputs = processor(images=images, text=text, num_image_tokens=counts)
    tensors = released_tensors()
    language = Qwen2ForCausalLM(Qwen2Config(**TEXT)).eval()
    prefix = "language_model."
    language.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    pixel_values = [tiles_of(images[0], 2, 1), tiles_of(images[1], 1, 1)]
    first, second = (counts, counts) if isinstance(counts, int) else counts
    word = WORDS.index
    ids = [IMG, *[CONTEXT] * 3 * first, END, word("\n"), word("What"), word(" "), word("is")]
    ids += [IMG, *[CONTEXT] * second, END, word("\n"), word("?")]
    assert inputs["input_ids"][0].tolist() == ids
    assert torch.allclose(inputs["pixel_values"], torch.cat(pixel_values), atol=1e-6)
    assert processor.image_tokens(images, counts) == [3 * first, second]
    with torch.no_grad():
        embeddings = language.get_input_embeddings()(torch.tensor(ids))
        encoder = encoder_of(tensors)
        vision = [
            projected(tensors, encoder(pixel_values=p).last_hidden_state, int(n**0.5))
            for p, n in zip(pixel_values, (first, second), strict=True)
        ]
        embeddings[torch.tensor(ids) == CONTEXT] = torch.cat([v.flatten(0, 1) for v in vision])
        expected = language(inputs_embeds=embeddings[None]).logits
        logits = model(**inputs).logits
    assert float((logits - expected).abs().max()) < 1e-4


def test_defaults_are_the_releases(loaded):
    model, processor = loaded
    assert processor.num_image_tokens == model.config.num_image_tokens == 256
    assert model.config.pooling == "resize"
    assert model.config.trained_num_image_tokens == [64, 144, 256]
    assert model.config.image_token_id == CONTEXT
    assert (processor.min_tiles, processor.max_tiles, processor.use_thumbnail) == (1, 6, True)
    assert model.generation_config.eos_token_id == 2
    assert not model.training


@pytest.mark.parametrize(
    ("changes", "tiles"),
    [
        ({"dynamic_image_size": False}, 1),
        ({"use_thumbnail": False}, 2),
        ({"max_dynamic_patch": 1}, 1),
        ({"min_dynamic_patch": 4, "max_dynamic_patch": 12}, 9),
    ],
)
def test_tiles_are_what_the_config_says(tmp_path, changes, tiles):
    folder = write_release(tmp_path / "r", released_tensors(), **changes)
    _, processor = load_ristretto(folder)
    batch = processor(images=picture(1, (300, 600)), text="<IMG_CONTEXT>", num_image_tokens=4)
    assert len(batch["pixel_values"]) == tiles


@pytest.mark.parametrize("system", [None, "You're a 'cat' {0}.\nMeow."])
def test_conversations_are_chatml(release, system):
    _, processor = load_ristretto(release, system_message=system)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat"},
        {"role": "user", "content": "it ?"},
    ]
    begin = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        f"{begin}<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat<|im_end|>\n"
        "<|im_start|>user\nit ?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_of_the_tokenizer_is_kept(release, tmp_path):
    folder = write_release(tmp_path / "r", released_tensors())
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    _, processor = load_ristretto(folder)
    assert processor.apply_chat_template([{"role": "user", "content": "A"}]) == "A!"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_the_files_or_the_one_asked_for(tmp_path, dtype):
    tensors = {name: value.to(torch.bfloat16) for name, value in released_tensors().items()}
    folder = write_release(tmp_path / "r", tensors)
    model, _ = load_ristretto(folder, **({} if dtype == torch.bfloat16 else {"dtype": dtype}))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    weight = model.model.projector.gate.weight
    assert torch.equal(weight, tensors["projector.mlp.f1.weight"].to(dtype))


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ((torch.bfloat16, torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16, torch.bfloat16, torch.float16), torch.float32),
    ],
)
def test_several_dtypes_become_the_widest(tmp_path, dtypes, widest):
    """First, middle and last differ: neither the first tensor nor the last one decides."""
    tensors = released_tensors()
    middle = "projector.mlp.g.weight"
    for name in tensors:
        tensors[name] = tensors[name].to(dtypes[name == middle])
    folder = write_release(tmp_path / "r", tensors)
    model, _ = load_ristretto(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {widest}
    assert torch.equal(model.model.projector.down.weight, tensors[middle].to(widest))
    convert(folder, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == "float32"
    converted, _ = load_checkpoint(tmp_path / "ours")
    for (name, one), other in zip(
        converted.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert one.dtype == widest, name
        assert torch.equal(one, other), name


def test_an_encoder_without_its_pooling_head(tmp_path):
    """Its last layer is all that is used: a release may leave the head out."""
    model, _ = load_ristretto(write_release(tmp_path / "r", released_tensors(use_head=False)))
    assert not any("head" in name for name, _ in model.model.vision_model.named_parameters())


def test_names_of_a_newer_transformers(tmp_path, loaded):
    tensors = {
        name.replace("vision_model.vision_model.", "vision_model."): value
        for name, value in released_tensors().items()
    }
    model, _ = load_ristretto(write_release(tmp_path / "r", tensors))
    for (name, a), b in zip(
        model.state_dict().items(), loaded[0].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_saving_what_was_loaded_is_a_tokenflex_checkpoint(tmp_path, loaded):
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = load_checkpoint(tmp_path)
    check_same_answers(loaded, (again, processor_again))


def check_same_answers(one, other) -> None:
    for count in (64, 144):
        batches = [
            processor(
                images=picture(1, (300, 700)), text="<IMG_CONTEXT>What ?", num_image_tokens=count
            )
            for _, processor in (one, other)
        ]
        check_same_pixels(one[1], batches[0]["pixel_values"], other[1], batches[1]["pixel_values"])
        outputs = []
        for model, _ in (one, other):  # the models are compared on the same pixels
            with torch.no_grad():
                outputs.append(model(**batches[0]).logits)
            outputs.append(model.generate(**batches[0], **GENERATION))
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])


# ---- converting


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def check_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def test_convert_and_back_gives_every_tensor_and_value(tmp_path, release, loaded):
    assert convert(release, tmp_path / "ours") == "tokenflex"
    assert convert(tmp_path / "ours", tmp_path / "theirs") == "ristretto"
    check_same_tensors(contents(release), contents(tmp_path / "theirs"))
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) == 3
    index = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(contents(release))
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    for part in ("vision_config", "llm_config"):
        values = config.pop(part)
        for key, value in CONFIG[part].items():
            assert values[key] == value, (part, key)
    assert config == {k: v for k, v in CONFIG.items() if not k.endswith("_config")}
    check_same_answers(loaded, load_checkpoint(tmp_path / "ours"))
    check_same_answers(loaded, load_ristretto(tmp_path / "theirs"))


GENERATION_FILE = {"do_sample": True, "temperature": 0.7, "eos_token_id": [2, 3], "pad_token_id": 0}


def released_values(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    return {k: v for k, v in config.items() if not k.endswith("_config")}


@pytest.mark.parametrize(
    "changes",
    [
        {"dynamic_image_size": False},  # and max_dynamic_patch 6, which is then not used
        {"dynamic_image_size": False, "min_dynamic_patch": 2, "max_dynamic_patch": 12},
        {"max_dynamic_patch": 1},
        {"min_dynamic_patch": 4, "max_dynamic_patch": 12, "use_thumbnail": False},
    ],
)
def test_convert_and_back_keeps_what_the_config_says_of_tiles(tmp_path, changes):
    release = write_release(tmp_path / "r", released_tensors(), **changes)
    convert(release, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")
    assert released_values(tmp_path / "theirs") == released_values(release)


def test_tiles_changed_between_conversions_are_written(tmp_path):
    release = write_release(tmp_path / "r", released_tensors(), dynamic_image_size=False)
    convert(release, tmp_path / "ours")
    file = tmp_path / "ours/processor_config.json"
    values = json.loads(file.read_text())
    assert values["max_tiles"] == 1
    file.write_text(json.dumps({**values, "max_tiles": 9}))
    convert(tmp_path / "ours", tmp_path / "theirs")
    written = released_values(tmp_path / "theirs")
    assert written["dynamic_image_size"] is True
    assert (written["min_dynamic_patch"], written["max_dynamic_patch"]) == (1, 9)


def test_a_generation_config_is_loaded_and_converted_there_and_back(tmp_path):
    release = write_release(tmp_path / "r", released_tensors())
    (release / "generation_config.json").write_text(json.dumps(GENERATION_FILE))
    convert(release, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")
    models = [load_ristretto(release)[0], load_checkpoint(tmp_path / "ours")[0]]
    models.append(load_ristretto(tmp_path / "theirs")[0])
    for model in models:
        for name, value in GENERATION_FILE.items():
            assert getattr(model.generation_config, name) == value, name


def test_a_converted_model_ends_answers_where_the_release_does(tmp_path, release):
    convert(release, tmp_path / "ours")
    model, _ = load_checkpoint(tmp_path / "ours")
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 0


def test_thumbnails_are_shown_where_the_config_says_nothing(tmp_path):
    folder = write_release(tmp_path / "r", released_tensors())
    config = json.loads((folder / "config.json").read_text())
    del config["use_thumbnail"]
    (folder / "config.json").write_text(json.dumps(config))
    _, processor = load_ristretto(folder)
    batch = processor(images=picture(1, (300, 600)), text="<IMG_CONTEXT>", num_image_tokens=4)
    assert len(batch["pixel_values"]) == 3


def test_system_message_is_kept_by_a_conversion_and_for_the_released_layout_only(tmp_path, release):
    convert(release, tmp_path / "ours", system_message="Meow.")
    _, processor = load_checkpoint(tmp_path / "ours")
    prompt = processor.apply_chat_template([{"role": "user", "content": "it ?"}])
    assert prompt.startswith("<|im_start|>system\nMeow.<|im_end|>\n<|im_start|>user\nit ?")
    with pytest.raises(ValueError, match="system_message"):
        convert(tmp_path / "ours", tmp_path / "theirs", system_message="Meow.")


def test_our_own_model_is_written_as_a_release_and_comes_back(tmp_path, loaded):
    model, processor = loaded
    config = model.config.__class__.from_dict(model.config.to_dict())
    del config.ristretto
    torch.manual_seed(1)
    fresh = TokenFlexForConditionalGeneration(config).eval()
    fresh.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "theirs") == "ristretto"
    check_same_answers((fresh, processor), load_ristretto(tmp_path / "theirs"))


def test_command_converts_and_says_so(tmp_path, release, capsys):
    assert main(["convert", str(release), str(tmp_path / "ours")]) == 0
    assert "tokenflex" in capsys.readouterr().out
    assert main(["convert", str(release), str(tmp_path / "ours")]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("direction", ["tokenflex", "ristretto"])
def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, release, direction):
    source = release
    if direction == "ristretto":
        convert(release, source := tmp_path / "ours")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    last = sorted(copy.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-8])
    with pytest.raises(ValueError, match=last.name):
        convert(copy, tmp_path / "target")
    assert not [path for path in tmp_path.iterdir() if "target" in path.name]


# ---- what is refused


def without(name: str) -> dict[str, torch.Tensor]:
    tensors = released_tensors()
    del tensors[name]
    return tensors


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without("projector.mlp.g.bias"), "missing tensors.*model.projector.down.bias"),
        (
            {**released_tensors(), "projector.mlp.f1.bias": torch.zeros(9)},
            r"another shape.*gate.bias: \(9,\).*\(72,\)",
        ),
        ({**released_tensors(), "projector.mlp.f3.bias": torch.zeros(9)}, "projector.mlp.f3.bias"),
        (
            {**released_tensors(), "language_model.model.extra": torch.zeros(9)},
            "unexpected.*language_model.extra",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, tensors, words):
    folder = write_release(tmp_path / "r", tensors)
    for read in (load_ristretto, lambda folder: convert(folder, tmp_path / "ours")):
        with pytest.raises(ValueError, match=words):
            read(folder)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, "model_type 'ristretto', got 'qwen2'"),
        ({"vision_config": None}, "vision_config"),
        ({"select_layer": -2}, "select_layer -2.*-1"),
        ({"pad2square": True}, "pad2square True"),
        ({"llm_config": {**TEXT, "architectures": ["XForCausalLM"]}}, "XForCausalLM.*Llama"),
        ({"vision_config": {**VISION, "model_type": "clip"}}, "vision_config.model_type 'clip'"),
        ({"num_image_token": 250}, "num_image_tokens.*225 and 256"),
    ],
)
def test_configs_of_another_kind(tmp_path, changes, words):
    folder = write_release(tmp_path / "r", released_tensors(), **changes)
    with pytest.raises(ValueError, match=words):
        load_ristretto(folder)


@pytest.mark.parametrize("missing", ["config.json", "model-00002-of-00003.safetensors"])
def test_files_that_are_missing(tmp_path, missing):
    folder = write_release(tmp_path / "r", released_tensors())
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        load_ristretto(folder)


def test_tokenizer_without_the_tokens_of_images(tmp_path):
    folder = write_release(tmp_path / "r", released_tensors())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("IMG_CONTEXT", "IMG"))
    with pytest.raises(ValueError, match="<IMG_CONTEXT>"):
        load_ristretto(folder)


def test_folders_that_are_not_there(tmp_path):
    for read in (load_ristretto, lambda folder: convert(folder, tmp_path / "x")):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pooling": "adaptive"}, "pooling.*resize.*adaptive"),
        ({"projector_eps": 1e-3}, "projector_eps"),
        ({"projector_position": "normalized"}, "projector_position"),
        ({"num_image_tokens": (2, 3)}, "num_image_tokens"),
    ],
)
def test_models_that_the_release_cannot_hold(tmp_path, loaded, changes, words):
    model, processor = loaded
    values = {**model.config.to_dict(), **changes}
    config = type(model.config).from_dict(values)
    TokenFlexForConditionalGeneration(config).save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "ours", tmp_path / "theirs")


def test_the_snippet_of_the_page_runs(release, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    _, section = page.split("## The released model")
    snippet = section.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/Ristretto-3B").symlink_to(release)
    names = {"tokenflex": tokenflex, "torch": torch, "picture": picture(1)}
    exec(compile(snippet, "docs/models.md", "exec"), names)
    assert {*names["inputs"]["num_image_tokens"]} == {144}
    assert names["model"].dtype == torch.bfloat16
