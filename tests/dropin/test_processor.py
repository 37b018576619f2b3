"""A converted processor: as many placeholders as asked for, through each family's own code."""

from __future__ import annotations

import base64
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import pipeline

from tests.dropin.configs import CONFIGS
from tests.dropin.processors import image_text, picture, stock_processor
from tests.dropin.table import IMAGE
from tests.dropin.test_model import TOLERANCE, logits
from tests.dropin.tiny import stock_model
from tokenflex import TokenCounts, replace_projector, restore_projector
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import flat_grids
from tokenflex.dropin.inputs import check_option_names
from tokenflex.images import load_image


@pytest.fixture
def name(processor_name: str) -> str:
    return processor_name


def pair(name: str):
    processor = stock_processor(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = replace_projector(stock_model(name), processor, num_image_tokens=16)
    return model, processor


def prompts(name: str) -> tuple[list, list[str]]:
    """One image in the first prompt, two of other shapes in the second."""
    image = image_text(name)
    first, second, third = picture(1), picture(2, 60, 130), picture(3, 130, 70)
    if name == "got_ocr2":  # one image a prompt, and no lists of lists
        return [first, second, third], [f"{image} what", f"a {image}", f"{image} is a cat"]
    return [[first], [second, third]], [f"{image} what is this", f"a {image} is {image} a cat"]


def call(processor, images, text, **options):
    return processor(
        images=images, text=text, padding=True, padding_side="left", return_tensors="pt", **options
    )


def test_counts_reach_the_model(name):
    """Placeholders, counts and features agree, in one batch as prompt by prompt."""
    model, processor = pair(name)
    images, text = prompts(name)
    inputs = call(processor, images, text, num_image_tokens=[9, 25, 4])
    assert int((inputs["input_ids"] == IMAGE).sum()) == sum(inputs["num_image_tokens"])
    assert [count for count, _ in groupby(inputs["num_image_tokens"])] == [9, 25, 4]
    together = logits(model, inputs)
    for i, counts in enumerate([[9], [25], [4]] if name == "got_ocr2" else [[9], [25, 4]]):
        inputs_alone = call(processor, [images[i]], [text[i]], num_image_tokens=counts)
        alone = logits(model, inputs_alone)[0]
        assert float((together[i, -len(alone) :] - alone).abs().max()) < TOLERANCE
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    assert model.generate(**inputs, **options).shape[1] == inputs["input_ids"].shape[1] + 2


def test_one_count_for_all_and_the_default(name):
    _, processor = pair(name)
    images, text = prompts(name)
    one = call(processor, images, text, num_image_tokens=9)
    assert set(one["num_image_tokens"]) == {9}
    default = call(processor, images, text)
    assert set(default["num_image_tokens"]) == {16}
    grid = call(processor, images[:1], text[:1], num_image_tokens=(2, 3))
    assert set(grid["num_image_tokens"]) == {(2, 3)}
    tiles = len(grid["num_image_tokens"])
    assert int((grid["input_ids"] == IMAGE).sum()) == 6 * tiles


def test_chat_template(name):
    if name == "got_ocr2":
        pytest.skip("its stock processor takes no chats with images")
    model, processor = pair(name)
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is this"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_image_tokens": 4},
    )
    assert set(inputs["num_image_tokens"]) == {4}
    assert int((inputs["input_ids"] == IMAGE).sum()) == 4 * len(inputs["num_image_tokens"])
    assert logits(model, inputs).shape[:2] == inputs["input_ids"].shape


def chat(image, *more):
    """A question about one image, or several, that ends in a text."""
    *images, question = (image, *more)
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


INPUTS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.mark.parametrize("nested", [False, True])
def test_options_of_a_chat_are_those_of_a_call(nested):
    _, processor = pair("llava")
    options = {
        **{"num_image_tokens": [4, 9, 25], "padding": True, "padding_side": "left"},
        **{"do_normalize": False},
    }
    chats = [chat(picture(1), "what"), chat(picture(2), picture(3), "is")]
    inputs = processor.apply_chat_template(
        chats, **INPUTS, **({"processor_kwargs": options} if nested else options)
    )
    assert inputs["num_image_tokens"] == [4, 9, 25]
    expected = processor(
        images=[[picture(1)], [picture(2), picture(3)]],
        text=processor.apply_chat_template(chats),
        return_tensors="pt",
        **options,
    )
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(inputs[name], expected[name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_image_tokens": 4}, "num_image_tokens must be given with tokenize=True"),
        (
            {**INPUTS, "num_image_tokens": 4, "processor_kwargs": {"num_image_tokens": 9}},
            "num_image_tokens must be given once",
        ),
        ({**INPUTS, "processor_kwargs": {"images": [picture(1)]}}, "holds one"),
    ],
)
def test_options_without_effect_are_refused(options, words):
    _, processor = pair("llava")
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(chat(picture(1), "what"), **options)


