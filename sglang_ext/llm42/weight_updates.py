"""What an update of the weights means for deterministic requests.

Canonical KV belongs to the weights that computed it. After an update no cached prefix may serve a marked
request, whether or not the caller asked SGLang to flush its cache, and a request that began under the old
weights has no well-defined output: it ends with an error (``docs/determinism.md``).

Row invariance was certified for the old weights as well. The first marked request after an update waits until
the new ones are: no request is admitted until those that run have ended, for the certification borrows from
the memory pools. (Not right after the update: weights often arrive in many parts, and the pools may be
released meanwhile.) If it fails, marked requests get a 503 and all others are served. Every rank decides
alike, because all see the same queue and the same batches.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang_ext.doctor.bench import CertificationError
from sglang_ext.doctor.fingerprint import RankMismatch
from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42 import scheduler_hooks

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

MESSAGE = "The weights were updated while this deterministic request was running; send it again."

NOT_CERTIFIED = (
    "This server cannot serve deterministic requests: its updated weights failed the check of row invariance."
)


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
    _accept(scheduler, True)
    # Smaller passes were compared with the full one under the old weights.
    runtime.verification.allow_sizes(())
    running = _end_running(scheduler)
    waiting = _end_waiting(scheduler, runtime.weights_generation)
    if running or waiting:
        logger.warning("Weights updated: %d deterministic requests end with an error.", running + waiting)


def plan_prefill(original: Callable[..., Any], scheduler: Any, *args: Any) -> Any:
    """``Scheduler.get_new_batch_prefill``, but no marked request begins before weights are certified."""
    grammars = scheduler.grammar_manager
    # With a grammar that is ready, a request enters the queue and may leave it within SGLang's own function.
    if scheduler.llm42_fingerprint is not None or not any(
        map(deterministic.has_state, (*scheduler.waiting_queue, *grammars.grammar_queue))
    ):
        return original(scheduler, *args)
    waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    compiling, grammars.grammar_queue = grammars.grammar_queue, []
    certify_if_idle(scheduler)
    if scheduler.llm42_accepting_reqs and scheduler.llm42_fingerprint is None:
        # What has begun goes on, a prompt that is computed in parts included; nothing else begins.
        plan = original(scheduler, *args)
        scheduler.waiting_queue = waiting + scheduler.waiting_queue
        grammars.grammar_queue = compiling
        return plan
    scheduler.waiting_queue, grammars.grammar_queue = waiting, compiling
    if not scheduler.llm42_accepting_reqs:
        _refuse_marked(scheduler)
    return original(scheduler, *args)


def _refuse_marked(scheduler: Any) -> None:
    """End marked requests that have not begun with an error; every other stays where it is."""
    grammars = scheduler.grammar_manager
    refused = [*filter(deterministic.has_state, (*scheduler.waiting_queue, *grammars.grammar_queue))]
    scheduler.waiting_queue = [req for req in scheduler.waiting_queue if not deterministic.has_state(req)]
    grammars.grammar_queue = [req for req in grammars.grammar_queue if not deterministic.has_state(req)]
    for req in refused:
        _send_error(scheduler, req, NOT_CERTIFIED)
    logger.error("%d deterministic requests were refused: %s", len(refused), NOT_CERTIFIED)


def certify_if_idle(scheduler: Any) -> None:
    """Certify updated weights unless that was tried; on every rank alike.

    The cache is emptied first: the fingerprint depends on how much room the probe has.

    Both errors that are caught are raised on every rank or on none. Any other may be one rank's alone, while
    the rest waits for it in a collective: it ends the scheduler, upon which SGLang ends the server.
    """
    if scheduler.llm42_fingerprint is not None or not scheduler.llm42_accepting_reqs:
        return
    if not scheduler.is_fully_idle():
        return
    scheduler.flush_cache()
    try:
        scheduler_hooks.certify(scheduler)
    except (CertificationError, RankMismatch):
        scheduler.llm42_fingerprint = None
        _accept(scheduler, False)
        logger.exception("The updated weights cannot be certified: deterministic requests get a 503")


def _accept(scheduler: Any, accepted: bool) -> None:
    scheduler.llm42_accepting_reqs = accepted
    scheduler_hooks.observer().accepting(accepted)


def _end_running(scheduler: Any) -> int:
    """End requests that hold memory; SGLang takes it back when it processes their next step."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    batches = (scheduler.running_batch, scheduler.last_batch)
    reqs = {req for batch in batches if batch is not None for req in batch.reqs}
    ended = [req for req in reqs if deterministic.has_state(req) and not req.finished()]
    for req in ended:
        req.to_finish = FINISH_ABORT(MESSAGE, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")
    return len(ended)


def _end_waiting(scheduler: Any, generation: int) -> int:
    """End retracted requests that have output already; those that have none begin under the new weights."""
    ended = [req for req in scheduler.waiting_queue if deterministic.has_state(req) and req.output_ids]
    scheduler.waiting_queue = [req for req in scheduler.waiting_queue if req not in ended]
    for req in ended:
        _send_error(scheduler, req, MESSAGE)
    for req in (*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue):
        deterministic.renew_namespace(req, generation)
    return len(ended)


def _send_error(scheduler: Any, req: Req, message: str) -> None:
    """Tell the client of a request that holds no memory that it has ended."""
    from sglang.srt.managers.io_struct import AbortReq

    reason = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": message}
    scheduler.ipc_channels.send_to_tokenizer.send_output(AbortReq(finished_reason=reason, rid=req.rid), req)
