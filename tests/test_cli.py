"""The command line: what it prints, what it writes, and one line for each mistake."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from experiments.ablation.runner import JobFailedError
from tests.models.tiny import picture, tiny_model
from tests.routing.planted import mark_some_right
from tests.training.runs import ROOT, metrics, temporary_files, tiny_values, write_config
from tokenflex import TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.cli import main
from tokenflex.data.samples import DataExhaustedError
from tokenflex.data.streaming import StreamError
from tokenflex.data.workers import WorkerDiedError
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.errors import ReportedError
from tokenflex.evaluation import evaluate
from tokenflex.locks import FolderInUseError, locked
from tokenflex.models.loading import load_checkpoint
from tokenflex.routing import training as router_training
from tokenflex.routing.storage import load_router, save_router
from tokenflex.training.checkpoint import save_model
from tokenflex.training.faults import NonFiniteLossError
from tokenflex.training.states import STATE_KEYS
from tokenflex_kernels import info

pytestmark = pytest.mark.usefixtures("own_accelerator_and_threads")

COMMANDS = (
    *("info", "train", "evaluate", "harness", "route", "generate", "convert", "ablate", "plot"),
    "serve",
    "play",
    "export",
    "init",
)
BAR = re.compile(r"\d+%\||\| \d+/\d+ \[")


@pytest.fixture
def command(capsys):
    """Runs a command: (exit code, stdout, lines of stderr without progress bars)."""

    def run(*arguments) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        out, errors = capsys.readouterr()
        parts = [part for part in re.split(r"[\r\n]", errors) if part.strip()]
        return code, out, [part for part in parts if not BAR.search(part)]

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    save_model(folder, tiny_model(), digits_processor(9))
    return folder


@pytest.fixture
def image(tmp_path) -> Path:
    picture(1).save(tmp_path / "image.png")
    return tmp_path / "image.png"


# ---- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_is_a_command(command, name, tmp_path, monkeypatch):
    code, out, _ = command(name, "--help")
    assert code == 0
    example = out.split("example:", 1)[1]
    assert f"tokenflex {name}" in example
    monkeypatch.chdir(tmp_path)  # where none of its files are

    def needs_no_files(*_, **__):
        raise ValueError("an ablation takes minutes")

    monkeypatch.setattr("experiments.ablation.run.ablate", needs_no_files)
    words = re.findall(r"'[^']*'|[^\s\\]+", example)[1:]
    _, _, errors = command(*(word.strip("'") for word in words))
    assert all("usage:" not in line for line in errors)


def test_help_lists_the_commands(command):
    code, out, _ = command("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


# ---- the registry of commands

NEW_COMMAND = """
def add_to(commands):
    commands.add("greet", lambda options: print("hello") or 0, "greet", "tokenflex greet")
