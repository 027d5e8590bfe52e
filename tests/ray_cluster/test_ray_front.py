"""One address in front of replicas: bytes pass unchanged, lost replicas are left out, others answer."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from aiohttp import ClientError, web
from aiohttp.test_utils import TestServer
from front_setup import BODY, Backend, application, finish, never, post, setup, streaming, until
from multidict import CIMultiDict

from sglang_ext.ray import front as fronts
from sglang_ext.ray import front_replica, front_requests
from sglang_ext.ray.front import ROUND_ROBIN, ROUTING_KEY, Front


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_requests_and_answers_pass_byte_for_byte(path: str) -> None:
    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, client):
            headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
            async with client.post(address.make_url(f"{path}?a=b"), data=BODY, headers=headers) as answer:
                assert (answer.status, await answer.read()) == (200, BODY)
                assert answer.headers["X-Of-Server"] == "y"
            assert backend.seen == [(f"{path}?a=b", BODY, "Bearer key")]

    finish(check())


def test_refusals_of_a_replica_reach_the_client() -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": "Unauthorized"}, status=401)

    async def check() -> None:
        async with setup(2) as (_, backends, _, address, client):
            for backend in backends:
                backend.answer = refuse
            assert (await post(address, client))[0] == 401
            async with client.get(address.make_url("/llm42_stats")) as answer:
                assert answer.status == 401
            assert sum(len(backend.seen) for backend in backends) == 2

    finish(check())


@pytest.mark.parametrize(
    "path", ["/flush_cache", "/update_weights_from_disk", "/reset_llm42_stats", "/load_lora_adapter", "/"]
)
def test_what_changes_one_replica_is_not_passed_on(path: str) -> None:
    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, client):
            assert (await post(address, client, path))[0] == 404
            assert not backend.seen

    finish(check())


def test_a_gone_replica_is_left_out_and_comes_back() -> None:
    async def check() -> None:
        async with setup(2, ROUND_ROBIN) as (front, _, servers, address, client):
            port = servers[0].port
            await servers[0].close()
            for _ in range(3):
                assert (await post(address, client))[0::2] == (200, "1")
            for _ in range(fronts.LOOKS):
                await front.look(front.replicas[0])
            assert [replica.up for replica in front.replicas] == [False, True]
            async with client.get(address.make_url("/health")) as answer:
                assert (answer.status, await answer.json()) == (
                    200,
                    {"replicas": 2, "up": 1, "left_out": {"0": "refuses connections"}},
                )
            async with TestServer(application(Backend()), port=port):
                await front.look(front.replicas[0])
                assert front.replicas[0].up
                assert {(await post(address, client))[2] for _ in range(4)} == {"0", "1"}

    finish(check())


def test_without_a_replica_there_is_a_503_soon() -> None:
    async def check() -> None:
        async with setup(1) as (front, _, servers, address, client):
            await servers[0].close()
            assert (await asyncio.wait_for(post(address, client), 10))[0] == 503
            for _ in range(fronts.LOOKS):
                await front.look(front.replicas[0])
            async with client.get(address.make_url("/health")) as answer:
                assert answer.status == 503
            assert (await post(address, client))[0] == 503

    finish(check())


def test_a_503_goes_to_another_replica_and_that_of_the_last_to_the_client() -> None:
    async def unavailable(request: web.Request) -> web.Response:
        return web.Response(status=503, text="a rank of this server was lost")

    async def check() -> None:
        async with setup(2) as (_, backends, _, address, client):
            backends[0].answer = unavailable
            assert {(await post(address, client))[0::2] for _ in range(4)} == {(200, "1")}
            backends[1].answer = unavailable
            assert (await post(address, client))[:2] == (503, b"a rank of this server was lost")

    finish(check())


def test_a_replica_that_falls_silent_is_lost_with_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a cut cable: no connection is refused, nothing is answered."""
    monkeypatch.setattr(fronts, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(front_replica, "LOOK_TIMEOUT_S", 0.2)

    async def check() -> None:
        async with setup(2, ROUND_ROBIN) as (front, backends, _, address, client):
            backends[0].answer, backends[0].alive = never, False
            answers = await asyncio.wait_for(asyncio.gather(*[post(address, client) for _ in range(4)]), 20)
            assert {answer[0::2] for answer in answers} == {(200, "1")}
            assert len(backends[0].seen) == 2 and not front.replicas[0].up
            assert [replica.in_flight for replica in front.replicas] == [0, 0]

    finish(check())


def test_a_stream_passes_as_it_comes_and_a_cut_one_is_seen_to_be_cut() -> None:
    more, cut = asyncio.Event(), asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await more.wait()
        await response.write(b"data: 2\n\n")
        if cut.is_set():
            assert request.transport is not None
            request.transport.abort()
        await response.write_eof()
        return response

    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, client):
            backend.answer = stream
            async with client.post(address.make_url("/generate"), data=BODY) as answer:
                assert await asyncio.wait_for(answer.content.readany(), 10) == b"data: 1\n\n"
                more.set()
                assert await answer.content.read() == b"data: 2\n\n"
            cut.set()
            with pytest.raises(ClientError):
                await post(address, client)

    finish(check())


