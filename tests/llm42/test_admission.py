"""Which waiting requests a prefill batch takes: one kind, by the head of the queue, and nobody starves."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult

from sglang_ext.llm42 import scheduler_hooks
from sglang_ext.llm42.scheduler_hooks import MAX_PASSED_OVER


@pytest.fixture(autouse=True)
def nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose radix cache holds no canonical prefixes."""
    monkeypatch.setattr(scheduler_hooks, "_runtime", SimpleNamespace(share_prefix=lambda adder, req: None))


def _request(marked: bool, priority: int | None = None) -> Any:
    return SimpleNamespace(llm42=object() if marked else None, priority=priority, req_pool_idx=None)


def _queue(kinds: str) -> list[Any]:
    """``m`` for a marked request, ``u`` for an unmarked one."""
    return [_request(kind == "m") for kind in kinds]


def _kinds(reqs: list[Any]) -> str:
    return "".join("u" if req.llm42 is None else "m" for req in reqs)


def _turn(
    queue: list[Any], chunked: Any = None, room: int = 1000, last_part: bool = False
) -> tuple[list[Any], list[Any]]:
    """A turn of SGLang's loop over its waiting queue: the batch, and who waits on."""
    adder = SimpleNamespace(
        can_run_list=[] if chunked is None else [chunked], rem_chunk_tokens=100, rem_input_tokens=100
    )

    def original(adder: Any, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> Any:
        assert (adder.rem_chunk_tokens is None) == (req.llm42 is not None)
        if len(adder.can_run_list) == room:
            return AddReqResult.NO_TOKEN
        adder.can_run_list.append(req)
        return AddReqResult.CONTINUE

    for req in queue:
        result = scheduler_hooks.add_one_req(
            original,
            adder,
            req,
            has_chunked_req=chunked is not None and not last_part,
            truncation_align_size=None,
        )
        if result is not AddReqResult.CONTINUE:
            break
    batch = adder.can_run_list
    return batch, [req for req in queue if not any(req is taken for taken in batch)]


def test_mixed_traffic_is_admitted_in_two_turns() -> None:
    first, waiting = _turn(_queue("umumummu"))
    second, rest = _turn(waiting)
    assert (_kinds(first), _kinds(second), rest) == ("uuuu", "mmmm", [])


@pytest.mark.parametrize("kinds", ["uuuu", "mmm"])
def test_one_kind_alone_is_admitted_at_once(kinds: str) -> None:
    batch, waiting = _turn(_queue(kinds))
    assert _kinds(batch) == kinds and waiting == []


def test_a_batch_passes_over_a_bounded_number() -> None:
    batch, _ = _turn(_queue("u" + "m" * MAX_PASSED_OVER + "u"))
    assert _kinds(batch) == "uu"
    batch, waiting = _turn(_queue("u" + "m" * (MAX_PASSED_OVER + 1) + "u"))
    assert _kinds(batch) == "u" and _kinds(waiting) == "m" * (MAX_PASSED_OVER + 1) + "u"


def test_nobody_is_passed_over_while_a_long_prompt_is_computed_in_parts() -> None:
    batch, waiting = _turn(_queue("umu"), chunked=_request(marked=False))
    assert _kinds(batch) == "uu" and _kinds(waiting) == "mu"


def test_nobody_is_passed_over_with_the_last_part_of_a_long_prompt() -> None:
    # Otherwise the next long prompt would begin in that batch, and so on: the marked one would never be next.
    long_prompt = _request(marked=False)
    long_prompt.req_pool_idx = 3
    batch, waiting = _turn(_queue("mu"), chunked=long_prompt, last_part=True)
    assert batch == [long_prompt] and _kinds(waiting) == "mu"


def test_only_requests_of_the_same_priority_are_passed_over() -> None:
    queue = [_request(False, 5), _request(True, 5), _request(False, 5), _request(False, 3)]
    batch, waiting = _turn(queue)
    assert batch == [queue[0], queue[2]]
    assert waiting == [queue[1], queue[3]]


def test_the_head_is_admitted_in_every_turn_and_in_order_within_a_kind() -> None:
    choice = random.Random(0)
    queue = _queue("".join(choice.choice("um") for _ in range(200)))
    order = {id(req): place for place, req in enumerate(queue)}
    turns = 0
    while queue:
        head = queue[0]
        batch, queue = _turn(queue, room=choice.randint(1, 20))
        assert batch[0] is head
        assert len(set(_kinds(batch))) == 1
        places = [order[id(req)] for req in batch]
        assert places == sorted(places)
        same = [order[id(req)] for req in queue if _kinds([req]) == _kinds(batch)]
        assert not same or places[-1] < min(same), "one of the same kind was overtaken"
        turns += 1
    assert turns < 60
