"""Baselines keep exactly what they say, and the questions that resizing cannot answer decide."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Siglip2ImageProcessor

from tests.dropin.processors import stock_processor
from tests.dropin.tiny import stock_model
from tests.evaluation.test_converted import dataset as samples_for_stock_models
from tests.models.tiny import PATCH, PIXELS, WIDTH, tiny_model
from tokenflex import replace_projector
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.evaluation import evaluate, runner
from tokenflex.evaluation.baselines import (
    METHODS,
    OURS,
    RESIZING,
    Baselines,
    baseline_counts,
    baseline_report,
    difficult_questions,
    pooled_tokens,
    random_tokens,
    ready_tokens,
    smaller_side,
    strided_tokens,
)
from tokenflex.evaluation.pictures import read_pictures, resize, with_detail_of
from tokenflex.evaluation.statistics import Verdict

GRIDS = [((4, 4), (2, 2)), ((16, 16), (12, 12)), ((16, 16), (8, 8)), ((5, 7), (2, 3))]
AUTO = SimpleNamespace(label="auto", select=None)


class TestTokens:
    @pytest.mark.parametrize(("full", "grid"), GRIDS)
    def test_strided_tokens_are_evenly_spaced(self, full, grid):
        chosen = strided_tokens(full, grid)
        assert len(chosen.unique()) == grid[0] * grid[1]
        places = chosen.view(*grid)
        for axis, lines in ((0, places[:, 0] // full[1]), (1, places[0] % full[1])):
            side, of_full = grid[axis], full[axis]
            gaps = lines.diff()
            assert gaps.max() - gaps.min() <= 1
            ends = [int(lines[0]), of_full - 1 - int(lines[-1])]  # as far from both edges
            assert abs(ends[0] - ends[1]) <= 1
            assert max(ends) <= of_full / side / 2
        assert (places == places[:, :1] + places[:1] - places[0, 0]).all()  # rows and columns

    def test_all_tokens_are_all(self):
        assert strided_tokens((3, 5), (3, 5)).tolist() == [*range(15)]
        assert random_tokens((3, 5), (3, 5), (1,)).tolist() == [*range(15)]

    def test_a_grid_that_does_not_fit(self):
        with pytest.raises(ValueError, match="2 x 5 evenly spaced tokens does not fit in 4 x 4"):
            strided_tokens((4, 4), (2, 5))

    @pytest.mark.parametrize(("full", "grid"), GRIDS)
    def test_random_tokens_are_a_function_of_their_key(self, full, grid):
        chosen = [random_tokens(full, grid, (0, sample, 1)).tolist() for sample in range(200)]
        number, of_full = grid[0] * grid[1], full[0] * full[1]
        for tokens in chosen:
            assert len({*tokens}) == len(tokens) == number
            assert tokens == sorted(tokens)
        assert {token for tokens in chosen for token in tokens} == {*range(of_full)}
        assert chosen[7] == random_tokens(full, grid, (0, 7, 1)).tolist()
        for key in ((1, 7, 1), (0, 7, 2), (0, 8, 1)):
            assert chosen[7] != random_tokens(full, grid, key).tolist()
        shares = torch.bincount(torch.tensor(chosen).flatten(), minlength=of_full) / 200
        assert (shares - number / of_full).abs().max() < 0.2  # no token is preferred

    def test_averages_are_those_of_each_cell(self):
        tokens = torch.randn(2 * 16, 3)
        pooled = pooled_tokens(tokens, 2, (4, 4), (2, 2))
        cells = tokens.view(2, 2, 2, 2, 2, 3).mean((2, 4))
        assert torch.allclose(pooled.view(2, 2, 2, 3), cells, atol=1e-6)
        constant = torch.full((2 * 256, 3), 1.5)
        assert torch.equal(pooled_tokens(constant, 2, (16, 16), (12, 12)), constant[: 2 * 144])


class TestDetail:
    @pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 8)])
    def test_an_enlarged_picture_has_no_more_detail_than_the_small_one(self, size):
        """All pictures of 8 x 8 become a space of as many dimensions as the small one has."""
        basis = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
        shown = with_detail_of(basis, size).flatten(1)
        assert shown.shape == (64, 64)
        assert torch.linalg.matrix_rank(shown, rtol=1e-5) == size[0] * size[1]

    def test_what_is_finer_than_the_small_picture_is_averaged_away(self):
        fine = torch.tensor([0.0, 1, 1, 0, 0, 1, 1, 0]).expand(1, 3, 8, 8)  # stripes
        shown = resize(fine, (2, 2))
        assert torch.allclose(shown, torch.full_like(shown, 0.5), atol=0.1)

    def test_a_constant_picture_stays(self):
        pixels = torch.full((2, 3, 3, 8, 8), 0.7, dtype=torch.bfloat16)  # tiles of images
        for shown in (with_detail_of(pixels, (2, 3)), resize(pixels, (8, 8))):
            assert torch.equal(shown, pixels)
        assert resize(pixels, (4, 5)).shape == (2, 3, 3, 4, 5)

    def test_sides_are_rounded_down_to_what_the_count_allows(self):
        assert [smaller_side(27, count, 16) for count in (8, 12, 15)] == [13, 20, 25]
        assert smaller_side(3, 1, 16) == 1


class TestCounts:
    def test_those_below_the_largest_and_no_selectors(self):
        assert baseline_counts([9, AUTO, (2, 4), 16, (4, 4), 4]) == ((9, (2, 4), 4), 16)

    @pytest.mark.parametrize("counts", [[4], [AUTO], [4, AUTO], [4, (2, 2)]])
    def test_without_a_smaller_one(self, counts):
        with pytest.raises(ValueError, match="baselines need a count and a larger one"):
            baseline_counts(counts)


@pytest.fixture(scope="module")
def shown():
    """A model's images of two tiles, and what the baselines show of them by method and count."""
    model = tiny_model().eval()
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    asked = []
    encode = model.encode_images

    def noted(pixel_values, grids=None):
        asked.append((pixel_values, grids))
        return encode(pixel_values, grids)

    model.encode_images = noted
    with torch.no_grad():
        encoded = encode(pixels)
        fewer = Baselines(model, None, (4, (2, 4), 9), 16)
        runs = [*fewer.runs({"pixel_values": pixels}, encoded, [(0, 0), (5, 1)])]
        tokens = model.get_image_features(encoded_images=encoded, num_image_tokens=16)
    assert len(runs) == len(fewer)
    images = {(method, count): images for method, count, images in runs}
    return SimpleNamespace(
        model=model,
        pixels=pixels,
        images=images,
        tokens=torch.stack(tokens.pooler_output),
        asked=asked,
    )


