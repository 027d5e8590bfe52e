"""Deterministic requests through the OpenAI interface: streams, samples, batches, reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import Server, at_once, running
from workloads import LLM42_FLAGS

MARK = {"is_deterministic": True}
MESSAGES = [{"role": "user", "content": "Which city is the capital of France, and what is it known for?"}]


@pytest.fixture(scope="module")
def server(smollm2: Path, logs: Path) -> Iterator[Server]:
    """The demo model with a parser of reasoning."""
    flags = (*LLM42_FLAGS, "--max-total-tokens", "8192", "--reasoning-parser", "qwen3")
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