"""


def test_a_command_is_one_file(tmp_path):
    """Of the package, or of a folder in experiments; ``common`` and others are none."""
    for package in ("tokenflex", "tokenflex_kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "tokenflex/cli/greet.py").write_text(NEW_COMMAND)
    (tmp_path / "experiments/farewell").mkdir(parents=True)
    for folder in ("experiments", "experiments/farewell"):
        (tmp_path / folder / "__init__.py").touch()
    farewell = NEW_COMMAND.replace("greet", "farewell").replace("hello", "goodbye")
    (tmp_path / "experiments/farewell/command.py").write_text(farewell)
    (tmp_path / "pyproject.toml").touch()
    assert package_alone(tmp_path, "greet").stdout == "hello\n"
    assert package_alone(tmp_path, "farewell").stdout == "goodbye\n"
    (tmp_path / "pyproject.toml").unlink()  # no clone of the repository
    assert package_alone(tmp_path, "farewell").returncode == 2


def package_alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line as a process that finds packages in ``folder``, and is elsewhere."""
    (folder / "elsewhere").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "tokenflex", *arguments],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder / "elsewhere",
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_the_package_alone_says_that_ablate_is_in_the_repository(tmp_path):
    for package in ("tokenflex", "tokenflex_kernels"):
        (tmp_path / package).symlink_to(ROOT / package)
    for arguments in (["ablate"], ["ablate", "--help"]):
        result = package_alone(tmp_path, *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert re.fullmatch(
            "tokenflex: ablate needs a clone of the repository, because .*\n", result.stderr
        )
    listed = package_alone(tmp_path, "--help").stdout
    assert "evaluate" in listed
    assert "ablate" not in listed
    options = ("route", "--model", ".", "--data", "digits", "--counts", "4,9")
    result = package_alone(tmp_path, *options, "--measure-on", "digits")
    assert result.returncode == 2
    assert "--measure-on needs a clone of the repository" in result.stderr


def test_ablate_is_found_from_any_folder(tmp_path):
    for name in ("tokenflex", "tokenflex_kernels", "experiments", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    result = package_alone(tmp_path, "ablate", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--quick" in result.stdout


def test_help_loads_none_of_the_libraries():
    program = (
        "import sys; from tokenflex.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'pydantic'} & {*sys.modules}\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


# ---- info


def test_info_as_json_is_what_the_kernels_say(command):
    code, out, errors = command("info", "--json")
    assert (code, errors) == (0, [])
    assert json.loads(out) == json.loads(json.dumps(info()))


def test_info_as_text_names_versions_device_and_ops(command):
    code, out, errors = command("info")
    assert (code, errors) == (0, [])
    for name, version in info()["versions"].items():
        assert re.search(rf"^{name}\s+{re.escape(version or 'not installed')}$", out, re.MULTILINE)
    for op, backend in info()["ops"].items():
        assert re.search(rf"^{op}\s+{backend}$", out, re.MULTILINE)
    assert info()["device"]["name"] in out


# ---- generate


def answers(out: str) -> dict[int, str]:
    """Vision tokens -> answer, from the table."""
    header, *rows = out.splitlines()
    assert header.split() == ["tokens", "first_s", "total_s", "answer"]
    table = {}
    for row in rows:
        tokens, first, total, *answer = row.split(maxsplit=3)
        assert 0 < float(first) <= float(total)
        table[int(tokens)] = answer[0] if answer else ""
    return table


def test_generate_answers_once_a_count(command, checkpoint, image):
    model, processor = tiny_model(), digits_processor()
    code, out, errors = command(
        *("generate", "--model", checkpoint, "--image", image, "--prompt", "read r1c1"),
        *("--tokens", "4,9,16", "--max-new-tokens", 5),
    )
    assert (code, errors) == (0, [])
    expected = {}
    for count in (4, 9, 16):
        inputs = processor(
            images=[Image.open(image)], text="<image> read r1c1", num_image_tokens=count
        )
        output = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        text = processor.tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        expected[count] = " ".join(text.split())
    assert {count: " ".join(answer.split()) for count, answer in answers(out).items()} == expected


def test_generate_answers_several_prompts_as_each_alone(command, checkpoint, image):
    base = ("generate", "--model", checkpoint, "--image", image, "--tokens", "4,9")
    base = (*base, "--max-new-tokens", 3)
    prompts = ("read r1c1", "odd <image> odd")
    alone = [command(*base, "--prompt", prompt)[1].splitlines() for prompt in prompts]
    _, together, _ = command(*base, "--prompt", prompts[0], "--prompt", prompts[1])
    title, *rows = [line.split() for line in together.splitlines()]
    assert title == ["prompt", "tokens", "first_s", "total_s", "answer"]
    expected = [line.split() for pair in zip(*alone, strict=True) for line in pair]
    assert [row[0] for row in rows] == ["1", "2", "1", "2"]
    assert [(row[1], row[4:]) for row in rows] == [(row[0], row[3:]) for row in expected[2:]]


def test_generate_uses_the_checkpoints_count_and_counts_all_images(command, checkpoint, image):
    base = ("generate", "--model", checkpoint, "--prompt", "odd", "--max-new-tokens", 1)
    assert list(answers(command(*base, "--image", image)[1])) == [9]
    two = command(*base, "--image", image, "--image", image, "--tokens", "4")
    assert list(answers(two[1])) == [8]
    assert list(answers(command(*base)[1])) == [0]


def test_generate_shows_images_where_the_prompt_says(command, checkpoint, image):
    base = ("generate", "--model", checkpoint, "--image", image, "--max-new-tokens", 3)
    named = answers(command(*base, "--prompt", "<image> odd", "--tokens", 4)[1])
    assert named == answers(command(*base, "--prompt", "odd", "--tokens", 4)[1])
    code, out, errors = command(*base, "--prompt", "<image> odd <image>", "--tokens", 4)
    assert (code, out) == (2, "")
    assert "got 2 (per prompt [2]) for 1 images" in errors[-1]


def test_generate_answers_about_a_video(command, checkpoint, image, tmp_path):
    """Its frames are images, where the prompt says or before it."""
    frames = []
    for i in range(5):
        frames.append(tmp_path / f"{i}.png")
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(frames[-1])
    first, *rest = [Image.open(path) for path in frames]
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, lossless=True)
    base = ("generate", "--model", checkpoint, "--max-new-tokens", 3, "--tokens", "4,9")
    video = (*base, "--video", tmp_path / "a.webp", "--frames", 3)
    chosen = [word for i in (0, 2, 4) for word in ("--image", frames[i])]
    _, out, errors = command(*video, "--prompt", "odd")
    assert errors == []
    shown = answers(out)
    assert shown == answers(command(*base, *chosen, "--prompt", "odd")[1])
    assert [*shown] == [12, 27]
    _, out, _ = command(*video, "--image", image, "--prompt", "odd <video> and <image>")
    marked = ("--image", image, "--prompt", "odd <image><image><image> and <image>")
    assert answers(out) == answers(command(*base, *chosen, *marked)[1])
    assert [*answers(out)] == [16, 36]
    for wrong, words in (
        (("--frames", 3, "--prompt", "odd"), "--frames is for --video"),
        (("--video", tmp_path / "none.gif", "--prompt", "odd"), "does not exist"),
        (("--video", frames[0], "--prompt", "odd"), "neither a GIF"),
        (("--video", tmp_path / "a.webp", "--prompt", "<video><video>"), "for 1 videos"),
    ):
        code, _, errors = command(*base, *wrong)
        assert code == 2
        assert words in errors[0]


def test_frames_are_those_of_the_checkpoint_or_the_option(command, checkpoint, tmp_path):
    frames = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(6)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    saved = json.loads((copy / "processor_config.json").read_text())
    base = ("generate", "--model", copy, "--max-new-tokens", 1, "--tokens", 1, "--prompt", "odd")
    for keys, words, shown in (
        ({}, (), 6),
        ({"fps": 5}, (), 3),
        ({"max_frames": 2}, (), 2),
        ({"fps": 5, "max_frames": 2}, ("--fps", 10, "--frames", 4), 4),
    ):
        (copy / "processor_config.json").write_text(json.dumps({**saved, **keys}))
        _, out, errors = command(*base, "--video", tmp_path / "a.gif", *words)
        assert [*answers(out)] == [shown], errors

    turns = [{"role": "user", "content": "<video> odd"}, {"role": "assistant", "content": "3"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"video": "a.gif", "messages": turns}))
    evaluate = ("evaluate", checkpoint, "--data", tmp_path / "data.jsonl", "--counts", 4)
    for words, shown in (((), 6), (("--max-frames", 2), 2), (("--fps", 5), 3)):
        report = tmp_path / "report.json"
        code, _, errors = command(*evaluate, *words, "--output", report)
        assert code == 0, errors
        tokens = json.loads(report.read_text())["vision_tokens_per_question"]
        assert tokens == {"4": 4.0 * shown}
    evaluate = ("evaluate", copy, "--data", tmp_path / "data.jsonl", "--counts", 4)
    for keys, words, shown in (
        ({"fps": 5}, (), 3),
        ({"max_frames": 2}, (), 2),
        ({"fps": 5, "max_frames": 2}, ("--fps", 10, "--max-frames", 4), 4),
    ):
        (copy / "processor_config.json").write_text(json.dumps({**saved, **keys}))
        code, _, errors = command(*evaluate, *words, "--output", report)
        assert code == 0, errors
        tokens = json.loads(report.read_text())["vision_tokens_per_question"]
        assert tokens == {"4": 4.0 * shown}
    (copy / "processor_config.json").write_text(json.dumps({**saved, "fps": "many"}))
    code, _, errors = command(*evaluate)
    assert code == 2
    assert "processor_config.json must hold a rule for frames: fps must be a number" in errors[0]


def test_generate_takes_grids_of_unequal_sides(command, checkpoint, image):
    base = ("generate", "--model", checkpoint, "--image", image, "--prompt", "odd")
    code, out, _ = command(*base, "--tokens", "4,2x3,1x5", "--max-new-tokens", 1)
    assert code == 0
    assert list(answers(out)) == [4, 6, 5]


def test_generate_cuts_images_as_it_is_told(command, checkpoint, tmp_path):
    picture(1, (64, 96)).save(tmp_path / "wide.png")
    base = ("generate", "--model", checkpoint, "--image", tmp_path / "wide.png", "--prompt", "odd")
    options = ("--tokens", "1,4", "--max-new-tokens", 1)
    assert list(answers(command(*base, *options)[1])) == [1, 4]
    assert list(answers(command(*base, *options, "--max-tiles", 6)[1])) == [6, 24]
    code, _, (error,) = command(*base, "--tokens", 64, "--max-tiles", 6)
    assert (code, "256 positions, got 384" in error) == (2, True)


def test_generate_warns_of_untrained_counts_in_a_line(command, tmp_path, image):
    save_model(tmp_path / "c", tiny_model(trained_num_image_tokens=[4, 9]), digits_processor(9))
    base = ("generate", "--model", tmp_path / "c", "--image", image, "--prompt", "odd")
    assert command(*base, "--tokens", "4,9")[2] == []
    with pytest.warns(UserWarning, match="asks for 16"):
        command(*base, "--tokens", "4,16")


def test_generate_asks_with_the_tokens_that_training_saw(command, tmp_path, image, monkeypatch):
    """A template that writes <bos> and a tokenizer that adds one: still one."""
    base = digits_processor()
    tokenizer = base.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    tokenizer.chat_template = "<bos> " + tokenizer.chat_template
    processor = TokenFlexProcessor(base.image_processor, tokenizer, num_image_tokens=1)
    save_model(tmp_path / "checkpoint", tiny_model(), processor)
    asked = []

    def generate(self, input_ids, **_):
        asked.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr(TokenFlexForConditionalGeneration, "generate", generate)
    code, _, errors = command(
        "generate", "--model", tmp_path / "checkpoint", "--image", image, "--prompt", "odd"
    )
    assert (code, errors) == (0, [])
    assert tokenizer.convert_ids_to_tokens(asked[-1]) == ["<bos>", "<image>", "odd"]


# ---- counts chosen automatically


@pytest.fixture
def few_steps(monkeypatch) -> None:
    """Routers of these tests need not be good, and random models answer nothing right."""
    monkeypatch.setattr(router_training, "STEPS", 100)
    mark_some_right(monkeypatch)


@pytest.fixture
def routed(command, tmp_path, few_steps) -> Path:
    """A checkpoint with a router made by the command."""
    save_model(tmp_path / "c", tiny_model(), digits_processor(9))
    code, out, errors = command(
        *("route", "--model", tmp_path / "c", "--data", "digits", "--counts", "4,9,16"),
        *("--size", 6, "--batch-size", 4),
    )
    assert (code, errors) == (0, [])
    (tmp_path / "out.txt").write_text(out)
    return tmp_path / "c"


def test_route_leaves_a_router_a_report_and_a_plot_beside_the_weights(routed):
    report = json.loads((routed / "router" / "report.json").read_text())
    assert load_router(routed).counts == (4, 9, 16)
    assert report["counts"] == ["4", "9", "16"]
    assert report["questions"] + report["held_out_questions"] == 48
    assert report["penalty"] == load_router(routed).penalty
    out = (routed.parent / "out.txt").read_text()
    measured = evaluate(tiny_model(), digits_processor(), DigitsDataset("test", size=6), [4, 9, 16])
    always = [point for point in report["curve"] if point["selector"] == "always"]
    for point in always:
        assert point["accuracy"] == pytest.approx(measured["accuracy"][point["setting"]])
        assert re.search(rf"^always +{point['setting']} +{point['accuracy']:.3f} ", out, re.M)
    assert (routed / "router" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    load_checkpoint(routed)  # still one, and the router is no part of what convert reads


def test_generate_chooses_with_the_router(command, routed, image):
    base = ("generate", "--model", routed, "--image", image, "--prompt", "odd")
    base = (*base, "--max-new-tokens", 1, "--tokens")
    assert list(answers(command(*base, "auto", "--penalty", 100)[1])) == [4]
    code, out, errors = command(*base, "16,auto,9")
    assert (code, errors) == (0, [])
    assert len(out.splitlines()) == 4
    assert {int(line.split()[0]) for line in out.splitlines()[1:]} <= {4, 9, 16}


def test_generate_spreads_a_budget_over_the_images_of_the_prompt(
    command, checkpoint, routed, image, tmp_path
):
    """With a router, and without one by detail among the counts of training."""
    save_model(tmp_path / "t", tiny_model(trained_num_image_tokens=[4, 9, 16]), digits_processor(9))
    for folder in (routed, tmp_path / "t"):
        two = ("generate", "--model", folder, "--image", image, "--image", image)
        base = (*two, "--prompt", "odd", "--max-new-tokens", 1, "--tokens")
        assert list(answers(command(*base, "auto", "--budget", 8)[1])) == [8]
        code, out, errors = command(*base, "auto,16", "--budget", 26)
        assert (code, errors) == (0, [])
        auto, largest = answers(out)
        assert (largest, auto in (8, 13, 18, 20, 25)) == (32, True)
        assert_one_line(command(*base, "auto", "--budget", 7), "at least 8", "got 7")
        assert command(*base, "auto", "--budget", 7)[1] == ""  # not even the table's head
    # by detail more is never worth less: 9 and 16, or 16 and 9
    base = ("generate", "--model", tmp_path / "t", "--image", image, "--image", image)
    out = command(*base, "--prompt", "odd", "--tokens", "auto", "--budget", 26)[1]
    assert list(answers(out)) == [25]


def test_generate_escalates_until_it_is_sure(command, image, tmp_path):
    """All tries are counted; what is not tried again is the smallest count's answer."""
    save_model(tmp_path / "t", tiny_model(trained_num_image_tokens=[4, 9, 16]), digits_processor(9))
    base = ("generate", "--model", tmp_path / "t", "--image", image, "--image", image)
    base = (*base, "--prompt", "odd", "--max-new-tokens", 3, "--tokens")
    by_count = answers(command(*base, "4,16")[1])
    for confidence, tokens, tries in ((0, 8, 8), (1, 32, 58)):
        code, out, errors = command(*base, "auto", "--confidence", confidence)
        assert (code, errors) == (0, [])
        header, row = out.splitlines()
        assert header.split() == ["tokens", "all", "first_s", "total_s", "answer"]
        assert [int(cell) for cell in row.split()[:2]] == [tokens, tries]
        assert " ".join(row.split()[4:]) == " ".join(by_count[tokens].split())


def test_a_budget_is_what_a_prompt_may_be_long(command, image, tmp_path):
    """256 positions: the largest count would not fit, what the budget leaves of it does."""
    trained = tiny_model(trained_num_image_tokens=[4, 400])
    save_model(tmp_path / "t", trained, digits_processor(9))
    base = ("generate", "--model", tmp_path / "t", "--image", image, "--prompt", "odd")
    base = (*base, "--tokens", "auto", "--max-new-tokens", 1)
    assert list(answers(command(*base, "--budget", 200)[1])) == [4]
    assert_one_line(command(*base, "--budget", 300), "256 positions, got 300")
    assert_one_line(command(*base, "--confidence", 0.5), "256 positions, got 400")


def test_evaluate_takes_the_penalty_of_auto(command, routed, tmp_path):
    router = load_router(routed)
    router.calibration = ((0.0, -3.0), (0.0, 0.0), (0.0, 3.0))  # the largest is the surest
    save_router(router, routed, {})
    base = ("evaluate", routed, "--data", "digits", "--size", 2, "--counts", "auto,4")
    tokens = {}
    for penalty in (0, 100):
        code, _, errors = command(*base, "--penalty", penalty, "--output", tmp_path / "out")
        assert (code, errors) == (0, [])
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["penalty"] == penalty
        title = (tmp_path / "out" / "report.md").read_text().splitlines()[0]
        assert title == f"# c on digits, auto at a penalty of {penalty}"
        tokens[penalty] = report["vision_tokens_per_question"]["auto"]
    assert tokens == {0: 16, 100: 4}


@pytest.mark.usefixtures("few_steps")
def test_route_on_own_data_measures_what_is_held_out(command, checkpoint, image, tmp_path):
    rows = [
        {
            "images": [image.name],
            "messages": [
                {"role": "user", "content": "odd"},
                {"role": "assistant", "content": str(i)},
            ],
        }
        for i in range(5)
    ]
    rows.append({"messages": rows[0]["messages"]})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    base = ("route", "--model", folder, "--data", data, "--counts", "4,16")
    code, out, errors = command(*base)
    assert (code, errors) == (0, [])
    assert "on 1 held-out sample, auto costs" in out
    assert "questions without an image, left out because no count applies to them: 1\n" in out
    assert "curve" not in json.loads((folder / "router" / "report.json").read_text())
    code, out, _ = command(*base, "--measure-on", data)
    assert (code, "oracle" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--tokens", "auto"), "has no router to choose counts with; make one with"),
        (("generate", "--tokens", "4", "--penalty", 0.1), "--penalty is for --tokens auto"),
        (("generate", "--tokens", "4", "--budget", 9), "--budget is for --tokens auto"),
        (("generate", "--confidence", 0.5), "--confidence is for --tokens auto"),
        (("generate", "--tokens", "auto", "--budget", 9, "--penalty", 0), "not allowed with"),
        (("generate", "--tokens", "auto", "--budget", 9, "--confidence", 1), "not allowed with"),
        (("generate", "--tokens", "auto", "--confidence", 1, "--penalty", 0), "not allowed with"),
        (("generate", "--tokens", "auto", "--confidence", 1.2), "from 0 to 1, got 1.2"),
        (("generate", "--tokens", "auto", "--confidence", "nan"), "from 0 to 1, got nan"),
        (("generate", "--tokens", "auto", "--confidence", "high"), "a number, got 'high'"),
        (("generate", "--tokens", "auto", "--budget", 0), "at least 1, got 0"),
        (("generate", "--tokens", "auto", "--budget", 9), "config.trained_num_image_tokens must"),
        (("evaluate", "--data", "digits", "--counts", "4", "--penalty", 1), "for the count auto"),
        (("generate", "--tokens", "4,best"), "got 'best' in '4,best'"),
        (("route", "--data", "digits", "--counts", "4"), "counts must be two or more"),
        (("route", "--data", "digits", "--counts", "4,16", "--max-drop", 2), "max_drop must be"),
        (("route", "--data", "none.jsonl", "--counts", "4,16"), "none.jsonl does not exist"),
        (("route", "--data", "reading", "--counts", "4,16"), "0 at 4, 0 at 16 of 16 right: are"),
    ],
)
def test_mistakes_with_auto_are_one_line(command, checkpoint, image, arguments, message):
    name, *others = arguments
    asked = ("--image", image, "--prompt", "odd") if name == "generate" else ("--size", 2)
    code, out, errors = command(name, "--model", checkpoint, *asked, *others)
    assert (code, out, len(errors)) == (2, "", 1)
    assert re.search(message, errors[0])


# ---- evaluate and plot


def without_seconds(report: dict) -> dict:
    return {key: value for key, value in report.items() if not key.endswith("seconds")}


@pytest.mark.parametrize("by_name", [False, True])
def test_evaluate_prints_and_writes_the_report(command, checkpoint, tmp_path, by_name):
    folder = tmp_path / "new" / "folder"
    model = ("--model", checkpoint) if by_name else (checkpoint,)
    code, out, errors = command(
        *("evaluate", *model, "--data", "digits", "--size", 5),
        *("--counts", "4,2x3,9", "--batch-size", 2, "--output", folder),
    )
    assert (code, errors) == (0, [])
    dataset = DigitsDataset("test", size=5)
    expected = evaluate(tiny_model(), digits_processor(), dataset, [4, (2, 3), 9])
    report = json.loads((folder / "report.json").read_text())
    assert without_seconds(report) == without_seconds(expected)
    page = (folder / "report.md").read_text()
    rows = {**expected["accuracy_by_kind"], "mean": expected["accuracy"]}
    for kind, row in rows.items():
        cells = [f"{row[count]:.3f}" for count in ("4", "2x3", "9")]
        assert re.search(rf"^{kind}\s+{cells[0]}\s+{cells[1]}\s+{cells[2]}$", out, re.MULTILINE)
        assert f"| {kind} | {' | '.join(cells)} |" in page
    errors_ = [f"{expected['standard_error'][count]:.3f}" for count in ("4", "2x3", "9")]
    assert re.search(rf"^standard error\s+{errors_[0]}\s+{errors_[1]}\s+{errors_[2]}$", out, re.M)
    assert re.search(r"^tokens/image\s+4\.0\s+6\.0\s+9\.0$", out, re.MULTILINE)
    assert "40 questions about 5 samples" in out
    assert "40 questions about 5 samples" in page
    with Image.open(folder / "accuracy.png") as drawn:
        assert drawn.size[0] > 500
    assert temporary_files(folder) == []


def test_evaluate_of_baselines(command, checkpoint, tmp_path):
    """Their figure goes with the report that has them, and ``plot`` draws it again."""
    folder = tmp_path / "report"
    base = ("evaluate", checkpoint, "--data", "digits", "--size", 2, "--counts", "4,16")
    code, out, errors = command(*base, "--baselines", "--output", folder)
    assert (code, errors) == (0, [])
    report = json.loads((folder / "report.json").read_text())
    page = (folder / "report.md").read_text()
    for method, row in report["baselines"]["accuracy"].items():
        assert re.search(rf"^{method}\s+{row['4']:.3f}$", out, re.MULTILINE)
        assert f"| {method} | {row['4']:.3f} |" in page
    assert "difficult questions: right at 16 tokens" in out
    assert "(baselines.png)" in page
    (folder / "baselines.png").unlink()
    assert command("plot", folder)[0] == 0
    assert (folder / "baselines.png").is_file()
    assert command(*base, "--output", folder)[0] == 0
    assert not (folder / "baselines.png").exists()
    assert "(baselines.png)" not in (folder / "report.md").read_text()


@pytest.mark.parametrize("counts", ["4", "4,2x2"])
def test_baselines_need_a_smaller_count_before_the_work(command, checkpoint, monkeypatch, counts):
    monkeypatch.setattr(TokenFlexForConditionalGeneration, "from_pretrained", None)
    base = ("evaluate", checkpoint, "--data", "digits", "--size", 2, "--counts", counts)
    assert_one_line(command(*base, "--baselines"), "larger one", *counts.split(","))


def test_evaluate_writes_the_report_alone_to_a_json_file(command, checkpoint, tmp_path):
    path = tmp_path / "new" / "report.json"
    base = ("evaluate", checkpoint, "--data", "digits", "--size", 1, "--counts", 4)
    assert command(*base, "--output", path)[0] == 0
    assert list(json.loads(path.read_text())["accuracy"]) == ["4"]
    assert [*path.parent.iterdir()] == [path]


def data_of(tmp_path: Path, form: str) -> Path:
    """The same question about the same picture, in one of the formats."""
    picture(1).save(tmp_path / "image.png")
    turns = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
    if form == "messages":
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps({"images": ["image.png"], "messages": turns}))
    elif form == "llava":
        path = tmp_path / "data.json"
        said = [{"from": "human", "value": "<image>odd"}, {"from": "gpt", "value": "3"}]
        path.write_text(json.dumps([{"image": "image.png", "conversations": said}]))
    else:
        datasets = pytest.importorskip("datasets")
        path = tmp_path / "data"
        features = datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "messages": datasets.List(
                    {"role": datasets.Value("string"), "content": datasets.Value("string")}
                ),
            }
        )
        rows = {"images": [[picture(1)]], "messages": [turns]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(path)
    return path


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("form", ["messages", "llava", "huggingface"])
def test_evaluate_on_own_data_of_any_format(command, checkpoint, tmp_path, form, named):
    data = data_of(tmp_path, form)
    options = ("--format", form) if named else ()
    code, out, errors = command("evaluate", checkpoint, "--data", data, "--counts", "4", *options)
    assert code == 0, errors
    assert "1 questions about 1 samples" in out
    assert re.search(r"^mean\s+[01]\.000$", out, re.MULTILINE)


def with_broken_records(path: Path) -> Path:
    """The record one a line, after a byte-order mark, twice and in three broken forms."""
    content = path.read_text()
    good = json.dumps(json.loads(content)[0]) if content[0] == "[" else content
    lines = [
        good,
        "{",
        good.replace("image.png", "none.png"),
        good.replace("odd", "<image> <image>"),
    ]
    path.write_text("\ufeff" + "\r\n".join([*lines, "", good]) + "\r\n")
    return path


@pytest.mark.parametrize("form", ["messages", "llava"])
def test_evaluate_leaves_out_and_names_broken_samples(command, checkpoint, tmp_path, form):
    data = with_broken_records(data_of(tmp_path, form))
    base = ("evaluate", checkpoint, "--data", data, "--counts", "4")
    with pytest.warns(UserWarning, match="left out") as warned:
        code, out, _ = command(*base, "--output", tmp_path / "report.json")
    assert (code, "2 questions about 2 samples" in out) == (0, True)
    times = 2 if form == "messages" else 3
    named = [":2 is not JSON", "none.png", f":4: messages hold <image> {times} times"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {one["index"] for one in report["broken_samples"]} == {1, 2, 3}
    for word in named:
        assert any(word in str(warning.message) for warning in warned)
        assert any(word in one["reason"] for one in report["broken_samples"])
    assert command(*base, "--max-broken-samples", 2)[0] == 2  # of which one is found on the way
    with pytest.warns(UserWarning, match="left out"):
        code, _, errors = command(*base, "--max-broken-samples", 1)
    assert (code, "2 broken samples are more than" in errors[-1]) == (2, True)


@pytest.mark.parametrize("form", ["messages", "llava"])
def test_images_outside_of_the_datas_folder_are_read_where_that_is_asked_for(
    command, checkpoint, tmp_path, form
):
    data = data_of(tmp_path, form)
    (tmp_path / "elsewhere").mkdir()
    moved = data.rename(tmp_path / "elsewhere" / data.name)
    base = ("evaluate", checkpoint, "--data", moved, "--counts", "4")
    for options in ((), ("--image-folder", tmp_path / "elsewhere")):
        assert command(*base, *options)[0] == 2  # there is no such image
    assert command(*base, "--image-folder", tmp_path)[0] == 0
    moved.write_text(moved.read_text().replace("image.png", "../image.png"))
    result = command(*base)
    assert_one_line(result, "is outside of the data's folder", "allow_outside")
    assert command(*base, "--allow-outside")[0] == 0


@pytest.mark.parametrize("command_name", ["evaluate", "route"])
def test_what_digits_have_no_images_for_is_refused(command, checkpoint, command_name):
    base = (command_name, "--model", checkpoint, "--data", "digits", "--counts", "4,9")
    assert_one_line(command(*base, "--allow-outside"), "--allow-outside", "digits")
    assert_one_line(command(*base, "--image-folder", "x"), "--image-folder", "digits")


def test_evaluate_scores_what_the_model_says(command, checkpoint, tmp_path, monkeypatch):
    base = ("evaluate", checkpoint, "--data", data_of(tmp_path, "messages"), "--counts", "4")
    said = digits_processor().tokenizer("3 7", add_special_tokens=False)["input_ids"]

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([said])], 1)

    monkeypatch.setattr(TokenFlexForConditionalGeneration, "generate", generate)
    means = {}
    for score in ("exact", "contains"):
        code, out, _ = command(*base, "--score", score)
        assert code == 0
        means[score] = re.search(r"^mean\s+(\S+)$", out, re.MULTILINE)[1]
    assert means == {"exact": "0.000", "contains": "1.000"}