def test_placeholders_in_texts_are_refused(name):
    _, processor = pair(name)
    for mark in ("<image>", processor._tokenflex.image_token, image_text(name)):
        with pytest.raises(ValueError, match=r"messages\[0\]\.content\[1\] holds"):
            processor.apply_chat_template(chat(picture(1), f"what is {mark}"))


def test_pictures_have_one_reading(tmp_path):
    """Transparent, turned and 16-bit pictures, in every form that holds one."""
    _, processor = pair("llava")
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 1000, (64, 1))
    clear = np.zeros((64, 64, 4), np.uint8)
    clear[16:32, 16:48, 3] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    for image, options in (
        (Image.fromarray(ramp), {}),
        (Image.fromarray(clear), {}),
        (picture(1), {"exif": exif}),
    ):
        image.save(tmp_path / "a.png", **options)
        upright = load_image(tmp_path / "a.png")
        content = (tmp_path / "a.png").read_bytes()
        expected = call(processor, [upright], ["<image> what"])["pixel_values"]
        assert float(expected.std()) > 0.1
        encoded = base64.b64encode(content).decode()
        forms = [tmp_path / "a.png", str(tmp_path / "a.png"), content, encoded]
        forms.append("data:image/png;base64," + encoded)
        with Image.open(tmp_path / "a.png") as file:
            for form in [*forms, file]:
                inputs = call(processor, [form], ["<image> what"])
                assert torch.equal(inputs["pixel_values"], expected)
                inputs = processor.apply_chat_template(chat(form, "what"), **INPUTS)
                assert torch.equal(inputs["pixel_values"], expected)


def test_floats_stay_as_they_are_where_they_are_not_rescaled():
    _, processor = pair("llava")
    floats = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32) * 3 - 1
    options = {"do_rescale": False, "do_resize": False, "do_normalize": False}
    first = floats.transpose(2, 0, 1)
    for image, layout in ((floats, {}), (first, {"input_data_format": "channels_first"})):
        inputs = call(processor, [image], ["<image> what"], **options, **layout)
        assert np.array_equal(inputs["pixel_values"][0], first)


@pytest.mark.parametrize("image", ["A" * 4000, b"1" * 4000])
def test_a_refusal_names_the_part_and_prints_no_payload(image):
    _, processor = pair("llava")
    with pytest.raises(ValueError, match=r"^messages\[0\]\.content\[0\] cannot be read") as error:
        processor.apply_chat_template(chat(image, "what"), **INPUTS)
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match=r"^images\[0\] cannot be read"):
        call(processor, [image], ["<image> what"])


def test_pipeline_answers_chats_in_batches_as_one_by_one():
    model, processor = pair("llava")
    processor.tokenizer.padding_side = "left"
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [chat(picture(1), "what"), chat(picture(2), picture(3), "is this a cat")]
    options = {
        "processor_kwargs": {"num_image_tokens": 9},
        "generate_kwargs": {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0},
    }
    alone = [ask(one, **options)[0]["generated_text"][-1] for one in chats]
    together = ask(chats, batch_size=2, **options)
    assert [answer[0]["generated_text"][-1] for answer in together] == alone


def test_text_alone(name):
    _, processor = pair(name)
    if name in ("paligemma", "got_ocr2"):
        pytest.skip("its stock processor wants images")
    inputs = processor(text=["what is this"], return_tensors="pt")
    assert "num_image_tokens" not in inputs


