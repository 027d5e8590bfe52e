"""Fused AllReduce-RMSNorm over the peer transport between real GPUs, against separate kernels.

    TORCH_SYMM_MEM_DISABLE_MULTICAST=1 torchrun --nproc-per-node 2 scripts/bench_tokenweave_multigpu.py \\
        --output docs/benchmarks

Separate: an all-reduce by NCCL followed by residual add and
RMSNorm of all rows on every rank, with as many blocks as the GPU takes. Every time is the slowest rank's.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sglang_ext.tokenweave.kernel import MAX_CTAS, AllReduceRmsNorm, virtual_ranks
from sglang_ext.tokenweave.measure import gpu_name, versions
from sglang_ext.tokenweave.rows import owned_rows
from sglang_ext.tokenweave.symmetric import symmetric_ranks

HIDDEN = 8192
DTYPE = torch.bfloat16
EPSILON = 1e-5
TOKENS = (64, 256, 512, 1024, 2048, 4096, 8192)
CTAS = (2, 4, 8, 16, 32, 64)
REPEATS = 30


def slowest_median_us(work: Callable[[], object]) -> float:
    """Median time of ``work`` on the slowest rank, in microseconds."""
    for _ in range(5):
        work()
    spans = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        begin.record()
        work()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    median = torch.tensor(statistics.median(b.elapsed_time(e) * 1e3 for b, e in spans), device="cuda")
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    return float(median)


def measure(rank: int, world: int, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """All token counts and block counts."""
    device = torch.device("cuda", rank)
    buffers = symmetric_ranks(group, max(TOKENS), HIDDEN, DTYPE, device, multicast=False)
    kernel = AllReduceRmsNorm(buffers, timeout_s=60)
    local = virtual_ranks(1, max(TOKENS), HIDDEN, DTYPE, device)
    norm = AllReduceRmsNorm(local)
    residual = torch.randn(max(TOKENS), HIDDEN, device="cuda").to(DTYPE)
    weight = torch.ones(HIDDEN, device="cuda", dtype=DTYPE)
    rows = []
    for tokens in TOKENS:
        shard = residual[owned_rows(tokens, world, rank)]
        partial = buffers.hidden[0][:tokens]

        def nccl(tokens: int = tokens) -> None:
            dist.all_reduce(local.hidden[0][:tokens])

        def add_norm(tokens: int = tokens) -> None:
            norm(tokens, [residual[:tokens]], weight, EPSILON, MAX_CTAS)

        def fused(ctas: int, tokens: int = tokens, shard: torch.Tensor = shard) -> None:
            kernel(tokens, [shard], weight, EPSILON, ctas)

        def plain(ctas: int, tokens: int = tokens) -> None:
            kernel(tokens, [], None, EPSILON, ctas)

        def refill(partial: torch.Tensor = partial) -> None:
            # Small, so that the repeated sums of one measurement stay finite.
            partial.normal_(std=1e-3)
            local.hidden[0].normal_(std=1e-3)

        row: dict[str, Any] = {"world": world, "tokens": tokens}
        works: dict[str, Callable[[], object]] = {
            "nccl_all_reduce": nccl,
            "add_norm": add_norm,
            "nccl_then_norm": lambda a=nccl, b=add_norm: (a(), b()),  # type: ignore[misc]
            **{f"fused_{ctas}": lambda f=fused, c=ctas: f(c) for ctas in CTAS},  # type: ignore[misc]
            "own_all_reduce_16": lambda f=plain: f(16),  # type: ignore[misc]
        }
        for name, work in works.items():
            refill()
            row[f"{name}_us"] = slowest_median_us(work)
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on every rank; rank 0 writes the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV file")
    options = parser.parse_args(arguments)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = dist.new_group(backend="gloo")
    rows = measure(rank, world, group)
    if rank == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"tokenweave_peer_world{world}.csv"
        made_with = " ".join(f"{name} {value}" for name, value in versions().items())
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(f"# device: {world} x {gpu_name()}; {made_with}\n")
            file.write(f"# command: torchrun --nproc-per-node {world} {shlex.join(sys.argv)}\n")
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
