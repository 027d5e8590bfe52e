"""Passes that follow each other: how many are under way, and in which order they are applied."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sglang_ext.llm42.lane import LaneConfig, LanePolicy, LaneRequest, Segment
from sglang_ext.llm42.statistics import Statistics
from sglang_ext.llm42.verification import Verification


class FakeResults:
    """Results that are ready when the test says so."""

    def __init__(self) -> None:
        self.over = False

    def ready(self) -> bool:
        return self.over


class Engine(Verification):
    """Launches and applies without a device."""

    def __init__(self, beside: bool) -> None:
        policy = LanePolicy(LaneConfig(window_size=4, verify_batch_size=2))
        stream: Any = SimpleNamespace(beside=beside, launching=nullcontext)
        passes: Any = SimpleNamespace(full=SimpleNamespace(device="cpu"))
        super().__init__(passes, policy, stream, cast("Any", None), Statistics())
        self.applied: list[Any] = []

    def _run(self, owned: list[tuple[Segment, Any]]) -> Any:
        return SimpleNamespace(segments=owned, results=FakeResults())

    def _apply(self, launched: Any) -> None:
        self.applied.append(launched)
        for segment, _ in launched.segments:
            segment.request.prompt_done(segment.rows)


@pytest.fixture
def requests() -> dict[LaneRequest, Any]:
    prompt = LaneRequest(known_end=100, max_end=200, canonical_end=0)
    return {prompt: SimpleNamespace(finished=lambda: False)}


def test_two_passes_are_under_way_where_they_may_follow_each_other(requests: dict[LaneRequest, Any]) -> None:
    engine, [prompt] = Engine(beside=True), requests
    engine.launch(requests, 1, can_decode=True)
    engine.launch(requests, 2, can_decode=True)
    assert len(engine._launched) == 1, "beside decode one at a time"
    for step in range(3, 6):
        engine.launch(requests, step, can_decode=False, behind=True)
    first, second = engine._launched
    assert engine.under_way is cast("Any", second.results)
    assert (prompt.planned_end, prompt.in_flight, prompt.canonical_end) == (16, 16, 0)
    engine.make_room()
    assert engine.applied == [first] and (prompt.in_flight, prompt.canonical_end) == (8, 8)
    engine.make_room()
    assert engine.applied == [first], "there is room"
    engine.launch(requests, 6, can_decode=True)
    assert len(engine._launched) == 1


def test_passes_are_applied_in_order_once_they_have_ended(requests: dict[LaneRequest, Any]) -> None:
    engine = Engine(beside=True)
    for step in range(2):
        engine.launch(requests, step, can_decode=False, behind=True)
    first, second = engine._launched
    cast("Any", second.results).over = True
    engine.apply_ended()
    assert engine.applied == [], "the second cannot have ended before the first"
    cast("Any", first.results).over = True
    engine.apply_ended()
    assert engine.applied == [first, second] and engine.under_way is None


def test_a_pass_in_front_of_decode_is_always_the_only_one(requests: dict[LaneRequest, Any]) -> None:
    engine = Engine(beside=False)
    engine.launch(requests, 1, can_decode=False, behind=True)
    engine.launch(requests, 2, can_decode=False, behind=True)
    assert len(engine._launched) == 1
    engine.apply_ended()
    assert engine.under_way is None, "whatever its clock says"
