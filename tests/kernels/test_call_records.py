"""Recorded calls on a stubbed GPU: they launch what Triton alone launches, with fewer steps."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from torch.autograd import forward_ad

from benchmarks.stubbed_gpu import by_triton_alone, stubbed_gpu, unrecorded
from tests.kernels.common import GATED, NORM, PARAMETERS, SAVES, gated_of, parameters_of
from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_library import DispatchMode, FunctionMode
from tokenflex_kernels import (
    call_records,
    plan_packing,
    plan_pooling,
    pool_norm,
    project_and_pack,
    project_tokens,
    swiglu,
)
from tokenflex_kernels import launch as launching
from tokenflex_kernels.backend import extension
from tokenflex_kernels.call_records import RecordedStage, call_key, record_stage
from tokenflex_kernels.launch_configs import launch_config, overriding
from tokenflex_kernels.pool_norm import stages as pool_norm_stages
from tokenflex_kernels.relaunch import Binary
from tokenflex_kernels.swiglu import stages as swiglu_stages

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs Triton's binder, not its interpreter")

BFLOAT16 = torch.bfloat16
IN_GRIDS, OUT_GRIDS = [(4, 4), (3, 2)], [(2, 2), (2, 1)]
PATCHES, CELLS, WIDTH, HIDDEN, TEXT = 22, 6, 16, 32, 48


@pytest.fixture
def launched():
    """The launches on a stubbed GPU, as its launcher got them."""
    launches = []
    with stubbed_gpu(launches.append):
        yield launches


@pytest.fixture
def stages_run(monkeypatch):
    """The stages of forward that run in Python from here on; recorded ones do not."""
    names = []

    def counted(stage):
        def run(*arguments):
            names.append(stage.__name__)
            return stage(*arguments)

        return run

    for module, name in (
        (pool_norm_stages, "launch_pool_norm_forward"),
        (swiglu_stages, "launch_gate_up"),
    ):
        stage = getattr(module, name)
        for user in ("pool_norm", "swiglu", "project_tokens", "project_and_pack"):
            op = __import__(f"tokenflex_kernels.{user}.op", fromlist=["op"])
            recorded = __import__("tokenflex_kernels.project_tokens.recorded", fromlist=["op"])
            for place in (op, recorded):
                if hasattr(place, name):
                    monkeypatch.setattr(place, name, counted(stage))
    return names


def rows(count=PATCHES, width=WIDTH, dtype=BFLOAT16):
    return torch.randn(count, width).to(dtype)


def norm_of(dtype=BFLOAT16):
    return {name: torch.randn(WIDTH).to(dtype) for name in NORM}


def pool(x, **options):
    return pool_norm(x, IN_GRIDS, OUT_GRIDS, **options)


def unit(x, **weights):
    return swiglu(x, *(weights[name] for name in GATED))


def project(x, **options):
    return project_tokens(x, IN_GRIDS, OUT_GRIDS, **options)


def unit_weights(dtype=BFLOAT16):
    return dict(zip(GATED, gated_of(WIDTH, HIDDEN, dtype), strict=True))


def projector_weights(dtype=BFLOAT16):
    return parameters_of(WIDTH, HIDDEN, TEXT, dtype)


def packed_of(dtype=BFLOAT16):
    return {"embedding": torch.randn(5, TEXT).to(dtype), **projector_weights(dtype)}


PLAN = plan_packing([[1, 9, 2], [9, 3]], [4, 2], 9)


def pack(x, plan=PLAN, **options):
    return project_and_pack(x, IN_GRIDS, OUT_GRIDS, plan=plan, **options)


OPS = [
    pytest.param(pool, norm_of, id="pool_norm"),
    pytest.param(unit, unit_weights, id="swiglu"),
    pytest.param(project, projector_weights, id="project_tokens"),
    pytest.param(pack, packed_of, id="project_and_pack"),
]


def addresses(launches):
    """The arguments of the launches: numbers, and addresses in the place of tensors."""
    return [
        (one.programs, one.stream, *(
            value.data_ptr() if isinstance(value, torch.Tensor) else value for value in one.args
        ))
        for one in launches
    ]  # fmt: skip


def launches_of(launched, call):
    """The launches of one call, and its result."""
    del launched[:]
    result = call()
    return addresses(launched), result


def assert_alike(pairs, tensors):
    """Arguments are the same in each pair, but for two addresses of results."""
    given = {tensor.data_ptr() for tensor in tensors if tensor is not None}
    for mine, other in pairs:
        are_addresses = type(mine) is type(other) is int and min(mine, other) > 2**32
        if not are_addresses or mine in given or other in given:
            assert (mine, type(mine)) == (other, type(other))


class TestLaunches:
    @pytest.mark.parametrize(("op", "weights"), OPS)
    @pytest.mark.parametrize("grad", [False, True])
    def test_a_recorded_call_launches_what_triton_alone_does(self, launched, op, weights, grad):
        """But for the results' addresses, which the launches of both runs map one to one."""
        with torch.set_grad_enabled(grad):
            for _ in range(4):
                tensors = {name: tensor.requires_grad_(grad) for name, tensor in weights().items()}
                x = rows().requires_grad_(grad)
                ours, out = launches_of(launched, partial(op, x, **tensors))
                with by_triton_alone():
                    theirs, expected = launches_of(launched, partial(op, x, **tensors))
                assert out.shape == expected.shape
                assert out.requires_grad == expected.requires_grad == grad
                assert len(ours) == len(theirs)
                pairs = set()
                for ours_of, theirs_of in zip(ours, theirs, strict=True):
                    assert len(ours_of) == len(theirs_of)
                    pairs |= set(zip(ours_of, theirs_of, strict=True))
                assert_alike(pairs, (x, *tensors.values()))

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("name", ["x", *PARAMETERS])
    def test_each_tensor_that_requires_grad_alone(self, launched, name, save):
        tensors = {"x": rows(), **projector_weights()}
        tensors[name].requires_grad_()
        for _ in range(3):
            ours, out = launches_of(launched, partial(project, **tensors, save=save))
        with by_triton_alone():
            theirs, expected = launches_of(launched, partial(project, **tensors, save=save))
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(zip(one, other, strict=True), tensors.values())
        for kept, other in zip(
            out.grad_fn.saved_tensors, expected.grad_fn.saved_tensors, strict=True
        ):
            assert (kept is None) == (other is None)
            assert kept is None or kept.shape == other.shape

    def test_a_table_that_alone_requires_grad(self, launched):
        tensors = packed_of()
        table = tensors["embedding"].requires_grad_()
        for _ in range(3):
            packed = pack(rows(), **tensors)
            (grad,) = torch.autograd.grad(packed, table, torch.ones_like(packed))
            assert grad[:, 0].tolist() == [0, 1, 1, 1, 0]  # the plan has the ids 1, 2 and 3

    @pytest.mark.parametrize(("op", "weights"), OPS)
    @pytest.mark.parametrize("grad", [False, True])
    def test_the_third_call_runs_no_stage(self, launched, stages_run, op, weights, grad):
        tensors = {name: tensor.requires_grad_(grad) for name, tensor in weights().items()}
        counts = []
        for _ in range(4):
            del stages_run[:]
            op(rows(), **tensors)
            counts.append(len(stages_run))
        # The first call with gradients reaches the stages by their ops.
        assert counts[2:] == [0, 0]
        assert counts[1] == (2 if op in (project, pack) else 1)

    @pytest.mark.parametrize(("op", "weights"), OPS)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_inference_is_recorded(self, launched, stages_run, op, weights, mode):
        tensors = {name: torch.nn.Parameter(tensor) for name, tensor in weights().items()}
        with mode():
            for _ in range(3):
                del stages_run[:]
                out = op(rows(), **tensors)
        assert stages_run == []
        assert out.is_inference() == (mode is torch.inference_mode)

    @pytest.mark.parametrize("grad", [False, True])
    def test_without_the_extension(self, launched, stages_run, monkeypatch, grad):
        monkeypatch.setattr(call_records, "extension", lambda: None)
        tensors = {name: value.requires_grad_(grad) for name, value in projector_weights().items()}
        for _ in range(3):
            del stages_run[:]
            x = rows()
            ours, _ = launches_of(launched, partial(project, x, **tensors))
        assert stages_run == []
        with by_triton_alone():
            theirs, _ = launches_of(launched, partial(project, x, **tensors))
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(zip(one, other, strict=True), (x, *tensors.values()))

    @pytest.mark.parametrize("grad", [False, True])
    def test_the_rows_of_one_launch_are_the_input_of_the_next(self, launched, grad):
        tensors = {name: value.requires_grad_(grad) for name, value in projector_weights().items()}
        for _ in range(3):
            del launched[:]
            project(rows(), **tensors)
        pooling, gated_unit = launched
        assert pooling.args[3] == gated_unit.args[0] != 0

    def test_both_stages_of_a_projection_are_one_call_of_the_extension(self, launched, monkeypatch):
        if extension() is None:
            pytest.skip("needs the extension")
        calls = []
        repeat = extension().repeat_launches

        def counted(*arguments):
            calls.append(len(arguments))
            return repeat(*arguments)

        monkeypatch.setattr(extension(), "repeat_launches", counted)
        for _ in range(4):
            out = project(rows(), **projector_weights())
        assert calls == [10, 10]  # the launches, x and the weights
        assert out.shape == (CELLS, TEXT)

    def test_a_tensor_that_came_twice_may_come_as_two(self, launched):
        same, other = rows(HIDDEN), rows(HIDDEN)
        for _ in range(3):
            swiglu(rows(), same, same)
        ours, _ = launches_of(launched, lambda: swiglu(rows(), same, other))
        with by_triton_alone():
            theirs, _ = launches_of(launched, lambda: swiglu(rows(), same, other))
        places = [theirs[0].index(tensor.data_ptr()) for tensor in (same, other)]
        assert [ours[0][place] for place in places] == [same.data_ptr(), other.data_ptr()]