@pytest.mark.parametrize("counts", [None, 9, (2, 3), [9, (2, 3), 4]], ids=str)
def test_numbers_of_tokens_are_those_of_a_call(name, counts):
    _, processor = pair(name)
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        pytest.skip("its stock processor tells no numbers")
    if name == "llava-siglip":
        pytest.skip("its stock processor wants the crop size of a CLIP image processor")
    pictures = [picture(1), picture(2, 60, 130), picture(3, 130, 70)]
    of_each = counts if isinstance(counts, list) else [counts] * 3
    calls = [
        call(processor, image, image_text(name), num_image_tokens=count)
        for image, count in zip(pictures, of_each, strict=True)
    ]
    sizes = [image.size[::-1] for image in pictures]
    # A tokenizer's option has no influence, as in the stock processors.
    options = {"num_image_tokens": counts, "truncation": True, "max_length": 3}
    data = processor._get_num_multimodal_tokens(image_sizes=sizes, **options)
    assert data.num_image_tokens == [int((one["input_ids"] == IMAGE).sum()) for one in calls]
    stock = stock_processor(name)._get_num_multimodal_tokens(image_sizes=sizes)
    assert data.num_image_patches == stock.num_image_patches


def test_numbers_of_tokens_that_cannot_be_known_are_refused():
    _, processor = pair("llava")
    numbers = processor._get_num_multimodal_tokens
    assert numbers().num_image_tokens is None
    with pytest.raises(ValueError, match="num_image_tokens must have one entry per image"):
        numbers([(64, 64)], num_image_tokens=[4, 9])
    with pytest.raises(ValueError, match="nearest squares are 9 and 16"):
        numbers([(64, 64)], num_image_tokens=10)
    processor.image_token_counts = TokenCounts((4, 9), (1, 1))
    with pytest.raises(ValueError, match="draws a count for each prompt"):
        numbers([(64, 64)])
    assert numbers([(64, 64)], num_image_tokens=9).num_image_tokens == [9]
    _, processor = pair("ernie4_5_vl_moe")
    with pytest.raises(NotImplementedError, match="takes no videos"):
        processor._get_num_multimodal_tokens(None, [(2, 64, 64)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_images_tokens": 9}, "did you mean num_image_tokens"),
        ({"max_tiles": 3}, "max_tiles is no argument of the processor"),
        ({"do_resiez": False}, "did you mean do_resize"),
        ({"images_kwargs": {"do_resiez": False}}, "no argument of images_kwargs; did you mean do_"),
        ({"text_kwargs": {"paddin": True}}, "no argument of text_kwargs; did you mean padding"),
        ({"common_kwargs": {"return_tensor": "pt"}}, "did you mean return_tensors"),
    ],
)
def test_misspelt_options_are_refused(options, words):
    _, processor = pair("llava")
    with pytest.raises(TypeError, match=words):
        processor(images=picture(1), text="<image>", **options)
    messages = chat(picture(1), "what")
    for given in (options, {"processor_kwargs": options}):
        with pytest.raises(TypeError, match=words):
            processor.apply_chat_template(messages, **INPUTS, **given)
        with pytest.raises(TypeError, match=words):
            processor.apply_chat_template(messages, **given)
    with pytest.raises(TypeError, match=words):
        processor._get_num_multimodal_tokens([(64, 64)], **options)


def test_what_the_stock_processor_takes_is_not_refused(name):
    _, processor = pair(name)
    groups = processor.valid_processor_kwargs.__annotations__
    images = {*groups["images_kwargs"].__annotations__}
    images |= {*processor.image_processor.valid_kwargs.__annotations__}
    text = {*groups["text_kwargs"].__annotations__}
    check_option_names(processor, dict.fromkeys({*groups, *images, *text}))
    check_option_names(processor, {"images_kwargs": dict.fromkeys(images)})
    check_option_names(processor, {"text_kwargs": dict.fromkeys({*text, "text_pair"})})
    images, prompt = prompts(name)
    flags = {"return_mm_token_type_ids": True}
    for options in (flags, {"text_kwargs": flags}, {"return_metadata": True}):
        assert call(processor, images, prompt, **options)["num_image_tokens"]


def test_what_templates_take_is_not_refused():
    _, processor = pair("llava")
    messages = chat(picture(1), "what")
    plain = processor.apply_chat_template(messages)
    # transformers hands these to templates that do not take them, too.
    for variables in ({"reasoning_effort": "low"}, {"bos_token": "<s>"}):
        assert processor.apply_chat_template(messages, **variables) == plain
    processor.chat_template = "{{ tone }} " + processor.chat_template
    told = processor.apply_chat_template(messages, tone="softly")
    assert told == f"softly {plain}"


