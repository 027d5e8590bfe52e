"""Which decode steps run in a canonical shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.llm42.decode_policy import CPU_SIZES, GPU_SIZES, DecodePolicy, sizes_to_try


def policy(*sizes: int, least: int = 64) -> DecodePolicy:
    made = DecodePolicy(least)
    made.allow(sizes)
    return made


def test_nothing_runs_before_the_certification() -> None:
    assert DecodePolicy(1).choose(1, 1) is None


def test_smallest_size_that_holds_the_batch() -> None:
    always = policy(256, 64, 128, least=1)
    assert [always.choose(rows, rows) for rows in (1, 64, 65, 256, 257)] == [64, 64, 128, 256, None]


def test_without_a_row_to_decide_a_step_is_sglangs() -> None:
    assert policy(64, least=1).choose(10, 0) is None


def test_a_step_is_canonical_where_enough_rows_are_decided() -> None:
    assert policy(256).choose(200, 63) is None
    assert policy(256).choose(200, 64) == 256
    assert policy(64, 256).choose(64, 64) == 64


def test_a_few_rows_fewer_do_not_end_it() -> None:
    """Else candidates would be drafted and have to be verified before the next canonical step."""
    chosen = policy(256)
    decided = [chosen.choose(200, count) is not None for count in (60, 64, 60, 48, 47, 60, 63, 64)]
    assert decided == [False, True, True, True, False, False, False, True]


def test_one_long_request_among_short_ones_is_left_to_sglang() -> None:
    lengths = [(4096, 20_000), (4097, 20_000), (8192, 131_072), (8193, 131_072)]
    chosen = [policy(256).choose(200, 100, longest, total) for longest, total in lengths]
    assert chosen == [256, None, 256, None]
    assert policy(256, least=1).choose(200, 100, 100_000, 100_000) == 256


def test_a_batch_that_no_size_holds_ends_it() -> None:
    chosen = policy(64)
    assert [chosen.choose(*step) for step in ((64, 64), (65, 65), (64, 50))] == [64, None, None]


@given(
    st.lists(st.integers(1, 600), max_size=6),
    st.integers(1, 300),
    st.lists(st.tuples(st.integers(1, 700), st.integers(0, 700)), max_size=30),
)
def test_what_is_chosen_may_run_and_holds_the_batch(
    sizes: list[int], least: int, steps: list[tuple[int, int]]
) -> None:
    chosen = policy(*sizes, least=least)
    for rows, decidable in steps:
        size = chosen.choose(rows, decidable)
        if size is not None:
            assert size in sizes and size >= rows and decidable >= max(1, least * 3 / 4)
            assert not [each for each in sizes if rows <= each < size]


@pytest.mark.parametrize(
    ("device", "most", "full", "sizes"),
    [
        ("cuda", 48, 512, (64,)),
        ("cuda", 256, 512, (64, 128, 192, 256)),
        ("cuda", 300, 1024, (64, 128, 192, 256, 320)),
        ("cuda", 4096, 1024, GPU_SIZES),
        ("cpu", 1, 64, (4, 64)),
        ("cpu", 8, 512, (4, 8, 512)),
        ("cpu", 16, 12, (4, 8, 12, 16)),
        ("cpu", 4096, 64, CPU_SIZES),
    ],
)
def test_sizes_to_try(device: str, most: int, full: int, sizes: tuple[int, ...]) -> None:
    assert sizes_to_try(device, most, full) == sizes
