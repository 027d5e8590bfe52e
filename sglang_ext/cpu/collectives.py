"""All-reduce whose order of summation is the same for every row, for canonical passes on a CPU.

From three ranks on, gloo's all-reduce is a ring: it cuts the buffer in parts and starts the sum of each part
at another rank. Floating-point sums depend on their order, so a row's bits would depend on where it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sglang_ext.llm42.canonical_scope import in_canonical_pass

#: A sum of two numbers has only one order.
RANKS_WITH_ONE_ORDER = 2


def all_reduce(
    original: Callable[..., Any],
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Around ``torch.distributed.all_reduce``: sums on a CPU are in rank order in canonical passes."""
    if not in_canonical_pass() or not _order_matters(tensor, op, group):
        return original(tensor, op, group, async_op)
    if async_op:
        raise NotImplementedError("an all-reduce in rank order is not asynchronous")
    sum_in_rank_order(tensor, group)
    return None


def sum_in_rank_order(tensor: torch.Tensor, group: Any = None) -> None:
    """Replace ``tensor`` by its sum over the ranks of ``group``, added in rank order and rounded once.

    Every rank computes the same sum, so all have the same bits. 16-bit types are added in float32.
    """
    partials = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in _ranks(group)]
    dist.all_gather(partials, tensor.contiguous(), group=group)
    total = partials[0].to(torch.promote_types(tensor.dtype, torch.float32))
    for partial in partials[1:]:
        total += partial
    tensor.copy_(total)


def _order_matters(tensor: torch.Tensor, op: Any, group: Any) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and op == dist.ReduceOp.SUM
        and len(_ranks(group)) > RANKS_WITH_ONE_ORDER
    )


def _ranks(group: Any) -> range:
    return range(dist.get_world_size(group))
