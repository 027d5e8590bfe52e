"""Which waiting requests a prefill batch may take: all marked or all unmarked, and neither kind starves.

Pure logic: the hooks in :mod:`sglang_ext.llm42.scheduler_hooks` ask, SGLang's own loop over its waiting queue
does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_ext.llm42 import request as deterministic

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

#: Requests that a prefill batch passes over at most. SGLang looks each of them up in its prefix cache.
MAX_PASSED_OVER = 16


class Admission:
    """Whose turn it is in the waiting queue of one scheduler.

    The head of the queue decides of which kind a turn's prefill batch is. Requests of the other kind are
    passed over, so that mixed traffic is not cut into a batch of a request or two at every turn.

    A schedule policy that sorts the queue anew each turn might put the same kind first for ever. So the first
    request that a turn passes over is *owed* the next: it stands at the head then. It is tried once; if there
    is no room for it, it waits on where SGLang sorts it. While both kinds are reached they take turns; within
    a kind the order is SGLang's.

    With priority scheduling a higher priority goes first, as in SGLang: the owed request stands at the head
    of its own priority, and decides once none of a higher one waits. But it is passed over no second time, so
    that neither kind of its priority overtakes the other for ever, and nobody of a lower priority overtakes
    whom the turn passes over.
    """

    def __init__(self) -> None:
        self._owed: Req | None = None
        self._passed_over: list[Req] = []
        self._by_priority = False

    def begin_turn(self, waiting: list[Req], by_priority: bool) -> None:
        """A turn begins: ``waiting``, sorted by SGLang, is put in the order in which it is tried, in place.

        Args:
            waiting: the waiting queue; with ``by_priority`` requests of one priority stand together.
            by_priority: whether SGLang schedules by priority; otherwise a request's means nothing.
        """
        self._by_priority = by_priority
        self._passed_over.clear()
        places = [place for place, req in enumerate(waiting) if req is self._owed]
        if not places:
            self._owed = None  # nobody is, or it has been admitted or aborted
            return
        owed = waiting.pop(places[0])
        equals = (place for place, req in enumerate(waiting) if req.priority == owed.priority)
        waiting.insert(next(equals, places[0]) if by_priority else 0, owed)

    def admits(self, batch: Sequence[Req], req: Req) -> bool:
        """Whether ``batch``, as it is, takes ``req`` if there is room."""
        if batch and deterministic.has_state(batch[0]) != deterministic.has_state(req):
            return False
        if self._by_priority and self._passed_over:
            return req.priority == self._passed_over[0].priority
        return True

    def tried(self, req: Req) -> None:
        """``req`` is admitted now, room permitting."""
        if req is self._owed:
            self._owed = None

    def passes_over(self, batch: Sequence[Req], req: Req, has_part: bool) -> bool:
        """Note that ``batch`` does not take ``req``, and say whether it may take others behind.

        Args:
            batch: what the turn has admitted.
            req: a request that is not admitted (:meth:`admits`).
            has_part: whether the batch holds a part of a long prompt. While one is computed its kind is that
                of every batch, so the batch must not take the next long prompt behind ``req``.
        """
        if deterministic.has_state(batch[0]) == deterministic.has_state(req):
            return False  # of lower priority than one that was passed over
        again = req is self._owed
        if not self._passed_over:
            self._owed = req
        if again or has_part or len(self._passed_over) == MAX_PASSED_OVER:
            return False
        self._passed_over.append(req)
        return True
