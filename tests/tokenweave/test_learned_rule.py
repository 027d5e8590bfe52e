"""The split rule that learns the host's time: when it cuts before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.tokenweave import learned_rule
from sglang_ext.tokenweave.learned_rule import BATCHES, UNTIMED_US, LearnedRule, layer_us
from sglang_ext.tokenweave.split import CommModel, MeasuredModel, SplitRule
from sglang_ext.tokenweave.trials import ORDER

#: A layer takes half a microsecond per token, and the fused step a quarter as long as its block.
TOKENS = tuple(range(128, 16385, 128))
MODEL = MeasuredModel(TOKENS, tuple(0.2 * t for t in TOKENS), tuple(0.3 * t for t in TOKENS))
HIDDEN = 1024
COMM = CommModel(latency_us=1.0, bytes_per_us=2 * HIDDEN / 0.1)


def _rule(host_us: Sequence[float] = (), others: float = 0.0) -> LearnedRule:
    """A rule that has observed batches whose layers took the host ``host_us``."""
    split = SplitRule(MODEL, MODEL, COMM, HIDDEN)
    rule = LearnedRule(split, lambda mine: max(mine, others), StoppedClock())
    for layer in host_us:
        rule.observe_launches(_launches(layer))
    return rule


class StoppedClock:
    """Moved by :func:`_run`; an event is the time itself."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def between(self, begin: float, end: float) -> float:
        return end - begin


def _run(rule: LearnedRule, tokens: int, whole_ms: float, halves_ms: float, prefix: int = 0) -> bool:
    """A batch as a server runs it; whether it was cut."""
    rule.begin(tokens, prefix)
    cut = rule(tokens).cut is not None
    clock: Any = rule._trials.clock
    clock.now += halves_ms if cut else whole_ms
    rule.end(cut)
    return cut


def _launches(layer: float, layers: int = 20) -> list[float]:
    step = layer * 1e-6 / learned_rule.STEPS_PER_LAYER
    return [7.0 + i * step for i in range(layers * learned_rule.STEPS_PER_LAYER)]


def test_before_it_has_learned_it_predicts_cuts_where_the_gpu_alone_would_gain() -> None:
    # A model whose layers all take less than a cautious guess would never be cut, and never be timed.
    assert _rule().predicted(2048).cut is not None
    assert _rule([4000.0] * (BATCHES - 1)).predicted(2048).cut is not None


def test_afterwards_the_host_counts() -> None:
    slow, fast = _rule(), _rule()
    for rule, host_us in ((slow, 4000.0), (fast, 300.0)):
        assert rule.predicted(2048).cut is not None
        for _ in range(BATCHES):
            rule.observe_launches(_launches(host_us))
    assert slow.predicted(2048).cut is None and slow.predicted(16384).cut is not None
    assert fast.predicted(2048).cut is not None


def test_batches_too_small_to_be_timed_count_as_slow() -> None:
    rule = _rule()
    for _ in range(BATCHES):
        rule.observe_launches([1.0])
    assert rule.rule.host_us == UNTIMED_US


def test_a_slow_host_stops_cuts_of_large_batches() -> None:
    assert _rule([20000.0] * BATCHES).predicted(16384).cut is None


def test_the_fastest_batch_of_the_slowest_rank_counts() -> None:
    assert _rule([9000.0, 250.0, 400.0]).rule.host_us == pytest.approx(250, rel=1e-3)
    assert _rule([9000.0, 250.0, 400.0], others=700.0).rule.host_us == 700


def test_it_learns_once() -> None:
    rule = _rule([300.0] * BATCHES)
    rule.observe_launches(_launches(90000.0))
    assert rule.rule.host_us == pytest.approx(300, rel=1e-3)


@given(host_us=st.floats(1, 20000), tokens=st.integers(1024, 16384))
def test_no_cut_is_slower_than_the_whole_on_either_side(host_us: float, tokens: int) -> None:
    decision = _rule([host_us] * BATCHES).predicted(tokens)
    if decision.cut is not None:
        assert decision.split_us >= host_us * 0.999
        assert decision.split_us < decision.whole_us


def test_launches_behind_a_full_queue_are_not_counted() -> None:
    early = _launches(400.0, layers=11)
    late = [early[-1] + 0.01 * i for i in range(1, 200)]
    assert layer_us(early + late) == pytest.approx(400, rel=1e-3)
    assert layer_us(early[:3]) is None


def test_a_cut_that_is_seen_to_lose_is_made_no_more() -> None:
    rule = _rule([300.0] * BATCHES)
    tried = [_run(rule, 4096, whole_ms=100.0, halves_ms=99.0) for _ in ORDER]
    assert tried == list(ORDER)
    assert not any(_run(rule, 4096, 100.0, 50.0) for _ in range(5))
    # Another size is another matter.
    assert [_run(rule, 8192, whole_ms=200.0, halves_ms=190.0) for _ in ORDER] == list(ORDER)
    assert all(_run(rule, 8192, 200.0, 500.0, prefix=99999) for _ in range(5))


def test_what_is_not_predicted_to_win_is_not_tried() -> None:
    rule = _rule([20000.0] * BATCHES)
    assert not any(_run(rule, 16384, whole_ms=100.0, halves_ms=50.0) for _ in range(20))
    assert not any(_run(_rule(), 512, whole_ms=100.0, halves_ms=50.0) for _ in range(20))


def test_without_a_trial_nothing_unsettled_is_cut() -> None:
    rule = _rule()
    assert rule(4096).cut is None
    # Attention to long prefixes is in no prediction: such batches are no trials, and run whole until settled.
    assert not any(_run(rule, 4096, 100.0, 50.0, prefix=4097) for _ in range(20))
    assert [_run(rule, 4096, 100.0, 50.0, prefix=4096) for _ in ORDER] == list(ORDER)
    assert _run(rule, 4096, 100.0, 50.0, prefix=4097)


def test_a_trial_ends_with_its_batch() -> None:
    rule = _rule()
    rule.begin(4096, 0)
    assert rule(4096).cut is not None
    rule.end(True)
    assert rule(4096).cut is None
    # A batch that failed leaves none behind.
    rule.begin(4096, 0)
    rule.begin(128, 0)
    assert rule(4096).cut is None and rule.end(False) is None


def test_learning_within_a_batch_that_the_host_is_too_slow_ends_its_trial() -> None:
    rule = _rule([20000.0] * (BATCHES - 1))
    rule.begin(4096, 0)
    assert rule(4096).cut is not None
    rule.observe_launches(_launches(20000.0))
    assert rule.end(True) is None and not rule._trials._size(4096).spans
    assert rule(4096).cut is None


def test_a_settled_size_is_timed_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = _rule()
    for _ in ORDER:
        _run(rule, 4096, 100.0, 90.0)
    monkeypatch.setattr(rule._trials.clock, "mark", lambda: pytest.fail("timed"))
    assert _run(rule, 4096, 0.0, 0.0)