def test_counts_that_do_not_fit_the_images_are_refused(name):
    _, processor = pair(name)
    images, text = prompts(name)
    for counts in ([9], [9, 25, 4, 4]):
        with pytest.raises(ValueError, match=f"got {len(counts)} entries"):
            call(processor, images, text, num_image_tokens=counts)
    with pytest.raises(ValueError, match="nearest squares are 9 and 16"):
        call(processor, images, text, num_image_tokens=10)
    # and the processor is as good as before
    assert call(processor, images, text, num_image_tokens=9)["num_image_tokens"]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_counts_may_be_an_array(kind):
    _, processor = pair("llava")
    inputs = call(processor, *prompts("llava"), num_image_tokens=kind([9, 25, 4]))
    assert inputs["num_image_tokens"] == [9, 25, 4]
    assert {type(count) for count in inputs["num_image_tokens"]} == {int}


@pytest.mark.parametrize("counts", [np.array(9), torch.tensor(9), "9", 9.0, {9}])
def test_counts_that_are_none_are_refused(counts):
    _, processor = pair("llava")
    with pytest.raises(TypeError, match=r"num_image_tokens must be .*int.* for all|per image"):
        call(processor, *prompts("llava"), num_image_tokens=counts)


def test_truncation_may_not_cut_an_image(name):
    _, processor = pair(name)
    images, text = prompts(name)
    # transformers' own check comes first in some families; Idefics3's stumbles over the cut.
    error = TypeError if name == "idefics3" else ValueError
    with pytest.raises(error, match=r"[Tt]oken|Mismatch|NoneType"):
        call(processor, images[:1], text[:1], num_image_tokens=64, truncation=True, max_length=20)


def test_restored_processor_is_the_stock_one(name):
    model, processor = pair(name)
    restore_projector(model, processor)
    stock = stock_processor(name)
    assert type(processor) is type(stock)
    images, text = prompts(name)
    restored, expected = call(processor, images, text), call(stock, images, text)
    assert torch.equal(restored["input_ids"], expected["input_ids"])
    assert restored.keys() == expected.keys()


def test_saved_processor_is_the_stock_one(name, tmp_path):
    _, processor = pair(name)
    expected = stock_processor(name)
    assert sorted(processor.to_dict()) == sorted(expected.to_dict())
    assert processor.to_dict()["processor_class"] == type(expected).__name__


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"]
)
def test_copies_take_counts_too(duplicate):
    _, processor = pair("llava")
    images, text = prompts("llava")
    twin = duplicate(processor)
    inputs = call(twin, images, text, num_image_tokens=[4, 9, 16])
    assert inputs["num_image_tokens"] == [4, 9, 16]


def test_threads_may_share_a_processor():
    """Each call waits, half-way, until the other one is as far."""
    _, processor = pair("llava")
    images, text = prompts("llava")
    both = threading.Barrier(2, timeout=20)
    stock_images = type(processor.image_processor).__call__

    class Waiting(type(processor.image_processor)):
        def __call__(self, *args, **kwargs):
            both.wait()
            inputs = stock_images(self, *args, **kwargs)
            both.wait()
            return inputs

    processor.image_processor.__class__ = Waiting

    def counts_of(counts):
        inputs = call(processor, images, text, num_image_tokens=counts)
        return inputs["num_image_tokens"], int((inputs["input_ids"] == IMAGE).sum())

    asked = [[4, 9, 16], 25]
    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(counts_of, asked)] == [([4, 9, 16], 29), ([25] * 3, 75)]


def test_counts_are_drawn_per_prompt():
    _, processor = pair("llava")
    images, text = prompts("llava")
    processor.image_token_counts = TokenCounts((4, 9, 16), (1, 1, 1), seed=3)
    batches = [call(processor, images, text)["num_image_tokens"] for _ in range(30)]
    assert all(second == third for _, second, third in batches)
    assert {first for first, *_ in batches} == {4, 9, 16}
    assert any(first != second for first, second, _ in batches)
    again = pair("llava")[1]
    again.image_token_counts = TokenCounts((4, 9, 16), (1, 1, 1), seed=3)
    assert [call(again, images, text)["num_image_tokens"] for _ in range(30)] == batches
    assert call(processor, images, text, num_image_tokens=25)["num_image_tokens"] == [25] * 3


