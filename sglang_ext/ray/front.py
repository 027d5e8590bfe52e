"""``python -m sglang_ext.ray.front``: one address in front of several replicas of a server.

    python -m sglang_ext.ray.front --port 30000 http://10.0.0.1:31000 http://10.0.0.2:31000

Requests and answers pass byte for byte. SGLang's own router reads a request into its own types and writes it
anew, which takes ``is_deterministic`` out of ``/generate`` and ``/v1/chat/completions`` without a word
(docs/ray.md), so it cannot stand before a server with deterministic requests. A request that a lost replica
has not begun to answer goes to another one; a deterministic request gets the same output there. This process
imports neither torch nor SGLang nor Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

from aiohttp import (
    ClientConnectionError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    TCPConnector,
    web,
)

logger = logging.getLogger(__name__)

PROGRAM = "sglang_ext.ray.front"

LOOPBACK = "127.0.0.1"

LEAST_REQUESTS = "least_requests"
ROUND_ROBIN = "round_robin"

#: How a replica is chosen.
POLICIES = (LEAST_REQUESTS, ROUND_ROBIN)

#: Requests with the same value of this header go to the same replica while it is up: its prefix cache holds
#: the earlier turns of a conversation.
ROUTING_KEY = "X-Routing-Key"

#: Header of answers: number of the replica that gave it.
REPLICA = "X-Replica"

#: What is passed on. Nothing else is: what changes a server (weights, caches, adapters, statistics) would
#: reach one replica and make it differ from the others; it is sent to each of them directly.
PASSED_ON = (
    ("POST", "/generate"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/tokenize"),
    ("POST", "/v1/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/model_info"),
    ("GET", "/get_model_info"),
)

STATISTICS = "/llm42_stats"

#: Largest request body, in bytes: prompts may hold images.
MAX_BODY_BYTES = 512 * 2**20

#: Seconds to connect; between looks at a replica; that a look may take. This many looks in a row without an
#: answer, and the replica is taken for lost: requests that it has not answered go to another one.
CONNECT_TIMEOUT_S = 5.0
LOOK_EVERY_S = 1.0
LOOK_TIMEOUT_S = 5.0
LOOKS = 3

#: Seconds after which an idle connection is closed, before SGLang does (5 s, SGLANG_TIMEOUT_KEEP_ALIVE): a
#: request that crosses its closing would look like a lost replica.
KEEP_ALIVE_S = 3.0

#: Of one hop only (RFC 9110, 7.6.1), or set anew by aiohttp for each hop.
NOT_PASSED_ON = frozenset(
    ("connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
)


@dataclass
class Replica:
    """One server.

    Attributes:
        number: in the order of the command line.
        url: without a path.
        up: whether it gets requests.
        in_flight: requests that it has.
        silent: looks in a row that it did not answer.
    """

    number: int
    url: str
    up: bool = True
    in_flight: int = 0
    silent: int = 0
    session: ClientSession = field(init=False)

    def connect(self) -> None:
        """Have new connections; on the event loop."""
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self.session = ClientSession(
            connector=TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=timeout,
            auto_decompress=False,  # bytes are passed on as they come
        )

    async def lose(self) -> None:
        """Stop using it, and end what is under way on its connections."""
        if self.up:
            logger.error("Replica %d at %s does not answer: it gets no more requests", self.number, self.url)
        self.up = False
        lost = self.session
        self.connect()
        await lost.close()

    async def look(self) -> None:
        """See whether it answers."""
        try:
            timeout = ClientTimeout(total=LOOK_TIMEOUT_S)
            async with self.session.get(f"{self.url}/model_info", timeout=timeout) as answer:
                answers = answer.status != HTTPStatus.SERVICE_UNAVAILABLE
        except (ClientError, TimeoutError):
            answers = False
        self.silent = 0 if answers else self.silent + 1
        if answers and not self.up:
            logger.warning("Replica %d at %s answers again", self.number, self.url)
            self.up = True
        if self.up and self.silent >= LOOKS:
            await self.lose()


class Front:
    """The replicas, and the choice among them."""

    def __init__(self, urls: Sequence[str], policy: str = LEAST_REQUESTS) -> None:
        self.replicas = [Replica(number, url.rstrip("/")) for number, url in enumerate(urls)]
        self._policy = policy
        self._turn = itertools.count()

    def in_order(self, key: str | None = None) -> list[Replica]:
        """Replicas that are up, in the order in which a request tries them.

        Args:
            key: of :data:`ROUTING_KEY`. The order of replicas is then that of rendezvous hashing, so that
                losing one moves its own keys only.
        """
        up = [replica for replica in self.replicas if replica.up]
        if key is not None:
            return sorted(up, key=lambda replica: hashlib.sha256(f"{key}\0{replica.url}".encode()).digest())
        turn = next(self._turn) % max(1, len(up))
        turned = up[turn:] + up[:turn]
        return (
            turned if self._policy == ROUND_ROBIN else sorted(turned, key=lambda replica: replica.in_flight)
        )

    def application(self) -> web.Application:
        """The HTTP application."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.add_routes([web.route(method, path, self.pass_on) for method, path in PASSED_ON])
        app.add_routes([web.get("/health", self.health), web.get(STATISTICS, self.statistics)])
        app.cleanup_ctx.append(self._watching)
        return app

    async def _watching(self, app: web.Application) -> AsyncIterator[None]:
        for replica in self.replicas:
            replica.connect()
        watches = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]
        yield
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        for replica in self.replicas:
            await replica.session.close()

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await replica.look()

    async def health(self, request: web.Request) -> web.Response:
        """200 while at least one replica is up."""
        up = sum(replica.up for replica in self.replicas)
        status = HTTPStatus.OK if up else HTTPStatus.SERVICE_UNAVAILABLE
        return web.json_response({"replicas": len(self.replicas), "up": up}, status=status)

    async def statistics(self, request: web.Request) -> web.Response:
        """``GET /llm42_stats`` of every replica that is up, under ``replica_0`` and so on.

        A replica that refuses (no API key, say) decides the answer.
        """
        found = {}
        for replica in [replica for replica in self.replicas if replica.up]:
            try:
                async with replica.session.get(
                    f"{replica.url}{STATISTICS}", headers=_passed_on(request.headers.items())
                ) as answer:
                    if answer.status != HTTPStatus.OK:
                        return web.Response(status=answer.status, body=await answer.read())
                    found[f"replica_{replica.number}"] = await answer.json()
            except (ClientError, TimeoutError) as error:
                logger.warning("Replica %d: %s%s: %s", replica.number, replica.url, STATISTICS, error)
        return web.json_response(found)

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """Hand a request on, to another replica if one is lost or refuses with 503 before it answers."""
        body = await request.read()
        replicas = self.in_order(request.headers.get(ROUTING_KEY))
        for left, replica in zip(range(len(replicas) - 1, -1, -1), replicas, strict=True):
            replica.in_flight += 1
            try:
                answered = await self._try(request, body, replica, is_last=left == 0)
            finally:
                replica.in_flight -= 1
            if answered is not None:
                return answered
        return web.json_response(
            {"error": {"message": "no replica answers; send the request again", "code": 503}},
            status=HTTPStatus.SERVICE_UNAVAILABLE,
        )

    async def _try(
        self, request: web.Request, body: bytes, replica: Replica, is_last: bool
    ) -> web.StreamResponse | None:
        """The answer of one replica, None if it gives none and another may be asked."""
        url = f"{replica.url}{request.path_qs}"
        headers = _passed_on(request.headers.items())
        try:
            async with replica.session.request(
                request.method, url, data=body or None, headers=headers
            ) as answer:
                if answer.status == HTTPStatus.SERVICE_UNAVAILABLE and not is_last:
                    return None
                first = await (answer.content.readany() if _is_stream(answer) else answer.read())
                return await _answer(request, replica, answer, first)
        except _Cut:
            raise
        except ClientConnectionError as error:
            logger.warning("Replica %d: %s: %r", replica.number, url, error)
            await replica.look()  # refused connections show it at once to the requests that follow
            return None
        except (ClientError, TimeoutError) as error:
            logger.warning("Replica %d: %s: %r", replica.number, url, error)
            return None


