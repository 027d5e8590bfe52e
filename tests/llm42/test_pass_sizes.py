"""Canonical passes of several sizes: which are tried, which run."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from sglang_ext.llm42.canonical_pass import PassSegment
from sglang_ext.llm42.lane import SegmentKind
from sglang_ext.llm42.pass_sizes import PassSizes, smaller_sizes

ROWS, BLOCK_ROWS = 4, 2


class FakePass:
    """Its logits say which pass ran, which row each belongs to, and of how many rows there are logits."""

    rows, block_rows = ROWS, BLOCK_ROWS

    def __init__(self, segments: int) -> None:
        self.segments = segments
        self.few_rows = segments

    def run(self, segments: list[PassSegment], candidates: object) -> torch.Tensor:
        return self._logits(torch.arange(self.segments * ROWS))

    def run_few(self, segments: list[PassSegment], candidates: object, chosen: torch.Tensor) -> torch.Tensor:
        assert len(chosen) <= self.few_rows
        return self._logits(chosen)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.full_like(rows, self.segments), rows, torch.full_like(rows, len(rows))], 1)


@pytest.fixture
def passes() -> PassSizes:
    return PassSizes(cast("Any", FakePass(8)), [cast("Any", FakePass(size)) for size in (2, 4)])


def logits(passes: PassSizes, blocks: int, rows: list[int]) -> list[list[int]]:
    segments = [PassSegment(SegmentKind.VERIFY, 1, 0, (), BLOCK_ROWS - 1)] * blocks
    found = passes.run(segments, cast("Any", None), torch.tensor(rows, dtype=torch.int64))
    return cast("list[list[int]]", found.tolist())


def run(passes: PassSizes, segments: int) -> int:
    """Segments of the pass that ran so many."""
    [[size, *_]] = logits(passes, segments * ROWS // BLOCK_ROWS, [0])
    return size


@pytest.mark.parametrize(
    ("segments", "sizes"),
    [(1, ()), (2, (1,)), (4, (1, 2, 3)), (8, (2, 3, 4, 6)), (32, (8, 12, 16, 24))],
)
def test_sizes_to_try(segments: int, sizes: tuple[int, ...]) -> None:
    assert smaller_sizes(segments, "cpu") == sizes


def test_on_a_gpu_more_sizes_are_tried() -> None:
    assert smaller_sizes(32, "cuda") == (8, 12, 16, 20, 24, 28)
    assert smaller_sizes(2, "cuda") == (1,)


def test_smaller_passes_run_only_when_allowed(passes: PassSizes) -> None:
    assert passes.sizes == (8,)
    assert [run(passes, n) for n in (0, 1, 8)] == [8, 8, 8]
    passes.allow([4])
    assert passes.sizes == (4, 8)
    assert [run(passes, n) for n in (1, 4, 5)] == [4, 4, 8]
    passes.allow([4, 2])
    assert [run(passes, n) for n in (1, 2, 3, 5)] == [2, 2, 4, 8]
    passes.allow([])
    assert run(passes, 1) == 8


def test_a_pass_is_chosen_by_blocks(passes: PassSizes) -> None:
    passes.allow([2, 4])
    assert passes.blocks == (4, 8, 16)
    assert [logits(passes, blocks, [0])[0][0] for blocks in (4, 5, 8, 9, 16)] == [2, 4, 4, 8, 8]


def test_few_rows_are_computed_alone_where_that_is_allowed(passes: PassSizes) -> None:
    passes.allow([2, 4])
    assert logits(passes, 1, [7, 2]) == [[2, 7, 8], [2, 2, 8]]
    passes.allow_few([2, 8])
    assert logits(passes, 1, [7, 2]) == [[2, 7, 2], [2, 2, 2]]
    assert logits(passes, 1, [7, 2, 3]) == [[2, 7, 8], [2, 2, 8], [2, 3, 8]], "more than it can"
    assert logits(passes, 5, [9]) == [[4, 9, 16]], "not allowed"
    assert logits(passes, 16, []) == []
    with pytest.raises(ValueError, match=r"no canonical pass of \[3\] segments has logits of few rows"):
        passes.allow_few([3])
    passes.allow([2])
    assert passes.few == frozenset(), "as after an update of the weights"


def test_what_does_not_exist_cannot_be_allowed(passes: PassSizes) -> None:
    with pytest.raises(ValueError, match=r"no canonical pass of \[3\] segments, only of \[2, 4\]"):
        passes.allow([2, 3])
    assert passes.sizes == (8,)
