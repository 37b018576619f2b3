"""Replacing, restoring, saving and loading: nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import tokenflex
from tests.dropin.processors import picture, stock_processor
from tests.dropin.test_model import converted, logits, projector_of
from tests.dropin.tiny import KINDS, PROMPTS, Prompt, batch, stock_model
from tokenflex import replace_projector, restore_projector
from tokenflex.dropin import families, supported_families
from tokenflex.dropin.families import family_of
from tokenflex.dropin.model import stock_projector_of


def keys_on_disk(folder) -> set[str]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as weights:
        return set(weights.keys())


def a_processor():
    """Any processor with the model's placeholder: what is loaded here is the model."""
    return stock_processor("llava")


# ---- in place


def test_only_the_projector_and_the_classes_change(name):
    stock, model = stock_model(name), stock_model(name)
    expected = stock.state_dict()
    returned = replace_projector(model, num_image_tokens=16)
    assert returned is model
    assert type(model).__name__ == type(stock).__name__
    assert isinstance(model, type(stock))
    family = family_of(model.config)
    state = model.state_dict()
    new = {f"{family.projector}.{part}" for part in ("layernorm", "gate", "up", "down")}
    for key in state.keys() - expected.keys():
        assert any(part in key for part in new), key
    for key in expected.keys() - state.keys():
        assert f"{family.stock_projector}." in key, key
    for key in expected.keys() & state.keys():
        if f"{family.projector}." not in key:
            assert torch.equal(state[key], expected[key]), key


def test_restored_model_is_the_stock_one(name):
    stock, model = stock_model(name), converted(name)
    assert restore_projector(model) is model
    assert type(model) is type(stock)
    assert type(model.base_model) is type(stock.base_model)
    assert not hasattr(model.config, "tokenflex")
    assert not model.base_model._forward_pre_hooks
    expected = stock.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    # and it may be converted again
    again = replace_projector(model, num_image_tokens=9)
    again.load_state_dict(converted(name).state_dict())
    inputs = batch(name, PROMPTS)
    assert torch.equal(logits(again, inputs), logits(converted(name), inputs))


@pytest.mark.parametrize("name", KINDS)
def test_restored_projector_follows_the_model(name):
    model = converted(name).to(torch.bfloat16).train()
    restore_projector(model)
    stock = model.base_model.get_submodule(family_of(model.config).stock_projector)
    assert all(p.dtype == torch.bfloat16 for p in stock.parameters())
    assert stock.training


@pytest.mark.parametrize("name", KINDS)
def test_projector_has_the_dtype_of_the_one_it_replaces(name):
    model = stock_model(name).to(torch.bfloat16)
    kept = model._keep_in_fp32_modules_strict or ()  # which from_pretrained alone sees to
    for key, weight in model.state_dict(keep_vars=True).items():
        if any(part in key for part in kept):
            weight.data = weight.data.float()
    dtype = logits(model, batch(name, [Prompt([3, 4], [], [])])).dtype
    replace_projector(model, num_image_tokens=16)
    assert {p.dtype for p in projector_of(model).parameters()} == {torch.bfloat16}
    assert logits(model, batch(name, PROMPTS)).dtype == dtype


# ---- on disk


