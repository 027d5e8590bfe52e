"""Trials, digests and comparison without a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ext.doctor import probes
from sglang_ext.doctor.digest import combine, row_digests
from sglang_ext.doctor.fingerprint import RankMismatch, agree, of_all_ranks
from sglang_ext.doctor.probes import PROBE, Space, Trial
from sglang_ext.llm42.lane import first_rows


@st.composite
def some_spaces(draw: st.DrawFn) -> Space:
    segments, rows = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    return Space(
        segments,
        rows,
        draw(st.integers(1, segments)),
        draw(st.integers(1, 300)),
        draw(st.sampled_from([count for count in range(1, rows + 1) if rows % count == 0])),
    )


spaces = some_spaces()


@settings(max_examples=60, deadline=None)
@given(spaces)
def test_trials_can_be_run(space: Space) -> None:
    for trial in (probes.reference(space), *probes.quick_trials(space), *probes.full_trials(space)):
        assert trial.passes and len(trial.requests) <= space.concurrent
        computed = [request.shared for request in trial.requests]
        for placements in trial.passes:
            taken = first_rows((p.rows for p in placements), space.block_rows)[-1]
            assert placements and taken <= space.segments * space.rows
            for p in placements:
                assert 1 <= p.rows <= space.rows and p.start + p.rows <= space.length
                assert p.start == computed[p.request], "a row's prefix must be there before it"
                computed[p.request] = p.start + p.rows
        assert computed == [trial.end(number) for number in range(len(trial.requests))]


@pytest.mark.parametrize("trials", [probes.quick_trials, probes.full_trials])
def test_trials_fill_every_block_with_a_segment_and_join_windows_behind_a_prefix(
    trials: Callable[[Space], Iterator[Trial]],
) -> None:
    """What a pass with blocks of few rows may hold: as many short segments as blocks, and long runs."""
    space = Space(segments=8, rows=32, concurrent=8, length=256, block_rows=8)
    most = longest = 0
    for trial in trials(space):
        for placements in trial.passes:
            most = max(most, len(placements))
            run = 0
            for last, p in itertools.pairwise((None, *placements)):
                follows = last is not None and last.request == p.request and last.rows % 8 == 0
                run = run + p.rows if follows else p.rows
                if trial.requests[p.request].shared % 8:
                    longest = max(longest, run)
    assert most == 32
    assert longest > 4 * 32, "a run that begins within a block of the reference"


def stood_at(trials: list[Trial], what: Callable[[int, probes.Placement, int], int]) -> set[int]:
    return {
        what(segment, p, row)
        for trial in trials
        for placements in trial.passes
        for segment, p in enumerate(placements)
        for row in range(p.rows)
        if trial.requests[p.request].sequence == PROBE
    }


def test_full_trials_reach_every_row_and_segment() -> None:
    space = Space(segments=4, rows=16, concurrent=4, length=probes.full_length(4, 16))
    trials = list(probes.full_trials(space))
    assert stood_at(trials, lambda segment, p, row: segment) == set(range(4))
    for position in (15, 64, 129):
        at = stood_at(trials, lambda segment, p, row, at=position: row if p.start + row == at else -1)
        assert at == {-1, *range(16)}
    prefixes = {request.shared for trial in trials for request in trial.requests}
    assert {0, 1, 63, 64, 65, 127, 128, 129, space.length - 1} <= prefixes


def test_quick_trials_compare_what_the_reference_computed_elsewhere() -> None:
    space = Space(segments=4, rows=16, concurrent=4, length=probes.quick_length(4, 16))
    trials = list(probes.quick_trials(space))
    rows = stood_at(trials, lambda segment, p, row: (p.start + row) // 16 * 1000 + row)
    assert len(rows) > 40
    assert all(p.start % 16 for t in trials for each in t.passes for p in each if p.start)
    assert stood_at(trials, lambda segment, p, row: segment) == set(range(4))


def test_probe_tokens_are_fixed() -> None:
    # The first outputs of SplitMix64 with seed 0.
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)
    assert probes.token_ids(0, 4, 1000) == [value % 1000 for value in published]
    assert probes.token_ids(0, 5, 1000)[:3] == probes.token_ids(0, 3, 1000)
    assert probes.token_ids(1, 5, 1000) != probes.token_ids(0, 5, 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8])
def test_any_bit_changes_its_rows_digest_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randint(0, 100, (6, 3, 5)).to(dtype)
    before = row_digests(tensor, 3)
    flat = tensor.view(torch.uint8).view(6, -1)
    for byte in range(flat.shape[1]):
        changed = flat.clone()
        changed[3, byte] ^= 1 << (byte % 8)
        after = row_digests(changed.view(dtype).view(6, 3, 5), 3)
        assert (before == after).tolist() == [True, False, True]


def test_digests_tell_order_and_sign_of_zero_and_do_not_depend_on_the_row() -> None:
    rows = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [1.0, 2.0, -0.0], [1.0, 2.0, 0.0]])
    digests = row_digests(rows, 4).tolist()
    assert digests[0] == digests[3] and len(set(digests)) == 3
    assert row_digests(rows[3:], 1).tolist() == digests[3:]
    assert combine(torch.tensor(1), torch.tensor(2)) != combine(torch.tensor(2), torch.tensor(1))
    with pytest.raises(ValueError, match="does not have 3 rows"):
        row_digests(rows, 3)


def test_ranks_must_agree() -> None:
    agree(["a", "a"])
    assert of_all_ranks("a", None) == ["a"]
    with pytest.raises(RankMismatch, match="rank 0: a, rank 1: b"):
        agree(["a", "b"])
