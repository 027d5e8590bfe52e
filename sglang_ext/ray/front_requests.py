"""What the front asks of a request before it is passed on: its key, its size, its headers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from http import HTTPStatus

from aiohttp import web
from aiohttp.typedefs import Middleware
from multidict import CIMultiDict

#: Largest request body, in bytes: prompts may hold images.
MAX_BODY_BYTES = 512 * 2**20

#: Bodies of all requests under way, in bytes. One is held until its answer is whole or its stream has begun:
#: until then another replica may be asked.
MAX_BODIES_BYTES = 2 * 2**30

#: Seconds in which a body must have come.
READ_TIMEOUT_S = 120.0

#: Seconds after which a client that found no room may try again.
RETRY_AFTER_S = 1

#: Of one hop only (RFC 9110, 7.6.1), or set anew by aiohttp for each hop. Those that a message's own
#: ``Connection`` names are, too.
NOT_PASSED_ON = frozenset(
    (
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)

#: Open without a key, as on SGLang's servers.
OPEN_PATHS = ("/health", "/metrics")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def refusal(status: HTTPStatus, message: str) -> web.Response:
    """An answer of the front's own, in the form of SGLang's errors."""
    return web.json_response({"error": {"message": message, "code": int(status)}}, status=status)


def key_check(api_key: str) -> Middleware:
    """A middleware that refuses a request without the key as SGLang does, before its body is read."""
    expected = _bytes(api_key)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "OPTIONS" or request.path.startswith(OPEN_PATHS):
            return await handler(request)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secrets.compare_digest(_bytes(token), expected):
            return await handler(request)
        return web.json_response({"error": "Unauthorized"}, status=HTTPStatus.UNAUTHORIZED)

    return check


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def passed_on(headers: Iterable[tuple[str, str]]) -> CIMultiDict[str]:
    """Headers of the message, repeated ones as often as they came, without those of one hop."""
    found = CIMultiDict(headers)
    named = ",".join(found.getall("Connection", ())).lower().split(",")
    dropped = NOT_PASSED_ON.union(name.strip() for name in named)
    spelled: dict[str, str] = {}  # aiohttp's client keeps repeated ones only where they are spelled alike
    return CIMultiDict(
        (spelled.setdefault(name.lower(), name), value)
        for name, value in found.items()
        if name.lower() not in dropped
    )


class Refused(Exception):
    """A body is not taken; ``answer`` says why."""

    def __init__(self, answer: web.Response) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Body:
    """A request's body, held until no other replica can be asked any more.

    Attributes:
        data: its bytes; none once it is released.
        size: how many are counted.
    """

    def __init__(self, bodies: Bodies) -> None:
        self.data = b""
        self.size = 0
        self._bodies = bodies

    def release(self) -> None:
        """Hold it no longer."""
        self._bodies.held -= self.size
        self.data, self.size = b"", 0


class Bodies:
    """The bodies of all requests under way.

    Attributes:
        held: their bytes.
    """

    def __init__(self) -> None:
        self.held = 0

    @asynccontextmanager
    async def read(self, request: web.Request) -> AsyncIterator[Body]:
        """The body of a request, counted until it is released, or else until the end of the block.

        Raises:
            Refused: with 413 for a body above :data:`MAX_BODY_BYTES`, 503 where all together would be above
                :data:`MAX_BODIES_BYTES`, 408 for one that is not there within :data:`READ_TIMEOUT_S`.
        """
        body = Body(self)
        try:
            await self._fill(body, request)
            yield body
        finally:
            body.release()

    async def _fill(self, body: Body, request: web.Request) -> None:
        self._check(request.content_length or 0, request.content_length or 0)
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                while piece := await request.content.readany():
                    self._check(body.size + len(piece), len(piece))
                    pieces.append(piece)
                    body.size += len(piece)
                    self.held += len(piece)
        except TimeoutError:
            text = f"the body did not come within {READ_TIMEOUT_S:g} s"
            raise Refused(refusal(HTTPStatus.REQUEST_TIMEOUT, text)) from None
        body.data = b"".join(pieces)

    def _check(self, size: int, more: int) -> None:
        """Whether a body of ``size`` bytes, of which ``more`` are not yet held, is taken."""
        if size > MAX_BODY_BYTES:
            text = f"the body is larger than {MAX_BODY_BYTES} bytes"
            raise Refused(refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text))
        if self.held + more > MAX_BODIES_BYTES:
            answer = refusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many bytes of requests under way; send it again"
            )
            answer.headers["Retry-After"] = str(RETRY_AFTER_S)
            raise Refused(answer)
