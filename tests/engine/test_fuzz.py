"""Request fields with values that no client should send: an answer or an error of the client's, never worse.

Whatever a deterministic request says, the server answers in time, not with a 5xx, and goes on as before: the
same output, no KV slot lost, SGLang's strict memory checks passed.

SGLang itself answers some wrong values with a 500 before it gets to what is ours: it takes the elements of
batches without looking at their types. Such a request is sent again without its mark, and only a 500 for both
is passed over. That is safe, since the server had not begun to handle either; other wrong values in unmarked
requests end stock SGLang's scheduler and are not sent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import Output, Request, Server, running
from workloads import LLM42_FLAGS, ONE_THREAD, VOCABULARY, random_prompts

#: Seconds in which every request must be answered; the longest fill the KV pool.
ANSWER_S = 60.0

#: Short outputs: a request without a limit generates until the pool is full.
POOL = 256

PROBES = [
    Request(prompt, True, {"max_new_tokens": 24, "ignore_eos": True, "temperature": temperature})
    for prompt, temperature in zip(random_prompts(4, 10, 40, seed=31), (0.0, 0.0, 1.0, 1.0), strict=True)
]

EXAMPLES = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def server(spelling_llama: Path, logs: Path) -> Iterator[Server]:
    """A server that is as well after all tests as it was before."""
    flags = (*LLM42_FLAGS, "--max-total-tokens", str(POOL))
    with running(Server(spelling_llama, logs / "fuzz.log", flags, ONE_THREAD)) as server:
        expected = _probe(server)
        yield server
        server.wait_until_idle()
        assert _probe(server) == expected
        assert requests.get(f"{server.url}/health_generate", timeout=60).status_code == 200
        log = server.log.read_text().lower()
        assert not any(word in log for word in ("leak detected", "double free", "use-after-free"))


def _probe(server: Server) -> list[Output]:
    server.flush_cache()
    return server.together(PROBES)


# What is sent

#: Values of every type and of unreasonable sizes, as JSON (and Python's NaN and Infinity) can say them.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, -(2**31) - 1, 2**63, -(2**63) - 1, 2**70, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e-7, 1e39, -1e308]),
    st.text(max_size=8),
    st.sampled_from(["", "true", "1", "-1", "NaN", "null", "\x00", "w1 ", "ä🙂", "\ud800", "a" * 5000]),
)
WEIRD = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

#: SGLang makes as many copies of a request as ``n`` says, however many that are, before anything is checked.
FEW = WEIRD.filter(lambda value: not isinstance(value, int | float) or value <= 4)

#: Wrong in another way than type: near the edges of what is allowed.
NEARLY: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": st.integers(-1, 5),
    "min_new_tokens": st.integers(-1, 5),
    "temperature": st.sampled_from([0, 1e-7, 1e-6, 1e300, -1, 2]),
    "top_p": st.sampled_from([0, 1e-9, 1, 1.0001]),
    "min_p": st.sampled_from([-0.1, 1, 1.1]),
    "top_k": st.sampled_from([-1, 0, 1, VOCABULARY, VOCABULARY + 1, 2**30]),
    "sampling_seed": st.integers(-(2**64), 2**64),
    "stop": st.lists(st.text(max_size=4), max_size=3),
    "stop_token_ids": st.lists(st.integers(-2, VOCABULARY + 2), max_size=4),
    "stop_regex": st.sampled_from(["(", "[a", "a**", "w[0-9]+ ", "", "(?P<x>a)(?P=x)", ["a", 5]]),
    "frequency_penalty": st.floats(-3, 3),
    "presence_penalty": st.floats(-3, 3),
    "repetition_penalty": st.floats(-1, 3),
    "logit_bias": st.dictionaries(
        st.integers(-2, VOCABULARY + 2).map(str), st.floats() | st.integers(), max_size=3
    ),
    "regex": st.sampled_from(["(", "[a", "", "(a|b)+", "a{3,1}", "\ud800"]),
    "json_schema": st.sampled_from(["{", "{}", "[]", "null", '{"type": "nothing"}', '{"$ref": "#"}']),
    "ebnf": st.sampled_from(["root ::=", 'root ::= "a"', "x"]),
    "structural_tag": st.sampled_from(["{}", "{"]),
    "n": st.integers(-1, 3),
    "custom_params": st.fixed_dictionaries(
        {},
        optional={"llm42": WEIRD, "__req__": WEIRD, "thinking_budget": WEIRD, "llm42_weight_version": WEIRD},
    ),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "spaces_between_special_tokens": st.booleans(),
    "no_stop_trim": st.booleans(),
    "stream_interval": st.integers(-1, 2),
    "stop_strs": WEIRD,
    "is_normalized": st.booleans(),
    "nothing of the sort": WEIRD,
}
SAMPLING = st.fixed_dictionaries(
    {}, optional={name: (FEW if name == "n" else WEIRD) | nearly for name, nearly in NEARLY.items()}
)

LOGPROBS: dict[str, st.SearchStrategy[Any]] = {
    "return_logprob": st.booleans(),
    "logprob_start_len": st.integers(-3, 30),
    "top_logprobs_num": st.sampled_from([-1, 0, 1, VOCABULARY, VOCABULARY + 1, 10**6]),
    "token_ids_logprob": st.lists(st.integers(-2, VOCABULARY + 2), max_size=3),
    "return_text_in_logprobs": st.booleans(),
    "return_flat_raw_top_logprobs": st.booleans(),
}
BESIDE: dict[str, st.SearchStrategy[Any]] = {
    name: WEIRD | nearly
    for name, nearly in {
        **LOGPROBS,
        "stream": st.booleans(),
        "extra_key": st.sampled_from(["a", "\x1fllm420"]),
        "priority": st.integers(),
        "input_ids": st.lists(st.integers(-2, VOCABULARY + 2), max_size=5),
        "return_hidden_states": st.booleans(),
        "return_entropy": st.booleans(),
        "max_thinking_tokens": st.integers(-1, 3),
        "session_params": st.dictionaries(st.sampled_from(["id", "rid", "offset"]), WEIRD, max_size=2),
    }.items()
}


def _few(fields: st.SearchStrategy[dict[str, Any]], most: int) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the fields only: a request with many wrong ones tells about the first of them."""
    return st.tuples(fields, st.integers(0, most), st.randoms(use_true_random=False)).map(
        lambda drawn: {name: drawn[0][name] for name in _some(list(drawn[0]), drawn[1], drawn[2])}
    )


