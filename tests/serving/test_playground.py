"""The playground's answers: those of separate calls, with one pass of the encoder for all."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

from tests.dropin.processors import NEED_TORCHVISION, PROCESSORS, stock_processor
from tests.dropin.processors import picture as stock_picture
from tests.dropin.tiny import one_of_each_kind, stock_model
from tests.models.test_modeling import CallCounter
from tests.models.test_tiling import tiling_processor
from tests.models.tiny import picture, tiny_model
from tests.routing.planted import FixedRouter
from tokenflex.checkpoints import load_model
from tokenflex.digits.processor import digits_processor
from tokenflex.dropin.families import vision_encoder
from tokenflex.dropin.replace import replace_projector
from tokenflex.models.loading import load_checkpoint
from tokenflex.routing.storage import attach_router
from tokenflex.serving.playground.asking import ask_at_counts
from tokenflex.serving.playground.reports import draw_accuracy, find_report
from tokenflex.serving.playground.subjects import seen_picture, subject_of
from tokenflex.training.checkpoint import save_model

DOCS = Path(__file__).parents[2] / "docs/serving"
COUNTS = (4, (2, 3), 16)
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def converted(name: str) -> tuple:
    model, processor = stock_model(name), stock_processor(name)
    replace_projector(model, processor, num_image_tokens=4)
    return model, processor


# ---- TokenFLEX models


def test_answers_are_those_of_separate_calls_and_the_encoder_runs_once():
    model, processor = tiny_model(), digits_processor()
    expected, certainties = [], []
    for count in COUNTS:
        inputs = processor(images=picture(1), text="<image>odd ", num_image_tokens=count)
        length = inputs["input_ids"].shape[1]
        whole = model.generate(**inputs, **GREEDY)
        expected.append(processor.tokenizer.decode(whole[0, length:], skip_special_tokens=True))
        with torch.no_grad():  # the logits of the whole text, read at once
            logits = model(**{**inputs, "input_ids": whole, "attention_mask": None}).logits
        given = logits[0, length - 1 : -1].softmax(-1).gather(1, whole[0, length:, None])
        certainties.append(float(given.min()))
    encoder = CallCounter(model.model.vision_model)
    answers = [*ask_at_counts(model, processor, picture(1), "odd", COUNTS, max_new_tokens=4)]
    assert encoder.calls == 1
    assert [answer.text for answer in answers] == [text.strip() for text in expected]
    assert [answer.certainty for answer in answers] == pytest.approx(certainties, rel=1e-4)
    assert len({*certainties}) == 3
    assert [answer.vision_tokens for answer in answers] == [4, 6, 16]
    assert [answer.name for answer in answers] == ["4", "2 x 3", "16"]


def test_a_clip_is_asked_as_its_frames(tmp_path):
    model, processor = tiny_model(), digits_processor()
    frames = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(4)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    inputs = processor(text="<video>odd ", videos=path, num_image_tokens=9)
    expected = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    for clip in (path, path.read_bytes(), frames):
        (answer,) = ask_at_counts(model, processor, clip, "odd", (9,), max_new_tokens=4)
        text = processor.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.text == text.strip()
        assert (answer.tiles, answer.vision_tokens) == (4, 36)
        assert [panel.tiles for panel in answer.panels] == [(1, 1)] * 4
        seen = [panel.picture.tobytes() for panel in answer.panels]
        assert seen == [frame.tobytes() for frame in frames]
    attach_router(model, FixedRouter([0, 0.9, 0.6]))
    with pytest.raises(ValueError, match="must be numbers or grids for a clip, got 'auto'"):
        list(ask_at_counts(model, processor, path, "odd", ("auto",)))
    # Of a still file in the same format nothing changes.
    frames[3].save(path)
    (still,) = ask_at_counts(model, processor, path, "odd", (9,), max_new_tokens=4)
    (picture_,) = ask_at_counts(model, processor, frames[3], "odd", (9,), max_new_tokens=4)
    assert (still.text, still.vision_tokens) == (picture_.text, 9)


def test_times_are_those_of_a_call_at_this_count_alone(monkeypatch):
    model, processor = tiny_model(), digits_processor()
    monkeypatch.setattr(model.generation_config, "eos_token_id", -1)  # never: four tokens
    encode, decode = model.model.vision_model.forward, model.model.language_model.forward

    def slow_encode(*args, **kwargs):
        time.sleep(0.15)
        return encode(*args, **kwargs)

    def slow_decode(*args, **kwargs):
        time.sleep(0.1 if kwargs["inputs_embeds"].shape[1] > 1 else 0.05)
        return decode(*args, **kwargs)

    model.model.vision_model.forward = slow_encode
    model.model.language_model.forward = slow_decode
    for answer in ask_at_counts(model, processor, picture(1), "odd", (4, 9), max_new_tokens=4):
        assert answer.encoder_seconds >= 0.15
        assert answer.first_token_seconds >= answer.encoder_seconds + 0.1
        assert answer.seconds >= answer.first_token_seconds + 0.15


def test_the_choice_of_a_count_is_part_of_its_time(monkeypatch):
    model, processor = tiny_model(), digits_processor()
    attach_router(model, FixedRouter([0, 0.9, 0.6]))
    choose = model.choose_counts

    def slow_choice(**inputs):
        time.sleep(0.15)
        return choose(**inputs)

    monkeypatch.setattr(model, "choose_counts", slow_choice)
    (auto,) = ask_at_counts(model, processor, picture(1), "odd", ("auto",), max_new_tokens=1)
    assert auto.seconds >= auto.first_token_seconds >= auto.encoder_seconds + 0.15


def test_counts_that_were_never_trained_are_marked():
    ask = digits_processor(), picture(1), "odd", (4, (2, 3), 9)
    trained = tiny_model(trained_num_image_tokens=[4, [2, 3]])
    answers = [*ask_at_counts(trained, *ask, max_new_tokens=1)]
    assert [answer.is_trained for answer in answers] == [True, True, False]
    unknown = [*ask_at_counts(tiny_model(), *ask, max_new_tokens=1)]
    assert [answer.is_trained for answer in unknown] == [None] * 3


def test_auto_answers_what_its_count_does():
    model, processor = tiny_model(), digits_processor()
    assert not subject_of(model, processor).has_auto
    attach_router(model, FixedRouter([0, 0.9, 0.6]))
    assert subject_of(model, processor).has_auto
    encoder = CallCounter(model.model.vision_model)
    nine, auto = ask_at_counts(model, processor, picture(1), "odd", (9, "auto"), max_new_tokens=4)
    assert encoder.calls == 1
    assert (auto.count, auto.name, auto.vision_tokens) == (9, "auto: 9", 9)
    assert (auto.text, auto.certainty) == (nine.text, pytest.approx(nine.certainty))


def test_all_tiles_of_a_picture_are_panels_and_the_thumbnail_is_another():
    model, processor = tiny_model(), tiling_processor(6, use_thumbnail=True)
    wide = picture(1, (64, 96))
    encoder = CallCounter(model.model.vision_model)
    few, many = ask_at_counts(model, processor, wide, "odd", (1, 4), max_new_tokens=2)
    assert encoder.calls == 1
    assert (few.tiles, few.vision_tokens, many.vision_tokens) == (7, 7, 28)
    tiles, thumbnail = many.panels
    assert (tiles.tiles, tiles.patches) == ((2, 3), (8, 8))
    assert (thumbnail.tiles, thumbnail.patches) == ((1, 1), (8, 8))
    assert tiles.picture.size == thumbnail.picture.size == (96, 64)
    (uncut,) = ask_at_counts(model, processor, wide, "odd", (4,), max_new_tokens=2, max_tiles=1)
    assert uncut.tiles == len(uncut.panels) == 1


def test_a_picture_is_read_as_everywhere_else(tmp_path):
    """Turned as its EXIF says: the bytes of the file answer what the upright picture does."""
    upright = picture(1, (32, 64))
    exif = Image.Exif()
    exif[274] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    model, processor = tiny_model(), digits_processor()
    (of_file,) = ask_at_counts(model, processor, tmp_path / "turned.png", "odd", (9,))
    (of_picture,) = ask_at_counts(model, processor, upright, "odd", (9,))
    assert of_file.panels[0].picture.size == (64, 32)
    assert of_file.certainty == of_picture.certainty


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"picture": None}, ValueError, "picture must be given, got none"),
        ({"picture": b"no picture"}, ValueError, "Pillow finds no picture in it"),
        ({"question": " \n"}, ValueError, "question must have words, got an empty text"),
        ({"question": "<image> and <image>"}, ValueError, "2"),
        ({"counts": ()}, ValueError, "counts must name one count or more, got none"),
        ({"counts": (5,)}, ValueError, "counts must be a perfect square .* got 5"),
        ({"counts": (0,)}, ValueError, "counts must be at least 1, got 0"),
        ({"counts": (400,)}, ValueError, "256 positions, got 400"),
        ({"counts": ("auto",)}, FileNotFoundError, "no router"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(changes, error, message):
    arguments = {"picture": picture(1), "question": "odd", "counts": (4,), **changes}
    with pytest.raises(error, match=message):
        list(ask_at_counts(tiny_model(), digits_processor(), **arguments))


def test_a_model_without_a_token_adaptive_projector_is_refused():
    with pytest.raises(TypeError, match=r"token-adaptive projector .* got LlavaForCond"):
        subject_of(stock_model("llava"), stock_processor("llava"))


# ---- converted stock models


@pytest.mark.parametrize("name", one_of_each_kind(["llava", *PROCESSORS]))
def test_a_converted_model_answers_what_separate_calls_do_and_encodes_once(name):
    if name in NEED_TORCHVISION and not is_torchvision_available():
        pytest.skip("transformers has its image processor only with torchvision")
    model, processor = converted(name)
    options = {**GREEDY, "eos_token_id": processor.tokenizer.eos_token_id}
    image, counts = stock_picture(1, 96, 64), (4, 9, (2, 3))
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is"}]}],
        add_generation_prompt=True,
    )
    expected = []
    for count in counts:
        inputs = processor(
            images=[image], text=[prompt], num_image_tokens=count, return_tensors="pt"
        )
        whole = model.generate(**inputs, **options)
        new = whole[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    encoder = CallCounter(vision_encoder(model.base_model))
    asked = ask_at_counts(model, processor, image, "what is", counts, max_new_tokens=4)
    answers = [*asked]
    assert encoder.calls == 1
    assert [answer.text for answer in answers] == expected
    assert all(answer.is_trained is None and 0 < answer.certainty <= 1 for answer in answers)
    tiles = sum(panel.tiles[0] * panel.tiles[1] for panel in answers[0].panels)
    assert answers[0].tiles == tiles


def test_the_pixels_that_an_encoder_sees_are_drawn():
    """CLIP's processor cuts off the edges of a picture that is not square."""
    model, processor = converted("llava")
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste("lime", (32, 0, 96, 64))
    (answer,) = ask_at_counts(model, processor, wide, "what is", (4,), max_new_tokens=1)
    (panel,) = answer.panels
    assert panel.picture.size == (64, 64)
    assert panel.picture.getcolors() == [(64 * 64, (0, 255, 0))]


