"""The choice of implementation, the report of `info`, and light imports."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tokenflex
import tokenflex_kernels
from tokenflex_kernels import backend, bin_pack, info, pool_norm
from tokenflex_kernels.backend import IMPLEMENTATIONS, select_backend

OPS = (
    "pool_norm",
    "swiglu",
    "project_tokens",
    "project_and_pack",
    "plan_packing",
    "pack_embeddings",
    "unpack_vision",
    "merge_vision",
    "bin_pack",
    "balance_bins",
)
HOST_OPS = ("plan_packing", "bin_pack", "balance_bins")
MOVERS = ("pack_embeddings", "unpack_vision", "merge_vision")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.delenv("TOKENFLEX_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def extension_with(monkeypatch, new_choices):
    """Stand in an extension built with or without CUDA, or (None) none."""

    def replace(has_cuda):
        compiled = None if has_cuda is None else SimpleNamespace(has_cuda=has_cuda)
        monkeypatch.setattr(backend, "extension", lambda: compiled)
        new_choices()

    return replace


@pytest.fixture
def hidden_extension(monkeypatch, new_choices):
    """Python's own way to make a module importable no more."""
    monkeypatch.setitem(sys.modules, "tokenflex_kernels._C", None)
    monkeypatch.delattr(tokenflex_kernels, "_C", raising=False)
    backend.extension.cache_clear()
    yield
    monkeypatch.undo()
    backend.extension.cache_clear()


def pool():
    return pool_norm(torch.ones(4, 2), [(2, 2)], [(1, 1)])


class TestSelection:
    def test_every_public_op_has_a_row(self):
        assert set(IMPLEMENTATIONS) == set(OPS)

    def test_reference_holds_for_every_op_and_device(self, monkeypatch):
        monkeypatch.setenv("TOKENFLEX_BACKEND", "reference")
        for device in ("cpu", "cuda"):
            assert {select_backend(op, device) for op in OPS} == {"reference"}

    def test_auto_is_the_default(self, monkeypatch):
        default = [select_backend(op) for op in OPS]
        monkeypatch.setenv("TOKENFLEX_BACKEND", "auto")
        assert [select_backend(op) for op in OPS] == default

    @pytest.mark.parametrize("op", MOVERS)
    def test_auto_takes_what_the_extension_can_do(self, extension_with, op):
        expected = {
            True: ("native", "cuda"),
            False: ("native", "reference"),
            None: ("reference", "reference"),
        }
        for has_cuda, backends in expected.items():
            extension_with(has_cuda)
            assert (select_backend(op, "cpu"), select_backend(op, "cuda")) == backends

    def test_auto_takes_the_extension_for_host_ops_where_it_is_built(self, extension_with):
        for has_cuda, expected in ((True, "native"), (False, "native"), (None, "reference")):
            extension_with(has_cuda)
            assert select_backend("bin_pack") == select_backend("plan_packing") == expected

    def test_device_may_be_a_device_or_its_name(self, extension_with):
        extension_with(True)
        assert select_backend("merge_vision", torch.device("cuda", 1)) == "cuda"
        assert select_backend("merge_vision", "cuda:1") == "cuda"

    @pytest.mark.parametrize("op", MOVERS)
    def test_cuda_asked_for_on_cpu_tensors_is_an_error(self, monkeypatch, extension_with, op):
        extension_with(True)
        monkeypatch.setenv("TOKENFLEX_BACKEND", "cuda")
        with pytest.raises(ValueError, match=rf"TOKENFLEX_BACKEND=cuda.*{op}.*cpu.*CUDA tensors"):
            select_backend(op, "cpu")
        assert select_backend(op, "cuda") == "cuda"

    @pytest.mark.parametrize("has_cuda", [False, None])
    def test_cuda_asked_for_without_a_cuda_build_is_an_error(
        self, monkeypatch, extension_with, has_cuda
    ):
        extension_with(has_cuda)
        monkeypatch.setenv("TOKENFLEX_BACKEND", "cuda")
        with pytest.raises(ValueError, match=r"TOKENFLEX_BACKEND=cuda.*built with nvcc"):
            select_backend("merge_vision", "cuda")

    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_a_backend_that_an_op_lacks_leaves_it_automatic(
        self, monkeypatch, extension_with, backend, device
    ):
        extension_with(True)
        without = [op for op, choices in IMPLEMENTATIONS.items() if backend not in choices]
        assert "bin_pack" in without
        automatic = [select_backend(op, device) for op in without]
        monkeypatch.setenv("TOKENFLEX_BACKEND", backend)
        assert [select_backend(op, device) for op in without] == automatic

    def test_triton_asked_for_runs_on_cuda_tensors_or_interpreted(self, monkeypatch, new_choices):
        monkeypatch.setitem(IMPLEMENTATIONS, "pool_norm", ("triton",))
        monkeypatch.setenv("TOKENFLEX_BACKEND", "triton")
        assert select_backend("pool_norm", "cuda") == "triton"
        with pytest.raises(ValueError, match=r"TOKENFLEX_BACKEND=triton.*pool_norm.*cpu"):
            select_backend("pool_norm", "cpu")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert select_backend("pool_norm", "cpu") == "triton"

    @pytest.mark.parametrize("value", ["Cuda", "cpp", "", "fast"])
    @pytest.mark.parametrize("op", [pool, lambda: bin_pack([1], 2), info])
    def test_an_unknown_value_is_an_error_of_every_op(self, monkeypatch, op, value):
        monkeypatch.setenv("TOKENFLEX_BACKEND", value)
        with pytest.raises(
            ValueError,
            match=rf"TOKENFLEX_BACKEND.*native, triton, cuda.*'{value}'",
        ):
            op()

    def test_the_variable_is_read_at_every_call(self, monkeypatch):
        pool()
        monkeypatch.setenv("TOKENFLEX_BACKEND", "nonsense")
        with pytest.raises(ValueError, match="nonsense"):
            pool()
        monkeypatch.setenv("TOKENFLEX_BACKEND", "reference")
        assert pool().tolist() == [[1.0, 1.0]]


