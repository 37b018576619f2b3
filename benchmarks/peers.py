"""Peers: what other packages offer in place of our ops. A new peer is one function here and a test.

``@peer(op, name)`` registers a function (leaves, fixed) -> result. With ``module``, the function
gets that module, imported once, as its first argument. ``plain.py`` and ``prompts.py`` define
leaves and fixed; :class:`Variant` lists further options. A package that is not installed is a row
that says so, as is a call that fails, computes something else, hangs or ends its process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import plain
from benchmarks.cases import MODES, TRAINING, Call, Leaves, Variant
from benchmarks.harness import Run
from benchmarks.plain import Grid, Grids, by_group, down, gate_up, pool
from benchmarks.prompts import IMAGE, Packed
from benchmarks.results import AGAIN, COMPILED, EAGER, new_row

SPARSE_GRADIENT = "pack_embeddings, sparse gradient"

PEERS: dict[str, dict[str, Callable[[], Variant]]] = {}  # op -> name -> how to load it


def peer(op: str, name: str, *, module: str = "", **options: Any) -> Callable[[Any], Any]:
    """Register a peer of an op.

    Args:
        op: The op, or ``SPARSE_GRADIENT``.
        name: As the CSV has it.
        module: Passed to the function as its first argument.
        **options: Fields of :class:`Variant`.
    """

    def register(call: Any) -> Any:
        def load() -> Variant:
            loaded = partial(call, importlib.import_module(module)) if module else call
            return Variant(name, loaded, **options)

        PEERS.setdefault(op, {})[name] = load
        return call

    return register


def load_peers(op: str, run: Run) -> list[Variant]:
    """Return the op's peers that are installed, and emit a row for each of the others."""
    variants, missing = [], []
    for name, load in PEERS.get(op, {}).items():
        row = new_row(op=op, variant=name)
        failure = run.banned.get(name)
        run.begin(row)
        try:
            if failure and not failure["case"]:  # already importing it ended a process
                row["status"] = failure["status"]
            elif name == COMPILED and run.quick:
                row["status"] = "not run: a quick run compiles nothing"
            elif name == COMPILED and not run.compiles:
                row["status"] = "not run: a CPU compiles float32 for 1 thread, bfloat16 for 2"
            else:
                variants.append(load())
                continue
        except ModuleNotFoundError as error:
            row["status"] = f"not installed: no module {error.name}"
        except Exception as error:  # a package that does not import on this machine
            row["status"] = f"does not import: {type(error).__name__}: {error}".splitlines()[0]
        missing.append(row)
    run.emit([] if (op, "", "") in run.done else missing)
    return variants


# ---- PyTorch


def both_weights(leaves: Leaves) -> Leaves:
    weight = torch.cat([leaves["gate_weight"], leaves["up_weight"]])
    return {"x": leaves["x"], "weight": weight}


def true_product(leaves: Leaves, _: object) -> torch.Tensor:
    return bare_product(both_weights(leaves))


@peer("swiglu", "bare product", prepare=both_weights, truth=true_product, modes=("forward",))
def bare_product(leaves: Leaves, _: object = None) -> torch.Tensor:
    """Multiply with the same FLOPs, and do nothing else."""
    return leaves["x"] @ leaves["weight"].T


def compiled(call: Call) -> Variant:
    """Compile each shape on its own. Graphs are captured by the harness, of all variants alike."""
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False  # backward is timed alone, many times
    compiled_call = torch.compile(call, mode="max-autotune-no-cudagraphs", dynamic=False)
    return Variant(COMPILED, compiled_call, slow_start=True)


for call in (plain.pool_norm, plain.swiglu, plain.project_tokens):
    peer(call.__name__, EAGER)(call)
    PEERS[call.__name__][COMPILED] = partial(compiled, call)
    # Repeating products costs as much as they do: their controls take part where compiled ones do.
    peer(call.__name__, EAGER + AGAIN, slow_start=call is not plain.pool_norm)(call)


# ---- Liger-Kernel: its LayerNorm, and its silu(gate) * up between PyTorch's products. The backward
# of silu(gate) * up writes into what its forward saved, so it cannot be timed alone.

LIGER = {"name": "liger-kernel", "module": "liger_kernel.ops"}
ONCE = ("forward", "forward+backward")


@peer("pool_norm", **LIGER)
def liger_pool_norm(liger: ModuleType, leaves: Leaves, grids: Grids) -> torch.Tensor:
    def stages(x: torch.Tensor, grid: Grid) -> torch.Tensor:
        weight, bias = leaves["norm_weight"], leaves["norm_bias"]
        pooled = pool(x, grid, grids.inputs[0][0])
        return liger.LigerLayerNormFunction.apply(pooled, weight, bias, plain.EPS)

    return by_group(leaves["x"], grids, stages)


@peer("swiglu", **LIGER, modes=ONCE)
def liger_swiglu(liger: ModuleType, leaves: Leaves, _: object = None) -> torch.Tensor:
    return liger.LigerSiLUMulFunction.apply(*gate_up(leaves["x"], leaves), 1.0, 1.0)


