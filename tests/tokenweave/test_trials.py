"""Batches tried in halves and whole: fair order, what counts, and that all ranks settle alike."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.tokenweave.trials import ORDER, Trials

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
    way = trials.halves(tokens) if in_halves is None else in_halves
    return trials.add(tokens, way, 0.0, milliseconds, float)


def _settle(trials: Trials, cost: Callable[[int, bool], float]) -> bool:
    """Whether halves win, if batch ``number`` costs ``cost(number, in_halves)``."""
    for number in range(len(ORDER)):
        assert not trials.settled(TOKENS)
        _add(trials, cost(number, trials.halves(TOKENS)))
    assert trials.settled(TOKENS)
    return trials.halves(TOKENS)


def test_the_order_favours_neither_way() -> None:
    # Not where batches become slower one by one, nor where every second one is slower.
    places = {way: [i for i, each in enumerate(ORDER) if each == way] for way in (True, False)}
    assert len(places[True]) == len(places[False])
    assert sum(places[True]) == sum(places[False])
    assert sum(i % 2 for i in places[True]) == sum(i % 2 for i in places[False])


def test_the_faster_way_is_kept_and_a_draw_is_whole() -> None:
    assert _settle(_trials(), lambda _, in_halves: 90.0 if in_halves else 100.0)
    assert not _settle(_trials(), lambda _, in_halves: 110.0 if in_halves else 100.0)
    assert not _settle(_trials(), lambda _, in_halves: 99.0 if in_halves else 100.0)


def test_first_batches_that_compile_do_not_count() -> None:
    assert _settle(_trials(), lambda number, in_halves: (90.0 if in_halves else 100.0) + 9000 * (number < 2))
    # Nor does a slow one in between: the fastest of each way is compared.
    assert _settle(_trials(), lambda number, in_halves: (90.0 if in_halves else 100.0) + 50 * (number == 3))


def test_batches_of_a_size_are_compared_by_what_was_expected_of_them() -> None:
    trials = _trials()
    for way in ORDER:
        tokens = TOKENS if way else TOKENS + 700
        assert trials.halves(tokens) == way
        _add(trials, 0.1 * tokens, tokens)
    # In halves they were faster, and smaller by as much.
    assert not trials.halves(TOKENS) and trials.settled(TOKENS)


def test_a_batch_that_could_not_be_cut_does_not_count() -> None:
    trials = _trials()
    for _ in range(20):
        assert trials.halves(TOKENS)
        assert _add(trials, 1.0, in_halves=False) is None
    assert _settle(trials, lambda _, in_halves: 90.0 if in_halves else 100.0)


def test_the_slowest_rank_decides() -> None:
    # This rank saw halves win; another one needed longer for them.
    answers = iter([0.05, 0.03])
    assert not _settle(_trials(lambda mine: max(mine, next(answers))), lambda _, way: 90.0 if way else 100.0)


def test_what_is_said() -> None:
    trials = _trials()
    said = [_add(trials, 50.0 if trials.halves(TOKENS) else 100.0) for _ in ORDER]
    assert said[:-1] == [None] * (len(ORDER) - 1)
    how = "batches of about 4096 tokens run in halves from now on"
    assert said[-1] == f"{how}: in halves they took 0.500 of their time whole"
    assert _add(trials, 1.0) is None


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
        plans.append(one.halves(tokens))
        one.add(tokens, plans[-1], 0.0, 1.0 + (seed * number) % 7, float)
    replies = iter(agreed)
    other = _trials(lambda mine: next(replies))
    for tokens, plan in zip(batches * 3, plans, strict=True):
        assert other.halves(tokens) == plan
        other.add(tokens, plan, 0.0, 5.0, float)
    assert next(replies, None) is None
