"""The beginning of a streamed answer, by which a replica may still refuse the request.

SGLang sends status 200 before a stream's first token, so what would be status 503 is an event then:

- ``/generate``: ``{"meta_info": {"finish_reason": {"type": "abort", "status_code": 503, ...}}, ...}``
- ``/v1/completions``, ``/v1/chat/completions``: ``{"error": {"code": 503, ...}}``
- ``/v1/messages``: ``{"type": "error", "error": {"type": "overloaded_error", ...}}``

It means a lost rank (:mod:`sglang_ext.ray.watch`), a full queue, a wait that was too long: another replica
may be asked. An abort without a status was asked for by an operator (``/abort_request``, of one request or of
all, which cannot be told apart) and reaches the client, as it does where nothing is streamed.

Two endpoints send events before that one, :data:`BEFORE_TOKENS`. They are held back until it is there, or
the client would have a stream that cannot be begun anew. ``/v1/responses`` has no event for a refusal: SGLang
0.5.17 ends such a stream as one that is complete and empty. It is the loss of the replica that is seen there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from aiohttp import StreamReader

#: A longer beginning is not waited for, and no refusal: its events carry tokens, or a request that is
#: repeated.
MAX_REFUSAL_BYTES = 64 * 2**10

#: Types of events before the first token: of ``/v1/messages``, which sends it together with the next one; of
#: ``/v1/responses``, which sends them at once.
BEFORE_TOKENS = ("message_start", "response.created", "response.in_progress")

#: How ``/v1/messages`` spells 503.
OVERLOADED = "overloaded_error"

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


async def beginning(content: StreamReader) -> bytes:
    """What has come of a stream once it is decided whether it is a refusal.

    That is with the first whole event that may be one or carries tokens, with :data:`MAX_REFUSAL_BYTES`, or
    with the stream's end.

    Raises:
        ClientError: the stream was cut before.
    """
    begun = b""
    while piece := await content.readany():
        begun += piece
        if len(begun) >= MAX_REFUSAL_BYTES or _deciding(_END.split(begun)[:-1]) is not None:
            break
    return begun


def is_refusal(begun: bytes) -> bool:
    """Whether the beginning of a stream says that the replica is unavailable."""
    event = _data(_deciding(_END.split(begun[:MAX_REFUSAL_BYTES])) or b"")
    reason = _entry(_entry(event, "meta_info"), "finish_reason")
    if _entry(reason, "type") == "abort":
        return bool(_entry(reason, "status_code") == HTTPStatus.SERVICE_UNAVAILABLE)
    error = _entry(event, "error")
    if _entry(event, "type") == "error":
        return bool(_entry(error, "type") == OVERLOADED)
    return bool(_entry(error, "code") == HTTPStatus.SERVICE_UNAVAILABLE)


def _deciding(events: Sequence[bytes]) -> bytes | None:
    """The first event that may be a refusal or carries tokens."""
    return next((event for event in events if _entry(_data(event), "type") not in BEFORE_TOKENS), None)


def _data(event: bytes) -> Any:
    """What an event says, None where it is not JSON."""
    lines = event.splitlines()
    data = b"\n".join(line[len(b"data:") :] for line in lines if line.startswith(b"data:"))
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _entry(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None
