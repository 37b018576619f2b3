"""The configuration: each mistake is one line that names the key, the value and the way out."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.training.runs import DEMO, demo_values, stage, tiny_values, write_config
from tokenflex.cli import main
from tokenflex.formats import FORMATS
from tokenflex.hub import is_absent
from tokenflex.training import config
from tokenflex.training.config import TrainConfig, load_config
from tokenflex.training.data_config import DataConfig
from tokenflex.training.strict import parse_yaml

REMOVED = object()


def changed(key: str, value: Any) -> dict[str, Any]:
    """The demo's values with one of them replaced; "stages.0.steps" is one inside."""
    values: Any = copy.deepcopy(demo_values())
    whole = values
    *outer, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    for part in outer:
        values = values[part]
    if value is REMOVED:
        del values[last]
    else:
        values[last] = value
    return whole


def error_of(tmp_path: Path, values: Any) -> str:
    path = write_config(tmp_path / "run.yaml", values)
    with pytest.raises(ValueError, match=r"run\.yaml") as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message
    assert "errors.pydantic.dev" not in message
    return message


def test_the_demo_loads_with_its_values():
    config, values = load_config(DEMO), demo_values()
    assert config.output == Path(values["output"])
    assert config.model.processor == "digits"
    assert (
        config.model.text.config["hidden_size"] == values["model"]["text"]["config"]["hidden_size"]
    )
    assert [stage.steps for stage in config.stages] == [s["steps"] for s in values["stages"]]
    assert (config.model.projector_position, config.model.image_positions) == (
        "normalized",
        "shared",
    )
    assert config.stages[1].counts == (4, 9, 16)
    assert config.stages[1].weights == (0.2, 0.3, 0.5)
    assert config.evaluation.counts == (4, 9, 16)
    assert config.encoder_warm_up.steps == values["encoder_warm_up"]["steps"]


@pytest.mark.parametrize(
    "part",
    [
        *(config.PartConfig, config.ModelConfig, config.EncoderWarmUpConfig, config.StageConfig),
        *(config.SampleConfig, config.EvaluationConfig, config.TrainConfig, config.PeftConfig),
        DataConfig,
        *dict.fromkeys(known.options for known in FORMATS.values()),
    ],
)
def test_every_key_is_described_beside_its_field(part):
    undescribed = [key for key, field in part.model_fields.items() if not field.description]
    assert undescribed == []


def test_keys_of_data_name_the_formats_that_take_them():
    fields = DataConfig.model_fields
    assert fields["image_folder"].description.endswith("For messages, llava.")
    assert fields["allow_outside"].description.count("For messages, llava, huggingface.") == 1
    assert (
        "For digits, moving, reading. Split of the data set. For huggingface."
        in fields["split"].description
    )


def test_keys_that_may_change_between_two_halves_of_a_run_say_so():
    fields = TrainConfig.model_fields
    said = {key for key, field in fields.items() if "*Free.*" in field.description}
    kept = json.loads(load_config(DEMO).fingerprint()).keys()
    assert {*kept, "peft"} == fields.keys() - said  # see fingerprint
    assert {"output", "workers", "evaluation", "sharding", "compile"} <= said


def test_counts_may_be_grids():
    values = changed("stages.1.counts", [4, [2, 3], 16])
    values["evaluation"]["counts"] = [[3, 4]]
    config = TrainConfig.model_validate(values)
    assert config.stages[1].counts == (4, (2, 3), 16)
    assert config.evaluation.counts == ((3, 4),)


def test_defaults_are_the_papers():
    values = changed("stages.0.counts", REMOVED)
    del values["stages"][0]["weights"]
    stage = TrainConfig.model_validate(values).stages[0]
    assert stage.counts == (64, 144, 256)
    assert stage.weights == (0.2, 0.3, 0.5)


def test_nothing_changes_after_loading():
    with pytest.raises(ValidationError, match="frozen"):
        load_config(DEMO).seed = 1


