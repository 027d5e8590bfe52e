"""Which decode steps run in a canonical shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.llm42.decode_policy import (
    CPU_SIZES,
    GPU_SIZES,
    STAYING_SHARE,
    STEP_COST,
    DecodePolicy,
    saving,
    sizes_to_try,
)


def policy(*sizes: int, always: bool = False) -> DecodePolicy:
    made = DecodePolicy(always)
    made.allow(sizes)
    return made


def test_nothing_runs_before_the_certification() -> None:
    assert DecodePolicy(always=True).choose(1, 1) is None


def test_smallest_size_that_holds_the_batch() -> None:
    always = policy(256, 64, 128, always=True)
    assert [always.choose(rows, rows) for rows in (1, 64, 65, 256, 257)] == [64, 64, 128, 256, None]


def test_without_a_row_to_decide_a_step_is_sglangs() -> None:
    assert policy(64, always=True).choose(10, 0) is None
    assert policy(64).choose(10, 0) is None


@pytest.mark.parametrize(
    ("rows", "decidable", "length", "canonical"),
    [
        # Measured on an H200: 10, 50 and 100 % of a full batch, then of prompts of 1,024 tokens.
        (256, 25, 320, False),
        (256, 128, 320, True),
        (256, 256, 320, True),
        (94, 47, 1150, False),
        (94, 94, 1150, True),
        # The end of a load: below some 20 requests a step costs more than verification.
        (48, 48, 500, True),
        (10, 10, 500, False),
        # Long prefixes: attention costs more than it saves.
        (64, 64, 4000, False),
    ],
)
def test_a_step_is_canonical_where_it_saves_time(
    rows: int, decidable: int, length: int, canonical: bool
) -> None:
    chosen = policy(64, 128, 256).choose(rows, decidable, length, rows * length)
    assert (chosen is not None) == canonical


def test_a_few_rows_fewer_do_not_end_it() -> None:
    """Else candidates would be drafted and have to be verified before the next canonical step."""
    chosen = policy(256)
    least = next(rows for rows in range(1, 201) if policy(256).choose(200, rows))
    few = next(rows for rows in range(1, 201) if saving(200, rows) >= STAYING_SHARE * STEP_COST)
    assert few < least
    counts = (least - 1, least, few, few - 1, few, least)
    decided = [chosen.choose(200, count) is not None for count in counts]
    assert decided == [False, True, True, False, False, True]


def test_one_long_request_among_short_ones_is_left_to_sglang() -> None:
    lengths = [(4096, 20_000), (4097, 20_000), (8192, 131_072), (8193, 131_072)]
    chosen = [policy(256).choose(200, 200, longest, total) for longest, total in lengths]
    assert chosen == [256, None, 256, None]
    assert policy(256, always=True).choose(200, 100, 100_000, 100_000) == 256


def test_a_batch_that_no_size_holds_ends_it() -> None:
    chosen = policy(64)
    assert [chosen.choose(*step) for step in ((64, 64), (65, 65), (64, 25))] == [64, None, None]


@given(
    st.lists(st.integers(1, 600), max_size=6),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 700), st.integers(0, 700), st.integers(0, 4000)), max_size=30),
)
def test_what_is_chosen_may_run_and_holds_the_batch(
    sizes: list[int], always: bool, steps: list[tuple[int, int, int]]
) -> None:
    chosen = policy(*sizes, always=always)
    for rows, decidable, length in steps:
        decidable = min(rows, decidable)
        size = chosen.choose(rows, decidable, length, rows * length)
        if size is not None:
            assert size in sizes and size >= rows and decidable >= 1
            assert not [each for each in sizes if rows <= each < size]
            assert always or saving(rows, decidable) >= STAYING_SHARE * STEP_COST


@given(st.integers(1, 500), st.integers(0, 200_000))
def test_more_decided_rows_never_speak_against_a_step(rows: int, total: int) -> None:
    chosen = [policy(512).choose(rows, decidable, 100, total) is not None for decidable in range(rows + 1)]
    assert chosen == sorted(chosen)


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
