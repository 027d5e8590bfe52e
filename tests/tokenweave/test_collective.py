"""The gloo version against the reference, in real process groups of 2 and 4 ranks."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_ext.tokenweave import collective, reference
from sglang_ext.tokenweave.rows import owned_rows

HIDDEN = 1024
EPSILON = 1e-6
LAYERS = 3
#: n < world, odd, one row each, ragged tail, even.
TOKENS = (1, 2, 3, 4, 5, 7, 33, 64)


def _inputs(tokens: int, world: int) -> tuple[list[list[torch.Tensor]], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * world + tokens)
    partials = [
        [torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16) for _ in range(world)]
        for _ in range(LAYERS)
    ]
    residual = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    return partials, residual, torch.randn(HIDDEN, generator=generator).to(torch.bfloat16)


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    group = dist.group.WORLD
    outputs = {}
    for tokens in TOKENS:
        partials, residual, weight = _inputs(tokens, world)
        # Only the own rows of the residual are right: every other row is poison.
        full = torch.full_like(residual, float("nan"))
        rows = owned_rows(tokens, world, rank)
        full[rows] = residual[rows]
        shard = full[rows]
        for layer in range(LAYERS):
            output = collective.allreduce_rmsnorm(
                partials[layer][rank].clone(),
                shard,
                lambda x, r, weight=weight: reference.add_rmsnorm(x, r, weight, EPSILON),
                group,
            )
            outputs[tokens, layer] = (output, full[rows].clone())
    torch.save(outputs, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize("world", [2, 4])
def test_equals_reference_on_every_rank(world: int, tmp_path: Path) -> None:
    mp.start_processes(_rank, (world, _free_port(), str(tmp_path)), nprocs=world, start_method="spawn")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for tokens in TOKENS:
        partials, residual, weight = _inputs(tokens, world)
        shards = [residual[owned_rows(tokens, world, rank)] for rank in range(world)]
        for layer in range(LAYERS):
            expected, shards = reference.allreduce_rmsnorm(partials[layer], shards, weight, EPSILON)
            for rank in range(world):
                output, shard = results[rank][tokens, layer]
                assert output.isfinite().all()
                assert torch.equal(output, expected)
                assert torch.equal(shard, shards[rank])
