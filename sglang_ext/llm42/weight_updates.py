"""What an update of the weights means for deterministic requests.

Canonical KV belongs to the weights that computed it. After an update no cached prefix may serve a marked
request, whether or not the caller asked SGLang to flush its cache, and a request that began under the old
weights has no well-defined output: it ends with an error (``docs/determinism.md``).
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang_ext.llm42 import request as deterministic

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

MESSAGE = "The weights were updated while this deterministic request was running; send it again."


def weights_updated(result: Any, updater: Any, recv_req: Any) -> None:
    """After ``SchedulerWeightUpdaterManager.update_weights_from_*``, on every rank alike.

    An update that failed counts as well, as weights may have changed in part; only an update from disk is
    undone by SGLang itself.
    """
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    if not result.success and isinstance(recv_req, UpdateWeightFromDiskReqInput):
        return
    forget_old_weights(updater.scheduler)


def forget_old_weights(scheduler: Scheduler) -> None:
    """Put canonical KV of the old weights out of reach and end the requests that began with them."""
    runtime: Any = scheduler.llm42
    runtime.weights_generation += 1
    scheduler.llm42_fingerprint = None
    running = _end_running(scheduler)
    waiting = _end_waiting(scheduler, runtime.weights_generation)
    if running or waiting:
        logger.warning("Weights updated: %d deterministic requests end with an error.", running + waiting)


def _end_running(scheduler: Any) -> int:
    """End requests that hold memory; SGLang takes it back when it processes their next step."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    batches = (scheduler.running_batch, scheduler.last_batch)
    reqs = {req for batch in batches if batch is not None for req in batch.reqs}
    ended = [req for req in reqs if deterministic.of(req) is not None and not req.finished()]
    for req in ended:
        req.to_finish = FINISH_ABORT(MESSAGE, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")
    return len(ended)


def _end_waiting(scheduler: Any, generation: int) -> int:
    """End retracted requests that have output already; those that have none begin under the new weights."""
    ended = [req for req in scheduler.waiting_queue if deterministic.of(req) is not None and req.output_ids]
    scheduler.waiting_queue = [req for req in scheduler.waiting_queue if req not in ended]
    for req in ended:
        _send_error(scheduler, req)
    for req in (*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue):
        deterministic.renew_namespace(req, generation)
    return len(ended)


def _send_error(scheduler: Any, req: Req) -> None:
    """Tell the client of a request that holds no memory that it has ended."""
    from sglang.srt.managers.io_struct import AbortReq

    reason = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": MESSAGE}
    scheduler.ipc_channels.send_to_tokenizer.send_output(AbortReq(finished_reason=reason, rid=req.rid), req)
