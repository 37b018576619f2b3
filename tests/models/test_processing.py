"""The processor: placeholders, counts and pixels agree, or an error says what does not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor

from tests.models.tiny import IMAGE, PIXELS, check_same_pixels, picture, tiny_model
from tokenflex import TokenFlexProcessor
from tokenflex.digits.processor import digits_processor


@pytest.fixture(scope="module")
def processor() -> TokenFlexProcessor:
    return digits_processor(num_image_tokens=16)


def placeholders(batch) -> list[int]:
    return (batch["input_ids"] == IMAGE).sum(-1).tolist()


A, B, C = picture(1), picture(2), picture(3)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (None, [16, 16, 16]),
        (4, [4, 4, 4]),
        ((2, 3), [(2, 3)] * 3),
        ([4, 9, 16], [4, 9, 16]),
        ([4, (1, 3), 1], [4, (1, 3), 1]),
        (torch.tensor([4, 9, 16]), [4, 9, 16]),
    ],
)
def test_counts_reach_the_prompt_and_the_model_alike(processor, counts, expected):
    batch = processor(
        images=[[A], [B, C]], text=["<image> odd", "<image> <image> odd"], num_image_tokens=counts
    )
    rows = [n if isinstance(n, int) else n[0] * n[1] for n in expected]
    assert batch["num_image_tokens"] == expected
    assert placeholders(batch) == [rows[0], rows[1] + rows[2]]
    assert batch["pixel_values"].shape == (3, 3, PIXELS, PIXELS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("num_image_token", "num_image_token is no argument.*did you mean num_image_tokens"),
        ("max_tile", "did you mean max_tiles"),
        ("colour", "colour is no argument of the processor or its tokenizer$"),
    ],
)
def test_a_misspelt_argument_is_refused_with_the_nearest_name(name, words):
    with pytest.raises(TypeError, match=words):
        digits_processor()(images=picture(), text="<image> odd", **{name: 4})


def test_square_grid_is_the_same_as_its_count(processor):
    batch = processor(images=A, text="<image> odd", num_image_tokens=(3, 3))
    assert placeholders(batch) == [9]
    assert batch["num_image_tokens"] == [9]


def test_placeholders_stand_where_the_prompt_has_them(processor):
    batch = processor(images=[A, B], text="read <image> odd <image>", num_image_tokens=[1, 4])
    words = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words == ["read", "<image>", "odd", *["<image>"] * 4]


@pytest.mark.parametrize("images", [[A, B, C], (A, B, C), [[A], [B, C]]])
def test_images_flat_or_nested_are_taken_in_order_of_appearance(processor, images):
    batch = processor(images=images, text=["<image> odd", "<image> <image> odd"])
    for tile, image in zip(batch["pixel_values"], (A, B, C), strict=True):
        alone = processor(images=image, text="<image> odd")["pixel_values"][0]
        assert torch.equal(tile, alone)


def test_other_sizes_are_resized(processor):
    batch = processor(images=picture(1, size=(50, 17)), text="<image> odd")
    assert batch["pixel_values"].shape == (1, 3, PIXELS, PIXELS)


def test_prompts_are_padded_on_the_left_and_masked(processor):
    batch = processor(images=[A, B], text=["<image> odd", "<image> odd"], num_image_tokens=[1, 4])
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    right = processor(
        images=[A, B],
        text=["<image> odd", "<image> odd"],
        num_image_tokens=[1, 4],
        padding_side="right",
    )
    assert right["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]


def test_text_alone(processor):
    batch = processor(text=["odd", "read r1c1"])
    assert set(batch) == {"input_ids", "attention_mask"}


def test_counts_stay_host_numbers_on_any_device_and_dtype(processor):
    batch = processor(images=[A, B], text="<image> <image> odd", num_image_tokens=[4, (2, 3)]).to(
        "cpu", torch.bfloat16
    )
    counts = batch["num_image_tokens"]
    assert isinstance(counts, list)
    assert [type(count) for count in counts] == [int, tuple]
    assert counts == [4, (2, 3)]
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["input_ids"].dtype == torch.int64


# ---- what must be refused


@pytest.mark.parametrize(
    ("images", "text", "match"),
    [
        ([A], "odd", r"got 0 \(per prompt \[0\]\) for 1 images"),
        (None, "<image> odd", r"got 1 \(per prompt \[1\]\) for 0 images"),
        ([A, B], ["<image> odd", "odd"], r"got 1 \(per prompt \[1, 0\]\) for 2 images"),
        ([A], ["<image> <image> odd"], r"got 2 \(per prompt \[2\]\) for 1 images"),
    ],
)
def test_images_and_placeholders_must_agree(processor, images, text, match):
    with pytest.raises(ValueError, match=match):
        processor(images=images, text=text)


def test_images_nested_by_prompt_must_agree_prompt_by_prompt(processor):
    """Equal totals would show the first prompt a picture of the second, without a word."""
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        processor(images=[[A], [B, C]], text=["<image> <image> odd", "<image> odd"])


def test_non_square_count_names_its_neighbours(processor):
    with pytest.raises(ValueError, match=r"num_image_tokens.*10.*nearest squares are 9 and 16"):
        processor(images=A, text="<image> odd", num_image_tokens=10)
    with pytest.raises(ValueError, match=r"num_image_tokens\[1\].*10.*9 and 16"):
        processor(images=[A, B], text="<image> <image> odd", num_image_tokens=[4, 10])


@pytest.mark.parametrize("counts", [[4], [4, 9, 16], []])
def test_as_many_counts_as_images(processor, counts):
    with pytest.raises(ValueError, match=f"{len(counts)} entries for 2 images"):
        processor(images=[A, B], text="<image> <image> odd", num_image_tokens=counts)


@pytest.mark.parametrize("count", [0, -4, 4.0, "4", True])
def test_counts_that_are_none(processor, count):
    with pytest.raises((ValueError, TypeError), match="num_image_tokens"):
        processor(images=A, text="<image> odd", num_image_tokens=count)


def test_truncation_that_cuts_an_image_is_refused(processor):
    with pytest.raises(ValueError, match="6 of 16"):
        processor(images=A, text="read <image> odd", truncation=True, max_length=7)


def test_truncation_behind_the_image_is_allowed(processor):
    batch = processor(
        images=A, text="<image> odd odd odd", num_image_tokens=4, truncation=True, max_length=5
    )
    assert batch["input_ids"].shape == (1, 5)
    assert placeholders(batch) == [4]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "text"),
        ({"text": [1]}, TypeError, r"text\[0\].*int"),
        ({"text": "odd", "return_tensors": "np"}, ValueError, "np"),
        ({"text": "<image> odd", "images": ["no such file"]}, ValueError, "images|no such file"),
    ],
)
def test_other_arguments_it_refuses(processor, arguments, error, match):
    with pytest.raises(error, match=match):
        processor(**arguments)


def test_tokenizer_without_the_image_token_is_refused(processor):
    with pytest.raises(ValueError, match=r"<picture>.*special token"):
        TokenFlexProcessor(processor.image_processor, processor.tokenizer, image_token="<picture>")


@pytest.mark.parametrize("missing", ["image_processor", "tokenizer"])
def test_both_parts_are_needed(processor, missing):
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    with pytest.raises(ValueError, match=missing):
        TokenFlexProcessor(**{**parts, missing: None})


def test_default_count_must_be_a_grid(processor):
    with pytest.raises(ValueError, match="9 and 16"):
        TokenFlexProcessor(processor.image_processor, processor.tokenizer, num_image_tokens=10)


# ---- saving, templates, the model


@pytest.mark.parametrize(
    "load", [TokenFlexProcessor.from_pretrained, AutoProcessor.from_pretrained]
)
@pytest.mark.parametrize("default", [9, (2, 3)])
def test_save_and_load(tmp_path, load, default):
    saved = digits_processor(num_image_tokens=default)
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is TokenFlexProcessor
    assert loaded.num_image_tokens == default
    assert loaded.image_token == "<image>"
    assert loaded.chat_template == saved.chat_template
    call = {"images": [A, B], "text": ["<image> odd", "read <image>"]}
    before, after = saved(**call), loaded(**call)
    assert before.keys() == after.keys()
    assert torch.equal(before["input_ids"], after["input_ids"])
    check_same_pixels(saved, before["pixel_values"], loaded, after["pixel_values"])
    assert before["num_image_tokens"] == after["num_image_tokens"]


def test_processor_is_found_beside_a_saved_model(tmp_path, processor):
    tiny_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is TokenFlexProcessor


def test_chat_template_makes_a_prompt(processor):
    text = processor.apply_chat_template([{"role": "user", "content": "<image> odd"}])
    assert text.split() == ["<image>", "odd"]


def test_output_feeds_the_model_and_generate(processor):
    model = tiny_model()
    batch = processor(
        images=[[A], [B, C]],
        text=["<image> odd", "<image> read r1c1 <image>"],
        num_image_tokens=[4, (2, 3), 9],
    )
    assert set(batch) <= set(processor.model_input_names)
    with torch.no_grad():
        assert model(**batch).logits.shape[:2] == batch["input_ids"].shape
    output = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert output.shape == (2, batch["input_ids"].shape[1] + 3)


# ---- conversations


def chat(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def test_images_inside_a_conversation_become_inputs(processor, tmp_path):
    A.save(tmp_path / "a.png")
    expected = processor(images=[A, B], text="<image> odd <image>", num_image_tokens=[4, 9])
    batch = processor.apply_chat_template(
        chat(
            {"type": "image", "path": str(tmp_path / "a.png")},
            {"type": "text", "text": " odd "},
            {"type": "image", "image": B},
        ),
        tokenize=True,
        return_dict=True,
        processor_kwargs={"num_image_tokens": [4, 9]},
    )
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert batch["num_image_tokens"] == [4, 9]


def test_conversations_of_a_batch(processor):
    odd = {"type": "text", "text": " odd"}
    conversations = [chat({"type": "image", "image": A}, odd), chat(odd)]
    batch = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, processor_kwargs={"num_image_tokens": 4}
    )
    assert placeholders(batch) == [4, 0]
    assert processor.apply_chat_template(conversations)[0].split() == ["<image>", "odd"]
    # Images may stand beside the conversation, too.
    beside = processor.apply_chat_template(
        chat({"type": "image"}, odd),
        tokenize=True,
        processor_kwargs={"images": [A], "num_image_tokens": 4},
    )
    assert beside.tolist() == batch["input_ids"][:1].tolist()


@pytest.mark.parametrize("part", [{"type": "video"}, "words", {}])
def test_parts_that_are_neither_text_nor_image(processor, part):
    with pytest.raises(ValueError, match="content must have parts of type text and image"):
        processor.apply_chat_template(chat(part))


def test_assistant_masks_are_refused(processor):
    with pytest.raises(ValueError, match="return_assistant_tokens_mask"):
        processor.apply_chat_template(chat(), return_assistant_tokens_mask=True)


@pytest.mark.parametrize("text", ["<image> odd", "read <image> majority odd", "<image> majority"])
def test_marks_around_an_image_are_written_once(processor, text):
    """With or without them in the prompt: the released model puts its images in <img> .. </img>."""
    marked = TokenFlexProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_start="read ",
        image_end=" majority",
    )
    batch = marked(images=A, text=text, num_image_tokens=2 * 2)
    words = marked.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words[:6] == ["read", *["<image>"] * 4, "majority"]
    assert words.count("read") == words.count("majority") == 1
    assert marked.image_prompt == "read <image> majority"


def test_truncation_names_the_row_and_its_images(processor):
    with pytest.raises(ValueError, match=r"3 of 9 .*row 1, whose images \[1\] have \[9\]"):
        processor(
            images=[A, B],
            text=["<image>", "odd odd <image>"],
            num_image_tokens=[4, 9],
            truncation=True,
            max_length=5,
        )
