"""Which blocks of a canonical pass FlashInfer computes together."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from sglang_ext.llm42.attention import block_rows
from sglang_ext.llm42.flashinfer_attention import sequences


@pytest.mark.parametrize(
    ("rids", "starts", "expected"),
    [
        ([], [], []),
        (["7"], [3], [1]),
        (["7", "7", "7"], [0, 8, 16], [3, 0, 0]),
        (["7", "7", "8", "8"], [8, 16, 24, 32], [2, 0, 2, 0]),
        (["7", "7"], [0, 7], [1, 1]),  # the first segment ended within its block
        (["7", "8", "7"], [0, 8, 16], [1, 1, 1]),
        (["0", "0", "0"], [0, 0, 0], [1, 1, 1]),  # blocks that are free
    ],
)
def test_neighbours_that_follow_each_other_in_a_request_are_one(
    rids: Sequence[str], starts: Sequence[int], expected: Sequence[int]
) -> None:
    assert sequences(rids, starts, 8) == expected


def test_every_block_belongs_to_the_sequence_in_front_of_it() -> None:
    choice = random.Random(0)
    for _ in range(200):
        rids, starts = [], []
        for rid in range(choice.randint(1, 5)):
            start = choice.randrange(50)
            for _ in range(choice.randint(1, 4)):
                rids.append(str(rid))
                starts.append(start)
                start += 8
        counts = sequences(rids, starts, 8)
        assert sum(counts) == len(rids)
        for block, count in enumerate(counts):
            for more in range(1, count):
                assert counts[block + more] == 0
                assert (rids[block + more], starts[block + more]) == (rids[block], starts[block] + 8 * more)


@pytest.mark.parametrize(
    ("device", "window", "rows"),
    [("cuda", 32, 8), ("cuda", 12, 4), ("cuda", 63, 63), ("cuda", 1, 1), ("cpu", 32, 32)],
)
def test_rows_of_a_block_divide_the_window(device: str, window: int, rows: int) -> None:
    assert block_rows(device, window) == rows