@pytest.mark.parametrize(
    ("key", "neighbour"),
    [
        ("sede", "seed"),
        ("model.pulling", "pooling"),
        ("model.vision.paht", "path"),
        ("data.shards", "split"),
        ("stages.1.lr", "learning_rate"),
        ("encoder_warm_up.epochs", "steps"),
        ("evaluation.size", "counts"),
        ("evaluation.data.sizes", "size"),
    ],
)
def test_an_unknown_key_is_named_with_its_value_and_those_that_are_known(tmp_path, key, neighbour):
    message = error_of(tmp_path, changed(key, "xyz"))
    assert key in message
    assert "'xyz'" in message
    assert neighbour in message.split("expected", 1)[1]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", -1, "greater than or equal to 0"),
        ("seed", "one", "integer"),
        ("precision", "fp8", "'bf16'"),
        ("workers", -1, "greater than or equal to 0"),
        ("log_every", 0, "greater than or equal to 1"),
        ("threads", 0, "greater than or equal to 1"),
        ("stages", [], "at least 1"),
        ("stages.0.steps", 0, "greater than or equal to 1"),
        ("stages.0.steps", 2.5, "integer"),
        ("stages.0.batch_size", 0, "greater than or equal to 1"),
        ("stages.1.schedule", "linear", "'cosine'"),
        ("stages.1.weight_decay", -0.1, "greater than or equal to 0"),
        ("stages.1.max_grad_norm", 0, "greater than 0"),
        ("stages.1.learning_rate.lora", 0.1, "'projector'"),
        ("stages.1.learning_rate", {"text": 0, "vision": 0}, "above 0"),
        ("stages.1.learning_rate", {"text": -0.1, "vision": 1}, "must not be negative"),
        ("stages.1.learning_rate.text", float("inf"), "finite"),
        ("stages.1.learning_rate.text", float("nan"), "finite"),
        ("stages.1.counts", [4, 9], "2 counts and 3 weights"),
        ("model.projector_position", None, "needs projector_position='normalized', got None"),
        ("stages.1.counts", [4, 9, 17], "nearest squares are 16 and 25"),
        ("stages.1.counts", [4, 9, [0, 4]], "counts[2] must have sides of at least 1"),
        ("stages.1.weights", [1, -1, 1], "at least 0"),
        ("stages.1.weights", [0, 0, 0], "must not all be zero"),
        ("data.name", "imagenet", "'digits'"),
        ("data.name", "messages", "path must be given"),
        ("data.path", "data.jsonl", "path must be given"),
        ("data.split", "dev", "'validation'"),
        ("data.image_folder", "pictures", "name: messages, llava only"),
        ("data.allow_outside", True, "name: messages, llava, huggingface only"),
        ("data.name", "mixture", "parts must be given"),
        ("data.weight", 0, "greater than 0"),
        ("data", {"name": "mixture", "parts": [{"name": "llava"}]}, "path must be given"),
        ("stages.0.data", {"name": "llava"}, "path must be given"),
        ("data.size", 0, "greater than or equal to 1"),
        ("data.name", "webdataset", "path must be given"),
        ("data.streaming", True, "name: huggingface only, got name='digits' and streaming=True"),
        ("data.shuffle_buffer", 5, "name: huggingface only"),
        ("data", {"name": "messages", "path": "x", "questions": 3}, "name: digits, reading only"),
        (
            "data",
            {"name": "messages", "path": "x", "split": "x"},
            "name: digits, moving, reading, huggingface only",
        ),
        ("data", {"name": "huggingface", "path": "x", "shuffle_buffer": 5}, "needs streaming"),
        ("model.image_token", "<pad>", "which has its own, got '<pad>'"),
        ("model.use_thumbnail", True, "needs max_tiles above 1"),
        ("stages.0.max_tokens", 2**31, "less than or equal to 2147483647"),
        ("stages.0.weight_decay", float("inf"), "less than inf"),
        ("stages.0.steps", True, "must be a number, got True"),
        ("stages.0.learning_rate.text", True, "must be a number, got True"),
        ("seed", False, "must be a number, got False"),
        ("stages.1.counts", [4, 4, 16], "counts must differ from each other"),
        ("stages.1.counts", [4, [2, 2], 16], "counts must differ from each other"),
        ("trackers", ["tensorboard", "tensorboard"], "trackers must differ"),
        ("data.epochs", 0, "greater than or equal to 1"),
        (
            "data",
            {"name": "mixture", "epochs": 2, "parts": [{"name": "digits"}]},
            "epochs must be given to the parts",
        ),
        (
            "evaluation.data",
            {"name": "huggingface", "path": "x", "streaming": True},
            "must not be streaming",
        ),
        (
            "evaluation.data",
            {
                "name": "mixture",
                "parts": [{"name": "huggingface", "path": "x", "streaming": True}],
            },
            "must not be streaming",
        ),
        ("stages.0.max_length", 1, "greater than or equal to 2"),
        ("model.pooling", "max", "'adaptive'"),
        ("model.num_image_tokens", 15, "nearest squares are 9 and 16"),
        ("model.projector_hidden_width", 0, "greater than or equal to 1"),
        ("model.processor", None, "processor must be 'digits' or "),
        ("model.vision", {}, "a path, a config or both, got neither"),
        ("sample", {"text_tokens": 5, "answer_tokens": 6, "tiles": 1}, "must not exceed"),
        ("encoder_warm_up.learning_rate", 0, "greater than 0"),
        ("evaluation.counts", [], "at least one count"),
        ("evaluation.counts", [4, 10], "nearest squares are 9 and 16"),
        ("evaluation.batch_size", 0, "greater than or equal to 1"),
        ("evaluation.every", 0, "greater than or equal to 1"),
        ("evaluation.samples", 0, "greater than or equal to 1"),
        ("peak_tflops", 0, "greater than 0"),
        ("trackers", ["tensorbord"], "tensorboard, "),
        ("stages.0.tokens", 1e9, "exactly one of steps and tokens"),
        ("stages.0.tokens", float("inf"), "less than inf"),
    ],
)
def test_a_value_that_is_not_allowed(tmp_path, key, value, expected):
    message = error_of(tmp_path, changed(key, value))
    assert key.split(".")[0] in message
    assert expected in message
    assert "got" in message