def test_evaluate_that_is_interrupted_leaves_nothing_half_done(
    command, checkpoint, tmp_path, monkeypatch
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenFlexForConditionalGeneration, "forward", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        result = command(
            *("evaluate", checkpoint, "--data", "digits", "--size", 2, "--counts", "4"),
            *("--output", tmp_path / "out"),
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    assert_one_line(result, "interrupted")
    assert [*(tmp_path / "out").iterdir()] == []


REPORT = {
    "accuracy": {"4": 0.25, "9": 0.5, "16": 0.75},
    "accuracy_by_kind": {
        "read": {"4": 0.1, "9": 0.4, "16": 0.7},
        "odd": {"4": 0.4, "9": 0.6, "16": 0.8},
    },
}


@pytest.mark.parametrize("counts", [["4"], ["4", "16"], ["4", "9", "16"]])
def test_plot_draws_the_report(command, tmp_path, counts):
    report = {
        "accuracy": {c: REPORT["accuracy"][c] for c in counts},
        "accuracy_by_kind": {
            kind: {c: row[c] for c in counts} for kind, row in REPORT["accuracy_by_kind"].items()
        },
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    code, out, errors = command("plot", tmp_path)
    assert (code, errors) == (0, [])
    assert out.strip() == str(tmp_path / "accuracy.png")
    with Image.open(tmp_path / "accuracy.png") as drawn:
        assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert temporary_files(tmp_path) == []


def test_plot_without_kinds(command, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"accuracy": {"4": 0.5}}))
    assert command("plot", tmp_path)[0] == 0


# ---- train


def test_train_writes_everything_to_the_output_it_was_given(command, tmp_path):
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "unused"))
    code, out, errors = command("train", config, "--output", tmp_path / "there")
    assert (code, errors) == (0, [])
    assert not (tmp_path / "unused").exists()
    assert {path.name for path in (tmp_path / "there").iterdir()} == {
        "accuracy.png",
        "checkpoint",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "report.json",
    }
    assert len(metrics(tmp_path / "there")) == 10
    assert "mean" in out
    assert str(tmp_path / "there") in out


