"""Reports of deterministic requests in ``meta_info``.

The scheduler sends a report as ``customized_info["llm42"]`` with every output of a marked request. SGLang
would append it to a list per request, and put such a list into unmarked requests of the same batch too. Here
the newest report is taken out beforehand and its keys are put into ``meta_info`` as they are.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sglang_ext.llm42.config import REQUEST_KEY
from sglang_ext.llm42.server.marks import is_marked

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


def handle_batch_output(
    original: Callable[..., Awaitable[None]], manager: TokenizerManager, output: Any
) -> Awaitable[None]:
    """Around ``TokenizerManager._handle_batch_output``: keep each marked request's newest report."""
    if getattr(output, "customized_info", None) is not None:
        _take_reports(manager, output)
    return original(manager, output)


def _take_reports(manager: TokenizerManager, output: Any) -> None:
    from sglang.srt.managers.io_struct import unwrap_from_pickle, wrap_as_pickle

    information = dict(unwrap_from_pickle(output.customized_info))
    reports = information.pop(REQUEST_KEY, None)
    output.customized_info = wrap_as_pickle(information) if information else None
    for rid, entries in zip(output.rids, reports or (), strict=False):
        state: Any = manager.rid_to_state.get(rid)
        if state is None or not entries or entries[-1] is None:
            continue
        state.llm42_report = entries[-1]
        if getattr(state, "llm42_seed_is_default", False):
            # The scheduler sees a seed derived from the default one.
            state.llm42_report["llm42_seed_is_default"] = True


def wait_one_response(
    original: Callable[..., AsyncGenerator[dict[str, Any], None]],
    manager: TokenizerManager,
    obj: Any,
    request: Any = None,
) -> AsyncGenerator[dict[str, Any], None]:
    """Around ``TokenizerManager._wait_one_response``: show a marked request's newest report."""
    responses = original(manager, obj, request)
    params = getattr(obj, "sampling_params", None) or {}
    if not is_marked(params.get("custom_params")):
        return responses
    return _with_report(responses, manager.rid_to_state[obj.rid])


async def _with_report(
    responses: AsyncGenerator[dict[str, Any], None], state: Any
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(responses):
        async for response in responses:
            response["meta_info"].update(getattr(state, "llm42_report", None) or {})
            yield response
