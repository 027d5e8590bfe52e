"""What requests are told when a rank is lost, and when the server is left alone."""

from __future__ import annotations

import asyncio
import threading
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ext.ray import group, watch


class _TokenizerManager:
    """Those parts of SGLang's that the watch touches."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None, *rids: str) -> None:
        self.rid_to_state = dict.fromkeys(rids)
        self.event_loop = loop
        self.gracefully_exit = False
        self.server_status: Any = None
        self.aborted: dict[str, Any] = {}

    def _handle_abort_req(self, request: Any) -> None:
        self.aborted[request.rid] = request.finished_reason
        del self.rid_to_state[request.rid]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Groups whose server has left."""
    calls: list[object] = []
    monkeypatch.setattr(watch, "FAREWELL_S", 0.3)
    monkeypatch.setattr(watch, "leave", lambda group, manager: calls.append(group))
    return calls


def _group(monkeypatch: pytest.MonkeyPatch, use_ray: bool = True) -> Any:
    made = SimpleNamespace(block_until_lost=lambda: None, server_args=SimpleNamespace(use_ray=use_ray))
    monkeypatch.setattr(group, "_current", made)
    return made


@pytest.mark.parametrize("use_ray", [True, False])
def test_requests_in_flight_get_an_error(
    monkeypatch: pytest.MonkeyPatch, left: list[object], use_ray: bool
) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    lost = _group(monkeypatch, use_ray)
    manager = _TokenizerManager(loop, "a", "b")
    watch.watch(lost, manager)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    assert set(manager.aborted) == {"a", "b"}
    for reason in manager.aborted.values():
        assert reason["status_code"] == HTTPStatus.SERVICE_UNAVAILABLE and reason["message"] == watch.MESSAGE
    assert manager.server_status.name == "UnHealthy"
    assert left == ([lost] if use_ray else [])


def test_a_server_without_requests_leaves_too(monkeypatch: pytest.MonkeyPatch, left: list[object]) -> None:
    lost = _group(monkeypatch)
    watch.watch(lost, _TokenizerManager(None))
    assert left == [lost]


def test_the_end_of_ranks_of_a_server_that_ends_is_no_loss(
    monkeypatch: pytest.MonkeyPatch, left: list[object]
) -> None:
    ending = _group(monkeypatch)
    manager = _TokenizerManager(None, "a")
    manager.gracefully_exit = True
    watch.watch(ending, manager)
    monkeypatch.setattr(group, "_current", None)  # closed
    manager.gracefully_exit = False
    watch.watch(ending, manager)
    assert not manager.aborted and not left
