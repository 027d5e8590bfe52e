"""Marked requests wait for the certification of updated weights, and are refused if it fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ext.doctor.bench import CertificationError
from sglang_ext.doctor.fingerprint import RankMismatch
from sglang_ext.llm42 import scheduler_hooks, weight_updates


class _Scheduler:
    """What the hooks use of SGLang's."""

    def __init__(self, waiting: list[Any], idle: bool = True) -> None:
        self.waiting_queue = waiting
        self.sizes: tuple[int, ...] | None = None
        self.llm42 = SimpleNamespace(
            weights_generation=0, verification=SimpleNamespace(allow_sizes=self._allow)
        )
        self.llm42_fingerprint: str | None = "old"
        self.llm42_accepting_reqs = True
        self.running_batch = self.last_batch = None
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.idle, self.flushed = idle, 0
        self.sent: list[Any] = []
        self.ipc_channels = SimpleNamespace(
            send_to_tokenizer=SimpleNamespace(send_output=lambda abort, req: self.sent.append(abort))
        )

    def _allow(self, sizes: Any) -> None:
        self.sizes = tuple(sizes)

    def is_fully_idle(self) -> bool:
        return self.idle and not self.waiting_queue

    def flush_cache(self) -> None:
        self.flushed += 1


def _req(marked: bool) -> Any:
    return SimpleNamespace(llm42=object() if marked else None, rid="r", output_ids=[], extra_key="\x1f")


def _plan(scheduler: Any) -> list[Any]:
    """The requests that SGLang could admit."""
    return weight_updates.plan_prefill(lambda s: list(s.waiting_queue), scheduler)


class _Observer:
    """What metrics were told."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    def accepting(self, accepted: bool) -> None:
        self.told.append(accepted)


@pytest.fixture(autouse=True)
def observer(monkeypatch: pytest.MonkeyPatch) -> _Observer:
    observer = _Observer()
    monkeypatch.setattr(scheduler_hooks, "_observer", observer)
    return observer


@pytest.fixture
def certified(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Schedulers whose weights were certified; put an error in front to let it fail."""
    done: list[Any] = []

    def certify(scheduler: Any) -> None:
        if done and isinstance(done[0], Exception):
            raise done[0]
        done.append(scheduler)
        scheduler.llm42_fingerprint = "new"

    monkeypatch.setattr(scheduler_hooks, "certify", certify)
    monkeypatch.setattr(weight_updates.deterministic, "renew_namespace", lambda *args: None)
    monkeypatch.setattr(weight_updates, "_end_running", lambda scheduler: 0)
    return done


def test_marked_requests_wait_until_the_rest_has_ended(certified: list[Any]) -> None:
    waiting = [_req(False), _req(True)]
    scheduler = _Scheduler(waiting, idle=False)
    assert _plan(scheduler) == waiting, "nothing was updated"
    weight_updates.forget_old_weights(scheduler)  # type: ignore[arg-type]
    assert scheduler.sizes == () and scheduler.llm42_fingerprint is None
    assert _plan(scheduler) == [] and scheduler.waiting_queue == waiting and not certified
    scheduler.idle = True
    assert _plan(scheduler) == waiting and certified == [scheduler] and scheduler.flushed == 1
    assert _plan(scheduler) == waiting and certified == [scheduler]


def test_unmarked_requests_need_no_certificate(certified: list[Any]) -> None:
    scheduler = _Scheduler([_req(False)])
    weight_updates.forget_old_weights(scheduler)  # type: ignore[arg-type]
    assert _plan(scheduler) == scheduler.waiting_queue and not certified


@pytest.mark.parametrize("error", [CertificationError("no"), RankMismatch("no")])
def test_marked_requests_are_refused_once_certification_failed(
    certified: list[Any], observer: _Observer, error: Exception
) -> None:
    certified.append(error)
    unmarked = _req(False)
    scheduler = _Scheduler([_req(True), unmarked, _req(True)])
    weight_updates.forget_old_weights(scheduler)  # type: ignore[arg-type]
    assert scheduler.llm42_accepting_reqs and False not in observer.told, "nothing has failed yet"
    assert _plan(scheduler) == [unmarked] == scheduler.waiting_queue
    assert not scheduler.llm42_accepting_reqs and observer.told[-1] is False
    assert [abort.finished_reason["status_code"] for abort in scheduler.sent] == [503, 503]
    scheduler.idle = False
    scheduler.waiting_queue.append(_req(True))
    assert _plan(scheduler) == [unmarked] and len(scheduler.sent) == 3 and scheduler.flushed == 1
    certified.clear()
    assert observer.told[-1] is False
    weight_updates.forget_old_weights(scheduler)  # type: ignore[arg-type]
    assert scheduler.llm42_accepting_reqs and observer.told[-1] is True
    scheduler.idle, scheduler.waiting_queue = True, [_req(True)]
    assert len(_plan(scheduler)) == 1 and certified == [scheduler]


def test_sglangs_watchdog_looks_at_a_certification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a batch it would not, and a rank that waits for one that has failed has none."""
    from sglang.srt.managers.scheduler_components import invariant_checker

    scheduler: Any = SimpleNamespace(forward_ct=7, is_initializing=False, cur_batch_for_debug=None)
    monkeypatch.setattr(invariant_checker, "WatchdogRaw", lambda **kwargs: SimpleNamespace(**kwargs))
    watchdog: Any = invariant_checker.create_scheduler_watchdog(scheduler, watchdog_timeout=300)
    seen: list[bool] = []

    def certify(scheduler: Any) -> None:
        # Another count than before: else its time would have begun with the last batch, hours ago perhaps.
        seen.append(watchdog.is_active() and watchdog.get_counter() != 7 and watchdog.dump_info() == "")
        raise CertificationError("no")

    monkeypatch.setattr(scheduler_hooks, "_certify", certify)
    assert not watchdog.is_active()
    with pytest.raises(CertificationError):
        scheduler_hooks.certify(scheduler)
    assert seen == [True] and not watchdog.is_active()


def test_an_error_that_may_be_one_ranks_alone_is_not_survived(
    certified: list[Any], observer: _Observer
) -> None:
    """The other ranks wait for this one within the certification; SGLang ends them all."""
    certified.append(MemoryError("on this rank"))
    scheduler = _Scheduler([_req(True)])
    weight_updates.forget_old_weights(scheduler)  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        _plan(scheduler)
    assert False not in observer.told
