"""What the front reads from the beginning of a stream, against SGLang's own endpoints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ext.ray.front_events import BEFORE_TOKENS, is_refusal

#: What the tokenizer manager yields for a refused request.
REFUSED = {
    "text": "",
    "meta_info": {
        "id": "a",
        "prompt_tokens": 3,
        "completion_tokens": 0,
        "finish_reason": {
            "type": "abort",
            "message": "a rank of this server was lost",
            "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
        },
    },
}


async def _all(stream: AsyncIterator[str]) -> list[bytes]:
    return [piece.encode() async for piece in stream]


@pytest.mark.parametrize(("code", "expected"), [(503, True), (400, False), (500, False)])
def test_a_refused_stream_of_messages_is_seen(code: int, expected: bool) -> None:
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing

    async def chat(*arguments: Any) -> AsyncIterator[str]:
        error = {"error": {"object": "error", "message": "m", "type": "t", "code": code}}
        yield f"data: {json.dumps(error)}\n\n"
        yield "data: [DONE]\n\n"

    serving = AnthropicServing.__new__(AnthropicServing)
    serving.openai_serving_chat = SimpleNamespace(_generate_chat_stream=chat)
    request = AnthropicMessagesRequest(
        model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}], stream=True
    )
    events = asyncio.run(_all(serving._generate_anthropic_stream(None, None, request, None)))
    assert _types(events)[:2] == ["message_start", "error"]
    assert is_refusal(b"".join(events)) is expected


def test_a_refused_stream_of_responses_ends_as_complete() -> None:
    """Documented; when it fails, SGLang says more than it did, and the front may read it."""
    from sglang.srt.entrypoints.openai.protocol import ResponsesRequest
    from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses

    async def refuse() -> AsyncIterator[dict[str, Any]]:
        yield REFUSED

    serving = OpenAIServingResponses.__new__(OpenAIServingResponses)
    serving.tool_call_parser = serving.reasoning_parser = None
    serving.enable_prompt_tokens_details = False
    serving.tokenizer_manager = SimpleNamespace(
        tokenizer=None, server_args=SimpleNamespace(incremental_streaming_output=False)
    )
    request = ResponsesRequest(model="m", input="x", stream=True, store=False)
    stream = serving.responses_stream_generator_non_harmony(
        request, {}, refuse(), "m", None, SimpleNamespace(), require_reasoning=False
    )
    events = asyncio.run(_all(stream))
    types = _types(events)
    assert types[-1] == "response.completed" and set(types[:2]) < set(BEFORE_TOKENS)
    assert json.loads(events[-1].partition(b"\ndata: ")[2])["response"]["output"] == []
    assert not is_refusal(b"".join(events))


def _types(events: list[bytes]) -> list[str]:
    return [json.loads(event.partition(b"\ndata: ")[2])["type"] for event in events]