def test_normalised_pixels_become_the_picture_again():
    processor = digits_processor().image_processor
    pixels = processor([picture(1)], return_tensors="pt")["pixel_values"][0]
    assert seen_picture(pixels, processor).tobytes() == picture(1).tobytes()


def test_max_tiles_is_refused_for_a_converted_model():
    model, processor = converted("llava")
    with pytest.raises(ValueError, match="max_tiles is for TokenFLEX models, got 2"):
        list(ask_at_counts(model, processor, picture(1), "is", (4,), max_tiles=2))


# ---- documentation and folders


def test_the_documentation_s_python_runs_and_its_links_lead_somewhere(tmp_path):
    page = (DOCS / "playground.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    save_model(tmp_path, tiny_model(), digits_processor())
    names = {"folder": tmp_path, "picture": picture(1)}
    exec(compile(snippet, "playground.md", "exec"), names)
    assert names["answer"].count == 16
    assert names["drawn"].size == (480, 480)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page):
        assert (DOCS / target).exists()


def test_checkpoints_and_conversions_are_loaded_and_stock_models_refused(tmp_path):
    save_model(tmp_path / "own", tiny_model(), digits_processor())
    model, processor = load_model(tmp_path / "own")
    expected, _ = load_checkpoint(tmp_path / "own")
    assert type(model) is type(expected)
    assert processor.num_image_tokens == 16

    for part in converted("llava"):
        part.save_pretrained(tmp_path / "converted")
    model, processor = load_model(tmp_path / "converted")
    assert not model.training
    assert subject_of(model, processor).offered_counts == [1, 4]

    stock_model("llava").save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"holds a stock llava: convert it first"):
        load_model(tmp_path / "stock")
    with pytest.raises(FileNotFoundError, match=r"checkpoint folder .* does not exist"):
        load_model(tmp_path / "none")


def test_a_report_is_found_where_train_and_evaluate_write_it(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    assert find_report(checkpoint) is None
    assert draw_accuracy(checkpoint, tmp_path) is None
    (tmp_path / "report.json").write_text('{"accuracy": {"4": 0.5, "9": 0.75}}')
    assert find_report(checkpoint)["accuracy"] == {"4": 0.5, "9": 0.75}
    drawn = draw_accuracy(checkpoint, tmp_path)
    with Image.open(drawn) as curve:
        assert curve.format == "PNG"
    (checkpoint / "report.json").write_text('{"accuracy": {"4": 0.25}}')
    assert find_report(checkpoint)["accuracy"] == {"4": 0.25}


@pytest.mark.parametrize("text", ["{", "[]", '{"accuracy": 1}', '{"accuracy": {"few": "x"}}'])
def test_another_programs_report_is_no_curve(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    assert draw_accuracy(tmp_path, tmp_path) is None
