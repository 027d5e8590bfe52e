"""Reading the mark of a request on its way from the tokenizer manager to the scheduler.

Every interface (``/generate``, the OpenAI endpoints, ``sglang.Engine``) ends in
``TokenizerManager._create_tokenized_object``. A ``ValueError`` raised there becomes a 400 of the HTTP server
and is passed on by the engine.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sglang_ext.llm42.config import CANONICAL_NAMESPACE
from sglang_ext.llm42.observability.log_line import WEIGHT_VERSION_KEY
from sglang_ext.llm42.request import DEFAULT_SEED
from sglang_ext.llm42.server import bodies, fields
from sglang_ext.llm42.server.marks import MARK_FIELD, is_marked, mark_of, with_mark
from sglang_ext.llm42.server.refusals import refuse_unsupported

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from starlette.requests import Request


def generate_request(
    original: Callable[..., Any], manager: TokenizerManager, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around ``TokenizerManager.generate_request``: check what SGLang computes with before it tokenizes.

    Raises:
        ValueError: the mark is not a bool, or a field of a marked request is of the wrong type.
    """
    from starlette.requests import Request

    request = args[0] if args else kwargs.get("request")
    if isinstance(request, Request):
        return _generate_from_http(original, manager, obj, request)
    _check_first(manager, obj)
    return original(manager, obj, *args, **kwargs)


async def _generate_from_http(
    original: Callable[..., Any], manager: TokenizerManager, obj: Any, request: Request
) -> AsyncGenerator[Any, None]:
    """The same for a request that came over HTTP: its endpoint may have dropped the mark."""
    bodies.apply(obj, await bodies.said_in(request))
    _check_first(manager, obj)
    async with aclosing(original(manager, obj, request)) as responses:
        async for response in responses:
            yield response


def _check_first(manager: TokenizerManager, obj: Any) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    if isinstance(obj, GenerateReqInput):
        given = obj.sampling_params
        for params in given if isinstance(given, list) else [given]:
            if isinstance(params, dict) and _is_to_be_marked(manager, params):
                fields.check_first(params)


def create_tokenized_object(
    original: Callable[..., Any],
    manager: TokenizerManager,
    obj: Any,
    input_text: Any,
    input_ids: list[int] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around ``TokenizerManager._create_tokenized_object``: translate and check the mark.

    Raises:
        ValueError: the mark is not a bool, this server does not serve deterministic requests, a field of the
            request is of the wrong type, or it asks for something that they cannot have.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(obj, GenerateReqInput):
        return original(manager, obj, input_text, input_ids, *args, **kwargs)
    _keep_namespace_apart(obj.extra_key)
    if not _take_mark(manager, obj):
        return original(manager, obj, input_text, input_ids, *args, **kwargs)
    fields.check_request(obj, input_ids, manager.model_config.vocab_size)
    tokenized = original(manager, obj, input_text, input_ids, *args, **kwargs)
    refuse_unsupported(obj, tokenized)
    if getattr(manager.server_args, "llm42_commit_log", None):
        # Only this process is told when the version changes.
        tokenized.sampling_params.custom_params[WEIGHT_VERSION_KEY] = manager.config_value("weight_version")
    return tokenized


def _keep_namespace_apart(extra_key: Any) -> None:
    """Refuse a key with which an unmarked request could leave its KV where marked ones look for canonical KV.

    Raises:
        ValueError: ``extra_key`` names the namespace of canonical KV.
    """
    if isinstance(extra_key, str) and CANONICAL_NAMESPACE in extra_key:
        raise ValueError(f"extra_key (or cache_salt) must not contain {CANONICAL_NAMESPACE!r}.")


def _take_mark(manager: TokenizerManager, obj: GenerateReqInput) -> bool:
    """Whether ``obj`` is deterministic; its sampling parameters are then as the scheduler reads them."""
    params = obj.sampling_params
    if manager.preferred_sampling_params:
        params = {**manager.preferred_sampling_params, **params}
    mark = _is_to_be_marked(manager, params)
    if mark and not getattr(manager.server_args, "enable_llm42", False):
        raise ValueError(f"{MARK_FIELD}: this server was started without --enable-llm42.")
    if mark:
        fields.check_sampling(params, manager.model_config.vocab_size)
    if mark or MARK_FIELD in params or mark_of(params) is not None:
        # A new dict: the same one may stand in several requests of a batch.
        obj.sampling_params = with_mark(params, mark)
    return mark


def _is_to_be_marked(manager: TokenizerManager, params: Mapping[str, Any]) -> bool:
    said = mark_of(params)
    return getattr(manager.server_args, "llm42_mark_all", False) if said is None else said


def send_one_request(manager: TokenizerManager, tokenized: Any) -> None:
    """Before ``TokenizerManager._send_one_request``: with n > 1, give each sample its own seed.

    SGLang sends a parallel request once without output, to cache the prompt, and then n copies of it. Sample
    0 uses the request's seed itself.
    """
    logical_rid = manager.child_rid_to_logical_rid.get(tokenized.rid)
    if logical_rid is None or not is_marked(tokenized.sampling_params.custom_params):
        return
    from sglang_ext.llm42.sampling import derive_seed

    parent: Any = manager.rid_to_state[logical_rid]
    sample = parent.llm42_next_sample = getattr(parent, "llm42_next_sample", -2) + 1
    if sample <= 0:
        return
    params = copy.copy(tokenized.sampling_params)
    if params.sampling_seed is None:
        params.sampling_seed = DEFAULT_SEED
        manager.rid_to_state[tokenized.rid].llm42_seed_is_default = True
    params.sampling_seed = derive_seed(params.sampling_seed, sample)
    tokenized.sampling_params = params
