"""Clients that mean no good, and those that only behave oddly: over real sockets, byte by byte."""

from __future__ import annotations

import asyncio
import gzip
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from front_setup import BODY, Address, finish, never, post, setup, streaming, until

from sglang_ext.ray import front as fronts
from sglang_ext.ray import front_connections, front_replica
from sglang_ext.ray.front import ROUND_ROBIN

GENERATE = b"POST /generate HTTP/1.1\r\nHost: x\r\n"

WHOLE = GENERATE + b"Content-Length: 2\r\n\r\n{}"


class Client:
    """A connection to the front."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, timeout: float = 5) -> bytes:
        """Status line and headers of the next answer."""
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), timeout)

    async def rest(self, timeout: float = 5) -> bytes:
        """Everything until the front closes."""
        return await asyncio.wait_for(self.reader.read(), timeout)


@asynccontextmanager
async def _client(address: Address) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


# Connections


def test_a_connection_too_many_gets_503_and_there_is_room_when_another_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        async with setup(1, limit=2) as (_, (backend,), _, address, _), AsyncExitStack() as clients:
            idle, used = [await clients.enter_async_context(_client(address)) for _ in range(2)]
            await used.send(WHOLE)
            assert (await used.head()).startswith(b"HTTP/1.1 200")
            for _ in range(2):
                async with _client(address) as late:
                    await late.send(GENERATE + b"Content-Length: 200000\r\n\r\n" + bytes(200000))
                    answer = await late.rest()
                    assert answer.startswith(b"HTTP/1.1 503") and b"\r\nRetry-After: " in answer
                    assert b"too many connections" in answer
            assert len(backend.seen) == 1
            idle.writer.close()
            await asyncio.sleep(0.1)
            async with _client(address) as late:
                await late.send(WHOLE)
                assert (await late.head()).startswith(b"HTTP/1.1 200")

    finish(check())
    assert caplog.text.count("All 2 connections of clients are in use") == 1  # one line, not one for each


def test_connections_turned_away_are_few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_connections, "TURNED_AWAY_S", 1)
    monkeypatch.setattr(front_connections, "MAX_TURNED_AWAY", 1)

    async def check() -> None:
        async with setup(1, limit=1) as (_, _, _, address, _), _client(address):
            await asyncio.sleep(0.1)
            async with _client(address) as told, _client(address) as further:
                assert await further.rest(0.5) == b""
                assert await told.rest(2) == b""  # it has not asked for anything

    finish(check())


def test_a_connection_without_a_whole_request_head_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_connections, "IDLE_TIMEOUT_S", 0.5)

    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, _), AsyncExitStack() as clients:
            silent, slow, idle = [await clients.enter_async_context(_client(address)) for _ in range(3)]
            await idle.send(WHOLE)
            await idle.head()

            async def trickle() -> None:
                for byte in GENERATE * 10:
                    await slow.send(bytes([byte]))
                    await asyncio.sleep(0.1)

            trickling = asyncio.create_task(trickle())
            await asyncio.gather(silent.rest(), slow.rest(), idle.rest())
            trickling.cancel()
            assert len(backend.seen) == 1

    finish(check())


def test_a_request_that_takes_long_is_not_an_idle_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_connections, "IDLE_TIMEOUT_S", 0.2)

    async def slowly(request: web.Request) -> web.Response:
        await asyncio.sleep(1)
        return web.Response()

    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, client):
            backend.answer = slowly
            assert (await post(address, client))[0] == 200

    finish(check())


def test_a_client_that_takes_nothing_of_its_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request ends at the replica, which meanwhile was not read from faster than the client read."""
    monkeypatch.setattr(front_connections, "SEND_TIMEOUT_S", 0.5)
    sent = 0

    async def flood(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(b"data: " + bytes(2**16) + b"\n\n")
            sent += 2**16

    async def check() -> None:
        async with setup(1) as (front, (backend,), _, address, _):
            backend.answer = flood
            async with _client(address) as client:
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                await client.send(WHOLE)
                await until(lambda: backend.left and not front.replicas[0].in_flight, 20)
                assert 0 < sent < 64 * 2**20

    finish(check())


@pytest.mark.parametrize(("files", "expected"), [(20000, 4096), (1024, 256), (100, 1)])
def test_connections_follow_from_the_files_that_may_be_opened(files: int, expected: int) -> None:
    assert front_connections.connections_for(files) == expected


def test_the_limit_of_open_files_is_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 100000))
    assert front_connections.allow_files() == 8704 and raised == [(8704, 100000)]
    assert not caplog.text
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert front_connections.allow_files() == 4096
    assert "room for 1792 connections of clients, not 4096" in caplog.text


