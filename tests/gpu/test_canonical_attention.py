"""FlashInfer's paged prefill kernel as canonical attention: rows must not depend on how segments are cut."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, HEAD_DIM, SLOTS, LENGTH = 32, 8, 128, 6000, 1600


class _Pool:
    """The little of SGLang's KV pool that the backend uses."""

    def __init__(self) -> None:
        shape = (SLOTS, KV_HEADS, HEAD_DIM)
        self.buffers = tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, ...]:
        return self.buffers


def _backend(monkeypatch: pytest.MonkeyPatch, segments: int, rows: int, kernel: str, table: Any) -> Any:
    from sglang_ext.llm42 import flashinfer_attention

    monkeypatch.setattr(flashinfer_attention, "get_parallel", lambda: types.SimpleNamespace(attn_tp_size=1))
    config = types.SimpleNamespace(
        num_attention_heads=HEADS, get_num_kv_heads=lambda world: KV_HEADS, head_dim=HEAD_DIM
    )
    runner = types.SimpleNamespace(
        device="cuda",
        dtype=torch.bfloat16,
        kv_cache_dtype=torch.bfloat16,
        token_to_kv_pool=_Pool(),
        req_to_token_pool=types.SimpleNamespace(req_to_token=table),
        model_config=config,
    )
    return flashinfer_attention.CanonicalFlashInferBackend(runner, segments, rows, kernel)


def _differences(backend: Any, queries: torch.Tensor, passes: int, seed: int) -> tuple[int, int]:
    """Rows compared, and rows whose bits changed, over ``passes`` random cuts of the same sequences."""
    segments, rows = backend.segments, backend.rows
    generator = torch.Generator().manual_seed(seed)
    layer = types.SimpleNamespace(
        is_cross_attention=False,
        sliding_window_size=-1,
        logit_cap=0.0,
        layer_id=0,
        tp_q_head_num=HEADS,
        head_dim=HEAD_DIM,
        scaling=HEAD_DIM**-0.5,
    )
    seen: dict[tuple[int, int], torch.Tensor] = {}
    compared = different = 0
    for number in range(passes):
        # Short and long neighbours by turns: the kernel's schedule follows the lengths of a pass.
        longest = LENGTH if number % 3 else 200
        starts = torch.randint(0, longest, (segments,), generator=generator).tolist()
        pools = torch.randint(0, len(queries), (segments,), generator=generator).tolist()
        table = backend.req_to_token_pool.req_to_token
        batch = types.SimpleNamespace(
            extend_prefix_lens_cpu=starts,
            req_pool_indices=torch.tensor(pools, device="cuda"),
            out_cache_loc=torch.cat(
                [table[pool, start : start + rows] for pool, start in zip(pools, starts, strict=True)]
            ),
        )
        q = torch.cat(
            [queries[pool, start : start + rows] for pool, start in zip(pools, starts, strict=True)]
        )
        backend.init_forward_metadata(batch)
        output = backend.forward_extend(q.flatten(1), None, None, layer, batch).view(segments, rows, -1)
        for g, (pool, start) in enumerate(zip(pools, starts, strict=True)):
            for row in range(rows):
                first = seen.setdefault((pool, start + row), output[g, row].clone())
                compared += 1
                different += not torch.equal(first, output[g, row])
    return compared, different


@pytest.mark.parametrize(("rows", "segments"), [(16, 8), (64, 8), (16, 32)])
def test_rows_keep_their_bits_however_segments_are_cut(
    monkeypatch: pytest.MonkeyPatch, rows: int, segments: int
) -> None:
    torch.manual_seed(0)
    table = torch.stack([torch.randperm(SLOTS, device="cuda") for _ in range(3)])
    queries = torch.randn(3, LENGTH + rows, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    backend = _backend(monkeypatch, segments, rows, "fa3", table)
    compared, different = _differences(backend, queries, passes=60, seed=1)
    assert compared > 1000
    assert different == 0


def test_nan_behind_the_used_rows_reaches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, segments, used, start = 16, 8, 5, 100
    table = torch.stack([torch.randperm(SLOTS - 1, device="cuda") + 1])
    backend = _backend(monkeypatch, segments, rows, "fa3", table)
    q = torch.randn(segments * rows, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    own = table[0, start : start + rows].clone()
    own[used:] = 0
    batch = types.SimpleNamespace(
        extend_prefix_lens_cpu=[start] * segments,
        req_pool_indices=torch.zeros(segments, dtype=torch.int64, device="cuda"),
        out_cache_loc=own.repeat(segments),
    )
    layer = types.SimpleNamespace(
        is_cross_attention=False,
        sliding_window_size=-1,
        logit_cap=0.0,
        layer_id=0,
        tp_q_head_num=HEADS,
        head_dim=HEAD_DIM,
        scaling=HEAD_DIM**-0.5,
    )

    def used_rows() -> torch.Tensor:
        backend.init_forward_metadata(batch)
        return backend.forward_extend(q, None, None, layer, batch).view(segments, rows, -1)[:, :used].clone()

    whole = used_rows()
    for buffer in backend.token_to_kv_pool.buffers:
        buffer[table[0, start + used :]] = float("nan")
    assert torch.equal(used_rows(), whole)