class TestShownImages:
    @pytest.mark.parametrize("count", [4, (2, 4), 9])
    @pytest.mark.parametrize("method", METHODS)
    def test_exactly_the_tokens_of_the_count(self, shown, method, count):
        images = shown.images[method, count]
        number = count if isinstance(count, int) else 8
        assert images.grid[0] * images.grid[1] == (16 if method == "enlarged" else number)
        with images.context, torch.no_grad():
            outputs = shown.model.get_image_features(
                encoded_images=images.encoded, num_image_tokens=[images.grid] * 2
            )
        for tokens in outputs.pooler_output:
            assert tokens.shape == (images.grid[0] * images.grid[1], WIDTH)

    def test_chosen_tokens_are_those_of_the_full_count(self, shown):
        for method, chosen in (
            ("strided", [strided_tokens((4, 4), (3, 3))] * 2),
            ("random", [random_tokens((4, 4), (3, 3), (0, *tile)) for tile in ((0, 0), (5, 1))]),
        ):
            features = shown.images[method, 9].encoded.features.view(2, 9, WIDTH)
            for tile in range(2):
                assert torch.equal(features[tile], shown.tokens[tile][chosen[tile]])

    def test_averages_are_those_of_the_full_count(self, shown):
        expected = pooled_tokens(shown.tokens.flatten(0, 1), 2, (4, 4), (2, 2))
        assert torch.equal(shown.images["pooled", 4].encoded.features, expected)

    def test_resized_pictures_have_their_share_of_the_patches(self, shown):
        small = [(pixels, grids) for pixels, grids in shown.asked if grids is not None]
        assert [grids for _, grids in small] == [[(4, 4)] * 2, [(4, 8)] * 2, [(6, 6)] * 2]
        for pixels, ((height, width), _) in small:
            assert torch.equal(pixels, resize(shown.pixels, (4 * height, 4 * width)))
        enlarged = [pixels for pixels, grids in shown.asked if grids is None]
        for pixels, size in zip(enlarged, [(16, 16), (16, 32), (24, 24)], strict=True):
            assert torch.equal(pixels, with_detail_of(shown.pixels, size))

    def test_the_projector_is_as_before(self, shown):
        projector = shown.model.projector
        assert "forward" not in vars(projector)
        projector.forward = forward = projector.forward
        with pytest.raises(RuntimeError), ready_tokens(shown.model):
            raise RuntimeError
        assert vars(projector).pop("forward") is forward


