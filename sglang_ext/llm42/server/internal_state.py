"""The scheduler's end of the counters: they travel with SGLang's own internal state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_ext.llm42 import weight_updates

#: Key of the counters in SGLang's internal state.
STATE_KEY = "llm42"

#: Key of the digest of the server's configuration, beside the counters.
CONFIGURATION_KEY = "llm42_configuration"

#: Key of the scheduler's data-parallel rank: SGLang gathers the states in the order in which they arrive.
RANK_KEY = "llm42_dp_rank"

#: Key of the canonical fingerprint, likewise; null after an update of the weights until
#: they are certified, and for good if that fails.
FINGERPRINT_KEY = "llm42_fingerprint"

#: Key of whether deterministic requests are accepted; false once the certification of updated weights failed.
ACCEPTING_KEY = "llm42_accepting_reqs"

#: Key of a request to set them to zero.
RESET_KEY = "llm42_reset_statistics"


def get_internal_state(result: Any, scheduler: Any, recv_req: Any) -> None:
    """After ``Scheduler.get_internal_state``: add the runtime's counters and state."""
    weight_updates.certify_if_idle(scheduler)
    result.internal_state[STATE_KEY] = scheduler.llm42.statistics.as_dict()
    result.internal_state[RANK_KEY] = scheduler.ps.dp_rank or 0
    result.internal_state[CONFIGURATION_KEY] = scheduler.llm42_configuration_digest
    result.internal_state[FINGERPRINT_KEY] = scheduler.llm42_fingerprint
    result.internal_state[ACCEPTING_KEY] = scheduler.llm42_accepting_reqs


def set_internal_state(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """Around ``Scheduler.set_internal_state``: set the counters to zero if that is what is asked."""
    if RESET_KEY not in recv_req.server_args:
        return original(scheduler, recv_req)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    scheduler.llm42.statistics.reset()
    return SetInternalStateReqOutput(updated=True)