@peer("project_tokens", **LIGER, modes=ONCE)
def liger_project_tokens(liger: ModuleType, leaves: Leaves, grids: Grids) -> torch.Tensor:
    pooled = liger_pool_norm(liger, leaves, grids)
    return down(liger_swiglu(liger, {**leaves, "x": pooled}), leaves)


# Its fused gate and up, one kernel on SM100; elsewhere two products and its silu(gate) * up.
@peer(
    "swiglu",
    "liger-kernel fused_swiglu, no biases",
    module="liger_kernel.ops.cutedsl.ops.swiglu",
    prepare=both_weights,
    without=plain.BIASES,
    modes=("forward",),
)
def liger_fused_swiglu(liger: ModuleType, leaves: Leaves, _: object = None) -> torch.Tensor:
    return liger.fused_swiglu(leaves["x"], leaves["weight"])


# ---- cuDNN, on SM100 alone. Its MLP, cudnn.gemm.swiglu_mlp, takes outputs as wide as inputs only.

CUDNN_BLOCK = 32  # rows of up, then as many of gate


def in_blocks(leaves: Leaves) -> Leaves:
    """Store rows of up and of gate in turns, a block each."""
    width = leaves["x"].shape[1]
    pair = (leaves[name].view(-1, CUDNN_BLOCK, width) for name in ("up_weight", "gate_weight"))
    return {"x": leaves["x"], "weight": torch.stack(tuple(pair), 1).flatten(0, 2)}


@peer(
    "swiglu",
    "cudnn, no biases",
    module="cudnn",
    prepare=in_blocks,
    without=plain.BIASES,
    modes=("forward",),
)
def cudnn_swiglu(cudnn: ModuleType, leaves: Leaves, _: object = None) -> torch.Tensor:
    x, weight = leaves["x"][..., None], leaves["weight"][..., None]
    dtypes = {"ab12_dtype": x.dtype, "c_dtype": x.dtype}
    return cudnn.gemm_swiglu_wrapper_sm100(x, weight, **dtypes)["c_tensor"][..., 0]


# ---- quack-kernels, in its default configurations (``tuned=False``): it would tune at run time.


def interleaved(leaves: Leaves) -> Leaves:
    """Store gate and up row by row in turns."""
    rest = {name: leaf for name, leaf in leaves.items() if not name.startswith(("gate_", "up_"))}
    for kind in ("weight", "bias"):
        pair = torch.stack([leaves[f"gate_{kind}"], leaves[f"up_{kind}"]], 1)
        rest[f"gate_up_{kind}"] = pair.flatten(0, 1)
    return rest


# Its product is differentiable only through the down projection that follows.
@peer("swiglu", "quack-kernels", module="quack.linear", prepare=interleaved, modes=("forward",))
def quack_swiglu(quack: ModuleType, leaves: Leaves, _: object) -> torch.Tensor:
    arguments = (leaves["x"], leaves["gate_up_weight"], "swiglu")
    options = {"bias": leaves["gate_up_bias"], "store_preact": False, "tuned": False}
    return quack.linear_gated_func(*arguments, **options)[1]


@peer("project_tokens", "quack-kernels", module="quack.mlp", prepare=interleaved)
def quack_project_tokens(quack: ModuleType, leaves: Leaves, grids: Grids) -> torch.Tensor:
    weights = (leaves["gate_up_weight"], leaves["down_weight"])
    biases = {"bias1": leaves["gate_up_bias"], "bias2": leaves["down_bias"]}
    return quack.mlp_func(plain.pool_norm(leaves, grids), *weights, "swiglu", **biases, tuned=False)


# The same with the weights of two Linears one after the other: ``concat_layout``. Its product that
# scales rows for RMSNorm, gemm_norm_gated, does not compute LayerNorm.


def stacked(leaves: Leaves) -> Leaves:
    """Store the rows of gate, then those of up."""
    rest = {name: leaf for name, leaf in leaves.items() if not name.startswith(("gate_", "up_"))}
    for kind in ("weight", "bias"):
        rest[f"gate_up_{kind}"] = torch.cat([leaves[f"gate_{kind}"], leaves[f"up_{kind}"]])
    return rest


STACKED = "quack-kernels, concat_layout"


@peer("swiglu", STACKED, module="quack.linear", prepare=stacked, modes=("forward",))
def quack_stacked_swiglu(quack: ModuleType, leaves: Leaves, _: object) -> torch.Tensor:
    arguments = (leaves["x"], leaves["gate_up_weight"], "swiglu")
    options = {"bias": leaves["gate_up_bias"], "store_preact": False, "tuned": False}
    return quack.linear_gated_func(*arguments, **options, concat_layout=True)[1]


@peer("project_tokens", STACKED, module="quack.mlp", prepare=stacked)
def quack_stacked_project_tokens(quack: ModuleType, leaves: Leaves, grids: Grids) -> torch.Tensor:
    weights = (leaves["gate_up_weight"], leaves["down_weight"])
    options = {"bias1": leaves["gate_up_bias"], "bias2": leaves["down_bias"], "tuned": False}
    tokens = plain.pool_norm(leaves, grids)
    return quack.mlp_func(tokens, *weights, "swiglu", **options, concat_layout=True)


