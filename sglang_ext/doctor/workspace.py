"""KV slots and request rows borrowed from SGLang's pools, and given back exactly as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sglang_ext.doctor.probes import Garbage

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

#: Slots that hold garbage, before rounding up to pages.
GARBAGE_SLOTS = 16

#: A large number that every KV dtype holds (fp8 e4m3 ends at 448).
_LARGE = 400.0


class Workspace:
    """Request rows and KV slots that no request uses.

    The slots of the probe's reference computation stay; those of other requests are used again in every
    trial. Pages are never cut: a request that shares a prefix up to the middle of a page gets a copy of the
    page's first part.

    Attributes:
        rows: indices into SGLang's ``req_to_token`` table.
    """

    def __init__(
        self, model_runner: ModelRunner, rows: list[int], slots: torch.Tensor, probe_length: int
    ) -> None:
        self.rows = rows
        self._page = model_runner.token_to_kv_pool_allocator.page_size
        self._table = model_runner.req_to_token_pool.req_to_token
        self._buffers = _buffers(model_runner.token_to_kv_pool)
        kept = _whole_pages(probe_length, self._page)
        garbage = _whole_pages(GARBAGE_SLOTS, self._page)
        self._garbage = slots[:garbage]
        pages = slots[garbage:].view(-1, self._page)
        others = pages[_order(len(pages), slots.device)].reshape(-1)
        self._probe, self._others = others[:kept], others[kept:]
        self._used = 0

    def begin_trial(self, garbage: Garbage) -> None:
        """Forget the requests of the last trial; what they left behind is overwritten with ``garbage``."""
        self._used = 0
        value = {Garbage.NONE: 0.0, Garbage.FINITE: _LARGE, Garbage.NAN: float("nan")}[garbage]
        unused = torch.cat([self._garbage, self._others])
        for buffer in self._buffers:
            buffer[unused] = value

    def place_probe(self, row: int) -> None:
        """Let request row ``row`` be the probe's reference computation."""
        self._write(row, self._probe, Garbage.NONE)

    def place(self, row: int, shared: int, end: int, garbage: Garbage) -> None:
        """Let ``row`` share the probe's first ``shared`` positions and own those up to ``end``."""
        whole = shared // self._page * self._page
        count = _whole_pages(end - whole, self._page)
        own = self._others[self._used : self._used + count]
        self._used += count
        copied = shared - whole
        for buffer in self._buffers:
            buffer[own[:copied]] = buffer[self._probe[whole:shared]]
        self._write(row, torch.cat([self._probe[:whole], own]), garbage)

    def _write(self, row: int, slots: torch.Tensor, garbage: Garbage) -> None:
        width = self._table.shape[1]
        beyond = max(0, width - len(slots))
        self._table[row] = 0
        self._table[row, : len(slots)] = slots[:width].to(torch.int32)
        if garbage is not Garbage.NONE and beyond:
            repeats = -(-beyond // len(self._garbage))
            self._table[row, len(slots) :] = self._garbage.to(torch.int32).repeat(repeats)[:beyond]


@contextmanager
def borrow(model_runner: ModelRunner, rows: int, window: int, probe_length: int) -> Iterator[Workspace]:
    """Borrow what ``rows`` requests need; nothing else may use the pools meanwhile.

    Args:
        rows: requests of a trial.
        window: positions that each computes at most, if there are several.
        probe_length: positions of the probe, which a request may also compute anew.

    Raises:
        ValueError: the pools have less.
    """
    req_pool, allocator = model_runner.req_to_token_pool, model_runner.token_to_kv_pool_allocator
    slots = slots_needed(rows, window, probe_length, allocator.page_size)
    if rows > len(req_pool.free_slots) or slots > allocator.available_size():
        raise ValueError(
            f"{rows} request rows and {slots} KV slots are needed; {len(req_pool.free_slots)} and "
            f"{allocator.available_size()} are free"
        )
    free_rows = list(req_pool.free_slots[:rows])
    saved_table = req_pool.req_to_token[free_rows].clone()
    # Freed slots would come back in another order: the lists themselves are put back.
    saved_lists = allocator.free_pages, allocator.release_pages
    taken = allocator.alloc(slots)
    assert taken is not None
    # Padded rows write to slot 0.
    touched = torch.cat([torch.zeros_like(taken[:1]), taken])
    saved_kv = [buffer[touched].clone() for buffer in _buffers(model_runner.token_to_kv_pool)]
    try:
        yield Workspace(model_runner, free_rows, taken, probe_length)
    finally:
        for buffer, saved in zip(_buffers(model_runner.token_to_kv_pool), saved_kv, strict=True):
            buffer[touched] = saved
        req_pool.req_to_token[free_rows] = saved_table
        allocator.free_pages, allocator.release_pages = saved_lists


def room(model_runner: ModelRunner, rows: int, window: int) -> int:
    """Longest probe for which :func:`borrow` finds enough slots; not positive if there is none."""
    page = model_runner.token_to_kv_pool_allocator.page_size
    free = model_runner.token_to_kv_pool_allocator.available_size()
    return (free - slots_needed(rows, window, 0, page)) // (2 * page) * page


def slots_needed(rows: int, window: int, probe_length: int, page: int) -> int:
    """KV slots: the probe twice, and for each of ``rows`` requests a window that begins within a page."""
    request = _whole_pages(window, page) + page
    return _whole_pages(GARBAGE_SLOTS, page) + 2 * _whole_pages(probe_length, page) + rows * request


def _whole_pages(positions: int, page: int) -> int:
    return -(-positions // page) * page


def _order(count: int, device: torch.device) -> torch.Tensor:
    """A permutation with a stride: neighbours in a sequence are none in memory."""
    stride = next(s for s in range(max(1, count * 5 // 8), 2 * count + 2) if _coprime(s, count))
    return torch.arange(count, device=device) * stride % max(1, count)


def _coprime(first: int, second: int) -> bool:
    while second:
        first, second = second, first % second
    return first == 1


def _buffers(pool: object) -> Sequence[torch.Tensor]:
    """Key and value buffers of every layer, ``[slots, ...]``."""
    layers = range(pool.start_layer, pool.start_layer + pool.layer_num)  # type: ignore[attr-defined]
    get = (pool.get_key_buffer, pool.get_value_buffer)  # type: ignore[attr-defined]
    return [buffer(layer) for layer in layers for buffer in get]
