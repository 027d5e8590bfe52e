"""The fused kernel over the peer transport between real GPUs, through torch symmetric memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_ext.tokenweave import reference
from sglang_ext.tokenweave.kernel import AllReduceRmsNorm
from sglang_ext.tokenweave.rows import owned_rows
from sglang_ext.tokenweave.symmetric import symmetric_ranks

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs"),
]

EPSILON = 1e-5
MAX_TOKENS = 1100
SHAPES = [(tokens, hidden) for hidden in (1024, 8192, 16384) for tokens in (1, 2, 3, 257, 1025)]


def _inputs(world: int, tokens: int, hidden: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def rows() -> torch.Tensor:
        return torch.randn(tokens, hidden, generator=generator, device="cuda").to(torch.bfloat16)

    return [rows() for _ in range(world)], rows()


def _rank(rank: int, world: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    for tokens, hidden in SHAPES:
        device = torch.device("cuda", rank)
        buffers = symmetric_ranks(group, MAX_TOKENS, hidden, torch.bfloat16, device, multicast=False)
        kernel = AllReduceRmsNorm(buffers, timeout_s=30.0)
        weight = _inputs(1, 1, hidden, seed=1)[1][0]
        rows = owned_rows(tokens, world, rank)
        shards = [
            _inputs(world, tokens, hidden, seed=2)[1][owned_rows(tokens, world, r)] for r in range(world)
        ]
        mine = shards[rank].clone()

        def step(tokens: int = tokens) -> None:
            kernel(tokens, [mine], weight, EPSILON, ctas=8)  # noqa: B023

        step_graph = torch.cuda.CUDAGraph()
        for repeat in range(6):
            partials, _ = _inputs(world, tokens, hidden, seed=10 + repeat)
            buffers.hidden[0][:tokens] = partials[rank]
            expected, shards = reference.allreduce_rmsnorm(partials, shards, weight, EPSILON)
            if repeat == 3:  # later repetitions replay a captured graph
                torch.cuda.synchronize()
                with torch.cuda.graph(step_graph):
                    step()
            step() if repeat < 3 else step_graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(buffers.hidden[0][:tokens], expected), (tokens, hidden, repeat)
            assert torch.equal(mine, shards[rank]), (tokens, hidden, repeat, rows)
            dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_equals_reference_bit_for_bit(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"fewer than {world} CUDA GPUs")
    # The peer transport needs no multicast object, and on shared hosts none may be created.
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    mp.start_processes(_rank, (world, str(tmp_path / "store")), nprocs=world, start_method="spawn")
