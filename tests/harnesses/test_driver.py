"""Both harnesses at every count: the same benchmarks, one table."""

from __future__ import annotations

import importlib
import json
import re
import sys
from types import SimpleNamespace

import pytest

from tests.harnesses.names import arbitrary_names
from tests.models.tiny import picture
from tokenflex.cli import main
from tokenflex.harnesses.driver import HarnessError, run_lmms_eval, run_vlmevalkit

pytestmark = pytest.mark.usefixtures("standins")

# Like VLMEvalKit's script: each model answers each benchmark.
RUN_PY = """
import argparse, pathlib
from vlmeval.config import supported_VLM
parser = argparse.ArgumentParser()
parser.add_argument("--model", nargs="+")
parser.add_argument("--data", nargs="+")
parser.add_argument("--work-dir", type=pathlib.Path)
parser.add_argument("--judge")
options = parser.parse_args()
assert options.judge == "exact_matching"
for name in options.model:
    model = supported_VLM[name]()
    folder = options.work_dir / name
    folder.mkdir(parents=True)
    for benchmark in options.data:
        if benchmark == "Failing":
            continue
        message = [{"type": "image", "value": %r}, {"type": "text", "value": "odd"}]
        model.generate(message, benchmark)
        tokens = model.assistant.label
        (folder / f"{name}_{benchmark}_acc.csv").write_text(f"split,Overall\\ndev,{tokens}\\n")
"""

# The same without loading the models.
RUN_PY_WITHOUT_ANSWERS = """
import argparse, pathlib
from vlmeval.config import supported_VLM
parser = argparse.ArgumentParser()
parser.add_argument("--model", nargs="+")
parser.add_argument("--data", nargs="+")
parser.add_argument("--work-dir", type=pathlib.Path)
options = parser.parse_args()
for name in options.model:
    tokens = supported_VLM[name].keywords["tokens"]
    folder = options.work_dir / name
    folder.mkdir(parents=True)
    for benchmark in options.data:
        (folder / f"{name}_{benchmark}_acc.csv").write_text(f"split,Overall\\ndev,{tokens}\\n")
"""


# A script that saves its arguments.
RUN_PY_THAT_REPEATS = """
import json, pathlib, sys
pathlib.Path(__file__).with_name("called.json").write_text(json.dumps(sys.argv[1:]))
sys.exit(%s)
"""


@pytest.fixture
def run_py(tmp_path):
    picture(1).save(tmp_path / "a.png")
    path = tmp_path / "run.py"
    path.write_text(RUN_PY % str(tmp_path / "a.png"))
    return path


def fake_lmms_eval(asked):
    def simple_evaluate(model, model_args, tasks, **options):
        asked.append((model, model_args, tasks, options))
        count = int(model_args.split("tokens=")[1].split(",")[0])
        scores = {"acc,none": count / 100, "acc_stderr,none": 0.01}
        found = {task: scores for task in tasks if task not in ("mmmu", "failing")}
        return {
            "results": found | {"mmmu_val": scores, "mmmu": {"alias": "mmmu"}},
            "group_subtasks": {"mmmu": ["mmmu_val"], **{task: [] for task in tasks[:1]}},
        }

    return simple_evaluate


def test_lmms_eval_runs_the_same_tasks_at_every_count(checkpoint):
    asked = []
    table = run_lmms_eval(
        checkpoint,
        [4, "16"],
        ["mmstar", "mmmu"],
        max_tiles=6,
        simple_evaluate=fake_lmms_eval(asked),
        limit=8,
    )
    assert asked == [
        (
            "tokenflex",
            f"pretrained={checkpoint},tokens={count},max_tiles=6",
            ["mmstar", "mmmu"],
            {"limit": 8},
        )
        for count in (4, 16)
    ]
    assert [*table.rows] == [("mmmu_val", "acc"), ("mmstar", "acc")]
    assert [table.rows["mmstar", "acc"][count].value for count in ("4", "16")] == [0.04, 0.16]
    assert table.missing == []


