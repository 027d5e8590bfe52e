"""TP=2 over two Ray nodes on this machine: the single-node server's outputs, and what happens on failures.

In network namespaces where they can be made, each a host of its own, else on Ray's fake cluster, whose nodes
share address and files.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import requests
from live_server import Output, Server, ServerError, running
from ray_nodes import Namespaces, Nodes, leftovers, pid_of_rank
from ray_servers import in_flight, server_on, together, wait_for_no_leftovers

from sglang_ext.ray.status import EXIT_NOT_STARTED, EXIT_RANK_LOST

pytest.importorskip("ray")

#: More of the same: each test starts servers for minutes.
more = pytest.mark.skipif(
    "SGLANG_EXT_RAY_TESTS" not in os.environ, reason="takes minutes more; set SGLANG_EXT_RAY_TESTS=1"
)

#: Seconds until a client knows that a rank is gone: a process ended, or a cable cut (Ray's health checks).
KNOWN_WITHIN_S = 30
CUT_KNOWN_WITHIN_S = 60


def test_two_nodes_give_the_output_of_one_also_after_a_late_joiner(
    random_llama: Path, logs: Path, nodes: Nodes, expected: list[Output]
) -> None:
    """A node is killed during a request, another joins, Ctrl-C ends it all."""
    with running(server_on(nodes, random_llama, logs, "--ray-on-failure", "restart")) as server:
        assert together(server) == expected
        assert len(leftovers(nodes).split()) == 3  # two ranks, one placement group
        with in_flight(server) as answer:
            nodes.kill(1)
            lost = answer(KNOWN_WITHIN_S)
        assert lost.status_code == 503 and "a rank of this server was lost" in lost.text
        _wait_until_refused(server)
        nodes.add()
        server.wait_until_ready()
        assert together(server) == expected
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) in (0, 130)
        wait_for_no_leftovers(nodes)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/model_info", timeout=5)


def test_no_room_is_told_with_the_flag(random_llama: Path, logs: Path, fake: Nodes) -> None:
    flags = ("--nnodes", "4", "--tp-size", "4", "--ray-start-timeout", "3")
    server = server_on(fake, random_llama, logs, *flags)
    try:
        with pytest.raises(ServerError, match=r"--nnodes 4: no room within --ray-start-timeout 3 s"):
            server.wait_until_ready()
        assert server.process.returncode == EXIT_NOT_STARTED
    finally:
        server.stop()
    wait_for_no_leftovers(fake)


@more
def test_a_killed_rank_is_replaced(
    random_llama: Path, logs: Path, fake: Nodes, expected: list[Output]
) -> None:
    with running(server_on(fake, random_llama, logs, "--ray-on-failure", "restart")) as server:
        assert together(server) == expected
        with in_flight(server) as answer:
            os.kill(pid_of_rank(fake, 1), signal.SIGKILL)
            assert answer(KNOWN_WITHIN_S).status_code == 503
        _wait_until_refused(server)
        server.wait_until_ready()
        assert together(server) == expected
    wait_for_no_leftovers(fake)


@more
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(random_llama: Path, logs: Path, fake: Nodes, signum: int) -> None:
    with running(server_on(fake, random_llama, logs)) as server:
        assert len(leftovers(fake).split()) == 3  # two ranks, one placement group
        server.process.send_signal(signum)
        server.process.wait(60)
        wait_for_no_leftovers(fake)


@more
def test_a_missing_hook_fails_the_start(random_llama: Path, logs: Path, fake: Nodes) -> None:
    """A plugin on the ranks' path takes one of our hooks out again, as another plugin might."""
    folder = logs / "unhooking"
    info = folder / "unhooking-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unhooking\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nunhooking = unhooking:register\n")
    (folder / "unhooking.py").write_text(_UNHOOKING)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    server = server_on(fake, random_llama, logs, PYTHONPATH=path)
    try:
        with pytest.raises(ServerError, match=r"Req\.reset_for_retract .*is not called by it"):
            server.wait_until_ready()
        assert server.process.returncode == EXIT_NOT_STARTED
    finally:
        server.stop()
    wait_for_no_leftovers(fake)


_UNHOOKING = """
from sglang_ext.llm42 import scheduler_hooks

original = scheduler_hooks.certify

def certify(scheduler):
    original(scheduler)
    from sglang.srt.managers.schedule_batch import Req
    Req.reset_for_retract = Req.reset_for_retract.__wrapped__

def register():
    scheduler_hooks.certify = certify
"""


@more
def test_without_restart_the_server_exits(
    random_llama: Path, logs: Path, hosts: Namespaces, expected: list[Output]
) -> None:
    with running(server_on(hosts, random_llama, logs)) as server:
        assert together(server) == expected
        with in_flight(server) as answer:
            hosts.kill(1)
            assert answer(KNOWN_WITHIN_S).status_code == 503
            assert server.process.wait(60) == EXIT_RANK_LOST
        wait_for_no_leftovers(hosts)


@more
def test_a_cut_cable(random_llama: Path, logs: Path, hosts: Namespaces, expected: list[Output]) -> None:
    """Nobody is told: Ray's health checks find out. The server waits for another host."""
    with running(server_on(hosts, random_llama, logs, "--ray-on-failure", "restart")) as server:
        assert together(server) == expected
        with in_flight(server) as answer:
            hosts.cut(1)
            assert answer(CUT_KNOWN_WITHIN_S).status_code == 503
        _wait_until_refused(server)
        hosts.add()
        server.wait_until_ready()
        assert together(server) == expected


def _wait_until_refused(server: Server) -> None:
    deadline = time.monotonic() + KNOWN_WITHIN_S
    while time.monotonic() < deadline:
        try:
            if requests.get(f"{server.url}/model_info", timeout=5).status_code != 200:
                return
        except requests.RequestException:
            return
        time.sleep(0.1)
    raise AssertionError("the server did not notice")