# ---- mistakes


def broken_checkpoint(checkpoint: Path, tmp_path: Path, name: str, content: bytes | None) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return folder


def assert_one_line(result: tuple[int, str, list[str]], *words: str) -> None:
    code, out, errors = result
    assert len(errors) == 1, errors
    assert code == 2
    assert errors[0].startswith("tokenflex")
    assert "Traceback" not in errors[0]
    assert 'File "' not in errors[0]
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in out


def test_missing_configuration(command, tmp_path):
    assert_one_line(command("train", tmp_path / "none.yaml"), "none.yaml", "does not exist")


def test_unknown_key(command, tmp_path):
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "run", sede=3))
    assert_one_line(command("train", config), "run.yaml", "sede", "3", "seed")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hiden_size", 99, ["hiden_size", "99", "hidden_size"]),
        ("hidden_size", "x", ["hidden_size", "x"]),
        ("model_type", ["a"], ["model_type", "['a']"]),
    ],
)
def test_bad_field_of_a_part(command, tmp_path, key, value, words):
    """transformers itself would keep a misspelt field and build the default."""
    values = tiny_values(tmp_path / "run")
    values["model"]["text"]["config"][key] = value
    config = write_config(tmp_path / "run.yaml", values)
    assert_one_line(command("train", config), *words)
    assert not (tmp_path / "run").exists()