class _Cut(Exception):
    """An answer ended after its beginning had reached the client."""


async def _answer(
    request: web.Request, replica: Replica, answer: ClientResponse, first: bytes
) -> web.StreamResponse:
    """Hand an answer on: ``first``, and of a stream the rest as it comes.

    Raises:
        _Cut: aiohttp then ends the client's connection, so that the client sees that the answer is not whole.
    """
    headers = {**_passed_on(answer.headers.items()), REPLICA: str(replica.number)}
    if not _is_stream(answer):
        return web.Response(status=answer.status, headers=headers, body=first)
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    try:
        await response.write(first)
        async for piece in answer.content.iter_any():
            await response.write(piece)
    except ClientError as error:
        raise _Cut(f"replica {replica.number}: {error!r}") from error
    await response.write_eof()
    return response


def _is_stream(answer: ClientResponse) -> bool:
    return answer.content_type == "text/event-stream"


def _passed_on(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in NOT_PASSED_ON}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(PROGRAM)
    parser.add_argument("urls", nargs="+", metavar="URL", help="of a replica")
    parser.add_argument("--host", default=LOOPBACK, help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--policy", choices=POLICIES, default=POLICIES[0])
    parser.add_argument(
        "--share-port",
        action="store_true",
        help="let further processes of this program serve the same port; the kernel deals out connections",
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format=f"[%(asctime)s] {PROGRAM}: %(message)s")
    front = Front(options.urls, options.policy)
    web.run_app(
        front.application(),
        host=options.host,
        port=options.port,
        reuse_port=options.share_port,
        print=None,
        handler_cancellation=True,  # a client that leaves ends its request at the replica, too
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
