"""The machine's columns: the queries that fill them, and the answers."""

from __future__ import annotations

import platform
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results
from benchmarks.results import (
    add_shares,
    environment,
    last_level_cache,
    new_row,
    read_csv,
    write_csv,
)


@pytest.fixture
def commands(monkeypatch):
    """Commands that are run; nvidia-smi knows no GPU by its identifier."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if any(word.startswith("--id=") for word in command):
            raise subprocess.CalledProcessError(6, command)
        return SimpleNamespace(stdout="an answer\nmore\n")

    gpu = SimpleNamespace(uuid="1-2", L2_cache_size=50, total_memory=10**9)
    monkeypatch.setattr(results.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.delenv("TOKENFLEX_COMMIT", raising=False)
    return commands


def test_driver_and_clocks_are_those_of_the_gpu_in_use(commands):
    columns = results.environment("cuda")
    assert (columns["gpu"], columns["driver"], columns["clocks"]) == (
        "NVIDIA H200",
        "an answer",
        "an answer",
    )
    queries = [command for command in commands if command[0] == "nvidia-smi"]
    clocks = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    assert [query[1] for query in queries] == 2 * ["--query-gpu=driver_version"] + 2 * [clocks]
    assert [query[3:] for query in queries] == 2 * [("--id=GPU-1-2",), ()]


def test_a_tree_with_changes_is_called_dirty(commands):
    assert results.environment("cpu")["commit"] == "an answer"
    assert commands == [("git", "-C", str(results.ROOT), "describe", "--always", "--dirty")]


def test_a_tree_without_history_is_named_by_the_environment(commands, monkeypatch):
    monkeypatch.setenv("TOKENFLEX_COMMIT", "abc")
    assert results.environment("cpu")["commit"] == "abc"


def test_the_last_cache_of_a_gpu_is_its_l2(commands):
    assert last_level_cache("cuda") == 50


def test_machines_have_names_of_their_own():
    names = {"gpu": "NVIDIA H200", "cpu": "AMD EPYC", "cores": 2}
    assert results.machine_name(names) == "nvidia-h200"
    assert results.machine_name(names | {"gpu": ""}) == "cpu-amd-epyc-2-cores"


# ---- the CSV


def test_csv_has_the_environment_and_no_host_name(tmp_path):
    shared = environment("cpu")
    write_csv(tmp_path / "out.csv", [{"a": 1, "b": "x,y"}, {"a": 2, "b": ""}], shared)
    rows = read_csv(tmp_path / "out.csv")
    assert [(row["a"], row["b"]) for row in rows] == [("1", "x,y"), ("2", "")]
    assert rows[0]["torch"] == torch.__version__
    assert list(rows[0]) == ["a", "b", *shared]
    assert platform.node() not in rows[0].values()


def test_a_row_of_another_version_may_lack_columns(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, [{"a": 1}, {"a": 2, "new": 3}], {})
    assert read_csv(path) == [{"a": "1", "new": ""}, {"a": "2", "new": "3"}]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, [{"a": 1}], {"b": 2})
    with pytest.raises(UnicodeEncodeError):
        write_csv(path, [{"a": 3}, {"a": "\udc00"}], {"b": 2})
    assert read_csv(path) == [{"a": "1", "b": "2"}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the columns of a result, got none called a"),
        ("b\n1\n", "must have the columns of a result, got none called a"),
        ("a,b\n", "must have rows, got none"),
        ("a,b\n1\n", "must have a value for every column"),
        ("a,b\n1,2,3\n", "must have a value for every column"),
    ],
)
def test_what_is_no_csv_of_results_is_refused(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_csv(path, ("a",))


def test_shares_of_the_data_sheet():
    rows = [{"gb_per_s": 48.0, "tflop_per_s": ""}, {"gb_per_s": "", "tflop_per_s": 98.95}]
    rows = [new_row(**row) for row in rows]
    add_shares(rows, {"gpu": "NVIDIA H200"})
    assert [(row["share_of_sheet"], row["share_of_copy"]) for row in rows] == [
        (0.01, ""),
        (0.1, ""),
    ]