def test_evaluation_data_that_is_missing_is_known_before_training(command, tmp_path):
    values = tiny_values(tmp_path / "run")
    values["evaluation"]["data"] = {"name": "messages", "path": str(tmp_path / "none.jsonl")}
    config = write_config(tmp_path / "run.yaml", values)
    assert_one_line(command("train", config), "none.jsonl", "does not exist")
    assert not (tmp_path / "run").exists()


def test_fresh_keeps_the_old_state_until_the_new_run_can_begin(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"precious")
    values = tiny_values(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))  # so the folder is a run's
    values["data"] = {"name": "messages", "path": str(tmp_path / "none.jsonl")}
    config = write_config(tmp_path / "run.yaml", values)
    assert_one_line(command("train", config, "--fresh"), "none.jsonl")
    assert (tmp_path / "run" / "state.pt").read_bytes() == b"precious"


def test_a_count_beyond_the_language_models_positions(command, tmp_path, checkpoint):
    image = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(image)
    ask = ("generate", "--model", checkpoint, "--image", image, "--prompt", "odd")
    assert_one_line(command(*ask, "--tokens", "4,100000000"), "100000000", "positions")


def test_model_type_that_is_unknown(command, tmp_path):
    values = tiny_values(tmp_path / "run")
    values["model"]["vision"]["config"]["model_type"] = "no-such-encoder"
    config = write_config(tmp_path / "run.yaml", values)
    assert_one_line(command("train", config), "no-such-encoder")


