"""Marked requests that the scheduler gives up while they hold no memory: each has a line in the log."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ext.llm42 import scheduler_hooks, weight_updates
from sglang_ext.llm42.observability import log_reader
from sglang_ext.llm42.observability.log_reader import Entry
from sglang_ext.llm42.observability.observer import Observer
from sglang_ext.llm42.request import DeterministicRequest

PROMPT = (5, 6, 7)


class _Writer:
    """Keeps lines instead of writing them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def offer(self, render: Callable[[], str], tokens: int) -> bool:
        self.lines.append(render())
        return True

    def entry(self) -> Entry:
        """The only line."""
        (line,) = self.lines
        entry = log_reader.parse(line.encode(), "here")
        assert isinstance(entry, Entry)
        return entry


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> _Writer:
    """The commit log of a scheduler whose messages are hooked."""
    writer = _Writer()
    monkeypatch.setattr(scheduler_hooks, "_observer", Observer(None, None, writer, "c"))  # type: ignore[arg-type]
    original = SenderWrapper.send_output

    def send_output(sender: SenderWrapper, *args: Any) -> None:
        scheduler_hooks.output_sent(sender, *args)
        original(sender, *args)

    monkeypatch.setattr(SenderWrapper, "send_output", send_output)
    return writer


class _Req(SimpleNamespace):
    """What is read of SGLang's request."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def _req(rid: str = "r", marked: bool = True, priority: int | None = None) -> Any:
    params = SamplingParams(max_new_tokens=4, custom_params={"llm42": {}, "llm42_weight_version": "w"})
    params.normalize(None)
    return _Req(
        rid=rid,
        llm42=DeterministicRequest(seed=3, seed_is_default=False) if marked else None,
        origin_input_ids=PROMPT,
        output_ids=[],
        sampling_params=params,
        custom_logit_processor=None,
        require_reasoning=False,
        priority=priority,
        mamba_pool_idx=None,
        extra_key="\x1fllm42",
        time_stats=SimpleNamespace(
            wait_queue_entry_time=time.perf_counter() - 60, trace_ctx=SimpleNamespace(abort=lambda **_: None)
        ),
    )


def _scheduler(*waiting: Any, **settings: Any) -> Any:
    """What SGLang's methods below use of their scheduler."""
    defaults: dict[str, Any] = {
        "chunked_req": None,
        "waiting_queue": list(waiting),
        "running_batch": None,
        "last_batch": None,
        "dllm_config": None,
        "disaggregation_mode": None,
        "enable_hicache_storage": False,
        "enable_hierarchical_cache": False,
        "enable_priority_scheduling": False,
        "schedule_low_priority_values_first": False,
        "abort_on_priority_when_disabled": True,
        "max_queued_requests": 1,
        "grammar_manager": SimpleNamespace(abort_requests=lambda _: None, grammar_queue=[]),
        "ps": SimpleNamespace(pp_size=1),
        "ipc_channels": SimpleNamespace(send_to_tokenizer=SenderWrapper(None)),
    }
    return SimpleNamespace(**{**defaults, **settings})


def _aborted(req: Any) -> None:
    Scheduler.abort_request(_scheduler(req), AbortReq(rid="r"))


def _all_aborted(req: Any) -> None:
    Scheduler.abort_request(_scheduler(req), AbortReq(abort_all=True))


def _timed_out(req: Any) -> None:
    scheduler = _scheduler(req)
    with envs.SGLANG_REQ_WAITING_TIMEOUT.override(1):
        Scheduler._abort_on_waiting_timeout(scheduler)
    assert scheduler.waiting_queue == []


def _queue_full(req: Any) -> None:
    assert Scheduler._abort_on_queued_limit(_scheduler(_req("other", marked=False)), req)


def _displaced(req: Any) -> None:
    req.priority = 1
    scheduler = _scheduler(req, enable_priority_scheduling=True)
    assert not Scheduler._abort_on_queued_limit(scheduler, _req("other", marked=False, priority=2))


def _priority_refused(req: Any) -> None:
    req.priority = 1
    assert not Scheduler._set_or_validate_priority(_scheduler(), req)


def _not_certified(req: Any) -> None:
    weight_updates._refuse_marked(_scheduler(req))


@pytest.mark.parametrize(
    ("end", "message", "status"),
    [
        (_aborted, "Abort in waiting queue", None),
        (_all_aborted, "Abort in waiting queue", None),
        (_timed_out, "Request waiting timeout reached.", 503),
        (_queue_full, "The request queue is full.", 503),
        (_displaced, "The request is aborted by a higher priority request.", 503),
        (_priority_refused, "Using priority is disabled", 503),
        (_not_certified, weight_updates.NOT_CERTIFIED, 503),
    ],
)
def test_a_request_that_never_began_has_a_line(
    writer: _Writer, end: Callable[[Any], None], message: str, status: int | None
) -> None:
    end(_req())
    entry = writer.entry()
    assert entry.log.tokens == () and entry.log.released
    assert entry.fields["rid"] == "r" and entry.fields["input_ids"] == list(PROMPT)
    assert entry.fields["weight_version"] == "w" and entry.fields["configuration"] == "c"
    assert entry.fields["finish_reason"]["type"] == "abort"
    assert entry.fields["finish_reason"]["message"].startswith(message)
    assert entry.fields["finish_reason"].get("status_code") == status


@pytest.mark.parametrize("end", [_aborted, _timed_out, _queue_full])
def test_an_unmarked_request_has_none(writer: _Writer, end: Callable[[Any], None]) -> None:
    end(_req(marked=False))
    assert writer.lines == []


def _begun() -> Any:
    """A request that committed a token and was retracted."""
    req = _req()
    req.llm42.log.commit_prefill(len(PROMPT), 0, 9)
    req.llm42.log.retract(1)
    req.output_ids = [9]
    return req


@pytest.mark.parametrize("end", [_aborted, lambda req: weight_updates._end_waiting(_scheduler(req), 1)])
def test_what_a_retracted_request_had_put_out_is_in_its_line(
    writer: _Writer, end: Callable[[Any], None]
) -> None:
    end(_begun())
    assert writer.entry().log.tokens == (9,)


def test_the_last_request_that_memory_does_not_suffice_for(writer: _Writer) -> None:
    reason = FINISH_ABORT("Out of memory", status_code=HTTPStatus.INTERNAL_SERVER_ERROR).to_json()
    SenderWrapper(None).send_output(AbortReq(finished_reason=reason, rid="r"), _begun())
    entry = writer.entry()
    assert entry.log.tokens == (9,) and entry.fields["finish_reason"]["status_code"] == 500


def test_a_second_message_adds_nothing(writer: _Writer) -> None:
    req = _req()
    _aborted(req)
    _aborted(req)
    assert writer.entry().fields["rid"] == "r"


def test_other_messages_end_nothing(writer: _Writer) -> None:
    req = _req()
    SenderWrapper(None).send_output(SimpleNamespace(rid="r"), req)  # type: ignore[arg-type]
    SenderWrapper(None).send_output(AbortReq(rid="r"))
    assert writer.lines == [] and not req.llm42.log.released
