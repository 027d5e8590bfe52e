"""``is_deterministic`` at the top level of OpenAI requests.

SGLang's request models drop fields that they do not know. The mark is read from the request's JSON body and
continues in ``custom_params``, which the models do have.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sglang_ext.llm42.config import REQUEST_KEY
from sglang_ext.llm42.server.bodies import number_of_prompts
from sglang_ext.llm42.server.marks import MARK_FIELD, checked_mark, mark_in, with_mark


async def handle_request(
    original: Callable[..., Awaitable[Any]], serving: Any, request: Any, raw_request: Any
) -> Any:
    """Around ``OpenAIServingBase.handle_request``: keep the mark that the request model dropped."""
    try:
        await _keep_mark(request, raw_request)
    except ValueError as error:
        return serving.create_error_response(str(error), param=MARK_FIELD)
    return await original(serving, request, raw_request)


async def _keep_mark(request: Any, raw_request: Any) -> None:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest

    if raw_request is None or not isinstance(request, ChatCompletionRequest | CompletionRequest):
        return
    # A list there would be taken for one of ours, below.
    mark_in(request.custom_params)
    body = await raw_request.json()  # parsed already; Starlette keeps it
    mark = body.get(MARK_FIELD) if isinstance(body, dict) else None
    if mark is None:
        return
    mark = _marks_of_prompts(request, mark) if isinstance(mark, list) else checked_mark(mark)
    request.custom_params = {**(request.custom_params or {}), REQUEST_KEY: mark}


def _marks_of_prompts(request: Any, marks: list[Any]) -> bool | list[bool | None] | None:
    """Marks of the prompts of a batch; of a single prompt, its mark.

    Raises:
        ValueError: there is not one bool for each prompt.
    """
    prompts = number_of_prompts(getattr(request, "prompt", None))
    if len(marks) != (prompts or 1):
        raise ValueError(f"{MARK_FIELD} holds {len(marks)} values for {prompts or 1} prompts.")
    checked = [checked_mark(mark, f"{MARK_FIELD}[{i}]") for i, mark in enumerate(marks)]
    return checked[0] if prompts is None else checked


def build_sampling_params(params: dict[str, Any], serving: Any, request: Any) -> list[dict[str, Any]] | None:
    """After ``OpenAIServingCompletion._build_sampling_params``: one set per prompt where marks differ."""
    marks = (params.get("custom_params") or {}).get(REQUEST_KEY)
    if not isinstance(marks, list):
        return None
    return [_params_of_prompt(params, mark) for mark in marks]


def _params_of_prompt(params: dict[str, Any], mark: bool | None) -> dict[str, Any]:
    unmarked = with_mark(params, False)
    return unmarked if mark is None else {**unmarked, MARK_FIELD: mark}