def test_state_of_another_run(command, tmp_path):
    (tmp_path / "run").mkdir()
    state = dict.fromkeys(STATE_KEYS, 0) | {"config": "another"}
    torch.save(state, tmp_path / "run" / "state.pt")
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "run"))
    assert_one_line(command("train", config), "state.pt", "--fresh")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_in_the_data(command, tmp_path, workers):
    turns = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"images": ["bad.png"], "messages": turns}))
    (tmp_path / "bad.png").write_text("not an image")
    values = tiny_values(
        tmp_path / "run",
        data={"name": "messages", "path": str(tmp_path / "data.jsonl")},
        encoder_warm_up=None,
        evaluation=None,
        workers=workers,
    )
    result = command("train", write_config(tmp_path / "run.yaml", values))
    assert_one_line(result, "bad.png")


@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_missing_checkpoint_folder(command, tmp_path, name):
    rest = {
        "evaluate": ("--data", "digits", "--counts", "4"),
        "generate": ("--prompt", "odd"),
    }[name]
    assert_one_line(command(name, "--model", tmp_path / "none", *rest), "none", "does not exist")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b'{"model_type": "llava"}', ["stock llava", "tokenflex convert"]),
        ("config.json", b'{"model_type": "bert"}', ["TokenFLEX", "tokenflex convert", "'bert'"]),
        ("config.json", b"[1]", ["config.json", "None"]),
        ("config.json", b"{", ["config.json", "JSON"]),
        ("config.json", b'{"model_type": "tokenflex"}', ["config.json", "vision_config"]),
        ("generation_config.json", b'{"eos', ["generation_config.json", "JSON"]),
        ("tokenizer.json", b"{}", ["broken"]),
        ("tokenizer_config.json", b"[1]", ["broken"]),
        ("chat_template.jinja", b"{% for m in", ["chat_template"]),
        ("config.json", None, ["config.json", "does not exist"]),
        ("model.safetensors", b"", ["model.safetensors"]),
        ("model.safetensors", b"hello", ["model.safetensors"]),
        ("model.safetensors", None, ["safetensors"]),
        ("tokenizer.json", b"{", ["broken"]),
    ],
)
def test_a_broken_checkpoint(command, checkpoint, tmp_path, name, content, words):
    folder = broken_checkpoint(checkpoint, tmp_path, name, content)
    assert_one_line(command("generate", "--model", folder, "--prompt", "odd"), *words)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_weights(command, checkpoint, tmp_path, share):
    content = (checkpoint / "model.safetensors").read_bytes()
    folder = broken_checkpoint(
        checkpoint, tmp_path, "model.safetensors", content[: int(share * len(content))]
    )
    result = command("generate", "--model", folder, "--prompt", "odd")
    assert_one_line(result, "model.safetensors")


