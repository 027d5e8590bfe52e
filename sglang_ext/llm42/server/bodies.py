"""``is_deterministic`` at the top level of a request's HTTP body, on every endpoint.

SGLang's request models drop fields that they do not know, each endpoint with its own model: ``/generate``,
``/vertex_generate``, ``/v1/responses``, ``/v1/messages``, ``/v1/score``, ``/v1/rerank`` and Ollama's. All
end in ``TokenizerManager.generate_request`` and pass the HTTP request along, whose body is read again there.
``/v1/completions`` and ``/v1/chat/completions`` have a place for the mark already (:mod:`openai`), so that a
wrong one is refused in their own form.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from sglang_ext.llm42.server.marks import MARK_FIELD, checked_mark, mark_of

if TYPE_CHECKING:
    from starlette.requests import Request

#: What the body of a request says: nothing, one mark, or one for each of its prompts.
Said = bool | list[bool | None] | None


async def said_in(request: Request) -> Said:
    """What the body of an HTTP request says about the mark.

    Raises:
        ValueError: a mark is not a bool.
    """
    body = await _fields(request)
    said = body.get(MARK_FIELD)
    if said is None and isinstance(instances := body.get("instances"), list):
        # Vertex: one prompt each.
        said = [each.get(MARK_FIELD) if isinstance(each, Mapping) else None for each in instances]
        said = said if any(mark is not None for mark in said) else None
    if isinstance(said, list):
        return [checked_mark(mark, f"{MARK_FIELD}[{i}]") for i, mark in enumerate(said)]
    return checked_mark(said)


async def _fields(request: Request) -> Mapping[str, Any]:
    """The fields of the body; Starlette keeps what was parsed already."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        form = dict(await request.form())
        words = {"true": True, "false": False}
        return {name: words.get(value, value) for name, value in form.items() if isinstance(value, str)}
    try:
        body = await request.json()
    except ValueError:
        return {}  # no body
    return body if isinstance(body, Mapping) else {}


def apply(obj: Any, said: Said) -> None:
    """Put what the body said into the sampling parameters of ``obj``, where these say nothing themselves.

    Raises:
        ValueError: there is not one mark for each prompt, or a mark for what generates nothing.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(obj, GenerateReqInput):
        if _asks(said) or _marked(obj.sampling_params):
            raise ValueError(f"{MARK_FIELD} is for generated tokens; this request generates none.")
        return
    given = obj.sampling_params
    if said is None or (not isinstance(given, list) and mark_of(given or {}) is not None):
        return
    prompts = number_of_prompts(obj.text if obj.text is not None else obj.input_ids)
    if not isinstance(said, list):
        said = [said] * (prompts or 1)
    if len(said) != (prompts or 1):
        raise ValueError(f"{MARK_FIELD} holds {len(said)} values for {prompts or 1} prompts.")
    if prompts is None:
        obj.sampling_params = _with(given or {}, said[0])
        return
    each = given if isinstance(given, list) else [given] * prompts
    if len(each) == prompts:  # else SGLang's to refuse
        obj.sampling_params = [_with(params or {}, mark) for params, mark in zip(each, said, strict=True)]


def number_of_prompts(prompt: Any) -> int | None:
    """Number of prompts in a batch; None for a single prompt, be it text or token ids (or a chat)."""
    if not isinstance(prompt, list) or (prompt and isinstance(prompt[0], int)):
        return None
    return len(prompt)


def _with(params: dict[str, Any], mark: bool | None) -> dict[str, Any]:
    return params if mark is None or mark_of(params) is not None else {**params, MARK_FIELD: mark}


def _asks(said: Said) -> bool:
    """Whether any prompt is to be marked."""
    return True in said if isinstance(said, list) else said is True


def _marked(params: Any) -> bool:
    each = params if isinstance(params, list) else [params]
    return any(isinstance(one, Mapping) and mark_of(one) is True for one in each)


# Endpoints whose own errors hide what is wrong: a mark is looked at before they begin.


async def create_responses(
    original: Callable[..., Awaitable[Any]], serving: Any, request: Any, raw_request: Any = None, **more: Any
) -> Any:
    """Around ``OpenAIServingResponses.create_responses``."""
    try:
        await _check(serving.tokenizer_manager, raw_request)
    except ValueError as error:
        return serving.create_error_response(str(error), param=MARK_FIELD)
    return await original(serving, request, raw_request, **more)


async def handle_messages(
    original: Callable[..., Awaitable[Any]], serving: Any, request: Any, raw_request: Any
) -> Any:
    """Around ``AnthropicServing.handle_messages``."""
    try:
        await _check(serving.openai_serving_chat.tokenizer_manager, raw_request)
    except ValueError as error:
        return serving._error_response(
            status_code=400, error_type="invalid_request_error", message=str(error)
        )
    return await original(serving, request, raw_request)


async def handle_ollama(
    original: Callable[..., Awaitable[Any]], serving: Any, request: Any, raw_request: Any
) -> Any:
    """Around ``OllamaServing.handle_chat`` and ``handle_generate``, which answer 500 to whatever is wrong."""
    from fastapi.responses import ORJSONResponse

    try:
        await _check(serving.tokenizer_manager, raw_request)
        _check_said(serving.tokenizer_manager, mark_of(request.options or {}))
        return await original(serving, request, raw_request)
    except ValueError as error:
        return ORJSONResponse({"error": str(error)}, status_code=400)


def ollama_sampling_params(
    params: dict[str, Any], serving: Any, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """After ``OllamaServing._convert_options_to_sampling_params``: the mark, and a seed under SGLang's name.

    SGLang keeps Ollama's name, which ``SamplingParams`` does not know.
    """
    mark = mark_of(options or {})
    named = {("sampling_seed" if name == "seed" else name): value for name, value in params.items()}
    return named if mark is None else {**named, MARK_FIELD: mark}


async def _check(manager: Any, raw_request: Any) -> None:
    if raw_request is not None:
        _check_said(manager, await said_in(raw_request))


def _check_said(manager: Any, said: Said) -> None:
    """Refuse what would be refused later, in the middle of a stream.

    Raises:
        ValueError: deterministic requests are not served here.
    """
    if _asks(said) and not getattr(manager.server_args, "enable_llm42", False):
        raise ValueError(f"{MARK_FIELD}: this server was started without --enable-llm42.")
