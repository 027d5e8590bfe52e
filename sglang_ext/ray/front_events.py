"""The first event of a streamed answer, by which a replica may still refuse the request.

SGLang sends status 200 before a stream's first token, so what would be status 503 is an event then:

- ``/generate``: ``{"meta_info": {"finish_reason": {"type": "abort", "status_code": 503, ...}}, ...}``
- ``/v1/completions``, ``/v1/chat/completions``: ``{"error": {"code": 503, ...}}``

It means a lost rank (:mod:`sglang_ext.ray.watch`), a full queue, a wait that was too long: another replica
may be asked. An abort without a status was asked for by an operator (``/abort_request``, of one request or of
all, which cannot be told apart) and reaches the client, as it does where nothing is streamed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import StreamReader

#: A longer first event carries tokens and is no refusal; it is not waited for.
MAX_REFUSAL_BYTES = 64 * 2**10

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


async def first_event(content: StreamReader) -> bytes:
    """What has come of a stream once its first event is whole or too long for a refusal, or the stream ends.

    Raises:
        ClientError: the stream was cut before.
    """
    begun = b""
    while piece := await content.readany():
        begun += piece
        if _END.search(begun) or len(begun) >= MAX_REFUSAL_BYTES:
            break
    return begun


def is_refusal(begun: bytes) -> bool:
    """Whether the first event of a stream says that the replica is unavailable."""
    lines = _END.split(begun, maxsplit=1)[0].splitlines()
    data = b"\n".join(line[len(b"data:") :] for line in lines if line.startswith(b"data:"))
    if len(data) >= MAX_REFUSAL_BYTES:
        return False
    try:
        event = json.loads(data)
    except ValueError:
        return False
    reason = _entry(_entry(event, "meta_info"), "finish_reason")
    if _entry(reason, "type") == "abort":
        return bool(_entry(reason, "status_code") == HTTPStatus.SERVICE_UNAVAILABLE)
    return bool(_entry(_entry(event, "error"), "code") == HTTPStatus.SERVICE_UNAVAILABLE)


def _entry(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None
