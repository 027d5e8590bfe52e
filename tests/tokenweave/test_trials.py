"""Batches tried in halves and whole: fair comparison, what counts, and that all ranks settle alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.tokenweave.trials import MOST_MISSES, ORDER, WARM_UP, Trials

TOKENS, MARGIN = 4096, 0.02


class Clock:
    """Marks are times."""

    def mark(self) -> float:
        raise AssertionError("the tests make their own")

    def between(self, begin: float, end: float) -> float:
        return end - begin


def _trials(agree: Callable[[float], float] = lambda mine: mine) -> Trials:
    return Trials(Clock(), agree, MARGIN)


def _add(
    trials: Trials, milliseconds: float, tokens: int = TOKENS, in_halves: bool | None = None
) -> str | None:
    way = trials.halves_next(tokens) if in_halves is None else in_halves
    return trials.add(tokens, way, 0.0, milliseconds, float)


def _settle(trials: Trials, cost: Callable[[int], float], halves: float) -> bool:
    """Whether halves win, if a batch costs ``cost(number)`` whole and ``halves`` times that in halves."""
    for number in range(len(ORDER)):
        assert trials.halves_win(TOKENS) is None
        _add(trials, cost(number) * (halves if trials.halves_next(TOKENS) else 1.0))
    result = trials.halves_win(TOKENS)
    assert result is not None and result == trials.halves_next(TOKENS)
    return result


COSTS: dict[str, Callable[[int], float]] = {
    "alike": lambda number: 100.0,
    "slower one by one": lambda number: 100.0 * (1 + 0.1 * number),
    "slow and fast by turns": lambda number: 100.0 * (1 + number % 2),
    "slow and fast by twos": lambda number: 100.0 * (1 + number // 2 % 2),
}


@pytest.mark.parametrize("cost", COSTS.values(), ids=list(COSTS))
def test_the_faster_way_is_kept_and_a_draw_is_whole(cost: Callable[[int], float]) -> None:
    assert _settle(_trials(), cost, halves=0.95)
    assert not _settle(_trials(), cost, halves=0.99)
    assert not _settle(_trials(), cost, halves=1.05)


@pytest.mark.parametrize(("first", "halves"), [(0, 0.95), (1, 1.05)])
def test_first_batches_that_compile_do_not_count(first: int, halves: float) -> None:
    """The first one in halves compiles something, or the first whole one."""
    assert WARM_UP == ORDER[:2] == (True, False)
    assert _settle(_trials(), lambda number: 9000.0 if number == first else 100.0, halves) == (halves < 1)


@pytest.mark.parametrize("held_up", [number for number in range(2, len(ORDER)) if not ORDER[number]])
def test_a_whole_batch_that_was_held_up_makes_no_cut(held_up: int) -> None:
    assert not _settle(_trials(), lambda number: 400.0 if number == held_up else 100.0, halves=1.02)


def test_batches_of_a_size_are_compared_by_what_was_expected_of_them() -> None:
    trials = _trials()
    for way in ORDER:
        tokens = TOKENS if way else TOKENS + 700
        assert trials.halves_next(tokens) == way
        _add(trials, 0.1 * tokens, tokens)
    # In halves they were faster, and smaller by as much.
    assert trials.halves_win(TOKENS) is False


def test_a_batch_that_could_not_be_cut_does_not_count_and_many_of_them_settle_a_size() -> None:
    trials = _trials()
    for _ in range(MOST_MISSES - 1):
        assert _add(trials, 1.0, in_halves=False) is None
    assert _settle(trials, COSTS["alike"], halves=0.95)
    never = _trials()
    for _ in range(MOST_MISSES):
        assert never.halves_win(TOKENS) is None
        _add(never, 1.0, in_halves=False)
    assert never.halves_win(TOKENS) is False


def test_the_slowest_rank_decides() -> None:
    # This rank saw halves win; another one needed longer for them.
    answers = iter([0.05, 0.03, 0.05, 0.03])
    assert not _settle(_trials(lambda mine: max(mine, next(answers))), COSTS["alike"], halves=0.9)
    assert next(answers, None) is None


def test_what_is_said_and_what_is_kept() -> None:
    trials = _trials()
    said = [_add(trials, 50.0 if trials.halves_next(TOKENS) else 100.0) for _ in ORDER]
    assert said[:-1] == [None] * (len(ORDER) - 1)
    how = "batches of about 4096 tokens run in halves from now on"
    assert said[-1] == f"{how}: in halves they took 0.500 of their time whole, the fastest 0.500"
    assert _add(trials, 1.0) is None
    assert not trials._size(TOKENS).spans, "events of settled sizes are given back"


@given(st.lists(st.integers(1, 20000), min_size=1, max_size=60), st.integers(0, 2**32))
def test_ranks_that_see_the_same_batches_agree(batches: list[int], seed: int) -> None:
    # Their clocks differ; what they agree on does not.
    agreed: list[float] = []

    def first(mine: float) -> float:
        agreed.append(mine)
        return mine

    one = _trials(first)
    plans = []
    for number, tokens in enumerate(batches * 3):
        plans.append(one.halves_next(tokens))
        one.add(tokens, plans[-1], 0.0, 1.0 + (seed * number) % 7, float)
    replies = iter(agreed)
    other = _trials(lambda mine: next(replies))
    for tokens, plan in zip(batches * 3, plans, strict=True):
        assert other.halves_next(tokens) == plan
        other.add(tokens, plan, 0.0, 5.0, float)
    assert next(replies, None) is None