class TestKinds:
    """A call that differs in anything that a launch depends on is another kind."""

    def first_calls(self, calls):
        """The number of these calls that have no record, after the first one has one."""
        for _ in range(3):
            calls[0]()
        before = len(call_records._records)
        for call in calls[1:]:
            call()
            call()
        return len(call_records._records) - before

    def test_of_pooling(self, launched):
        x, norm = rows(), norm_of()
        wide = rows(width=2 * WIDTH)
        shifted = torch.randn(PATCHES * WIDTH + 8).to(BFLOAT16)[1:-7].view(PATCHES, WIDTH)
        plan = plan_pooling([(2, 11)], [(2, 3)])
        calls = [
            partial(pool, x, **norm),
            partial(pool, x, weight=norm["weight"]),
            partial(pool, x),
            partial(pool, x, **norm, eps=1e-6),
            partial(pool, x, **norm, mode="resize"),
            partial(pool, x.half(), **{name: value.half() for name, value in norm.items()}),
            partial(pool, wide[:, :WIDTH], **norm),
            partial(pool, shifted, **norm),
            partial(pool_norm, x, plan, **norm),
            partial(pool, x, weight=norm["weight"], bias=torch.zeros(WIDTH, 2).to(BFLOAT16)[:, 0]),
            partial(pool, x, weight=norm["weight"].float(), bias=norm["bias"].float()),
            partial(pool, x.clone().requires_grad_(), **norm),
            partial(pool, x, weight=norm["weight"].clone().requires_grad_(), bias=norm["bias"]),
        ]  # fmt: skip
        assert self.first_calls(calls) == len(calls) - 1

    def test_of_projecting(self, launched):
        x, weights = rows(), projector_weights()
        calls = [partial(project, x, **weights), partial(project, x, **weights, save="input")]
        for name, value in weights.items():
            calls.append(partial(project, x, **weights | {name: value.clone().requires_grad_()}))
            if name.endswith("bias"):
                calls.append(partial(project, x, **weights | {name: None}))
        assert self.first_calls(calls) == len(calls) - 1

    def test_of_packing(self, launched):
        x, tensors = rows(), packed_of()
        trained = tensors["embedding"].clone().requires_grad_()
        calls = [
            partial(pack, x, **tensors),
            partial(pack, x, **tensors, save="input"),
            partial(pack, x, **tensors | {"embedding": torch.randn(6, TEXT).to(BFLOAT16)}),
            partial(pack, x, **tensors | {"embedding": trained}),
        ]
        assert self.first_calls(calls) == len(calls) - 1
        # Another plan is no other kind.
        assert (
            self.first_calls([calls[0], partial(calls[0], plan_packing([[9, 9]], [4, 2], 9))]) == 0
        )

    def test_streams(self, launched, monkeypatch):
        x, norm = rows(), norm_of()
        calls = [partial(pool, x, **norm)]

        def elsewhere():
            with monkeypatch.context() as patch:
                patch.setattr(launching.relaunch, "current_stream", lambda index: 8)
                pool(x, **norm)

        assert self.first_calls([*calls, elsewhere]) == 1

    @pytest.mark.parametrize("setting", ["capture", "config", "autocast", "device"])
    def test_calls_that_are_never_recorded(self, launched, monkeypatch, setting):
        x, weights = rows(), unit_weights()
        if setting == "capture":
            monkeypatch.setattr(launching.relaunch, "is_capturing", lambda: True)
        elif setting == "device":
            monkeypatch.setattr(launching.relaunch, "current_device", lambda: 1)
            assert call_key("swiglu", (x,)) is None
            return
        config = launch_config("gate_up", 1, BFLOAT16, "sm_90")
        with (
            overriding(**({"gate_up": config} if setting == "config" else {})),
            torch.autocast("cpu", BFLOAT16, enabled=setting == "autocast"),
        ):
            assert call_key("swiglu", (x, *weights.values())) is None

    def test_other_tensors_have_no_key(self, launched):
        x = rows()

        class Subclass(torch.Tensor):
            pass

        for other in (
            x.as_subclass(Subclass),
            torch._neg_view(x),
            torch.nn.Parameter(torch._neg_view(x)),
            x.to_sparse(),
            torch._efficientzerotensor((3, 4)),
            x.to("meta"),
        ):
            assert call_records.describe((x, other)) is None
            assert call_records._described((x, other)) is None
        assert call_records.describe((x, None)) is not None

    @pytest.mark.parametrize("describe", [call_records.describe, call_records._described])
    def test_descriptions_tell_tensors_apart(self, describe):
        memory = torch.zeros(4096, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 64 :]
        tensors = [None, torch.nn.Parameter(torch.zeros(3, 4))]
        for dtype in (torch.float32, torch.float16, BFLOAT16, torch.int16):
            size = dtype.itemsize
            flat = memory[:2048].view(dtype)
            tensors += [flat[:12].view(3, 4), flat[:24:2].view(3, 4), flat[:12].view(4, 3)]
            tensors += [flat[:12].view(4, 3).T, flat[:12], flat[:24].view(3, 8)[:, :4]]
            tensors += [memory[4 : 4 + 12 * size].view(dtype).view(3, 4)]
        assert len({describe((tensor,)) for tensor in tensors}) == len(tensors)
        assert describe((tensors[0], tensors[2])) != describe((tensors[2], tensors[0]))
        moved = memory[1024:].view(torch.float32)[:12].view(3, 4)
        with torch.no_grad():  # a parameter is then like a tensor
            descriptions = [describe((tensor,)) for tensor in tensors]
            assert describe((moved,)) == descriptions[2] == descriptions[1]

    @pytest.mark.parametrize("describe", [call_records.describe, call_records._described])
    def test_descriptions_are_of_plain_eager_mode(self, describe):
        x = rows()
        assert describe((x,)) is not None
        with torch.inference_mode():
            assert describe((x,)) is not None
        for mode in (DispatchMode, FunctionMode, torch.profiler.profile, forward_ad.dual_level):
            with mode():
                assert describe((x,)) is None