def test_saved_conversion_loads_exactly(name, tmp_path):
    model = converted(name, hidden_width=20)
    model.save_pretrained(tmp_path)
    loaded, _ = tokenflex.from_pretrained(tmp_path, processor=a_processor())
    inputs = batch(name, PROMPTS)
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))
    assert projector_of(loaded).hidden_width == 20
    before = keys_on_disk(tmp_path)
    stock_model(name).save_pretrained(tmp_path / "stock")
    stock = keys_on_disk(tmp_path / "stock")
    # The names of a checkpoint are those of the stock one, which is not those of the modules.
    parts = {key.split(".")[-2] for key in before - stock}
    assert parts <= {"layernorm", "gate", "up", "down"}
    replaced = stock_projector_of(model)
    assert len(stock - before) <= len(replaced.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    assert keys_on_disk(tmp_path / "again") == before
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tokenflex"]["stock_architectures"] == [type(model).__name__]
    assert written["tokenflex"]["num_image_tokens"] == 16


def test_stock_weights_get_a_fresh_projector(name, tmp_path):
    stock = stock_model(name)
    stock.save_pretrained(tmp_path)
    model, _ = tokenflex.from_pretrained(
        tmp_path, num_image_tokens=16, processor=a_processor(), dtype=torch.bfloat16
    )
    assert {p.dtype for p in projector_of(model).parameters()} == {torch.bfloat16}
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    head = model.get_output_embeddings().weight  # lost where checkpoint keys are not converted
    assert torch.equal(head, stock.get_output_embeddings().weight.to(torch.bfloat16))
    inputs = batch(name, [Prompt([3, 4, 5], [], [])])
    assert torch.equal(logits(model.eval(), inputs), logits(expected.eval(), inputs))


def test_grid_as_default_count_survives_saving(tmp_path):
    with torch.random.fork_rng():
        model = replace_projector(stock_model("llava"), num_image_tokens=(2, 8))
    model.save_pretrained(tmp_path)
    loaded, processor = tokenflex.from_pretrained(tmp_path, processor=stock_processor("llava"))
    assert processor.image_token_counts == (2, 8)
    inputs = batch("llava", [Prompt([3, 50, 4], [(2, 8)], [1])])
    del inputs["num_image_tokens"]
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))


def test_where_a_checkpoint_is_holds_for_its_config_and_processor(tmp_path):
    model, processor = stock_model("llava"), stock_processor("llava")
    replace_projector(model, processor, num_image_tokens=16)
    model.save_pretrained(tmp_path / "inner")
    processor.save_pretrained(tmp_path / "inner")
    loaded, loaded_processor = tokenflex.from_pretrained(tmp_path, subfolder="inner")
    assert loaded_processor.image_token_counts == 16
    inputs = batch("llava", PROMPTS)
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))


def test_default_count_is_one_for_all_images(tmp_path):
    model = stock_model("llava")
    with pytest.raises(TypeError, match=r"num_image_tokens must be one count.*\[64, 256\]"):
        replace_projector(model, num_image_tokens=[64, 256])
    assert not hasattr(model.config, "tokenflex")
    converted("llava").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="num_image_tokens must be one count"):
        tokenflex.from_pretrained(tmp_path, num_image_tokens=[4, 9], processor=a_processor())


def test_default_count_may_change_on_loading(tmp_path):
    converted("llava").save_pretrained(tmp_path)
    model, processor = tokenflex.from_pretrained(
        tmp_path, num_image_tokens=25, processor=stock_processor("llava")
    )
    assert processor.image_token_counts == 25
    assert model.config.tokenflex["num_image_tokens"] == 25


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3"])
def test_model_and_processor_from_one_folder(family, tmp_path):
    model, processor = stock_model(family), stock_processor(family)
    replace_projector(model, processor, num_image_tokens=16)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = tokenflex.from_pretrained(tmp_path)
    assert loaded_processor.image_token_counts == 16
    assert type(loaded_processor).__name__ == type(processor).__name__
    inputs = batch(family, PROMPTS)
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))


def test_conversion_with_weights_missing_is_refused(tmp_path):
    stock = stock_model("llava")
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tokenflex"] = converted("llava").config.tokenflex
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing keys.*multi_modal_projector"):
        tokenflex.from_pretrained(tmp_path, processor=stock_processor("llava"))


def test_loaded_conversion_has_no_stock_projector(tmp_path):
    converted("llava").save_pretrained(tmp_path)
    model, processor = tokenflex.from_pretrained(tmp_path, processor=stock_processor("llava"))
    with pytest.raises(ValueError, match="load the stock model"):
        restore_projector(model, processor)
    assert logits(model.eval(), batch("llava", PROMPTS)).shape[0] == 2


# ---- what is refused


