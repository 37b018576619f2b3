"""Requests taken together: one batch, each its own counts and settings, none lost."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from transformers import Siglip2ImageProcessorPil

from tests.models.tiny import IMAGE, picture, vision_config
from tests.serving.server_tools import (
    COUNTS,
    alone,
    chat,
    data_url,
    image_part,
    pieces,
    running,
    streamed_text,
    tiny_served,
)
from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.serving.server.batching import Answers, Batcher, Job
from tokenflex.serving.server.chat_request import Limits, RequestError, parse_request
from tokenflex.serving.server.metrics import Metrics
from tokenflex.serving.server.served import TokenFlexServed


class Harness:
    """A batcher whose thread waits, so that a test decides what it finds."""

    def __init__(self, served, max_rows: int = 32) -> None:
        self.served, self.metrics = served, Metrics()
        self.batcher = Batcher(served, self.metrics, max_rows)
        self.events: list[list] = []

    def submit(self, body: dict, **changes) -> Job:
        content = json.dumps(body).encode()
        request = parse_request(content, self.served.limits, self.served.defaults)
        told: list = []
        self.events.append(told)
        prompt = self.served.prepare(request)
        job = Job(prompt, request.sampling, told.append, request.stream, **changes)
        self.batcher.submit(job)
        return job

    def run(self) -> list:
        """Answer what waits; return the last event of each request."""
        self.batcher.start()
        deadline = time.monotonic() + 60
        while not all(
            told and isinstance(told[-1], (Answers, RequestError)) for told in self.events
        ):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        self.batcher.stop()
        return [told[-1] for told in self.events]


@pytest.fixture(scope="module")
def served():
    return tiny_served()


def test_requests_of_different_counts_are_one_generate(served):
    harness = Harness(served)
    for seed, count in ((1, 4), (2, 9), (1, 16), (3, [2, 3])):
        harness.submit(chat(image_part(seed), num_image_tokens=count))
    harness.submit({"messages": [{"role": "user", "content": "read r2c3"}], "max_tokens": 6})
    harness.submit(chat(image_part(1), image_part(2), num_image_tokens=[4, 16]))
    answers = harness.run()
    assert [a.texts[0] for a in answers] == [
        alone(served, [1], 4),
        alone(served, [2], 9),
        alone(served, [1], 16),
        alone(served, [3], (2, 3)),
        alone(served, [], None),
        alone(served, [1, 2], [4, 16]),
    ]
    assert harness.metrics.batch_rows.number == 1
    assert harness.metrics.batch_rows.total == 6
    # Pictures 1, 2 and 3, each once: the others find the features.
    assert [a.usage["encoder_passes"] for a in answers] == [1, 1, 0, 1, 0, 0]


def test_new_pictures_of_a_batch_are_encoded_in_one_pass():
    """Each once, whoever shows it; the answers are those of pictures that are encoded alone."""
    served = tiny_served()
    encode, calls = served.model.encode_images, []

    def counted(pixels, grids=None):
        calls.append(len(pixels))
        return encode(pixels, grids)

    served.model.encode_images = counted
    harness = Harness(served)
    seeds = [(1,), (2,), (1, 3), (2,)]
    for shown in seeds:
        harness.submit(chat(*map(image_part, shown), num_image_tokens=9))
    answers = harness.run()
    assert calls == [3]
    assert [a.usage["encoder_passes"] for a in answers] == [1, 1, 1, 0]
    del served.model.encode_images
    assert [a.texts[0] for a in answers] == [alone(served, [*shown], 9) for shown in seeds]


def test_pictures_of_any_shape_share_a_pass(served):
    """Patches of pictures of other shapes (NaFlex), each with its own grid."""
    text = served.model.config.text_config
    config = TokenFlexConfig(vision_config("siglip2"), text, image_token_id=IMAGE)
    processor = TokenFlexProcessor(
        Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64),
        served.processor.tokenizer,
        chat_template=served.processor.chat_template,
        num_image_tokens=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = TokenFlexForConditionalGeneration(config).eval()
    any_shape = TokenFlexServed(model, processor, Limits(), 2**24)
    encode, calls = model.encode_images, []

    def counted(pixels, grids=None):
        calls.append(len(pixels))
        return encode(pixels, grids)

    model.encode_images = counted

    def answers(*shapes):
        harness = Harness(any_shape)
        for shape in shapes:
            shown = image_part(data_url(picture(1, shape)))
            harness.submit(chat(shown, num_image_tokens=[2, 3]))
        return [answer.texts for answer in harness.run()]

    wide, square, tall = (16, 64), (32, 32), (64, 16)
    together = answers(wide, square) + answers(square, tall)
    assert calls == [2, 1]  # the square is known by then
    any_shape.cache.clear()
    assert together == [*answers(wide), *answers(square) * 2, *answers(tall)]
    assert calls == [2, 1, 1, 1, 1]


def test_a_picture_that_cannot_be_encoded_fails_alone(served):
    """Pictures of a batch are encoded together, and one by one where that fails."""
    encode = served.model.encode_images

    def failing(pixels, grids=None):
        if len(pixels) > 1:
            raise RuntimeError("together")
        return encode(pixels, grids)

    harness = Harness(served)
    for seed in (501, 502):
        harness.submit(chat(image_part(seed), num_image_tokens=4))
    served.model.encode_images = failing
    try:
        answers = harness.run()
    finally:
        del served.model.encode_images
    assert [a.texts[0] for a in answers] == [alone(served, [s], 4) for s in (501, 502)]


def test_rows_of_a_batch_have_their_own_lengths_and_draws(served):
    bodies = [
        chat(image_part(1), num_image_tokens=4, max_tokens=2),
        chat(image_part(1), num_image_tokens=16, max_tokens=12),
        chat(image_part(2), temperature=1.3, seed=5, n=2, max_tokens=5),
    ]
    harness = Harness(served)
    for body in bodies:
        harness.submit(body)
    together = harness.run()
    for body, answer in zip(bodies, together, strict=True):
        single = Harness(served)
        single.submit(body)
        (expected,) = single.run()
        assert answer.texts == expected.texts
        assert answer.reasons == expected.reasons
        assert answer.usage["completion_tokens"] == expected.usage["completion_tokens"]
    assert together[0].usage["completion_tokens"] == 2


def test_a_short_answer_does_not_wait_for_a_long_one(served):
    harness = Harness(served)
    order: list[int] = []
    for i, length in enumerate((40, 3)):
        job = harness.submit(chat(image_part(1), num_image_tokens=16, max_tokens=length))
        tell = job.tell
        job.tell = lambda event, i=i, tell=tell: (order.append(i), tell(event))
    harness.run()
    assert order == [1, 0]
    assert harness.metrics.batch_rows.number == 1


def test_a_batch_has_at_most_its_rows(served):
    harness = Harness(served, max_rows=4)
    for n in (1, 2, 2, 1, 4):
        harness.submit(chat(image_part(1), n=n, temperature=1, seed=1))
    answers = harness.run()
    assert [len(a.texts) for a in answers] == [1, 2, 2, 1, 4]
    rows = harness.metrics.batch_rows
    assert (rows.number, rows.total) == (3, 10)  # 1 + 2, 2 + 1, 4


def test_cancelled_requests_are_dropped_before_the_model(served):
    harness = Harness(served)
    kept = harness.submit(chat(image_part(1), num_image_tokens=4))
    for _ in range(3):
        harness.submit(chat(image_part(901), num_image_tokens=4)).cancelled.set()
    dropped = [harness.events.pop() for _ in range(3)]
    passes = served.encoded_images
    harness.run()
    assert kept.rows[0].text == alone(served, [1], 4)
    assert dropped == [[], [], []]
    assert served.encoded_images <= passes + 1
    assert harness.metrics.batch_rows.total == 1


def test_a_mistake_found_late_does_not_fail_its_neighbours(served):
    """A count beyond the grid is known once the picture is read."""
    harness = Harness(served)
    harness.submit(chat(image_part(1), num_image_tokens=4))
    harness.submit(chat(image_part(1), num_image_tokens=81))
    good, bad = harness.run()
    assert good.texts == [alone(served, [1], 4)]
    assert bad.status == 400


@contextmanager
def failing_generate(served, fails):
    generate = served.model.generate

    def wrapped(**kwargs):
        if fails(kwargs):
            raise RuntimeError("out of order")
        return generate(**kwargs)

    served.model.generate = wrapped
    try:
        yield
    finally:
        del served.model.generate


def test_one_request_that_fails_does_not_fail_the_others(served, caplog):
    poison = chat(image_part(1), num_image_tokens=[1, 5])
    harness = Harness(served)
    harness.submit(chat(image_part(1), num_image_tokens=4))
    harness.submit(poison)
    harness.submit(chat(image_part(1), num_image_tokens=9))
    with failing_generate(served, lambda kwargs: (1, 5) in kwargs["num_image_tokens"]):
        first, bad, last = harness.run()
    assert first.texts == [alone(served, [1], 4)]
    assert last.texts == [alone(served, [1], 9)]
    assert (bad.status, bad.code) == (500, "internal_error")
    assert "out of order" not in bad.message  # for the log alone
    assert ["out of order" in r.getMessage() for r in caplog.records] == [True]
    assert not any(record.exc_info for record in caplog.records)


def test_the_server_lives_on_after_a_fault(caplog):
    served = tiny_served()
    with running(served) as client:
        with failing_generate(served, lambda _: True):
            answer = client.post(chat(image_part(1)))
            assert answer.status == 500
            assert answer.error["type"] == "server_error"
        assert client.post(chat(image_part(1))).text == alone(served, [1], 9)


def test_a_shutdown_ends_what_is_left(served):
    """Waiting requests are refused, and the thread ends."""
    harness = Harness(served)
    harness.submit(chat(image_part(1)))
    harness.batcher.finish(0.0)
    (refused,) = harness.run()
    assert (refused.status, refused.code) == (503, "shutting_down")
    late: list = []
    job = harness.submit(chat(image_part(1)))
    job.tell = late.append
    harness.batcher.submit(job)
    assert late[0].status == 503


def test_a_long_answer_ends_at_the_deadline(served):
    harness = Harness(served)
    job = harness.submit(chat(image_part(1), max_tokens=200, num_image_tokens=16))
    step = served.model.forward

    def slow(*args, **kwargs):
        time.sleep(0.02)
        return step(*args, **kwargs)

    served.model.forward = slow
    try:
        harness.batcher.start()
        while not job.started:
            time.sleep(0.01)
        harness.batcher.finish(0.1)
        refused = wait_for(harness)
    finally:
        del served.model.forward
    assert refused.status == 503
    harness.batcher.stop()


def wait_for(harness: Harness):
    deadline = time.monotonic() + 30
    while not harness.events[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    return harness.events[0][-1]


# ---- a crowd


def crowd(served, number: int) -> list[tuple[dict, str]]:
    """Requests of mixed counts, half of them streamed, and their expected answers."""
    expected: dict[tuple, str] = {}
    requests = []
    for i in range(number):
        seed, count = 1 + i % 7, [*COUNTS, (2, 3), (3, 4)][i % 5]
        question = f"read r{1 + i % 4}c{1 + i % 3}"
        key = (seed, count, question)
        if key not in expected:
            expected[key] = alone(served, [seed], count, question)
        body = chat(image_part(seed), question=question, num_image_tokens=count, stream=i % 2 == 0)
        requests.append((body, expected[key]))
    return requests


def answer_crowd(client, requests) -> list[str]:
    start = threading.Barrier(len(requests))

    def ask(body: dict) -> str:
        start.wait(60)
        answer = client.post(body)
        assert answer.status == 200, answer.body
        return streamed_text(pieces(answer)) if body["stream"] else answer.text

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, [body for body, _ in requests]))


def test_a_crowd_loses_nobody(served):
    requests = crowd(served, 40)
    with running(served) as client:
        assert answer_crowd(client, requests) == [text for _, text in requests]
        assert client.metric("batches_total") < 40
        assert client.metric("requests_in_house") == 0


@pytest.mark.slow
def test_two_hundred_at_once(served):
    """200 connections at once, of mixed counts: each answer is the model's own, alone."""
    requests = crowd(served, 200)
    fresh = tiny_served()
    with running(fresh) as client:
        assert answer_crowd(client, requests) == [text for _, text in requests]
        assert client.metric('requests_total{status="200"}') == 200
        assert client.metric("encoder_passes_total") == 7  # pictures, whatever their counts
        assert client.metric("batches_total") <= 100
        assert client.metric("requests_in_house") == 0


def test_limits_of_the_prompt_hold_for_vision_tokens_and_text():
    limited = tiny_served(Limits(max_prompt_tokens=12))
    with running(limited) as client:
        assert client.post(chat(image_part(1), num_image_tokens=9)).status == 200
        refused = client.post(chat(image_part(1), num_image_tokens=16))
        assert refused.status == 400
        assert "12" in refused.error["message"]
        budget = client.post(chat(image_part(1), budget=16))
        assert budget.error["code"] == "context_length_exceeded"
