"""The canonical attention backend on SGLang's own KV pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

SEGMENTS, ROWS, HEADS, KV_HEADS, SIZE = 3, 4, 6, 2, 16
POSITIONS = SEGMENTS * ROWS


@pytest.fixture
def runner() -> Any:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = MHATokenToKVPool(
        size=64,
        page_size=1,
        dtype=torch.bfloat16,
        head_num=KV_HEADS,
        head_dim=SIZE,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    table = torch.zeros(4, 32, dtype=torch.int32)
    table[2, :POSITIONS] = torch.randperm(60)[:POSITIONS] + 1
    return SimpleNamespace(
        device="cpu", token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=table)
    )


@pytest.fixture
def layer() -> Any:
    from sglang.srt.layers.radix_attention import RadixAttention

    return RadixAttention(HEADS, SIZE, SIZE**-0.5, KV_HEADS, layer_id=0)


def tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    q = torch.randn(POSITIONS, HEADS * SIZE).bfloat16()
    k, v = torch.randn(2, POSITIONS, KV_HEADS, SIZE).bfloat16()
    return q, k, v


def batch(runner: Any, starts: list[int]) -> Any:
    """Segments of request 2 at ``starts``; a negative start is a padding segment on row 0 and slot 0."""
    used = torch.tensor(starts)
    start = used.clamp(min=0)
    rows = torch.where(used < 0, 0, 2)
    positions = start[:, None] + torch.arange(ROWS)
    slots = runner.req_to_token_pool.req_to_token[rows[:, None], positions].long()
    return SimpleNamespace(
        batch_size=len(starts),
        req_pool_indices=rows,
        extend_prefix_lens=start.to(torch.int32),
        out_cache_loc=slots.reshape(-1),
    )


def test_segments_of_one_request_see_each_other_and_any_packing_gives_the_same_bits(
    runner: Any, layer: Any
) -> None:
    from sglang_ext.cpu.backend import CanonicalCpuAttnBackend

    backend = CanonicalCpuAttnBackend(runner, SEGMENTS, ROWS)
    q, k, v = tokens(0)
    together = backend.forward_extend(q, k, v, layer, batch(runner, [0, ROWS, 2 * ROWS]))
    assert together.shape == (POSITIONS, HEADS * SIZE)
    runner.token_to_kv_pool.k_buffer[0].zero_()
    runner.token_to_kv_pool.v_buffer[0].zero_()
    for segment in range(SEGMENTS):
        own = slice(segment * ROWS, (segment + 1) * ROWS)
        others = tokens(1)
        for tensor, ours in zip(others, (q, k, v), strict=True):
            tensor[-ROWS:] = ours[own]
        alone = backend.forward_extend(*others, layer, batch(runner, [-1, -1, segment * ROWS]))
        assert torch.equal(alone[-ROWS:], together[own])


def test_agrees_with_torch_attention(runner: Any, layer: Any) -> None:
    from sglang_ext.cpu.backend import CanonicalCpuAttnBackend

    q, k, v = tokens(2)
    backend = CanonicalCpuAttnBackend(runner, SEGMENTS, ROWS)
    output = backend.forward_extend(q, k, v, layer, batch(runner, [0, ROWS, 2 * ROWS]))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.view(POSITIONS, HEADS, SIZE).transpose(0, 1)[None].double(),
        k.transpose(0, 1)[None].double(),
        v.transpose(0, 1)[None].double(),
        is_causal=True,
        enable_gqa=True,
    )[0].transpose(0, 1)
    torch.testing.assert_close(output.view(POSITIONS, HEADS, SIZE).double(), expected, atol=1e-2, rtol=1e-2)


def test_another_shape_or_kind_of_layer_is_refused(runner: Any, layer: Any) -> None:
    from sglang_ext.cpu.backend import CanonicalCpuAttnBackend

    backend = CanonicalCpuAttnBackend(runner, SEGMENTS, ROWS)
    q, k, v = tokens(3)
    with pytest.raises(ValueError, match="3 segments of 4 rows"):
        backend.forward_extend(q, k, v, layer, batch(runner, [0, ROWS]))
    layer.sliding_window_size = 8
    with pytest.raises(ValueError, match="without window"):
        backend.forward_extend(q, k, v, layer, batch(runner, [0, ROWS, 2 * ROWS]))
    with pytest.raises(ValueError, match="needs segments and rows"):
        CanonicalCpuAttnBackend(runner, 0, ROWS)


def test_segment_may_reach_beyond_the_request_table(runner: Any, layer: Any) -> None:
    """The padded rows of a window at the end of the context."""
    from sglang_ext.cpu.backend import CanonicalCpuAttnBackend

    backend = CanonicalCpuAttnBackend(runner, SEGMENTS, ROWS)
    q, k, v = tokens(4)
    inside = batch(runner, [0, ROWS, 2 * ROWS])
    expected = backend.forward_extend(q, k, v, layer, inside)
    pool = runner.req_to_token_pool
    pool.req_to_token = pool.req_to_token[:, : POSITIONS - 1]
    output = backend.forward_extend(q, k, v, layer, inside)
    assert torch.equal(output[:-1], expected[:-1])
