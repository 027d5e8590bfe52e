"""What clients see when something breaks: a killed scheduler, a KV pool that is too small, a full disk."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
from determinism import CROWD_OF_8, mismatches, run_alone, unmarked
from live_server import Request, SabotagedServer, Server, running
from workloads import LLM42_FLAGS, ONE_THREAD, marked, random_prompts

# Two servers, one after the other

#: Takes no byte: a commit log that links to it finds the disk full.
FULL = Path("/dev/full")

FirstServer = tuple[Server, Path]

SUBJECTS = [
    *marked(random_prompts(4, 10, 60, seed=11), max_new_tokens=40, temperature=0.0),
    *marked(random_prompts(4, 10, 60, seed=12), max_new_tokens=40, temperature=1.0, top_p=0.95),
]
NEIGHBOURS = [unmarked(subject) for subject in SUBJECTS]


@pytest.fixture(scope="module")
def first_server(random_llama: Path, logs: Path) -> Iterator[FirstServer]:
    """A server with a short queue for its commit log, and the path of this log, on a full disk at first."""
    path = logs / "commits.jsonl"
    if FULL.exists():
        path.symlink_to(FULL)
    flags = ("--max-total-tokens", "12288", "--enable-metrics", "--llm42-commit-log", str(path))
    server = SabotagedServer(
        random_llama, logs / "first.log", (*LLM42_FLAGS, *flags), ONE_THREAD, mode="small_log_queue"
    )
    with running(server):
        yield server, path
    path.unlink(missing_ok=True)


# A full disk

DROPPED = "sglang:llm42_commit_log_dropped_lines_total"
WRITTEN = "sglang:llm42_commit_log_lines_total"

#: Seconds until a line was tried again, on a busy machine.
PATIENCE_S = 60.0


def _wait_for(server: Server, metric: str, value: float) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while server.metric(metric) < value:
        assert time.monotonic() < deadline, f"{metric} is {server.metric(metric)}, not {value}"
        time.sleep(0.2)


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full to write to")
def test_a_full_disk_costs_lines_and_nothing_else(first_server: FirstServer) -> None:
    server, path = first_server
    expected = run_alone(server, SUBJECTS)
    assert server.together(SUBJECTS) == expected, "serving goes on"
    sent = 2 * len(SUBJECTS)
    _wait_for(server, DROPPED, 1)
    dropped = server.metric(DROPPED)
    # The queue holds 500 tokens and overhead of 100 for each line; one more is in the writer's hands.
    assert sent - 6 <= dropped < sent and server.metric(WRITTEN) == 0
    warnings = [line for line in server.log.read_text().splitlines() if "--llm42-commit-log" in line]
    refused = [line for line in warnings if "cannot be written" in line]
    assert len(refused) == 1 and "No space left" in refused[0] and "Serving goes on" in refused[0]
    assert not any("dropped and counted" in line for line in warnings if line not in refused)

    path.unlink()  # room again
    _wait_for(server, WRITTEN, sent - dropped)
    assert len(path.read_text().splitlines()) == sent - dropped
    assert server.generate(SUBJECTS[0]) == expected[0]
    _wait_for(server, WRITTEN, sent - dropped + 1)
    last = json.loads(path.read_text().splitlines()[-1])
    assert tuple(last["input_ids"]) == SUBJECTS[0].prompt
    assert server.metric(DROPPED) == dropped
    assert server.log.read_text().count("cannot be written") == 1


# A killed scheduler

#: Seconds in which each client must hear of it: SGLang looks after its processes every second.
NOTICE_S = 30.0

#: They decode and verify for much longer than it takes to kill the scheduler.
ENDLESS = marked(random_prompts(8, 10, 40, seed=13), max_new_tokens=900, ignore_eos=True, temperature=1.0)


def _scheduler(server: Server) -> psutil.Process:
    """The process that holds the model."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = [child for child in children if any("sglang::scheduler" in arg for arg in child.cmdline())]
    return found


def _outcome(server: Server, request: Request, stream: bool, begun: threading.Barrier) -> str:
    """Send one request and say how it ended; ``begun`` is passed when the first output is there."""
    body = {**request.body(), "stream": stream}
    try:
        if not stream:
            begun.wait()
            answer = requests.post(f"{server.url}/generate", json=body, timeout=300)
            return "answered" if answer.status_code == 200 else f"status {answer.status_code}"
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as answer:
            lines = answer.iter_lines()
            while not next(lines).startswith(b"data: {"):
                pass
            begun.wait()
            rest = list(lines)
            return "answered" if rest[-2:-1] == [b"data: [DONE]"] else "stream ended early"
    except requests.RequestException:
        return "connection broken"


def _wait_for_verification(server: Server) -> None:
    """Until canonical passes judge candidates of the endless requests, one after the other."""
    server.reset_statistics()
    deadline = time.monotonic() + 120
    while server.statistics()["verify_total_reqs"] < 2 * len(ENDLESS):
        assert time.monotonic() < deadline, "no verification"
        time.sleep(0.02)


