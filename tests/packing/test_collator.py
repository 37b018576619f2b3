"""Collators pack what other collators pad; rows of a data set have nearly equal costs."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.dropin.processors import picture, stock_processor
from tests.dropin.table import IMAGE
from tests.dropin.test_training import Samples
from tests.dropin.tiny import stock_model
from tests.packing.cases import PROMPTS, model_of, padded
from tokenflex import packing
from tokenflex.dropin import ImageTextCollator

GENERATION = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% elif m['role'] == 'assistant' %}"
    "{% generation %}{{ c['text'] }}{% endgeneration %} {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llava():
    model = stock_model("llava")
    packing.enable(model)
    return model


def test_a_row_of_samples_with_images(llava):
    processor = stock_processor("llava")
    samples = [Samples("llava", 3)[i] for i in range(3)]
    collate = packing.PackingCollator(llava, processor)
    row = collate(samples)
    expected = ImageTextCollator(processor, image_token_id=IMAGE)(samples)
    assert row["input_ids"].shape[1] == int(expected["attention_mask"].sum())
    assert torch.equal(row["pixel_values"], expected["pixel_values"])
    starts = row["cu_seq_lens_q"][:-1].long()
    assert row["position_ids"][0, starts].tolist() == [0, 0, 0]
    hidden = row["input_ids"] == IMAGE
    hidden[0, starts] = True
    assert bool((row["labels"][hidden] == -100).all())
    assert torch.equal(row["labels"][~hidden], row["input_ids"][~hidden])
    assert len(next(iter(row.values()))) == max(
        len(v) for v in row.values() if isinstance(v, torch.Tensor)
    )


def test_the_collator_holds_no_weights():
    model = model_of("qwen2_vl", "stock")
    packing.enable(model)
    collate = packing.PackingCollator(model, packing.join_outputs)
    assert not list(collate._base.parameters())
    again = pickle.loads(pickle.dumps(collate))
    samples = [padded("qwen2_vl", "stock", model, [prompt]) for prompt in PROMPTS]
    assert torch.equal(again(samples)["position_ids"], collate(samples)["position_ids"])


def test_images_may_stand_beside_messages(llava):
    collate = packing.PackingCollator(llava, stock_processor("llava"))
    (inside,) = [Samples("llava", 1)[0]]
    content = inside["messages"][0]["content"]
    images = [content[0]["image"]]
    open_part = [{"type": "image"}, content[1]]
    user = {**inside["messages"][0], "content": open_part}
    marked = {"images": images, "messages": [user, inside["messages"][1]]}
    plain = {
        "images": images,
        "messages": [
            {"role": "user", "content": "what is this"},
            {"role": "assistant", "content": "a cat"},
        ],
    }
    rows = [collate([sample]) for sample in (inside, marked, plain)]
    for row in rows[1:]:
        assert torch.equal(row["input_ids"], rows[0]["input_ids"])
        assert torch.equal(row["pixel_values"], rows[0]["pixel_values"])
    with pytest.raises(ValueError, match="one image for each of the 1 places"):
        collate([{**marked, "images": images * 2}])


def test_only_the_assistant_is_learned(llava):
    processor = stock_processor("llava")
    processor.chat_template = GENERATION
    collator = ImageTextCollator(processor, image_token_id=IMAGE, assistant_only=True)
    row = packing.PackingCollator(llava, collator)([Samples("llava", 2)[i] for i in range(2)])
    learned = row["input_ids"][row["labels"] != -100]
    assert processor.tokenizer.decode(learned).split() == ["a", "cat"] * 2


def test_labels_of_placeholders_are_kept_on_request(llava):
    def learn_all(samples):
        inputs = packing.join_outputs(samples)
        return {**inputs, "labels": inputs["input_ids"].clone()}

    samples = [padded("llava", "stock", llava, [prompt]) for prompt in PROMPTS]
    kept = packing.PackingCollator(llava, learn_all, keep_placeholder_labels=True)(samples)
    masked = packing.PackingCollator(llava, learn_all)(samples)
    is_image = kept["input_ids"] == IMAGE
    assert bool((kept["labels"][is_image] == IMAGE).all())
    assert bool((masked["labels"][is_image] == -100).all())
    assert torch.equal(kept["labels"][~is_image], masked["labels"][~is_image])


def test_labels_of_video_placeholders_are_hidden(llava, monkeypatch):
    monkeypatch.setattr(llava.config, "video_token_id", 14, raising=False)
    samples = [padded("llava", "stock", llava, [PROMPTS[2]]) for _ in range(2)]
    row = packing.PackingCollator(llava, packing.join_outputs)(samples)
    is_video = row["input_ids"] == 14
    assert int(is_video.sum()) == 2
    assert bool((row["labels"][is_video] == -100).all())
    assert int((row["labels"] != -100).sum()) == row["labels"].numel() - 2 - 2  # and the first ones


@pytest.mark.parametrize("name", ["llava", "idefics3", "llava_next", "qwen2_5_vl"])
def test_ready_outputs_are_joined_as_the_processor_would(name):
    model = model_of(name, "stock")
    expected = padded(name, "stock", model)
    samples = [padded(name, "stock", model, [prompt]) for prompt in PROMPTS]
    joined = packing.join_outputs(samples)
    assert {*joined} == {*expected}
    for key, value in expected.items():
        assert torch.equal(joined[key], value), key


def test_tiles_of_samples_are_padded():
    one, two = torch.ones(1, 2, 3, 4, 4), torch.ones(1, 5, 3, 4, 4)
    ids = torch.tensor([[1, 2]])
    joined = packing.join_outputs(
        [{"input_ids": ids, "pixel_values": tiles} for tiles in (one, two)]
    )
    assert joined["pixel_values"].shape == (2, 5, 3, 4, 4)
    assert joined["pixel_values"].sum(dim=(1, 2, 3, 4)).tolist() == [96, 240]
    with pytest.raises(ValueError, match="must all have input_ids"):
        packing.join_outputs([{"text": "a"}])


def test_what_the_collator_refuses(llava):
    with pytest.raises(ValueError, match=r"tokenflex.packing.enable\(model\) first"):
        packing.PackingCollator(stock_model("llava"), packing.join_outputs)
    with pytest.raises(TypeError, match="collator must be a collator or a processor, got str"):
        packing.PackingCollator(llava, "trl")
    with pytest.raises(ValueError, match="at least one sample"):
        packing.PackingCollator(llava, packing.join_outputs)([])
    with pytest.raises(ValueError, match="processor must be converted for counts"):
        ImageTextCollator(stock_processor("llava"), 16)


# ---- rows of a data set


def test_rows_have_nearly_equal_costs_and_every_sample_once(llava):
    samples = [{"text": "a " * (1 + i % 7), "images": [picture(i)] * (i % 3)} for i in range(40)]
    samples = [{**s, "text": "<image> " * len(s["images"]) + s["text"]} for s in samples]
    collator = ImageTextCollator(stock_processor("llava"), image_token_id=IMAGE)
    sizes = packing.measure(samples, collator)
    batch = collator(samples)
    assert sizes.tokens == batch["attention_mask"].sum(1).tolist()
    assert sizes.vision == [16 * len(sample["images"]) for sample in samples]
    rows = packing.PackedDataset(samples, sizes, max_tokens=400, vision_cost=0.5, multiple_of=2)
    assert len(rows) % 2 == 0
    assert sorted(index for members in rows.rows for index in members) == [*range(40)]
    costs = [sum(sizes.tokens[i] + 0.5 * sizes.vision[i] for i in members) for members in rows.rows]
    assert max(costs) < 1.1 * sum(costs) / len(costs)
    row = packing.PackingCollator(llava, collator)([rows[0]])
    assert row["input_ids"].shape[1] == sum(sizes.tokens[i] for i in rows.rows[0]) <= 400
    with pytest.raises(ValueError, match="data set's 40 samples, got 1"):
        packing.PackedDataset(samples, packing.SampleSizes([1], [1]), max_tokens=400)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_vision_work_of_an_image(name):
    """Qwen-like processors write the pixels of an image twice, as two frames."""
    processor = stock_processor(name)
    collator = ImageTextCollator(processor, image_token_id=IMAGE)
    said = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a cat"}]
    sizes = packing.measure([{"messages": said, "images": [picture(1, 64, 64)]}], collator)
    assert sizes.vision == [16]


def _sizes(number: int) -> packing.SampleSizes:
    return packing.SampleSizes([3] * number, [1 + i % 4 for i in range(number)])


def test_vision_work_of_a_row_is_bounded():
    sizes = _sizes(12)
    rows = packing.PackedDataset([*range(12)], sizes, max_tokens=100, max_vision=8).rows
    assert max(sum(sizes.vision[i] for i in members) for members in rows) <= 8
    assert len(packing.PackedDataset([*range(12)], sizes, max_tokens=100)) == 1


def test_rows_as_a_dataset_of_tables():
    pytest.importorskip("datasets")
    rows = packing.PackedDataset([{"a": i} for i in range(7)], _sizes(7), max_tokens=9)
    table = rows.to_datasets()
    assert len(table) == len(rows) > 1
    assert [table[i]["samples"] for i in range(len(rows))] == [row["samples"] for row in rows]
    assert table[1:3]["samples"] == [rows[1]["samples"], rows[2]["samples"]]


def test_cost_of_vision_work_is_the_ratio_of_parameters(llava):
    base = llava.base_model
    tower = sum(p.numel() for p in base.vision_tower.parameters())
    text = sum(p.numel() for p in base.language_model.parameters())
    assert packing.vision_cost(llava) == pytest.approx(tower / text)
