"""Rows of a batch: each draws, stops and speaks by its own settings."""

from __future__ import annotations

import pytest
import torch

from tests.serving.server_tools import tiny_served
from tokenflex.serving.server.rows import Row, RowMonitor, RowSampler, draw

END = 99


def letters(ids: list[int]) -> str:
    """0 is "a", 1 is "b", ...; 50 and 51 together are one character; END has no text."""
    text, ids = "", [i for i in ids if i != END]
    while ids:
        token = ids.pop(0)
        if token == 50:
            whole = bool(ids) and ids[0] == 51
            text += "é" if whole else "\ufffd"
            ids = ids[1:] if whole else ids
        else:
            text += chr(ord("a") + token)
    return text


def written(tokens: list[int], **options) -> tuple[Row, list[str]]:
    told: list[str] = []
    options = {"max_tokens": 100, "tell": told.append, **options}
    row = Row(letters, {END}, **options)
    for token in tokens:
        if row.push(token):
            break
    return row, told


def test_an_end_token_ends_and_is_counted():
    row, told = written([0, 1, END, 2])
    assert (row.text, row.reason, len(row.ids), told) == ("ab", "stop", 3, ["a", "b"])


def test_the_longest_answer_ends_by_length():
    row, _ = written([0, 1, 2, 3], max_tokens=3)
    assert (row.text, row.reason) == ("abc", "length")


def test_an_end_on_the_last_token_is_a_stop():
    assert written([0, 1, END], max_tokens=3)[0].reason == "stop"


def test_a_finished_row_takes_no_more():
    row, told = written([0, END])
    assert row.push(5)
    assert (row.ids, told) == ([0, END], ["a"])


@pytest.mark.parametrize(
    ("tokens", "stops", "text", "told"),
    [
        ([0, 1, 2, 3], ["bc"], "a", ["a"]),
        ([0, 1, 3, 2, END], ["bc"], "abdc", ["a", "bd", "c"]),  # "b" could have begun one
        ([0, 1, 2, END], ["bcd"], "abc", ["a", "bc"]),  # and is told at the end
        ([0, 0, 1, 1], ["ab", "aab"], "", []),
        ([1, 2, 0, 1, 2], ["c", "b"], "", []),
    ],
)
def test_stops_are_never_told(tokens, stops, text, told):
    row, pieces = written(tokens, stops=stops)
    assert (row.text, pieces) == (text, told)
    assert row.reason == "stop"


def test_half_a_character_is_not_told():
    row, told = written([0, 50, 51, 1, END])
    assert told == ["a", "é", "b"]
    assert row.text == "aéb"


def test_an_answer_that_nobody_reads_on_is_decoded_once():
    calls = []

    def decode(ids: list[int]) -> str:
        calls.append(len(ids))
        return letters(ids)

    row = Row(decode, {END}, 100)
    for token in (0, 1, 2, END):
        row.push(token)
    assert row.text == "abc"
    assert calls == [4]


def test_a_cancelled_row_ends_at_its_next_token():
    cancelled = []
    row = Row(letters, {END}, 100, is_cancelled=lambda: bool(cancelled))
    assert not row.push(0)
    cancelled.append(True)
    assert row.push(1)
    assert row.reason == "cancelled"


# ---- draws


def scores(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def shares(number: int, values: torch.Tensor, **options) -> list[float]:
    row = Row(letters, {END}, 10**9, seed=1, **options)
    tokens = torch.tensor([draw(values, row) for _ in range(number)])
    return [float((tokens == i).float().mean()) for i in range(len(values))]


def test_draws_follow_the_temperature():
    values = scores(0.5, 0.3, 0.2)
    assert shares(1500, values, temperature=1.0) == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    squared = torch.tensor([0.25, 0.09, 0.04])
    expected = (squared / squared.sum()).tolist()
    assert shares(1500, values, temperature=0.5) == pytest.approx(expected, abs=0.05)
    assert shares(100, values, temperature=1e-8) == [1, 0, 0]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    values = scores(0.2, 0.5, 0.3)
    assert shares(500, values, temperature=1.0, top_p=0.5) == [0, 1, 0]
    drawn = shares(1500, values, temperature=1.0, top_p=0.51)
    assert drawn == pytest.approx([0, 0.625, 0.375], abs=0.05)
    assert all(shares(500, values, temperature=1.0, top_p=1.0))


@pytest.mark.parametrize("tiny", [1e-40, 1e-300, 5e-324])
def test_numbers_below_those_of_float32_are_the_limit(tiny):
    values = scores(0.2, 0.5, 0.3)
    assert shares(50, values, temperature=tiny) == [0, 1, 0]
    assert shares(50, values, temperature=2.0, top_p=tiny) == [0, 1, 0]
    assert shares(50, values, temperature=tiny, top_p=tiny) == [0, 1, 0]


def test_suppressed_tokens_are_never_drawn():
    values = torch.tensor([0.0, -torch.inf, 0.0])
    assert shares(500, values, temperature=2.0)[1] == 0


def test_rows_of_a_batch_do_not_change_each_other():
    """A greedy row keeps its scores, and a seeded row draws the same in any company."""
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))

    def rows(*settings) -> list[Row]:
        return [Row(letters, {END}, 9, temperature=t, seed=s) for t, s in settings]

    together = RowSampler(rows((0, 1), (1.0, 5), (1.0, 6)))(None, values)
    assert torch.equal(together[0], values[0])
    alone = RowSampler(rows((1.0, 5)))(None, values[1:2])
    assert torch.equal(together[1], alone[0])
    assert together[1].isfinite().sum() == 1
    assert torch.equal(RowSampler(rows((0, 1)))(None, values[:1]), values[:1])


def test_the_monitor_ends_rows_by_themselves():
    rows = [Row(letters, {END}, 2), Row(letters, {END}, 5)]
    steps = []
    monitor = RowMonitor(rows, lambda: steps.append([row.reason for row in rows]))
    assert monitor(torch.tensor([[7, 0], [7, 1]]), None).tolist() == [False, False]
    assert monitor(torch.tensor([[7, 0, 3], [7, 1, END]]), None).tolist() == [True, True]
    assert steps == [[None, None], ["length", "stop"]]


def test_the_models_own_sampling_is_the_default():
    served = tiny_served()
    assert served.defaults.temperature == 0
    served.model.generation_config.do_sample = True
    served.model.generation_config.temperature = 0.6
    served.model.generation_config.top_p = 0.8
    again = type(served)(served.model, served.processor, served.limits, 2**20)
    assert (again.defaults.temperature, again.defaults.top_p) == (0.6, 0.8)
