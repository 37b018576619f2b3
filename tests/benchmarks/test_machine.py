"""What a figure was measured on: what is asked of the machine, and what is made of its answers."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine
from benchmarks.machine import last_level_cache


@pytest.fixture
def asked(monkeypatch):
    """The commands that are run; nvidia-smi knows no GPU by its number."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if any(word.startswith("--id=") for word in command):
            raise subprocess.CalledProcessError(6, command)
        return SimpleNamespace(stdout="an answer\nmore\n")

    gpu = SimpleNamespace(uuid="1-2", L2_cache_size=50, total_memory=10**9)
    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.delenv("TOKENFLEX_COMMIT", raising=False)
    return commands


def test_driver_and_clocks_are_those_of_the_gpu_in_use(asked):
    columns = machine.environment("cuda")
    assert (columns["gpu"], columns["driver"], columns["clocks"]) == (
        "NVIDIA H200",
        "an answer",
        "an answer",
    )
    queries = [one for one in asked if one[0] == "nvidia-smi"]
    wanted = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    assert [one[1] for one in queries] == 2 * [wanted] + 2 * ["--query-gpu=driver_version"]
    assert [one[3:] for one in queries] == 2 * [("--id=GPU-1-2",), ()]


def test_a_tree_with_changes_is_called_dirty(asked):
    assert machine.environment("cpu")["commit"] == "an answer"
    assert asked == [("git", "-C", str(machine.ROOT), "describe", "--always", "--dirty")]


def test_a_tree_without_history_is_named_by_the_environment(asked, monkeypatch):
    monkeypatch.setenv("TOKENFLEX_COMMIT", "abc")
    assert machine.environment("cpu")["commit"] == "abc"


def test_the_last_cache_of_a_gpu_is_its_l2(asked):
    assert last_level_cache("cuda") == 50


def test_the_h200_has_a_data_sheet():
    assert machine.DATA_SHEETS["NVIDIA H200"] == (4800, 989)


def test_machines_have_names_of_their_own():
    names = {"gpu": "NVIDIA H200", "cpu": "AMD EPYC", "cores": 2}
    assert machine.machine_name(names) == "nvidia-h200"
    assert machine.machine_name(names | {"gpu": ""}) == "cpu-amd-epyc-2-cores"