def test_weights_of_another_architecture(command, checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    other = tiny_model("llama", "clip")
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    result = command("generate", "--model", folder, "--prompt", "odd")
    assert_one_line(result, "broken")
    assert "above" not in result[2][0]  # transformers points to a report that is not shown


@pytest.mark.parametrize(
    ("name", "content"), [("text.png", b"hello"), ("empty.png", b""), ("none.png", None)]
)
def test_an_image_that_is_none(command, checkpoint, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = command(
        "generate", "--model", checkpoint, "--image", tmp_path / name, "--prompt", "odd"
    )
    assert_one_line(result, name)


def test_more_marks_than_images(command, checkpoint):
    result = command("generate", "--model", checkpoint, "--prompt", "<image> odd")
    assert_one_line(result, "1", "0 images")


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        ("generate", "--tokens", "10", ["10", "9 and 16"]),
        ("generate", "--tokens", "4,many", ["4,many"]),
        ("generate", "--tokens", "4,2x", ["4,2x", "2x3"]),
        ("generate", "--tokens", "2x3x4", ["2x3x4"]),
        ("generate", "--tokens", "2x0", ["2, 0"]),
        ("evaluate", "--counts", "2x3x4", ["2x3x4"]),
        ("evaluate", "--counts", "4,4", ["differ", "4, 4"]),
        ("evaluate", "--score", "rouge", ["rouge", "contains"]),
        ("evaluate", "--format", "parquet", ["parquet", "messages"]),
        ("evaluate", "--format", "mixture", ["mixture", "messages"]),
        ("evaluate", "--split", "dev", ["dev", "validation"]),
        ("evaluate", "--image-folder", "images", ["--image-folder", "digits"]),
        ("evaluate", "--workers", "-1", ["workers", "-1"]),
        ("generate", "--tokens", "0", ["0"]),
        ("generate", "--max-new-tokens", "0", ["0"]),
        ("evaluate", "--counts", "4,12", ["12", "9 and 16"]),
        ("evaluate", "--batch-size", "none", ["none"]),
    ],
)
def test_an_option_that_is_not_allowed(command, checkpoint, name, option, value, words):
    rest = {
        "evaluate": ("--data", "digits", *(() if option == "--counts" else ("--counts", "4"))),
        "generate": ("--prompt", "odd"),
    }[name]
    assert_one_line(command(name, "--model", checkpoint, *rest, option, value), *words)


def test_a_penalty_of_evaluate_is_refused_before_the_work(command, routed, monkeypatch):
    monkeypatch.setattr(TokenFlexForConditionalGeneration, "from_pretrained", None)
    base = ("evaluate", routed, "--data", "digits", "--size", 2, "--counts", "auto")
    assert_one_line(command(*base, "--penalty", -1), "penalty", "got -1")


def test_auto_asks_what_the_checkpoint_chooses_with(command, checkpoint, monkeypatch):
    """A stand-in for a router: 4 for a sample's first question, 9 for the seven others."""

    def choose_counts(
        model, input_ids, *, attention_mask, encoded_images, tiles_per_image, **options
    ):
        assert model.router == "the router"
        assert options == {"num_image_tokens": "auto", "penalty": None}
        placeholders = (input_ids == model.config.image_token_id).sum(1).tolist()
        assert placeholders == [1] * len(input_ids)
        assert len(encoded_images) == sum(tiles_per_image) == len(input_ids)
        assert attention_mask.sum(1).min() >= 2
        return {"num_image_tokens": [4] + [9] * (len(encoded_images) - 1)}

    def load_router(path):
        assert path == checkpoint
        return "the router"

    def attach_router(model, router):
        model.__dict__["router"] = router

    monkeypatch.setattr("tokenflex.routing.policies.auto.load_router", load_router)
    monkeypatch.setattr("tokenflex.routing.policies.auto.attach_router", attach_router)
    monkeypatch.setattr("tokenflex.routing.selector.choose_counts", choose_counts)
    base = ("evaluate", checkpoint, "--data", "digits", "--size", 2)
    code, out, errors = command(*base, "--counts", "auto,4")
    assert (code, errors) == (0, [])
    assert re.search(r"^vision tokens\s+auto\s+4$", out, re.MULTILINE)
    chosen = defaultdict(list)  # by kind
    for i in range(2):
        for place, conversation in enumerate(DigitsDataset("test", size=2)[i].conversations):
            chosen[conversation.kind].append(9 if place else 4)
    mean = np.mean([np.mean(counts) for counts in chosen.values()])
    assert re.search(rf"^tokens/image\s+{mean:.1f}\s+4\.0$", out, re.MULTILINE)


@pytest.mark.parametrize("models", [0, 2])
def test_evaluate_wants_one_model(command, checkpoint, models):
    given = (checkpoint, "--model", checkpoint) if models else ()
    assert_one_line(command("evaluate", *given, "--data", "digits", "--counts", 4), "MODEL")


def test_evaluate_names_the_splits_that_there_are(command, checkpoint, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    result = command("evaluate", checkpoint, "--data", tmp_path / "data", "--counts", 4)
    assert_one_line(result, "split 'test'")


def test_missing_data_file(command, checkpoint, tmp_path):
    result = command(
        "evaluate", "--model", checkpoint, "--data", tmp_path / "none.jsonl", "--counts", "4"
    )
    assert_one_line(result, "none.jsonl", "does not exist")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "does not exist"),
        ("{", "not JSON"),
        pytest.param("[" * 100_000 + "]" * 100_000, "too deeply", id="deep"),
        pytest.param('{"accuracy": ' + "9" * 5000 + "}", "digits", id="digits"),
        ("{}", "accuracy"),
        ("[1]", "report"),
        ('{"accuracy": {"many": 0.5}}', "many"),
        ('{"accuracy": {"4": [0.5]}}', "accuracy"),
        ('{"accuracy": {"4": NaN}}', "accuracy"),
        ('{"accuracy": {"4": true}, "standard_error": [1]}', "standard_error"),
        ('{"accuracy": {"4": 1}, "standard_error": {"4": "x"}}', "standard_error"),
        ('{"accuracy": {"4": 1}, "accuracy_by_kind": [1]}', "accuracy_by_kind"),
        ('{"accuracy": {"4": 1}, "vision_tokens_per_image": {"4": {}}}', "vision_tokens"),
        pytest.param(f'{{"accuracy": {{"{"9" * 5000}": 1}}}}', "accuracy", id="a long count"),
        ('{"accuracy": {"4": "high"}}', ""),
        ('{"accuracy": {"2x3": 0.5}}', "2x3"),
        ('{"accuracy": {"4": 0.5}, "vision_tokens_per_image": {"9": 9}}', "vision_tokens"),
        ('{"accuracy": {"4": 0.5, "9": 0.5}, "accuracy_by_kind": {"read": {"4": 1}}}', "read"),
    ],
)
def test_a_report_that_is_none(command, tmp_path, content, word):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert_one_line(command("plot", tmp_path), word)
    assert not (tmp_path / "accuracy.png").exists()


def test_debug_shows_the_error_itself(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"report\.json"):
        main(["plot", str(tmp_path), "--debug"])


