"""Canonical prefixes for unmarked requests.

An unmarked request may begin with what marked ones have left in the radix cache. It cannot be given the same
slots: SGLang would put them into the tree a second time, where unmarked requests look, and free them twice.
So their bytes are copied, into slots that then stand in the cache like any others of unmarked requests. That
takes as many slots as computing these tokens would, and much less time. Marked requests never see the copy.

Copies are made in two steps. When the request is about to be admitted, the slots are taken and entered in the
tree. The bytes follow in front of the next forward, on its stream: behind whatever may still write to these
slots, and before anything that reads them or overwrites what they are copied from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.llm42.request import canonical_key

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey

#: Fewer tokens than this are computed as fast as they are looked up.
FEWEST_TOKENS = 16


class PrefixSharing:
    """Copies canonical prefixes for the unmarked requests of one scheduler.

    Args:
        kv_pool: SGLang's pool of keys and values.
    """

    def __init__(self, kv_pool: Any) -> None:
        self._buffers = _buffers(kv_pool)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def pending(self) -> bool:
        """Whether bytes wait to be copied."""
        return bool(self._pending)

    def offer(self, adder: Any, req: Req, generation: int) -> int:
        """Let the unmarked ``req``, just matched against the cache, find a longer canonical prefix there.

        Args:
            adder: SGLang's ``PrefillAdder``, about to add ``req``.
            req: an unmarked request.
            generation: how often the weights were updated.

        Returns:
            Tokens that were copied; with them ``req`` was matched again.
        """
        from sglang.srt.environ import envs
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixCache

        tree = adder.tree_cache
        if not self._buffers or type(tree) is not RadixCache or tree.disable:
            return 0
        if req.positional_embed_overrides is not None or envs.SGLANG_RADIX_FORCE_MISS.get():
            return 0
        found = len(req.prefix_indices)
        if len(req.full_untruncated_fill_ids) - found >= adder.rem_total_tokens:
            return 0  # it will not be admitted now; nothing should be evicted for it
        canonical = tree.match_prefix(
            MatchPrefixParams(key=_key(req, canonical_key(req.extra_key, generation)))
        )
        source = canonical.device_indices[found:]
        if len(source) < FEWEST_TOKENS:
            return 0
        slots = _allocate(tree, len(source), keep=(canonical.last_device_node, req.last_node))
        if slots is None:
            return 0
        self._enter(tree, req, slots, end=found + len(source))
        self._pending.append((source, slots))
        req.init_next_round_input(tree)
        return len(source)

    @staticmethod
    def _enter(tree: Any, req: Req, slots: torch.Tensor, end: int) -> None:
        """Put ``slots`` into the tree behind the prefix that ``req`` was matched with."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        value = torch.cat([req.prefix_indices, slots])
        priority = getattr(req, "priority", 0) or 0
        result = tree.insert(InsertParams(key=_key(req, req.extra_key)[:end], value=value, priority=priority))
        assert result.prefix_len == len(req.prefix_indices), "the match was the longest"

    def copy(self) -> None:
        """Copy what is pending, in order, on the current stream: in front of a forward."""
        for source, slots in self._pending:
            for buffer in self._buffers:
                buffer[slots] = buffer[source]
            for index in (source, slots):
                if index.is_cuda:
                    # Made on the scheduler's stream, and dropped before the copy has run.
                    index.record_stream(torch.cuda.current_stream())
        self._pending.clear()


def _key(req: Req, extra_key: str | None) -> RadixKey:
    """The key that SGLang matches ``req`` with, in the namespace ``extra_key``."""
    from sglang.srt.mem_cache.radix_cache import RadixKey

    token_ids = req.full_untruncated_fill_ids
    return RadixKey(token_ids, extra_key, limit=req._compute_max_prefix_len(len(token_ids)))


def _allocate(tree: Any, slots: int, keep: tuple[Any, ...]) -> torch.Tensor | None:
    """``slots`` slots in whole pages, for which cached prefixes may be evicted, except those of ``keep``."""
    from sglang.srt.mem_cache.common import evict_from_tree_cache

    for node in keep:
        tree.inc_lock_ref(node)
    try:
        evict_from_tree_cache(tree, slots)
        return tree.token_to_kv_pool_allocator.alloc(slots)
    finally:
        for node in keep:
            tree.dec_lock_ref(node)


def _buffers(kv_pool: Any) -> list[torch.Tensor]:
    """Tensors whose first index is the slot; empty for pools of another layout, whose KV is not shared."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    if type(kv_pool) is not MHATokenToKVPool or kv_pool.kv_cache_layout != "nhd":
        return []
    return [*kv_pool.k_buffer, *kv_pool.v_buffer]
