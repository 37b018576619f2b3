"""The page's replies without gradio: tables, pictures, and one message for each mistake."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from tests.dropin.processors import stock_processor
from tests.dropin.tiny import stock_model
from tests.models.tiny import picture, tiny_model
from tests.routing.planted import FixedRouter
from tokenflex.digits.processor import digits_processor
from tokenflex.dropin.replace import replace_projector
from tokenflex.routing.storage import attach_router
from tokenflex.serving.playground.asking import CountAnswer
from tokenflex.serving.playground.replies import (
    HEADERS,
    Playground,
    cells_of,
    format_message,
    format_table,
)


def bomb() -> bytes:
    """A PNG that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture(scope="module")
def playground() -> Playground:
    model = tiny_model(trained_num_image_tokens=[16, 4])
    attach_router(model, FixedRouter([0.9, 0, 0], counts=(4, 9, 16)))
    return Playground(model, digits_processor(), max_new_tokens=2)


@pytest.fixture
def image(tmp_path) -> str:
    picture(1).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def answer(**changes) -> CountAnswer:
    fields = {
        **{"asked": 9, "count": 9, "tiles": 1, "text": "5", "certainty": 0.25},
        **{"encoder_seconds": 0.001, "first_token_seconds": 0.0234, "seconds": 0.5},
        **{"is_trained": True, "panels": [], "pooling": "adaptive"},
    }
    return CountAnswer(**{**fields, **changes})


def test_the_page_offers_trained_counts_and_the_routers(playground):
    assert playground.choices == [
        *(("4", "4"), ("9 (never trained with)", "9"), ("16", "16")),
        ("auto (the router chooses)", "auto"),
    ]
    assert playground.ticked == ["4", "9", "16"]
    assert playground.largest_side == 8


def test_a_converted_model_is_offered_at_its_default_count():
    model, processor = stock_model("llava"), stock_processor("llava")
    replace_projector(model, processor, num_image_tokens=(6, 12))
    offered = Playground(model, processor, max_new_tokens=2)
    assert offered.choices == [("2 x 4", "2x4"), ("3 x 6", "3x6"), ("6 x 12", "6x12")]


def test_answers_come_one_by_one_from_the_fewest_tokens_on_and_auto_last(playground, image):
    replies = [*playground.ask(image, "odd", ["auto", "16", "4"], 3)]
    assert [len(reply.answers) for reply in replies] == [1, 2, 3, 4]
    assert [reply.message for reply in replies] == [""] * 4
    names = [answer.name for answer in replies[-1].answers]
    assert names == ["4", "9", "16", "auto: 4"]
    drawn, captions = zip(*replies[-1].pictures, strict=True)
    assert [picture.size for picture in drawn] == [(480, 480)] * 4
    assert [caption.partition(":")[0] for caption in captions[:3]] == [
        *("4 tokens", "9 tokens", "16 tokens")
    ]


def test_the_sliders_count_is_asked_once_if_it_is_ticked_too(playground, image):
    *_, last = playground.ask(image, "odd", ["4"], 2)
    assert [answer.count for answer in last.answers] == [4]
    *_, last = playground.ask(image, "odd", [], 1)
    assert [answer.count for answer in last.answers] == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a picture", "Pillow finds no picture in it"),
        (EPS, "Pillow finds no picture in it"),
        (bomb(), "3600000000 pixels"),
        (b"", "Pillow finds no picture in it"),
    ],
)
def test_a_file_that_is_no_picture_gets_one_message(playground, tmp_path, content, message):
    (tmp_path / "file.png").write_bytes(content)
    (reply,) = playground.ask(str(tmp_path / "file.png"), "odd", ["4"], 0)
    assert reply.message.startswith("The picture file.png cannot be read: ")
    assert message in reply.message
    assert str(tmp_path) not in reply.message
    assert reply.answers == reply.pictures == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "There is no picture yet"),
        ({"path": "gone.png"}, "The picture gone.png does not exist"),
        ({"question": "  "}, "The question is empty"),
        ({"ticked": []}, "No count is chosen"),
        ({"ticked": ["five"]}, "got 'five'"),
    ],
)
def test_a_mistake_gets_one_message(playground, image, changes, message):
    arguments = {"path": image, "question": "odd", "ticked": ["4"], "side": 0, **changes}
    *_, reply = playground.ask(**arguments)
    assert message in reply.message
    assert reply.answers == []
    *_, after = playground.ask(image, "odd", ["4"], 0)  # the next one is answered
    assert len(after.answers) == 1


def test_answers_before_a_mistake_stay_on_the_page(playground, image):
    first, last = playground.ask(image, "odd", ["4"], 17)
    assert last.message.endswith("256 positions, got 289")
    assert last.answers == first.answers
    assert [answer.count for answer in last.answers] == [4]
    assert len(last.pictures) == 1


def test_a_fault_of_the_program_is_no_message(playground, image, monkeypatch):
    def broken(*_, **__):
        raise TypeError("a fault")

    monkeypatch.setattr(playground._model, "encode_images", broken)
    with pytest.raises(TypeError, match="a fault"):
        list(playground.ask(image, "odd", ["4"], 0))


def test_a_row_has_a_cell_for_each_header():
    assert cells_of(answer()) == ["9", "5", "0.250", "1.0", "23.4", "500.0", ""]
    assert len(cells_of(answer())) == len(HEADERS)
    assert cells_of(answer(tiles=7))[0] == "7 tiles x 9 = 63"
    assert cells_of(answer(asked="auto"))[0] == "auto: 9"
    assert cells_of(answer(is_trained=False))[-1] == "never trained with"
    assert cells_of(answer(is_trained=None))[-1] == "training counts not recorded"


def test_what_a_model_writes_is_text_on_the_page():
    page = format_table([answer(text='<script>alert("1")</script>')])
    assert "<script>" not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page
    assert "<b>" not in format_message("<b>")
    assert format_table([]) == format_message("") == ""


def test_the_page_s_logic_needs_no_gradio():
    folder = Path(__file__).parents[2] / "tokenflex/serving/playground"
    users = {path.name for path in folder.glob("*.py") if "import gradio" in path.read_text()}
    assert users == {"page.py"}
