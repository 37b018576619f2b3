"""The processor: placeholders, counts and pixels agree, or an error says what does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TypedDict

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessingKwargs

from tests.models.tiny import IMAGE, PIXELS, check_same_pixels, picture, tiny_model
from tokenflex import TokenFlexProcessor
from tokenflex.digits.processor import digits_processor
from tokenflex.models.call_options import known_options


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


def test_pictures_that_have_their_size_are_not_resized(processor, monkeypatch):
    random = np.random.default_rng(0)
    a, b = (Image.fromarray(random.integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)) for _ in "ab")
    expected = processor.image_processor([a, b], return_tensors="pt")["pixel_values"]

    def resize(*_, **__):
        raise AssertionError("resized")

    monkeypatch.setattr(processor.image_processor, "resize", resize)
    batch = processor(images=[a, b], text="<image> <image>")
    assert torch.equal(batch["pixel_values"], expected)
    for options in ({"images": [a, b.resize((20, PIXELS))]}, {"images": [a, b], "size": 20}):
        with pytest.raises(AssertionError, match="resized"):
            processor(text="<image> <image>", **options)


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
        ({"text": "odd", "return_tensors": "tf"}, ValueError, "return_tensors.*tf"),
        ({"text": []}, ValueError, "at least one prompt"),
        ({"text": 3}, TypeError, "text must be a string or a list of strings, got int"),
        ({"text": "<image>", "images": ["no such file"]}, FileNotFoundError, "no such file"),
        ({"text": "<image>", "images": [[A, [A]]]}, ValueError, r"further lists in images\[0\]"),
        ({"text": "<image>", "images": [None]}, TypeError, r"images\[0\].*NoneType"),
        ({"text": "odd", "max_tiles": "2"}, TypeError, "max_tiles.*'2'"),
        ({"text": "<image>", "images": [A], "do_rescale": "no"}, ValueError, "do_rescale.*bool"),
    ],
)
def test_other_arguments_it_refuses(processor, arguments, error, match):
    with pytest.raises(error, match=match):
        processor(**arguments)


# ---- options of one call


PICTURE = picture(4, size=(50, 70))


@pytest.mark.parametrize(
    ("group", "options"),
    [
        ("images_kwargs", {"do_rescale": False}),
        ("images_kwargs", {"do_normalize": False, "size": {"height": 16, "width": 16}}),
        ("images_kwargs", {"image_mean": [0.1, 0.2, 0.3], "resample": 0}),
        ("text_kwargs", {"padding": "max_length", "max_length": 30}),
        ("text_kwargs", {"padding_side": "right", "return_length": True}),
        ("text_kwargs", {"truncation": True, "max_length": 17}),
        ("common_kwargs", {"return_tensors": "np"}),
        ("common_kwargs", {"padding": "max_length", "max_length": 30}),
        ("common_kwargs", {"padding_side": "right", "return_tensors": "np"}),
        ("common_kwargs", {"do_normalize": False}),
        ("common_kwargs", {"return_mm_token_type_ids": True}),
        ("common_kwargs", {"return_length": True}),
    ],
)
def test_an_option_acts_by_name_and_in_its_group(processor, group, options):
    call = {"images": [PICTURE, B], "text": ["<image> odd odd odd", "<image> odd"]}
    plain, named = processor(**call), processor(**call, **options)
    grouped = processor(**call, **{group: options})
    if group == "images_kwargs":
        pixels = processor.image_processor([PICTURE, B], return_tensors="pt", **options)
        assert torch.equal(named["pixel_values"], pixels["pixel_values"])
    assert named.keys() == grouped.keys()
    for name in ("input_ids", "pixel_values"):
        assert type(named[name]) is type(grouped[name])
        assert np.array_equal(named[name], grouped[name])
    assert str(named) != str(plain)


def test_common_options_come_after_all_others(processor):
    call = {"images": A, "text": "<image> odd", "padding": "max_length"}
    common = {"common_kwargs": {"padding": False, "max_length": 40}}
    assert processor(**call, **common)["input_ids"].shape == (1, 40)
    grouped = processor(**call, **common, text_kwargs={"max_length": 30})
    assert grouped["input_ids"].shape == (1, 30)
    assert processor(**call, common_kwargs=None, max_length=20)["input_ids"].shape == (1, 20)


def test_names_of_videos_and_audio_change_nothing(processor):
    plain = processor(images=A, text="<image> odd")
    others = processor(images=A, text="<image> odd", fps=2, sampling_rate=16_000)
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(plain[name], others[name])


def test_tensors_arrays_or_lists(processor):
    call = {"images": [A, B], "text": ["<image> odd", "<image> odd odd"]}
    tensors = processor(**call)
    arrays = processor(**call, return_tensors="np")
    lists = processor(**call, return_tensors=None, return_mm_token_type_ids=True)
    assert isinstance(arrays["pixel_values"], np.ndarray)
    assert isinstance(lists["pixel_values"], list)
    assert isinstance(lists["input_ids"][0], list)
    assert isinstance(lists["mm_token_type_ids"][0], list)
    for name in tensors:
        assert np.array_equal(tensors[name], arrays[name])
        assert np.array_equal(tensors[name], np.array(lists[name]))
    ragged = processor(**call, return_tensors=None, padding=False)["input_ids"]
    assert [len(row) for row in ragged] == [17, 18]


def test_images_alone(processor):
    inputs = processor(images=[A, B], num_image_tokens=[4, 9])
    assert set(inputs) == {"pixel_values", "num_image_tokens"}
    assert inputs["num_image_tokens"] == [4, 9]


def test_what_servers_ask_for(processor):
    marked = TokenFlexProcessor(
        processor.image_processor, processor.tokenizer, image_start="read ", image_end=" blank"
    )
    prompts = ["odd <image> odd read <image> blank", "<image>"]
    inputs = marked(
        images=[A, B, C],
        text=prompts,
        num_image_tokens=[1, 4, (1, 2)],
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
    )
    kinds = inputs["mm_token_type_ids"]
    assert torch.equal(kinds, (inputs["input_ids"] == IMAGE).long())
    expanded = []
    for prompt, offsets in zip(prompts, inputs["text_replacement_offsets"], strict=True):
        pieces, last = [], 0
        for one in offsets:
            assert one["type"] == "image"
            assert prompt[slice(*one["span"])] == one["text"]
            pieces += [prompt[last : one["span"][0]], one["replacement"]]
            last = one["span"][1]
            assert "".join(pieces)[slice(*one["new_span"])] == one["replacement"]
        expanded.append("".join([*pieces, prompt[last:]]))
    assert [text.count("<image>") for text in expanded] == [5, 2]
    again = marked.tokenizer(expanded, padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(inputs["input_ids"], again)
    assert marked.replace_image_token(inputs, 2) == "read <image><image> blank"
    tiled = {"num_image_tokens": [1, (1, 2), 1], "tiles_per_image": [2, 1]}
    assert marked.replace_image_token(tiled, 0) == "read <image><image><image> blank"
    assert marked.replace_image_token({"num_image_tokens": "auto"}, 1) == marked.image_prompt


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"images_kwargs": {"do_rescal": False}}, TypeError, "images_kwargs; did you mean do_resc"),
        ({"text_kwargs": {"paddin": False}}, TypeError, "text_kwargs; did you mean padding"),
        ({"common_kwargs": {"colour": 1}}, TypeError, "colour is no argument of common_kwargs"),
        ({"common_kwargs": {"text_pair": "odd"}}, ValueError, "text_pair cannot be given"),
        ({"common_kwargs": {"do_rescale": "no"}}, ValueError, "do_rescale.*bool"),
        ({"images_kwargs": 3}, TypeError, "images_kwargs must be a dict, got int"),
        ({"images_kwargs": {"num_image_tokens": 4}}, TypeError, "no argument of images_kwargs"),
        ({"do_rescale": False, "images_kwargs": {"do_rescale": True}}, ValueError, "two times"),
        ({"text_pair": "odd"}, ValueError, "text_pair cannot be given"),
        ({"text_kwargs": {"text_pair": "odd"}}, ValueError, "text_pair cannot be given"),
        ({"return_overflowing_tokens": True}, ValueError, "return_overflowing_tokens cannot"),
        ({"videos": [1]}, TypeError, r"videos\[0\] must be a video.*got int"),
        ({"budget": 16}, ValueError, "budget is for videos"),
        ({"data_format": "channels_last"}, ValueError, "data_format must be 'channels_first'"),
        ({"input_data_format": "rows"}, ValueError, "input_data_format.*'rows'"),
        (
            {"text_kwargs": {"return_tensors": "np"}, "images_kwargs": {"return_tensors": "pt"}},
            ValueError,
            "return_tensors must be the same",
        ),
    ],
)
def test_options_that_nobody_takes(processor, options, error, words):
    with pytest.raises(error, match=words):
        processor(images=A, text="<image> odd", **options)


def test_names_of_options_are_those_that_parts_declare_and_take():
    class Options(TypedDict):
        sharpness: float

    class Tokenizer:
        def __call__(self, text, boxes=None, **kwargs): ...

    processor = SimpleNamespace(
        valid_processor_kwargs=ProcessingKwargs,
        tokenizer=Tokenizer(),
        image_processor=SimpleNamespace(valid_kwargs=Options),
    )
    groups = known_options(processor)
    assert {"boxes", "padding", "split_special_tokens"} <= groups["text_kwargs"]
    assert not {"text", "self", "kwargs"} & groups["text_kwargs"]
    assert {"sharpness", "do_resize"} <= groups["images_kwargs"]
    assert groups.keys() == {"text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs"}


def test_options_of_other_modalities_have_nothing_to_act_on(processor):
    inputs = processor(images=A, text="<image> odd", num_frames=2, fps=None)
    assert set(inputs) == set(processor(images=A, text="<image> odd"))


def tokenizer_like(processor, **options):
    backend = Tokenizer.from_str(processor.tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


@pytest.mark.parametrize("saved", ["left", "right", None])
def test_prompts_are_padded_as_the_tokenizer_was_saved(tmp_path, processor, saved):
    options = {} if saved is None else {"padding_side": saved}
    made = TokenFlexProcessor(
        processor.image_processor, tokenizer_like(processor, **options), num_image_tokens=1
    )
    made.save_pretrained(tmp_path)
    for one in (made, TokenFlexProcessor.from_pretrained(tmp_path)):
        assert one.tokenizer.padding_side == (saved or "left")
        batch = one(images=[A, B], text=["<image>", "<image> odd"])
        padded = [[1, 0], [1, 1]] if saved == "right" else [[0, 1], [1, 1]]
        assert batch["attention_mask"].tolist() == padded
        other = one(images=[A, B], text=["<image>", "<image> odd"], padding_side="right")
        assert other["attention_mask"].tolist() == [[1, 0], [1, 1]]
        one.tokenizer.padding_side = "right"
        assert one(text=["odd", "odd odd"])["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_padding_of_a_call_is_not_saved(tmp_path, processor):
    made = TokenFlexProcessor(
        processor.image_processor, tokenizer_like(processor), num_image_tokens=1
    )
    made(text=["odd", "odd odd"], padding="max_length", max_length=2, padding_side="right")
    made(text=["odd", "odd odd"], truncation=True, max_length=1, padding_side="right")
    made.save_pretrained(tmp_path)
    loaded = TokenFlexProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.padding_side == "left"
    assert loaded(text=["odd", "odd odd odd"])["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_padding_that_the_tokenizer_was_saved_with(processor):
    tokenizer = tokenizer_like(processor, padding="max_length", max_length=9)
    made = TokenFlexProcessor(processor.image_processor, tokenizer, num_image_tokens=1)
    assert made(text="odd")["input_ids"].shape == (1, 9)
    assert made(text=["odd", "odd odd"], padding=True)["input_ids"].shape == (2, 2)


# ---- images in every form


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_floats_reach_the_image_processor_as_they_are(processor, dtype, as_tensor):
    floats = np.random.default_rng(0).random((3, PIXELS, PIXELS)).astype(dtype)
    image = torch.from_numpy(floats) if as_tensor else floats.transpose(1, 2, 0)
    options = {"do_rescale": False, "do_resize": False}
    batch = processor(images=[image, A], text="<image> <image>", **options)
    assert np.allclose(batch["pixel_values"][0], (floats - 0.5) / 0.5, atol=1e-6)
    assert float(batch["pixel_values"][1].max()) > 400  # of 0..255, neither rescaled
    rescaled = processor(images=image, text="<image>")["pixel_values"]
    assert np.allclose(rescaled[0], (floats - 0.5) / 0.5, atol=0.01)  # 0..1 is a picture's range


def test_layout_of_arrays_can_be_told(processor):
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 3), dtype=np.uint8)
    last = processor(images=image, text="<image>", input_data_format="channels_last")
    first = processor(images=image, text="<image>", input_data_format="channels_first")
    guessed = processor(images=image, text="<image>")
    assert torch.equal(last["pixel_values"], guessed["pixel_values"])
    told = processor(images=torch.from_numpy(image), text="<image>")
    assert torch.equal(first["pixel_values"], told["pixel_values"])


@pytest.mark.parametrize("shape", [(32, 32, 4), (5, 32, 32), (0, 32, 3)])
def test_floats_of_other_shapes_are_refused(processor, shape):
    with pytest.raises(ValueError, match=r"images must have 1 or 3 channels.*got shape"):
        processor(images=np.zeros(shape, np.float32), text="<image>", do_rescale=False)


@pytest.mark.parametrize("convert", [np.asarray, lambda image: torch.tensor(np.asarray(image))])
def test_images_come_as_one_array_or_as_files(processor, tmp_path, convert):
    expected = processor(images=[A, B], text="<image> <image>")["pixel_values"]
    batch = convert(np.stack([np.asarray(A), np.asarray(B)]))
    for images in (batch, [batch], [convert(A), convert(B)]):
        got = processor(images=images, text="<image> <image>")["pixel_values"]
        assert torch.equal(got, expected)
    for name, image in (("a.png", A), ("b.png", B)):
        image.save(tmp_path / name)
    files = [tmp_path / "a.png", str(tmp_path / "b.png")]
    for images in (files, [files], [files[0].read_bytes(), B]):
        got = processor(images=images, text="<image> <image>")["pixel_values"]
        assert torch.equal(got, expected)


@pytest.mark.parametrize("image", ["A" * 4000, b"1" * 4000, "data:image/png;base64," + "A" * 4000])
def test_a_refusal_never_prints_the_payload(processor, image):
    with pytest.raises(ValueError, match=r"images\[1\]\[0\] cannot be read") as error:
        processor(images=[[A], [image]], text=["<image>", "<image>"])
    assert len(str(error.value)) < 200


# ---- what must be refused of a constructor


@pytest.mark.parametrize("counts", [[4, 9], [4], []])
def test_a_list_is_no_default_count(processor, counts):
    with pytest.raises(TypeError, match="num_image_tokens must be one count for all images"):
        TokenFlexProcessor(processor.image_processor, processor.tokenizer, num_image_tokens=counts)


@pytest.mark.parametrize("count", [[4, 9], [4], [], "auto", "16", 10, (4,), (0, 4), 4.0, None])
def test_the_count_of_a_processor_is_checked_when_it_is_changed(count):
    processor = digits_processor(num_image_tokens=4)
    with pytest.raises((TypeError, ValueError)) as refused:
        processor.num_image_tokens = count
    with pytest.raises((TypeError, ValueError)) as refused_at_first:
        TokenFlexProcessor(processor.image_processor, processor.tokenizer, num_image_tokens=count)
    assert str(refused.value) == str(refused_at_first.value)
    assert "num_image_tokens must" in str(refused.value)
    assert processor.num_image_tokens == 4


@pytest.mark.parametrize("count", [9, (2, 3)])
def test_a_count_that_was_changed_is_used_and_saved(tmp_path, count):
    processor = digits_processor(num_image_tokens=4)
    processor.num_image_tokens = count
    assert processor(images=A, text="<image> odd")["num_image_tokens"] == [count]
    processor.save_pretrained(tmp_path)
    assert TokenFlexProcessor.from_pretrained(tmp_path).num_image_tokens == count


def test_a_list_is_no_default_count_of_a_saved_processor(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="one count for all images"):
        TokenFlexProcessor.from_pretrained(tmp_path, num_image_tokens=[4, 9])
    loaded = TokenFlexProcessor.from_pretrained(tmp_path, num_image_tokens=(4, 9))
    assert loaded.num_image_tokens == (4, 9)


def test_a_misspelt_argument_of_the_constructor(processor):
    with pytest.raises(TypeError, match="max_tile"):
        TokenFlexProcessor(processor.image_processor, processor.tokenizer, max_tile=4)


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


@pytest.mark.parametrize("part", [{"type": "audio"}, "words", {}])
def test_parts_that_are_neither_text_nor_image(processor, part):
    with pytest.raises(ValueError, match="content must have parts of type text, image and video"):
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
