"""Servers on Ray clusters of this machine, and what the tests with them share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import requests
from live_server import REQUEST_TIMEOUT_S, Output, Request, Server
from ray_nodes import Nodes, leftovers
from workloads import LLM42_FLAGS, ONE_THREAD, marked, random_prompts

FLAGS = (*LLM42_FLAGS, "--tp-size", "2", "--max-total-tokens", "4096")
ON_TWO_NODES = (*FLAGS, "--use-ray", "--nnodes", "2")

SUBJECTS = [
    *marked(random_prompts(4, 10, 80, seed=21), max_new_tokens=24, temperature=1.0, ignore_eos=True),
    *marked(random_prompts(2, 10, 80, seed=22), max_new_tokens=24, temperature=0.0, ignore_eos=True),
]
#: Seconds for a server to take its actors and placement group away.
GRACE_S = 20.0

LONG = Request(random_prompts(1, 10, 20, seed=23)[0], True, {"max_new_tokens": 900, "ignore_eos": True})


def server_on(nodes: Nodes, model: Path, logs: Path, *flags: str, **environment: str) -> Server:
    """A server that is started on the cluster's head; not waited for."""
    log = logs / f"ray-{len(list(logs.iterdir()))}.log"
    variables = {**nodes.environment(), **ONE_THREAD, **environment}
    return Server(
        model,
        log,
        (*ON_TWO_NODES, *flags),
        variables,
        host=nodes.host,
        wrap=lambda c: nodes.command(c),
        grace_s=GRACE_S,
    )


def together(server: Server) -> list[Output]:
    """Outputs of :data:`SUBJECTS`, all at once."""
    return server.together(SUBJECTS)


@contextmanager
def in_flight(server: Server) -> Iterator[Callable[[float], requests.Response]]:
    """A long request that is being decoded; yields what waits so many seconds for its answer."""
    server.reset_statistics()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            requests.post, f"{server.url}/generate", json=LONG.body(), timeout=REQUEST_TIMEOUT_S
        )
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        while not server.statistics()["decode_steps"]:
            assert time.monotonic() < deadline, "the request is not decoded"
            time.sleep(0.05)
        yield lambda seconds: future.result(seconds)


def wait_for_no_leftovers(nodes: Nodes, seconds: float = 60) -> None:
    """Return when the cluster has neither actors nor placement groups."""
    deadline = time.monotonic() + seconds
    while left := leftovers(nodes):
        assert time.monotonic() < deadline, left
        time.sleep(1)
