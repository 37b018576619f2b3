"""Tests in slices of time: their order, what another call leaves out, and exit statuses."""

from __future__ import annotations

import csv

import pytest

from tests.continued import ordered

pytest_plugins = ["pytester"]

SMALL = """
import pytest, torch

@pytest.mark.first
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel(dtype, size): pass

@pytest.mark.parametrize("size", [1, 2])
def test_other(size): pass
"""
REAL = "def test_batch(): pass\ndef test_graph(): pass\n"
ORDER = [
    *("test_kernel[torch.float32-1]", "test_kernel[torch.float16-1]"),
    *("test_batch", "test_graph"),
    "test_other[1]",
    *("test_kernel[torch.float32-2]", "test_kernel[torch.float16-2]", "test_other[2]"),
]


@pytest.fixture
def call(pytester, monkeypatch):
    """Run the tests of the folder as ``make gpu`` does, and return the exit status."""
    monkeypatch.setenv("TOKENFLEX_COMMIT", "abc")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # for time
    pytester.makeini("[pytest]\nmarkers =\n    first\n    gpu\n    slow\n")

    def run(*options):
        given = ("-p", "tests.continued", "-p", "no:cacheprovider", "--results", "results.csv")
        return pytester.runpytest_inprocess(*given, *options)

    return run


def rows_of(pytester):
    with (pytester.path / "results.csv").open(encoding="utf-8") as file:
        return {row["test"].partition("::")[2]: row["status"] for row in csv.DictReader(file)}


def test_what_tells_most_runs_first(pytester, call):
    pytester.makepyfile(test_a_kernel=SMALL, test_kernels_on_gpu=REAL)
    assert call().ret == 0
    assert list(rows_of(pytester)) == ORDER
    assert set(rows_of(pytester).values()) == {"passed"}


def test_another_call_continues(pytester, call):
    pytester.makepyfile(test_a_kernel=SMALL, test_kernels_on_gpu=REAL)
    for ended in (1, 2):
        assert call("--seconds", "0").ret == 75
        assert list(rows_of(pytester)) == ORDER[:ended]
    assert call("--seconds", "60").ret == 0
    assert list(rows_of(pytester)) == ORDER
    result = call("--seconds", "0")
    assert result.ret == 0
    result.assert_outcomes(deselected=len(ORDER))


def test_failures_are_kept_and_not_repeated(pytester, call):
    pytester.makepyfile(
        test_it="""
        import pytest
        def test_bad(): assert 1 == 2, "of no use"
        def test_error(missing): pass
        def test_good(): pass
        def test_skipped(): pytest.skip("no reason")
        """
    )
    assert call().ret == 1
    rows = rows_of(pytester)
    assert rows["test_bad"].startswith("failed: AssertionError: of no use")
    assert rows["test_error"].startswith("failed: ")
    assert (rows["test_good"], rows["test_skipped"]) == ("passed", "skipped")
    result = call()
    result.assert_outcomes(deselected=4)
    assert result.ret == 1


def test_another_commit_starts_over(pytester, call, monkeypatch):
    pytester.makepyfile(test_it="def test_good(): pass")
    call()
    monkeypatch.setenv("TOKENFLEX_COMMIT", "def")
    call().assert_outcomes(passed=1)


def test_a_test_that_ended_the_process_is_left_out(pytester, call):
    pytester.makepyfile(test_it="def test_hangs(): pass\ndef test_good(): pass")
    (pytester.path / "results.csv.running").write_text("test_it.py::test_hangs", encoding="utf-8")
    result = call()
    result.assert_outcomes(passed=1, deselected=1)
    assert result.ret == 1
    assert rows_of(pytester)["test_hangs"].startswith("failed: hung")


def test_a_test_that_ends_the_use_of_the_gpu_costs_itself_alone(pytester, call, monkeypatch):
    from tests import continued

    started = []

    def execv(path, arguments):
        started.append(arguments)
        raise KeyboardInterrupt  # execv does not return

    pytester.makepyfile(test_it="def test_bad(): assert 0\ndef test_good(): pass")
    monkeypatch.setattr(continued.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(continued.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(continued, "device_is_lost", lambda: True)
    monkeypatch.setattr(continued.os, "execv", execv)
    call("--seconds", "60")
    ((*_, option, left),) = started
    assert option == "--seconds"
    assert 0 < float(left) <= 60
    call().assert_outcomes(passed=1, deselected=1)


def test_errors_of_collection_keep_their_status(pytester, call):
    pytester.makepyfile(test_it="import nothing_of_this_name", test_other="def test_one(): pass")
    assert call().ret == pytest.ExitCode.INTERRUPTED


def test_nothing_is_lost_by_the_order(request):
    items = request.session.items
    assert sorted(map(id, ordered(items))) == sorted(map(id, items))
