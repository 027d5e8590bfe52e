"""Marks of requests on their way to the scheduler, and reports on their way back, on SGLang's own objects."""

from __future__ import annotations

import asyncio
import copy
import json
import types
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.managers.io_struct import (
    BatchTokenIDOutput,
    EmbeddingReqInput,
    GenerateReqInput,
    SetInternalStateReq,
    TokenizedGenerateReqInput,
    unwrap_from_pickle,
    wrap_as_pickle,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42.config import CANONICAL_NAMESPACE, REQUEST_KEY
from sglang_ext.llm42.observability.log_line import WEIGHT_VERSION_KEY
from sglang_ext.llm42.sampling import derive_seed
from sglang_ext.llm42.server import (
    bodies,
    endpoints,
    intake,
    internal_state,
    marks,
    openai,
    refusals,
    reports,
)

VOCABULARY = 100


class _TimeStats:
    def set_tokenize_finish_time(self) -> None:
        pass


def _manager(**server_args: Any) -> Any:
    """What ``TokenizerManager._create_tokenized_object`` reads of its manager."""
    arguments = {"enable_llm42": True, "llm42_mark_all": False, "disaggregation_transfer_backend": "nixl"}
    return types.SimpleNamespace(
        server_args=types.SimpleNamespace(**arguments | server_args),
        preferred_sampling_params=server_args.pop("preferred", None),
        sampling_params_class=SamplingParams,
        tokenizer=None,
        model_config=types.SimpleNamespace(vocab_size=VOCABULARY),
        rid_to_state={},
        child_rid_to_logical_rid={},
    )


def _request(params: dict[str, Any] | None = None, **fields: Any) -> GenerateReqInput:
    obj = GenerateReqInput(input_ids=[1, 2, 3], sampling_params=params, **fields)
    obj.normalize_batch_and_arguments()
    return obj


def _tokenize(obj: GenerateReqInput, manager: Any = None, **arguments: Any) -> TokenizedGenerateReqInput:
    """What the scheduler would get of ``obj``, through SGLang's own function and our hook around it."""
    manager = manager or _manager()
    manager.rid_to_state[obj.rid] = types.SimpleNamespace(time_stats=_TimeStats())
    return intake.create_tokenized_object(
        TokenizerManager._create_tokenized_object, manager, obj, "text", [1, 2, 3], **arguments
    )


def _custom(obj: GenerateReqInput, manager: Any = None) -> dict[str, Any] | None:
    return _tokenize(obj, manager).sampling_params.custom_params


# Marks


@pytest.mark.parametrize(
    "params",
    [{"is_deterministic": True}, {"custom_params": {"llm42": True}}, {"custom_params": {REQUEST_KEY: True}}],
)
def test_mark_reaches_the_scheduler(params: dict[str, Any]) -> None:
    given = copy.deepcopy(params)
    assert _custom(_request(params)) == {REQUEST_KEY: True}
    assert params == given, "the client's own dict is not ours to change"


@pytest.mark.parametrize(
    "params",
    [None, {}, {"is_deterministic": False}, {"is_deterministic": None}, {"custom_params": {"llm42": False}}],
)
def test_unmarked_requests_stay_unmarked(params: dict[str, Any] | None) -> None:
    assert not _custom(_request(params))


def test_unmarked_requests_are_not_touched() -> None:
    params = {"temperature": 0.5, "custom_params": {"mine": 1}, "regex": "a+"}
    obj = _request(params)
    assert _custom(obj) == {"mine": 1}
    assert obj.sampling_params is params


@pytest.mark.parametrize("custom", ["text", [1], 5])
def test_unmarked_requests_may_have_anything_in_custom_params(custom: Any) -> None:
    """SGLang serves them; looking for a mark in there ended the scheduler."""
    manager, obj = _manager(), _request({"custom_params": custom})
    sent = _tokenize(obj, manager)
    assert sent.sampling_params.custom_params == custom
    manager.child_rid_to_logical_rid[sent.rid] = obj.rid
    intake.send_one_request(manager, sent)
    assert _collect(manager, obj)[0] == {"completion_tokens": 1}
    req = types.SimpleNamespace(sampling_params=sent.sampling_params, extra_key=None)
    deterministic.attach(req, 0)
    assert deterministic.of(req) is None and req.extra_key is None


def test_other_parameters_stay() -> None:
    params = {
        "is_deterministic": True,
        "sampling_seed": 7,
        "temperature": 0.5,
        "stop_token_ids": [5],
        "custom_params": {"mine": 1},
    }
    sent = _tokenize(_request(params)).sampling_params
    assert sent.custom_params == {"mine": 1, REQUEST_KEY: True}
    assert (sent.sampling_seed, sent.temperature, sent.stop_token_ids) == (7, 0.5, {5})


@pytest.mark.parametrize("mark", ["yes", 1, 0, [True], {}])
def test_wrong_type_names_the_field(mark: Any) -> None:
    with pytest.raises(ValueError, match="is_deterministic must be true or false"):
        _tokenize(_request({"is_deterministic": mark}))
    with pytest.raises(ValueError, match=r"custom_params\.llm42 must be true or false"):
        _tokenize(_request({"custom_params": {REQUEST_KEY: mark}}))


@pytest.mark.parametrize("params", [{"is_deterministic": True}, {"custom_params": {"llm42": True}}])
def test_marked_request_is_refused_without_the_flag(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--enable-llm42"):
        _tokenize(_request(params), _manager(enable_llm42=False))


def test_false_mark_is_accepted_without_the_flag() -> None:
    assert not _custom(_request({"is_deterministic": False}), _manager(enable_llm42=False))


def test_mark_all_marks_what_says_nothing() -> None:
    manager = _manager(llm42_mark_all=True)
    assert _custom(_request({}), manager) == {REQUEST_KEY: True}
    assert _custom(_request(None), manager) == {REQUEST_KEY: True}
    assert not _custom(_request({"is_deterministic": False}), manager)
    assert not _custom(_request({"custom_params": {"llm42": False}}), manager)


def test_the_commit_log_learns_the_weight_version() -> None:
    manager = _manager(llm42_commit_log="log")
    manager.config_value = {"weight_version": "w3"}.__getitem__
    params = {"is_deterministic": True, "custom_params": {"mine": 1}}
    assert _custom(_request(params), manager) == {REQUEST_KEY: True, WEIGHT_VERSION_KEY: "w3", "mine": 1}
    assert params["custom_params"] == {"mine": 1}, "the client's own dict is not ours to change"
    assert not _custom(_request({}), manager)


def test_mark_all_leaves_embedding_requests_alone() -> None:
    obj = EmbeddingReqInput(input_ids=[1, 2], sampling_params={})
    sent: list[Any] = []
    intake.create_tokenized_object(
        lambda manager, obj, *args: sent.append(obj.sampling_params),
        _manager(llm42_mark_all=True),
        obj,
        None,
        [1, 2],
    )
    assert sent == [{}]


def test_preferred_parameters_of_the_server_count() -> None:
    manager = _manager(preferred={"custom_params": {"llm42": True}, "temperature": 0.25})
    sent = _tokenize(_request({"top_p": 0.5}), manager).sampling_params
    assert sent.custom_params == {REQUEST_KEY: True}
    assert (sent.temperature, sent.top_p) == (0.25, 0.5)
    assert not _custom(_request({"is_deterministic": False}), manager)


def test_batch_is_marked_prompt_by_prompt() -> None:
    obj = GenerateReqInput(
        input_ids=[[1], [2], [3]],
        sampling_params=[{"is_deterministic": True}, {}, {"is_deterministic": False}],
    )
    obj.normalize_batch_and_arguments()
    assert [bool(_custom(obj[i])) for i in range(3)] == [True, False, False]


def test_shared_parameters_of_a_batch_are_copied() -> None:
    obj = GenerateReqInput(input_ids=[[1], [2]], sampling_params={"is_deterministic": True})
    obj.normalize_batch_and_arguments()
    assert _custom(obj[0]) == {REQUEST_KEY: True}
    assert obj[1].sampling_params == {"is_deterministic": True}
    assert _custom(obj[1]) == {REQUEST_KEY: True}


# Fields of the wrong type

WRONG: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("temperature", {"temperature": "0.5"}, {}),
    ("custom_params", {"custom_params": "text"}, {}),
    ("temprature", {"temprature": 0.5}, {}),
    ("top_logprobs_num", {}, {"return_logprob": True, "top_logprobs_num": VOCABULARY + 1}),
    ("extra_key", {}, {"extra_key": ["a"]}),
    ("return_hidden_states", {}, {"return_hidden_states": []}),
]


@pytest.mark.parametrize(("field", "params", "fields"), WRONG, ids=lambda value: str(value))
def test_wrong_types_are_named_before_sglang_reads_them(
    field: str, params: dict[str, Any], fields: dict[str, Any]
) -> None:
    sent: list[Any] = []

    def tokenize(*args: Any) -> None:
        sent.append(args)

    def send(params: dict[str, Any]) -> None:
        obj = _request(params, **fields)
        intake.create_tokenized_object(tokenize, _manager(), obj, "text", [1, 2, 3])

    with pytest.raises(ValueError, match=field):
        send({"is_deterministic": True, **params})
    assert not sent
    send(params)
    send({"is_deterministic": False, **params})
    assert len(sent) == 2, "unmarked requests are SGLang's to judge"


READ_FIRST: list[tuple[str, Any]] = [("n", "2"), ("n", None), ("n", 1.5), ("max_new_tokens", "5")]


@pytest.mark.parametrize("how", ["one", "batch", "mark all"])
@pytest.mark.parametrize(("field", "value"), READ_FIRST, ids=str)
def test_what_sglang_computes_with_first_is_named_before(field: str, value: Any, how: str) -> None:
    """Each of these was a 500: the first of SGLang's own functions raised a TypeError."""
    mark = {} if how == "mark all" else {"is_deterministic": True}
    wrong = {"max_new_tokens": 4, **mark, field: value}
    fields = {"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, wrong]}
    if how != "batch":
        fields = {"input_ids": [1], "sampling_params": wrong}
    sent: list[Any] = []

    def send(obj: GenerateReqInput, **server_args: Any) -> None:
        intake.generate_request(lambda manager, obj: sent.append(obj), _manager(**server_args), obj)

    with pytest.raises(ValueError, match=f"^{field} must be "):
        send(GenerateReqInput(**fields), llm42_mark_all=how == "mark all")
    assert not sent
    send(GenerateReqInput(input_ids=[1], sampling_params={field: value}))
    send(GenerateReqInput(input_ids=[1], sampling_params={"n": 2, "is_deterministic": True}))
    send(GenerateReqInput(input_ids=[1]))
    assert len(sent) == 3, "unmarked requests are SGLang's to judge"


def test_prompts_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        intake.create_tokenized_object(
            lambda *args: None, _manager(), _request({"is_deterministic": True}), "", []
        )


@pytest.mark.parametrize("params", [{}, {"is_deterministic": True}])
def test_nobody_names_the_namespace_of_canonical_kv(params: dict[str, Any]) -> None:
    """An unmarked request could leave its own KV there, for marked ones to find."""
    with pytest.raises(ValueError, match="extra_key"):
        _tokenize(_request(params, extra_key="mine" + CANONICAL_NAMESPACE + "0"))
    assert _tokenize(_request(params, extra_key="mine")).extra_key == "mine"


# Refusals

REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("return_sampling_mask", {}, {"return_sampling_mask": True}),
    ("return_entropy", {}, {"return_entropy": True}),
    ("return_hidden_states", {}, {"return_hidden_states": True}),
    ("return_routed_experts", {}, {"return_routed_experts": True}),
    ("return_indexer_topk", {}, {"return_indexer_topk": True}),
    ("multi_item_delimiter_indices", {}, {"multi_item_delimiter_indices": [1]}),
    ("image_data", {}, {"image_data": "image.png"}),
    ("video_data", {}, {"video_data": "video.mp4"}),
    ("audio_data", {}, {"audio_data": "audio.wav"}),
    ("max_thinking_tokens", {}, {"max_thinking_tokens": 10}),
    ("lora_path", {}, {"lora_id": "adapter"}),
    ("session_params", {}, {"session_params": {"id": "1"}}),
]

#: Fields that need more than a request's own field: see the tests by name.
REFUSED_ELSEWHERE = {"input_embeds", "positional_embed_overrides"}


@pytest.mark.parametrize(("field", "params", "fields"), REFUSED, ids=lambda value: str(value))
def test_unsupported_request_names_the_field(
    field: str, params: dict[str, Any], fields: dict[str, Any]
) -> None:
    tokenizer = types.SimpleNamespace(encode=lambda text, **kwargs: [1])
    manager = _manager()
    manager.tokenizer = tokenizer
    with pytest.raises(ValueError, match=f"does not support: {field} "):
        _tokenize(_request({"is_deterministic": True, **params}, **fields), manager)
    _tokenize(_request(params, **fields), manager)


@pytest.mark.parametrize("field", sorted(REFUSED_ELSEWHERE))
def test_embeddings_are_refused(field: str) -> None:
    arguments = {"input_embeds": [[0.5]]} if field == "input_embeds" else {}
    obj = _request({"is_deterministic": True})
    if not arguments:
        obj.positional_embed_overrides = types.SimpleNamespace()
    with pytest.raises(ValueError, match=f"does not support: {field} "):
        _tokenize(obj, **arguments)


def test_every_refusal_is_tried() -> None:
    tried = {field for field, _, _ in REFUSED} | REFUSED_ELSEWHERE
    assert tried == {row.field for row in refusals.REFUSED_PER_REQUEST}


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(ValueError, match=r"return_entropy \(.*\); return_hidden_states \("):
        _tokenize(_request({"is_deterministic": True}, return_entropy=True, return_hidden_states=True))


def test_what_works_is_not_refused() -> None:
    params = {
        "is_deterministic": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "sampling_seed": -(2**63),
        "stop_token_ids": [3],
        "ignore_eos": True,
        "max_new_tokens": 9,
        "skip_special_tokens": False,
        "frequency_penalty": 0,
        "repetition_penalty": None,
        "logit_bias": {},
        "regex": "",
    }
    obj = _request(params, stream=True, image_data=[], session_id="conversation")
    assert _tokenize(obj).sampling_params.custom_params == {REQUEST_KEY: True}


# Seeds of parallel samples


def _send_samples(params: dict[str, Any], samples: int) -> tuple[list[int | None], list[Any]]:
    """Seeds and states of the copies that SGLang sends of one parallel request (without the first, which
    only caches the prompt)."""
    manager = _manager()
    obj = GenerateReqInput(input_ids=[1, 2, 3], sampling_params={"n": samples, **params})
    obj.normalize_batch_and_arguments()
    tokenized = _tokenize(obj[0], manager)
    seeds, states = [], []
    for child in range(samples + 1):
        sent = copy.copy(tokenized)
        sent.rid = f"child-{child}"
        manager.child_rid_to_logical_rid[sent.rid] = obj[0].rid
        manager.rid_to_state[sent.rid] = types.SimpleNamespace()
        assert intake.send_one_request(manager, sent) is None
        seeds.append(sent.sampling_params.sampling_seed)
        states.append(manager.rid_to_state[sent.rid])
    assert tokenized.sampling_params.sampling_seed == params.get("sampling_seed")
    return seeds[1:], states[1:]


def test_each_sample_has_its_own_seed() -> None:
    seeds, states = _send_samples({"is_deterministic": True, "sampling_seed": 9}, 4)
    assert seeds == [9, derive_seed(9, 1), derive_seed(9, 2), derive_seed(9, 3)]
    assert len(set(seeds)) == 4
    assert not any(hasattr(state, "llm42_seed_is_default") for state in states)


def test_samples_of_the_default_seed() -> None:
    seeds, states = _send_samples({"is_deterministic": True}, 3)
    assert seeds == [None, derive_seed(42, 1), derive_seed(42, 2)]
    assert [getattr(state, "llm42_seed_is_default", False) for state in states] == [False, True, True]


def test_unmarked_samples_keep_their_seed() -> None:
    assert _send_samples({"sampling_seed": 9}, 3)[0] == [9, 9, 9]


def test_single_requests_keep_their_seed() -> None:
    manager = _manager()
    sent = _tokenize(_request({"is_deterministic": True, "sampling_seed": 9}), manager)
    intake.send_one_request(manager, sent)
    assert sent.sampling_params.sampling_seed == 9


# OpenAI


class _Serving:
    """Stands where SGLang's serving handlers do; records what it would handle."""

    def create_error_response(self, message: str, param: str | None = None) -> tuple[str, str | None]:
        return message, param


def _openai(request: Any, body: Any) -> Any:
    async def original(serving: Any, request: Any, raw_request: Any) -> Any:
        return request

    async def parsed() -> Any:
        return body

    raw_request = types.SimpleNamespace(json=parsed)
    return asyncio.run(openai.handle_request(original, _Serving(), request, raw_request))


def _completion(prompt: Any, mark: Any, **fields: Any) -> Any:
    """Sampling parameters that SGLang's completion handler would pass on."""
    body = {"prompt": prompt, "is_deterministic": mark, **fields}
    request = _openai(CompletionRequest(**body), body)
    if not isinstance(request, CompletionRequest):
        return request
    params = OpenAIServingCompletion._build_sampling_params(None, request)  # type: ignore[arg-type]
    return openai.build_sampling_params(params, None, request) or params


def test_completion_mark() -> None:
    params = _completion("a", True, seed=5, custom_params={"mine": 1})
    assert marks.mark_of(params) is True
    assert params["sampling_seed"] == 5 and params["custom_params"]["mine"] == 1
    assert marks.mark_of(_completion("a", False)) is False
    assert marks.mark_of(_completion("a", None)) is None


@pytest.mark.parametrize("prompt", [["a", "b", "c"], [[1], [2, 3], [4]]])
def test_completion_batch_of_marks(prompt: Any) -> None:
    params = _completion(prompt, [True, False, None], temperature=0.5)
    assert [marks.mark_of(p) for p in params] == [True, False, None]
    assert [p["temperature"] for p in params] == [0.5] * 3


def test_completion_batch_reaches_the_scheduler() -> None:
    obj = GenerateReqInput(input_ids=[[1], [2]], sampling_params=_completion([[1], [2]], [True, False]))
    obj.normalize_batch_and_arguments()
    manager = _manager()
    manager.tokenizer = types.SimpleNamespace(encode=lambda text, **kwargs: [1])
    assert [bool(_custom(obj[i], manager)) for i in range(2)] == [True, False]


@pytest.mark.parametrize("prompt", ["a", [1, 2, 3]])
def test_completion_list_for_one_prompt(prompt: Any) -> None:
    assert marks.mark_of(_completion(prompt, [True])) is True
    message, field = _completion(prompt, [True, True])
    assert "2 values for 1 prompts" in message and field == "is_deterministic"


@pytest.mark.parametrize("mark", ["yes", 1, [True], [True, False, True], [True, "yes"]])
def test_wrong_completion_marks_are_refused(mark: Any) -> None:
    message, field = _completion(["a", "b"], mark)
    assert "is_deterministic" in message and field == "is_deterministic"


def test_a_list_of_marks_cannot_come_in_custom_params() -> None:
    message, field = _completion("a", None, custom_params={"llm42": [True, False]})
    assert "custom_params.llm42" in message and field == "is_deterministic"


def _chat(mark: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "a"}], "is_deterministic": mark, "seed": 3}
    request = _openai(ChatCompletionRequest(**body), body)
    if not isinstance(request, ChatCompletionRequest):
        return request
    return request.to_sampling_params(stop=[], model_generation_config={})


