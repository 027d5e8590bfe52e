"""When a forward has to wait for a canonical pass that still uses freed slots; streams are tried on a GPU."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from sglang_ext.llm42.pass_stream import DeviceResults, HostPasses, HostResults, SlotGuard, pass_stream


class _Event:
    def __init__(self) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over


class _Stream:
    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


def _under_way() -> Any:
    results: Any = DeviceResults.__new__(DeviceResults)
    results.ended = _Event()
    return results


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> _Stream:
    stream = _Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return stream


def _guard(free: int) -> tuple[SlotGuard, Any]:
    allocator = types.SimpleNamespace(free_pages=torch.zeros(free), page_size=1)
    return SlotGuard(allocator), allocator


def test_decode_waits_once_the_slots_that_were_free_before_are_given_away(stream: _Stream) -> None:
    guard, _ = _guard(free=10)
    results = _under_way()
    guard.freeing(results)
    guard.before_forward(6, prompts=False)
    guard.before_forward(4, prompts=False)
    assert stream.waited == []
    guard.before_forward(1, prompts=False)
    assert stream.waited == [results.ended]
    guard.before_forward(100, prompts=False)
    assert len(stream.waited) == 1, "later forwards come after the one that waited"


def test_freed_pages_are_given_away_first_so_decode_waits_at_once(stream: _Stream) -> None:
    allocator = PagedTokenToKVPoolAllocator(
        size=1024, page_size=16, dtype=torch.bfloat16, device="cpu", kvcache=None, need_sort=False
    )
    taken = allocator.alloc(64)
    guard = SlotGuard(allocator)
    guard.freeing(_under_way())
    allocator.free(taken)
    assert set(allocator.alloc(16).tolist()) <= set(taken.tolist()), "SGLang frees pages at the front"
    guard.before_forward(1, prompts=False)
    assert len(stream.waited) == 1


def test_prompts_wait_at_once(stream: _Stream) -> None:
    guard, _ = _guard(free=1000)
    guard.freeing(_under_way())
    guard.before_forward(1, prompts=True)
    assert len(stream.waited) == 1


def test_nobody_waits_for_a_pass_that_has_ended(stream: _Stream) -> None:
    guard, _ = _guard(free=0)
    results = _under_way()
    guard.freeing(results)
    results.ended.over = True
    guard.before_forward(5, prompts=True)
    guard.before_forward(5, prompts=False)
    assert stream.waited == []


def test_slots_freed_later_do_not_count_as_free_before(stream: _Stream) -> None:
    guard, allocator = _guard(free=3)
    results = _under_way()
    guard.freeing(results)
    guard.before_forward(2, prompts=False)
    allocator.free_pages = torch.zeros(50)
    guard.freeing(results)
    guard.before_forward(2, prompts=False)
    assert stream.waited == [results.ended]


def test_slots_freed_under_an_earlier_pass_still_count_once_one_follows_it(stream: _Stream) -> None:
    guard, allocator = _guard(free=3)
    first, second = _under_way(), _under_way()
    guard.freeing(first)
    allocator.free_pages = torch.zeros(50)
    guard.freeing(second)
    guard.before_forward(3, prompts=False)
    assert stream.waited == []
    guard.before_forward(1, prompts=False)
    assert stream.waited == [second.ended], "it ends after the first"


def test_another_pass_is_another_matter(stream: _Stream) -> None:
    guard, allocator = _guard(free=0)
    first, second = _under_way(), _under_way()
    guard.freeing(first)
    first.ended.over = True
    allocator.free_pages = torch.zeros(5)
    guard.freeing(second)
    guard.before_forward(5, prompts=False)
    assert stream.waited == []
    guard.before_forward(1, prompts=False)
    assert stream.waited == [second.ended]


def test_on_a_cpu_results_are_there_at_once(stream: _Stream) -> None:
    passes = pass_stream(types.SimpleNamespace(device="cpu"), beside=True)
    assert isinstance(passes, HostPasses) and not passes.beside
    with passes.launching():
        results = passes.results((torch.tensor([3, 1]), torch.tensor([0, 2])))
    assert isinstance(results, HostResults) and results.ready()
    assert results.read() == [[3, 1], [0, 2]]
    guard, _ = _guard(free=0)
    guard.freeing(results)
    guard.before_forward(9, prompts=True)
    assert stream.waited == []
