"""FlashInfer's paged prefill kernel as canonical attention: rows must not depend on how segments are cut."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, HEAD_DIM, SLOTS, LENGTH = 32, 8, 128, 6000, 1600

LAYER = types.SimpleNamespace(
    is_cross_attention=False,
    sliding_window_size=-1,
    logit_cap=0.0,
    layer_id=0,
    tp_q_head_num=HEADS,
    head_dim=HEAD_DIM,
    scaling=HEAD_DIM**-0.5,
)


class _Pool:
    """The little of SGLang's KV pool that the backend uses."""

    def __init__(self) -> None:
        shape = (SLOTS, KV_HEADS, HEAD_DIM)
        self.buffers = tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, ...]:
        return self.buffers


def _backend(monkeypatch: pytest.MonkeyPatch, segments: int, rows: int, table: torch.Tensor) -> Any:
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
    return flashinfer_attention.CanonicalFlashInferBackend(runner, segments, rows)


def _batch(table: torch.Tensor, pools: Sequence[int], starts: Sequence[int], own: torch.Tensor) -> Any:
    """What the backend reads of SGLang's batch; ``own`` are the slots that the rows write."""
    return types.SimpleNamespace(
        extend_prefix_lens_cpu=list(starts),
        extend_prefix_lens=torch.tensor(starts, dtype=torch.int32, device=table.device),
        req_pool_indices=torch.tensor(pools, device=table.device),
        out_cache_loc=own.to(torch.int64),
        rids=[str(pool) for pool in pools],
    )


def _places(
    generator: torch.Generator, requests: int, blocks: int, rows: int, longest: int, run: int
) -> list[tuple[int, int]]:
    """Request and start of so many blocks, up to ``run`` of which follow each other in one request."""
    places: list[tuple[int, int]] = []
    while len(places) < blocks:
        pool, start, count = (
            int(torch.randint(0, most, (1,), generator=generator)) for most in (requests, longest, run)
        )
        start = min(start, LENGTH - count * rows)
        places += [(pool, start + number * rows) for number in range(count + 1)]
    return places[:blocks]


def _differences(
    backend: Any, queries: torch.Tensor, passes: int, seed: int, run: int = 1
) -> tuple[int, int]:
    """Rows compared, and rows whose bits changed, over ``passes`` random cuts of the same sequences."""
    segments, rows = backend.blocks, backend.rows
    generator = torch.Generator().manual_seed(seed)
    seen: dict[tuple[int, int], torch.Tensor] = {}
    compared = different = 0
    table = backend.req_to_token_pool.req_to_token
    for number in range(passes):
        # Short and long neighbours by turns: the kernel's schedule follows the lengths of a pass.
        longest = LENGTH if number % 3 else 200
        places = _places(generator, len(queries), segments, rows, longest, run if number % 2 else 1)
        pools, starts = (list(each) for each in zip(*places, strict=True))
        own = torch.cat([table[pool, start : start + rows] for pool, start in places])
        q = torch.cat([queries[pool, start : start + rows] for pool, start in places])
        batch = _batch(table, pools, starts, own)
        backend.init_forward_metadata(batch)
        output = backend.forward_extend(q.flatten(1), None, None, LAYER, batch).view(segments, rows, -1)
        for g, (pool, start) in enumerate(places):
            for row in range(rows):
                first = seen.setdefault((pool, start + row), output[g, row].clone())
                compared += 1
                different += not torch.equal(first, output[g, row])
    return compared, different


