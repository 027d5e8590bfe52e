"""A front before replicas that answer with what they got, and its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from sglang_ext.ray.front import LEAST_REQUESTS, REPLICA, Front
from sglang_ext.ray.front_connections import MAX_CONNECTIONS, serving

#: Seconds after which a test has failed: what is broken may hang.
TEST_TIMEOUT_S = 30.0


def finish(check: Coroutine[Any, Any, Any], timeout: float = TEST_TIMEOUT_S) -> Any:
    """Run a test on an event loop of its own."""
    return asyncio.run(asyncio.wait_for(check, timeout))


#: As clients write it: spaces, order and unknown fields are kept.
BODY = b'{"input_ids": [1,2],  "sampling_params":{"is_deterministic":true,"sampling_seed":3},"x":1}'


class Backend:
    """A replica that answers with what it got; ``answer`` may be replaced."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, str | None]] = []
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.echo
        self.alive = True
        self.left = 0
        self.key: str | None = None
        self.info: dict[str, Any] = {"version": "1", "internal_states": [{"llm42_fingerprint": "ab"}]}

    async def echo(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=await request.read(), headers={"X-Of-Server": "y"})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request.path_qs, await request.read(), request.headers.get("Authorization")))
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.left += 1
            raise

    async def model_info(self, request: web.Request) -> web.Response:
        if not self.alive:
            await asyncio.sleep(60)
        return web.json_response({})

    async def server_info(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response(self.info)


@dataclass
class Address:
    """Where the front is, served as the program serves it."""

    port: int

    def make_url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


Setup = tuple[Front, list[Backend], list[TestServer], Address, ClientSession]


def application(backend: Backend) -> web.Application:
    app = web.Application()
    app.router.add_get("/model_info", backend.model_info)
    app.router.add_get("/server_info", backend.server_info)
    app.router.add_route("*", "/{path:.*}", backend.handle)
    return app


@asynccontextmanager
async def setup(
    count: int = 2,
    policy: str = LEAST_REQUESTS,
    backends: list[Backend] | None = None,
    limit: int = MAX_CONNECTIONS,
    **options: Any,
) -> AsyncIterator[Setup]:
    async with AsyncExitStack() as stack:
        backends, servers = backends or [Backend() for _ in range(count)], []
        for backend in backends:
            app = application(backend)
            servers.append(TestServer(app))
            await servers[-1].start_server(auto_decompress=False)
            stack.push_async_callback(servers[-1].close)
        front = Front([str(server.make_url("")) for server in servers], policy, **options)
        port = await stack.enter_async_context(serving(front.application(), "127.0.0.1", 0, limit=limit))
        client = await stack.enter_async_context(ClientSession())
        yield front, backends, servers, Address(port), client


async def post(
    address: Address, client: ClientSession, path: str = "/generate", **headers: str
) -> tuple[int, bytes, str | None]:
    async with client.post(address.make_url(path), data=BODY, headers=headers) as answer:
        return answer.status, await answer.read(), answer.headers.get(REPLICA)


async def never(request: web.Request) -> web.Response:
    """An answer that does not come."""
    await asyncio.Event().wait()
    return web.Response()


async def until(condition: Callable[[], Any], timeout: float = 5) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it was not there in time.
    """
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.02)


def streaming(*pieces: bytes, cut: bool = False) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.02)
        if cut:
            assert request.transport is not None
            request.transport.abort()
        return response

    return stream
