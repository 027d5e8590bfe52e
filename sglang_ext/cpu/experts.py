"""Row-invariant experts of mixture-of-experts layers, for canonical passes on a CPU.

SGLang multiplies, for every expert, as many rows as chose it. That number depends on the other rows, and with
it the kernel and the bits of a matrix product. Here every product has the same number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_ext.llm42.canonical_scope import in_canonical_pass

#: Rows of each product. Most experts of a pass get fewer rows than this; the rest of a block is padding.
BLOCK = 16

#: ``moe_forward_native(layer, x, topk_output, moe_runner_config)`` of SGLang.
StockExperts = Callable[[torch.nn.Module, torch.Tensor, Any, Any], torch.Tensor]


def moe_forward(
    original: StockExperts,
    layer: torch.nn.Module,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
) -> torch.Tensor:
    """Around ``moe_forward_native``: :func:`invariant_experts` in canonical passes, SGLang's elsewhere."""
    if not in_canonical_pass():
        return original(layer, x, topk_output, moe_runner_config)
    return invariant_experts(original, layer, x, topk_output, moe_runner_config)


def invariant_experts(
    stock: StockExperts,
    layer: torch.nn.Module,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
) -> torch.Tensor:
    """What ``stock`` computes, by products of :data:`BLOCK` rows.

    ``stock`` itself is called, so weights, biases and activation are SGLang's, but with exactly ``BLOCK``
    rows for each expert that it runs and one expert for each row. A row's outputs of its experts are weighted
    and summed in the order in which the row chose them.

    Equivalent plain PyTorch, up to rounding::

        sum(weights[:, j] * expert[ids[:, j]](x) for j in range(top_k))

    Args:
        stock: SGLang's function.
        layer: the expert layer, with the weights of this tensor-parallel rank.
        x: ``[rows, hidden]``.
        topk_output: SGLang's ``topk_weights`` and ``topk_ids``, both ``[rows, top_k]``.
        moe_runner_config: SGLang's settings of the layer.

    Returns:
        ``[rows, hidden]`` in the dtype of ``x``; with tensor parallelism, this rank's part of the sum.
    """
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    weights, ids = topk_output.topk_weights, topk_output.topk_ids
    top_k = ids.shape[1]
    choices = ids.reshape(-1).to(torch.int64)
    outputs = x.new_empty(len(choices), x.shape[1])
    for chosen, experts, places in _rounds(choices):
        rows = x.new_zeros(len(experts) * BLOCK, x.shape[1])
        rows[places] = x[chosen // top_k]
        block_ids = experts.repeat_interleave(BLOCK)[:, None].to(ids.dtype)
        once = StandardTopKOutput(torch.ones_like(block_ids, dtype=weights.dtype), block_ids, None)
        outputs[chosen] = stock(layer, rows, once, moe_runner_config)[places]
    return _weighted_sum(outputs.view(len(x), top_k, -1), weights)


def _rounds(choices: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Cut the rows of each expert into blocks; a round has one block of every expert with rows left.

    Args:
        choices: int64 ``[n]``, the expert of each choice.

    Yields:
        The choices of the round, int64 ``[m]``; its experts, ascending; and at which row of the round's
        blocks, which follow the experts' order, each choice stands, int64 ``[m]``.
    """
    order = choices.argsort(stable=True)
    experts, counts = choices[order].unique_consecutive(return_counts=True)
    number = torch.arange(len(experts)).repeat_interleave(counts)
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[number]
    for start in range(0, int(counts.max()), BLOCK):
        here = (rank >= start) & (rank < start + BLOCK)
        running = counts > start
        block = (running.cumsum(0) - 1)[number[here]]
        yield order[here], experts[running], block * BLOCK + rank[here] - start


def _weighted_sum(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of ``outputs``, ``[rows, top_k, hidden]``, in order of choice and in the dtype of ``weights``."""
    total = outputs[:, 0].to(weights.dtype) * weights[:, :1]
    for choice in range(1, weights.shape[1]):
        total += outputs[:, choice].to(weights.dtype) * weights[:, choice : choice + 1]
    return total.to(outputs.dtype)