def test_chat_mark() -> None:
    params = _chat(True)
    assert marks.mark_of(params) is True and params["sampling_seed"] == 3
    assert marks.mark_of(_chat([True])) is True
    assert marks.mark_of(_chat(None)) is None
    assert _chat("yes")[1] == "is_deterministic"
    assert _chat([True, True])[1] == "is_deterministic"


def test_other_openai_requests_pass() -> None:
    marked_body = {"is_deterministic": "nonsense"}
    request = types.SimpleNamespace()
    assert _openai(request, marked_body) is request
    completion = CompletionRequest(prompt="a")
    assert _openai(completion, None) is completion and completion.custom_params is None


# Bodies


def _http(body: Any, content_type: str = "application/json") -> Any:
    """A request as an endpoint gets it, its body unread."""
    from starlette.requests import Request

    async def receive() -> dict[str, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return {"type": "http.request", "body": data, "more_body": False}

    headers = [(b"content-type", content_type.encode())]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def _over_http(obj: Any, body: Any, manager: Any = None, **more: Any) -> Any:
    """``obj`` as SGLang's ``generate_request`` would get it of an endpoint that dropped the mark."""
    seen: list[Any] = []

    async def original(manager: Any, obj: Any, request: Any) -> AsyncGenerator[Any, None]:
        seen.append(obj)
        yield {}

    async def first() -> Any:
        request = _http(body, **more)
        return await intake.generate_request(original, manager or _manager(), obj, request).__anext__()

    asyncio.run(first())
    return seen[0]


def _said(body: Any, params: Any = None, **fields: Any) -> Any:
    fields = fields or {"text": "a"}
    params = _over_http(GenerateReqInput(sampling_params=params, **fields), body).sampling_params
    if isinstance(params, list):
        return [marks.mark_of(each) for each in params]
    return marks.mark_of(params or {})


@pytest.mark.parametrize("mark", [True, False, None])
def test_a_mark_in_the_body_reaches_every_endpoint(mark: bool | None) -> None:
    assert _said({"is_deterministic": mark}, {"temperature": 0.5}) is mark
    assert _said({"is_deterministic": [mark]}) is mark
    assert _said({"is_deterministic": mark}, None, text=["a", "b"]) in ([mark] * 2, None)
    assert _custom_of_http({"is_deterministic": mark}) is (mark is True)


def _custom_of_http(body: Any) -> bool:
    obj = _over_http(GenerateReqInput(input_ids=[1, 2, 3]), body)
    obj.normalize_batch_and_arguments()
    return bool(_custom(obj))


def test_marks_in_the_body_for_each_prompt() -> None:
    body = {"is_deterministic": [True, False, None]}
    assert _said(body, {"n": 2}, text=["a", "b", "c"]) == [True, False, None]
    assert _said(body, None, input_ids=[[1], [2], [3]]) == [True, False, None]
    assert _said(body, [{}, {"is_deterministic": True}, {}], text=["a", "b", "c"]) == [True, True, None]
    vertex = {"instances": [{"text": "a", "is_deterministic": True}, {"text": "b"}]}
    assert _said(vertex, None, text=["a", "b"]) == [True, None]
    assert _said({"instances": [{"text": "a"}]}, None, text=["a"]) is None
    for wrong in ({"text": "a"}, {"text": ["a", "b"]}, {"input_ids": [1, 2, 3]}):
        with pytest.raises(ValueError, match="is_deterministic holds 3 values"):
            _said(body, None, **wrong)


def test_sampling_parameters_say_more_than_the_body() -> None:
    assert _said({"is_deterministic": True}, {"is_deterministic": False}) is False
    assert _said({"is_deterministic": False}, {"custom_params": {"llm42": True}}) is True


@pytest.mark.parametrize("mark", ["yes", 1, {}, [True, "yes"]])
def test_a_wrong_mark_in_the_body_is_named(mark: Any) -> None:
    with pytest.raises(ValueError, match=r"is_deterministic.* must be true or false"):
        _said({"is_deterministic": mark})


@pytest.mark.parametrize("body", [b"", b"no json", ["is_deterministic"], "is_deterministic"])
def test_bodies_without_fields_say_nothing(body: Any) -> None:
    assert _said(body) is None


def test_a_form_may_hold_the_mark() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="is_deterministic"\r\n\r\n%s\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x"
    for word, mark in ((b"true", True), (b"false", False)):
        obj = _over_http(GenerateReqInput(text="", sampling_params={}), form % word, content_type=kind)
        assert marks.mark_of(obj.sampling_params) is mark
    with pytest.raises(ValueError, match="is_deterministic must be true or false"):
        _over_http(GenerateReqInput(text="", sampling_params={}), form % b"1", content_type=kind)


def test_what_generates_nothing_cannot_be_marked() -> None:
    for body, params in (({"is_deterministic": True}, {}), ({}, {"is_deterministic": True})):
        with pytest.raises(ValueError, match="is_deterministic is for generated tokens"):
            _over_http(EmbeddingReqInput(text="a", sampling_params=params), body)
    for body in ({"is_deterministic": False}, {}):
        obj = EmbeddingReqInput(text="a")
        assert _over_http(obj, body, _manager(llm42_mark_all=True)) is obj


def test_requests_of_an_engine_have_no_body() -> None:
    seen: list[Any] = []
    obj = GenerateReqInput(text="a")
    intake.generate_request(lambda manager, *args: seen.append(args), _manager(), obj, None)
    assert seen == [(obj, None)]


class _Endpoint:
    """A serving handler of SGLang's."""

    def __init__(self, manager: Any) -> None:
        self.tokenizer_manager = manager
        self.openai_serving_chat = self

    def create_error_response(self, message: str, param: str) -> str:
        return message

    def _error_response(self, status_code: int, error_type: str, message: str) -> str:
        return message


@pytest.mark.parametrize("around", ["create_responses", "handle_messages", "handle_ollama"])
def test_wrong_marks_are_refused_before_a_stream_begins(around: str) -> None:
    async def original(serving: Any, request: Any, raw_request: Any) -> str:
        return "begun"

    def answer(mark: Any, manager: Any, **request: Any) -> str:
        call = getattr(bodies, around)
        given = types.SimpleNamespace(options=request)
        found = asyncio.run(call(original, _Endpoint(manager), given, _http({"is_deterministic": mark})))
        return found if isinstance(found, str) else json.loads(found.body)["error"]

    without = _manager(enable_llm42=False)
    assert answer(True, _manager()) == answer(None, without) == answer(False, without) == "begun"
    assert "must be true or false" in answer("yes", _manager())
    assert "--enable-llm42" in answer(True, without)
    if around == "handle_ollama":
        assert "--enable-llm42" in answer(None, without, is_deterministic=True)
        assert "must be true or false" in answer(None, without, is_deterministic=1)


def test_ollama_options_hold_mark_and_seed() -> None:
    from sglang.srt.entrypoints.ollama.serving import OllamaServing

    def params(**options: Any) -> dict[str, Any]:
        made = OllamaServing._convert_options_to_sampling_params(None, options)  # type: ignore[arg-type]
        return bodies.ollama_sampling_params(made, None, options)

    marked = params(is_deterministic=True, seed=5, num_predict=3)
    assert marked == {"is_deterministic": True, "sampling_seed": 5, "max_new_tokens": 3}
    assert _tokenize(_request(marked)).sampling_params.sampling_seed == 5
    assert params(temperature=0.5, num_predict=3) == {"temperature": 0.5, "max_new_tokens": 3}


# Reports


def _report(rollbacks: int, **more: Any) -> dict[str, Any]:
    return {"llm42_num_rollbacks": rollbacks, "llm42_seed_is_default": False, **more}


def _batch_output(rids: list[str], customized_info: dict[str, Any] | None) -> Any:
    output = types.SimpleNamespace(rids=rids, customized_info=wrap_as_pickle(customized_info))
    assert "customized_info" in BatchTokenIDOutput.__struct_fields__
    return output


async def _handled(manager: Any, output: Any) -> Any:
    return unwrap_from_pickle(output.customized_info)


def _handle(manager: Any, output: Any) -> Any:
    return asyncio.run(reports.handle_batch_output(_handled, manager, output))


async def _responses(manager: Any, obj: Any, request: Any) -> AsyncGenerator[dict[str, Any], None]:
    for tokens in (1, 2):
        yield {"meta_info": {"completion_tokens": tokens}}


def _collect(manager: Any, obj: Any, between: Any = None) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        collected = []
        async for response in reports.wait_one_response(_responses, manager, obj):
            collected.append(dict(response["meta_info"]))
            if between:
                between()
        return collected

    return asyncio.run(collect())


def test_report_stands_flat_in_meta_info_with_newest_values() -> None:
    manager = _manager()
    obj = _request({"is_deterministic": True})
    _tokenize(obj, manager)
    state = manager.rid_to_state[obj.rid]
    manager.rid_to_state["other"] = other = types.SimpleNamespace()
    rids = ["other", obj.rid]
    left = _handle(manager, _batch_output(rids, {"llm42": [[None], [_report(1)]], "theirs": [[0], [1]]}))
    assert left == {"theirs": [[0], [1]]}, "only our own entries are taken out"
    assert not vars(other), "an unmarked request of the same batch gets nothing"

    def next_output() -> None:
        output = _batch_output([obj.rid], {"llm42": [[_report(2), _report(3)]]})
        reports._take_reports(manager, output)
        assert output.customized_info is None

    first, second = _collect(manager, obj, next_output)
    assert first == {"completion_tokens": 1, **_report(1)}
    assert second == {"completion_tokens": 2, **_report(3)}
    assert state.llm42_report == _report(3)


def test_default_seed_of_a_sample_is_shown_as_default() -> None:
    manager = _manager()
    manager.rid_to_state["child"] = types.SimpleNamespace(llm42_seed_is_default=True)
    _handle(manager, _batch_output(["child"], {"llm42": [[_report(0)]]}))
    assert manager.rid_to_state["child"].llm42_report["llm42_seed_is_default"] is True


def test_unmarked_requests_have_no_report() -> None:
    manager = _manager()
    obj = _request({"temperature": 0.5})
    generator = reports.wait_one_response(_responses, manager, obj)
    assert generator.ag_code is _responses.__code__, "SGLang's own generator, nothing around it"
    assert _collect(manager, obj)[0] == {"completion_tokens": 1}


def test_batches_without_marked_requests_are_not_opened() -> None:
    output = types.SimpleNamespace(customized_info=None)
    assert _handle(None, output) is None


def test_reports_of_requests_that_left_are_dropped() -> None:
    assert _handle(_manager(), _batch_output(["gone"], {"llm42": [[_report(1)]]})) is None


# Counters


class _Statistics:
    def __init__(self) -> None:
        self.decode_steps = 3

    def as_dict(self) -> dict[str, int]:
        return {"decode_steps": self.decode_steps}

    def reset(self) -> None:
        self.decode_steps = 0


def test_counters_travel_with_the_internal_state() -> None:
    scheduler = types.SimpleNamespace(
        llm42=types.SimpleNamespace(statistics=_Statistics()),
        llm42_configuration_digest="d",
        ps=types.SimpleNamespace(dp_rank=3),
        llm42_fingerprint="f",
        llm42_accepting_reqs=True,
    )
    result = types.SimpleNamespace(internal_state={"theirs": 1})
    internal_state.get_internal_state(result, scheduler, None)
    assert result.internal_state == {
        "theirs": 1,
        "llm42": {"decode_steps": 3},
        "llm42_configuration": "d",
        "llm42_dp_rank": 3,
        "llm42_fingerprint": "f",
        "llm42_accepting_reqs": True,
    }

    reset = SetInternalStateReq(server_args={internal_state.RESET_KEY: 1})
    answer = internal_state.set_internal_state(
        lambda *args: pytest.fail("SGLang refuses it"), scheduler, reset
    )
    assert answer.updated is True and scheduler.llm42.statistics.decode_steps == 0

    other = SetInternalStateReq(server_args={"pp_max_micro_batch_size": 1})
    assert internal_state.set_internal_state(lambda scheduler, req: req, scheduler, other) is other


def test_counters_are_named_after_the_rank_that_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rank answers first."""

    class Manager:
        async def get_internal_state(self) -> list[dict[str, Any]]:
            return [{"llm42": {"decode_steps": rank}, "llm42_dp_rank": rank} for rank in (1, 2, 0)]

    monkeypatch.setattr(endpoints, "_tokenizer_manager", Manager)
    counters = asyncio.run(endpoints.llm42_stats())
    assert list(counters.items()) == [(f"dp_{rank}", {"decode_steps": rank}) for rank in range(3)]


# Frontend programs


def test_frontend_generations_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.lang.backend import runtime_endpoint
    from sglang.lang.ir import SglSamplingParams

    from sglang_ext.llm42.frontend import DeterministicEndpoint

    sent: list[dict[str, Any]] = []

    def http_request(url: str, json: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if url.endswith("/get_model_info"):
            return types.SimpleNamespace(status_code=200, json=lambda: {"model_path": "a-model"})
        sent.append(json or {})
        answer = {"text": "b", "meta_info": {}}
        return types.SimpleNamespace(status_code=200, json=lambda: answer, iter_lines=lambda **kw: [])

    monkeypatch.setattr(runtime_endpoint, "http_request", http_request)
    endpoint = DeterministicEndpoint("http://server", seed=7)
    program = types.SimpleNamespace(text_="a", images_=[], variables={})
    params = SglSamplingParams(temperature=0.5, max_new_tokens=9)
    assert endpoint.generate(program, params) == ("b", {})  # type: ignore[arg-type]
    list(endpoint.generate_stream(program, params))  # type: ignore[arg-type]
    for body in sent:
        assert marks.mark_of(body["sampling_params"]) is True
        assert body["sampling_params"]["sampling_seed"] == 7
        assert body["sampling_params"]["max_new_tokens"] == 9
