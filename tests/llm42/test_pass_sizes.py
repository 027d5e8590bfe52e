"""Canonical passes of several sizes: which are tried, which run."""

from __future__ import annotations

from typing import Any, cast

import pytest

from sglang_ext.llm42.pass_sizes import PassSizes, smaller_sizes


class FakePass:
    """Says which pass ran."""

    def __init__(self, segments: int) -> None:
        self.segments = segments

    def run(self, segments: list[int], candidates: object) -> int:
        assert len(segments) <= self.segments
        return self.segments


@pytest.fixture
def passes() -> PassSizes:
    return PassSizes(cast("Any", FakePass(8)), [cast("Any", FakePass(size)) for size in (2, 4)])


def run(passes: PassSizes, segments: int) -> int:
    return cast("int", passes.run([cast("Any", None)] * segments, cast("Any", None)))


@pytest.mark.parametrize(
    ("segments", "sizes"),
    [(1, ()), (2, (1,)), (4, (1, 2, 3)), (8, (2, 3, 4, 6)), (32, (8, 12, 16, 24))],
)
def test_sizes_to_try(segments: int, sizes: tuple[int, ...]) -> None:
    assert smaller_sizes(segments) == sizes


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


def test_what_does_not_exist_cannot_be_allowed(passes: PassSizes) -> None:
    with pytest.raises(ValueError, match=r"no canonical pass of \[3\] segments, only of \[2, 4\]"):
        passes.allow([2, 3])
    assert passes.sizes == (8,)
