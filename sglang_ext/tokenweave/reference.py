"""Plain-PyTorch twin of the fused AllReduce + residual add + RMSNorm kernel, bit for bit.

Rounding points (see ``cuda/allreduce_rmsnorm.cu``):

1. the sum over ranks is taken in fp32, in rank order, and rounded to the 16-bit type;
2. ``h = sum + residual`` in fp32; the residual stored is ``h`` rounded;
3. the mean of ``h * h`` in fp32, of the unrounded ``h``; ``rstd = 1 / sqrt(mean + eps)`` in fp32;
4. ``(h * rstd) * (weight_bias + weight)`` in fp32, rounded once.

They are those of SGLang's ``RMSNorm`` after an all-reduce that rounds once. Only step 3 depends on the
order of additions: :func:`square_sum` repeats the kernel's tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_ext.tokenweave.rows import owned_rows

_VECTOR = 8  # elements of a 16-byte access
_WARP = 32
_MAX_THREADS = 1024
MAX_HIDDEN = _MAX_THREADS * _VECTOR * 2


@dataclass(frozen=True)
class RowLayout:
    """How a thread block holds one row; ``row_layout`` in the CUDA sources.

    Attributes:
        threads: threads per row, a multiple of the warp.
        vectors: 16-byte vectors per thread.
    """

    threads: int
    vectors: int


def row_layout(hidden: int) -> RowLayout:
    """Layout for rows of ``hidden`` elements.

    Raises:
        ValueError: ``hidden`` is not a multiple of 8 or is out of range.
    """
    if hidden % _VECTOR or not _VECTOR <= hidden <= MAX_HIDDEN:
        raise ValueError(f"hidden size must be a multiple of {_VECTOR} up to {MAX_HIDDEN}, not {hidden}")
    vectors = hidden // _VECTOR
    per_thread = -(-vectors // _MAX_THREADS)
    needed = -(-vectors // per_thread)
    return RowLayout(threads=-(-needed // _WARP) * _WARP, vectors=per_thread)


def reduce_in_rank_order(partials: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of all ranks' partial sums in fp32, rank 0 first, rounded once to their dtype."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    return total.to(partials[0].dtype)


def square_sum(rows: torch.Tensor) -> torch.Tensor:
    """Sum of squares of fp32 ``rows`` [n, hidden] in the kernel's order of additions -> [n, 1]."""
    layout = row_layout(rows.shape[-1])
    padding = layout.vectors * layout.threads * _VECTOR - rows.shape[-1]
    squares = torch.nn.functional.pad(rows * rows, (0, padding))
    squares = squares.view(-1, layout.vectors, layout.threads, _VECTOR).transpose(1, 2)
    per_thread = squares.new_zeros(squares.shape[:2])
    for vector in range(layout.vectors):
        for element in range(_VECTOR):
            per_thread = per_thread + squares[:, :, vector, element]
    warps = _warp_sum(per_thread.view(-1, layout.threads // _WARP, _WARP))
    return _warp_sum(torch.nn.functional.pad(warps, (0, _WARP - warps.shape[-1]))).unsqueeze(-1)


def _warp_sum(lanes: torch.Tensor) -> torch.Tensor:
    """Butterfly sum over the last dimension of 32 lanes."""
    width = _WARP // 2
    while width:
        lanes = lanes[..., :width] + lanes[..., width:]
        width //= 2
    return lanes.squeeze(-1)


def add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, weight_bias: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual add and RMSNorm with the kernel's rounding points.

    Args:
        x: reduced rows [n, hidden], bf16 or fp16.
        residual: [n, hidden], same dtype; not modified.
        weight: [hidden].
        epsilon: added to the mean square.
        weight_bias: 0 for RMSNorm, 1 for Gemma's (1 + w).

    Returns:
        Normalised rows and the new residual, both in the dtype of ``x``.
    """
    h = x.float() + residual.float()
    # Tensors, not Python numbers: a double scalar may be applied in another precision.
    scalar = h.new_tensor
    mean = square_sum(h) / scalar(float(h.shape[-1]))
    rstd = scalar(1.0) / torch.sqrt(mean + scalar(epsilon))
    y = (h * rstd) * (scalar(weight_bias) + weight.float())
    return y.to(x.dtype), h.to(x.dtype)


def allreduce_rmsnorm(
    partials: Sequence[torch.Tensor],
    shards: Sequence[torch.Tensor],
    weight: torch.Tensor,
    epsilon: float,
    weight_bias: float = 0.0,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the kernel computes for a whole group at once.

    Args:
        partials: every rank's hidden states [n, hidden] before the reduction.
        shards: every rank's residual rows (:func:`sglang_ext.tokenweave.rows.owned_rows`).
        weight: [hidden].
        epsilon: see :func:`add_rmsnorm`.
        weight_bias: see :func:`add_rmsnorm`.

    Returns:
        The output that every rank ends up with [n, hidden], and each rank's new residual rows.
    """
    total = reduce_in_rank_order(partials)
    world = len(partials)
    outputs, residuals = [], []
    for rank in range(world):
        rows = owned_rows(total.shape[0], world, rank)
        output, residual = add_rmsnorm(total[rows], shards[rank], weight, epsilon, weight_bias)
        outputs.append(output)
        residuals.append(residual)
    return torch.cat(outputs), residuals
