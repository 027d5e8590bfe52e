"""Clients: OpenAI's (streams, samples, batches, reasoning, tools) and SGLang frontend programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import sglang as sgl
from live_server import Server, at_once, running
from workloads import FLOAT32, LLM42_FLAGS, ONE_THREAD

from sglang_ext.llm42.frontend import DeterministicEndpoint

MARK = {"is_deterministic": True}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Lyon", "Paris", "Rome", "Oslo", "Bern"]},
                "unit": {"enum": ["celsius", "fahrenheit", "kelvin"]},
                "days": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["city", "unit", "days"],
        },
    },
}
MESSAGES = [{"role": "user", "content": "Which city is the capital of France, and what is it known for?"}]


@pytest.fixture(scope="module")
def server(smollm2: Path, logs: Path) -> Iterator[Server]:
    """The demo model with parsers of reasoning and tool calls."""
    flags = (*LLM42_FLAGS, *FLOAT32, "--max-total-tokens", "8192", "--reasoning-parser", "qwen3")
    flags += ("--tool-call-parser", "qwen25")
    with running(Server(smollm2, logs / "openai.log", flags)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)


def chat(client: openai.OpenAI, thinking: bool = False, **arguments: Any) -> Any:
    """A deterministic chat completion."""
    return client.chat.completions.create(
        model="default",
        messages=MESSAGES,
        extra_body={**MARK, "chat_template_kwargs": {"enable_thinking": thinking}},
        **{"max_tokens": 40, "temperature": 0.9, "seed": 3, **arguments},
    )


def crowded(server: Server, client: openai.OpenAI, **arguments: Any) -> Any:
    """The same beside other requests, on a warm cache."""

    def other(number: int) -> None:
        client.completions.create(
            model="default", prompt=f"{number} reasons", max_tokens=30 + number, top_p=0.9, temperature=1.0
        )

    calls = [lambda n=n: other(n) for n in range(5)]
    return at_once([*calls, lambda: chat(client, **arguments)])[-1]


def test_samples_and_log_probabilities(server: Server, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"n": 2, "logprobs": True, "top_logprobs": 2}
    alone, again = chat(client, **asked), crowded(server, client, **asked)
    assert alone.choices == again.choices
    assert alone.choices[0].message.content != alone.choices[1].message.content
    assert all(len(choice.logprobs.content) > 0 for choice in alone.choices)


def test_stream_spells_the_same_answer(server: Server, client: openai.OpenAI) -> None:
    alone = chat(client).choices[0]
    chunks = list(chat(client, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == alone.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == alone.finish_reason


def test_reasoning_is_the_same(server: Server, client: openai.OpenAI) -> None:
    """The demo model never ends its reasoning, so all of its answer is that."""
    alone, again = chat(client, thinking=True), crowded(server, client, thinking=True)
    reasoning = alone.choices[0].message.reasoning_content
    assert reasoning.strip() and not alone.choices[0].message.content
    assert again.choices == alone.choices
    deltas = [c.choices[0].delta for c in chat(client, thinking=True, stream=True) if c.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == reasoning


def test_tool_calls_are_the_same(server: Server, client: openai.OpenAI) -> None:
    asked = {
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 100,
        "temperature": 0.0,
    }
    alone, again = chat(client, **asked), crowded(server, client, **asked)
    [call] = alone.choices[0].message.tool_calls
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit", "days"}
    assert [c.function for c in again.choices[0].message.tool_calls] == [call.function]
    deltas = [c.choices[0].delta for c in chat(client, stream=True, **asked) if c.choices]
    pieces = [call.function for delta in deltas for call in delta.tool_calls or []]
    assert "".join(piece.name or "" for piece in pieces) == "weather"
    assert json.loads("".join(piece.arguments or "" for piece in pieces)) == arguments


def test_batch_of_prompts_with_marks(client: openai.OpenAI) -> None:
    def complete(marks: Any) -> list[str]:
        answer = client.completions.create(
            model="default",
            prompt=["The sun is", "The moon is"],
            max_tokens=24,
            temperature=0.8,
            seed=5,
            extra_body={"is_deterministic": marks},
        )
        return [choice.text for choice in answer.choices]

    both = complete(True)
    assert complete([True, False])[0] == both[0]
    assert complete([False, True])[1] == both[1]
    with pytest.raises(openai.BadRequestError, match="is_deterministic"):
        complete([True])


PROMPT = "Tell me about the sea and its fish."
MESSAGE = [{"role": "user", "content": PROMPT}]

#: Path and body of every endpoint that generates; none has the mark in SGLang's own model. Not ``/api/chat``:
#: SGLang 0.5.17 gives transformers 5's encoding of a chat on as if it were token ids, and refuses it itself.
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/generate": {"text": PROMPT, "sampling_params": {"max_new_tokens": 6}},
    "/vertex_generate": {
        "instances": [{"text": PROMPT}],
        "parameters": {"sampling_params": {"max_new_tokens": 6}},
    },
    "/invocations": {"model": "m", "messages": MESSAGE, "max_tokens": 6},
    "/v1/completions": {"model": "m", "prompt": PROMPT, "max_tokens": 6},
    "/v1/chat/completions": {"model": "m", "messages": MESSAGE, "max_tokens": 6},
    "/v1/responses": {"model": "m", "input": PROMPT, "max_output_tokens": 8},
    "/v1/messages": {"model": "m", "messages": MESSAGE, "max_tokens": 6},
    "/api/generate": {"model": "m", "prompt": PROMPT, "options": {"num_predict": 6, "seed": 3}},
    "/v1/score": {"model": "m", "query": PROMPT, "items": [" Yes", " No"], "label_token_ids": [5, 6]},
}


def _deterministic_rows(server: Server, path: str, body: dict[str, Any]) -> int:
    """Rows of canonical passes that one request took."""
    server.flush_cache()
    server.reset_statistics()
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    figures = server.statistics()
    return figures["prompt_tokens"] + figures["verify_total_tokens"]


@pytest.mark.parametrize("path", list(ENDPOINTS))
def test_every_endpoint_takes_the_mark(server: Server, path: str) -> None:
    for stream in (False, True):
        body = {**ENDPOINTS[path], "stream": stream}
        assert _deterministic_rows(server, path, body) == 0
        assert _deterministic_rows(server, path, {**body, "is_deterministic": False}) == 0
        assert _deterministic_rows(server, path, {**body, "is_deterministic": True}) > 0
    answer = server.post(path, {**ENDPOINTS[path], "stream": False, "is_deterministic": "yes"})
    assert answer.status_code == 400 and "is_deterministic" in answer.text, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "m", "input": PROMPT}),
        ("/v1/classify", {"model": "m", "input": PROMPT}),
        ("/encode", {"text": PROMPT}),
        ("/classify", {"text": PROMPT}),
    ],
)
def test_what_generates_nothing_cannot_be_marked(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.post(path, {**body, **MARK})
    assert answer.status_code == 400 and "is_deterministic" in answer.text, answer.text


def test_a_server_that_marks_everything_does_so_on_every_endpoint(spelling_llama: Path, logs: Path) -> None:
    flags = (*LLM42_FLAGS, "--max-total-tokens", "8192", "--llm42-mark-all")
    with running(Server(spelling_llama, logs / "mark-all.log", flags, ONE_THREAD)) as server:
        for path, body in ENDPOINTS.items():
            assert _deterministic_rows(server, path, body) > 0, path
            assert _deterministic_rows(server, path, {**body, "is_deterministic": False}) == 0, path


@sgl.function
def advice(s: Any) -> None:
    """A program with marked and unmarked generations, two of the marked ones in forks."""
    s += "Three pieces of advice for travellers.\n"
    s += sgl.gen("idea", max_tokens=12, temperature=0.9)
    with s.var_scope("deterministic"):
        forks = s.fork(2)
        for number, fork in enumerate(forks, 1):
            fork += f"\nPlace {number}: "
            fork += sgl.gen("place", max_tokens=16, temperature=0.9)
        forks.join()
        s += "Three pieces of advice for travellers.\nIn short: "
        s += sgl.gen("summary", max_tokens=16, temperature=0.9)


def test_a_frontend_program_marks_all_or_some(server: Server) -> None:
    def marks(scope: str | None) -> list[bool]:
        state = advice.run(backend=DeterministicEndpoint(server.url, seed=5, scope=scope))
        return [state.get_meta_info(name).get("llm42_seed") == 5 for name in ("idea", "summary")]

    assert marks(None) == [True, True]
    assert marks("deterministic") == [False, True]


@sgl.function
def journey(s: Any) -> None:
    """A program whose forks depend on what was generated before them."""
    s += "The best way to see Norway is "
    s += sgl.gen("way", max_tokens=20, temperature=0.9)
    forks = s.fork(3)
    for fork, month in zip(forks, ("May", "July", "December"), strict=True):
        fork += f". In {month} you can "
        fork += sgl.gen("month", max_tokens=20, temperature=0.9)
    forks.join()
    s += ". All in all, " + sgl.gen("end", max_tokens=20, temperature=0.9)


def test_a_frontend_program_runs_alike_every_time(server: Server, client: openai.OpenAI) -> None:
    def run() -> tuple[Any, ...]:
        state = journey.run(backend=DeterministicEndpoint(server.url, seed=5))
        return state["way"], tuple(state["month"]), state["end"]

    server.flush_cache()
    alone = run()
    crowd = at_once([run, run, lambda: crowded(server, client)])
    assert len(set(alone[1])) > 1
    assert crowd[:2] == [alone, alone]
