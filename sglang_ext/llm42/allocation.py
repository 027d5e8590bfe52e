"""Preparing a decode batch that holds deterministic requests.

SGLang's own preparation advances every request by one token. A deterministic request moves differently: it
may stand still, or go back after a rollback and decode into slots that it owns already. An unmarked request
in the same batch is advanced exactly as SGLang does it, and nobody reserves more than the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42.drafting import DecodeStep
from sglang_ext.llm42.transfer import to_device

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


def any_deterministic(reqs: Sequence[Req]) -> bool:
    """Whether a marked request is among ``reqs``."""
    return any(deterministic.has_state(req) for req in reqs)


def prepare_for_decode(batch: ScheduleBatch, step: DecodeStep) -> None:
    """Allocate the KV slot of every decoding row and set the batch's lengths and locations.

    The counterpart of ``ScheduleBatch.prepare_for_decode`` for a batch whose rows decode at
    ``step.positions``. Idle rows become padding: one token at position 0 that writes to SGLang's padding
    slot.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch.forward_mode = ForwardMode.DECODE
    batch.input_embeds = None
    if batch.sampling_info.penalizer_orchestrator.is_required:
        batch.cumulate_penalty_output_tokens()
    idle = set(step.idle)
    _grow(batch, [(req, step.positions[i] + 1) for i, req in enumerate(batch.reqs) if i not in idle])
    for req in batch.reqs:
        req.decode_batch_idx += 1
        if deterministic.of(req) is None:
            req.kv_committed_len += 1

    positions_cpu = torch.tensor(step.positions, dtype=torch.int64)
    positions = to_device(positions_cpu, batch.device)
    slots = batch.req_to_token_pool.req_to_token[batch.req_pool_indices, positions].to(torch.int64)
    if step.idle:
        slots.index_fill_(0, to_device(step.idle, batch.device), 0)
    batch.out_cache_loc = slots
    batch.seq_lens_cpu = positions_cpu + 1
    batch.seq_lens = positions + 1
    batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
    batch.seq_lens_sum = None


def slots_needed(reqs: Sequence[Req], page_size: int) -> int:
    """Upper bound of the KV slots that the next decode step of ``reqs`` allocates, in whole pages."""
    return sum(
        _pages(_next_length(req), page_size) - _pages(req.kv.kv_allocated_len, page_size) for req in reqs
    )


def _next_length(req: Req) -> int:
    """KV length that ``req`` needs allocated for its next decode step, results under way included."""
    state = deterministic.of(req)
    if state is None:
        wanted = req.kv_committed_len + 1
    elif state.lane is None:
        wanted = 0
    elif state.lane.decoding:
        wanted = state.lane.decode_position + 1
    else:
        wanted = state.lane.known_end + 1
    return max(wanted, req.kv.kv_allocated_len)


def _pages(length: int, page_size: int) -> int:
    """``length`` rounded up to whole pages, in tokens."""
    return -(-length // page_size) * page_size


def _grow(batch: ScheduleBatch, wanted: Sequence[tuple[Req, int]]) -> None:
    """Allocate slots so that each request has at least the wanted KV length."""
    growing = [(req, length) for req, length in wanted if length > req.kv.kv_allocated_len]
    if not growing:
        return
    allocator = batch.tree_cache.token_to_kv_pool_allocator
    if allocator.page_size == 1 and all(length == req.kv.kv_allocated_len + 1 for req, length in growing):
        _grow_by_one(batch, [req for req, _ in growing])
    else:
        _grow_by_any(batch, growing)


def _grow_by_one(batch: ScheduleBatch, reqs: Sequence[Req]) -> None:
    """Allocate one slot for each of ``reqs``: nearly every decode step, so with few copies and launches."""
    from sglang.srt.mem_cache.allocation import alloc_token_slots

    slots = alloc_token_slots(batch.tree_cache, len(reqs))
    table = batch.req_to_token_pool.req_to_token
    pool, position = to_device(
        [[req.req_pool_idx for req in reqs], [req.kv.kv_allocated_len for req in reqs]],
        batch.device,
        torch.int64,
    )
    table[pool, position] = slots.to(table.dtype)
    for req in reqs:
        req.kv.kv_allocated_len += 1


def _grow_by_any(batch: ScheduleBatch, growing: Sequence[tuple[Req, int]]) -> None:
    from sglang.srt.mem_cache.allocation import alloc_for_spec_decode

    reqs = [req for req, _ in growing]
    current = torch.tensor([req.kv.kv_allocated_len for req in reqs], dtype=torch.int32)
    target = torch.tensor([length for _, length in growing], dtype=torch.int32)
    alloc_for_spec_decode(
        batch.tree_cache,
        batch.req_to_token_pool,
        reqs=reqs,
        req_pool_indices=to_device([req.req_pool_idx for req in reqs], batch.device, torch.int64),
        cur_kv_lens=to_device(current, batch.device),
        cur_kv_lens_cpu=current,
        nxt_kv_lens=to_device(target, batch.device),
        nxt_kv_lens_cpu=target,
        num_needed_tokens=int((target - current).sum()),
        batch=batch,
    )