class TestExtension:
    def test_hidden_extension_is_none_and_ops_still_run(self, hidden_extension):
        assert backend.extension() is None
        assert sorted(map(sorted, bin_pack([3, 2, 1], 3))) == [[0], [1, 2]]

    def test_a_broken_build_does_not_pass_for_no_build(self, monkeypatch, hidden_extension):
        def fail(name):
            raise ImportError("undefined symbol: _Z3foov", name=name)

        monkeypatch.setattr(importlib, "import_module", fail)
        with pytest.raises(ImportError, match="undefined symbol"):
            backend.extension()

    def test_a_missing_module_inside_the_extension_is_not_hidden(
        self, monkeypatch, hidden_extension
    ):
        def fail(name):
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

        monkeypatch.setattr(importlib, "import_module", fail)
        with pytest.raises(ModuleNotFoundError, match="numpy"):
            backend.extension()


class TestInfo:
    def test_has_what_it_promises(self):
        answer = info()
        assert set(answer) == {"versions", "extension", "device", "backend", "ops"}
        assert set(answer["versions"]) >= {"tokenflex", "torch", "triton", "numpy"}
        assert torch.__version__.startswith(answer["versions"]["torch"].split("+")[0])
        assert set(answer["extension"]) == {"built", "cuda", "cuda_architectures"}
        assert answer["extension"]["built"] is (backend.extension() is not None)
        assert answer["device"]["type"] == ("cuda" if torch.cuda.is_available() else "cpu")
        assert answer["device"]["name"]
        assert answer["backend"] == "auto"

    def test_names_the_backend_each_op_will_use(self, monkeypatch):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ops = info()["ops"]
        assert set(ops) == set(OPS)
        for op in OPS:
            assert ops[op] == select_backend(op, "cpu" if op in HOST_OPS else device)
        monkeypatch.setenv("TOKENFLEX_BACKEND", "reference")
        assert info()["backend"] == "reference"
        assert set(info()["ops"].values()) == {"reference"}

    def test_works_without_the_extension(self, hidden_extension):
        answer = info()
        assert answer["extension"] == {"built": False, "cuda": False, "cuda_architectures": []}
        assert not {"native", "cuda"} & set(answer["ops"].values())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_refuses_a_backend_that_cannot_be_honoured(self, monkeypatch):
        monkeypatch.setenv("TOKENFLEX_BACKEND", "cuda")
        with pytest.raises(ValueError, match="TOKENFLEX_BACKEND=cuda"):
            info()


BLOCKER = """
import sys
for name in ("transformers", "PIL", "accelerate", "safetensors", "matplotlib", "pydantic", "yaml",
             "sklearn", "tqdm"):
    sys.modules[name] = None
"""


def run_python(code):
    """Run ``code`` in a fresh interpreter that sees this checkout."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


class TestImports:
    def test_imports_load_no_cuda_no_triton_and_no_transformers(self):
        printed = run_python(
            """
import sys, torch
before = set(sys.modules)
def loaded():
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    heavy = new & {"triton", "transformers", "PIL", "accelerate", "matplotlib", "tokenflex"}
    return [*sorted(heavy), "cuda"] if torch.cuda.is_initialized() else sorted(heavy)
import tokenflex_kernels
tokenflex_kernels.pool_norm(torch.ones(4, 2), [(2, 2)], [(1, 1)])
print("kernels:", *loaded())
import tokenflex
print("tokenflex:", *loaded())
"""
        )
        assert printed == ["kernels:", "tokenflex:", "tokenflex"]

    def test_an_unknown_name_of_tokenflex_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="'tokenflex' has no attribute 'no_such_name'"):
            tokenflex.no_such_name  # noqa: B018

    def test_tokenflex_works_without_its_extras_and_names_the_one_to_install(self):
        printed = run_python(
            BLOCKER
            + """
import torch, tokenflex
tokens = tokenflex.TokenAdaptiveProjector(4, 6)(torch.ones(1, 9, 4), 4)
print("x".join(map(str, tokens.shape)), tokenflex.TokenCounts().expected)
for name in ("TokenFlexConfig", "TokenFlexForConditionalGeneration", "TokenFlexProcessor"):
    try:
        getattr(tokenflex, name)
    except ImportError as error:
        message = str(error)
        print(name in message and "pip install 'tokenflex[hf]'" in message or message)
    else:
        print(name, "loaded")
"""
        )
        assert printed == ["1x4x6", "184.0", "True", "True", "True"]
