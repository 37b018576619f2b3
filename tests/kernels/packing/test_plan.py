"""`plan_packing`: both planners against ten lines of Python, and everything they must refuse."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import is_frozen_dataclass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from tokenflex_kernels import PackPlan, plan_packing
from tokenflex_kernels.backend import extension

IMAGE = -200
TENSORS = ("input_ids", "position_ids", "labels", "source", "vision_rows", "cu_seqlens")
BACKENDS = ("reference", "auto")


def plan_with(backend: str, *args, **kwargs) -> PackPlan:
    with patch.dict("os.environ", TOKENFLEX_BACKEND=backend):
        return plan_packing(*args, **kwargs)


def naive_rows(samples, counts, labels, ignore_index, image_index=None):
    """The packed batch as a list of (token, position, label, source) per sample."""
    images = iter(range(len(counts)) if image_index is None else image_index)
    ends = [0, *np.cumsum(counts, dtype=int)]
    for tokens, targets in zip(samples, labels, strict=True):
        rows = []
        for token, target in zip(tokens, targets, strict=True):
            sources = [token]
            if token == IMAGE:
                image = next(images)
                sources = [~vision for vision in range(ends[image], ends[image + 1])]
            for source in sources:
                target = ignore_index if source < 0 or not rows else target
                rows.append((token, len(rows), target, source))
        yield rows


@st.composite
def batches(draw, least_count=0):
    """Prompts of text and placeholders, counts, and the image of each placeholder or None."""
    token = st.one_of(st.just(IMAGE), st.integers(0, 5), st.just(2**31 - 1))
    samples = draw(st.lists(st.lists(token, max_size=8), max_size=5))
    images = sum(sample.count(IMAGE) for sample in samples)
    if draw(st.booleans()):
        counts = draw(st.lists(st.integers(least_count, 5), min_size=images, max_size=images))
        return samples, counts, None
    counts = draw(st.lists(st.integers(least_count, 5), min_size=1, max_size=4))
    shown = st.integers(0, len(counts) - 1)
    return samples, counts, draw(st.lists(shown, min_size=images, max_size=images))


def assert_same_plan(plan: PackPlan, expected: PackPlan) -> None:
    for name in TENSORS:
        actual, wanted = getattr(plan, name), getattr(expected, name)
        assert actual.dtype == wanted.dtype, name
        assert actual.tolist() == wanted.tolist(), name
    facts = ("lengths", "max_token_id", "num_token_ids", "token_counts", "num_vision_tokens")
    for name in (*facts, "image_index", "shown_once"):
        assert getattr(plan, name) == getattr(expected, name), name


# ---- what a plan says


@pytest.mark.parametrize("backend", BACKENDS)
@given(batch=batches(), with_labels=st.booleans(), ignore_index=st.sampled_from([-100, -1]))
@settings(deadline=None, max_examples=60)
def test_plan_is_what_the_naive_loop_writes(backend, batch, with_labels, ignore_index):
    samples, counts, index = batch
    given_labels = [[token + 7 for token in sample] for sample in samples]
    plan = plan_with(
        backend,
        samples,
        counts,
        IMAGE,
        labels=given_labels if with_labels else None,
        ignore_index=ignore_index,
        image_index=index,
    )

    by_sample = list(
        naive_rows(samples, counts, given_labels if with_labels else samples, ignore_index, index)
    )
    rows = [row for sample in by_sample for row in sample]
    assert plan.input_ids.tolist() == [row[0] for row in rows]
    assert plan.position_ids.tolist() == [row[1] for row in rows]
    assert plan.labels.tolist() == [row[2] for row in rows]
    assert plan.source.tolist() == [row[3] for row in rows]
    shown = sorted((~row[3], at) for at, row in enumerate(rows) if row[3] < 0)
    assert plan.vision_rows.tolist() == [at for _, at in shown]
    assert plan.vision_tokens().tolist() == [token for token, _ in shown]
    assert plan.num_vision_tokens == sum(counts)
    assert plan.shown_once == (index is None or sorted(index) == list(range(len(counts))))
    assert plan.lengths == tuple(len(sample) for sample in by_sample)
    assert plan.cu_seqlens.tolist() == [0, *np.cumsum(plan.lengths, dtype=int)]
    text = {row[3] for row in rows if row[3] >= 0}
    assert plan.max_token_id == max(text, default=-1)
    assert plan.num_token_ids == len(text)
    assert plan.num_tokens == len(rows)
    assert plan.num_samples == len(samples)
    assert plan.max_seqlen == max(plan.lengths, default=0)
    assert {name: getattr(plan, name).dtype for name in TENSORS} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "labels": torch.int64,
        "source": torch.int32,
        "vision_rows": torch.int32,
        "cu_seqlens": torch.int32,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("largest", [3, 63, 64, 1000, 40_000, 2**31 - 1])
def test_different_token_ids_are_counted(backend, largest):
    """Few and many of them, by both of the planner's ways."""
    generator = np.random.default_rng(largest)
    for tokens in (0, 1, 5, 60, 2000):
        ids = generator.integers(0, largest + 1, tokens)
        ids[: tokens // 2] = ids[tokens - tokens // 2 :]
        plan = plan_with(backend, [[*ids, IMAGE, largest]], [2], IMAGE)
        assert plan.num_token_ids == len({*ids.tolist(), largest})


@pytest.mark.parametrize("backend", BACKENDS)
@given(batch=batches(least_count=1))
@settings(deadline=None, max_examples=60)
def test_expanded_prompts_plan_like_compact_ones(backend, batch):
    samples, counts, index = batch
    shown = iter(counts if index is None else [counts[image] for image in index])
    repeated = [
        [copy for token in sample for copy in [token] * (next(shown) if token == IMAGE else 1)]
        for sample in samples
    ]
    assert_same_plan(
        plan_with(backend, repeated, counts, IMAGE, expanded=True, image_index=index),
        plan_with(backend, samples, counts, IMAGE, image_index=index),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["list", "tuple", "int32 tensor", "uint8 array", "2-D tensor"])
def test_inputs_may_be_sequences_arrays_or_tensors(backend, kind):
    samples, counts = [[1, 9, 2], [3, 4, 9]], [2, 1]
    convert = {
        "list": lambda rows: rows,
        "tuple": lambda rows: tuple(tuple(row) for row in rows),
        "int32 tensor": lambda rows: [torch.tensor(row, dtype=torch.int32) for row in rows],
        "uint8 array": lambda rows: [np.array(row, np.uint8)[::-1][::-1] for row in rows],
        "2-D tensor": torch.tensor,
    }[kind]
    wanted = plan_with("reference", samples, counts, 9, labels=samples)
    (counts,) = convert([counts])
    assert_same_plan(
        plan_with(backend, convert(samples), counts, 9, labels=convert(samples)), wanted
    )


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.array([True, False]), TypeError, "must hold ints, got bool"),
        (np.array([1.0, 2.0]), TypeError, "must hold ints, got float64"),
        (np.array([2**63], np.uint64), ValueError, "must fit int64"),
        (np.array([[1, 2]]), ValueError, "must have 1 dimension"),
    ],
)
def test_arrays_of_another_kind_among_int64_are_refused(array, error, message):
    right = np.array([1, 2])
    with pytest.raises(error, match=rf"input_ids\[1\].*{message}"):
        plan_packing([right, array], [], IMAGE)
    with pytest.raises(error, match=rf"labels\[0\].*{message}"):
        plan_packing([right, right], [], IMAGE, labels=[array, right])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_as_they_were(backend):
    samples, counts = [torch.tensor([1, IMAGE, 2])], torch.tensor([3])
    plan = plan_with(backend, samples, counts, IMAGE, labels=samples)
    plan.input_ids.fill_(0)
    assert samples[0].tolist() == [1, IMAGE, 2]
    assert counts.tolist() == [3]