@pytest.mark.parametrize(
    "key", ["output", "model", "data", "stages", "stages.0.batch_size", "model.text"]
)
def test_a_missing_key_is_named(tmp_path, key):
    assert f"{key} is missing" in error_of(tmp_path, changed(key, REMOVED))


def test_warm_up_needs_the_digits_processor(tmp_path):
    values = changed("model.processor", None)
    values["model"]["vision"] = {"path": "a"}
    values["model"]["text"] = {"path": "b"}
    assert "encoder_warm_up needs model.processor: digits" in error_of(tmp_path, values)
    del values["encoder_warm_up"]
    assert load_config(write_config(tmp_path / "run.yaml", values)).model.text.path == "b"


def test_all_mistakes_are_named_in_one_line(tmp_path):
    values = changed("seed", -1)
    values["workers"] = -2
    values["sede"] = 1
    del values["model"]["text"]
    values["stages"][0]["batch_size"] = "many"
    message = error_of(tmp_path, values)
    for words in (
        ("seed: ", "got -1"),
        ("workers: ", "got -2"),
        ("sede is no known key", "got 1"),
        ("model.text is missing",),
        ("stages.0.batch_size: ", "got 'many'"),
    ):
        (part,) = [part for part in message.split("; ") if words[0] in part]
        assert all(word in part for word in words)
    assert "more" not in message.rsplit("; ", 1)[-1]


def test_single_values_are_replaced_from_outside(tmp_path):
    path = write_config(tmp_path / "run.yaml", demo_values())
    changes = [
        *("seed=3", "stages.0.steps=70", "stages.0.counts=[9, [2, 3]]", "stages.0.weights=[1, 1]"),
        *("evaluation.data.size=5", "stages.1.learning_rate.text=1.0e-4", "precision='no'"),
    ]
    config = load_config(path, changes)
    assert (config.seed, config.stages[0].steps) == (3, 70)
    assert config.stages[0].counts == (9, (2, 3))
    assert config.evaluation.data.size == 5
    assert config.stages[1].learning_rate["text"] == 1e-4
    values = demo_values()
    del values["evaluation"]
    path = write_config(tmp_path / "other.yaml", values)
    changes = ["evaluation.data.name=digits", "evaluation.counts=[4]"]
    assert load_config(path, changes).evaluation.counts == (4,)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("seed", "--set must be KEY=VALUE, such as stages.0.batch_size=8, got 'seed'"),
        ("=3", "--set must be KEY=VALUE"),
        ("stages..steps=3", "--set must be KEY=VALUE"),
        ("stages.2.steps=3", "--set stages.2 must name one of 2 entries, 0 to 1, got '2'"),
        ("stages.first.steps=3", "0 to 1, got 'first'"),
        ("seed.more=3", "--set seed.more leads through 0, which has no keys"),
        ("seed=[1", "the value of --set seed is not YAML"),
        ("seed=many", "seed: "),
        ("sede=1", "sede is no known key (got 1"),
        ("stages." + "7" * 5000 + ".steps=3", "must name one of 2 entries, 0 to 1, got '777"),
        ("stages." + "7" * 5000 + "=3", "must name one of 2 entries, 0 to 1, got '777"),
        ("precision=no", '(got False; YAML reads no as false: write "no" in quotes, with --set '),
        ("precision=no", "--set precision='\"no\"')"),
        ("model.image_token=yes", "--set model.image_token='\"yes\"')"),
    ],
)
def test_a_value_from_outside_that_cannot_be_set(tmp_path, change, expected):
    path = write_config(tmp_path / "run.yaml", demo_values())
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(path, [change])
    assert expected in str(error.value)
    assert len(str(error.value)) < 1000


