"""Fused AllReduce + residual add + RMSNorm out of ``torch.distributed`` calls: gloo on CPU, NCCL otherwise.

The same data flow as the kernel: each rank receives its own rows from everybody, sums them in rank order,
adds the residual that only it holds, normalises, and sends the result to everybody.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from sglang_ext.tokenweave.reference import reduce_in_rank_order
from sglang_ext.tokenweave.rows import owned_rows, rows_per_rank

#: (reduced rows, residual rows) -> (normalised rows, new residual rows)
Norm = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def reduce_scatter_rows(partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's rows of the sum over ranks of ``partial`` [n, hidden], summed in rank order."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    tokens = partial.shape[0]
    counts = [_count(tokens, world, peer) for peer in range(world)]
    mine = counts[rank]
    received = partial.new_empty(world * mine, partial.shape[1])
    dist.all_to_all_single(received, partial.contiguous(), [mine] * world, counts, group=group)
    return reduce_in_rank_order(received.view(world, mine, partial.shape[1]).unbind())


def gather_rows(rows: torch.Tensor, tokens: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' rows [n, hidden] from each rank's own ``rows``."""
    world = dist.get_world_size(group)
    share = rows_per_rank(tokens, world)
    padded = rows.new_zeros(share, rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = rows.new_empty(world * share, rows.shape[1])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    # Only ranks at the end own fewer rows than a share, so the padding is all at the end.
    return gathered[:tokens]


def allreduce_rmsnorm(
    partial: torch.Tensor, residual: torch.Tensor, norm: Norm, group: dist.ProcessGroup
) -> torch.Tensor:
    """Reduce ``partial`` [n, hidden] over ``group``, add and normalise this rank's rows, gather the result.

    Args:
        partial: this rank's partial sums.
        residual: this rank's residual rows (:func:`sglang_ext.tokenweave.rows.owned_rows`), updated in place.
        norm: residual add and RMSNorm of the own rows.
        group: process group of the tensor-parallel ranks.

    Returns:
        Normalised rows [n, hidden], the same on every rank.
    """
    mine = reduce_scatter_rows(partial, group)
    if mine.shape[0]:
        mine, updated = norm(mine, residual)
        residual.copy_(updated)
    return gather_rows(mine, partial.shape[0], group)


def _count(tokens: int, world: int, rank: int) -> int:
    rows = owned_rows(tokens, world, rank)
    return rows.stop - rows.start