@pytest.mark.parametrize(("rows", "segments"), [(16, 8), (64, 8), (16, 32), (64, 16)])
def test_rows_keep_their_bits_however_segments_are_cut(
    monkeypatch: pytest.MonkeyPatch, rows: int, segments: int
) -> None:
    torch.manual_seed(0)
    table = torch.stack([torch.randperm(SLOTS, device="cuda", dtype=torch.int32) for _ in range(3)])
    queries = torch.randn(3, LENGTH + rows, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    backend = _backend(monkeypatch, segments, rows, table)
    compared, different = _differences(backend, queries, passes=60, seed=1)
    assert compared > 1000
    assert different == 0


@pytest.mark.parametrize(("rows", "blocks", "run"), [(8, 16, 4), (8, 128, 100), (16, 64, 30)])
def test_blocks_that_are_computed_together_keep_their_bits(
    monkeypatch: pytest.MonkeyPatch, rows: int, blocks: int, run: int
) -> None:
    """By turns alone and as part of a longer run, which fills tiles of query rows."""
    torch.manual_seed(1)
    table = torch.stack([torch.randperm(SLOTS, device="cuda", dtype=torch.int32) for _ in range(3)])
    queries = torch.randn(3, LENGTH + rows, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    backend = _backend(monkeypatch, blocks, rows, table)
    compared, different = _differences(backend, queries, passes=40, seed=2, run=run)
    assert compared > 1000
    assert different == 0


@pytest.mark.parametrize("row", [0, 11, 31])
def test_one_row_in_a_segment_has_the_bits_of_many(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """What canonical decode steps rest on: heads of a key head below each other, without a mask."""
    torch.manual_seed(row)
    rows, segments = 32, 24
    starts = torch.randint(0, LENGTH - rows, (segments,)).tolist()
    table = torch.stack([torch.randperm(SLOTS, device="cuda", dtype=torch.int32) for _ in range(segments)])
    q = torch.randn(segments, rows, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    many = _backend(monkeypatch, segments, rows, table)
    own = torch.cat([table[g, start : start + rows] for g, start in enumerate(starts)])
    batch = _batch(table, range(segments), starts, own)
    many.init_forward_metadata(batch)
    wanted = many.forward_extend(q.flatten(0, 1), None, None, LAYER, batch).view(segments, rows, -1)[:, row]
    # More segments than rows to compute, as a decode step has.
    padding = 8
    one = _backend(monkeypatch, segments + padding, 1, torch.cat([table, table[:1].expand(padding, -1)]))
    one.token_to_kv_pool = many.token_to_kv_pool
    own = torch.cat([table[g, start + row : start + row + 1] for g, start in enumerate(starts)])
    own = torch.nn.functional.pad(own, (0, padding))
    batch = _batch(table, [*range(segments), *[0] * padding], [s + row for s in starts] + [0] * padding, own)
    one.init_forward_metadata(batch)
    queries = torch.nn.functional.pad(q[:, row], (0, 0, 0, padding))
    output = one.forward_extend(queries, None, None, LAYER, batch)[:segments]
    assert torch.equal(output, wanted)


def test_attention_is_that_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, segments, starts = 16, 4, [0, 37, 700, 1500]
    table = torch.stack([torch.randperm(SLOTS, device="cuda", dtype=torch.int32) for _ in range(segments)])
    backend = _backend(monkeypatch, segments, rows, table)
    q = torch.randn(segments * rows, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    own = torch.cat([table[g, start : start + rows] for g, start in enumerate(starts)])
    batch = _batch(table, range(segments), starts, own)
    backend.init_forward_metadata(batch)
    output = backend.forward_extend(q, None, None, LAYER, batch).view(segments, rows, HEADS, HEAD_DIM)
    for g, start in enumerate(starts):
        keys, values = (
            buffer[table[g, : start + rows].long()].float().repeat_interleave(HEADS // KV_HEADS, dim=1)
            for buffer in backend.token_to_kv_pool.buffers
        )
        queries = q.view(segments, rows, HEADS, HEAD_DIM)[g].float()
        scores = torch.einsum("rhd,khd->hrk", queries, keys) * LAYER.scaling
        behind = (
            torch.arange(start + rows, device="cuda")
            > torch.arange(start, start + rows, device="cuda")[:, None]
        )
        expected = torch.einsum("hrk,khd->rhd", scores.masked_fill(behind, -torch.inf).softmax(-1), values)
        torch.testing.assert_close(output[g].float(), expected, atol=2e-2, rtol=2e-2)


def test_no_slot_behind_the_used_rows_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.arange(2 * 10, dtype=torch.int32, device="cuda").view(2, 10) + 100
    backend = _backend(monkeypatch, 3, 4, table)
    # Two rows in use; a segment that ends with the table, full; a segment of padding.
    own = torch.tensor([113, 114, 0, 0, 106, 107, 108, 109, 0, 0, 0, 0], device="cuda")
    backend.init_forward_metadata(_batch(table, [1, 0, 0], [3, 6, 0], own))
    first, second = [110, 111, 112, 113, 114, 0, 0], [*range(100, 110)]
    listed = first + second + [0] * 4
    assert backend._slots[: len(listed)].tolist() == listed


def test_slots_of_blocks_that_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.arange(2 * 10, dtype=torch.int32, device="cuda").view(2, 10) + 100
    backend = _backend(monkeypatch, 4, 2, table)
    # Three rows from position 4 on, the last block half used; two from position 1; a free block.
    own = torch.tensor([114, 115, 116, 0, 101, 102, 0, 0], device="cuda")
    backend.init_forward_metadata(_batch(table, [1, 1, 0, 0], [4, 6, 1, 0], own))
    listed = [*range(110, 117), 0, 100, 101, 102, 0, 0]
    assert backend._slots[: len(listed)].tolist() == listed


def test_nan_behind_the_used_rows_reaches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, segments, used, start = 16, 8, 5, 100
    table = torch.stack([torch.randperm(SLOTS - 1, device="cuda", dtype=torch.int32) + 1])
    backend = _backend(monkeypatch, segments, rows, table)
    q = torch.randn(segments * rows, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    own = table[0, start : start + rows].clone()
    own[used:] = 0
    batch = _batch(table, [0] * segments, [start] * segments, own.repeat(segments))

    def used_rows() -> torch.Tensor:
        backend.init_forward_metadata(batch)
        return backend.forward_extend(q, None, None, LAYER, batch).view(segments, rows, -1)[:, :used].clone()

    whole = used_rows()
    for buffer in backend.token_to_kv_pool.buffers:
        buffer[table[0, start + used :].long()] = float("nan")
    assert torch.equal(used_rows(), whole)


def test_planning_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.arange(SLOTS, dtype=torch.int32, device="cuda").view(2, -1)
    backend = _backend(monkeypatch, 4, 16, table)
    batch = _batch(table, [0, 1, 0, 1], [5, 100, 700, 0], torch.zeros(64, device="cuda"))
    backend.init_forward_metadata(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            backend.init_forward_metadata(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