# Requests


def test_a_compressed_body_passes_byte_for_byte() -> None:
    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, client):
            body = gzip.compress(BODY, mtime=0)
            async with client.post(
                address.make_url("/generate"), data=body, headers={"Content-Encoding": "gzip"}
            ) as answer:
                assert (answer.status, await answer.read()) == (200, body)
            assert [seen[1] for seen in backend.seen] == [body]

    finish(check())


def test_a_query_passes_as_it_was_written() -> None:
    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, _), _client(address) as client:
            await client.send(WHOLE.replace(b"/generate", b"/generate?a=%2F+b%20c%zz"))
            assert (await client.head()).startswith(b"HTTP/1.1 200")
            assert backend.seen[0][0] == "/generate?a=%2F+b%20c%zz"

    finish(check())


def test_what_is_not_http_gets_400_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with setup(1) as (front, (backend,), _, address, _):
            for rest in (
                b"A B: 1\r\n\r\n",
                b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
            ):
                async with _client(address) as client:
                    await client.send(GENERATE + rest)
                    assert b" 400 " in (await client.rest()).splitlines()[0], rest
            assert not backend.seen and front.bodies.held == 0

    finish(check())
    assert "Invalid header token" in caplog.text and "Traceback" not in caplog.text


def test_browsers_may_ask_a_replica_what_they_may_send() -> None:
    async def check() -> None:
        async with setup(1, api_key="secret") as (_, (backend,), _, address, client):
            async with client.options(address.make_url("/v1/chat/completions")) as answer:
                assert answer.status == 200 and answer.headers["X-Of-Server"] == "y"
            assert [seen[0] for seen in backend.seen] == ["/v1/chat/completions"]

    finish(check())


@pytest.mark.parametrize(
    "headers",
    [
        b"Expect: 100-continue\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n",
    ],
)
def test_wishes_about_the_connection_stay_with_the_front(headers: bytes) -> None:
    named: list[set[str]] = []

    async def take(request: web.Request) -> web.Response:
        named.append({name.lower() for name in request.headers})
        return web.Response(body=await request.read())

    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, _):
            backend.answer = take
            async with _client(address) as client:
                await client.send(GENERATE + headers + b"Content-Length: 2\r\n\r\n")
                if b"Expect" in headers:
                    assert (await client.head()) == b"HTTP/1.1 100 Continue\r\n\r\n"
                await client.send(b"{}")
                assert (await client.head()).startswith(b"HTTP/1.1 200")
                assert await client.reader.readexactly(2) == b"{}"
            assert not named[0] & {"expect", "upgrade", "http2-settings", "connection"}

    finish(check())


def test_pipelined_requests_are_answered_in_turn() -> None:
    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, _):
            async with _client(address) as client:
                requests = [WHOLE.replace(b"{}", b"%02d" % number) for number in range(50)]
                await client.send(b"".join(requests))
                for number in range(50):
                    assert (await client.head()).startswith(b"HTTP/1.1 200")
                    assert await client.reader.readexactly(2) == b"%02d" % number
            assert len(backend.seen) == 50

    finish(check())


def test_the_body_of_a_stream_that_has_begun_is_held_no_longer() -> None:
    go_on = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await go_on.wait()
        return response

    async def check() -> None:
        async with setup(1) as (front, (backend,), _, address, client):
            backend.answer = stream
            async with client.post(address.make_url("/generate"), data=BODY) as answer:
                assert await answer.content.readany() == b"data: 1\n\n"
                assert front.bodies.held == 0
                go_on.set()
                assert await answer.read() == b""

    finish(check())


