"""Counters behind ``GET /llm42_stats``: each counts what it says, and a reset leaves the totals alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.llm42.lane import LaneRequest, Segment, SegmentKind
from sglang_ext.llm42.request import Verdict
from sglang_ext.llm42.statistics import Statistics


def _changes(statistics: Statistics) -> dict[str, int]:
    """Counters that are not zero."""
    return {name: value for name, value in statistics.as_dict().items() if value}


def test_decode_steps() -> None:
    statistics = Statistics()
    statistics.count_decode(3, 0)
    assert _changes(statistics) == {"decode_steps": 1, "decode_deterministic_rows": 3}
    statistics.count_decode(0, 4)
    statistics.count_decode(2, 5)
    assert _changes(statistics) == {
        "decode_steps": 3,
        "mixed_decode_steps": 1,
        "decode_deterministic_rows": 5,
        "decode_other_rows": 9,
    }


def test_canonical_decode_steps() -> None:
    statistics = Statistics()
    statistics.count_decode(3, 1, 2)
    statistics.count_decode(2, 0, 0)
    statistics.count_decode(1, 0)
    assert _changes(statistics) == {
        "decode_steps": 3,
        "mixed_decode_steps": 1,
        "canonical_decode_steps": 2,
        "decode_deterministic_rows": 6,
        "decode_decided_rows": 2,
        "decode_other_rows": 1,
    }


def _segment(kind: SegmentKind, rows: int) -> Segment:
    return Segment(LaneRequest(known_end=100, max_end=200, canonical_end=0), kind, 5, rows)


def test_rows_of_a_pass_are_told_apart() -> None:
    statistics = Statistics()
    segments = [
        _segment(SegmentKind.VERIFY, 7),
        _segment(SegmentKind.PROMPT, 16),
        _segment(SegmentKind.VERIFY, 2),
    ]
    statistics.count_pass(segments, 64)
    assert _changes(statistics) == {
        "verify_forward_passes": 1,
        "verify_total_reqs": 2,
        "verify_total_tokens": 9,
        "prompt_segments": 1,
        "prompt_tokens": 16,
        "padded_rows": 64 - 25,
    }


@given(st.lists(st.lists(st.tuples(st.sampled_from(SegmentKind), st.integers(1, 16)), max_size=4)))
def test_rows_add_up_to_those_of_the_passes(passes: list[list[tuple[SegmentKind, int]]]) -> None:
    statistics = Statistics()
    for segments in passes:
        statistics.count_pass([_segment(*segment) for segment in segments], 64)
    rows = statistics.verify_total_tokens + statistics.prompt_tokens + statistics.padded_rows
    assert rows == 64 * len(passes) == 64 * statistics.verify_forward_passes


def test_verdicts() -> None:
    statistics = Statistics()
    statistics.count_verdict(Verdict((5, 6, 7), matched=3, candidates=5, ends_prefill=False))
    assert _changes(statistics) == {"candidates_accepted": 3}, "all that were judged agreed"
    statistics.count_verdict(Verdict((5, 6, 9), matched=2, candidates=6, ends_prefill=False))
    assert _changes(statistics) == {
        "candidates_accepted": 5,
        "candidates_rejected": 1,
        "rollbacks": 1,
        "tokens_rolled_back": 4,
    }


def test_a_mismatch_at_the_last_candidate_of_a_window_is_a_rollback() -> None:
    """The original counted none, and its decoding went on from the refused token."""
    statistics = Statistics()
    statistics.count_verdict(Verdict((5, 6, 9), matched=2, candidates=3, ends_prefill=False))
    assert statistics.rollbacks == 1 and statistics.tokens_rolled_back == 1


def test_a_reset_leaves_the_totals_alone() -> None:
    statistics = Statistics()
    statistics.count_decode(3, 1)
    statistics.reset()
    assert not _changes(statistics) and statistics.totals()["decode_deterministic_rows"] == 3
    statistics.count_decode(2, 0)
    statistics.reset()
    statistics.count_decode(1, 0)
    assert statistics.as_dict()["decode_steps"] == 1
    assert statistics.totals()["decode_steps"] == 3
    assert statistics.totals()["decode_deterministic_rows"] == 6
