"""Clients that mean no good, and those that only behave oddly: over real sockets, byte by byte."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from front_setup import Address, finish, post, setup

from sglang_ext.ray import front_connections

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


async def _until(condition: Callable[[], Any], timeout: float = 5) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.02)


async def _never(request: web.Request) -> web.Response:
    await asyncio.Event().wait()
    return web.Response()


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
                await _until(lambda: backend.left and not front.replicas[0].in_flight, 20)
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