# Replicas


def test_redirects_reach_the_client_and_cookies_stay_with_their_client() -> None:
    cookies: list[str | None] = []

    async def redirect(request: web.Request) -> web.Response:
        cookies.append(request.headers.get("Cookie"))
        return web.Response(status=307, headers={"Location": "/elsewhere", "Set-Cookie": "whose=first"})

    async def check() -> None:
        async with setup(1) as (front, (backend,), servers, address, client):
            front.replicas[0].url = f"http://localhost:{servers[0].port}"  # jars keep no cookies of addresses
            backend.answer = redirect
            for _ in range(2):
                async with client.post(
                    address.make_url("/generate"), data=BODY, allow_redirects=False
                ) as answer:
                    assert (answer.status, answer.headers["Location"]) == (307, "/elsewhere")
            assert [seen[0] for seen in backend.seen] == ["/generate"] * 2

    finish(check())
    assert cookies == [None, None]


def test_a_replica_that_was_lost_while_another_was_tried_is_not_tried() -> None:
    """Looks end the requests of a replica once, when it is lost: a later one would wait for ever."""

    async def check() -> None:
        async with setup(2, ROUND_ROBIN) as (front, backends, _, address, client):

            async def unavailable(request: web.Request) -> web.Response:
                front.replicas[1].leave_out("does not answer")
                return web.Response(status=503)

            backends[0].answer, backends[1].answer = unavailable, never
            assert (await asyncio.wait_for(post(address, client), 5))[0] == 503
            assert len(backends[0].seen) == 1 and not backends[1].seen

    finish(check())


def test_requests_that_fail_together_do_not_make_a_replica_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fronts, "LOOK_EVERY_S", 60)
    monkeypatch.setattr(front_replica, "LOOK_TIMEOUT_S", 0.2)

    async def cut(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def check() -> None:
        async with setup(1) as (front, (backend,), _, address, client):
            backend.answer, backend.alive = cut, False
            answers = await asyncio.gather(*[post(address, client) for _ in range(2 * fronts.LOOKS)])
            assert {status for status, *_ in answers} == {503}
            assert front.replicas[0].up and front.replicas[0].silent == 0

    finish(check())


def test_statistics_do_not_wait_for_a_replica_that_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fronts, "STATISTICS_TIMEOUT_S", 0.2)

    async def statistics(request: web.Request) -> web.Response:
        return web.json_response({"dp_0": {}})

    async def check() -> None:
        async with setup(2) as (_, backends, _, address, client):
            backends[0].answer, backends[1].answer = never, statistics
            async with client.get(address.make_url("/llm42_stats")) as answer:
                assert (answer.status, await answer.json()) == (200, {"replica_1": {"dp_0": {}}})

    finish(check(), 10)


def test_a_stream_that_is_cut_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with setup(2) as (_, backends, _, address, _):
            for backend in backends:
                backend.answer = streaming(b"data: 1\n\n", cut=True)
            async with _client(address) as client:
                await client.send(WHOLE)
                answer = await client.rest()
                assert b"data: 1\n\n" in answer and not answer.endswith(b"0\r\n\r\n")
            assert sum(len(backend.seen) for backend in backends) == 1

    finish(check())
    assert "cut after its beginning" in caplog.text and "Traceback" not in caplog.text


def test_a_client_that_leaves_its_stream_is_no_fault_of_the_replica(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = fronts._stream

    async def leave_and_stream(request: web.Request, *rest: Any) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return await stream(request, *rest)

    async def check() -> None:
        monkeypatch.setattr(fronts, "_stream", leave_and_stream)
        async with setup(2) as (front, backends, _, address, _):
            for backend in backends:
                backend.answer = streaming(b"data: 1\n\n", b"data: 2\n\n")
            async with _client(address) as client:
                await client.send(WHOLE)
                assert await client.rest() == b""
            await until(lambda: not any(replica.in_flight for replica in front.replicas))
            assert sum(len(backend.seen) for backend in backends) == 1

    finish(check())
    assert "/generate" not in caplog.text and "Traceback" not in caplog.text
