"""Cut SGLang's ForwardBatch at any token index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class BatchCutError(ValueError):
    """The batch holds something that cannot be cut; the message says what."""


def cut_batch(batch: ForwardBatch, cut: int) -> tuple[ForwardBatch, ForwardBatch]:
    """Two batches with the first ``cut`` tokens of an extend batch and the rest.

    A sequence that straddles the cut is continued in the second batch, behind the first batch's tokens as
    its prefix; the first batch must therefore write a layer's KV before the second attends.

    Raises:
        BatchCutError: a field of the batch cannot be divided.
    """
    from sglang.srt.batch_overlap.two_batch_overlap import TboForwardBatchPreparer

    tokens = batch.input_ids.shape[0]
    lengths = list(batch.extend_seq_lens_cpu)
    sequence, head = _locate(lengths, cut)

    def part(first: int, last: int, first_sequence: int, last_sequence: int) -> Any:
        try:
            return TboForwardBatchPreparer.filter_batch(
                batch,
                start_token_index=first,
                end_token_index=last,
                start_seq_index=first_sequence,
                end_seq_index=last_sequence,
                out_num_token_non_padded=None,
            )
        except Exception as error:  # SGLang raises a bare Exception for a field that it does not know
            raise BatchCutError(str(error).split("(value=")[0]) from error

    first = part(0, cut, 0, sequence + bool(head))
    second = part(cut, tokens, sequence, batch.batch_size)
    if head:
        prefix = list(batch.extend_prefix_lens_cpu)[sequence]
        _set_sequence(first, -1, extend=head, prefix=prefix)
        _set_sequence(second, 0, extend=lengths[sequence] - head, prefix=prefix + head)
    for half in (first, second):
        lengths_on_device = half.extend_seq_lens
        starts = torch.cumsum(lengths_on_device, 0) - lengths_on_device
        half.extend_start_loc = starts.to(batch.extend_start_loc.dtype)
    return first, second


def _locate(lengths: list[int], cut: int) -> tuple[int, int]:
    """Sequence that starts at or straddles the token ``cut``, and how many of its tokens lie before it.

    Raises:
        BatchCutError: the lengths do not reach beyond ``cut`` (padded batches).
    """
    before = 0
    for sequence, length in enumerate(lengths):
        if before + length > cut:
            return sequence, cut - before
        before += length
    raise BatchCutError(f"the batch's sequences end at token {before}, before the cut at {cut}")


def _set_sequence(batch: Any, index: int, extend: int, prefix: int) -> None:
    """Make sequence ``index`` of ``batch`` extend by ``extend`` tokens behind ``prefix`` cached ones."""

    def replaced(values: Any, value: int) -> Any:
        if isinstance(values, torch.Tensor):
            values = values.clone()
            values[index] = value
            return values
        values = list(values)
        values[index] = value
        return values

    for name, value in (
        ("extend_seq_lens", extend),
        ("extend_prefix_lens", prefix),
        ("seq_lens", extend + prefix),
    ):
        for field in (name, f"{name}_cpu"):
            setattr(batch, field, replaced(getattr(batch, field), value))
    batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