def test_workers_draw_different_counts():
    _, processor = pair("llava")
    images, text = prompts("llava")
    processor.image_token_counts = TokenCounts((4, 9, 16), (1, 1, 1))
    loader = torch.utils.data.DataLoader(
        [0] * 24,
        batch_size=1,
        num_workers=2,
        collate_fn=lambda _: call(processor, images[:1], text[:1])["num_image_tokens"][0],
        multiprocessing_context="fork",
    )
    epochs = [list(loader) for _ in range(2)]
    assert epochs[0][::2] != epochs[0][1::2]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("counts", [10, 0, "9", [9], [2, 3]])
def test_default_count_must_be_a_count(counts):
    _, processor = pair("llava")
    with pytest.raises((TypeError, ValueError), match="image_token_counts"):
        processor.image_token_counts = counts


@pytest.mark.parametrize("options", [{"multi_page": True}, {"images_kwargs": {"multi_page": True}}])
def test_pages_of_one_prompt_are_refused(options):
    _, processor = pair("got_ocr2")
    with pytest.raises(ValueError, match=r"multi_page.*one image per prompt"):
        call(processor, [[picture(1), picture(2)]], ["<imgpad> what"], **options)


def test_videos_of_a_family_without_them_are_refused():
    _, processor = pair("llava")
    with pytest.raises(NotImplementedError, match=r"its stock processor takes none.*frames"):
        processor(text=["a"], videos=[picture(1)])


def test_processor_without_the_placeholder_is_refused():
    processor = stock_processor("llava")
    model = stock_model("llava")
    model.config.image_token_id = 5000
    with pytest.raises(ValueError, match="5000"):
        replace_projector(model, processor)
    assert not hasattr(model.config, "tokenflex")


def test_something_else_than_a_processor_is_refused():
    with pytest.raises(TypeError, match="CLIPImageProcessor"):
        replace_projector(stock_model("llava"), stock_processor("llava").image_processor)


def test_internvl_of_its_own_geometry_has_256_or_64_tokens_of_each_tile():
    """448 x 448 pixels a tile, patches of 14, 2 x 2 of them a token: InternVL's published sizes."""
    side = {"height": 448, "width": 448}
    processor = stock_processor("internvl")
    processor.image_seq_length = 256
    processor.image_processor.size = processor.image_processor.size.__class__(**side)
    config = CONFIGS["internvl"]()
    config.image_seq_length = 256
    config.vision_config.image_size, config.vision_config.patch_size = [448] * 2, [14] * 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.InternVLForConditionalGeneration(config).eval()
    image, text = picture(1, 448, 896), f"{image_text('internvl')} what"
    stock = call(processor, [[image]], [text])
    assert int((stock["input_ids"] == IMAGE).sum()) == 3 * 256  # two tiles and a thumbnail
    pixels, internvl = stock["pixel_values"], family_of(model.config)
    replace_projector(model, processor, images=[image, picture(2, 896, 448)])
    assert model.fitted_num_image_tokens == [64, 256]
    with torch.no_grad():
        cells, grids = flat_grids(internvl.patch_grids(model.base_model, pixels), merge=2)
        assert grids == [(16, 16)] * 3
        pooled = cells.unflatten(0, (3, 8, 2, 8, 2)).mean((2, 4)).flatten(0, 2)
        for count, rows in ((256, cells), (64, pooled)):
            inputs = call(processor, [[image]], [text], num_image_tokens=count)
            if count == 256:
                assert torch.equal(inputs["input_ids"], stock["input_ids"])
            assert inputs["num_image_tokens"] == [count] * 3
            assert int((inputs["input_ids"] == IMAGE).sum()) == 3 * count
            tokens = model.get_image_features(pixels, num_image_tokens=count).pooler_output
            projector = model.base_model.multi_modal_projector
            expected = projector(rows, 1, grids=[(1, 1)] * len(rows)).squeeze(1)
            torch.testing.assert_close(torch.cat(tokens), expected, atol=1e-4, rtol=1e-4)
