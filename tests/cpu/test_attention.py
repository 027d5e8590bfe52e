"""Row invariance and correctness of the canonical attention on CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ext.cpu.attention import canonical_attention

SCALING = 0.125
SLOTS = 3000
CONTEXT = 448

Attention = Callable[..., torch.Tensor]


class Geometry(NamedTuple):
    segments: int
    rows: int
    heads: int
    kv_heads: int
    key_size: int
    value_size: int


SMOLLM2 = Geometry(4, 16, 9, 3, 64, 64)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test's number of compute threads: its indirect parameter, else 1, which does not wait on others."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)


def caches(geometry: Geometry, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(SLOTS, geometry.kv_heads, geometry.key_size).to(dtype)
    values = torch.randn(SLOTS, geometry.kv_heads, geometry.value_size).to(dtype)
    return keys, values


def sdpa(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    start: torch.Tensor,
    scaling: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """What SGLang's torch_native backend does with the same arguments."""
    output = torch.empty(*q.shape[:3], v_cache.shape[2], dtype=q.dtype)
    for g in range(q.shape[0]):
        first, end = int(start[g]), int(start[g]) + q.shape[1]
        query = torch.zeros(q.shape[2], end, q.shape[3], dtype=q.dtype)
        query[:, first:] = q[g].transpose(0, 1)
        k, v = (cache[slots[g, :end]].transpose(0, 1)[None] for cache in (k_cache, v_cache))
        out = torch.nn.functional.scaled_dot_product_attention(
            query[None], k, v, is_causal=True, enable_gqa=True, scale=scaling
        )
        output[g] = out[0, :, first:].transpose(0, 1)
    return output


def count_differences(attention: Attention, geometry: Geometry, dtype: torch.dtype) -> int:
    """Rows of one sequence whose bits differ between the starts at which a segment may cut it.

    Starts run over two segments' length up to and across a tile boundary, so that positions are computed at
    every row index; segment, neighbours, their lengths and everything stored beyond change from call to call.
    """
    torch.manual_seed(0)
    keys, values = caches(geometry, dtype)
    sequence = torch.randperm(SLOTS - 1)[:CONTEXT] + 1
    queries = torch.randn(CONTEXT, geometry.heads, geometry.key_size).to(dtype)
    seen: dict[int, torch.Tensor] = {}
    differences = 0
    for start in range(126 - geometry.rows, 126 + geometry.rows):
        segment, end = start % geometry.segments, start + geometry.rows
        longest = CONTEXT - geometry.rows if start % 2 else 24
        starts = torch.randint(0, longest, (geometry.segments,))
        starts[segment] = start
        slots = torch.randint(0, SLOTS, (geometry.segments, CONTEXT))
        slots[segment, :end] = sequence[:end]
        q = torch.randn(geometry.segments, geometry.rows, geometry.heads, geometry.key_size).to(dtype)
        q[segment] = queries[start:end]
        output = attention(q, keys, values, slots, starts, SCALING)
        for row in range(geometry.rows):
            position = start + row
            first = seen.setdefault(position, output[segment, row].clone())
            differences += not torch.equal(first, output[segment, row])
    return differences


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_cut_of_a_sequence_gives_the_same_bits(dtype: torch.dtype) -> None:
    assert count_differences(canonical_attention, SMOLLM2, dtype) == 0


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(8, 16, 9, 3, 64, 64),
        Geometry(2, 8, 4, 2, 32, 32),
        Geometry(5, 16, 8, 8, 128, 128),
        Geometry(3, 7, 5, 1, 40, 24),
        Geometry(2, 64, 14, 2, 64, 64),
    ],
)
def test_other_geometries_are_row_invariant(geometry: Geometry) -> None:
    assert count_differences(canonical_attention, geometry, torch.float32) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_fails_for_torch_attention(dtype: torch.dtype) -> None:
    assert count_differences(sdpa, SMOLLM2, dtype) > 0


