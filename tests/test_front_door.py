"""From a saved stock model to answers, by commands alone: every command takes a conversion."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from examples.tiny_llava import COLOURS, tiny_llava
from tests.routing.planted import mark_some_right
from tests.test_cli import command  # noqa: F401  # a fixture
from tests.training.runs import write_config
from tokenflex import from_pretrained
from tokenflex.answers import answer_at_counts
from tokenflex.checkpoints import load_model
from tokenflex.cli.convert import counts_in_words
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.dropin import Agreement, DistillationReport, FitReport
from tokenflex.dropin.conversion import convert_stock
from tokenflex.evaluation import evaluate
from tokenflex.harnesses.assistant import Assistant
from tokenflex.routing.selector import resolve_count

pytestmark = pytest.mark.usefixtures("own_accelerator_and_threads")
COUNTS = (4, 16, 64)


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("front") / "stock"
    model, processor = tiny_llava()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, (left, right) in enumerate(zip(COLOURS, [*COLOURS][1:], strict=False)):
        image = Image.new("RGB", (64, 64), COLOURS[left])
        image.paste(COLOURS[right], (20 + 4 * i, 0, 64, 64))
        image.save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def converted(stock, pictures) -> Path:
    from tokenflex.cli import main

    folder = stock.parent / "converted"
    arguments = ["convert", stock, folder, "--images", pictures, "--tokens", "64"]
    assert main([*map(str, arguments)]) == 0
    return folder


@pytest.fixture(scope="module")
def data(pictures) -> Path:
    """Questions about the pictures, two of each."""
    records = []
    for i, colour in enumerate([*COLOURS][:-1]):
        for question, answer in (("which colour is this", colour), ("where is this", "left")):
            parts = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": question}]
            records.append(
                {
                    "messages": [
                        {"role": "user", "content": parts},
                        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                    ]
                }
            )
    path = pictures / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()[1:] if line.strip()]


def test_convert_says_in_words_how_near_the_projector_is(command, stock, pictures, tmp_path):  # noqa: F811
    code, out, errors = command(
        *("convert", stock, tmp_path / "out", "--images", pictures, "--tokens", "4x4")
    )
    assert (code, errors) == (0, [])
    assert "fitting the new projector on 5 pictures" in out
    after, before = map(float, re.findall(r"by (\S+)% .*; (\S+)% before", out)[0])
    assert after < before / 2
    assert "on pictures that it was not fitted on, they differ by" in out
    assert out.splitlines()[-2].endswith("no count: 16 (the stock model's: 64)")
    model, processor = from_pretrained(tmp_path / "out")
    assert processor.num_image_tokens == (4, 4)
    assert model.fitted_num_image_tokens == [4, 16]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_default_count_beyond_the_positions_is_refused_before_anything_is_loaded(stock, tmp_path):
    with pytest.raises(ValueError, match=r"must not exceed the language model's 2048 .* got 10000"):
        convert_stock(stock, tmp_path / "out", num_image_tokens=10000, progress=pytest.fail)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (64, ["64 (the stock model's: 16)"]),
        ((9, 9), ["81 (the stock model's: 16)", "more than the 8 x 10 patches", "--tokens 64,"]),
    ],
)
def test_a_default_count_beyond_the_patches_is_told(count, said):
    report = FitReport(1.0, 0.1, None, 7, patch_grid=(8, 10), stock_grid=(4, 4))
    lines = counts_in_words(report, count).splitlines()
    assert len(lines) == min(2, len(said))
    for words in said:
        assert words in "\n".join(lines)


def test_convert_fits_on_the_first_pictures_and_merges_patches_as_told(
    command,  # noqa: F811
    stock,
    pictures,
    tmp_path,
    monkeypatch,
):
    fitted = []

    def fit_projector(model, images, processor):
        fitted.extend(images)

    monkeypatch.setattr("tokenflex.dropin.conversion.fit_projector", fit_projector)
    options = ("--tokens", "16", "--max-images", "2", "--patch-merge", "2")
    code, out, errors = command("convert", stock, tmp_path / "out", "--images", pictures, *options)
    assert (code, errors) == (0, [])
    assert "fitting the new projector on 2 pictures" in out
    first = [Image.open(pictures / f"{i}.png").tobytes() for i in (0, 1)]
    assert [picture.convert("RGB").tobytes() for picture in fitted] == first
    model, _ = from_pretrained(tmp_path / "out")
    assert model.config.tokenflex["patch_merge"] == 2
    projector = model.base_model.multi_modal_projector
    assert projector.vision_width == 4 * model.config.vision_config.hidden_size
    for option in ("--max-images", "--patch-merge"):
        code, _, errors = command("convert", stock, tmp_path / "no", option, "0")
        assert code == 2
        assert f"{option}: expected at least 1, got 0" in errors[-1]


def test_convert_without_pictures_only_where_it_is_asked_for(command, stock, tmp_path):  # noqa: F811
    code, out, _ = command("convert", stock, tmp_path / "out", "--init", "random")
    assert code == 0
    assert "random weights: train it" in out


def mistakes(stock: Path, converted: Path, folder: Path) -> dict[str, tuple[list, str]]:
    empty = folder / "empty"
    empty.mkdir()
    torn = folder / "torn"
    torn.mkdir()
    (torn / "a.png").write_bytes(b"no picture")
    bert = folder / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    out = folder / "out"
    return {
        "no pictures given": ([stock, out], "--images must name a folder of pictures"),
        "none there": ([stock, out, "--images", empty], "holds no pictures"),
        "no folder": ([stock, out, "--images", folder / "gone"], "gone does not exist"),
        "unreadable": ([stock, out, "--images", torn], "a.png"),
        "unsupported": ([bert, out, "--images", torn / "a.png"], "a.png"),
        "a family": (
            [bert, out, "--init", "random"],
            "model_type 'bert' (it is no image-text type of the installed transformers)",
        ),
        "exists": ([stock, empty, "--init", "random"], "empty exists"),
        "converted": ([converted, out, "--init", "random"], "is a conversion already"),
        "no source": ([folder / "gone", out, "--init", "random"], "gone does not exist"),
        "a count": ([stock, out, "--init", "random", "--tokens", "5"], "--tokens"),
        "both": ([stock, out, "--init", "random", "--images", torn], "--images are to fit on"),
    }


def test_mistakes_of_convert_are_one_line_and_leave_nothing(command, stock, converted, tmp_path):  # noqa: F811
    for case, (arguments, words) in mistakes(stock, converted, tmp_path).items():
        before = {*tmp_path.rglob("*")}
        code, _, errors = command("convert", *arguments)
        assert code == 2, case
        (line,) = errors
        assert words in line, case
        assert {*tmp_path.rglob("*")} == before, case


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--prompt", "which", "--model"),
        ("evaluate", "--data", "digits", "--counts", "4", "--size", "2"),
        ("route", "--data", "digits", "--counts", "4,9", "--size", "4", "--model"),
    ],
)
def test_a_stock_model_is_told_to_be_converted(command, stock, words):  # noqa: F811
    code, _, errors = command(*words, stock)
    assert code == 2
    assert f"tokenflex convert {stock} OUT --images FOLDER" in errors[0]
    assert not (stock / "router").exists()


def test_generate_answers_at_three_counts_as_separate_calls(command, converted, pictures):  # noqa: F811
    paths = [pictures / "0.png", pictures / "1.png"]
    code, out, errors = command(
        *("generate", "--model", converted, "--prompt", "which colour is this"),
        *("--image", paths[0], "--image", paths[1]),
        *("--tokens", "4,16,64", "--max-new-tokens", "5"),
    )
    assert (code, errors) == (0, [])
    model, processor = load_model(converted)
    for row, count in zip(rows(out), COUNTS, strict=True):
        parts = [{"type": "image", "path": str(path)} for path in paths]
        content = [*parts, {"type": "text", "text": "which colour is this"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            num_image_tokens=count,
        )
        new = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = new[0, inputs["input_ids"].shape[1] :]
        assert int(row[0]) == 2 * count
        assert " ".join(row[3:]) == processor.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("options", [{"budget": 40}, {"confidence": 0.99}])
def test_counts_are_chosen_without_a_router(converted, pictures, options):
    model, processor = load_model(converted)
    images = [Image.open(pictures / f"{i}.png") for i in range(2)]
    (answer,) = answer_at_counts(
        model, processor, images, ["<image> <image> which"], ["auto"], max_new_tokens=2, **options
    )
    if "budget" in options:
        assert answer.vision_tokens == 32  # 16 each: of 16 and 64 the second is too many
    else:
        assert answer.read_vision_tokens in (32, 32 + 128)


def test_prompts_are_answered_as_alone_whatever_side_the_tokenizer_pads(converted, pictures):
    model, processor = load_model(converted)
    processor.tokenizer.init_kwargs["padding_side"] = processor.tokenizer.padding_side = "right"
    images = [Image.open(pictures / "0.png")]
    prompts = ["<image> which colour is this where", "<image> left"]
    together = [*answer_at_counts(model, processor, images, prompts, [4], max_new_tokens=4)]
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = answer_at_counts(model, processor, images, [prompt], [4], max_new_tokens=4)
        assert answer.text == alone.text


def test_evaluate_and_route_and_what_they_write(
    command,  # noqa: F811
    converted,
    data,
    tmp_path,
    monkeypatch,
):
    mark_some_right(monkeypatch)
    code, out, errors = command(
        *("evaluate", converted, "--data", data, "--counts", "4,16"),
        *("--output", tmp_path / "report.json"),
    )
    assert (code, errors) == (0, [])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["vision_tokens_per_image"] == {"4": 4, "16": 16}
    code, out, errors = command("route", "--model", converted, "--data", data, "--counts", "4,16")
    assert (code, errors) == (0, [])
    assert f"the router is in {converted / 'router'}" in out
    picture = data.parent / "0.png"
    code, out, _ = command(
        *("generate", "--model", converted, "--prompt", "which", "--image", picture),
        *("--tokens", "auto", "--max-new-tokens", "2"),
    )
    assert code == 0
    assert int(rows(out)[0][0]) in (4, 16)
    model, processor = load_model(converted)
    question = Conversation((Turn("user", "which"), Turn("assistant", "red")), "kind")
    sample = [Sample("a", (Image.open(picture),), (question,))]
    auto = resolve_count("auto", converted)
    report = evaluate(model, processor, sample, [4, auto], score="exact", max_new_tokens=2)
    assert report["vision_tokens_per_image"]["auto"] in (4, 16)
    assistant = Assistant(converted, "auto")
    (reply,) = assistant.reply([ask(picture, "which")], max_new_tokens=2)
    assert reply.vision_tokens in (4, 16)


def ask(picture: Path, question: str) -> list[dict]:
    parts = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def test_a_harness_gets_the_answers_of_generate(converted, pictures):
    assistant = Assistant(converted, 16)
    asked = [ask(pictures / "0.png", "which colour"), ask(pictures / "1.png", "where is this")]
    asked.append([{"role": "user", "content": [{"type": "text", "text": "which"}]}])
    together = assistant.reply(asked, max_new_tokens=4)
    assert [reply.vision_tokens for reply in together] == [16, 16, 0]
    model, processor = assistant.model, assistant.processor
    for conversation, reply in zip(asked, together, strict=True):
        inputs = processor.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            num_image_tokens=16,
        )
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = new[0, inputs["input_ids"].shape[1] :]
        assert reply.text == processor.decode(new, skip_special_tokens=True).strip()
        assert reply.prompt_tokens == inputs["input_ids"].shape[1]


def test_train_writes_a_conversion(command, converted, data, tmp_path):  # noqa: F811
    values = {
        "output": str(tmp_path / "run"),
        "model": {"start": str(converted)},
        "data": {"name": "messages", "path": str(data)},
        "stages": [
            {
                "name": "projector",
                "steps": 2,
                "batch_size": 3,
                "learning_rate": {"projector": 0.001},
                "counts": [4, 16],
                "weights": [1, 1],
            }
        ],
        "workers": 0,
    }
    config = write_config(tmp_path / "c.yaml", values)
    code, out, _ = command("train", config, "--dry-run")
    assert code == 0
    assert "projector" in out
    assert command("train", config)[0] == 0
    model, processor = load_model(tmp_path / "run" / "checkpoint")
    assert model.config.trained_num_image_tokens == [4, 16]
    assert processor.num_image_tokens == 64


@pytest.mark.parametrize("adapters", [[], ["--lora", "2"]])
def test_convert_learns_the_stock_model_s_answers(
    command,  # noqa: F811
    stock,
    pictures,
    data,
    tmp_path,
    adapters,
):
    target = tmp_path / "distilled"
    arguments = [
        "convert",
        stock,
        target,
        "--images",
        pictures,
        "--tokens",
        "64",
        "--distill",
        data,
    ]
    arguments += ["--counts", "4,16", "--steps", "3", "--batch-size", "2", "--max-new-tokens", "2"]
    code, out, err = command(*arguments, *adapters)
    assert code == 0, err
    assert re.search(r"agreement with the stock model on \d+ questions", out)
    assert re.search(r"^ +4 +[\d.]+% -> +[\d.]+% ", out, re.MULTILINE)
    model, _ = load_model(target)
    assert model.config.trained_num_image_tokens == [4, 16]
    untrained, _ = from_pretrained(stock, num_image_tokens=64)
    query = "model.language_model.layers.0.self_attn.q_proj.weight"
    same = (model.state_dict()[query] == untrained.state_dict()[query]).all()
    assert bool(same) == (not adapters)


def test_options_of_a_distillation_reach_it(command, stock, pictures, data, tmp_path, monkeypatch):  # noqa: F811
    given = {}

    def distill(model, processor, samples, **options):
        given.update(options, samples=len(samples))
        agreement = Agreement(0.5, 0.5, 0.5)
        return DistillationReport({(4, 8): agreement}, {(4, 8): agreement}, 3, 1, 9)

    monkeypatch.setattr("tokenflex.dropin.distill", distill)
    arguments = ["convert", stock, tmp_path / "out", "--images", pictures, "--tokens", "4x8"]
    arguments += ["--distill", data, "--max-prompts", "4", "--steps", "7", "--batch-size", "3"]
    arguments += ["--learning-rate", "0.25", "--max-new-tokens", "5"]
    code, out, _ = command(*arguments)
    assert code == 0
    given.pop("on_progress")
    numbers = {"steps": 7, "batch_size": 3, "learning_rate": 0.25, "max_new_tokens": 5}
    assert given == {"samples": 4, "counts": None, **numbers}
    assert "4x8" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "--steps is for --distill"),
        (["--distill", "nowhere.json"], "nowhere.json"),
        (["--distill", "digits", "--counts", "7"], "perfect square"),
        (["--distill", "digits", "--image-folder", "x"], "--image-folder does not fit"),
    ],
)
def test_wrong_options_of_a_distillation_are_one_line(
    command,  # noqa: F811
    stock,
    pictures,
    tmp_path,
    arguments,
    message,
):
    code, _, err = command("convert", stock, tmp_path / "out", "--images", pictures, *arguments)
    assert code == 2
    assert message in "".join(err)
    assert not (tmp_path / "out").exists()
