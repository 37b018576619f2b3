"""A converted model, in every family: each image at its own count, alone as in a batch."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.dropin.configs import MROPE
from tests.dropin.table import IMAGE, START, image_inputs
from tests.dropin.tiny import KINDS, PROMPTS, Prompt, batch, stock_model
from tokenflex import TokenAdaptiveProjector, replace_projector
from tokenflex.dropin.families import family_of

TOLERANCE = 1e-5


def converted(name: str, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return replace_projector(stock_model(name), num_image_tokens=16, **options)


@functools.cache
def shared(name: str):
    """Return a converted model for tests that leave it as it is."""
    return converted(name)


@functools.cache
def shared_stock(name: str):
    """Return a stock model for tests that leave it as it is."""
    return stock_model(name)


def projector_of(model) -> TokenAdaptiveProjector:
    return model.base_model.get_submodule(family_of(model.config).projector)


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


def test_uniform_count_trains_every_projector_parameter(name):
    model = converted(name).train()
    for count in (9, 16, (3, 5)):
        prompts = [Prompt(one.ids, [count] * len(one.images), one.images) for one in PROMPTS]
        inputs = batch(name, prompts, labels=True)
        inputs["num_image_tokens"] = count
        model.zero_grad()
        model(**inputs).loss.backward()
        for parameter, value in projector_of(model).named_parameters():
            assert value.grad is not None, parameter
            assert float(value.grad.abs().max()) > 0, parameter


def test_each_prompt_of_a_mixed_batch_is_as_if_alone(name):
    model = shared(name)
    together = logits(model, batch(name, PROMPTS))
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = logits(model, batch(name, [prompt]))[0]
        assert float((row[-len(alone) :] - alone).abs().max()) < TOLERANCE


def test_another_image_would_be_seen(name):
    model = shared(name)
    other = Prompt(PROMPTS[1].ids, PROMPTS[1].counts, PROMPTS[1].images[::-1])
    before, after = (logits(model, batch(name, [prompt])) for prompt in (PROMPTS[1], other))
    assert float((before[:, -1] - after[:, -1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "beams"],
)
def test_generation_of_a_mixed_batch_is_that_of_each_prompt(name, options):
    model = shared(name)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **options}
    together = model.generate(**batch(name, PROMPTS), **options)
    per_prompt = together.unflatten(0, (len(PROMPTS), -1))
    for rows, prompt in zip(per_prompt, PROMPTS, strict=True):
        alone = model.generate(**batch(name, [prompt]), **options)
        assert torch.equal(rows[:, -3:], alone[:, -3:])


def test_text_alone(name):
    model = shared(name)
    prompt = Prompt([3, 4, 5, 6], [], [])
    stock = shared_stock(name)
    inputs = batch(name, [prompt])
    assert torch.equal(logits(model, inputs), logits(stock, inputs))
    new = model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert new.shape == (1, 6)


def test_precomputed_tokens_in_the_stock_model_give_the_same_logits(name):
    """Oracle: only the image features, and M-RoPE positions, change."""
    if name == "smolvlm" and transformers.__version__.startswith("5.20."):
        pytest.skip("that stock model takes only counts that its patch size divides")
    model, stock = shared(name), shared_stock(name)
    inputs = batch(name, PROMPTS)
    names = (*inspect.signature(stock.base_model.get_image_features).parameters, "num_image_tokens")
    images = {key: inputs[key] for key in names if key in inputs}
    with torch.no_grad():
        encoded = model.base_model.get_image_features(**images)
    family = family_of(model.config)
    given = BaseModelOutputWithPooling(pooler_output=family.merge(encoded.pooler_output))
    if hasattr(encoded, "deepstack_features"):
        given["deepstack_features"] = encoded.deepstack_features
    if family.more_outputs is not None:
        for field, value in family.more_outputs(model.base_model).items():
            setattr(given, field, value)
    text = {key: value for key, value in inputs.items() if key not in images}
    if name in MROPE:
        text |= native_grids(model, inputs["num_image_tokens"])
    expected = logits(stock, {**text, "mm_encoder_outputs": {"image": given}})
    assert float((logits(model, inputs) - expected).abs().max()) < TOLERANCE


CUTS_IMAGES = pytest.mark.skipif(
    not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"),
    reason="transformers cuts no images into chunks before 5.23",
)


@CUTS_IMAGES
def test_a_prompt_in_chunks_is_answered_as_a_whole_one(name):
    model, inputs = shared(name), batch(name, PROMPTS)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(**inputs, **options)
    for chunk in (5, 1000):
        in_chunks = model.generate(**inputs, **options, prefill_chunk_size=chunk)
        bidirectional = model.config.model_type in ("gemma3", "paligemma")
        # Where a chunk ends, the first tokens of such an image see no later ones.
        if chunk == 1000 or not bidirectional:
            assert torch.equal(in_chunks.sequences, whole.sequences)
            for actual, expected in zip(in_chunks.logits, whole.logits, strict=True):
                assert float((actual - expected).abs().max()) < 1e-4


@CUTS_IMAGES
def test_counts_are_checked_before_a_prompt_is_cut():
    model, inputs = converted("llava"), batch("llava", PROMPTS)
    inputs["num_image_tokens"] = [25, 9, 16]  # the same total
    with pytest.raises(ValueError, match="ends a run of placeholders inside image 0"):
        model.generate(**inputs, max_new_tokens=1, pad_token_id=0, prefill_chunk_size=1000)


def test_chunks_that_would_leave_images_out_are_refused(monkeypatch):
    monkeypatch.delattr(transformers.generation.utils, "_slice_mm_encoder_output", raising=False)
    model, inputs = converted("llava"), batch("llava", PROMPTS)
    options = {"max_new_tokens": 1, "pad_token_id": 0}
    with pytest.raises(ValueError, match="prefill_chunk_size must be None"):
        model.generate(**inputs, **options, prefill_chunk_size=1000)
    text = {name: inputs[name][:1, :3] for name in ("input_ids", "attention_mask")}
    assert model.generate(**text, **options, prefill_chunk_size=2).shape == (1, 4)


@pytest.mark.parametrize("options", [(), ("output_hidden_states", "output_attentions")])
def test_outputs_of_the_vision_encoder_are_the_stock_ones(name, options):
    model, stock, inputs = converted(name), stock_model(name), batch(name, PROMPTS)
    names = inspect.signature(stock.base_model.get_image_features).parameters
    images = {key: inputs[key] for key in names if key in inputs}
    images |= dict.fromkeys(options, True)
    for each in (model, stock):
        each.set_attn_implementation("eager")
    counts = {"num_image_tokens": inputs["num_image_tokens"]}
    with torch.no_grad():
        expected = stock.base_model.get_image_features(**images)
        actual = model.base_model.get_image_features(**images, **counts)
        in_order = model.base_model.get_image_features(**images, **counts, return_dict=False)
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(in_order[0], actual.last_hidden_state)
    assert all(map(torch.equal, in_order[1], actual.pooler_output))
    for field in ("hidden_states", "attentions"):
        states, stock_states = getattr(actual, field), getattr(expected, field, None)
        if states is None or stock_states is None:
            assert not options or states is stock_states, field
            continue
        assert len(states) == len(stock_states), field
        for state, stock_state in zip(states, stock_states, strict=True):
            if stock_state is None:  # a layer that was not asked for
                assert not options, field
            elif isinstance(stock_state, torch.Tensor):
                assert torch.equal(state, stock_state), field
            else:  # one for each image
                assert all(map(torch.equal, state, stock_state)), field


@pytest.mark.parametrize("name", KINDS)
def test_outputs_come_as_a_tuple_where_that_is_asked_for(name, monkeypatch):
    model, inputs = shared(name), batch(name, PROMPTS)
    names = inspect.signature(model.base_model.get_image_features).parameters
    images = {key: inputs[key] for key in names if key in inputs}
    with torch.no_grad():
        expected, encoded = model(**inputs), model.base_model.get_image_features(**images)
        actual = model(**inputs, return_dict=False)
        assert type(actual) is tuple
        assert torch.equal(actual[0], expected.logits)
        assert type(model.base_model.get_image_features(**images, return_dict=False)) is tuple
        monkeypatch.setattr(model.base_model.config, "return_dict", False)
        (_, tokens, *_) = model.base_model.get_image_features(**images)
        assert all(map(torch.equal, tokens, encoded.pooler_output))


def test_counts_that_do_not_fit_are_refused(name):
    model, inputs = shared(name), batch(name, PROMPTS)
    counts = inputs.pop("num_image_tokens")
    for change, match in (
        (counts[::-1], "placeholders"),
        (counts[:-1], "one entry per image"),
        ([10, *counts[1:]], "perfect square"),
        (None, "placeholders"),
    ):
        with pytest.raises(ValueError, match=match):
            model(**inputs, num_image_tokens=change)


def test_default_count(name):
    model = shared(name)
    prompt = Prompt([3, START, IMAGE, 5], [16], [1])
    inputs = batch(name, [prompt])
    with_count = logits(model, inputs)
    del inputs["num_image_tokens"]
    assert torch.equal(logits(model, inputs), with_count)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    assert model.generate(**inputs, **options).shape == (1, inputs["input_ids"].shape[1] + 2)


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_pickles_are_converted_models(name):
    inputs = batch(name, PROMPTS)
    twin = copy.deepcopy(pickle.loads(pickle.dumps(converted(name))))
    expected = logits(shared(name), inputs)
    assert torch.equal(logits(twin, inputs), expected)
    with torch.no_grad():
        projector_of(twin).down.bias.add_(1.0)
    assert not torch.equal(logits(twin, inputs), expected)
    assert torch.equal(logits(shared(name), inputs), expected)


# ---- M-RoPE positions


def native_grids(model, counts) -> dict:
    """Return the grids of images with as many cells, as the stock model takes them."""
    cells = [(int(c**0.5),) * 2 if isinstance(c, int) else c for c in counts]
    merge = model.config.vision_config.spatial_merge_size
    grids = [[1, height * merge, width * merge] for height, width in cells]
    return {"image_grid_thw": torch.tensor(grids)}


@pytest.mark.parametrize("name", MROPE)
@pytest.mark.parametrize("counts", [[9, 25, 16], [(2, 5), (3, 3), (6, 1)]], ids=["n", "h x w"])
def test_positions_are_those_of_an_image_of_that_many_cells(name, counts):
    model, stock = shared(name), shared_stock(name)
    prompts = [PROMPTS[0]._replace(counts=counts[:1]), PROMPTS[1]._replace(counts=counts[1:])]
    inputs = batch(name, prompts)
    names = ("input_ids", "mm_token_type_ids", "attention_mask")
    text = {key: inputs[key] for key in names}
    native = native_grids(model, counts)
    expected, deltas = stock.model.get_rope_index(**text, **native)
    actual, actual_deltas = model.model.get_rope_index(
        **text, **{key: inputs[key] for key in native}, num_image_tokens=counts
    )
    assert torch.equal(actual, expected)
    assert torch.equal(actual_deltas, deltas)
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    logits(model, inputs)
    model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
    hook.remove()
    assert len(seen) == 2
    for positions in seen:  # in generation text positions come first
        assert torch.equal(positions[-3:], expected)


@pytest.mark.parametrize("name", MROPE)
def test_positions_without_counts_are_read_off_the_placeholders(name):
    model = shared(name)
    inputs = batch(name, PROMPTS)
    names = ("input_ids", "mm_token_type_ids", "attention_mask")
    text = {key: inputs[key] for key in (*names, *native_grids(model, [9]))}
    with_counts = model.model.get_rope_index(**text, num_image_tokens=[9, 25, 16])
    assert torch.equal(model.model.get_rope_index(**text)[0], with_counts[0])
    with pytest.raises(ValueError, match="9 placeholders for image 0"):
        model.model.get_rope_index(**text, num_image_tokens=[4, 25, 16])


# ---- beside other libraries


def test_a_second_turn_continues_the_first(name):
    """With the first turn's cache, what follows is what a model that read it all would say."""
    model = shared(name)
    options = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
    first = batch(name, [PROMPTS[0]])
    reply = model.generate(**first, max_new_tokens=3, return_dict_in_generate=True, **options)
    ids = torch.cat([reply.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    mask = torch.ones_like(ids)
    again = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=reply.past_key_values,
        max_new_tokens=3,
        **options,
    )
    images = {k: v for k, v in first.items() if k not in ("input_ids", "attention_mask")}
    for key in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if key in images:
            images[key] = torch.nn.functional.pad(
                images[key], (0, ids.shape[1] - images[key].shape[1])
            )
    fresh = model.generate(
        input_ids=ids, attention_mask=mask, **images, max_new_tokens=3, **options
    )
    if name == "paligemma":  # a longer prompt is a longer bidirectional prefix
        assert again.shape == fresh.shape
    else:
        assert torch.equal(again, fresh)


def test_threads_may_share_a_model():
    """Each call waits for the other one in the vision encoder, and again behind its hooks."""
    model, images = converted("llava"), [image_inputs("llava", [seed]) for seed in (1, 2)]
    expected = [model.base_model.get_image_features(**image) for image in images]
    both, encoder = threading.Barrier(2, timeout=20), model.base_model.vision_tower
    forward = encoder.forward

    def wait(*_) -> None:
        both.wait()

    def waiting(*args, **kwargs):
        both.wait()
        encoder.register_forward_hook(wait)
        both.wait()
        return forward(*args, **kwargs)

    encoder.forward = waiting
    with ThreadPoolExecutor(2) as threads:
        actual = [*threads.map(lambda image: model.base_model.get_image_features(**image), images)]
    for outputs, alone in zip(actual, expected, strict=True):
        assert torch.equal(outputs.last_hidden_state, alone.last_hidden_state)
        assert all(map(torch.equal, outputs.pooler_output, alone.pooler_output))


@pytest.mark.parametrize("name", KINDS)
def test_hooks_of_accelerate_before_and_after_converting(name):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    inputs = batch(name, PROMPTS)
    expected = logits(shared(name), inputs)

    def hooked(model):
        for module in (model, model.base_model, *model.base_model.children()):
            add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
        return model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = replace_projector(hooked(stock_model(name)), num_image_tokens=16)
    assert torch.equal(logits(before, inputs), expected)
    assert torch.equal(logits(hooked(converted(name)), inputs), expected)


@pytest.mark.parametrize("name", KINDS)
def test_the_callers_arguments_stay_as_they_are(name):
    model = shared(name)
    inputs = batch(name, PROMPTS)
    images = image_inputs(name, [1, 2, 3])
    with torch.no_grad():
        encoded = model.base_model.get_image_features(
            **images, num_image_tokens=inputs["num_image_tokens"]
        )
    kept, tokens, holder = dict(inputs), list(encoded.pooler_output), {"image": encoded}
    text = {
        k: v
        for k, v in inputs.items()
        if k not in images or k in ("image_grid_thw", "target_sizes")
    }
    assert torch.equal(logits(model, {**text, "mm_encoder_outputs": holder}), logits(model, inputs))
    assert holder["image"] is encoded
    assert all(a is b for a, b in zip(encoded.pooler_output, tokens, strict=True))
    assert all(inputs[key] is value for key, value in kept.items())
