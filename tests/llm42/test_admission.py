"""Which waiting requests a prefill batch takes: one kind, by the head of the queue, and nobody starves."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult, SchedulePolicy

from sglang_ext.llm42 import scheduler_hooks
from sglang_ext.llm42.admission import MAX_PASSED_OVER, Admission


@pytest.fixture(autouse=True)
def nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose radix cache holds no canonical prefixes."""
    runtime = SimpleNamespace(share_prefix=lambda adder, req: None, admission=Admission())
    monkeypatch.setattr(scheduler_hooks, "_runtime", runtime)


def _policy(name: str, by_priority: bool = False) -> SchedulePolicy:
    cache: Any = SimpleNamespace(disable=True, supports_fast_match_prefix=lambda: False)
    return SchedulePolicy(name, cache, False, by_priority, False)


FCFS, LONGEST_FIRST = _policy("fcfs"), _policy("lof")
#: Priority, then length; a larger number is a higher priority.
BY_PRIORITY = _policy("lof", by_priority=True)


class _Request(SimpleNamespace):
    """Equal to itself only, like SGLang's."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def _request(marked: bool, priority: int | None = None, length: int = 10) -> Any:
    return _Request(
        llm42=object() if marked else None,
        priority=priority,
        req_pool_idx=None,
        sampling_params=SimpleNamespace(max_new_tokens=length),
    )


def _queue(kinds: str) -> list[Any]:
    """``m`` for a marked request, ``u`` for an unmarked one."""
    return [_request(kind == "m") for kind in kinds]


def _kinds(reqs: list[Any]) -> str:
    return "".join("u" if req.llm42 is None else "m" for req in reqs)


def _turn(
    queue: list[Any],
    chunked: Any = None,
    room: int = 1000,
    last_part: bool = False,
    policy: SchedulePolicy = FCFS,
    skipped: Sequence[Any] = (),
    preempt: Callable[..., bool] | None = None,
) -> tuple[list[Any], list[Any]]:
    """A turn of SGLang's loop over its waiting queue: the batch, and who waits on.

    Args:
        chunked: a long prompt of which a part is in the batch already.
        room: requests that the batch has room for.
        skipped: requests that SGLang does not try, because of their LoRA adapters.
        preempt: the running batch is full, and this retracts somebody for a request.
    """
    policy.calc_priority(queue, None)
    scheduler_hooks.queue_sorted(None, policy, queue, None)
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
        if req in skipped:
            continue
        if preempt is not None and not scheduler_hooks.preempt_to_schedule(preempt, adder, req, None):
            break
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
    return batch, [req for req in queue if req not in batch]


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
    batch, waiting = _turn(queue, policy=BY_PRIORITY)
    assert batch == [queue[0], queue[2]]
    assert waiting == [queue[1], queue[3]]


def test_without_priority_scheduling_priorities_mean_nothing() -> None:
    batch, _ = _turn([_request(False, 5), _request(True, 5), _request(False, 3)])
    assert _kinds(batch) == "uu"


@pytest.mark.parametrize("marked", [True, False])
def test_kinds_take_turns_where_the_policy_prefers_one(marked: bool) -> None:
    late = _request(marked, length=5)
    queue, batches = [late], []
    for turn in range(6):
        queue += [_request(not marked, length=50) for _ in range(3)]
        if turn == 3:
            queue.append(_request(marked, length=4))
        batch, queue = _turn(queue, policy=LONGEST_FIRST)
        batches.append(_kinds(batch))
        assert (late in batch) == (turn == 1)
    few, many = ("m", "u") if marked else ("u", "m")
    assert batches == [3 * many, few, 6 * many, 3 * many, few, 6 * many]


def test_kinds_take_turns_whatever_the_order() -> None:
    choice = random.Random(1)
    queue, kinds = [], ""
    for _ in range(200):
        queue += _queue("um" * choice.randint(1, 3))
        for req in queue:
            req.sampling_params.max_new_tokens = choice.randint(1, 50)
        batch, queue = _turn(queue, room=6, policy=LONGEST_FIRST, skipped=queue[:1] * choice.randint(0, 1))
        kinds += _kinds(batch)[0]
        queue = queue[-MAX_PASSED_OVER:]  # the others are aborted
    assert "uuuuu" not in kinds and "mmmmm" not in kinds
    assert kinds.count("um") > 60


def test_an_owed_request_is_tried_once() -> None:
    large = _request(True, length=5)
    _, queue = _turn([_request(False, length=50), large], policy=LONGEST_FIRST)
    batch, queue = _turn([_request(False, length=50), *queue], policy=LONGEST_FIRST, room=0)
    assert batch == [] and queue[0] is large
    batch, queue = _turn(queue, policy=LONGEST_FIRST)
    assert _kinds(batch) == "u" and queue == [large]
    batch, _ = _turn([_request(False, length=50), *queue], policy=LONGEST_FIRST)
    assert batch == [large]


def test_an_owed_request_that_is_gone_changes_nothing() -> None:
    _turn(_queue("um"))
    batch, waiting = _turn(_queue("umu"))
    assert _kinds(batch) == "uu" and _kinds(waiting) == "m"


def test_others_of_its_kind_do_not_wait_for_an_owed_request_whose_adapter_does() -> None:
    adapted, plain = _request(True, length=5), _request(True, length=4)
    _, queue = _turn([_request(False, length=50), adapted], policy=LONGEST_FIRST)
    for expected in ("u", "m"):
        queue += [_request(False, length=50)] + ([plain] if expected == "u" else [])
        batch, queue = _turn(queue, policy=LONGEST_FIRST, skipped=[adapted])
        assert _kinds(batch) == expected


def test_after_a_long_prompt_the_other_kind_is_next() -> None:
    long_prompt, marked = _request(False), _request(True, length=5)
    queue = [marked]
    long_prompt.req_pool_idx = 3
    for last_part in (False, False, True):
        queue.append(_request(False, length=50))
        batch, queue = _turn(queue, chunked=long_prompt, last_part=last_part, policy=LONGEST_FIRST)
        assert marked in queue
    batch, _ = _turn([_request(False, length=50), *queue], policy=LONGEST_FIRST)
    assert batch == [marked]


def test_a_higher_priority_goes_first_and_nobody_overtakes_the_owed_request_again() -> None:
    owed = _request(True, 5, length=5)
    batch, queue = _turn([_request(False, 9), owed, _request(False, 5, 50)], policy=BY_PRIORITY)
    assert _kinds(batch) == "uu" and queue == [owed]
    for _ in range(3):
        urgent = [_request(False, 9), _request(False, 9)]
        batch, queue = _turn([*queue, *urgent, _request(False, 5, 50)], policy=BY_PRIORITY)
        assert batch == urgent
    batch, _ = _turn([*queue, _request(True, 3)], policy=BY_PRIORITY)
    assert [req.priority for req in batch] == [5] and batch == [owed]


def test_nobody_is_retracted_for_a_request_of_the_other_kind() -> None:
    queue = [_request(False, 9), _request(True, 9, 9), _request(False, 9, 8), _request(False, 8)]
    asked: list[Any] = []

    def preempt(adder: Any, req: Any, server_args: Any) -> bool:
        asked.append(req)
        return True

    batch, waiting = _turn(queue, policy=BY_PRIORITY, preempt=preempt)
    assert batch == asked == [queue[0], queue[2]]
    asked.clear()
    batch, _ = _turn(waiting, policy=BY_PRIORITY, preempt=preempt)
    assert batch == asked == [waiting[0]]


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