# ---- flash-swiglu-mlp. Its backward takes an output as wide as the input only.


@peer(
    "project_tokens",
    "flash-swiglu-mlp, no biases",
    module="flash_swiglu_mlp",
    without=plain.BIASES,
    modes=("forward",),
    slow_start=True,
)
def flash_project_tokens(flash: ModuleType, leaves: Leaves, grids: Grids) -> torch.Tensor:
    weights = (leaves[name] for name in ("gate_weight", "up_weight", "down_weight"))
    return flash.flash_swiglu(plain.pool_norm(leaves, grids)[None], *weights)[0]


# ---- packing. Models look up all ids first, the placeholder's too, then put the vision rows in.


def look_up(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return F.embedding(packed.plan.input_ids, leaves["table"])


def scatter(embeds: torch.Tensor, ids: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """Overwrite by a mask, as most Hugging Face models do."""
    return embeds.masked_scatter((ids == IMAGE).unsqueeze(-1).expand_as(embeds), vision)


# The backward pass of masked_scatter counts the mask, which synchronises the device.
@peer("pack_embeddings", "embedding + masked_scatter", waits=TRAINING)
def masked_scatter_pack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return scatter(look_up(leaves, packed), packed.plan.input_ids, leaves["vision"])


@peer("pack_embeddings", "embedding + index_put")
def index_put_pack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    """Put vision rows in by known row numbers; in place where autograd allows it."""
    embeds = look_up(leaves, packed)
    put = embeds.index_put if embeds.requires_grad else embeds.index_put_
    return put((packed.rows,), leaves["vision"])


@peer("pack_embeddings", "embedding + vLLM merge", modes=("forward",))
def vllm_pack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    """Overwrite in place, by a mask of one column, as vLLM did in 2025."""
    mask = (packed.plan.input_ids == IMAGE).unsqueeze(1)
    return look_up(leaves, packed).masked_scatter_(mask, leaves["vision"])


@peer("pack_embeddings", "embedding + nested jagged")
def nested_pack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    """Put text, image, text of each sample together, then all samples into a nested tensor."""
    text = iter(F.embedding(packed.text_ids, leaves["table"]).split(packed.text_pieces))
    images = leaves["vision"].split(packed.plan.token_counts)
    samples = [torch.cat([next(text), image, next(text)]) for image in images]
    return torch.nested.as_nested_tensor(samples, layout=torch.jagged).values()


@peer(
    "pack_embeddings",
    "padded embedding + flash-attn unpad",
    module="flash_attn.bert_padding",
    waits=MODES,
)
def flash_attn_pack(flash: ModuleType, leaves: Leaves, packed: Packed) -> torch.Tensor:
    """Merge a padded batch by a mask, then drop the padding as flash-attn does."""
    embeds = F.embedding(packed.padded_ids, leaves["table"])
    merged = scatter(embeds, packed.padded_ids, leaves["vision"])
    return flash.unpad_input(merged, packed.padded_mask)[0]


@peer(SPARSE_GRADIENT, "embedding(sparse) + index_put")
def sparse_index_put_pack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    """Look up with a sparse gradient of the table: a row per row of the batch, not added up."""
    embeds = F.embedding(packed.plan.input_ids, leaves["table"], sparse=True)
    return embeds.index_put((packed.rows,), leaves["vision"])


@peer("merge_vision", "masked_scatter", waits=TRAINING)
def masked_scatter_merge(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return scatter(leaves["embeds"], packed.plan.input_ids, leaves["vision"])


@peer("merge_vision", "index_put")
@peer("merge_vision", f"index_put{AGAIN}")
def index_put_merge(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return leaves["embeds"].index_put((packed.rows,), leaves["vision"])


# vLLM's merge of today: it assigns through a mask of the rows, in place, and keeps that mask on the
# host, where it finds the rows. Copying their numbers to the device cannot be captured.


@peer("pack_embeddings", "embedding + vLLM index mask", modes=("forward",), waits=MODES)
def host_mask_pack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    embeds = look_up(leaves, packed)
    embeds[packed.mask] = leaves["vision"]
    return embeds


@peer("merge_vision", "vLLM index mask", waits=MODES)
def host_mask_merge(leaves: Leaves, packed: Packed) -> torch.Tensor:
    embeds = leaves["embeds"].clone()
    embeds[packed.mask] = leaves["vision"]
    return embeds


@peer("unpack_vision", "index")
def index_unpack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return leaves["packed"][packed.rows]


@peer("unpack_vision", "index_select")
def index_select_unpack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return leaves["packed"].index_select(0, packed.rows)


# Finding the rows of a mask on the device synchronises it.
@peer("unpack_vision", "index by a mask", waits=MODES)
def index_mask_unpack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return leaves["packed"][packed.plan.input_ids == IMAGE]
