"""Which cores tensor-parallel ranks get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.cpu.threads import cores_of_rank, parse_cores

nodes_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(
    lambda sizes: [[10 * node + core for core in range(size)] for node, size in enumerate(sizes)]
)


@given(nodes=nodes_strategy.filter(any), tp_size=st.integers(1, 12))
def test_ranks_share_the_cores_fairly(nodes: list[list[int]], tp_size: int) -> None:
    usable = [core for node in nodes for core in node]
    shares = [cores_of_rank(nodes, rank, tp_size) for rank in range(tp_size)]
    assert all(shares)
    assert all(core in usable for share in shares for core in share)
    if tp_size > len(usable):
        return
    assert len({core for share in shares for core in share}) == sum(map(len, shares))
    if tp_size == 1 or tp_size > sum(map(bool, nodes)):
        assert sorted(core for share in shares for core in share) == usable
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_node_without_usable_cores_is_skipped() -> None:
    assert cores_of_rank([[], [4, 5], [8, 9]], 1, 2) == [8, 9]


def test_no_usable_core_is_an_error() -> None:
    with pytest.raises(ValueError, match="no CPU core"):
        cores_of_rank([[], []], 0, 1)


def test_core_lists() -> None:
    assert parse_cores("0-2,7") == [0, 1, 2, 7]
    with pytest.raises(ValueError, match="SGLANG_CPU_OMP_THREADS_BIND"):
        parse_cores("all")
