"""The winner of each row and its lead over the second best, read once.

What :mod:`sglang_ext.llm42.sampling` computes out of torch's operators takes seven passes over logits of a
whole vocabulary. Comparisons are exact, so the order in which a kernel makes them changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Columns that a program looks at together.
BLOCK = 4096


@triton.jit
def _top_two_kernel(values, tokens, leads, columns, stride, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    second = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.full((BLOCK,), 0, tl.int32) + columns
    for start in range(0, columns, BLOCK):
        offset = start + lane
        value = tl.load(values + row * stride + offset, mask=offset < columns, other=float("-inf")).to(
            tl.float32
        )
        # Columns come in ascending order, so the first of equal ones stays.
        better = value > best
        second = tl.where(better, best, tl.maximum(second, value))
        place = tl.where(better, offset, place)
        best = tl.where(better, value, best)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, place, columns), axis=0)
    runner_up = tl.max(tl.where(place == token, second, best), axis=0)
    # A row without a finite value has no winner; the id must stay inside the embedding table all the same.
    tl.store(tokens + row, tl.minimum(token, columns - 1).to(tl.int64))
    tl.store(leads + row, top - runner_up)


def top_two(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the highest value of each row, ties to the lowest, and highest minus second highest.

    The same as ``values.max(dim=1)`` with the lowest index among equal ones and, of ``top`` being
    ``values.float().topk(2, dim=1).values``, ``top[:, 0] - top[:, 1]``.

    Args:
        values: ``[rows, columns]`` on a GPU, any float dtype, columns contiguous; NaN counts as lowest.

    Returns:
        int64 ``[rows]`` and float32 ``[rows]``; the lead is infinite if only one value is finite.
    """
    rows, columns = values.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=values.device)
    leads = torch.empty(rows, dtype=torch.float32, device=values.device)
    if rows:
        _top_two_kernel[(rows,)](values, tokens, leads, columns, values.stride(0), BLOCK=BLOCK, num_warps=8)
    return tokens, leads