def test_all_changes_that_cannot_be_set_are_one_message_with_the_other_faults(tmp_path):
    path = write_config(tmp_path / "run.yaml", demo_values())
    changes = ["stages.0.steps=abc", "stages.7.steps=1", "seed", "foo=1"]
    with pytest.raises(ValueError, match=r"stages\.7 must name one of 2 entries") as error:
        load_config(path, changes)
    for fault in ("stages.0.steps: ", "got 'seed'", "foo is no known key"):
        assert fault in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("peft", {"modules": "text", "r": 4}, "peft.modules: Input should be a list, such as"),
        ("stages", [], "stages: List should have at least 1 item"),
    ],
)
def test_types_are_those_of_yaml(tmp_path, key, value, expected):
    assert expected in error_of(tmp_path, changed(key, value))


def test_a_word_that_is_not_allowed_either_is_no_hint(tmp_path):
    values = demo_values()
    values["evaluation"]["keep_best"] = True
    message = error_of(tmp_path, values)
    assert "Input should be 'accuracy' or 'loss'" in message
    assert "in quotes" not in message


@pytest.mark.parametrize("config", sorted(DEMO.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_change_that_errors_and_docs_name_fits_every_configuration(config):
    assert load_config(config, ["stages.0.batch_size=8"]).stages[0].batch_size == 8


def test_a_long_value_is_cut_off(tmp_path):
    assert len(error_of(tmp_path, changed("seed", "x" * 10_000))) < 400


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [1, 2", "not YAML"),
        ("a: b: c", "not YAML"),
        ("\ta: 1", "not YAML"),
        ("", "must hold keys and values, got None"),
        ("# nothing\n", "must hold keys and values, got None"),
        ("- 1\n- 2\n", r"must hold keys and values, got \[1, 2\]"),
        ("hello", "must hold keys and values, got 'hello'"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, match):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=match) as error:
        load_config(path)
    assert "run.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_that_is_no_text_is_named(tmp_path):
    values = demo_values()
    values[12345] = 4
    assert "12345" in error_of(tmp_path, values)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00seed: 1")
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML"):
        load_config(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")


def test_yaml_runs_no_code(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"output: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    with pytest.raises(ValueError, match="not YAML"):
        load_config(path)
    assert not (tmp_path / "made").exists()


def test_what_is_loaded_can_be_written_and_loaded_again(tmp_path):
    config = load_config(DEMO)
    again = load_config(
        write_config(tmp_path / "again.yaml", yaml.safe_load(config.model_dump_json()))
    )
    assert again == config


def test_a_conversation_must_fit_a_bin(tmp_path):
    values = tiny_values(tmp_path, stages=[stage(max_length=30, max_tokens=20)])
    with pytest.raises(ValueError, match=r"max_length must not exceed max_tokens of 20.* got 30"):
        load_config(write_config(tmp_path / "run.yaml", values))


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "model: {pooling: a, pooling: b}\n"])
def test_a_key_that_is_given_twice_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML: key '\w+' is given twice.*line"):
        load_config(path)


def test_a_merged_key_may_be_given_again(tmp_path):
    """YAML's own way to say "like that one, but"."""
    path = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "run"))
    text = path.read_text().replace("name: projector", "<<: {steps: 9}\n  name: projector", 1)
    path.write_text(text)
    assert load_config(path).stages[0].steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"name": "digits", "weight": 2}}, "weight is for the parts of a mixture"),
        (
            {"evaluation": {"data": {"name": "digits", "epochs": 2}, "counts": [4]}},
            "asked once: give it no epochs",
        ),
        ({"stages": [stage(warmup_steps=5)]}, "must not exceed the stage's 4 steps, got 5"),
    ],
)
def test_keys_without_a_use_are_refused(tmp_path, changes, message):
    path = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "run", **changes))
    with pytest.raises(ValueError, match=message):
        load_config(path)