def test_calls_with_weights_of_another_dtype_are_not_recorded(launched):
    x, weights = rows(), unit_weights()
    for _ in range(3):
        out = unit(x, **weights | {"up_weight": weights["up_weight"].float()})
    assert out.dtype == BFLOAT16
    assert call_records._records == {}


class TestErrors:
    def test_wrong_calls_are_refused_again_and_again(self, launched):
        x, weights = rows(), projector_weights()
        for _ in range(3):
            with pytest.raises(ValueError, match="x must have one row per patch"):
                pool(x[1:])
            with pytest.raises(ValueError, match="gate_weight"):
                project(x, **weights | {"gate_weight": weights["gate_weight"][:, 1:]})
            with pytest.raises(ValueError, match="eps"):
                pool(x, **norm_of(), eps=-1.0)
            with pytest.raises(ValueError, match="mode"):
                pool(x, mode="nearest")
            with pytest.raises(ValueError, match="save"):
                project(x, **weights, save="all")
            with pytest.raises(ValueError, match="bias needs"):
                pool(x, bias=x[0])

    def test_plans_that_do_not_go_with_a_recorded_call(self, launched):
        x, tensors = rows(), packed_of()
        for _ in range(3):
            pack(x, **tensors)
        for plan, match in (
            (plan_packing([[9]], [4], 9), "plan must have a vision token for each cell"),
            (plan_packing([[9, 7, 9]], [4, 2], 9), "embedding must have a row for every text"),
            (plan_packing([[9, 9, 9]], [4, 1, 2], 9), "plan must have a vision token"),
            (PLAN.to("meta"), "plan must be on the device"),
            (None, "plan must be a PackPlan"),
        ):
            with pytest.raises((TypeError, ValueError), match=match):
                pack(x, plan, **tensors)
        for _ in range(3):
            for embedding in (None, x[0, 0], x):
                with pytest.raises((TypeError, ValueError), match="embedding must"):
                    pack(x, **tensors | {"embedding": embedding})

    def test_images_that_are_shown_twice_are_packed_by_two_calls(self, launched):
        x, tensors = rows(), packed_of()
        twice = plan_packing([[9, 9, 9]], [4, 2], 9, image_index=[0, 1, 1])
        for _ in range(3):
            pack(x, **tensors)
        tensors["embedding"].requires_grad_()
        for _ in range(3):
            pack(x, **tensors)
        packed = pack(x, twice, **tensors)
        assert packed.shape == (8, TEXT)
        assert type(packed.grad_fn).__name__ != "ProjectAndPackOnDeviceBackward"