def verdicts(rights: str, kinds: str = "aabb") -> list[Verdict]:
    """One question a sample; + is right."""
    return [
        Verdict(i, kind, right == "+", 1, 4)
        for i, (right, kind) in enumerate(zip(rights, kinds, strict=True))
    ]


class TestReport:
    def test_difficult_questions(self):
        full = verdicts("+++-")
        assert difficult_questions(full, [verdicts("+---")]) == [1, 2]
        assert difficult_questions(full, [verdicts("+---"), verdicts("--+-")]) == [1]
        assert difficult_questions(full, []) == []

    def test_shares_on_all_and_on_difficult_questions(self):
        of_model = {"4": verdicts("++--"), "16": verdicts("+++-"), "auto": verdicts("++++")}
        of_methods = {
            "resized": {"4": verdicts("+---")},
            "enlarged": {"4": verdicts("+--+")},
            "random": {"4": verdicts("--+-")},
            # Left out after batches without images.
            "pooled": {"4": verdicts("++", "ab")},
            "strided": {"4": verdicts("++", "ab")},
        }
        left_out = {"pooled": "a reason", "strided at 4": "another"}
        report = baseline_report("16", of_model, of_methods, left_out)
        assert report["accuracy"] == {
            "resized": {"4": 0.25}, "enlarged": {"4": 0.5}, "random": {"4": 0.25}
        }  # fmt: skip
        assert report["accuracy_by_kind"]["random"] == {"a": {"4": 0.0}, "b": {"4": 0.5}}
        assert report["left_out"] == left_out
        difficult = report["difficult"]
        assert difficult["questions"] == difficult["samples"] == {"4": 2}
        assert difficult["questions_by_kind"] == {"4": {"a": 1, "b": 1}}
        assert difficult["accuracy"] == {OURS: {"4": 0.5}, "random": {"4": 0.5}}
        assert difficult["accuracy_by_kind"]["random"] == {"a": {"4": 0.0}, "b": {"4": 1.0}}
        assert difficult["standard_error"]["random"] == {"4": 0.5}

    def test_difficult_questions_count_alike_whatever_their_kind(self):
        kinds = "aaab"
        of_model = {"4": verdicts("---+", kinds), "16": verdicts("++++", kinds)}
        methods = {"resized": {"4": verdicts("----", kinds)}}
        report = baseline_report("16", of_model, methods, {})
        assert report["difficult"]["accuracy"][OURS] == {"4": 0.25}
        assert report["difficult"]["accuracy_by_kind"][OURS] == {"a": {"4": 0.0}, "b": {"4": 1.0}}

    def test_no_question_is_difficult(self):
        of_model = {"4": verdicts("++--"), "16": verdicts("++--")}
        methods = {"resized": {"4": verdicts("++++")}, "pooled": {"4": verdicts("----")}}
        difficult = baseline_report("16", of_model, methods, {})["difficult"]
        assert difficult["questions"] == {"4": 0}
        assert (
            difficult["accuracy"]["pooled"] == difficult["standard_error"]["pooled"] == {"4": None}
        )


