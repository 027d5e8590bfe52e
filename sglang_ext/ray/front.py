"""``python -m sglang_ext.ray.front``: one address in front of several replicas of a server.

    python -m sglang_ext.ray.front --port 30000 http://10.0.0.1:31000 http://10.0.0.2:31000

Requests and answers pass byte for byte. SGLang's own router reads a request into its own types and writes it
anew, which takes ``is_deterministic`` out of ``/generate`` and ``/v1/chat/completions`` without a word
(docs/ray.md), so it cannot stand before a server with deterministic requests. A request that a lost replica
has not begun to answer goes to another one; a deterministic request gets the same output there, because a
replica is compared with the others before it gets requests, and again after each time that it was gone. This
process imports neither torch nor SGLang nor Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from aiohttp import ClientConnectionError, ClientError, ClientResponse, ClientTimeout, web
from multidict import CIMultiDict
from yarl import URL

from sglang_ext.ray import agreement
from sglang_ext.ray.front_connections import allow_files, connections_for, serving
from sglang_ext.ray.front_events import beginning, is_refusal
from sglang_ext.ray.front_replica import (
    DIFFERS,
    NOT_COMPARED,
    REFUSES_CONNECTIONS,
    SILENT,
    Look,
    NoAccess,
    Replica,
)
from sglang_ext.ray.front_requests import Bodies, Body, Refused, key_check, passed_on, refusal

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

#: Seconds that a replica has for its statistics, which its scheduler gives.
STATISTICS_TIMEOUT_S = 10.0

#: Seconds between looks at a replica. This many looks in a row without an answer, and the replica is taken
#: for lost: requests that it has not answered go to another one. One that refuses connections has no process
#: any more and gets no request from the first such look on.
LOOK_EVERY_S = 1.0
LOOKS = 3

#: Seconds for the first looks, before the address opens.
FIRST_LOOKS_S = 5.0

#: Seconds before a replica that differs is compared again: its weights may be updated a moment later than the
#: others'.
COMPARE_EVERY_S = 10.0

#: Variables of :mod:`sglang_ext.ray.replicas`, which are not seen in lists of processes: the replicas' API
#: key, and the identity (:mod:`sglang_ext.ray.identity`, as JSON) that they had at the start.
API_KEY = "SGLANG_EXT_FRONT_API_KEY"
EXPECTED = "SGLANG_EXT_FRONT_EXPECTED"

#: Headers that aiohttp would add where the client sent none.
NOT_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")

#: Whose identity is meant, in messages.
AT_START = "the replicas at the start"


class Front:
    """The replicas, and the choice among them.

    Args:
        urls: of the replicas, without a path.
        policy: one of :data:`POLICIES`.
        api_key: that clients must send and replicas want; None leaves it to the replicas.
        expected: identity of a replica while no other is up to compare it with; None means that of the first
            one that answers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        policy: str = LEAST_REQUESTS,
        api_key: str | None = None,
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        self.replicas = [Replica(number, url.rstrip("/")) for number, url in enumerate(urls)]
        self.bodies = Bodies()
        self._policy = policy
        self._api_key = api_key
        self._expected = expected
        self._comparing = asyncio.Lock()
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
        app = web.Application(middlewares=[key_check(self._api_key)] if self._api_key else [])
        app.add_routes([web.route(method, path, self.pass_on) for method, path in PASSED_ON])
        app.add_routes([web.options(path, self.pass_on) for _, path in PASSED_ON])  # browsers ask before
        app.add_routes([web.get("/health", self.health), web.get(STATISTICS, self.statistics)])
        app.cleanup_ctx.append(self._watching)
        return app

    async def _watching(self, app: web.Application) -> AsyncIterator[None]:
        for replica in self.replicas:
            replica.connect()
        looks = [asyncio.create_task(self.look(replica)) for replica in self.replicas]
        await asyncio.wait(looks, timeout=FIRST_LOOKS_S)
        watches = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]
        yield
        for task in (*looks, *watches):
            task.cancel()
        await asyncio.gather(*looks, *watches, return_exceptions=True)
        for replica in self.replicas:
            await replica.session.close()

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look(replica)

    async def look(self, replica: Replica, counts: bool = True) -> None:
        """See whether a replica answers; leave it out or take it in accordingly.

        Args:
            replica: which.
            counts: whether this is one of the looks that come one after the other (:data:`LOOKS`).
        """
        seen = await replica.look()
        if seen is Look.ANSWERS:
            replica.silent = 0
            if not replica.up:
                await self._compare(replica)
            return
        if seen is Look.REFUSES:
            replica.leave_out(REFUSES_CONNECTIONS)
        if not counts:
            return
        replica.silent += 1
        if replica.silent == LOOKS:
            replica.leave_out(REFUSES_CONNECTIONS if seen is Look.REFUSES else SILENT)
            await replica.lose()

    async def _compare(self, replica: Replica) -> None:
        """Take a replica in if it is like the others: it may have been started anew, or be another server."""
        now = asyncio.get_running_loop().time
        async with self._comparing:
            if replica.up or now() < replica.compare_at:
                return
            try:
                identity = await replica.identity(self._api_key)
                others, theirs = await self._reference(identity)
            except NoAccess:
                replica.take_in("it could NOT be compared with the others; give the front their --api-key")
                return
            except (ClientError, TimeoutError, ValueError) as error:
                replica.leave_out(NOT_COMPARED, repr(error))
                return
            found = agreement.differences({replica.url: identity, others: theirs})
            if found:
                replica.compare_at = now() + COMPARE_EVERY_S
                replica.leave_out(DIFFERS, "; ".join(found[: agreement.MAX_LISTED]))
            elif replica.silent == 0:  # a look may have failed in the meantime
                replica.take_in(f"it answers and is like {others}")

    async def _reference(self, first: dict[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Whom to compare with, and their identity: a replica in use, for weights may have been updated."""
        for other in [other for other in self.replicas if other.up]:
            try:
                return other.url, await other.identity(self._api_key)
            except (ClientError, TimeoutError, ValueError) as error:
                logger.warning("Replica %d: %s/server_info: %r", other.number, other.url, error)
        if self._expected is None:
            self._expected = first
        return AT_START, self._expected

    async def health(self, request: web.Request) -> web.Response:
        """200 while at least one replica is up; of the others, why they get no requests."""
        left_out = {str(replica.number): replica.left_out for replica in self.replicas if not replica.up}
        up = len(self.replicas) - len(left_out)
        status = HTTPStatus.OK if up else HTTPStatus.SERVICE_UNAVAILABLE
        found = {"replicas": len(self.replicas), "up": up, "left_out": left_out}
        return web.json_response(found, status=status)

    async def statistics(self, request: web.Request) -> web.Response:
        """``GET /llm42_stats`` of every replica that is up, under ``replica_0`` and so on.

        A replica that refuses (no API key, say) decides the answer; one that gives none in time is missing.
        """
        found = {}
        for replica in [replica for replica in self.replicas if replica.up]:
            try:
                async with replica.session.get(
                    f"{replica.url}{STATISTICS}",
                    headers=passed_on(request.headers.items()),
                    timeout=ClientTimeout(total=STATISTICS_TIMEOUT_S),
                ) as answer:
                    if answer.status != HTTPStatus.OK:
                        return web.Response(status=answer.status, body=await answer.read())
                    found[f"replica_{replica.number}"] = await answer.json()
            except (ClientError, TimeoutError) as error:
                logger.warning("Replica %d: %s%s: %r", replica.number, replica.url, STATISTICS, error)
        return web.json_response(found)

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """Hand a request on, to another replica if one is lost or refuses with 503 before it answers."""
        try:
            async with self.bodies.read(request) as body:
                return await self._pass_on(request, body)
        except Refused as refused:
            return refused.answer

    async def _pass_on(self, request: web.Request, body: Body) -> web.StreamResponse:
        replicas = self.in_order(request.headers.get(ROUTING_KEY))
        for left, replica in zip(range(len(replicas) - 1, -1, -1), replicas, strict=True):
            if not replica.up:  # lost while others were tried; nothing would end a request that it has now
                continue
            replica.in_flight += 1
            try:
                answered = await self._try(request, body, replica, is_last=left == 0)
            finally:
                replica.in_flight -= 1
            if answered is not None:
                return answered
        return refusal(HTTPStatus.SERVICE_UNAVAILABLE, "no replica answers; send the request again")

    async def _try(
        self, request: web.Request, body: Body, replica: Replica, is_last: bool
    ) -> web.StreamResponse | None:
        """The answer of one replica, None if it gives none and another may be asked."""
        url = URL(f"{replica.url}{request.path_qs}", encoded=True)
        headers = passed_on(request.headers.items())
        try:
            async with replica.session.request(
                request.method,
                url,
                data=body.data or None,
                headers=headers,
                skip_auto_headers=NOT_ADDED,
                allow_redirects=False,
            ) as answer:
                if answer.status == HTTPStatus.SERVICE_UNAVAILABLE and not is_last:
                    return None
                if not _is_stream(answer):
                    return _whole(replica, answer, await answer.read())
                begun = await beginning(answer.content)
                if is_refusal(begun) and not is_last:
                    logger.warning("Replica %d: %s: refused before the first token", replica.number, url)
                    return None
                body.release()
                return await _stream(request, replica, answer, begun)
        except ClientConnectionError as error:
            logger.warning("Replica %d: %s: %r", replica.number, url, error)
            # Refused connections show it at once to the requests that follow; many requests that fail
            # together are no looks in a row.
            await self.look(replica, counts=False)
            return None
        except (ClientError, TimeoutError) as error:
            logger.warning("Replica %d: %s: %r", replica.number, url, error)
            return None


class _Cut(Exception):
    """An answer ended after its beginning had reached the client."""


def _headers(replica: Replica, answer: ClientResponse) -> CIMultiDict[str]:
    headers = passed_on(answer.headers.items())
    headers[REPLICA] = str(replica.number)
    return headers


def _whole(replica: Replica, answer: ClientResponse, body: bytes) -> web.Response:
    return web.Response(status=answer.status, headers=_headers(replica, answer), body=body)


async def _stream(
    request: web.Request, replica: Replica, answer: ClientResponse, begun: bytes
) -> web.StreamResponse:
    """Hand a stream on: what has come of it, and the rest as it comes.

    One that is cut ends the client's connection, so that the client sees that the answer is not whole.
    """
    response = web.StreamResponse(status=answer.status, headers=_headers(replica, answer))
    piece = begun
    try:
        await response.prepare(request)
        while piece:
            await response.write(piece)
            piece = await _next(answer)
        await response.write_eof()
    except _Cut as cut:
        logger.warning("Replica %d: %s: cut after its beginning: %s", replica.number, answer.url, cut)
        if request.transport is not None:
            request.transport.close()
    except ConnectionError:  # of the client, which is nothing that a replica is to blame for
        logger.debug("A client has left in the middle of a stream")
    return response


async def _next(answer: ClientResponse) -> bytes:
    """What has come of a stream since; nothing at its end.

    Raises:
        _Cut: it is not whole.
    """
    try:
        return await answer.content.readany()
    except ClientError as error:
        raise _Cut(repr(error)) from error


def _is_stream(answer: ClientResponse) -> bool:
    return answer.content_type == "text/event-stream"


async def serve(front: Front, host: str, port: int, share_port: bool) -> None:
    """Serve until a signal; a second one ends the process at once."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, ended.set)
    async with serving(front.application(), host, port, share_port, connections_for(allow_files())):
        await ended.wait()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(PROGRAM)
    parser.add_argument("urls", nargs="+", metavar="URL", help="of a replica")
    parser.add_argument("--host", default=LOOPBACK, help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--policy", choices=POLICIES, default=POLICIES[0])
    parser.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY),
        help=f"of the replicas: checked before a body is read, needed to compare them (or in {API_KEY})",
    )
    parser.add_argument(
        "--share-port",
        action="store_true",
        help="let further processes of this program serve the same port; the kernel deals out connections",
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format=f"[%(asctime)s] {PROGRAM}: %(message)s")
    expected = os.environ.get(EXPECTED)
    front = Front(
        options.urls, options.policy, options.api_key or None, json.loads(expected) if expected else None
    )
    asyncio.run(serve(front, options.host, options.port, options.share_port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
