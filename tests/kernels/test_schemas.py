"""The schemas of the ops under ``torch.ops.tokenflex``, which compiled and exported graphs hold."""

from __future__ import annotations

import pytest
import torch

import tokenflex.positions  # noqa: F401  # registers its op
import tokenflex_kernels  # noqa: F401  # registers the ops

PROJECTOR = {
    "pool_norm": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor grids, SymInt cells, str mode, float eps)"
        " -> Tensor"
    ),
    "pool_norm_forward": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor grids, SymInt cells, str mode, float eps,"
        " ScalarType dtype, bool save) -> (Tensor, Tensor, Tensor)"
    ),
    "pool_norm_backward": (
        "(Tensor grad, Tensor normalised, Tensor inverse_std, Tensor? weight, Tensor grids,"
        " SymInt patches, str mode, ScalarType? dtype, bool grad_weight, bool grad_bias)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "scale_shift": "(Tensor normalised, Tensor weight, Tensor? bias) -> Tensor",
    "swiglu": (
        "(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias)"
        " -> Tensor"
    ),
    "gate_up": (
        "(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias,"
        " bool product, bool save) -> (Tensor, Tensor, Tensor)"
    ),
    "down_gradient": (
        "(Tensor dy, Tensor? down_weight, Tensor gate, Tensor up, bool product, bool bias)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "input_gradient": "(Tensor grads, Tensor gate_weight, Tensor up_weight) -> Tensor",
    "project_tokens": (
        "(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor gate_weight, Tensor? gate_bias,"
        " Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, Tensor grids,"
        " SymInt cells, str mode, float eps, str save) -> Tensor"
    ),
    "project_and_pack": (
        "(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor gate_weight, Tensor? gate_bias,"
        " Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias,"
        " Tensor embedding, Tensor grids, Tensor source, Tensor vision_rows, SymInt cells,"
        " str mode, float eps, str save, SymInt vision_start) -> Tensor"
    ),
    "packed_down": (
        "(Tensor product, Tensor down_weight, Tensor? down_bias, Tensor embedding, Tensor source,"
        " Tensor vision_rows, SymInt vision_start) -> Tensor"
    ),
    "grid_tensor": "(SymInt[] runs) -> Tensor",
    "pool_axis": "(Tensor x, SymInt cells, str mode) -> Tensor",
    "spread_axis": "(Tensor grad, SymInt size, str mode) -> Tensor",
    "cell_positions": "(Tensor grids, SymInt cells, ScalarType dtype, Device device) -> Tensor",
}
PACKING = {
    "pack_embeddings": (
        "(Tensor embedding, Tensor vision, Tensor source, Tensor vision_rows,"
        " SymInt? sparse_ids=None, bool shown_once=True) -> Tensor"
    ),
    "merge_vision": (
        "(Tensor inputs_embeds, Tensor vision, Tensor vision_rows) -> (Tensor, Tensor)"
    ),
    "unpack_vision": "(Tensor packed, Tensor source, Tensor vision_rows) -> Tensor",
    "keep_text": "(Tensor rows, Tensor source) -> Tensor",
    "spread_vision": "(Tensor vision, Tensor source) -> Tensor",
    "table_gradient": (
        "(Tensor grad, Tensor source, SymInt num_vision, SymInt num_rows) -> Tensor"
    ),
    "sparse_table_gradient": (
        "(Tensor grad, Tensor source, SymInt num_vision, SymInt num_ids) -> (Tensor, Tensor)"
    ),
}


@pytest.mark.parametrize(("name", "schema"), (PROJECTOR | PACKING).items())
def test_schema(name, schema):
    op = getattr(torch.ops.tokenflex, name).default
    assert str(op._schema) == f"tokenflex::{name}{schema}"