def _some(names: list[str], count: int, chance: Any) -> list[str]:
    return chance.sample(names, min(count, len(names)))


# Sending


def _post(server: Server, path: str, body: dict[str, Any]) -> int:
    """Status of the answer; 500 for a stream that breaks off.

    Raises:
        AssertionError: it took too long.
    """
    start = time.monotonic()
    data = json.dumps(body)  # also what is not JSON: NaN, halves of surrogate pairs
    headers = {"Content-Type": "application/json"}
    try:
        answer = requests.post(server.url + path, data=data, headers=headers, timeout=ANSWER_S)
    except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError) as error:
        assert not isinstance(error, requests.Timeout), f"no answer in {ANSWER_S} s"
        return 500
    assert time.monotonic() - start < ANSWER_S, f"no answer in {ANSWER_S} s"
    return answer.status_code


def _check(server: Server, path: str, marked: dict[str, Any], unmarked: dict[str, Any]) -> None:
    """Send a request; a 5xx must be SGLang's own, for the same request without the mark."""
    status = _post(server, path, marked)
    assert server.process.poll() is None, f"{json.dumps(marked)} ended the server:\n{server.tail()}"
    if status < 500:
        return
    stock = _post(server, path, unmarked)
    assert server.process.poll() is None
    assert stock == status, f"{status} for {json.dumps(marked)}, without the mark {stock}\n{server.tail(15)}"


def _without_mark(params: Any) -> Any:
    return {name: value for name, value in params.items() if name != "is_deterministic"}


@settings(EXAMPLES, max_examples=60)
@given(WEIRD, WEIRD, st.booleans())
def test_marks(server: Server, mark: Any, custom: Any, streamed: bool) -> None:
    """The rest of the request is right, for it may be unmarked."""
    right = {"max_new_tokens": 3}
    for params in ({"is_deterministic": mark}, {"custom_params": {"llm42": mark, "mine": custom}}):
        body = {"input_ids": [5, 6], "stream": streamed, "sampling_params": {**right, **params}}
        _check(server, "/generate", body, {**body, "sampling_params": right})


@settings(EXAMPLES, max_examples=220)
@given(_few(SAMPLING, 3), _few(st.fixed_dictionaries({}, optional=BESIDE), 2))
def test_generate(server: Server, params: dict[str, Any], beside: dict[str, Any]) -> None:
    unmarked = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, **params}, **beside}
    marked = {**unmarked, "sampling_params": {**unmarked["sampling_params"], "is_deterministic": True}}
    _check(server, "/generate", marked, unmarked)