def test_a_client_that_leaves_ends_its_request_at_the_replica() -> None:
    async def check() -> None:
        async with setup(1) as (front, (backend,), _, address, client):
            backend.answer = never
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(post(address, client), 0.5)
            await until(lambda: backend.left and not front.replicas[0].in_flight)

    finish(check())


@contextmanager
def _programs(
    count: int, *arguments: str, status: int = 0
) -> Iterator[tuple[int, list[subprocess.Popen[bytes]]]]:
    """The program itself, several times on one port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sglang_ext.ray.front", "--port", str(port), "--share-port", *arguments]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        deadline = time.monotonic() + 60
        while _listening(port) < count:
            assert time.monotonic() < deadline and not any(process.poll() for process in processes)
            time.sleep(0.1)
        yield port, processes
    finally:
        for process in processes:
            process.terminate()
            process.wait(20)
    assert [process.returncode for process in processes] == [status] * count


def test_several_processes_share_the_port_and_end_on_a_signal() -> None:
    with _programs(2, "http://127.0.0.1:9") as (port, processes):
        processes[0].terminate()
        processes[0].wait(20)
        assert _listening(port) == 1
        answer = requests.post(f"http://127.0.0.1:{port}/generate", data=BODY, timeout=20)
        assert answer.status_code == 503 and "no replica answers" in answer.text


def test_the_program_ends_requests_of_clients_that_leave() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        posted: list[socket.socket] = []
        server = threading.Thread(target=lambda: posted.append(_connection_of_post(listener)))
        server.start()  # the program looks at it before its address opens
        with _programs(1, f"http://127.0.0.1:{listener.getsockname()[1]}") as (port, _):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
                server.join(20)
            (connection,) = posted
            connection.settimeout(3)  # less than it takes to find the server lost
            while connection.recv(65536):
                pass
            connection.close()


def test_a_second_signal_does_not_wait_for_requests_under_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        posted: list[socket.socket] = []
        server = threading.Thread(target=lambda: posted.append(_connection_of_post(listener)))
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            _programs(1, url, status=-signal.SIGTERM) as (port, (process,)),
            socket.create_connection(("127.0.0.1", port)) as client,
        ):
            client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            server.join(20)
            process.terminate()
            while _listening(port):
                time.sleep(0.05)
            assert process.poll() is None
            process.terminate()
            process.wait(5)
        posted[0].close()


def _connection_of_post(listener: socket.socket) -> socket.socket:
    """A server by hand that answers looks; returns the connection with the first POST, unanswered."""
    while True:
        connection, _ = listener.accept()
        connection.settimeout(20)
        if connection.recv(65536).startswith(b"POST /generate"):
            return connection
        body = b'{"internal_states": []}'
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.close()


def _listening(port: int) -> int:
    """Sockets of this machine that listen on the port of 127.0.0.1."""
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return sum(f"0100007F:{port:04X}" in line.split()[1] and line.split()[3] == "0A" for line in lines)


def test_the_least_busy_replica_and_the_key_decide() -> None:
    front = Front(["http://a", "http://b", "http://c"])
    for replica in front.replicas:
        replica.up = True
    front.replicas[0].in_flight = front.replicas[2].in_flight = 1
    assert {front.in_order()[0].number for _ in range(6)} == {1}
    orders = {key: [r.number for r in front.in_order(key)] for key in map(str, range(50))}
    assert {order[0] for order in orders.values()} == {0, 1, 2}
    front.replicas[1].up = False
    for key, order in orders.items():
        assert [r.number for r in front.in_order(key)] == [number for number in order if number != 1]


def test_the_key_is_read_from_the_header() -> None:
    async def check() -> None:
        async with setup(3, ROUND_ROBIN) as (_, _, _, address, client):
            chosen = {(await post(address, client, **{ROUTING_KEY: "session 1"}))[2] for _ in range(6)}
            assert len(chosen) == 1
            assert len({(await post(address, client))[2] for _ in range(6)}) == 3

    finish(check())


@pytest.mark.parametrize("changed", [{"version": "2"}, {"llm42_window_size": 7}, {"internal_states": [{}]}])
def test_a_restarted_replica_is_compared_before_it_gets_requests(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fronts, "COMPARE_EVERY_S", 0)

    async def check() -> None:
        async with setup(2, ROUND_ROBIN) as (front, _, servers, address, client):
            port = servers[0].port
            await servers[0].close()
            await front.look(front.replicas[0])
            other = Backend()
            other.info = {**other.info, **changed}
            async with TestServer(application(other), port=port):
                await front.look(front.replicas[0])
                assert {(await post(address, client))[2] for _ in range(4)} == {"1"} and not other.seen
                async with client.get(address.make_url("/health")) as answer:
                    assert (await answer.json())["left_out"] == {"0": "differs from the others"}
                assert "gets no requests: it differs from the others: " in caplog.text
                other.info = Backend().info
                await front.look(front.replicas[0])
                assert {(await post(address, client))[2] for _ in range(4)} == {"0", "1"}

    finish(check())


def test_without_another_replica_the_identity_at_the_start_counts() -> None:
    async def check() -> None:
        expected = {"version": "1", "llm42_fingerprint": ["xy"], "llm42_configuration": ["None"], "flags": {}}
        async with setup(1, expected=expected) as (_, _, _, address, client):
            assert (await post(address, client))[0] == 503

    finish(check())


def test_replicas_with_a_key_are_compared_where_the_front_knows_it(caplog: pytest.LogCaptureFixture) -> None:
    async def check(**options: Any) -> list[bool]:
        backends = [Backend(), Backend()]
        backends[1].info = {**backends[1].info, "version": "2"}
        backends[0].key = backends[1].key = "secret"
        async with setup(backends=backends, **options) as (front, *_):
            return [replica.up for replica in front.replicas]

    assert sum(finish(check(api_key="secret"))) == 1
    assert finish(check()) == [True, True] and "could NOT be compared" in caplog.text


#: What `/v1/messages` and `/v1/responses` of SGLang 0.5.17 send before the first token.
MESSAGE_START = b'event: message_start\ndata: {"type":"message_start","message":{"content":[]}}\n\n'
RESPONSE_CREATED = (
    b'event: response.created\ndata: {"type":"response.created","response":{"error":null}}\n\n'
    b'event: response.in_progress\ndata: {"type":"response.in_progress","response":{"error":null}}\n\n'
)

OVERLOADED = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"m"}}\n\n'

REFUSALS = (
    b'data: {"text":"","meta_info":{"finish_reason":{"type":"abort","message":"m","status_code":503}}}\n\n',
    b'data: {"error": {"object": "error", "message": "m", "type": "SERVICE_UNAVAILABLE", "code": 503}}\n\n',
    MESSAGE_START + OVERLOADED + b'data: {"type":"message_stop"}\n\n',
)

ANSWERS = (
    b'data: {"error": {"message": "m", "type": "invalid_request_error", "code": 400}}\n\n',
    b'data: {"text":"","meta_info":{"finish_reason":{"type":"abort","message":"Aborted"}}}\n\n',
    b'data: {"text":"503","meta_info":{"finish_reason":null}}\n\n',
    b"data: 503\n\n",
    b"data: null\n\n",
    b'data: {"type":["message_start"]}\n\n',
    MESSAGE_START,
    MESSAGE_START + OVERLOADED.replace(b"overloaded_error", b"invalid_request_error"),
    MESSAGE_START + b'data: {"type":"content_block_start"}\n\n' + OVERLOADED,
    RESPONSE_CREATED + b'data: {"type":"response.failed","response":{"error":null}}\n\n',
    b"data: [DONE]\n\n",
)


@pytest.mark.parametrize("event", REFUSALS)
def test_a_stream_refused_before_its_first_token_goes_to_another_replica(event: bytes) -> None:
    async def check() -> None:
        async with setup(2) as (_, backends, _, address, client):
            backends[0].answer = streaming(event[:20], event[20:], b"data: [DONE]\n\n")
            backends[1].answer = streaming(b"data: 1\n\n", event)
            for _ in range(2):
                assert await post(address, client) == (200, b"data: 1\n\n" + event, "1")
            assert backends[0].seen
            backends[1].answer = backends[0].answer
            assert (await post(address, client))[1] == event + b"data: [DONE]\n\n"

    finish(check())


@pytest.mark.parametrize("event", ANSWERS)
def test_other_first_events_reach_the_client(event: bytes) -> None:
    async def check() -> None:
        async with setup(2) as (_, backends, _, address, client):
            for backend in backends:
                backend.answer = streaming(event)
            assert (await post(address, client))[:2] == (200, event)
            assert sum(len(backend.seen) for backend in backends) == 1

    finish(check())


@pytest.mark.parametrize("begun", [b"data: ", MESSAGE_START, RESPONSE_CREATED, RESPONSE_CREATED[:-9]])
def test_a_stream_cut_before_its_first_token_goes_to_another_replica(begun: bytes) -> None:
    async def check() -> None:
        async with setup(2) as (_, backends, _, address, client):
            backends[0].answer = streaming(begun, cut=True)
            backends[1].answer = streaming(b"data: 1\n\n")
            for _ in range(2):
                assert await post(address, client) == (200, b"data: 1\n\n", "1")

    finish(check())


def test_the_key_is_checked_before_the_body_is_read() -> None:
    async def check() -> None:
        async with setup(1, api_key="k\u00e9y") as (front, (backend,), _, address, client):
            for wrong in ("", "Bearer", "Bearer k", "Basic k\u00e9y", "Bearer \u20ac"):
                reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
                head = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: {wrong}\r\n"
                writer.write(head.encode() + b"Content-Length: 9\r\n\r\n")
                status = await asyncio.wait_for(reader.readline(), 5)
                assert status.startswith(b"HTTP/1.1 401"), wrong
                writer.close()
            assert not backend.seen and front.bodies.held == 0
            assert (await post(address, client, Authorization="bearer k\u00e9y"))[0] == 200
            async with client.get(address.make_url("/llm42_stats")) as answer:
                assert (answer.status, await answer.json()) == (401, {"error": "Unauthorized"})
            async with client.get(address.make_url("/health")) as answer:
                assert answer.status == 200

    finish(check())


def test_bodies_are_bounded_one_by_one_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_requests, "MAX_BODY_BYTES", 100)
    monkeypatch.setattr(front_requests, "MAX_BODIES_BYTES", 150)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait(request: web.Request) -> web.Response:
        begun.set()
        await go_on.wait()
        return web.Response()

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(40)

    async def check() -> None:
        async with setup(1) as (front, (backend,), _, address, client):
            url = address.make_url("/generate")
            for data in (bytes(120), pieces()):
                async with client.post(url, data=data) as answer:
                    assert answer.status == 413
            backend.answer = wait
            first = asyncio.create_task(client.post(url, data=bytes(90)))
            await begun.wait()
            assert front.bodies.held == 90
            async with client.post(url, data=bytes(90)) as answer:
                assert answer.status == 503 and int(answer.headers["Retry-After"]) >= 1
            go_on.set()
            assert (await first).status == 200
            assert (await client.post(url, data=bytes(90))).status == 200
            assert front.bodies.held == 0

    finish(check(), 10)  # a body that is taken although it should not be waits for go_on


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_requests, "READ_TIMEOUT_S", 0.2)

    async def check() -> None:
        async with setup(1) as (front, _, _, address, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
            writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{}")
            assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 408")
            assert front.bodies.held == 0
            writer.close()

    finish(check())


def test_repeated_headers_pass_and_those_of_one_hop_do_not() -> None:
    seen: list[list[tuple[str, str]]] = []

    async def answer_with_headers(request: web.Request) -> web.Response:
        seen.append([(name.lower(), value) for name, value in request.headers.items()])
        headers = [("X-Twice", "1"), ("X-Twice", "2"), ("Connection", "x-hop"), ("X-Hop", "1")]
        return web.Response(headers=CIMultiDict([*headers, ("Proxy-Authenticate", "Basic")]))

    async def check() -> None:
        async with setup(1) as (_, (backend,), _, address, client):
            backend.answer = answer_with_headers
            headers = [("X-Twice", "1"), ("X-Twice", "2"), ("Connection", "X-Hop, close"), ("X-Hop", "1")]
            sent = CIMultiDict([*headers, ("Proxy-Authorization", "p"), ("TE", "trailers")])
            async with client.post(address.make_url("/generate"), data=BODY, headers=sent) as answer:
                assert answer.headers.getall("X-Twice") == ["1", "2"]
                assert not {"X-Hop", "Proxy-Authenticate"} & set(answer.headers)
            names = [name for name, _ in seen[0]]
            assert [value for name, value in seen[0] if name == "x-twice"] == ["1", "2"]
            assert not {"x-hop", "te", "proxy-authorization"} & set(names)

    finish(check())
    spelled_in_two_ways = front_requests.passed_on([("X-A", "1"), ("x-a", "2")])
    assert list(spelled_in_two_ways.items()) == [("X-A", "1"), ("X-A", "2")]


def test_statistics_of_all_replicas() -> None:
    async def statistics(request: web.Request) -> web.Response:
        value: dict[str, Any] = {"dp_0": {"decode_steps": int(request.headers["Authorization"])}}
        return web.json_response(value)

    async def check() -> None:
        async with setup(2) as (_, backends, _, address, client):
            for backend in backends:
                backend.answer = statistics
            headers = {"Authorization": "7"}
            async with client.get(address.make_url("/llm42_stats"), headers=headers) as answer:
                expected = {f"replica_{i}": {"dp_0": {"decode_steps": 7}} for i in range(2)}
                assert json.loads(await answer.read()) == expected

    finish(check())
