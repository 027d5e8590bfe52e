"""What happens when a rank is lost: requests in flight get an error, and the server ends."""

from __future__ import annotations

import logging
import os
import threading
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang_ext.ray import group as groups
from sglang_ext.ray.status import EXIT_RANK_LOST

if TYPE_CHECKING:
    from sglang_ext.ray.group import Group

logger = logging.getLogger(__name__)

#: What a client reads.
MESSAGE = "a rank of this server was lost; send the request again"

#: Seconds in which errors are given to requests in flight and to those that still arrive.
FAREWELL_S = 1.0

#: Seconds for ending what is left of the group: a node that is cut off does not answer.
CLOSE_TIMEOUT_S = 10.0


def start(result: None, tokenizer_manager: Any, startup_time: Any) -> None:
    """After ``TokenizerManager.set_startup_time``: all ranks are up, watch them."""
    group = groups.current()
    if group is not None:
        _add_endpoints(group.server_args)
        threading.Thread(target=watch, args=(group, tokenizer_manager), daemon=True).start()


def _add_endpoints(server_args: Any) -> None:
    """SGLang's Ray server has taken ``_setup_and_run_http_server`` before our hook on it was in place."""
    if server_args.use_ray and server_args.enable_llm42:
        from sglang_ext.llm42.server.endpoints import add_endpoints

        add_endpoints()


def watch(group: Group, tokenizer_manager: Any) -> None:
    """Wait for the end of a rank; unless the server is ending anyway, fail its requests and end it.

    A server started with ``--use-ray`` leaves with :data:`EXIT_RANK_LOST`; an engine inside another program
    only fails its requests.
    """
    group.block_until_lost()
    if tokenizer_manager.gracefully_exit or groups.current() is not group:
        return
    logger.error("A rank was lost: ending the requests in flight with status 503")
    deadline = time.monotonic() + FAREWELL_S
    while time.monotonic() < deadline:
        _on_event_loop(tokenizer_manager)
        time.sleep(0.1)
    if group.server_args.use_ray:
        leave(group, tokenizer_manager)


def _on_event_loop(tokenizer_manager: Any) -> None:
    loop = tokenizer_manager.event_loop
    if loop is not None:  # otherwise there was no request yet
        loop.call_soon_threadsafe(fail_requests, tokenizer_manager)


def fail_requests(tokenizer_manager: Any) -> int:
    """Give every request in flight an error, on the event loop that serves them.

    Returns:
        How many there were.
    """
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    tokenizer_manager.server_status = ServerStatus.UnHealthy
    reason = {
        "type": "abort",
        "message": MESSAGE,
        "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
        "err_type": "ServiceUnavailable",
    }
    requests = list(tokenizer_manager.rid_to_state)
    for rid in requests:
        tokenizer_manager._handle_abort_req(AbortReq(rid=rid, finished_reason=reason))
    return len(requests)


def leave(group: Group, tokenizer_manager: Any) -> None:
    """End this process and whatever belongs to it, in bounded time."""
    from sglang.srt.utils import kill_process_tree

    closing = threading.Thread(target=_close, args=(group,), daemon=True)
    closing.start()
    closing.join(CLOSE_TIMEOUT_S)
    if tokenizer_manager._subprocess_watchdog is not None:
        tokenizer_manager._subprocess_watchdog.stop()  # the children end on purpose
    kill_process_tree(os.getpid(), include_parent=False)
    os._exit(EXIT_RANK_LOST)


def _close(group: Group) -> None:
    try:
        logger.error("Lost: %s", ", ".join(group.lost_ranks()) or "none (a rank ended by itself, see above)")
        groups.close_current()
    except Exception:
        logger.exception("The rest of the group was left to Ray, which ends it with this process")
