"""Row-invariant attention of canonical passes on a GPU: FlashInfer's paged prefill kernel, unchanged.

Three settings make it row invariant: the paged wrapper alone, so that a segment reads its own keys and
values from the cache like everything before them (the ragged kernel with a merge would not); no split-KV, so
that one thread block sums over a row's whole prefix in one order (FlashInfer's Hopper kernel has none); and
tiles of keys that begin at the same positions whatever rows they are computed for. Its tiles of query rows
hold rows of one sequence: neighbouring blocks that follow each other in a request are one, so that a prompt
fills its tiles.

Everything that the kernel reads stands at fixed addresses, so that it can be captured in a CUDA graph: the
plan in FlashInfer's integer workspace, the KV slots in a list of our own. Both are written anew before each
pass. All lengths are known on the host, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from sglang_ext.llm42.transfer import to_device

#: FlashInfer's scratch memory; without split-KV hardly any of it is used.
WORKSPACE_BYTES = 64 * 1024 * 1024

#: FlashInfer's prefill implementation. On an H100 "fa3" is row invariant and "fa2" is not quite: 21 of 25,831
#: rows changed bits with the segment around them (W = 64, G = 8).
KERNEL = "fa3"

#: Entries that FlashInfer may look at behind the end of the slot list.
SLOT_PADDING = 256

#: Plans on their way to the device at once.
PLANS_UNDER_WAY = 2


def sequences(rids: Sequence[str], starts: Sequence[int], rows: int) -> list[int]:
    """Blocks of each sequence at its first block, and 0 at those that continue it.

    Args:
        rids: request of each block.
        starts: position of its first row.
        rows: of each block.
    """
    counts: list[int] = []
    first = 0
    for block, (rid, start) in enumerate(zip(rids, starts, strict=True)):
        if block and rid == rids[block - 1] and start == starts[block - 1] + rows:
            counts[first] += 1
            counts.append(0)
        else:
            first = block
            counts.append(1)
    return counts


class Scratch(NamedTuple):
    """Memory that backends whose passes never run at the same time may share.

    Attributes:
        slots: KV slots of all sequences, int32.
        workspace: FlashInfer's, for what it computes.
    """

    slots: torch.Tensor
    workspace: torch.Tensor


class CanonicalFlashInferBackend(AttentionBackend):
    """Attention of canonical passes of ``blocks`` blocks with ``rows`` rows.

    FlashInfer's kernel computes tiles of 128 query rows, one head at a time. A block of a single row would
    fill one row of a tile for each head; there the query heads that share a key head stand below each other
    as rows, without a mask, since all of them end at the same position. A row's arithmetic is the same in
    both: tiles of as many keys, in the same order.

    Args:
        model_runner: SGLang's model runner, with pools allocated.
        scratch: that of a backend of at least as many blocks of as many rows; None for its own.

    Attributes:
        scratch: its own or the given one.

    Raises:
        ValueError: the KV cache is not in the model's own precision.
    """

    def __init__(self, model_runner: Any, blocks: int, rows: int, scratch: Scratch | None = None) -> None:
        super().__init__()
        self.blocks = blocks
        self.rows = rows
        self.device = model_runner.device
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        if model_runner.kv_cache_dtype != model_runner.dtype:
            raise ValueError(
                f"--kv-cache-dtype {model_runner.kv_cache_dtype}: canonical attention reads a cache in the "
                f"model's own precision, {model_runner.dtype}"
            )
        config, world = model_runner.model_config, get_parallel().attn_tp_size
        self._heads = config.num_attention_heads // world
        self._kv_heads = config.get_num_kv_heads(world)
        self._head_dim = config.head_dim
        self.scratch = self._make_scratch() if scratch is None else scratch
        self._slots = self.scratch.slots
        self._row = torch.arange(rows, device=self.device)
        # Query heads that stand below each other as rows.
        self._folded = self._heads // self._kv_heads if rows == 1 else 1
        self._query_rows = rows * self._folded
        self._causal = rows > 1
        self._wrapper = self._make_wrapper(model_runner.dtype)
        self._layout = list(self._wrapper._plan_info)
        self._staging = _Staging(self._wrapper._int_workspace_buffer.shape[0])

    def _make_scratch(self) -> Scratch:
        width = self.req_to_token_pool.req_to_token.shape[1]
        return Scratch(
            torch.zeros(
                self.blocks * (width + self.rows) + SLOT_PADDING, dtype=torch.int32, device=self.device
            ),
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device),
        )

    def _make_wrapper(self, dtype: torch.dtype) -> Any:
        """FlashInfer's wrapper with our buffers, planned once, which compiles and loads the kernel."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        indptr = torch.arange(self.blocks + 1, dtype=torch.int32) * self.rows
        query_indptr = torch.arange(self.blocks + 1, dtype=torch.int32) * self._query_rows
        last_page_len = torch.ones(self.blocks, dtype=torch.int32)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            self.scratch.workspace,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=query_indptr.to(self.device),
            paged_kv_indptr_buf=indptr.to(self.device),
            paged_kv_indices_buf=self._slots,
            paged_kv_last_page_len_buf=last_page_len.to(self.device),
            backend=KERNEL,
        )
        wrapper.plan(
            query_indptr,
            indptr,
            self._slots[: self.blocks * self.rows],
            last_page_len,
            self._heads // self._folded,
            self._kv_heads,
            self._head_dim,
            page_size=1,
            causal=self._causal,
            q_data_type=dtype,
            kv_data_type=dtype,
            disable_split_kv=True,
        )
        return wrapper

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Write the plan and the KV slots of a pass, on the current stream."""
        starts = forward_batch.extend_prefix_lens_cpu
        joined = sequences(forward_batch.rids, starts, self.rows) if self._causal else [1] * self.blocks
        # Of each sequence: the keys in front of it and its own. A block that continues one has none.
        lengths = [
            start + count * self.rows if count else 0 for start, count in zip(starts, joined, strict=True)
        ]
        begins = [0, *accumulate(lengths)]
        self._plan([count * self._query_rows for count in joined], lengths, begins)
        self._write_slots(forward_batch, joined, begins)

    def _plan(self, queries: Sequence[int], lengths: Sequence[int], begins: Sequence[int]) -> None:
        """FlashInfer's schedule for so many query rows and keys.

        The wrapper's own ``plan`` would also copy what has not changed. SGLang calls the module in the same
        way (``fast_prefill_plan`` in ``srt/layers/attention/flashinfer_backend.py``), for the other kernel.

        Raises:
            RuntimeError: the plan does not fit the captured kernel's.
        """
        wrapper = self._wrapper
        with self._staging.take() as pinned:
            layout = wrapper._cached_module.plan(
                wrapper._float_workspace_buffer,
                wrapper._int_workspace_buffer,
                pinned,
                torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
                torch.tensor(begins, dtype=torch.int32),
                torch.tensor(lengths, dtype=torch.int32),
                self.blocks * self._query_rows,
                self.blocks,
                self._heads // self._folded,
                self._kv_heads,
                1,  # page_size
                True,  # enable_cuda_graph
                self._head_dim,
                self._head_dim,
                self._causal,
                -1,  # window_left
            )
        if list(layout) != self._layout:
            raise RuntimeError("FlashInfer laid out a plan otherwise than the one that was captured")

    def _write_slots(self, forward_batch: Any, joined: Sequence[int], begins: Sequence[int]) -> None:
        """KV slots of each sequence in turn: those of its prefix, then those that its own rows write.

        Padded rows write to slot 0, and no slot behind the used rows is read. The kernel multiplies masked
        values by zero, so a NaN that another request left in such a slot would reach every row.
        """
        from sglang.kernels.ops.kvcache.kv_indices import create_flashinfer_kv_indices_triton

        table = self.req_to_token_pool.req_to_token
        starts = forward_batch.extend_prefix_lens_cpu
        first = 0
        prefixes, own_begins = [], []
        for block, count in enumerate(joined):
            first = begins[block] if count else first
            prefixes.append(starts[block] if count else 0)
            own_begins.append(first + starts[block])
        begin, prefix, own_begin = to_device([begins[:-1], prefixes, own_begins], self.device, torch.int64)
        create_flashinfer_kv_indices_triton[(self.blocks,)](
            table, forward_batch.req_pool_indices, prefix, begin, None, self._slots, table.stride(0)
        )
        own = own_begin[:, None] + self._row
        self._slots.index_copy_(0, own.reshape(-1), forward_batch.out_cache_loc.to(torch.int32))

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write the pass's keys and values, then attend.

        Args:
            q: ``[blocks * rows, heads * head_dim]``.
            k, v: ``[blocks * rows, kv_heads, head_dim]``, or None where another layer wrote them.

        Returns:
            ``[blocks * rows, heads * head_dim]``.

        Raises:
            ValueError: a layer with a window, cross attention or capped logits.
        """
        if layer.is_cross_attention or layer.sliding_window_size > -1 or layer.logit_cap > 0:
            raise ValueError(
                f"layer {layer.layer_id}: canonical attention on a GPU is plain causal attention"
            )
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        output = self._wrapper.forward(
            self._fold(q.view(-1, layer.tp_q_head_num, layer.head_dim)),
            self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            causal=self._causal,
            sm_scale=layer.scaling,
        )
        return self._unfold(output).view(-1, layer.tp_q_head_num * layer.head_dim)

    def _fold(self, q: torch.Tensor) -> torch.Tensor:
        """``[n, heads, size]`` as ``[n * folded, kv_heads, size]``: a key head's heads below each other."""
        if self._folded == 1:
            return q
        below = q.view(-1, self._kv_heads, self._folded, self._head_dim).transpose(1, 2)
        return below.reshape(-1, self._kv_heads, self._head_dim)

    def _unfold(self, output: torch.Tensor) -> torch.Tensor:
        """The reverse of :meth:`_fold`."""
        if self._folded == 1:
            return output
        below = output.view(-1, self._folded, self._kv_heads, self._head_dim).transpose(1, 2)
        return below.reshape(-1, self._heads, self._head_dim)


class _Staging:
    """Pinned buffers that plans are copied from; one is written again only after its copy has happened.

    Args:
        size: bytes of each.
    """

    def __init__(self, size: int) -> None:
        self._buffers = [
            torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(PLANS_UNDER_WAY)
        ]
        self._copied = [torch.cuda.Event() for _ in self._buffers]
        self._next = 0
        self._pinned = self._buffers[0]

    def take(self) -> _Staging:
        """For a ``with`` statement, inside of which the copy is started on the current stream."""
        self._next = (self._next + 1) % len(self._buffers)
        self._copied[self._next].synchronize()
        self._pinned = self._buffers[self._next]
        return self

    def __enter__(self) -> torch.Tensor:
        return self._pinned

    def __exit__(self, *exception: object) -> None:
        self._copied[self._next].record()