class TestRecords:
    def stage(self, *launches, result=lambda x: x.new_empty(3)):
        def run(x):
            out = result(x)
            for args in launches:
                launching._observer.launches.append(self.launch(*(args(x, out))))
            return (out,)

        return run

    def launch(self, *args):
        return launching.Launch(None, 1, args, {}, Binary(None, print, 0, (), ()))

    def record(self, stage, tables=()):
        return record_stage(stage, (torch.zeros(4),), (), tables)[1]

    TABLE = torch.zeros(5)

    @pytest.mark.parametrize(
        ("arguments", "is_repeatable"),
        [
            (lambda x, out: (x, out, 5, None), True),
            (lambda x, out: (out, TestRecords.TABLE), True),
            (lambda x, out: (x, 5), False),  # the result comes from elsewhere
            (lambda x, out: (x, out, torch.empty(3)), False),  # a temporary tensor
            (lambda x, out: (x[1:], out), False),  # a view
            (lambda x, out: (x, out, 1.5), False),
        ],
    )
    def test_what_can_be_repeated(self, arguments, is_repeatable):
        record = self.record(self.stage(arguments), [self.TABLE])
        assert record.is_repeatable == is_repeatable

    @pytest.mark.parametrize(
        "result",
        [
            lambda x: x.new_zeros(3),
            lambda x: x + 1,
            lambda x: x.clone(),
            lambda x: x.new_empty(3).zero_(),
            lambda x: x.new_empty(4, 2).T,
        ],
    )
    def test_a_stage_that_computes_is_not_repeated(self, result):
        record = self.record(self.stage(lambda x, out: (x, out), result=result))
        assert not record.is_repeatable

    def test_a_descriptor_of_other_numbers_is_not_repeated(self):
        from triton.tools.tensor_descriptor import TensorDescriptor

        def described(shape, strides):
            return lambda x, out: (TensorDescriptor(out, shape, strides, [16, 16]), x)

        result = lambda x: x.new_empty(16, 16)  # noqa: E731
        for shape, strides, is_repeatable in (
            ([16, 16], [16, 1], True),
            ([8, 16], [16, 1], False),
            ([16, 16], [32, 1], False),
        ):
            record = self.record(self.stage(described(shape, strides), result=result))
            assert record.is_repeatable == is_repeatable

    @pytest.mark.parametrize(
        ("sizes", "is_repeatable"),
        [([], True), ([4096], True), ([4000, 96], True), ([4097], False), ([4000, 97], False)],
    )
    def test_large_tables_are_not_kept(self, monkeypatch, sizes, is_repeatable):
        """All tables of a batch count together, in bytes."""
        monkeypatch.setattr(call_records, "MAX_TABLE_BYTES", 16384)
        tables = [torch.empty(size) for size in sizes]
        record = self.record(self.stage(lambda x, out: (x, out, *tables)), [*tables, None])
        assert record.is_repeatable == is_repeatable

    def test_records_together_keep_a_quarter_of_a_gigabyte_of_tables(self):
        assert call_records.MAX_RECORDS * call_records.MAX_TABLE_BYTES <= 2**28

    def test_the_tables_of_a_large_batch_are_kept(self, launched):
        """128 images of 35 grids."""
        out_grids = [(8, 8), (12, 12), (16, 16), *((9, n) for n in range(1, 33))] * 4
        x = rows(128 * 729)
        for _ in range(3):
            pool_norm(x, [(27, 27)] * 128, out_grids[:128])
        ((record, _),) = call_records._records.values()
        assert record.is_repeatable

    @pytest.mark.parametrize(("first", "is_repeatable"), [(0, True), (1, False), (4, True)])
    def test_a_result_at_an_unaligned_address_is_not_repeated(self, first, is_repeatable):
        """Repeated launches get results of PyTorch's allocator, for which 16 bytes are certain."""
        result = torch.zeros(8)[first : first + 3]
        assert (result.data_ptr() % 16 == 0) == is_repeatable
        record = self.record(self.stage(lambda x, out: (x, out), result=lambda x: result))
        assert record.is_repeatable == is_repeatable

    @pytest.mark.parametrize(
        ("operation", "has_computed"),
        [
            (lambda x: x.new_empty(3), False),
            (lambda x: torch.empty_like(x).new_empty_strided((2, 2), (2, 1)), False),
            (lambda x: x.detach(), False),
            (lambda x: torch.ops.aten._to_copy(x), True),
            (lambda x: x.sum(), True),
            (lambda x: x.zero_(), True),  # the given tensor, but changed
            (lambda x: torch.add(x, 1, out=torch.empty_like(x)), True),
            (lambda x: x[1:], True),
        ],
    )
    def test_a_watch_sees_what_computes(self, operation, has_computed):
        x = torch.zeros(4)
        with call_records._Watch() as watch:
            operation(x)
        assert watch.has_computed == has_computed
        with call_records._Watch() as watch:
            operation(x)
            x.new_empty(3)  # harmless ones later change nothing
        assert watch.has_computed == has_computed

    def test_conversions_that_convert_nothing_are_no_computation(self):
        """Inference mode shows them."""
        with torch.inference_mode():
            x = torch.zeros(4)
            with call_records._Watch() as watch:
                assert x.contiguous() is x
                assert x.to(torch.float32) is x
        assert not watch.has_computed

    @pytest.mark.parametrize("computes", [False, True])
    def test_what_is_computed_beside_the_launches_counts_too(self, computes):
        """Nothing but the watch sees it: arguments and results are those of a repeatable stage."""

        def run(x):
            out = x.new_empty(3)
            if computes:
                torch.zeros(2).add_(1)
            launching._observer.launches.append(self.launch(x, out))
            return (out,)

        assert self.record(run).is_repeatable != computes

    def test_results_at_other_alignments_run_the_stage(self, launched, stages_run, monkeypatch):
        x, weights = rows(), unit_weights()
        for _ in range(3):
            unit(x, **weights)
        assert len(stages_run) == 2

        def shifted(self, size, strides, **options):
            flat = self.new_empty(size[0] * size[1] + 8, **options)
            return flat[1 : 1 + size[0] * size[1]].view(size)

        monkeypatch.setattr(torch.Tensor, "new_empty_strided", shifted)
        unit(x, **weights)
        assert len(stages_run) == 3

    def test_results_of_a_projection_at_other_alignments_run_the_stages(
        self, launched, stages_run, monkeypatch
    ):
        x, weights = rows(), projector_weights()
        for _ in range(3):
            project(x, **weights)
        before = len(stages_run)
        del launched[:]
        new_empty_strided = torch.Tensor.new_empty_strided
        monkeypatch.setattr(
            torch.Tensor,
            "new_empty_strided",
            lambda self, size, strides, **options: (
                new_empty_strided(self, (size[0] + 1, *size[1:]), strides, **options)
                .flatten()[1 : 1 + size[0] * strides[0]]
                .view(size)
            ),
        )
        project(x, **weights)
        assert len(stages_run) == before + 2
        assert len(launched) == 2

    def test_rows_at_another_alignment_run_the_stage(self, launched):
        """They may be the result of a stage before, of which the kind of a call knows nothing."""
        shifted = torch.randn(PATCHES * WIDTH + 8).to(BFLOAT16)[1:-7].view(PATCHES, WIDTH)
        weights = unit_weights().values()
        stage = record_stage(swiglu_stages.launch_gate_up, (rows(), *weights), (True, False))[1]
        stage.repeat((rows(), *weights))
        assert type(launched[-1].args[0]) is int  # repeated launches get addresses
        stage.repeat((shifted, *weights))
        assert type(launched[-1].args[0]) is torch.Tensor

    def test_debugging_runs_the_stage(self, launched, stages_run, monkeypatch):
        from triton import knobs

        x, weights = rows(), unit_weights()
        for _ in range(3):
            unit(x, **weights)
        monkeypatch.setattr(knobs.runtime, "debug", True)
        unit(x, **weights)
        assert len(stages_run) == 3

    @pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
    def test_hooks_around_launches_see_those_of_a_recorded_projection(
        self, launched, stages_run, monkeypatch, name
    ):
        from triton import knobs

        x, weights = rows(), projector_weights()
        for _ in range(3):
            project(x, **weights)
        seen, before = [], len(stages_run)
        monkeypatch.setattr(knobs.runtime, name, seen.append)
        project(x, **weights)
        assert [metadata.get()["name"] for metadata in seen] == [
            "pool_norm_forward_kernel",
            "gate_up_kernel",
        ]
        assert len(stages_run) == before

    def test_the_extension_refuses_other_launches(self):
        if extension() is None:
            pytest.skip("needs the extension")
        x = torch.zeros(4, 4)
        prepare, repeat = extension().prepare_launches, extension().repeat_launches
        calls = []
        result = (4, 4), (4, 1), None
        launches = [(lambda *args: calls.append(args), (7, None, None), [(1, 0), (2, 1)])]
        prepared = prepare(1, 0, [result], launches)
        (out,) = repeat(prepared, x)
        assert calls == [(7, x.data_ptr(), out.data_ptr())]
        assert repeat(prepared, x.flatten()[1:]) is None  # another alignment
        assert repeat(prepared, x.to("meta")) is None
        for arguments in ((), (prepared,), (prepared, x, x), (x, x)):
            with pytest.raises(ValueError, match=r"(?i)expected|number of tensors|capsule"):
                repeat(*arguments)
        for places in ([(3, 0)], [(0, 2)], [(-1, 0)]):
            with pytest.raises(ValueError, match=r"place|negative"):
                prepare(1, 0, [result], [(print, (7, None, None), places)])
        assert len(calls) == 1

        def fail(*_):
            raise RuntimeError("no such kernel")

        with pytest.raises(RuntimeError, match="no such kernel"):
            repeat(prepare(1, 0, [result], [(fail, (), [])]), x)

    def test_launches_may_be_forgotten_while_they_are_repeated(self):
        """As by another thread; `make sanitize` sees what is read after it is freed."""
        if extension() is None:
            pytest.skip("needs the extension")
        x, calls = torch.zeros(4, 4), []
        kept = []

        def launch(*arguments):
            kept.clear()
            calls.append(arguments)

        launches = [(launch, (k, None, None), [(1, 0), (2, 1)]) for k in range(3)]
        kept.append(extension().prepare_launches(1, 0, [((4, 4), (4, 1), None)], launches))
        (out,) = extension().repeat_launches(kept[0], x)
        assert calls == [(k, x.data_ptr(), out.data_ptr()) for k in range(3)]

    def test_records_are_bounded(self, launched, monkeypatch):
        monkeypatch.setattr(call_records, "MAX_RECORDS", 3)
        monkeypatch.setattr(call_records, "MAX_SEEN", 5)
        for count in range(1, 9):
            for _ in range(3):
                swiglu(rows(count), *unit_weights().values())
            assert len(call_records._records) <= 3
            assert len(call_records._seen) <= 5
        assert {key[0] for key in call_records._records} == {"swiglu"}

    def test_a_record_holds_no_tensors_of_the_call(self, launched):
        import gc
        import weakref

        x, weights = rows(), unit_weights()
        for _ in range(3):
            out = unit(x, **weights)
        held = [weakref.ref(tensor) for tensor in (x, out, *weights.values())]
        del x, weights, out, launched[:]
        gc.collect()
        assert [ref() for ref in held] == [None] * len(held)
        ((record, is_differentiated),) = call_records._records.values()
        assert isinstance(record, RecordedStage)
        assert record.is_repeatable
        assert not is_differentiated

    def test_float32_products_of_pytorch_are_not_repeated_but_run(self, launched, stages_run):
        x, weights = rows(dtype=torch.float32), unit_weights(torch.float32)
        for _ in range(4):
            out = unit(x, **weights)
        assert len(stages_run) == 4
        assert out.shape == (PATCHES, HIDDEN)
        trained = {name: value.requires_grad_() for name, value in weights.items()}
        for _ in range(4):
            out = unit(x, **trained)
        assert type(out.grad_fn).__name__ == "SwigluOnDeviceBackward"


