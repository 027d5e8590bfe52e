"""TP=2 over two Ray nodes on this machine: the single-node server's outputs, and what happens on failures.

In network namespaces where they can be made, each a host of its own; the same with Ray's fake cluster, whose
nodes share address and files.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import requests
from live_server import REQUEST_TIMEOUT_S, Output, Request, Server, ServerError, running
from ray_nodes import FakeNodes, Namespaces, Nodes, leftovers, pid_of_rank, why_no_namespaces
from workloads import LLM42_FLAGS, ONE_THREAD, marked, random_prompts

from sglang_ext.ray.status import EXIT_NOT_STARTED, EXIT_RANK_LOST

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(
    "SGLANG_EXT_RAY_TESTS" not in os.environ,
    reason="not part of the test command until they have run as a whole; set SGLANG_EXT_RAY_TESTS=1",
)

FLAGS = (*LLM42_FLAGS, "--tp-size", "2", "--max-total-tokens", "4096")
ON_TWO_NODES = (*FLAGS, "--use-ray", "--nnodes", "2")

#: Seconds until a client knows that a rank is gone: a process ended, or a cable cut (Ray's health checks).
KNOWN_WITHIN_S = 30
CUT_KNOWN_WITHIN_S = 60

SUBJECTS = [
    *marked(random_prompts(4, 10, 80, seed=21), max_new_tokens=24, temperature=1.0, ignore_eos=True),
    *marked(random_prompts(2, 10, 80, seed=22), max_new_tokens=24, temperature=0.0, ignore_eos=True),
]
LONG = Request(random_prompts(1, 10, 20, seed=23)[0], True, {"max_new_tokens": 900, "ignore_eos": True})


@pytest.fixture(scope="module")
def expected(random_llama: Path, logs: Path) -> list[Output]:
    """Outputs of the server without Ray."""
    with running(Server(random_llama, logs / "single.log", FLAGS, ONE_THREAD)) as server:
        outputs = [server.generate(request) for request in SUBJECTS]
    assert len({output.token_ids for output in outputs}) == len(SUBJECTS)
    return outputs


@pytest.fixture(scope="module")
def fake(logs: Path) -> Iterator[Nodes]:
    """Two nodes of Ray's fake cluster."""
    with _stopping(FakeNodes(logs)) as nodes:
        nodes.add()
        yield nodes


@pytest.fixture
def hosts(logs: Path) -> Iterator[Namespaces]:
    """Two hosts in network namespaces."""
    if reason := why_no_namespaces():
        pytest.skip(reason)
    with _stopping(Namespaces(logs)) as nodes:
        nodes.add()
        yield nodes


_Nodes = TypeVar("_Nodes", bound=Nodes)


@contextmanager
def _stopping(nodes: _Nodes) -> Iterator[_Nodes]:
    try:
        yield nodes
    finally:
        nodes.stop()


def _server(model: Path, logs: Path, nodes: Nodes, *flags: str, **environment: str) -> Server:
    log = logs / f"ray-{len(list(logs.iterdir()))}.log"
    variables = {**nodes.environment(), **ONE_THREAD, **environment}
    return Server(
        model, log, (*ON_TWO_NODES, *flags), variables, host=nodes.host, wrap=lambda c: nodes.command(c)
    )


def _together(server: Server) -> list[Output]:
    return server.together(SUBJECTS)


# Fake cluster


def test_two_nodes_give_the_output_of_one_and_survive_a_rank(
    random_llama: Path, logs: Path, fake: Nodes, expected: list[Output]
) -> None:
    with running(_server(random_llama, logs, fake, "--ray-on-failure", "restart")) as server:
        assert _together(server) == expected
        os.kill(pid_of_rank(fake, 1), signal.SIGKILL)
        _wait_until_refused(server)
        server.wait_until_ready()
        assert _together(server) == expected
    assert server.process.returncode is not None
    _wait_for_no_leftovers(fake)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(random_llama: Path, logs: Path, fake: Nodes, signum: int) -> None:
    with running(_server(random_llama, logs, fake)) as server:
        assert len(leftovers(fake).split()) == 3  # two ranks, one placement group
        server.process.send_signal(signum)
        server.process.wait(60)
    _wait_for_no_leftovers(fake)


def test_a_missing_hook_fails_the_start(random_llama: Path, logs: Path, fake: Nodes) -> None:
    """A plugin on the ranks' path takes one of our hooks out again, as another plugin might."""
    folder = logs / "unhooking"
    info = folder / "unhooking-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unhooking\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nunhooking = unhooking:register\n")
    (folder / "unhooking.py").write_text(_UNHOOKING)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    server = _server(random_llama, logs, fake, PYTHONPATH=path)
    try:
        with pytest.raises(ServerError, match=r"Req\.reset_for_retract .*is not called by it"):
            server.wait_until_ready()
        assert server.process.returncode == EXIT_NOT_STARTED
    finally:
        server.stop()
    _wait_for_no_leftovers(fake)


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


def test_no_room_is_told_with_the_flag(random_llama: Path, logs: Path, fake: Nodes) -> None:
    server = _server(random_llama, logs, fake, "--nnodes", "4", "--tp-size", "4", "--ray-start-timeout", "3")
    try:
        with pytest.raises(ServerError, match=r"--nnodes 4: no room within --ray-start-timeout 3 s"):
            server.wait_until_ready()
        assert server.process.returncode == EXIT_NOT_STARTED
    finally:
        server.stop()
    _wait_for_no_leftovers(fake)


# Hosts of their own


def test_hosts_give_the_output_of_one_until_one_is_gone(
    random_llama: Path, logs: Path, hosts: Namespaces, expected: list[Output]
) -> None:
    """Without restart: requests in flight get an error soon, and the server exits non-zero."""
    with running(_server(random_llama, logs, hosts)) as server:
        assert _together(server) == expected
        with _in_flight(server) as answer:
            hosts.kill(1)
            assert answer(KNOWN_WITHIN_S).status_code == 503
            assert server.process.wait(60) == EXIT_RANK_LOST


def test_a_cut_cable_and_a_late_joiner(
    random_llama: Path, logs: Path, hosts: Namespaces, expected: list[Output]
) -> None:
    """With restart: the server waits for another host, and gives the same outputs on it."""
    flags = ("--ray-on-failure", "restart")
    with running(_server(random_llama, logs, hosts, *flags)) as server:
        assert _together(server) == expected
        with _in_flight(server) as answer:
            hosts.cut(1)
            assert answer(CUT_KNOWN_WITHIN_S).status_code == 503
        hosts.add()
        server.wait_until_ready()
        assert _together(server) == expected


@contextmanager
def _in_flight(server: Server) -> Iterator[Callable[[float], requests.Response]]:
    """A long request that is being decoded; yields what waits for its answer."""
    server.reset_statistics()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            requests.post, f"{server.url}/generate", json=LONG.body(), timeout=REQUEST_TIMEOUT_S
        )
        while not server.statistics()["decode_steps"]:
            time.sleep(0.05)
        yield lambda seconds: future.result(seconds)


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


def _wait_for_no_leftovers(nodes: Nodes, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while left := leftovers(nodes):
        assert time.monotonic() < deadline, left
        time.sleep(1)
