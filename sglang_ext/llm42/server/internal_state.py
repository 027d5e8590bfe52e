"""The scheduler's end of the counters: they travel with SGLang's own internal state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Key of the counters in SGLang's internal state.
STATE_KEY = "llm42"

#: Key of a request to set them to zero.
RESET_KEY = "llm42_reset_statistics"


def get_internal_state(result: Any, scheduler: Any, recv_req: Any) -> None:
    """After ``Scheduler.get_internal_state``: add the runtime's counters."""
    result.internal_state[STATE_KEY] = scheduler.llm42.statistics.as_dict()


def set_internal_state(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """Around ``Scheduler.set_internal_state``: set the counters to zero if that is what is asked."""
    if RESET_KEY not in recv_req.server_args:
        return original(scheduler, recv_req)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    scheduler.llm42.statistics.reset()
    return SetInternalStateReqOutput(updated=True)
