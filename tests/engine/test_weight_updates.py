"""Weight updates on a live server, as in reinforcement learning: KV of the old weights must not survive."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from determinism import run_alone
from live_server import REQUEST_TIMEOUT_S, Request, SabotagedServer, Server, ServerError, running
from models import make_tokenizer, write_tiny_llama
from workloads import LLM42_FLAGS, ONE_THREAD, VOCABULARY, marked, random_prompts

#: Long enough to be under way while the test acts.
LONG = {"max_new_tokens": 600, "temperature": 0.0, "ignore_eos": True}
SHORT = {"max_new_tokens": 24, "temperature": 0.0}

ACCEPTING = "sglang:llm42_accepting_reqs"

#: SGLang's own diagnostics of GPUs, for which it waits 65 s before it ends its processes.
NO_DIAGNOSTICS = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}

#: Seconds in which a server has ended whose rank has failed: far less than any timeout of a collective.
END_S = 60.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random Llamas of the same shape."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"checkpoint{seed}")
        write_tiny_llama(folder, vocab=VOCABULARY, sensitive=True, seed=seed)
        make_tokenizer(["<s>", "</s>", *(f"w{i} " for i in range(2, VOCABULARY))]).save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def server(checkpoints: list[Path], logs: Path) -> Iterator[Server]:
    """A server of the first checkpoint."""
    flags = (*LLM42_FLAGS, "--max-total-tokens", "8192", "--max-running-requests", "3")
    with running(Server(checkpoints[0], logs / "weights.log", flags, ONE_THREAD)) as server:
        yield server


def update(server: Server, checkpoint: Path) -> None:
    """Load ``checkpoint`` and keep what the prefix cache holds."""
    answer = server.post("/update_weights_from_disk", {"model_path": str(checkpoint), "flush_cache": False})
    assert answer.status_code == 200 and answer.json()["success"], answer.text


def state(server: Server) -> dict[str, Any]:
    """What the first scheduler tells about itself."""
    answer = requests.get(f"{server.url}/server_info", timeout=REQUEST_TIMEOUT_S)
    return answer.json()["internal_states"][0]


def fingerprint(server: Server) -> str | None:
    """The canonical fingerprint as the server tells it."""
    return state(server)["llm42_fingerprint"]


@contextmanager
def paused(server: Server, mode: str) -> Iterator[None]:
    """Generation is paused inside this context."""
    assert server.post("/pause_generation", {"mode": mode}).status_code == 200
    try:
        yield
    finally:
        assert server.post("/continue_generation", {}).status_code == 200


def wait_for_decoding(server: Server, requests_: int) -> None:
    """Return when so many marked requests have output."""
    deadline = time.monotonic() + 60
    while server.statistics()["decode_deterministic_rows"] < 20 * requests_:
        assert time.monotonic() < deadline, "the requests do not decode"
        time.sleep(0.05)


def test_cached_prefixes_end_with_the_weights(server: Server, checkpoints: list[Path]) -> None:
    subjects = marked(random_prompts(3, 40, 90, seed=1), **SHORT)
    old = run_alone(server, subjects)
    old_fingerprint = fingerprint(server)
    assert server.generate(subjects[-1]).meta["cached_tokens"] > 0
    update(server, checkpoints[1])
    first = [server.generate(subject) for subject in subjects]
    assert [output.meta["cached_tokens"] for output in first] == [0, 0, 0]
    assert first == run_alone(server, subjects)
    assert first != old
    assert fingerprint(server) not in (old_fingerprint, None)
    update(server, checkpoints[0])
    assert [server.generate(subject) for subject in subjects] == old
    assert fingerprint(server) == old_fingerprint


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_alone_changes_nothing(server: Server, mode: str) -> None:
    subjects = marked(random_prompts(3, 20, 60, seed=2), **{**LONG, "max_new_tokens": 120})
    alone = run_alone(server, subjects)
    server.reset_statistics()
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(server.generate, subject) for subject in subjects]
        wait_for_decoding(server, 3)
        with paused(server, mode):
            time.sleep(0.5)
            assert not all(future.done() for future in futures)
        assert [future.result() for future in futures] == alone


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_requests_do_not_span_weights(server: Server, checkpoints: list[Path], mode: str) -> None:
    started = marked(random_prompts(3, 20, 60, seed=3), **LONG)
    [waiting] = marked(random_prompts(1, 20, 60, seed=4), **SHORT)
    server.flush_cache()
    server.reset_statistics()
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(_status_of, server, request) for request in started]
        wait_for_decoding(server, 3)
        # --max-running-requests 3: it has not begun when the weights change.
        late: Future = pool.submit(server.generate, waiting)
        time.sleep(0.5)
        with paused(server, mode):
            time.sleep(0.5)
            update(server, checkpoints[1])
        for future in futures:
            status, text = future.result()
            assert status == 503 and "weights were updated" in text
        output = late.result()
    assert output.meta["cached_tokens"] == 0
    assert [output] == run_alone(server, [waiting])
    update(server, checkpoints[0])
    assert [output] != run_alone(server, [waiting])


def test_a_failed_update_changes_nothing(server: Server, tmp_path: Path) -> None:
    [subject] = marked(random_prompts(1, 30, 30, seed=5), **SHORT)
    before, known = run_alone(server, [subject]), fingerprint(server)
    answer = server.post("/update_weights_from_disk", {"model_path": str(tmp_path / "absent")})
    assert answer.status_code == 400
    assert [server.generate(subject)] == before and fingerprint(server) == known


def test_updated_weights_are_certified_unasked(checkpoints: list[Path], logs: Path) -> None:
    """Nobody looks at /server_info; while unmarked requests run, and when the new weights fail."""
    [subject] = marked(random_prompts(1, 30, 30, seed=6), **SHORT)
    [other] = [Request(prompt, False, LONG) for prompt in random_prompts(1, 30, 30, seed=7)]
    flags = (*LLM42_FLAGS, "--max-total-tokens", "8192", "--max-running-requests", "3")
    server = SabotagedServer(checkpoints[0], logs / "certified.log", flags, ONE_THREAD)
    with running(server), ThreadPoolExecutor() as pool:
        before = run_alone(server, [subject])
        running_ = pool.submit(server.generate, other)
        time.sleep(0.3)
        with paused(server, "in_place"):
            update(server, checkpoints[1])
        assert [server.generate(subject)] != before and len(running_.result().token_ids) == 600
        assert server.log.read_text(errors="replace").count("canonical fingerprint") == 2
        with server.broken("placed_attention"):
            update(server, checkpoints[0])
            for _ in range(2):
                status, text = _status_of(server, subject)
                assert status == 503 and "row invariance" in text
                assert len(server.generate(other).token_ids) == 600
            assert fingerprint(server) is None
        update(server, checkpoints[0])
        assert [server.generate(subject)] == before


def test_two_ranks_refuse_alike_and_end_together(checkpoints: list[Path], logs: Path) -> None:
    """Weights that fail on both ranks are refused; a rank that fails alone ends the server."""
    [subject] = marked(random_prompts(1, 30, 30, seed=8), **SHORT)
    flags = (*LLM42_FLAGS, "--tp-size", "2", "--max-total-tokens", "2048", "--enable-metrics")
    environment = {**ONE_THREAD, **NO_DIAGNOSTICS}
    server = SabotagedServer(checkpoints[0], logs / "two_ranks.log", flags, environment)
    with running(server):
        before = run_alone(server, [subject])
        assert server.metric(ACCEPTING) == 1 and state(server)["llm42_accepting_reqs"] is True
        with server.broken("placed_attention"):
            update(server, checkpoints[1])
            assert _status_of(server, subject)[0] == 503
            assert server.metric(ACCEPTING) == 0 and state(server)["llm42_accepting_reqs"] is False
        update(server, checkpoints[0])
        assert [server.generate(subject)] == before and server.metric(ACCEPTING) == 1

        processes = psutil.Process(server.process.pid).children(recursive=True)
        update(server, checkpoints[1])
        server.break_for_good("failing_rank")
        began = time.monotonic()
        with pytest.raises(ServerError):
            server.generate(subject)
        assert server.process.wait(timeout=END_S) != 0
        while any(map(_runs, processes)):
            assert time.monotonic() < began + END_S, "processes are left"
            time.sleep(0.1)
    log = server.log.read_text(errors="replace")
    assert "Scheduler hit an exception" in log and "out of memory on this rank alone" in log


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _status_of(server: Server, request: Request) -> tuple[int, str]:
    answer = server.post("/generate", request.body())
    return answer.status_code, answer.text
