"""The all-reduce of canonical passes: every row summed in the order of the ranks, on real gloo groups."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_ext.cpu import collectives
from sglang_ext.llm42.canonical_scope import canonical_scope

ROWS, HIDDEN = 48, 72
WORLDS = (2, 3, 4)
DTYPES = (torch.bfloat16, torch.float32)


def _row(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _rank(rank: int, store: str, folder: str) -> None:
    """One of four processes; the first two and the first three also form groups of their own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(WORLDS))
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    results = {}
    for world, dtype in itertools.product(WORLDS, DTYPES):
        if rank >= world:
            continue
        ordinary, canonical = (_row(rank, dtype).repeat(ROWS, 1) for _ in range(2))
        collectives.all_reduce(dist.all_reduce, ordinary, group=groups[world])
        with canonical_scope():
            collectives.all_reduce(dist.all_reduce, canonical, group=groups[world])
        results[world, dtype] = (ordinary, canonical)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, tuple[torch.Tensor, torch.Tensor]]]:
    """What each rank got: ``(ordinary, canonical)`` by number of ranks and dtype."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (str(folder / "store"), str(folder))
    mp.start_processes(_rank, arguments, nprocs=max(WORLDS), start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(max(WORLDS))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_rows_are_summed_in_rank_order(results: list[dict[Any, Any]], world: int, dtype: torch.dtype) -> None:
    total = torch.zeros(HIDDEN)
    for rank in range(world):
        total += _row(rank, dtype).float()
    expected = total.to(dtype).repeat(ROWS, 1)
    for rank in range(world):
        ordinary, canonical = results[rank][world, dtype]
        assert torch.equal(canonical, expected)
        torch.testing.assert_close(ordinary, expected, rtol=0.02, atol=0.02)
        alike = torch.equal(ordinary, ordinary[:1].expand_as(ordinary))
        assert alike == (world == 2), "gloo sums rows in different orders from three ranks on"


def test_one_rank_is_left_to_gloo() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        tensor = torch.ones(3)
        with canonical_scope():
            assert collectives.all_reduce(lambda *args: args, tensor) == (
                tensor,
                dist.ReduceOp.SUM,
                None,
                False,
            )
    finally:
        dist.destroy_process_group()