def test_unsupported_model_names_the_supported_ones():
    model = stock_model("llava")
    model.config.model_type = "mllama"
    with pytest.raises(ValueError, match="'mllama'") as error:
        replace_projector(model)
    for family in supported_families():
        assert family in str(error.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_image_tokens": 250}, "nearest squares are 225 and 256"),
        ({"init": "zeros"}, "init"),
        ({"init": "fit"}, "needs images"),
        ({"images": [1]}, "processor"),
        ({"pooling": "max"}, "pooling"),
        ({"hidden_width": 0}, "hidden_width"),
    ],
)
def test_bad_arguments_leave_the_model_alone(options, match):
    model = stock_model("llava")
    with pytest.raises(ValueError, match=match):
        replace_projector(model, **options)
    assert not hasattr(model.config, "tokenflex")
    assert type(model) is type(stock_model("llava"))


def test_a_model_is_converted_once():
    model = converted("llava")
    with pytest.raises(ValueError, match="already"):
        replace_projector(model)


def test_there_must_be_something_to_restore():
    with pytest.raises(ValueError, match="nothing to restore"):
        restore_projector(stock_model("llava"))


@pytest.mark.parametrize("part", ["base_model", "lm_head"])
def test_parts_of_models_are_refused(part):
    with pytest.raises(TypeError, match="language-model head"):
        replace_projector(getattr(stock_model("llava"), part))


def test_random_weights_are_told_unless_they_are_meant(tmp_path, caplog):
    stock_model("llava").save_pretrained(tmp_path)
    for options, told in (({}, True), ({"init": "random"}, False)):
        caplog.clear()
        tokenflex.from_pretrained(tmp_path, processor=stock_processor("llava"), **options)
        assert ("has random weights: give images=pictures" in caplog.text) is told


def test_a_folder_in_place_of_a_model_or_of_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="lava does not exist"):
        tokenflex.from_pretrained(tmp_path / "lava")
    processor = stock_processor("llava")
    with pytest.raises(ValueError, match=r"images must be pictures .*, got the folder"):
        replace_projector(stock_model("llava"), processor, init="fit", images=str(tmp_path))


def test_conversions_have_no_use_for_a_start(tmp_path):
    model = converted("llava")
    model.save_pretrained(tmp_path)
    processor = stock_processor("llava")
    with pytest.raises(ValueError, match=r"init is for stock weights.*init='fit'"):
        tokenflex.from_pretrained(tmp_path, processor=processor, init="fit", images=[picture(1)])
    loaded, _ = tokenflex.from_pretrained(tmp_path, processor=processor, images=[picture(1)])
    assert torch.equal(projector_of(loaded).down.weight, projector_of(model).down.weight)


def test_conversion_with_options_missing_is_refused(tmp_path):
    converted("llava").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tokenflex"]["pooling"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pooling is missing"):
        tokenflex.from_pretrained(tmp_path, processor=stock_processor("llava"))


def test_videos_of_a_family_without_them_are_refused(monkeypatch):
    family = dataclasses.replace(families._FAMILIES["llava_onevision"], videos=None)
    monkeypatch.setitem(families._FAMILIES, "llava_onevision", family)
    model = converted("llava_onevision")
    inputs = {"input_ids": torch.tensor([[3, 51, 4]])}
    with pytest.raises(NotImplementedError, match="frames"):
        model(**inputs, pixel_values_videos=torch.zeros(1, 2, 3, 64, 64))
    with pytest.raises(NotImplementedError, match="frames"):
        model.generate(**inputs, pixel_values_videos=torch.zeros(1, 2, 3, 64, 64))


def test_stock_generate_does_not_know_counts():
    """So the variant's check is what lets them through."""
    with pytest.raises(ValueError, match="num_image_tokens"):
        stock_model("llava").generate(torch.tensor([[3, 4]]), num_image_tokens=[9])


def test_auto_class_loads_a_conversion_whole(tmp_path):
    """As if stock, its projector would be random: keys would be missing and unexpected."""
    converted("llava").save_pretrained(tmp_path)
    _, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
