"""Pages: answers are true of what was drawn, splits share no page, pictures are as configured."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFont

from tokenflex.data.steps import outline_of
from tokenflex.reading.content import (
    ASKED_LINES,
    LAYOUTS,
    NUMBERS,
    SPLITS,
    WORDS,
    Chart,
    TextPage,
    draw_page,
    split_of,
)
from tokenflex.reading.dataset import ReadingDataset
from tokenflex.reading.drawing import (
    AXIS_UNIT,
    AXIS_ZERO,
    BODY,
    FOOTNOTE,
    FREE_CELL,
    HEADLINE,
    PAGE_PIXELS,
    PLACEMENTS,
    Box,
    Drawing,
    draw,
)
from tokenflex.reading.fonts import FONTS, font_of, font_path

SINGLE = tuple(layout for layout in LAYOUTS if layout != "pair")


def drawn(
    layout: str, number: int = 12, fonts: tuple[str, ...] = FONTS, placement: str = "grid"
) -> list:
    """(page, drawing, its random generator) of some pages."""
    pages = []
    for index in range(number):
        rng = np.random.default_rng((7, index))
        page = draw_page(rng, layout, "train")
        pages.append((page, draw(rng, page, fonts, placement), rng))
    return pages


def rows_of(boxes: list[Box]) -> list[list[Box]]:
    """Boxes row by row, by their places alone: those that overlap vertically are in one row."""
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: box.edges[1] + box.edges[3]):
        middle = (box.edges[1] + box.edges[3]) / 2
        if rows and min(b.edges[1] for b in rows[-1]) < middle < max(b.edges[3] for b in rows[-1]):
            rows[-1].append(box)
        else:
            rows.append([box])
    return [sorted(row, key=lambda box: box.edges[0]) for row in rows]


def read_off(prompt: str, drawing: Drawing) -> str:
    """The answer to a question, found by the places and texts of boxes alone."""
    kind, _, argument = prompt.partition(" ")
    boxes = list(drawing.boxes)
    body = rows_of([box for box in boxes if box.role in ("line", "cell")])
    if kind in ("lines", "rows"):
        return str(len(body))
    if kind in ("word", "cell"):
        row, column = int(argument[1]), int(argument[3])
        return body[row - 1][column - 1].text
    if kind == "headline":
        top = min(boxes, key=lambda box: box.edges[1])
        return top.text if top.size == HEADLINE[0] else "none"
    if kind == "footnote":
        last = rows_of(boxes)[-1]
        return last[-1].text if last[0].text == "note" else "none"
    if kind == "present":
        return "yes" if argument in {box.text for box in boxes} else "no"
    # The value of a bar or point is where its top or middle is on the axis.
    letters = [box for box in boxes if box.role == "letter"]
    marks = [box for box in boxes if box.role in ("bar", "point")]

    def height(letter: Box) -> float:
        middle = (letter.edges[0] + letter.edges[2]) / 2
        mark = min(marks, key=lambda box: abs((box.edges[0] + box.edges[2]) / 2 - middle))
        bar = mark.role == "bar"
        top = mark.edges[1] if bar else (mark.edges[1] + mark.edges[3]) / 2
        return (AXIS_ZERO - top) / AXIS_UNIT

    if kind == "highest":
        return max(letters, key=height).text
    asked = next(box for box in letters if box.text == argument)
    return str(round(height(asked)))


@pytest.mark.parametrize(
    ("layout", "placement"),
    [*((layout, "grid") for layout in SINGLE), ("table", "free"), ("chart", "free")],
)
def test_answers_are_true_of_what_was_drawn(layout, placement):
    seen = Counter()
    for page, drawing, rng in drawn(layout, placement=placement):
        for _ in range(10):
            kind, prompt, answer = page.draw_question(rng)
            assert answer == read_off(prompt, drawing), (page, prompt)
            seen[kind.split()[-1]] += 1
    expected = {"table": {"cell", "rows"}, "chart": {"value", "highest"}}
    assert set(seen) == expected.get(layout, {"word", "lines", "headline", "footnote", "present"})


def test_of_a_pair_only_one_page_has_the_word():
    dataset = ReadingDataset(layouts=["pair"], size=12)
    answers = Counter()
    for index in range(12):
        first, second = dataset.pages(index)
        sample = dataset[index]
        assert len(sample.images) == 2
        assert sample.images[0].tobytes() != sample.images[1].tobytes()
        for talk in sample.conversations:
            kind, word = talk.turns[0].text.split()
            has = [word in str(page) for page in (first, second)]
            assert kind == "page"
            assert has == [talk.turns[1].text == "first", talk.turns[1].text == "second"]
            answers[talk.turns[1].text] += 1
    assert min(answers["first"], answers["second"]) > 20


@pytest.mark.parametrize("layout", ["page", "wide", "tall"])
def test_ink_is_where_the_boxes_are_and_nowhere_else(layout):
    for _, drawing, _ in drawn(layout):
        grey = np.asarray(drawing.image.convert("L")).astype(int)
        ink = grey < grey.max() - 60
        inside = np.zeros_like(ink)
        for box in drawing.boxes:
            left, top, right, bottom = box.edges
            assert left >= 0
            assert top >= 0
            assert right <= grey.shape[1]
            assert bottom <= grey.shape[0]
            rows = slice(int(top), int(np.ceil(bottom)))
            columns = slice(int(left), int(np.ceil(right)))
            assert not inside[rows, columns].any(), "boxes overlap"
            assert ink[rows, columns].any()
            inside[rows, columns] = True
        assert not (ink & ~inside).any()


def test_pixels_show_the_words_of_the_boxes():
    """Each word looks most like itself among all words in its own font and size."""
    for page, drawing, _ in drawn("page", 6):
        for box in drawing.boxes:
            if box.text not in WORDS:
                continue
            left, top, right, bottom = map(round, box.edges)
            shown = 255 - np.asarray(drawing.image.convert("L").crop((left, top, right, bottom)))
            shown = shown.astype(float) - shown.min()
            font = font_of(drawing.font, box.size)

            def picture(word: str, shape=shown.shape, font: ImageFont.FreeTypeFont = font):
                mask = np.array(font.getmask(word, anchor="ls"), float)
                mask = mask.reshape(font.getmask(word, anchor="ls").size[::-1])
                whole = np.zeros(shape)
                rows, columns = min(shape[0], mask.shape[0]), min(shape[1], mask.shape[1])
                whole[:rows, :columns] = mask[:rows, :columns]
                return whole

            def likeness(word: str, shown=shown, picture=picture) -> float:
                other = picture(word)
                return (shown * other).sum() / np.linalg.norm(other) / np.linalg.norm(shown)

            assert max(WORDS, key=likeness) == box.text, page


def test_a_tall_page_has_no_line_across_its_tiles():
    for page, drawing, _ in drawn("tall", 30):
        assert drawing.image.size == (PAGE_PIXELS, 2 * PAGE_PIXELS)
        for box in drawing.boxes:
            assert (box.edges[1] < PAGE_PIXELS) == (box.edges[3] <= PAGE_PIXELS)
            if box.role == "line":
                assert (box.edges[3] <= PAGE_PIXELS) == (box.line < page.upper)
        assert ASKED_LINES <= page.upper < len(page.lines)


def test_sizes_go_from_headline_to_footnote():
    sizes = Counter()
    for page, drawing, _ in drawn("page", 40):
        for box in drawing.boxes:
            sizes[box.role, box.size] += 1
        assert bool(page.headline) == any(box.role == "headline" for box in drawing.boxes)
    for role, expected in (("headline", HEADLINE), ("line", BODY), ("footnote", FOOTNOTE)):
        assert {size for of_role, size in sizes if of_role == role} == {*expected}
    assert max(FOOTNOTE) < min(BODY) <= max(BODY) < min(HEADLINE)


def phases(boxes: list[Box], role: str) -> set[tuple[float, float]]:
    """Return the middles of boxes within patches of 12 pixels."""
    found = [box.edges for box in boxes if box.role == role]
    return {((x0 + x1) / 2 % 12, (y0 + y1) / 2 % 12) for x0, y0, x1, y1 in found}


@pytest.mark.parametrize(
    ("layout", "role", "most"),
    [
        ("table", "cell", 12),  # a start at 0 or 6, two sizes, and digits of unlike width
        ("chart", "letter", 6),
        ("chart", "point", 3),  # heights are multiples of 8 pixels
    ],
)
def test_tables_and_charts_stand_on_the_grid_or_anywhere(layout, role, most):
    boxes = {
        placement: [
            box
            for _, drawing, _ in drawn(layout, 60, ("DejaVuSans",), placement)
            for box in drawing.boxes
        ]
        for placement in PLACEMENTS
    }
    assert len(phases(boxes["grid"], role)) <= most
    assert len(phases(boxes["free"], role)) > 2 * most
    for placement, sizes in (("grid", BODY), ("free", FREE_CELL)):
        assert {box.size for box in boxes[placement] if box.role == "cell"} <= {*sizes}
        for box in boxes[placement]:
            left, top, right, bottom = box.edges
            assert 0 <= left < right <= PAGE_PIXELS
            assert 0 <= top < bottom <= PAGE_PIXELS


@pytest.mark.parametrize("layout", ["table", "chart"])
def test_placement_changes_pictures_and_no_question(layout):
    grid, free = (
        ReadingDataset(size=8, layouts=[layout], placement=placement) for placement in PLACEMENTS
    )
    for index in range(8):
        assert free[index].conversations == grid[index].conversations
        assert free[index].images[0].tobytes() != grid[index].images[0].tobytes()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rules_of_a_table_cross_no_number(placement):
    for page, drawing, _ in drawn("table", 60, placement=placement):
        grey = np.asarray(drawing.image.convert("L")).astype(int)
        rule = grey < grey.max() - 100
        across = np.flatnonzero(rule.mean(axis=1) > 0.45)
        down = np.flatnonzero(rule[across[0] : across[-1]].all(axis=0))
        assert len(across) == len(page.rows) + 1
        assert len(down) == len(page.rows[0]) + 1
        for box in drawing.boxes:
            left, top, right, bottom = box.edges
            assert across[box.line] < top < bottom <= across[box.line + 1], page
            assert down[box.column] < left < right <= down[box.column + 1], page


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_colour_reaches_from_the_axis_to_a_bars_value_and_marks_each_point(placement):
    for page, drawing, _ in drawn("chart", 40, placement=placement):
        colours = np.asarray(drawing.image).astype(int)
        for box in drawing.boxes:
            if box.role not in ("bar", "point"):
                continue
            middle = int((box.edges[0] + box.edges[2]) / 2)
            top = AXIS_ZERO - AXIS_UNIT * page.values[box.column]
            column = colours[:, middle]
            assert abs(column[top] - colours[0, -1]).max() > 60
            if box.role == "bar":
                assert (column[top:AXIS_ZERO] == column[top]).all()
                assert abs(column[top - 1] - column[top]).max() > 20
            else:
                assert (box.edges[1] + box.edges[3]) / 2 == top


def test_a_font_and_a_size_change_the_picture():
    pictures = {
        hashlib.sha256(dataset[0].images[0].tobytes()).hexdigest()
        for dataset in (ReadingDataset(layouts=["page"], size=1, fonts=[font]) for font in FONTS)
    }
    assert len(pictures) == len(FONTS)
    assert font_of(FONTS[0], 16).getlength("lamp") > 1.5 * font_of(FONTS[0], 8).getlength("lamp")


def test_fonts_are_those_that_matplotlib_ships_or_files(tmp_path):
    import matplotlib

    for font in FONTS:
        assert font_path(font).is_relative_to(matplotlib.get_data_path())
    own = tmp_path / "own.ttf"
    own.write_bytes(font_path("DejaVuSerif").read_bytes())
    named, copied = (
        ReadingDataset(size=3, fonts=[font])[2].images[0] for font in ("DejaVuSerif", str(own))
    )
    assert named.tobytes() == copied.tobytes()
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    for wrong in ("Helvetica", str(tmp_path / "none.ttf"), str(tmp_path / "broken.ttf")):
        with pytest.raises(ValueError, match=r"fonts must be .*, got '.*"):
            ReadingDataset(fonts=[wrong])


@pytest.mark.parametrize(
    ("font", "without"),
    [
        ("cmsy10", "fn"),
        ("cmex10", "A"),
        ("STIXNonUni", "0123"),
        ("LastResortHE-Regular", "0123"),
    ],
)
def test_a_font_without_letters_is_refused(font, without):
    with pytest.raises(ValueError, match=rf"fonts must have glyphs.*'{font}' without .*{without}"):
        ReadingDataset(fonts=[font])


@pytest.mark.parametrize("font", ["cmr10", "cmmi10", "STIXGeneral", "DejaVuSansMono"])
def test_a_font_with_letters_is_taken(font):
    assert ReadingDataset(size=3, fonts=[font])[2].images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_depends_on_seed_split_and_index_alone(layout):
    dataset = ReadingDataset(size=9, layouts=[layout])
    first, again = dataset[3], ReadingDataset(size=9, layouts=[layout])[3]
    assert [i.tobytes() for i in again.images] == [i.tobytes() for i in first.images]
    assert again.conversations == first.conversations
    outline = outline_of(dataset, 3)
    assert (outline.image_sizes, outline.conversations) == (first.image_sizes, first.conversations)
    for other in (dataset[4], ReadingDataset(size=9, layouts=[layout], seed=1)[3]):
        assert [i.tobytes() for i in other.images] != [i.tobytes() for i in first.images]


def test_the_standard_pages_and_questions_have_not_changed():
    """Published numbers were measured on these; what pixels they get is the libraries' part."""
    whole = hashlib.sha256()
    for split in SPLITS:
        dataset = ReadingDataset(split, size=40)
        for index in range(40):
            sample = dataset.outline(index)
            whole.update(repr((sample.id, sample.image_sizes, sample.conversations)).encode())
    assert whole.hexdigest() == "d8ce2567762a1facd11280455cdb63261e4c3019f03e1258161132aad0d1f78e"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_share_no_page(layout):
    pages = {
        split: {
            page
            for index in range(120)
            for dataset in [ReadingDataset(split, size=120, layouts=[layout], seed=index % 2)]
            for page in dataset.pages(index)
        }
        for split in SPLITS
    }
    for split, of_split in pages.items():
        assert {split_of(page) for page in of_split} == {split}
    assert len(set().union(*pages.values())) == sum(map(len, pages.values()))


def test_the_split_of_a_page_follows_from_its_content_alone():
    page = TextPage("page", "sun", (("moon", "12"),), None, 1)
    assert split_of(page) == split_of(TextPage("page", "sun", (("moon", "12"),), None, 1))
    shares = Counter(
        split_of(Chart("bar", ("A", "B"), (i, j))) for i in range(40) for j in range(40)
    )
    assert 0.7 < shares["train"] / 1600 < 0.9
    assert min(shares["validation"], shares["test"]) > 80


def test_numbers_and_words_are_as_likely_in_every_place():
    firsts = Counter()
    for index in range(400):
        page = draw_page(np.random.default_rng(index), "page", "train")
        firsts[page.lines[0][0]] += 1
    assert set(WORDS) <= set(firsts) <= {*WORDS, *NUMBERS}
    assert 0.15 < sum(firsts[n] for n in NUMBERS) / 400 < 0.35


def test_images_are_rgb():
    for layout in LAYOUTS:
        for image in ReadingDataset(size=1, layouts=[layout])[0].images:
            assert isinstance(image, Image.Image)
            assert image.mode == "RGB"
