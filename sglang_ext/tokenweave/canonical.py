"""Canonical passes of LLM-42 as two equal halves.

A canonical pass has one shape for ever, and every operator must give a row the same bits wherever it
stands. Hence the cut depends on the shape alone, never on a threshold or a measurement: half of the blocks.
Both halves have the same shape, so the same kernels compute them, and the fused step sums over ranks in one
order for all rows. The blocks of a request stand in ascending position, so the first half writes a layer's
keys and values before the second half attends.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sglang_ext.tokenweave.batch import BatchCutError
from sglang_ext.tokenweave.split import equal_cut

#: Fields of a ``ForwardBatch`` with an entry for each row of a pass, and for each of its blocks.
ROW_FIELDS = ("input_ids", "positions", "out_cache_loc")
BLOCK_FIELDS = (
    "req_pool_indices",
    "rids",
    "seq_lens",
    "seq_lens_cpu",
    "orig_seq_lens",
    "extend_seq_lens",
    "extend_seq_lens_cpu",
    "extend_prefix_lens",
    "extend_prefix_lens_cpu",
)


class HalvedAttention:
    """The attention of a pass in two halves: a row-invariant backend for each.

    In SGLang's forward context it stands for the whole pass, and by it the decoder stack's wrapper knows that
    the pass is to be cut; each half then finds its own backend there.

    Args:
        make: makes the backend of a pass with as many blocks as it is given.
        blocks: blocks of the whole pass.
        rows: rows of a block.

    Attributes:
        cut: rows of the first half.
        backends: one per half.

    Raises:
        ValueError: there are no two halves of whole blocks.
    """

    def __init__(self, make: Callable[[int], Any], blocks: int, rows: int) -> None:
        self.cut = equal_cut(blocks * rows, rows)
        self.backends = (make(blocks // 2), make(blocks // 2))
        self._blocks = blocks

    @property
    def token_to_kv_pool(self) -> Any:
        """The KV pool, for code outside of the decoder stack."""
        return self.backends[0].token_to_kv_pool

    @property
    def req_to_token_pool(self) -> Any:
        """The table of KV slots, likewise."""
        return self.backends[0].req_to_token_pool

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan both halves of ``forward_batch``."""
        for backend, half in zip(self.backends, self.cut_batch(forward_batch), strict=True):
            backend.init_forward_metadata(half)

    def cut_batch(self, forward_batch: Any) -> tuple[Any, Any]:
        """The batches of both halves.

        Their tensors are views, so that halves captured in a CUDA graph read what is later copied into the
        whole.

        Raises:
            BatchCutError: the batch is no such pass, or has a tensor of which it is not known how to cut it.
        """
        rows = len(forward_batch.input_ids)
        if forward_batch.batch_size != self._blocks or rows != 2 * self.cut:
            raise BatchCutError(
                f"a pass of {self._blocks} blocks and {2 * self.cut} rows is cut, not one of "
                f"{forward_batch.batch_size} and {rows}"
            )
        middle = self._blocks // 2
        return (
            _piece(forward_batch, slice(0, self.cut), slice(0, middle)),
            _piece(forward_batch, slice(self.cut, rows), slice(middle, self._blocks)),
        )


def _piece(batch: Any, rows: slice, blocks: slice) -> Any:
    piece = copy.copy(batch)
    count = rows.stop - rows.start
    for names, part in ((ROW_FIELDS, rows), (BLOCK_FIELDS, blocks)):
        for name in names:
            setattr(piece, name, getattr(batch, name)[part])
    piece.batch_size = blocks.stop - blocks.start
    piece.extend_num_tokens = piece.num_token_non_padded_cpu = count
    piece.seq_lens_sum = int(piece.seq_lens_cpu.sum())
    _check_nothing_is_left(batch)
    return piece


def _check_nothing_is_left(batch: Any) -> None:
    known = {*ROW_FIELDS, *BLOCK_FIELDS}
    left = [field.name for field in dataclasses.fields(batch) if field.name not in known]
    if unknown := [name for name in left if isinstance(getattr(batch, name), torch.Tensor)]:
        raise BatchCutError(f"it is not known how to cut {', '.join(unknown)} of a canonical pass")
