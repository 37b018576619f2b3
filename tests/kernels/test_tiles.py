"""How float32 products are rounded: as PyTorch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("pass", "ieee"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.set_float32_matmul_precision('highest')", "ieee"),
    ],
)
def test_tf32_is_used_only_if_the_user_allows_it(setting, expected):
    code = (
        "import torch; from tokenflex_kernels.launch import dot_precision; "
        f"{setting}; print(dot_precision(torch.float32), dot_precision(torch.bfloat16))"
    )
    # A process of its own: PyTorch refuses to mix its older and newer switches.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "ieee"]