@pytest.mark.parametrize("context", [unrecorded, by_triton_alone])
def test_calls_may_be_left_unrecorded(launched, context):
    with context():
        for _ in range(3):
            pool(rows())
    assert call_records._records == {}
    assert len(launched) == 3


def test_random_calls_are_those_of_triton_alone(launched):
    """Kinds in random order, each with tensors of its own, on little memory for records."""
    draw = random.Random(0)
    for _ in range(60):
        width, hidden = draw.choice([8, 16, 33]), draw.choice([16, 40])
        x = rows(draw.choice([1, 5, 16]), width)
        weights = gated_of(width, hidden, BFLOAT16, missing=draw.choice([(), GATED[2:]]))
        with torch.no_grad():
            ours, _ = launches_of(launched, lambda x=x, w=weights: swiglu(x, *w))
            with by_triton_alone():
                theirs, _ = launches_of(launched, lambda x=x, w=weights: swiglu(x, *w))
            for one, other in zip(ours, theirs, strict=True):
                assert_alike(zip(one, other, strict=True), (x, *weights))


@pytest.mark.usefixtures("launched")
class TestKeys:
    def test_calls_on_no_rows_are_not_recorded(self):
        """Each has results of its own, with gradients of its own."""
        weights = gated_of(WIDTH, HIDDEN)
        rows = [torch.empty(0, WIDTH, requires_grad=True) for _ in range(4)]
        results = [swiglu(x, *weights) for x in rows]
        assert call_key("swiglu", (rows[0], *weights)) is None
        assert len({id(result) for result in results}) == len(rows)
        torch.autograd.grad(sum(result.sum() for result in results), rows)

    def test_the_precision_of_float32_products_has_kinds_of_its_own(self, monkeypatch):
        keys = set()
        for precision in ("ieee", "tf32"):
            # In the place of PyTorch's own, whose newer and older switches are not to be mixed.
            settings = SimpleNamespace(fp32_precision=precision)
            monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
            keys |= {
                call_key("swiglu", (rows(dtype=dtype), *gated_of(WIDTH, HIDDEN, dtype)))
                for dtype in (torch.float32, BFLOAT16)
            }
        assert len(keys) == 3  # products of bfloat16 have one precision

    def test_inference_mode_has_kinds_of_its_own(self):
        x, weights = torch.randn(4, WIDTH), gated_of(WIDTH, HIDDEN)
        with torch.no_grad():
            key = call_key("swiglu", (x, *weights))
        with torch.inference_mode():
            assert call_key("swiglu", (x, *weights)) not in (None, key)