# ---- YAML of strangers


def bomb(levels: int, start: str = "[x]") -> str:
    """Each line stands for nine of the one before."""
    lines = [f"a0: &a0 {start}"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels + 1)]
    return "\n".join(lines)


STRANGE_YAML = {
    "references to references": bomb(12),
    "merged references": "\n".join(
        ["a0: &a0 {k: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40))]
    ),
    "a list in itself": "model: &a [*a]",
    "a mapping in itself": "model: &a {config: *a}",
    "a deep list": "model: " + "[" * 50_000 + "]" * 50_000,
    "a deep mapping": "model: " + "{a: " * 5_000 + "}" * 5_000,
    "a deep list of lines": "model:\n" + "".join(f"{' ' * i}-\n" for i in range(1, 2_000)),
    "a number of many digits": "seed: " + "9" * 5000,
    "a day that is none": "seed: 2020-99-99",
    "a list as a key": "? [a]\n: 1",
    "an unknown tag": "seed: !!python/object/apply:os.system [ls]",
}


@pytest.mark.parametrize("text", STRANGE_YAML.values(), ids=STRANGE_YAML)
def test_yaml_that_would_exhaust_the_machine_is_one_short_error(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    started = time.process_time()  # not of the clock: other processes may have the machine
    with pytest.raises(ValueError, match=r"run\.yaml (is not YAML|nests)") as error:
        load_config(path)
    assert time.process_time() - started < 10
    assert len(str(error.value)) < len(str(path)) + 600


def test_a_large_value_is_not_printed(tmp_path):
    for value in ("x" * 100_000, {"k" * 100_000: 1}):
        for key in ("seed", "model.pooling", "stages", "mode", "data"):
            assert len(error_of(tmp_path, changed(key, value))) < 1000
    many = {f"{'k' * 1000}{number}": 1 for number in range(1000)}
    for key, value in (("stages", ["x" * 1000] * 1000), ("data", many)):
        assert len(error_of(tmp_path, changed(key, value))) < 200_000
    assert error_of(tmp_path, changed("stages", ["x"] * 3000)).endswith("and 2000 more")


def test_more_than_fifty_mistakes_are_all_named(tmp_path):
    values = {**demo_values(), **{f"x{number}": 1 for number in range(60)}}
    values["stages"][0] |= {"y0": 1, "y1": 2}
    message = error_of(tmp_path, values)
    assert all(f"x{number} is no known key (got 1" in message for number in range(60))
    assert "stages.0.y1 is no known key (got 2)" in message
    assert message.count("expected one of") == 2  # the run's keys and a stage's, once each
    assert " more" not in message


def test_a_list_whose_entries_are_wrong_is_not_called_too_short(tmp_path):
    message = error_of(tmp_path, changed("stages", [stage(max_length=-3)]))
    assert "stages.0.max_length: " in message
    assert "at least 1 item" not in message
    assert "at least 1 item" in error_of(tmp_path, changed("stages", []))


def test_all_contradictions_of_a_part_are_named(tmp_path):
    wrong = {
        **{"tokens": 5.0, "weights": [1], "betas": [2, 3], "learning_rate": {"text": -1}},
        **{"counts": [4, 17, 5], "warmup_steps": 9, "warmup_share": 0.5},
    }
    values = changed("stages", [stage(**wrong), stage(betas=[2, 3])])
    values |= {"sharding": "full", "precision": "fp16"}
    values["evaluation"] |= {"counts": [5, 10]}
    values["evaluation"]["data"] |= {"epochs": 2}
    values["data"]["weight"] = 2.0
    parts = error_of(tmp_path, values).split("; ")
    for key, words in (
        ("stages.0", "exactly one of steps and tokens"),
        ("stages.0", "counts and weights must have one entry each"),
        ("stages.0", "counts[1] must be a perfect square"),
        ("stages.0", "counts[2] must be a perfect square"),
        ("stages.0", "betas must be in [0, 1), got (2.0, 3.0)"),
        ("stages.0", "learning_rate must not be negative"),
        ("stages.0", "at most one of warmup_steps and warmup_share"),
        ("stages.0", "warmup_steps must not exceed"),
        ("stages.1", "betas must be in [0, 1), got (2.0, 3.0)"),
        ("evaluation", "counts must be a perfect square"),
        ("evaluation", "data of an evaluation is asked once"),
        ("sharding", "precision must be 'bf16' or 'no'"),
        ("data", "weight is for the parts of a mixture"),
    ):
        assert any(f"{key}: {words}" in part for part in parts), (key, words)


def test_references_that_stay_small_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    lines = DEMO.read_text().replace("data: {", "data: &d {", 1)
    path.write_text("\ufeff" + lines)
    assert load_config(path) == load_config(DEMO)
    assert parse_yaml(b"a: &a {b: [1]}\nc: *a\nd: {<<: *a}", "x") == {
        "a": {"b": [1]},
        "c": {"b": [1]},
        "d": {"b": [1]},
    }


# ---- everything at once


def faulty(folder: Path) -> dict[str, Any]:
    """A configuration with faults of every kind, in several places."""
    stages = [
        stage(colour=1, counts=[4, 9], weights=[1, 2, 3]),
        stage(batch_size="many", betas=[2, 0.5]),
        stage(data={"name": "messages", "path": str(folder / "none.jsonl"), "colour": 1}),
    ]
    values = tiny_values(folder / "run", stages=stages, log_evry=3, seed="a")
    values["model"]["start"] = str(folder / "no" / "start")
    values["evaluation"] |= {"counts": [5], "keep_best": "loss", "samples": 0}
    values["evaluation"]["data"] = {"name": "webdataset", "path": str(folder / "tars")}
    return values


def test_all_faults_of_all_places_are_in_one_message(tmp_path):
    message = error_of(tmp_path, faulty(tmp_path))
    for fault in (
        "log_evry is no known key",
        "seed: Input should be a valid integer",
        "stages.0.colour is no known key",
        "stages.0: counts and weights must have one entry each",
        "stages.1.batch_size: Input should be a valid integer",
        "stages.1: betas must be in [0, 1)",
        "stages.2.data.colour is no known key",
        f"stages.2.data: data file {tmp_path / 'none.jsonl'} does not exist",
        f"model: start: checkpoint folder {tmp_path / 'no' / 'start'} does not exist",
        "evaluation.samples: Input should be greater than or equal to 1",
        "evaluation: keep_best needs evaluations during training",
        "evaluation: counts must be",
        f"evaluation.data: data file {tmp_path / 'tars'} does not exist",
    ):
        assert fault in message
    for once in (
        "betas must be",
        "log_evry is no known key",
        "tars does",
        "data.colour is no known",
    ):
        assert message.count(once) == 1


def test_what_follows_from_another_fault_is_not_reported(tmp_path):
    values = tiny_values(tmp_path, stages=[{**stage(), "steps": "ten", "counts": [4, "nine"]}])
    message = error_of(tmp_path, values)
    assert "stages.0.steps: Input should be" in message
    assert "stages.0.counts.1" in message
    for follows in ("exactly one of steps", "one entry each", "warmup_steps"):
        assert follows not in message


def test_files_that_do_not_exist_are_named_together_where_they_are_read(tmp_path, capsys):
    values = tiny_values(tmp_path / "run", encoder_warm_up=None)
    values["data"] = {"name": "messages", "path": str(tmp_path / "none.jsonl")}
    values["evaluation"]["data"] = {"name": "llava", "path": str(tmp_path / "none.json")}
    values["model"]["start"] = str(tmp_path / "no" / "start")
    path = write_config(tmp_path / "run.yaml", values)
    load_config(path)  # what it says is right
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("none.jsonl", "none.json does", "no/start"))
    assert main(["train", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "none.jsonl does not exist" in error
    assert "none.json does not exist" in error
    assert "no/start" not in error  # a plan reads no weights
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "absent"),
    [
        ("gpt2", False),
        ("org/name", False),
        ("./model", True),
        ("../model", True),
        ("/no/model", True),
        ("models/a/b", True),
        ("tests/nothing", True),  # in a folder that exists
        ("tests", False),
    ],
)
def test_names_of_a_hub_are_not_taken_for_absent_files(path, absent):
    assert is_absent(path) is absent