@settings(max_examples=40, deadline=None)
@given(
    position=st.integers(0, 300),
    row=st.integers(0, 15),
    segment=st.integers(0, 3),
    longest=st.integers(1, CONTEXT - 16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    garbage=st.sampled_from([0.0, 7.0, float("nan"), float("inf"), -float("inf")]),
    logit_cap=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 2**32),
)
def test_a_row_depends_on_its_prefix_only(
    position: int,
    row: int,
    segment: int,
    longest: int,
    dtype: torch.dtype,
    garbage: float,
    logit_cap: float,
    seed: int,
) -> None:
    row = min(row, position)
    geometry = SMOLLM2
    torch.manual_seed(seed)
    keys, values = caches(geometry, dtype)
    sequence = torch.randperm(SLOTS - 1)[: position + 1] + 1
    query = torch.randn(geometry.heads, geometry.key_size).to(dtype)

    def compute(row: int, segment: int, longest: int) -> torch.Tensor:
        slots = torch.randint(0, SLOTS, (geometry.segments, CONTEXT))
        slots[segment, : position + 1] = sequence
        starts = torch.randint(0, longest, (geometry.segments,))
        starts[segment] = position - row
        q = torch.randn(geometry.segments, geometry.rows, geometry.heads, geometry.key_size).to(dtype)
        q[segment, row] = query
        output = canonical_attention(q, keys, values, slots, starts, SCALING, logit_cap)
        return output[segment, row].clone()

    alone = compute(0, 0, 1)
    assert alone.isfinite().all()
    elsewhere = torch.ones(SLOTS, dtype=torch.bool)
    elsewhere[sequence] = False
    keys[elsewhere] = garbage
    values[elsewhere] = garbage
    assert torch.equal(alone, compute(row, segment, longest))


@pytest.mark.parametrize("logit_cap", [0.0, 20.0])
@pytest.mark.parametrize("tile", [16, 64, 256])
def test_agrees_with_a_double_precision_reference(logit_cap: float, tile: int) -> None:
    geometry = Geometry(3, 16, 6, 2, 64, 48)
    torch.manual_seed(1)
    keys, values = caches(geometry, torch.float32)
    slots = torch.randint(0, SLOTS, (geometry.segments, 300))
    start = torch.tensor([0, 61, 284])
    q = 4 * torch.randn(geometry.segments, geometry.rows, geometry.heads, geometry.key_size)
    output = canonical_attention(q, keys, values, slots, start, SCALING, logit_cap, tile)
    for g in range(geometry.segments):
        for i in range(geometry.rows):
            prefix = slots[g, : int(start[g]) + i + 1]
            k, v = (cache[prefix].double().repeat_interleave(3, dim=1) for cache in (keys, values))
            logits = torch.einsum("hd,nhd->hn", q[g, i].double(), k) * SCALING
            if logit_cap:
                logits = logit_cap * torch.tanh(logits / logit_cap)
            expected = torch.einsum("hn,nhd->hd", logits.softmax(-1), v)
            torch.testing.assert_close(output[g, i].double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("poisoned", ["keys", "values"])
def test_a_nan_inside_the_prefix_is_not_hidden(poisoned: str) -> None:
    torch.manual_seed(2)
    keys, values = caches(SMOLLM2, torch.float32)
    slots = (torch.randperm(SLOTS - 1) + 1)[: SMOLLM2.segments * 100].view(SMOLLM2.segments, 100)
    start = torch.full((SMOLLM2.segments,), 50)
    {"keys": keys, "values": values}[poisoned][slots[1, 55]] = float("nan")
    q = torch.randn(SMOLLM2.segments, SMOLLM2.rows, SMOLLM2.heads, SMOLLM2.key_size)
    broken = ~canonical_attention(q, keys, values, slots, start, SCALING).isfinite()
    expected = torch.zeros(SMOLLM2.segments, SMOLLM2.rows, dtype=torch.bool)
    expected[1, 5:] = True
    assert torch.equal(broken.flatten(2).any(-1), expected)
    assert torch.equal(broken.flatten(2).all(-1), expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    keys, values = caches(SMOLLM2, torch.float32)
    q = torch.randn(2, 16, 9, 64)
    slots = torch.zeros(2, 32, dtype=torch.int64)
    with pytest.raises(ValueError, match="slots end at 32"):
        canonical_attention(q, keys, values, slots, torch.tensor([0, 17]), SCALING)
    with pytest.raises(ValueError, match="2 segments"):
        canonical_attention(q, keys, values, slots, torch.tensor([0]), SCALING)
    with pytest.raises(ValueError, match="do not fit"):
        canonical_attention(q[:, :, :8], keys, values, slots, torch.tensor([0, 0]), SCALING)
