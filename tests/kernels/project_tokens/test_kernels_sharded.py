"""The fused projector under FSDP2: sharded parameters, the gradients of one process."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.kernels.common import ON_TRITON

pytestmark = [ON_TRITON, pytest.mark.slow]


def _compare_with_one_process(rank: int, rendezvous: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from benchmarks.stubbed_gpu import unrecorded
    from tokenflex import TokenAdaptiveProjector
    from tokenflex_kernels.project_tokens import op as project_tokens_op

    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    fused = []
    op = project_tokens_op.fused_project_tokens
    project_tokens_op.fused_project_tokens = lambda *args: fused.append(1) or op(*args)
    for save in ("preactivation", "input"):
        torch.manual_seed(0)
        whole = TokenAdaptiveProjector(8, 6, hidden_width=12, save=save)
        sharded = TokenAdaptiveProjector(8, 6, hidden_width=12, save=save)
        sharded.load_state_dict(whole.state_dict())
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        patches = torch.randn(2, 9, 8)  # the same on both ranks: the mean gradient is each one's
        with unrecorded():  # gathered shards are weights like any other
            results = [projector(patches, [4, 9]) for projector in (sharded, whole)]
        for result in results:
            result.square().sum().backward()
        torch.testing.assert_close(*results)
        for shard, parameter in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(shard.grad.full_tensor(), parameter.grad)
    assert len(fused) == 4  # the kernels ran, sharded or not
    dist.destroy_process_group()
    # Gloo's threads may still hold tensors, and abort an interpreter that is shutting down
    # (pytorch/pytorch#179291): leave without shutting it down.
    os._exit(0)


def test_gradients_equal_those_of_one_process(tmp_path, device):
    if device == "cuda":
        pytest.skip("two ranks need two GPUs; gloo on the CPU shows the same")
    mp.spawn(_compare_with_one_process, (f"file://{tmp_path}/rendezvous",), nprocs=2)
