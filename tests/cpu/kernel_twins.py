"""The PyTorch twins of SGLang's Triton kernels, against the kernels themselves in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import distribution
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ext.cpu.kv_memory import AllocDecode, AllocExtend, assign_req_to_token_pool
from sglang_ext.cpu.sampling import murmur_hash32


def load_interpreted(path: str) -> ModuleType:
    """SGLang's kernel file, its kernels run by Triton's interpreter; SGLang itself is not imported."""
    file = str(distribution("sglang").locate_file(path))
    spec = importlib.util.spec_from_file_location(f"interpreted_{file.rsplit('/', 1)[-1][:-3]}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Triton reads the variable when a kernel is defined and again when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(scope="module")
def allocator(interpreter: None) -> ModuleType:
    return load_interpreted("sglang/kernels/ops/memory/allocator.py")


@pytest.fixture(scope="module")
def murmur(interpreter: None) -> ModuleType:
    return load_interpreted("sglang/kernels/ops/sampling/murmur_hash.py")


def upper(count: int) -> int:
    return 1 << (count - 1).bit_length()


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Page size, last slot (-1 if none) and length before the call of every request, in distinct pages."""
    page_size = draw(st.sampled_from([2, 4, 16, 64]))
    lengths = torch.tensor(draw(st.lists(st.integers(0, 200), min_size=1, max_size=9)))
    own_page = 1000 + torch.arange(len(lengths)) * 7
    last = torch.where(lengths > 0, own_page * page_size + (lengths - 1) % page_size, -1)
    return page_size, lengths, last


@settings(max_examples=40, deadline=None)
@given(batch=batches(), data=st.data())
def test_alloc_extend_equals_the_kernel(
    allocator: ModuleType, batch: tuple[int, torch.Tensor, torch.Tensor], data: st.DataObject
) -> None:
    page_size, before, last = batch
    grow = data.draw(st.lists(st.integers(1, 150), min_size=len(before), max_size=len(before)))
    after = before + torch.tensor(grow)
    free = torch.randperm(900) + 1
    size, extra = upper(len(before)), page_size
    ours, theirs = torch.full((sum(grow),), -7), torch.full((sum(grow),), -7)
    AllocExtend[(len(before),)](before, after, last, free, ours, size, extra)
    allocator.alloc_extend_kernel[(len(before),)](before, after, last, free, theirs, size, extra)
    assert torch.equal(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_alloc_decode_equals_the_kernel(
    allocator: ModuleType, batch: tuple[int, torch.Tensor, torch.Tensor]
) -> None:
    page_size, before, last = batch
    last = last.to(torch.int32)  # as read from req_to_token
    free = torch.randperm(900) + 1
    ours, theirs = torch.full((len(before),), -7), torch.full((len(before),), -7)
    AllocDecode[(len(before),)](before + 1, last, free, ours, upper(len(before)), page_size)
    allocator.alloc_decode_kernel[(len(before),)](
        before + 1, last, free, theirs, upper(len(before)), page_size
    )
    assert torch.equal(ours, theirs)


def test_exhausted_pages_write_nothing() -> None:
    nothing = torch.full((8,), -7)
    AllocExtend[(1,)](
        torch.tensor([0]), torch.tensor([8]), torch.tensor([-1]), torch.tensor([3]), nothing, 1, 4
    )
    assert (nothing == -7).all()
    AllocDecode[(1,)](torch.tensor([5]), torch.tensor([3]), torch.empty(0, dtype=torch.int64), nothing, 1, 4)
    assert (nothing == -7).all()


def test_the_old_page_is_used_up_without_free_pages() -> None:
    no_pages, out = torch.empty(0, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    AllocExtend[(1,)](torch.tensor([2]), torch.tensor([4]), torch.tensor([13]), no_pages, out, 1, 4)
    assert out.tolist() == [14, 15]
    AllocDecode[(2,)](torch.tensor([3, 4]), torch.tensor([13, 22]), no_pages, out, 2, 4)
    assert out.tolist() == [14, 23]


@settings(max_examples=40, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8),
    index_type=st.sampled_from([torch.int32, torch.int64]),
)
def test_assigned_slots_stand_where_they_belong(
    spans: list[tuple[int, int]], index_type: torch.dtype
) -> None:
    rows = torch.randperm(12)[: len(spans)]
    start = torch.tensor([first for first, _ in spans], dtype=index_type)
    end = start + torch.tensor([length for _, length in spans], dtype=index_type)
    slots = torch.randperm(int((end - start).sum())) + 1
    pool = torch.full((12, 64), -7, dtype=torch.int32)
    expected = pool.clone()
    taken = 0
    for row, (first, length) in zip(rows.tolist(), spans, strict=True):
        expected[row, first : first + length] = slots[taken : taken + length]
        taken += length
    assign_req_to_token_pool(rows, pool, start, end, slots)
    assert torch.equal(pool, expected)


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=5),
    columns=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40),
)
def test_murmur_hash_equals_the_kernel(
    murmur: ModuleType, keys: list[tuple[int, int]], columns: list[int]
) -> None:
    seed = torch.tensor([seed for seed, _ in keys]).to(torch.uint64)
    positions = torch.tensor([position for _, position in keys])
    ours = murmur_hash32(seed, positions, torch.tensor(columns))
    theirs = murmur.murmur_hash32(seed, positions, torch.tensor(columns))
    assert ours.dtype == theirs.dtype == torch.uint32
    assert ours.tolist() == theirs.tolist()


def test_murmur_hash_of_a_known_message() -> None:
    # The 16 zero bytes of (seed 0, position 0, column 0), by the reference implementation of MurmurHash3.
    zero = torch.zeros(1, dtype=torch.int64)
    assert murmur_hash32(zero, zero, zero).item() == reference_murmur3(bytes(16))


def reference_murmur3(message: bytes) -> int:
    """MurmurHash3_x86_32 of whole 4-byte blocks, start value 0, in Python integers."""
    state = 0
    for at in range(0, len(message), 4):
        block = int.from_bytes(message[at : at + 4], "little") * 0xCC9E2D51 & 0xFFFFFFFF
        block = (block << 15 | block >> 17) & 0xFFFFFFFF
        state ^= block * 0x1B873593 & 0xFFFFFFFF
        state = ((state << 13 | state >> 19) * 5 + 0xE6546B64) & 0xFFFFFFFF
    state ^= len(message)
    state = (state ^ state >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    state = (state ^ state >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return state ^ state >> 16