def test_a_count_of_another_kind_in_a_configuration_is_one_line(command, tmp_path):
    values = tiny_values(tmp_path / "run")
    values["stages"][1]["counts"] = [4, "nine", 16]
    values["model"]["text"]["config"]["num_attention_heads"] = 0
    config = write_config(tmp_path / "run.yaml", values)
    assert_one_line(command("train", config), "stages.1.counts", "'nine'")
    values["stages"][1]["counts"] = [4, 9, 16]
    config = write_config(tmp_path / "run.yaml", values)
    assert_one_line(command("train", config), "model.text", "ZeroDivisionError")


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ReportedError("a worker ended"), ["a worker ended"]),
        (NonFiniteLossError("loss is nan"), ["loss is nan"]),
        (StreamError("the stream broke off"), ["broke off"]),
        (DataExhaustedError("no more"), ["no more"]),
        (WorkerDiedError("a worker is gone"), ["a worker is gone"]),
        (FolderInUseError("a folder is in use"), ["a folder is in use"]),
        (JobFailedError("a job failed"), ["a job failed"]),
        (OutOfMemoryError("CUDA out of memory. Tried"), ["out of memory: ", "Tried"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["out of memory: "]),
        (MemoryError(), ["out of memory: "]),
        (RuntimeError("No CUDA GPUs are available"), ["No CUDA GPUs"]),
        (OSError("no space"), ["no space"]),
        (ValueError("a wrong value"), ["a wrong value"]),
    ],
)
def test_what_a_user_can_mend_is_one_line(command, monkeypatch, error, words):
    assert_one_line(raised_by_info(command, monkeypatch, error), *words)


@pytest.mark.parametrize(
    "error",
    [
        *(TypeError("a bug"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
        *(KeyError("a bug"), AttributeError("a bug"), AssertionError("a bug")),
        ImportError("cannot import name", name="tokenflex.models"),
        ModuleNotFoundError("no module", name="tokenflex_kernels.ops"),
    ],
)
def test_a_fault_of_ours_keeps_its_traceback(command, monkeypatch, error):
    with pytest.raises(type(error)):
        raised_by_info(command, monkeypatch, error)


def raised_by_info(command, monkeypatch, error: Exception):
    def failing(*_):
        raise error

    monkeypatch.setattr("tokenflex_kernels.info", failing)
    return command("info")


@pytest.mark.slow
def test_a_fault_of_ours_as_a_process_has_exit_code_1(tmp_path):
    program = (
        "import sys, tokenflex_kernels\n"
        "tokenflex_kernels.info = lambda: 1 + 'a'\n"
        "from tokenflex.cli import main\n"
        "sys.exit(main(['info']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert "TypeError: unsupported operand" in result.stderr


# ---- what others have written


@pytest.mark.parametrize(
    ("name", "output"),
    [
        *(("report.json", "."), ("report.md", "."), ("accuracy.png", ".")),
        ("mine.json", "mine.json"),
    ],
)
def test_evaluate_replaces_no_file_but_its_own(command, checkpoint, tmp_path, name, output):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    base = ("evaluate", checkpoint, "--data", "digits", "--size", 2, "--counts", "4")
    result = command(*base, "--output", tmp_path / "out" / output)
    assert_one_line(result, name, "exists and is not a report")
    assert (tmp_path / "out" / name).read_text() == '{"mine": 1}'


def test_evaluate_replaces_its_own_reports_beside_files_of_others(command, checkpoint, tmp_path):
    base = ("evaluate", checkpoint, "--data", "digits", "--size", 2, "--counts", "4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.md").write_text("mine")
    for output in (tmp_path / "out", tmp_path / "alone.json"):
        for _ in range(2):
            assert command(*base, "--output", output)[0] == 0
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"
    assert temporary_files(tmp_path) == []
    with locked(tmp_path / "out"):
        assert_one_line(command(*base, "--output", tmp_path / "out"), "in use by another process")


def test_evaluate_leaves_the_report_of_a_training_run(command, checkpoint, tmp_path):
    run = {"model": 1, "data": 1, "stages": 1, "seed": 1}
    (tmp_path / "config.json").write_text(json.dumps(run))
    base = ("evaluate", checkpoint, "--data", "digits", "--size", 2, "--counts", "4")
    assert_one_line(command(*base, "--output", tmp_path), "folder of a training run")


@pytest.mark.parametrize("name", ["router.safetensors", "report.json", "curve.png"])
def test_route_replaces_no_file_but_its_own(command, checkpoint, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / "router").mkdir()
    (folder / "router" / name).write_text("mine")
    result = command("route", "--model", folder, "--data", "digits", "--counts", "4,16")
    assert_one_line(result, name, "was not written with a router")
    assert (folder / "router" / name).read_text() == "mine"


def test_ablate_refuses_a_folder_of_something_else(command, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    result = command("ablate", "--quick", "--output", tmp_path)
    assert_one_line(result, "holds files of something else and no ablation")
    assert os.listdir(tmp_path) == ["notes.md"]


@pytest.mark.parametrize("suite", [(), ("--suite", "extremes")])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "output must be a folder, but .*/file is a file"),
        ("file/runs/a", "output must be a folder, but .*/file is a file"),
        ("link", "output must be a folder, but .*/link links to nothing"),
    ],
)
def test_ablate_refuses_an_output_that_cannot_be_a_folder(
    command, tmp_path, suite, output, message
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    code, _, (line,) = command("ablate", *suite, "--output", tmp_path / output)
    assert code == 2
    assert re.search(message, line)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("module", ["tokenflex", "tokenflex.cli"])
def test_python_runs_it_as_a_module(capsys, monkeypatch, tmp_path, module):
    monkeypatch.setattr(sys, "argv", ["tokenflex", "plot", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("tokenflex: report file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "debug"),
    [
        ("tokenflex", False),
        pytest.param("tokenflex.cli", True, marks=pytest.mark.release),
    ],
)
def test_as_a_process(tmp_path, module, debug):
    result = subprocess.run(
        [sys.executable, "-m", module, "plot", str(tmp_path), *["--debug"] * debug],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert result.stdout == ""
    assert ("Traceback" in result.stderr) == debug
    if not debug:
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
    assert "report.json" in result.stderr


@pytest.mark.slow
def test_the_core_alone_shows_info_and_says_what_the_rest_needs(tmp_path):
    """In a process that has none of the extras' packages; so do help texts and their checks."""
    extras = ("transformers", "PIL", "safetensors", "accelerate", "datasets", "matplotlib")
    extras += ("pydantic", "yaml", "sklearn", "tqdm")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"
        "from tokenflex.cli import main\n"
        "codes = [main(['info']), main(['generate', '--model', 'm', '--prompt', 'odd'])]\n"
        "sys.exit(codes != [0, 2])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "TOKENFLEX_BACKEND" in result.stdout
    needs = r"tokenflex: generate needs transformers\S*; pip install 'tokenflex\[hf\]'\n"
    assert re.fullmatch(needs, result.stderr)