def test_an_ideal_model_is_ahead_where_resizing_fails(monkeypatch):
    """One that needs all patches to read, and any token to tell the rest."""

    def graded(model, processor, questions, images):
        of_all = "forward" not in vars(model.projector)  # its own tokens, not some of them
        enough = of_all and images.encoded.grids[0] == (8, 8) and not blurred[-1]
        right = [enough or question.conversation.kind != "read" for question in questions]
        return SimpleNamespace(right=torch.tensor(right))

    blurred = [False]

    images = Baselines.images

    def noted(self, method, *arguments):
        blurred.append(method == "enlarged")
        return images(self, method, *arguments)

    monkeypatch.setattr(Baselines, "images", noted)
    monkeypatch.setattr(runner, "grade_forced", graded)
    dataset = DigitsDataset("test", size=6, questions=4)
    # One batch: the model's own counts come first.
    report = evaluate(tiny_model(), digits_processor(), dataset, (4, 16), baselines=True)
    rest = 1 - 1 / len(report["questions"])
    assert report["accuracy"] == {"4": 1.0, "16": 1.0}
    assert report["baselines"]["accuracy"] == {method: {"4": rest} for method in METHODS}
    difficult = report["baselines"]["difficult"]
    assert difficult["questions"] == {"4": report["questions"]["read"]}
    assert difficult["questions_by_kind"] == {"4": {"read": report["questions"]["read"]}}
    others = {method: {"4": 0.0} for method in METHODS if method not in RESIZING}
    assert difficult["accuracy"] == {OURS: {"4": 1.0}, **others}


@pytest.mark.parametrize("score", ["forced", "exact"])
def test_baselines_change_nothing_else_and_depend_on_no_batches(score):
    dataset = DigitsDataset("test", size=5, questions=2)
    options = {"score": score, "max_new_tokens": 2}
    calls = []
    runs = [
        evaluate(
            tiny_model(), digits_processor(), dataset, (4, 9, 16), baselines=True,
            batch_size=size, on_batch=lambda: calls.append(1), **options,
        )
        for size in (2, 5)
    ]  # fmt: skip
    assert len(calls) == (3 + 1) * (3 + 2 * len(METHODS))
    plain = evaluate(tiny_model(), digits_processor(), dataset, (4, 9, 16), **options)
    for report in runs:
        assert report["accuracy_by_kind"] == plain["accuracy_by_kind"]
        assert {*report} - {*plain} == {"baselines"}
    assert runs[0]["baselines"] == runs[1]["baselines"]
    assert {*runs[0]["baselines"]["accuracy"]} == {*METHODS}


def test_samples_without_images_take_part():
    text = Sample("text", (), (Conversation((Turn("user", "count"), Turn("assistant", "3")), "t"),))
    dataset = [text, DigitsDataset("test", size=1, questions=1)[0], text]
    for batch_size in (1, 3):
        report = evaluate(
            tiny_model(), digits_processor(), dataset, (4, 16), baselines=True,
            batch_size=batch_size,
        )  # fmt: skip
        assert all(row["4"] is not None for row in report["baselines"]["accuracy"].values())
        assert {*report["baselines"]["accuracy"]} == {*METHODS}


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("llava", {"resized"}),
        ("idefics3", {"resized"}),
        ("paddleocr_vl", RESIZING),
        ("qwen3_vl", ()),
    ],
)
def test_converted_models_have_the_baselines_that_can_run(name, left_out):
    processor = stock_processor(name)
    model = replace_projector(stock_model(name), processor, num_image_tokens=16)
    report = evaluate(
        model, processor, samples_for_stock_models(), (4, (1, 8), 16), baselines=True
    )["baselines"]
    assert {*report["left_out"]} == {*left_out, "strided at 1x8"}
    assert {*report["accuracy"]} == {*METHODS} - {*left_out}
    assert {*report["accuracy"]["strided"]} == {"4"}
    assert {*report["accuracy"]["random"]} == {"4", "1x8"}
    if "enlarged" in left_out:
        assert report["difficult"]["questions"] == {"4": 0, "1x8": 0}


