"""Marked prefill batches join the running batch within the turn that admits them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext.llm42 import prefill, runtime


class _Batch:
    """What joining uses of SGLang's ``ScheduleBatch``."""

    def __init__(self, *reqs: Any) -> None:
        self.reqs = list(reqs)
        self.device = "cpu"
        self.return_logprob = False
        self.out_cache_loc = torch.zeros(5 * len(reqs))
        self.req_pool_indices = torch.arange(len(reqs))
        self.input_ids: Any = None
        self.prefill_input_ids_cpu: Any = torch.zeros(5 * len(reqs))
        self.prefill_stats = object()

    def is_empty(self) -> bool:
        return not self.reqs

    def merge_batch(self, other: _Batch) -> None:
        assert other.prefill_input_ids_cpu is None, "its forward would take the prompt for last tokens"
        self.reqs = self.reqs + other.reqs


class _Scheduler:
    """Plans the batches ``plans``, one after the other."""

    def __init__(self, *plans: _Batch) -> None:
        self.plans = list(plans)
        self.slots: list[int] = []
        self.polled: list[list[Any]] = []
        self.relayed: list[tuple[list[int], list[int]]] = []
        self.reported: list[Any] = []
        self.llm42 = SimpleNamespace(joined=self.slots.append)
        self.llm42_fingerprint = "certified"
        self.waiting_queue: list[Any] = []
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.metrics_reporter = SimpleNamespace(report_prefill_stats=self._report)

    def _report(self, batch: Any, prefill_stats: Any, can_run_cuda_graph: bool) -> None:
        self.reported.append(prefill_stats)

    def _relay_forward_payload(self, rows: torch.Tensor, result: Any) -> None:
        self.relayed.append((rows.tolist(), result.next_token_ids.tolist()))

    def plan(self, running_batch: _Batch) -> Any:
        self.polled.append(list(self.grammar_manager.grammar_queue))
        batch = self.plans.pop(0) if self.plans else None
        return SimpleNamespace(batch_to_run=batch, running_batch=running_batch)


def _turn(scheduler: _Scheduler, running_batch: Any) -> Any:
    return prefill.get_new_batch_prefill(_Scheduler.plan, scheduler, running_batch)


def _marked() -> Any:
    return SimpleNamespace(llm42=object())


def _unmarked() -> Any:
    return SimpleNamespace(llm42=None)


def test_the_turn_goes_on_to_decode_with_those_that_joined() -> None:
    running, batch = _Batch(_unmarked()), _Batch(_marked(), _marked())
    scheduler = _Scheduler(batch)
    plan = _turn(scheduler, running)
    assert plan.batch_to_run is None and plan.running_batch is running
    assert len(running.reqs) == 3 and running.reqs[1:] == batch.reqs
    assert scheduler.slots == [10] and scheduler.reported == [batch.prefill_stats]
    assert scheduler.relayed == [([0, 1], [0, 0])], "each row has a last token to look up"


def test_they_are_the_running_batch_where_nobody_runs() -> None:
    batch = _Batch(_marked())
    plan = _turn(_Scheduler(batch), _Batch())
    assert plan.batch_to_run is None and plan.running_batch is batch
    assert batch.prefill_input_ids_cpu is None, "its forward would take the prompt for last tokens"


def test_the_same_turn_computes_prompts_of_unmarked_requests() -> None:
    running, unmarked = _Batch(_unmarked()), _Batch(_unmarked())
    plan = _turn(_Scheduler(_Batch(_marked()), unmarked), running)
    assert plan.batch_to_run is unmarked and len(running.reqs) == 2
    assert unmarked.prefill_input_ids_cpu is not None


def test_grammars_that_are_compiled_are_looked_at_once_a_turn() -> None:
    scheduler = _Scheduler(_Batch(_marked()))
    compiling = scheduler.grammar_manager.grammar_queue = [_unmarked()]
    _turn(scheduler, _Batch(_unmarked()))
    assert scheduler.polled == [compiling, []] and scheduler.grammar_manager.grammar_queue is compiling


def test_a_request_that_was_preempted_does_not_return_in_the_same_turn() -> None:
    running, batch = _Batch(_unmarked()), _Batch(_marked())
    scheduler = _Scheduler(batch, _Batch(_unmarked()))
    scheduler.waiting_queue = [SimpleNamespace(is_retracted=False), SimpleNamespace(is_retracted=True)]
    plan = _turn(scheduler, running)
    assert plan.batch_to_run is None and len(running.reqs) == 2 and len(scheduler.plans) == 1


def test_marked_requests_that_the_first_batch_had_no_place_for_join_as_well() -> None:
    running = _Batch(_unmarked())
    plan = _turn(_Scheduler(_Batch(_marked()), _Batch(_marked())), running)
    assert plan.batch_to_run is None and len(running.reqs) == 3


def test_unmarked_prompts_run_as_ever() -> None:
    running, unmarked = _Batch(_marked()), _Batch(_unmarked())
    scheduler = _Scheduler(unmarked, _Batch(_marked()))
    plan = _turn(scheduler, running)
    assert plan.batch_to_run is unmarked and len(running.reqs) == 1
    assert len(scheduler.plans) == 1 and scheduler.slots == []


@pytest.fixture
def passes() -> Any:
    """A runtime that notes its launches instead of computing."""
    engine = runtime.Runtime.__new__(runtime.Runtime)
    engine._anybody_joined = False
    engine.slots = []
    engine._slot_guard = SimpleNamespace(taken=engine.slots.append)
    engine.launches = []
    engine._requests, engine._step_number = {}, 3
    engine.verification = SimpleNamespace(
        apply_ended=lambda: engine.launches.append("apply"),
        launch=lambda requests, step, can_decode: engine.launches.append((requests, step, can_decode)),
    )
    return engine


def test_a_turn_with_a_prefill_batch_starts_on_prompts_that_joined_and_on_nothing_else(passes: Any) -> None:
    passes.launch_joined()
    assert passes.launches == []
    passes.joined(7)
    passes.launch_joined()
    passes.launch_joined()
    assert passes.launches == ["apply", ({}, 3, True)] and passes.slots == [7]
