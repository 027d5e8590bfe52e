"""One replica, as the front sees it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus
from typing import Any

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
)

from sglang_ext.ray.identity import identity_of

logger = logging.getLogger(__name__)

#: Seconds to connect; that a look may take; that ``/server_info`` may take, which waits for a pass.
CONNECT_TIMEOUT_S = 5.0
LOOK_TIMEOUT_S = 5.0
COMPARE_TIMEOUT_S = 30.0

#: Seconds after which an idle connection is closed, before SGLang does (5 s, SGLANG_TIMEOUT_KEEP_ALIVE): a
#: request that crosses its closing would look like a lost replica.
KEEP_ALIVE_S = 3.0

#: Why a replica is left out, as ``/health`` says it; the log says more.
NOT_SEEN = "has not answered yet"
REFUSES_CONNECTIONS = "refuses connections"
SILENT = "does not answer"
NOT_COMPARED = "cannot be compared with the others"
DIFFERS = "differs from the others"


class Look(Enum):
    """What a look at a replica has seen."""

    ANSWERS = "answers"
    REFUSES = "refuses"
    SILENT = "silent"


class NoAccess(Exception):
    """A replica does not say what it is without a key."""


@dataclass
class Replica:
    """One server.

    Attributes:
        number: in the order of the command line.
        url: without a path.
        up: whether it gets requests: it answers, and was compared with the others since it last did not.
        left_out: why it gets none, where it does not.
        in_flight: requests that it has.
        silent: looks in a row that it did not answer.
        compare_at: time on the event loop before which it is not compared again.
    """

    number: int
    url: str
    up: bool = False
    left_out: str = NOT_SEEN
    in_flight: int = 0
    silent: int = 0
    compare_at: float = 0.0
    session: ClientSession = field(init=False)
    _told: str = ""

    def connect(self) -> None:
        """Have new connections; on the event loop."""
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self.session = ClientSession(
            connector=TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=timeout,
            cookie_jar=DummyCookieJar(),  # one client's cookies are not the next one's
            auto_decompress=False,  # bytes are passed on as they come
        )

    def take_in(self, why: str) -> None:
        """Use it from now on."""
        logger.warning("Replica %d at %s gets requests: %s", self.number, self.url, why)
        self.up, self._told = True, ""

    def leave_out(self, reason: str, details: str = "") -> None:
        """Use it no more; what is under way on its connections goes on."""
        told = f"{reason}{': ' if details else ''}{details}"
        if told != self._told:
            logger.error("Replica %d at %s gets no requests: it %s", self.number, self.url, told)
        self.up, self.left_out, self._told = False, reason, told

    async def lose(self) -> None:
        """End what is under way on its connections."""
        lost = self.session
        self.connect()
        await lost.close()

    async def look(self) -> Look:
        """See whether it answers."""
        try:
            timeout = ClientTimeout(total=LOOK_TIMEOUT_S)
            async with self.session.get(f"{self.url}/model_info", timeout=timeout) as answer:
                unavailable = answer.status == HTTPStatus.SERVICE_UNAVAILABLE
                return Look.SILENT if unavailable else Look.ANSWERS
        except ClientConnectorError as error:
            return Look.REFUSES if isinstance(error.os_error, ConnectionRefusedError) else Look.SILENT
        except (ClientError, TimeoutError):
            return Look.SILENT

    async def identity(self, api_key: str | None) -> dict[str, Any]:
        """What it must have in common with the others (:mod:`sglang_ext.ray.identity`).

        Raises:
            NoAccess: it wants a key that is not known here.
            ClientError, TimeoutError: it does not answer.
            ValueError: its answer is no ``/server_info``.
        """
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = ClientTimeout(total=COMPARE_TIMEOUT_S)
        async with self.session.get(f"{self.url}/server_info", headers=headers, timeout=timeout) as answer:
            if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) and not api_key:
                raise NoAccess
            if answer.status != HTTPStatus.OK:
                raise ValueError(f"/server_info answers with status {answer.status}")
            info = await answer.json()
            if not isinstance(info, dict):
                raise ValueError("/server_info is no JSON object")
            return identity_of(info)