class TestPictures:
    """Patches are put together to the very pictures that were cut, and cut again."""

    def ramps(self, height: int, width: int) -> list[Image.Image]:
        rows, columns = np.mgrid[:height, :width]
        return [Image.fromarray(np.stack([rows, columns, rows + columns], -1).astype(np.uint8))]

    def check(self, read, processed, size):
        (picture,) = read.pictures
        assert picture.shape[-2:] == size
        red, green, blue = picture.flatten(0, -4)[0] if picture.ndim == 4 else picture
        assert (red.diff(dim=0) > 0).all()
        assert (red.diff(dim=1) == 0).all()
        assert (green.diff(dim=1) > 0).all()
        assert (green.diff(dim=0) == 0).all()
        assert (blue.diff(dim=1) > 0).all()
        assert (blue.diff(dim=0) > 0).all()
        again = read.inputs_of(read.pictures)
        for name, value in processed.items():
            assert torch.equal(torch.as_tensor(again[name]), torch.as_tensor(value)), name

    @pytest.mark.parametrize("name", ["qwen2_vl", "glm4v"])
    def test_of_blocks(self, name):
        image_processor = stock_processor(name).image_processor
        unit = image_processor.patch_size * image_processor.merge_size
        size = 3 * unit, 4 * unit
        processed = image_processor(self.ramps(*size), do_resize=False, return_tensors="pt")
        read = read_pictures(processed, image_processor, None)
        assert read.unit == (unit, unit)
        self.check(read, processed, size)

    def test_of_any_shape(self):
        image_processor = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=12)
        out = image_processor(self.ramps(12, 16), return_tensors="pt")
        processed = {"pixel_values": out["pixel_values"], "grids": [(3, 4)]}
        assert out["spatial_shapes"].tolist() == [[3, 4]]
        self.check(read_pictures(processed, image_processor, (PATCH, PATCH)), processed, (12, 16))

    def test_of_another_order_are_left_out(self):
        grid = torch.tensor([[1, 4, 4]])
        for inputs in (
            {"pixel_values": torch.zeros(2, 9, 48)},
            {"pixel_values": [torch.zeros(3, 8, 8)]},
            {"pixel_values": torch.zeros(16, 3, 8, 8), "image_grid_thw": grid},
        ):
            assert read_pictures(inputs, None, None) is None
        frames = {"pixel_values": torch.zeros(32, 384), "image_grid_thw": grid * 2}
        assert read_pictures(frames, stock_processor("qwen2_vl").image_processor, None) is None

    def test_an_encoder_of_any_shape_has_all_baselines(self):
        model = tiny_model(vision="siglip2").eval()
        pixels, grids = torch.randn(2, 48, 3 * PATCH**2), [(6, 8), (4, 4)]
        inputs = {"pixel_values": pixels, "grids": grids}
        with torch.no_grad():
            encoded = model.encode_images(**inputs)
            fewer = Baselines(model, None, (4,), 16)
            shown = {m: images for m, _, images in fewer.runs(inputs, encoded, [(0, 0), (0, 1)])}
        assert fewer.left_out == {}
        assert shown["resized"].encoded.grids == ((3, 4), (2, 2))
        assert shown["enlarged"].encoded.grids == tuple(grids)