#: Lists that may have the wrong length, of right values: some of them are for unmarked requests.
RIGHT_LISTS = st.fixed_dictionaries(
    {},
    optional={
        "return_logprob": st.lists(st.booleans(), max_size=3),
        "logprob_start_len": st.lists(st.integers(-1, 1), max_size=3),
        "top_logprobs_num": st.lists(st.integers(0, 5), max_size=3),
        "token_ids_logprob": st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=3),
        "return_text_in_logprobs": st.booleans(),
    },
)


@settings(EXAMPLES, max_examples=80)
@given(
    st.lists(st.none() | _few(SAMPLING.map(lambda params: params | {"n": 1}), 2), min_size=1, max_size=3),
    st.integers(-1, 1),
    RIGHT_LISTS,
    st.booleans(),
)
def test_batches(
    server: Server, sets: list[dict[str, Any] | None], longer: int, beside: dict[str, Any], streamed: bool
) -> None:
    """Marked requests and right unmarked ones in one batch, with lists that may be too short or too long."""
    right = {"max_new_tokens": 3}
    marked = [right if params is None else {**right, **params, "is_deterministic": True} for params in sets]
    prompts = [[5 + i, 6] for i in range(max(1, len(sets) + longer))]
    body = {"input_ids": prompts, "sampling_params": marked, "stream": streamed, **beside}
    # Of what is wrong in the marked ones, only what SGLang reads first may be in the others.
    unmarked = [
        {name: params[name] for name in ("max_new_tokens", "n") if name in params} for params in marked
    ]
    _check(server, "/generate", body, {**body, "sampling_params": unmarked})


#: Names under which the OpenAI interfaces know what /generate calls otherwise.
OPENAI: dict[str, st.SearchStrategy[Any]] = {
    "seed": NEARLY["sampling_seed"],
    "max_tokens": NEARLY["max_new_tokens"],
    "min_tokens": NEARLY["min_new_tokens"],
    "cache_salt": st.sampled_from(["a", "\x1fllm420"]),
    "stream": st.booleans(),
    **{
        name: NEARLY[name]
        for name in NEARLY
        if name not in ("sampling_seed", "max_new_tokens", "min_new_tokens", "stop_strs", "is_normalized")
    },
}
OPENAI_FIELDS = {name: (FEW if name == "n" else WEIRD) | nearly for name, nearly in OPENAI.items()}
COMPLETION = st.fixed_dictionaries(
    {}, optional={**OPENAI_FIELDS, "logprobs": WEIRD | st.integers(-1, 5), "echo": WEIRD | st.booleans()}
)
CHAT = st.fixed_dictionaries(
    {},
    optional={
        **OPENAI_FIELDS,
        "logprobs": WEIRD | st.booleans(),
        "top_logprobs": WEIRD | LOGPROBS["top_logprobs_num"],
    },
)
MARKS = st.just(True) | st.lists(st.just(True), max_size=4)


@settings(EXAMPLES, max_examples=110)
@given(_few(COMPLETION, 3), st.sampled_from(["w1 ", ["w1 ", "w2 "], [5, 6], [[5], [6, 7]]]), MARKS)
def test_completions(server: Server, fields: dict[str, Any], prompt: Any, mark: Any) -> None:
    unmarked = {"model": "default", "prompt": prompt, "max_tokens": 3, **fields}
    _check(server, "/v1/completions", {**unmarked, "is_deterministic": mark}, unmarked)


@settings(EXAMPLES, max_examples=110)
@given(_few(CHAT, 3), MARKS)
def test_chat_completions(server: Server, fields: dict[str, Any], mark: Any) -> None:
    messages = [{"role": "user", "content": "w1 "}]
    unmarked = {"model": "default", "messages": messages, "max_tokens": 3, **fields}
    _check(server, "/v1/chat/completions", {**unmarked, "is_deterministic": mark}, unmarked)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@settings(EXAMPLES, max_examples=50)
@given(WEIRD, WEIRD)
def test_openai_marks(server: Server, path: str, mark: Any, custom: Any) -> None:
    """As :func:`test_marks`."""
    asked = (
        {"prompt": "w1 "} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    )
    right = {"model": "default", "max_tokens": 3, **asked}
    for fields in ({"is_deterministic": mark}, {"custom_params": {"llm42": mark, "mine": custom}}):
        _check(server, path, {**right, **fields}, right)
