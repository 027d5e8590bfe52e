"""All-reduces of canonical passes between GPUs: summed in rank order, whatever the row.

NCCL's rings and two-shot kernels start the sum of each part of the buffer at another rank. Floating-point
sums depend on their order, so a row's bits would depend on where it stands. Two ranks have only one order.
(For ranks on a CPU see :mod:`sglang_ext.cpu.collectives`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_ext.llm42.canonical_scope import in_canonical_pass

#: A sum of two numbers has only one order.
RANKS_WITH_ONE_ORDER = 2


def all_reduce_out_place(
    original: Callable[..., torch.Tensor], coordinator: Any, tensor: torch.Tensor, method: str
) -> torch.Tensor:
    """Around ``GroupCoordinator._all_reduce_out_place``: canonical passes sum in rank order between GPUs."""
    if not _order_matters(coordinator, tensor):
        return original(coordinator, tensor, method)
    return sum_in_rank_order(tensor, coordinator.world_size, coordinator.all_gather_into_tensor)


def all_reduce_in_place(original: Callable[..., None], coordinator: Any, tensor: torch.Tensor) -> None:
    """Around ``GroupCoordinator._all_reduce_in_place``: the same."""
    if not _order_matters(coordinator, tensor):
        original(coordinator, tensor)
        return
    tensor.copy_(sum_in_rank_order(tensor, coordinator.world_size, coordinator.all_gather_into_tensor))


def sum_in_rank_order(
    tensor: torch.Tensor, world: int, all_gather: Callable[[torch.Tensor, torch.Tensor], object]
) -> torch.Tensor:
    """The sum of ``tensor`` over all ranks, added in rank order in float32 and rounded once.

    Every rank computes the same sum, so all have the same bits. Gathering moves ``world / 2`` times the bytes
    of a ring all-reduce; a canonical pass pays that for an order that no row can change.

    Args:
        tensor: this rank's summand, any shape.
        world: number of ranks.
        all_gather: fills its first argument, ``world`` times as long, with the second of all ranks in order.
    """
    partials = tensor.new_empty((world, *tensor.shape))
    all_gather(partials.view(world * tensor.shape[0], *tensor.shape[1:]), tensor.contiguous())
    total = partials[0].to(torch.promote_types(tensor.dtype, torch.float32))
    for partial in partials[1:]:
        total += partial
    return total.to(tensor.dtype)


def _order_matters(coordinator: Any, tensor: torch.Tensor) -> bool:
    return in_canonical_pass() and tensor.is_cuda and coordinator.world_size > RANKS_WITH_ONE_ORDER


def fused_all_reduce(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """Around ``apply_flashinfer_allreduce_fusion``: canonical passes do not fuse all-reduce and norm.

    FlashInfer's fused kernel chooses its algorithm by the number of rows, of which passes have several.
    """
    return not in_canonical_pass() and bool(original(*args, **kwargs))