def test_planning_reads_copies():
    """A thread of the collator may write to a batch while the extension reads it."""
    sample, counts, images = np.array([1, IMAGE, 2]), np.array([3]), np.array([0])
    labels, seen = sample + 7, []

    class Spy:
        def plan(self, *arguments):
            seen.extend(value for value in arguments if isinstance(value, np.ndarray))
            return extension().plan(*arguments)

    with patch("tokenflex_kernels.packing.plan.extension", Spy):
        plan_packing([sample], counts, IMAGE, labels=[labels], image_index=images)
    assert len(seen) == 5
    for given_array in (sample, counts, labels, images):
        assert not any(np.shares_memory(given_array, array) for array in seen)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sets a limit on addresses")
def test_planning_takes_no_memory_for_ids_that_are_not_there():
    """A bit for every id up to 2^31 would be 256 MB."""
    resource = importlib.import_module("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 100 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        plan = plan_packing([[2**31 - 1, IMAGE, 5]], [2], IMAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert plan.num_token_ids == 2


# ---- what a plan is


def test_plan_survives_pickling():
    plan = plan_packing([[1, IMAGE, 2], []], [3], IMAGE)
    assert_same_plan(pickle.loads(pickle.dumps(plan)), plan)


def test_torch_compile_reads_no_more_of_a_plan_than_is_used():
    """It reads frozen dataclasses whole (up to 2.11 at least), `lengths` and all."""
    assert not is_frozen_dataclass(plan_packing([[1]], [], IMAGE))


def test_plan_is_frozen_and_moves_whole():
    plan = plan_packing([[1, IMAGE, 2]], [3], IMAGE)
    with pytest.raises(AttributeError, match="cannot assign to field 'source'"):
        plan.source = plan.source
    moved = plan.to("meta")
    assert all(getattr(moved, name).is_meta for name in TENSORS)
    assert (moved.lengths, moved.max_token_id) == (plan.lengths, plan.max_token_id)


@pytest.mark.parametrize("device", [torch.int64, None, 1.5])
def test_a_plan_moves_to_devices_only(device):
    """A tensor's ``to`` takes a dtype, but the movers would read other ints as int32."""
    plan = plan_packing([[1, IMAGE, 2]], [3], IMAGE)
    with pytest.raises(TypeError, match=f"device must be .*str or int, got {device}"):
        plan.to(device)


def collate(samples):
    return plan_packing(samples, [2] * len(samples), IMAGE)


def test_plan_can_be_made_in_a_dataloader_worker():
    loader = DataLoader(
        [[1, IMAGE], [IMAGE, 2, 3]], batch_size=2, num_workers=1, collate_fn=collate
    )
    (plan,) = loader
    assert_same_plan(plan, collate([[1, IMAGE], [IMAGE, 2, 3]]))


def test_pinning_pins_every_tensor():
    plan = plan_packing([[1, IMAGE, 2]], [3], IMAGE)
    with patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor + 1):
        pinned = plan.pin_memory()
    assert all(torch.equal(getattr(pinned, name), getattr(plan, name) + 1) for name in TENSORS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_plan_reaches_the_device_without_waiting():
    pinned = plan_packing([[1, IMAGE, 2]], [3], IMAGE).pin_memory()
    assert all(getattr(pinned, name).is_pinned() for name in TENSORS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = pinned.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_plan(moved.to("cpu"), pinned)


# ---- what is refused

TOO_LONG = 2**31
REFUSED = {
    "fewer counts than placeholders": (
        ([[1, IMAGE], [IMAGE, IMAGE]], [4, 4], False),
        "token_counts has 2 counts, but input_ids has 3 placeholders .*run out in sample 1",
    ),
    "more counts than placeholders": (
        ([[1, IMAGE], [2]], [4, 4], False),
        "token_counts has 2 counts, but input_ids has 1 placeholders",
    ),
    "negative count": (([[IMAGE]], [-3], False), r"token_counts\[0\] .* at least 0, got -3"),
    "expanded count of 0": (([[IMAGE]], [1, 0], True), r"token_counts\[1\] .* at least 1 .* got 0"),
    "count beyond int32": (([[IMAGE]], [2**40], False), f"{2**31 - 1} rows, .*= {2**40} goes"),
    "counts that add up beyond int32": (
        ([[IMAGE, IMAGE]], [2**30, 2**30], False),
        rf"at most {2**31 - 1} rows, but token_counts\[1\] = {2**30}",
    ),
    "text that tips the rows beyond int32": (
        ([[IMAGE, 7]], [2**31 - 1], False),
        f"1 text and {2**31 - 1} vision rows, but at most {2**31 - 1}",
    ),
    "negative text token": (
        ([[1], [2, -1]], [], False),
        rf"input_ids\[1\]\[1\] must be in \[0, {2**31 - 1}\] .* {IMAGE}, got -1",
    ),
    "text token beyond int32": (([[TOO_LONG]], [], False), rf"input_ids\[0\]\[0\] .* {TOO_LONG}"),
    "run shorter than its image": (
        ([[1, IMAGE, IMAGE, 2]], [3], True),
        r"token_counts\[0\] = 3, but input_ids\[0\] has a run .* leaves 2 for image 0",
    ),
    "image cut by text": (
        ([[IMAGE, 1, IMAGE]], [2], True),
        r"token_counts\[0\] = 2, but input_ids\[0\] .* leaves 1 for image 0",
    ),
    "image across two samples": (
        ([[1, IMAGE, IMAGE, IMAGE], [IMAGE]], [2, 2], True),
        r"token_counts\[1\] = 2, but input_ids\[0\] .* leaves 1 for image 1",
    ),
    "more expanded placeholders than counted": (
        ([[IMAGE], [IMAGE, IMAGE]], [1, 1], True),
        "adds up to 2 over 2 images, but input_ids has 3 placeholders .*run out in sample 1",
    ),
    "fewer expanded placeholders than counted": (
        ([[IMAGE, 5]], [1, 4], True),
        "adds up to 5 over 2 images, but input_ids has 1 placeholders",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("index", "expanded", "error", "message"),
    [
        ([0, 2], False, ValueError, r"image_index\[1\] .* of token_counts, in \[0, 2\), got 2"),
        ([0, -1], False, ValueError, r"image_index\[1\] .* \[0, 2\), got -1"),
        ([0], False, ValueError, "image_index has 1 counts, .* 2 placeholders .*out in sample 1"),
        ([0, 1, 1], False, ValueError, "image_index has 3 counts, but input_ids has 2 placeholder"),
        ([0], True, ValueError, "image_index adds up to 1 over 1 images, .* 2 .*out in sample 1"),
        ([0, 0, 0], True, ValueError, "adds up to 3 over 3 images, but input_ids has 2 placehold"),
        ([0, 1], True, ValueError, r"token_counts\[1\] = 4, .* leaves 1 for image 1"),
        ([0.0, 1.0], False, TypeError, "image_index must hold ints, got float64"),
    ],
)
def test_refuses_an_index_that_does_not_fit(backend, index, expanded, error, message):
    with pytest.raises(error, match=message):
        plan_with(backend, [[IMAGE], [IMAGE]], [1, 4], IMAGE, expanded=expanded, image_index=index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_both_numbers(backend, case):
    (samples, counts, expanded), message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        plan_with(backend, samples, counts, IMAGE, expanded=expanded)


@given(
    samples=st.lists(st.lists(st.sampled_from([IMAGE, IMAGE, 3, 4, -1, 2**31]), max_size=5)),
    counts=st.lists(st.sampled_from([1, 1, 2, 3, 0, -1, 2**31]), max_size=6),
    expanded=st.booleans(),
    index=st.none() | st.lists(st.integers(-1, 3), max_size=5),
)
@settings(deadline=None, max_examples=400)
def test_both_planners_refuse_the_same_batches_in_the_same_words(samples, counts, expanded, index):
    options = {"expanded": expanded, "image_index": index}
    try:
        wanted = plan_with("reference", samples, counts, IMAGE, **options)
    except ValueError as error:
        with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
            plan_with("auto", samples, counts, IMAGE, **options)
    else:
        assert_same_plan(plan_with("auto", samples, counts, IMAGE, **options), wanted)


EDGES = [0, 1, 2, -1, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1, -(2**31), -(2**63)]


@given(
    samples=st.lists(st.lists(st.sampled_from([IMAGE, *EDGES]), max_size=6), max_size=4),
    counts=st.lists(st.sampled_from(EDGES), max_size=6),
    image_token_id=st.sampled_from([IMAGE, *EDGES]),
    expanded=st.booleans(),
    with_labels=st.booleans(),
)
@settings(deadline=None, max_examples=600)
def test_numbers_at_the_edges_of_int32_and_int64_never_do_harm(
    samples, counts, image_token_id, expanded, with_labels
):
    """A plan that holds together, or a ValueError with numbers; nothing else, and no crash."""
    if sum(min(max(count, 0), 2**31) for count in counts) in range(100, 2**31):
        return  # valid, but gigabytes
    arguments = (samples, counts, image_token_id)
    labels = samples if with_labels else None
    refusal = ""
    try:
        plan = plan_packing(*arguments, labels=labels, expanded=expanded)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert len(re.findall(r"-?\d+", refusal)) >= 2, refusal
    else:
        assert plan.num_tokens == sum(plan.lengths) < 2**31
        assert plan.source[plan.vision_rows.long()].tolist() == [
            ~vision for vision in range(plan.vision_rows.shape[0])
        ]
        assert plan.max_token_id == max((s for s in plan.source.tolist() if s >= 0), default=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expanded", [False, True])
def test_counts_whose_int64_sum_would_wrap_are_refused(backend, expanded):
    """1 + (2^63 - 1) is negative in int64, which would pass for few rows."""
    message = rf"at most {2**31 - 1} rows, but token_counts\[1\] = {2**63 - 1} goes beyond"
    with pytest.raises(ValueError, match=message):
        plan_with(backend, [[IMAGE] * 4], [1, 2**63 - 1], IMAGE, expanded=expanded)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input_ids": torch.tensor(5)}, ValueError, r"input_ids must have one .*shape \(\)"),
        ({"input_ids": np.array(5)}, ValueError, r"input_ids must have one .* got shape \(\)"),
        ({"labels": torch.tensor(5)}, ValueError, r"labels must have one .* got shape \(\)"),
        ({"labels": [[1]]}, ValueError, "labels must have one sequence per sample .* 2, but has 1"),
        ({"labels": [[1, 2], [3, 4]]}, ValueError, r"labels\[1\] must be as long .* 1, but has 2"),
        ({"input_ids": [1, 2]}, TypeError, r"input_ids\[0\] must be a 1-D sequence of ints.* int"),
        ({"input_ids": [[1.0], [2]]}, TypeError, r"input_ids\[0\] must hold ints, got float64"),
        ({"input_ids": [[True], [2]]}, TypeError, r"input_ids\[0\] must hold ints, got bool"),
        ({"input_ids": [[[1]], [2]]}, ValueError, r"input_ids\[0\] must have 1 dim.*\(1, 1\)"),
        ({"input_ids": ["ab", [2]]}, TypeError, r"input_ids\[0\] must be a 1-D sequence.* str"),
        ({"input_ids": [[2**64], [2]]}, ValueError, rf"input_ids\[0\]\[0\] .* int64, got {2**64}"),
        ({"input_ids": [[2**63], [2]]}, ValueError, rf"input_ids\[0\]\[0\] .* int64, got {2**63}"),
        ({"token_counts": 4}, TypeError, "token_counts must be a 1-D sequence of ints, got int"),
        ({"token_counts": [4.0]}, TypeError, "token_counts must hold ints, got float64"),
        ({"image_token_id": 2**63}, ValueError, f"image_token_id must fit int64, got {2**63}"),
        ({"image_token_id": None}, TypeError, "image_token_id must be an int, got None"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got 0.5"),
    ],
)
def test_refuses_what_is_not_ints(backend, changed, error, message):
    arguments = {"input_ids": [[1, 2], [3]], "token_counts": [], "image_token_id": IMAGE, **changed}
    with pytest.raises(error, match=message):
        plan_with(backend, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([2**63, -200], ValueError, rf"\[0\] must fit int64, got {2**63}"),
        ([-200, -(2**63) - 1], ValueError, rf"\[1\] must fit int64, got {-(2**63) - 1}"),
        ([True, 3], TypeError, r" must hold ints, got bool: .*\[0\] is True"),
        ([3, np.True_], TypeError, r" must hold ints, got bool: .*\[1\] is "),
        ([1, 2.5], TypeError, " must hold ints, got float64"),
        ([torch.ones((), requires_grad=True)], TypeError, " must be a 1-D sequence of ints, got "),
        (torch.ones(2, requires_grad=True), TypeError, " must hold ints, got torch.float32"),
        (torch.ones(2).bfloat16(), TypeError, " must hold ints, got torch.bfloat16"),
        (torch.ones(2, dtype=torch.bool), TypeError, " must hold ints, got torch.bool"),
        (
            torch.ones(2, dtype=torch.int64).to_sparse(),
            TypeError,
            " must be a dense tensor of ints, .* torch.sparse_coo",
        ),
        (
            torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
            TypeError,
            " must hold ints, got torch.qint8",
        ),
    ],
    ids=repr,
)
def test_refuses_in_words_of_its_own_what_numpy_and_torch_would_guess_at(
    backend, values, error, message
):
    for name, arguments in {
        "token_counts": ([[1, 2], [3]], values),
        r"input_ids\[0\]": ([values, [3]], []),
    }.items():
        with pytest.raises(error, match=f"^{name}{message}"):
            plan_with(backend, *arguments, IMAGE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_ints_of_several_kinds_are_ints(backend):
    mixed = [np.uint64(5), np.int64(IMAGE), 7]
    assert_same_plan(
        plan_with(backend, [mixed, []], [np.uint8(2)], IMAGE),
        plan_with(backend, [[5, IMAGE, 7], torch.tensor([])], [2], IMAGE),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expanded", [1, "no", None])
def test_refuses_an_expanded_that_is_no_bool(backend, expanded):
    with pytest.raises(TypeError, match=f"expanded must be a bool, got {expanded!r}"):
        plan_with(backend, [[1]], [], IMAGE, expanded=expanded)


# ---- torch's modes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_default_device_does_not_move_a_plan(backend):
    wanted = plan_with(backend, [[1, IMAGE]], [3], IMAGE)
    with torch.device("meta"):
        plan = plan_with(backend, [[1, IMAGE]], [3], IMAGE)
    assert_same_plan(plan, wanted)
    torch.set_default_device("meta")
    try:
        plan = plan_with(backend, [[1, IMAGE]], [3], IMAGE)
    finally:
        torch.set_default_device(None)
    assert_same_plan(plan, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_made_of_fake_tensors_has_its_shapes_and_facts(backend):
    with FakeTensorMode():
        plan = plan_with(backend, [[1, IMAGE, 2]], [3], IMAGE)
        with pytest.raises(TypeError, match=r"token_counts must be .* read, got FakeTensor"):
            plan_with(backend, [[1, IMAGE]], torch.tensor([3]), IMAGE)
    assert (plan.num_tokens, plan.lengths, plan.max_token_id) == (5, (5,), 2)
    assert [tuple(getattr(plan, name).shape) for name in TENSORS] == [(5,)] * 4 + [(3,), (2,)]


def test_refuses_tensors_that_are_not_on_the_host():
    with pytest.raises(ValueError, match=r"input_ids\[0\] is read on the host: .*CPU, got meta"):
        plan_packing([torch.empty(3, dtype=torch.int64, device="meta")], [], IMAGE)