def test_a_killed_scheduler_is_noticed_and_a_new_server_goes_on_alike(
    first_server: FirstServer, request: pytest.FixtureRequest
) -> None:
    """Ends the first server; the tests below use the new one, whose pool is smaller."""
    server, _ = first_server
    expected = run_alone(server, SUBJECTS)
    begun = threading.Barrier(len(ENDLESS) + 1)
    with ThreadPoolExecutor(len(ENDLESS)) as pool:
        clients = [
            pool.submit(_outcome, server, request, i % 2 == 0, begun) for i, request in enumerate(ENDLESS)
        ]
        begun.wait(timeout=120)
        _wait_for_verification(server)
        assert not any(client.done() for client in clients), "killed too late"
        _scheduler(server).send_signal(signal.SIGKILL)
        killed = time.monotonic()
        outcomes = [client.result(timeout=NOTICE_S) for client in clients]
        assert time.monotonic() - killed < NOTICE_S
    assert "answered" not in outcomes, outcomes
    # As without this package: SGLang ends all of its processes.
    assert server.process.wait(timeout=NOTICE_S) != 0
    with pytest.raises(requests.RequestException):
        requests.get(f"{server.url}/health", timeout=5)
    assert "crashed with exit code -9" in server.log.read_text()

    again: Server = request.getfixturevalue("small_server")
    assert run_alone(again, SUBJECTS) == expected
    assert not mismatches(again, SUBJECTS, expected, CROWD_OF_8, NEIGHBOURS)


# Too little memory

POOL = 512

#: Together they ask for four times the pool.
MANY = [
    *marked(random_prompts(10, 20, 80, seed=21), max_new_tokens=80, ignore_eos=True, temperature=1.0),
    *marked(random_prompts(6, 20, 80, seed=22), max_new_tokens=64, ignore_eos=True, temperature=0.0),
]


@pytest.fixture(scope="module")
def small_server(random_llama: Path, logs: Path) -> Iterator[Server]:
    """A server whose KV pool holds a few short requests."""
    flags = ("--max-total-tokens", str(POOL), "--schedule-conservativeness", "0.05", "--enable-metrics")
    with running(Server(random_llama, logs / "small.log", (*LLM42_FLAGS, *flags), ONE_THREAD)) as server:
        yield server


def test_a_prompt_longer_than_the_pool_is_refused_at_once(small_server: Server) -> None:
    (prompt,) = random_prompts(1, POOL + 50, POOL + 50, seed=23)
    request = Request(prompt, True, {"max_new_tokens": 4})
    answer = small_server.post("/generate", request.body())
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert f"Input length ({len(prompt)} tokens) exceeds" in message

    streamed = small_server.post("/generate", {**request.body(), "stream": True})
    assert f"Input length ({len(prompt)} tokens) exceeds" in streamed.text
    small_server.wait_until_idle()


def test_an_output_longer_than_the_pool_ends_where_the_pool_does(small_server: Server) -> None:
    (prompt,) = random_prompts(1, 60, 60, seed=24)
    request = Request(prompt, True, {"max_new_tokens": 900, "ignore_eos": True, "temperature": 1.0})
    (alone,) = run_alone(small_server, [request])
    assert alone.finish is not None and alone.finish["type"] == "length"
    assert POOL - 80 < len(prompt) + len(alone.token_ids) < POOL
    others = [unmarked(other) for other in MANY[:5]]
    assert small_server.together([request, *others])[0] == alone


def test_more_requests_than_the_pool_holds_all_finish_alike(small_server: Server) -> None:
    expected = run_alone(small_server, MANY)
    before = small_server.metric("sglang:num_retracted_requests_total")
    for _ in range(2):
        assert small_server.together(MANY) == expected
    assert small_server.metric("sglang:num_retracted_requests_total") > before, "too tame"
    small_server.wait_until_idle()


# A request that no token can satisfy

#: The grammar is complete after four tokens, and the end is forbidden before the twentieth.
CONTRADICTORY = {"regex": "w1 w2 w3 w4 ", "min_new_tokens": 20, "max_new_tokens": 30, "sampling_seed": 5}


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "min_p": 0.1}])
def test_a_contradictory_request_ends_alone(small_server: Server, sampling: dict[str, float]) -> None:
    """Without the mark it ends stock SGLang's scheduler where it is sampled."""
    (prompt,) = random_prompts(1, 20, 20, seed=25)
    request = Request(prompt, True, {**CONTRADICTORY, **sampling})
    expected = run_alone(small_server, MANY[:4])
    *outputs, ended = small_server.together([*MANY[:4], request])
    assert outputs == expected
    assert ended.finish is not None and ended.finish["type"] == "abort"
    assert small_server.together(MANY[:4]) == expected


def test_contradictory_requests_may_be_retracted_before_they_end(small_server: Server) -> None:
    """SGLang ends such a request a step after its grammar refused a token, and may need its memory before."""
    prompts = random_prompts(24, 10, 30, seed=26)
    crowd = [Request(prompt, True, {**CONTRADICTORY, "temperature": 1.0}) for prompt in prompts]
    with ThreadPoolExecutor(1) as pool:
        for _ in range(6):
            outputs, pause = pool.submit(small_server.together, crowd, 0.04), 0.02
            while not outputs.done():
                small_server.post("/pause_generation", {"mode": "retract"})
                small_server.post("/continue_generation", {})
                time.sleep(pause)
                pause = min(1.15 * pause, 2.0)  # a slow machine must get a step done in between
            assert [output.finish["type"] for output in outputs.result()] == ["abort"] * len(crowd)
    small_server.wait_until_idle()
