"""Which KV slots canonical attention on a GPU reads; the kernel itself is tested in ``tests/gpu``."""

from __future__ import annotations

import types

import torch

from sglang_ext.llm42.flashinfer_attention import CanonicalFlashInferBackend


def test_no_slot_behind_the_used_rows_is_read() -> None:
    backend = CanonicalFlashInferBackend.__new__(CanonicalFlashInferBackend)
    backend.segments, backend.rows = 3, 4
    table = torch.arange(2 * 10, dtype=torch.int32).view(2, 10) + 100
    backend.req_to_token_pool = types.SimpleNamespace(req_to_token=table)
    batch = types.SimpleNamespace(
        req_pool_indices=torch.tensor([1, 0, 0]),
        # Two rows in use; a segment that ends with the table, full; a segment of padding.
        out_cache_loc=torch.tensor([113, 114, 0, 0, 106, 107, 108, 109, 0, 0, 0, 0]),
    )
    slots = torch.cat(backend._slots(batch, [3, 6, 0])).tolist()
    first, second = [110, 111, 112, 113, 114, 0, 0], [*range(100, 110)]
    assert slots == first + second + [0] * 4
