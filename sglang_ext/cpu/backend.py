"""SGLang attention backend whose extend passes are canonical: fixed shape, row-invariant attention."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_ext.cpu.attention import DEFAULT_TILE, canonical_attention


class CanonicalCpuAttnBackend(TorchNativeAttnBackend):
    """Attention of canonical passes on a CPU; decode stays SGLang's ``torch_native``.

    A pass is a ``ForwardBatch`` of exactly ``segments`` requests with ``rows`` tokens each: row g of
    ``req_pool_indices``, ``extend_prefix_lens`` (absolute position of the segment's first row) and ``rows``
    entries of ``out_cache_loc`` belong to segment g. Keys and values are written before anything is read, so
    segments of one request in ascending position see each other. The backend holds no state per pass.

    Args:
        product_rows: rows that each product is padded to, so that its rows have the bits that they have in
            segments of so many rows; at least, and by default, ``rows``.

    Raises:
        ValueError: the pool is one whose slots cannot be read one by one, or segments or rows are not
            positive.
    """

    def __init__(
        self,
        model_runner: Any,
        segments: int,
        rows: int,
        tile: int = DEFAULT_TILE,
        product_rows: int | None = None,
    ) -> None:
        super().__init__(model_runner)
        if segments < 1 or rows < 1:
            raise ValueError(f"a canonical pass needs segments and rows, got {segments} and {rows}")
        if self.use_sliding_window_kv_pool or getattr(self.token_to_kv_pool, "use_hnd", False):
            raise ValueError(
                "canonical attention on CPU reads a plain KV pool (no window, token-major layout), not "
                f"{type(self.token_to_kv_pool).__name__}"
            )
        self.segments = segments
        self.rows = rows
        self.tile = tile
        self.padding = 0 if product_rows is None else product_rows - rows

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Write the pass's keys and values, then attend.

        Args:
            q: ``[segments * rows, heads * key_size]``.
            k, v: ``[segments * rows, kv_heads, size]``, or None where another layer wrote them.

        Returns:
            ``[segments * rows, heads * value_size]``.

        Raises:
            ValueError: a pass of another shape, or a layer that is not plain causal decoder attention.
        """
        self._check(q, layer, forward_batch)
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        start = forward_batch.extend_prefix_lens.to(torch.int64)
        positions = int(start.max()) + self.rows + self.padding
        table = self.req_to_token_pool.req_to_token
        slots = table[forward_batch.req_pool_indices, :positions].to(torch.int64)
        # Padded rows of a segment at the end of the context have positions behind the table.
        slots = torch.nn.functional.pad(slots, (0, positions - slots.shape[1]))
        queries = q.reshape(self.segments, self.rows, layer.tp_q_head_num, layer.qk_head_dim)
        output = canonical_attention(
            torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, self.padding)),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            slots,
            start,
            layer.scaling,
            layer.logit_cap,
            self.tile,
        )
        output = output[:, : self.rows]
        return output.reshape(self.segments * self.rows, layer.tp_q_head_num * layer.v_head_dim)

    def _check(self, q: torch.Tensor, layer: Any, forward_batch: Any) -> None:
        if forward_batch.batch_size != self.segments or q.shape[0] != self.segments * self.rows:
            raise ValueError(
                f"a canonical pass has {self.segments} segments of {self.rows} rows, this one has "
                f"{forward_batch.batch_size} segments and {q.shape[0]} rows"
            )
        if (
            layer.is_cross_attention
            or layer.attn_type != AttentionType.DECODER
            or layer.sliding_window_size > -1
        ):
            raise ValueError(
                f"layer {layer.layer_id}: canonical attention is causal, without window, cross attention or "
                "bidirectional parts"
            )
        if layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
            raise ValueError(f"layer {layer.layer_id}: logit capping by {layer.logit_capping_method}")
