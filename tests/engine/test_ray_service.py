"""The server as a Ray job, with API keys, and replicas behind one address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests
from live_server import REQUEST_TIMEOUT_S, START_TIMEOUT_S, Output, Request
from ray_nodes import Namespaces
from ray_servers import LONG, ON_TWO_NODES, SUBJECTS, wait_for_no_leftovers
from workloads import LLM42_FLAGS, ONE_THREAD

from sglang_ext.ray.front import REPLICA, ROUTING_KEY

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(
    "SGLANG_EXT_RAY_TESTS" not in os.environ, reason="takes minutes more; set SGLANG_EXT_RAY_TESTS=1"
)

KEY, ADMIN_KEY = "secret of clients", "secret of operators"

#: Replicas have one rank each.
REPLICA_FLAGS = (*LLM42_FLAGS, "--max-total-tokens", "4096")

#: Decoded for some seconds.
LONGER = Request(LONG.prompt, True, {**LONG.sampling, "max_new_tokens": 300})


def test_a_job_with_api_keys(
    random_llama: Path, logs: Path, hosts: Namespaces, expected: list[Output]
) -> None:
    """``sglang_ext.ray.submit`` against Ray's dashboard; Ctrl-C ends the job and all that belongs to it."""
    keys, log = logs / "keys.yaml", logs / "submit.log"
    keys.write_text(f"api-key: {KEY}\nadmin-api-key: {ADMIN_KEY}\n")
    url = f"http://{hosts.host}:{_free_port()}"
    flags = ["--model-path", str(random_llama), "--host", hosts.host, "--port", url.rpartition(":")[2]]
    flags += ["--config", str(keys), "--skip-server-warmup", *ON_TWO_NODES]
    command = ["sglang_ext.ray.submit", "--python", sys.executable, "--", *flags]
    with _running(hosts, command, log) as process:
        _wait_until(lambda: _status("GET", f"{url}/model_info", KEY) == 200, process, log)
        assert [_generate(url, request, Authorization=f"Bearer {KEY}") for request in SUBJECTS] == expected
        for method, path, needed in (
            ("POST", "/generate", KEY),
            ("GET", "/llm42_stats", KEY),
            ("POST", "/reset_llm42_stats", ADMIN_KEY),
        ):
            assert [_status(method, f"{url}{path}", key) for key in (None, "wrong")] == [401, 401], path
            assert _status(method, f"{url}{path}", needed) != 401, path
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        wait_for_no_leftovers(hosts)
        assert _status("GET", f"{url}/model_info", KEY) is None


def test_replicas_give_the_same_output_also_when_one_is_lost(
    random_llama: Path, logs: Path, hosts: Namespaces
) -> None:
    url, log = f"http://{hosts.host}:{_free_port()}", logs / "replicas.log"
    command = ["sglang_ext.ray.replicas", "--replicas", "2", "--policy", "round_robin", "--host", hosts.host]
    command += ["--port", url.rpartition(":")[2], "--", "--model-path", str(random_llama)]
    command += ["--skip-server-warmup", *REPLICA_FLAGS]
    with _running(hosts, command, log) as process:
        _wait_until(lambda: _replicas_up(url) == 2, process, log)
        first = _by_replica(url)
        assert set(first) == {"0", "1"} and first["0"] == first["1"]
        assert len({output.token_ids for output in first["0"]}) == len(SUBJECTS)

        expected = _generate(url, LONGER)
        lost, other = "0", "1"
        key = next(key for key in map(str, range(64)) if _answered_by(url, key) == lost)
        with ThreadPoolExecutor(1) as pool:
            begun = _decode_steps(url, lost)
            answer = pool.submit(_post, url, LONGER, **{ROUTING_KEY: key})
            _wait_until(lambda: _decode_steps(url, lost) > begun + 5, process, log)
            os.kill(_pid_of_replica(hosts, lost), signal.SIGKILL)
            reply = answer.result(REQUEST_TIMEOUT_S)
        assert reply.status_code == 200 and reply.headers[REPLICA] == other
        assert Output.of(reply.json()) == expected

        assert _answered_by(url, key) == other
        _wait_until(lambda: _replicas_up(url) == 2, process, log)
        assert _by_replica(url) == first
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 130
        wait_for_no_leftovers(hosts)


# Processes on the head


@contextmanager
def _running(hosts: Namespaces, command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program of ours on the head node; killed afterwards if it still runs."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            hosts.command([sys.executable, "-m", *command]),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **ONE_THREAD, **hosts.environment()},
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def _wait_until(
    reached: Callable[[], bool],
    process: subprocess.Popen[bytes],
    log: Path,
    seconds: float = 2 * START_TIMEOUT_S,
) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        assert process.poll() is None, tail
        assert time.monotonic() < deadline, tail
        time.sleep(0.1)


def _pid_of_replica(hosts: Namespaces, number: str) -> int:
    """Process id of the rank of a replica, from the placement group in its actor's name."""
    code = (
        "from ray._private.state import actors\n"
        "from ray.util import placement_group_table\n"
        "(group,) = [g['placement_group_id'][:8] for g in placement_group_table().values()"
        f" if g['name'] == 'replica-{number}' and g['state'] == 'CREATED']\n"
        "print('PID', *[a['Pid'] for a in actors().values()"
        " if a['State'] == 'ALIVE' and a['Name'].endswith(group)])"
    )
    line = next(line for line in hosts.ray(code).splitlines() if line.startswith("PID"))
    (pid,) = line.split()[1:]
    return int(pid)


# Calls


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _status(method: str, url: str, key: str | None = None) -> int | None:
    """Status of an answer, None if there is none."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return requests.request(method, url, headers=headers, timeout=30).status_code
    except requests.RequestException:
        return None


def _post(url: str, request: Request, **headers: str) -> requests.Response:
    return requests.post(f"{url}/generate", json=request.body(), headers=headers, timeout=REQUEST_TIMEOUT_S)


def _generate(url: str, request: Request, **headers: str) -> Output:
    answer = _post(url, request, **headers)
    assert answer.status_code == 200, answer.text
    return Output.of(answer.json())


def _by_replica(url: str) -> dict[str, list[Output]]:
    """Outputs of all subjects from each replica, by its number."""
    found: dict[str, list[Output]] = {}
    for request in [request for request in SUBJECTS for _ in range(2)]:
        answer = _post(url, request)
        assert answer.status_code == 200, answer.text
        found.setdefault(answer.headers[REPLICA], []).append(Output.of(answer.json()))
    return found


def _answered_by(url: str, key: str) -> str:
    """Number of the replica that gets the requests with a routing key."""
    request = Request(LONG.prompt, True, {"max_new_tokens": 1})
    return _post(url, request, **{ROUTING_KEY: key}).headers[REPLICA]


def _replicas_up(url: str) -> int:
    try:
        return int(requests.get(f"{url}/health", timeout=10).json()["up"])
    except requests.RequestException:
        return 0


def _decode_steps(url: str, number: str) -> int:
    statistics = requests.get(f"{url}/llm42_stats", timeout=60).json()
    return int(statistics[f"replica_{number}"]["dp_0"]["decode_steps"])
