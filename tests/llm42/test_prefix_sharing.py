"""Copies of canonical prefixes for unmarked requests, on SGLang's own radix cache and KV pool."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext.llm42.prefix_sharing import FEWEST_TOKENS, PrefixSharing
from sglang_ext.llm42.request import canonical_key

SIZE, LAYERS = 128, 2
PROMPT = list(range(10, 74))


class Cache:
    """A radix cache with its pool, whose slots hold their own number.

    Args:
        page_size: slots per page.
    """

    def __init__(self, page_size: int) -> None:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.mem_cache.radix_cache import RadixCache

        sizes: dict[str, Any] = {"head_num": 1, "head_dim": 2, "layer_num": LAYERS}
        self.pool = MHATokenToKVPool(
            SIZE, page_size, torch.float32, device="cpu", enable_memory_saver=False, **sizes
        )
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(SIZE, torch.float32, "cpu", self.pool, False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(
                SIZE, page_size, torch.float32, "cpu", self.pool, False
            )
        self.tree = RadixCache(CacheInitParams(False, None, self.allocator, page_size))
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.copy_(torch.arange(len(buffer))[:, None, None].expand_as(buffer))
        self.page_size = page_size
        self.sharing = PrefixSharing(self.pool)

    def fill(self, tokens: Sequence[int], key: str | None) -> torch.Tensor:
        """Enter ``tokens`` with slots of their own; returns these."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        slots = self.allocator.alloc(len(tokens))
        self.tree.insert(InsertParams(key=RadixKey(array("q", tokens), key), value=slots))
        return slots

    def request(self, tokens: Sequence[int], extra_key: str | None = None) -> Any:
        """An unmarked request, matched against the cache as SGLang does it."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        req = Req("rid", "", array("q", tokens), SamplingParams(), extra_key=extra_key, vocab_size=100)
        req.init_next_round_input(self.tree)
        return req

    def offer(self, req: Any, room: int = 1 << 20) -> int:
        """Offer canonical KV of generation 0 to ``req``."""
        adder = SimpleNamespace(tree_cache=self.tree, rem_total_tokens=room)
        return self.sharing.offer(adder, req, generation=0)

    def bytes_at(self, slots: torch.Tensor) -> list[list[float]]:
        """What each layer's keys and values hold there."""
        return [b[slots, 0, 0].tolist() for b in (*self.pool.k_buffer, *self.pool.v_buffer)]

    def check(self) -> None:
        """No slot is lost, or both free and cached, or cached twice."""
        cached = self.tree.all_values_flatten().tolist() if self.tree.root_node.children else []
        free = self.allocator.available_size()
        assert len(set(cached)) == len(cached)
        assert free + len(cached) == SIZE
        assert self.tree.evictable_size() == len(cached), "nothing is left locked"


@pytest.fixture(params=[1, 8], ids="page-{}".format)
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(request.param)


def test_the_longest_canonical_prefix_is_copied(cache: Cache) -> None:
    canonical = cache.fill(PROMPT[:32], canonical_key(None, 0))
    req = cache.request(PROMPT)
    assert cache.offer(req) == 32
    assert len(req.prefix_indices) == 32
    assert not set(req.prefix_indices.tolist()) & set(canonical.tolist())
    assert cache.sharing.pending
    cache.sharing.copy()
    assert not cache.sharing.pending
    assert cache.bytes_at(req.prefix_indices) == [canonical.tolist()] * 2 * LAYERS
    cache.check()
    again = cache.request(PROMPT)
    assert cache.offer(again) == 0 and again.prefix_indices.tolist() == req.prefix_indices.tolist()


def test_what_is_cached_already_stays(cache: Cache) -> None:
    own = cache.fill(PROMPT[:16], None)
    canonical = cache.fill(PROMPT[:40], canonical_key(None, 0))
    req = cache.request(PROMPT)
    assert cache.offer(req) == 24
    assert req.prefix_indices[:16].tolist() == own.tolist()
    cache.sharing.copy()
    assert cache.bytes_at(req.prefix_indices)[0] == own.tolist() + canonical[16:].tolist()
    cache.check()


def _salted(cache: Cache) -> Any:
    return cache.request(PROMPT, extra_key="salt")


def _short(cache: Cache) -> Any:
    """The last token is always computed, so one less than the fewest can be had."""
    return cache.request(PROMPT[:FEWEST_TOKENS])


def _with_prompt_logprobs(cache: Cache) -> Any:
    req = cache.request(PROMPT)
    req.return_logprob, req.logprob_start_len = True, 0
    req.init_next_round_input(cache.tree)
    return req


@pytest.mark.parametrize("make", [_salted, _short, _with_prompt_logprobs])
def test_what_is_of_no_use_is_not_copied(cache: Cache, make: Callable[[Cache], Any]) -> None:
    cache.fill(PROMPT[:40], canonical_key(None, 0))
    req = make(cache)
    assert cache.offer(req) == 0 and len(req.prefix_indices) == 0 and not cache.sharing.pending


def test_old_weights_are_out_of_reach(cache: Cache) -> None:
    cache.fill(PROMPT[:40], canonical_key(None, 1))
    assert cache.offer(cache.request(PROMPT)) == 0


def test_a_salt_finds_its_own(cache: Cache) -> None:
    cache.fill(PROMPT[:40], canonical_key("salt", 0))
    assert cache.offer(_salted(cache)) == 40


def test_other_prefixes_make_room_but_not_these(cache: Cache) -> None:
    own = cache.fill(PROMPT[:16], None)
    canonical = cache.fill(PROMPT[:48], canonical_key(None, 0))
    cache.fill(range(20, 84), "other")
    req = cache.request(PROMPT)
    assert cache.allocator.available_size() == 0
    assert cache.offer(req) == 32
    cache.sharing.copy()
    assert cache.bytes_at(req.prefix_indices)[0] == own.tolist() + canonical[16:].tolist()
    cache.check()


def test_without_room_nothing_happens(cache: Cache) -> None:
    cache.fill(PROMPT, canonical_key(None, 0))
    held = cache.allocator.alloc(SIZE - 64 - 16)
    req = cache.request(PROMPT)
    assert cache.offer(req) == 0 and cache.offer(req, room=30) == 0
    assert len(req.prefix_indices) == 0 and not cache.sharing.pending
    cache.allocator.free(held)
    cache.check()
    assert cache.offer(req, room=30) == 0
    assert cache.offer(req) > 0


def test_copies_are_made_in_order(cache: Cache) -> None:
    """The slots of one copy may be the source of the next, if its owner left in between."""
    pending = cache.sharing._pending
    a, b, c = (torch.tensor([i]) for i in (10, 20, 30))
    pending += [(a, b), (b, c)]
    cache.sharing.copy()
    assert cache.bytes_at(c) == [[10.0]] * 2 * LAYERS


def test_pools_of_another_layout_are_left_alone() -> None:
    cache = Cache(1)
    cache.sharing = PrefixSharing(object())
    cache.fill(PROMPT[:40], canonical_key(None, 0))
    assert cache.offer(cache.request(PROMPT)) == 0
