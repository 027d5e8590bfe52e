"""Row-invariant attention of canonical passes on a GPU: FlashInfer's paged prefill kernel, unchanged.

Three settings make it row invariant: the paged wrapper alone, so that a segment reads its own keys and
values from the cache like everything before them (the ragged kernel with a merge would not); no split-KV, so
that one thread block sums over a row's whole prefix in one order; and a fixed number of rows per segment,
which fixes the tile shape that FlashInfer derives from the average segment length.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

#: FlashInfer's scratch memory; without split-KV hardly any of it is used.
WORKSPACE_BYTES = 64 * 1024 * 1024


class CanonicalFlashInferBackend(AttentionBackend):
    """Attention of canonical passes of ``segments`` segments with ``rows`` rows.

    Args:
        model_runner: SGLang's model runner, with pools allocated.
        kernel: FlashInfer's prefill implementation. On an H100 "fa3" is row invariant and "fa2" is not quite:
            21 of 25,831 rows changed bits with the segment around them (W = 64, G = 8).

    Raises:
        ValueError: the KV cache is not in the model's own precision.
    """

    def __init__(self, model_runner: Any, segments: int, rows: int, kernel: str = "fa3") -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        super().__init__()
        self.segments = segments
        self.rows = rows
        self.device = model_runner.device
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        if model_runner.kv_cache_dtype != model_runner.dtype:
            raise ValueError(
                f"--kv-cache-dtype {model_runner.kv_cache_dtype}: canonical attention reads a cache in the "
                f"model's own precision, {model_runner.dtype}"
            )
        self._dtype = model_runner.dtype
        config, world = model_runner.model_config, get_parallel().attn_tp_size
        self._heads = config.num_attention_heads // world
        self._kv_heads = config.get_num_kv_heads(world)
        self._head_dim = config.head_dim
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=kernel)
        self._qo_indptr = torch.arange(segments + 1, dtype=torch.int32) * rows
        self._last_page_len = torch.ones(segments, dtype=torch.int32)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan the pass: all lengths are known on the host, so nothing is synchronised."""
        starts = forward_batch.extend_prefix_lens_cpu
        indptr = torch.tensor([0, *(start + self.rows for start in starts)]).cumsum(0).to(torch.int32)
        slots = torch.cat(self._slots(forward_batch, starts))
        self._wrapper.plan(
            self._qo_indptr,
            indptr,
            slots.to(torch.int32),
            self._last_page_len,
            self._heads,
            self._kv_heads,
            self._head_dim,
            page_size=1,
            causal=True,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            disable_split_kv=True,
        )

    def _slots(self, forward_batch: Any, starts: list[int]) -> list[torch.Tensor]:
        """KV slots of each segment in turn: those of its prefix, then those that its own rows write.

        Padded rows write to slot 0, and no slot behind the used rows is read. The kernel multiplies masked
        values by zero, so a NaN that another request left in such a slot would reach every row.
        """
        table = self.req_to_token_pool.req_to_token
        own = forward_batch.out_cache_loc.view(self.segments, self.rows).to(table.dtype)
        parts: list[torch.Tensor] = []
        for segment, start in enumerate(starts):
            parts += [table[forward_batch.req_pool_indices[segment], :start], own[segment]]
        return parts

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
            q: ``[segments * rows, heads * head_dim]``.
            k, v: ``[segments * rows, kv_heads, head_dim]``, or None where another layer wrote them.

        Returns:
            ``[segments * rows, heads * head_dim]``.

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
            q.view(-1, layer.tp_q_head_num, layer.head_dim),
            self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            causal=True,
            sm_scale=layer.scaling,
        )
        return output.view(-1, layer.tp_q_head_num * layer.head_dim)
