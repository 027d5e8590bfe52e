"""KV slot allocation and copying in PyTorch, where SGLang uses Triton kernels.

Each class is the twin of one kernel and is called like it, ``Kernel[grid](...)``, so that SGLang's own
allocators, with their checks, stay in charge; arguments that only steer Triton are ignored. All work is on
whole tensors, no loop runs over requests or tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def alloc_extend(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Slots for positions ``prefix_lens[i] .. seq_lens[i]-1`` of every request, one request after another.

    The rest of a request's last page is filled first, from ``last_loc[i] + 1`` on; further positions go to
    ``free_pages`` in order, each page to one request. If the pages do not suffice nothing is written: the
    caller counts them itself and reports exhaustion.

    Args:
        prefix_lens, seq_lens: ``[requests]`` integers, tokens before and after.
        last_loc: ``[requests]`` slot of the last token present, -1 if none.
        free_pages: ``[pages]`` page numbers.
        out_indices: ``[sum(seq_lens - prefix_lens)]`` int64, written.
        page_size: slots per page.
    """
    extend_lens = seq_lens - prefix_lens
    first_new_page = (prefix_lens + page_size - 1) // page_size
    new_pages = (seq_lens + page_size - 1) // page_size - first_new_page
    if int(new_pages.sum()) > free_pages.numel():
        return
    total = out_indices.numel()
    request = torch.repeat_interleave(extend_lens, output_size=total)
    offset = torch.arange(total) - (extend_lens.cumsum(0) - extend_lens)[request]
    position = prefix_lens[request] + offset
    # Page of the position among all new pages of this call; negative while the old page is being filled.
    page_of_request = position // page_size - first_new_page[request]
    page = (new_pages.cumsum(0) - new_pages)[request] + page_of_request
    in_old_page = page_of_request < 0
    slot = last_loc[request] + 1 + offset
    if free_pages.numel():
        paged = free_pages[page.masked_fill(in_old_page, 0)] * page_size + position % page_size
        slot = torch.where(in_old_page, slot, paged)
    out_indices.copy_(slot)


def alloc_decode(
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    page_size: int,
) -> None:
    """One slot per request, for position ``seq_lens[i] - 1``: the next of its page, or a free page's first.

    Shapes and the meaning of exhaustion as in :func:`alloc_extend`; ``out_indices`` is ``[requests]``.
    """
    opens_page = (seq_lens - 1) % page_size == 0
    page = opens_page.cumsum(0) - 1
    if int(page[-1]) >= free_pages.numel():
        return
    slot = last_loc + 1
    if free_pages.numel():
        slot = torch.where(opens_page, free_pages[page.clamp_(min=0)] * page_size, slot)
    out_indices.copy_(slot)


def assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
) -> None:
    """Write ``out_cache_loc``, request after request, to ``req_to_token[row_i, start_i:end_i]``.

    Args:
        req_pool_indices: ``[requests]`` rows of the pool.
        req_to_token: ``[rows, positions]`` slots by request and position, written.
        start_offset, end_offset: ``[requests]`` first position and the one after the last.
        out_cache_loc: ``[sum(end - start)]`` slots.
    """
    lengths = end_offset - start_offset
    request = torch.repeat_interleave(lengths)
    offset = torch.arange(request.numel()) - (lengths.cumsum(0) - lengths)[request]
    slots = out_cache_loc[: request.numel()].to(req_to_token.dtype)
    req_to_token[req_pool_indices[request], start_offset[request] + offset] = slots


class AllocExtend:
    """Twin of ``alloc_extend_kernel``."""

    def __class_getitem__(cls, grid: Any) -> Callable[..., None]:
        return cls.launch

    @staticmethod
    def launch(
        prefix_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        last_loc: torch.Tensor,
        free_pages: torch.Tensor,
        out_indices: torch.Tensor,
        bs_upper: int,
        page_size: int,
    ) -> None:
        alloc_extend(prefix_lens, seq_lens, last_loc, free_pages, out_indices, page_size)


class AllocDecode:
    """Twin of ``alloc_decode_kernel``."""

    def __class_getitem__(cls, grid: Any) -> Callable[..., None]:
        return cls.launch

    @staticmethod
    def launch(
        seq_lens: torch.Tensor,
        last_loc: torch.Tensor,
        free_pages: torch.Tensor,
        out_indices: torch.Tensor,
        bs_upper: int,
        page_size: int,
    ) -> None:
        alloc_decode(seq_lens, last_loc, free_pages, out_indices, page_size)


class AssignReqToTokenPool:
    """Twin of ``assign_req_to_token_pool``."""

    def __class_getitem__(cls, grid: Any) -> Callable[..., None]:
        return cls.launch

    @staticmethod
    def launch(
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        start_offset: torch.Tensor,
        end_offset: torch.Tensor,
        out_cache_loc: torch.Tensor,
        pool_len: int,
        bs_upper: int,
    ) -> None:
        assign_req_to_token_pool(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc)


def init_kv_copy(pool: Any) -> None:
    """Set a KV pool up for copies by PyTorch indexing, which need neither tiling nor warm-up."""
    pool._kv_copy_config = None
    pool.use_native_move_kv_cache = True


def use_native_move(pool: Any, *args: Any, **kwargs: Any) -> None:
    """Make a KV pool that was built without copying (no speculative algorithm) copy by PyTorch indexing."""
    pool.use_native_move_kv_cache = True
