"""The connections of clients: how many a front keeps, for how long, and what one too many is told.

A connection costs a file, and another one at the replica while it has a request. Without a bound, connections
that send nothing use up the files of the process, which then reaches no replica and takes all of them for
lost.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger

from sglang_ext.ray.front_requests import RETRY_AFTER_S, refusal

logger = logging.getLogger(__name__)

#: Connections of clients at once in each front, idle ones included; fewer where the process may not open as
#: many files. A burst of new ones may pass it by :data:`BACKLOG`.
MAX_CONNECTIONS = 4096

#: Connections that wait to be accepted.
BACKLOG = 128

#: Files for everything else: the burst, connections turned away, looks at the replicas, the log.
OTHER_FILES = 512

#: Seconds after which a connection is closed that has no request: in which the first one's headers must have
#: come, and those of the next after an answer.
IDLE_TIMEOUT_S = 75.0

#: Seconds in which a client must take some of what is sent to it, else its connection is closed and its
#: request ended: one that reads nothing would keep both for ever.
SEND_TIMEOUT_S = 120.0

#: Connections turned away that are told so at once, and seconds that each has to send its request and take
#: the answer. Further ones are closed without a word.
MAX_TURNED_AWAY = 128
TURNED_AWAY_S = 1.0

#: Seconds between lines of the log about connections turned away.
TELL_EVERY_S = 10.0

#: Of what a client sent that is not HTTP, in the log.
MAX_FAULT_CHARACTERS = 200

_TOO_MANY = "too many connections; send the request again"


def connections_for(files: int) -> int:
    """How many connections of clients there is room for in a process that may open this many files."""
    return max(1, min(MAX_CONNECTIONS, (files - OTHER_FILES) // 2))


def allow_files() -> int:
    """Let this process open as many files as it needs, as far as its hard limit goes; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS + OTHER_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if connections_for(allowed) < MAX_CONNECTIONS:
        logger.warning(
            "The limit of open files (ulimit -Hn) is %d: room for %d connections of clients, not %d",
            allowed,
            connections_for(allowed),
            MAX_CONNECTIONS,
        )
    return allowed


@asynccontextmanager
async def serving(
    app: web.Application, host: str, port: int, share_port: bool = False, limit: int = MAX_CONNECTIONS
) -> AsyncIterator[int]:
    """Serve an application on an address until the end of the block; yields the port.

    Args:
        app: the application.
        host: address.
        port: 0 means a free one.
        share_port: whether further processes may serve the port.
        limit: how many connections are kept.
    """
    runner = web.AppRunner(
        app,
        keepalive_timeout=IDLE_TIMEOUT_S,
        handler_cancellation=True,  # a client that leaves ends its request at the replica, too
        auto_decompress=False,  # bytes are passed on as they come, and Content-Encoding with them
    )
    server_logger.addFilter(_without_traceback)
    await runner.setup()
    try:
        protocols = Connections(cast(web.Server, runner.server), limit)
        listening = await asyncio.get_running_loop().create_server(
            protocols, host, port, reuse_port=share_port or None, backlog=BACKLOG
        )
        try:
            for opened in listening.sockets:  # connections have it from the socket they come from
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SEND_TIMEOUT_S * 1000))
            yield listening.sockets[0].getsockname()[1]
        finally:
            listening.close()
    finally:
        await runner.cleanup()


class Connections:
    """Protocols of new connections: aiohttp's, or for one too many a refusal.

    Args:
        server: aiohttp's.
        limit: how many connections it gets.
    """

    def __init__(self, server: web.Server, limit: int) -> None:
        self._server = server
        self._limit = limit
        self._turned_away: set[asyncio.Protocol] = set()
        self._untold = 0
        self._tell_at = 0.0

    def __call__(self) -> asyncio.Protocol:
        """What asyncio calls for each new connection."""
        if len(self._server.connections) < self._limit:
            return self._server()
        self._tell()
        return _TurnedAway(self._turned_away)

    def _tell(self) -> None:
        self._untold += 1
        now = asyncio.get_running_loop().time()
        if now >= self._tell_at:
            logger.error(
                "All %d connections of clients are in use: %d turned away (503)", self._limit, self._untold
            )
            self._untold, self._tell_at = 0, now + TELL_EVERY_S


class _TurnedAway(asyncio.Protocol):
    """One connection too many: its request is not read but answered with 503."""

    def __init__(self, others: set[asyncio.Protocol]) -> None:
        self._others = others
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if len(self._others) >= MAX_TURNED_AWAY:
            self._transport.abort()
            return
        self._others.add(self)
        asyncio.get_running_loop().call_later(TURNED_AWAY_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        """Answer; what else comes is taken and dropped, or the client might not see the answer."""
        if not self._answered:
            self._answered = True
            self._transport.write(_too_many())
            self._transport.write_eof()

    def connection_lost(self, error: Exception | None) -> None:
        self._others.discard(self)


def _too_many() -> bytes:
    answer = refusal(HTTPStatus.SERVICE_UNAVAILABLE, _TOO_MANY)
    body = cast(bytes, answer.body)
    head = (
        f"HTTP/1.1 {answer.status} {answer.reason}\r\nContent-Type: {answer.headers['Content-Type']}\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: {RETRY_AFTER_S}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _without_traceback(record: logging.LogRecord) -> bool:
    """Filter of aiohttp's log: what is not HTTP is one line, or any client could fill it with tracebacks."""
    fault = record.exc_info[1] if record.exc_info else None
    if isinstance(fault, HttpProcessingError):
        text = " ".join(str(fault).split())[:MAX_FAULT_CHARACTERS]
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: {text}", None, None
    return True