@pytest.mark.parametrize(
    ("checkpoint", "counts", "words"),
    [
        ("a", [4, "10"], "9 and 16"),
        ("a", [4, "4"], "different"),
        ("a", [], "one or more"),
        ("a", ["many"], "many"),
        ("a,b", [4], "commas"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(checkpoint, counts, words):
    asked = []
    with pytest.raises(ValueError, match=words):
        run_lmms_eval(checkpoint, counts, ["t"], simple_evaluate=fake_lmms_eval(asked))
    assert asked == []


def test_vlmevalkit_runs_its_own_script_at_every_count(checkpoint, run_py, tmp_path):
    before = list(sys.argv)
    table = run_vlmevalkit(
        checkpoint,
        [4, 9],
        ["MMStar", "HallusionBench", "Failing"],
        run_py=run_py,
        work_dir=tmp_path / "work",
        arguments=["--judge", "exact_matching"],
    )
    assert sys.argv == before
    for benchmark in ("MMStar", "HallusionBench"):
        row = table.rows[benchmark, "Overall"]
        assert {count: score.value for count, score in row.items()} == {"4": 4.0, "9": 9.0}
    assert table.missing == [("Failing", "-", "4"), ("Failing", "-", "9")]


NAMES = [*arbitrary_names(0), "MMStar", "mmstar", "mmmu_val", "MMBench_DEV_EN_V11", "OCRBench"]


def test_lmms_eval_is_asked_for_every_task_at_every_count(checkpoint):
    asked = []
    counts = ["4", "9", "16"]
    options = {"simple_evaluate": fake_lmms_eval(asked), "batch_size": 2}
    table = run_lmms_eval(checkpoint, counts, NAMES, **options)
    assert [(tasks, more) for _, _, tasks, more in asked] == [(NAMES, {"batch_size": 2})] * 3
    arguments = [one for _, one, _, _ in asked]
    assert arguments == [f"pretrained={checkpoint},tokens={count}" for count in counts]
    for name in NAMES:
        values = {count: score.value for count, score in table.rows[name, "acc"].items()}
        assert values == {"4": 0.04, "9": 0.09, "16": 0.16}


def test_vlmevalkit_is_asked_for_every_benchmark_at_every_count(checkpoint, tmp_path):
    """This script writes the count of the named model as its score."""
    (tmp_path / "run.py").write_text(RUN_PY_WITHOUT_ANSWERS)
    table = run_vlmevalkit(
        checkpoint,
        [4, 9],
        NAMES,
        run_py=tmp_path / "run.py",
        work_dir=tmp_path / "work",
    )
    assert {benchmark for benchmark, _ in table.rows} == {*NAMES}
    for name in NAMES:
        values = {count: score.value for count, score in table.rows[name, "Overall"].items()}
        assert values == {"4": 4.0, "9": 9.0}


def test_an_old_result_does_not_stand_in_for_a_new_one(checkpoint, run_py, tmp_path):
    (tmp_path / "work" / "TokenFLEX-n4").mkdir(parents=True)
    options = {"run_py": run_py, "work_dir": tmp_path / "work"}
    with pytest.raises(FileExistsError, match="--reuse"):
        run_vlmevalkit(checkpoint, [4], ["MMStar"], **options)


def test_without_lmms_eval_the_command_says_what_to_install(
    checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    base = ["harness", "lmms-eval", str(checkpoint), "--counts", "4", "--benchmarks", "mmstar"]
    assert main([*base, "--output", str(tmp_path / "out")]) == 2
    assert "pip install lmms-eval" in capsys.readouterr().err


def test_the_command_writes_the_table(checkpoint, tmp_path, capsys, monkeypatch):
    module = SimpleNamespace(simple_evaluate=fake_lmms_eval([]))
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", module)
    base = ["harness", "lmms-eval", str(checkpoint), "--counts", "4,16", "--output"]
    assert main([*base, str(tmp_path / "out"), "--benchmarks", "mmstar"]) == 0
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| mmstar | acc | 0.04 ± 0.01 | 0.16 ± 0.01 |" in page
    assert page in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())) == 4
    assert (tmp_path / "out" / "table.png").read_bytes()[:4] == b"\x89PNG"
    # A failed benchmark is an error, after the rest is written.
    assert main([*base, str(tmp_path / "more"), "--benchmarks", "failing,mmstar"]) == 2
    assert "failing - 4" in capsys.readouterr().err
    assert "| failing | - | missing | missing |" in (tmp_path / "more" / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lm-eval", "--counts", "4"], "lmms-eval"),
        (["vlmevalkit", "--counts", "4"], "--run-py"),
        (["lmms-eval", "--counts", "4", "--run-py", "run.py"], "--run-py"),
        (["vlmevalkit", "--counts", "4", "--run-py", "none.py"], "none.py"),
        (["lmms-eval", "--counts", "10"], "9 and 16"),
    ],
)
def test_mistakes_are_one_line(checkpoint, tmp_path, capsys, monkeypatch, arguments, words):
    module = SimpleNamespace(simple_evaluate=fake_lmms_eval([]))
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", module)
    name, *options = arguments
    more = ["--benchmarks", "mmstar", "--output", str(tmp_path / "out")]
    assert main(["harness", name, str(checkpoint), *options, *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


# ---- the command line


@pytest.mark.parametrize(
    ("own", "passed_on"),
    [
        (
            "HARNESS MODEL --counts 4 --benchmarks B --output OUT --run-py RUN",
            "--judge exact_matching",
        ),
        ("--counts 4 --benchmarks B HARNESS --output OUT MODEL --run-py RUN", "--judge x"),
        (
            "--run-py RUN --counts 4 HARNESS MODEL --benchmarks B --output OUT",
            "--mode infer --verbose",
        ),
        ("HARNESS --output OUT MODEL --run-py RUN --counts 4 --benchmarks B --debug", ""),
        (
            "HARNESS MODEL --output OUT --run-py RUN --counts=4 --benchmarks=B",
            "--limit 3 --counts 9 --output elsewhere --debug -- --help words",
        ),
    ],
)
def test_what_follows_two_dashes_reaches_the_script_word_for_word(
    checkpoint, tmp_path, own, passed_on
):
    script = tmp_path / "run.py"
    script.write_text(RUN_PY_THAT_REPEATS % "")
    values = {"HARNESS": "vlmevalkit", "MODEL": str(checkpoint), "RUN": str(script)}
    values |= {"OUT": str(tmp_path / "out"), "B": "MMStar"}
    arguments = [values.get(word, word).replace("=B", "=MMStar") for word in own.split()]
    arguments += ["--", *passed_on.split()]
    expected = ["--model", "TokenFLEX-n4", "--data", "MMStar", "--work-dir"]
    expected += [str(tmp_path / "out" / "vlmevalkit"), *passed_on.split()]
    if "--debug" in own:
        with pytest.raises(HarnessError, match="scores are missing"):
            main(["harness", *arguments])
    else:
        main(["harness", *arguments])
    assert json.loads((tmp_path / "called.json").read_text()) == expected


def test_help_says_what_follows_two_dashes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["harness", "--help"])
    assert stop.value.code == 0
    assert "-- --judge exact_matching" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lmms-eval", ["--", "--judge", "x"], "arguments after -- are for VLMEvalKit's script"),
        ("vlmevalkit", ["--limit", "3", "--run-py", "RUN"], "--limit is for lmms-eval"),
        ("vlmevalkit", ["--batch-size", "3", "--run-py", "RUN"], "--batch-size is for lmms-eval"),
        (
            "vlmevalkit",
            ["--include-path", "a", "--run-py", "RUN"],
            "--include-path is for lmms-eval",
        ),
        ("vlmevalkit", ["--run-py", "RUN", "--", "--model", "other"], "must not hold --model"),
        (
            "vlmevalkit",
            ["--run-py", "RUN", "--", "--work-dir=here"],
            "must not hold --work-dir=here",
        ),
        (
            "lmms-eval",
            ["--include-path", "nowhere"],
            "include_path must name folders, got 'nowhere'",
        ),
        ("lmms-eval", ["--benchmarks", "mmstar,nothing"], "no task nothing: .*--include-path"),
    ],
)
def test_options_that_a_harness_does_not_use_are_refused(
    checkpoint, run_py, tmp_path, capsys, monkeypatch, name, options, words
):
    asked = []
    module = SimpleNamespace(simple_evaluate=fake_lmms_eval(asked))
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", module)
    options = [str(run_py) if option == "RUN" else option for option in options]
    base = ["--counts", "4", "--benchmarks", "mmstar", "--output", str(tmp_path / "out")]
    assert main(["harness", name, str(checkpoint), *base, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)
    assert asked == []


def test_tasks_of_ones_own_are_found_on_the_include_path(checkpoint, tmp_path, capsys, monkeypatch):
    asked = []
    module = SimpleNamespace(simple_evaluate=fake_lmms_eval(asked))
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", module)
    for folder, task in (("first", "digits_local"), ("second", "letters_local")):
        (tmp_path / folder / "deeper").mkdir(parents=True)
        (tmp_path / folder / "deeper" / f"{task}.yaml").write_text(f"task: {task}\n")
    arguments = ["--counts", "4,16", "--benchmarks", "digits_local,letters_local"]
    for folder in ("first", "second"):
        arguments += ["--include-path", str(tmp_path / folder)]
    assert (
        main(["harness", "lmms-eval", str(checkpoint), *arguments, "--output", str(tmp_path)]) == 0
    )
    managers = [options["task_manager"] for _, _, _, options in asked]
    assert managers[0] is managers[1]  # lmms-eval's thousands of files are read once
    assert "letters_local" in managers[0].all_tasks
    table = run_lmms_eval(
        checkpoint,
        [4],
        ["digits_local"],
        include_path=[tmp_path / "first"],
        simple_evaluate=fake_lmms_eval([]),
    )
    assert table.rows["digits_local", "acc"]["4"].value == 0.04
    capsys.readouterr()


# ---- a harness that fails


class Unfamiliar(Exception):
    """An exception that no list of exceptions contains."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("metric_list"), "lmms-eval failed at 4 tokens: KeyError: 'metric_list'"),
        (AssertionError(), "lmms-eval failed at 4 tokens: AssertionError"),
        (Unfamiliar("two\nlines"), "lmms-eval failed at 4 tokens: Unfamiliar: two lines"),
        (TypeError("no"), "lmms-eval failed at 4 tokens: TypeError: no"),
        (
            ModuleNotFoundError("no", name="sacrebleu"),
            "lmms-eval failed at 4 tokens: it needs sacrebleu",
        ),
        (ValueError("data:image/png;base64," + "A" * 9999), "lmms-eval failed at 4 tokens: Val"),
    ],
)
def test_an_error_of_lmms_eval_is_one_line(checkpoint, tmp_path, capsys, monkeypatch, error, words):
    def simple_evaluate(**options):
        raise error

    module = SimpleNamespace(simple_evaluate=simple_evaluate)
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", module)
    base = ["harness", "lmms-eval", str(checkpoint), "--counts", "4", "--benchmarks", "mmstar"]
    assert main([*base, "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tokenflex: {words}")
    assert len(line) < 400
    with pytest.raises(HarnessError) as failure:
        main([*base, "--output", str(tmp_path), "--debug"])
    assert failure.value.__cause__ is error


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        ("sys.exit(3)", 3, "VLMEvalKit ended at 4 tokens with exit code 3"),
        (
            "sys.exit('no such judge')",
            1,
            "VLMEvalKit ended at 4 tokens with exit code 1: no such judge",
        ),
        ("{}['judge']", 2, "VLMEvalKit failed at 4 tokens: KeyError: 'judge'"),
        (
            "import vlmeval_wants_this",
            2,
            "VLMEvalKit failed at 4 tokens: it needs vlmeval_wants_this",
        ),
        ("sys.exit()", 2, "1 scores are missing"),
    ],
)
def test_an_end_of_vlmevalkits_script_is_one_line(
    checkpoint, tmp_path, capsys, code, exit_code, words
):
    script = tmp_path / "run.py"
    script.write_text(f"import sys\n{code}\n")
    before = list(sys.argv)
    arguments = ["--counts", "4", "--benchmarks", "B", "--output", str(tmp_path / "out")]
    arguments += ["--run-py", str(script), "--"]
    assert main(["harness", "vlmevalkit", str(checkpoint), *arguments]) == exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tokenflex: {words}")
    assert sys.argv == before


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("lmms-eval", "lmms_eval.evaluator", "lmms-eval failed to load: AttributeError: unusable"),
        ("lmms-eval", "lmms_eval.tasks", "lmms-eval failed to load: AttributeError: unusable"),
        ("vlmevalkit", "vlmeval.config", "VLMEvalKit failed to load: AttributeError: unusable"),
    ],
)
def test_a_harness_that_cannot_be_imported_is_one_line(
    checkpoint, run_py, tmp_path, capsys, monkeypatch, name, module, words
):
    monkeypatch.setitem(
        sys.modules, "lmms_eval.evaluator", SimpleNamespace(simple_evaluate=fake_lmms_eval([]))
    )
    load = importlib.import_module

    def import_module(wanted):
        if wanted == module:
            raise AttributeError("unusable")
        return load(wanted)

    monkeypatch.setattr(importlib, "import_module", import_module)
    arguments = ["--counts", "4", "--benchmarks", "mmstar", "--output", str(tmp_path / "out")]
    arguments += ["--run-py", str(run_py)] * (name == "vlmevalkit")
    assert main(["harness", name, str(checkpoint), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"tokenflex: {words}"


def test_without_vlmevalkit_the_command_says_what_to_install(
    checkpoint, run_py, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "vlmeval.config", None)
    arguments = ["--counts", "4", "--benchmarks", "MMStar", "--output", str(tmp_path / "out")]
    arguments += ["--run-py", str(run_py)]
    assert main(["harness", "vlmevalkit", str(checkpoint), *arguments]) == 2
    assert "install VLMEvalKit (github.com/" in capsys.readouterr().err
