"""Options of the server that change how requests are admitted, interrupted and cut off."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from determinism import CROWD_OF_8, mismatches, run_alone, unmarked
from live_server import Output, Request, StartServer, at_once
from workloads import ONE_THREAD, marked, random_prompts

from sglang_ext.llm42.observability import log_reader
from sglang_ext.llm42.observability.log_reader import Entry

SUBJECTS = [
    *marked(random_prompts(5, 10, 90, seed=31), max_new_tokens=40, temperature=0.0),
    *marked(random_prompts(3, 10, 60, seed=32), max_new_tokens=40, temperature=1.0, ignore_eos=True),
]
ENDLESS = {"max_new_tokens": 900, "ignore_eos": True, "temperature": 1.0}


@pytest.mark.parametrize(
    "flags",
    [
        # SGLang leaves no memory for KV on a CPU when nothing is chunked, unless it is told.
        pytest.param(
            ("--disable-radix-cache", "--chunked-prefill-size", "-1", "--mem-fraction-static", "0.3"),
            id="no-cache-no-chunks",
        ),
        pytest.param(("--disable-radix-cache", "--chunked-prefill-size", "32"), id="no-cache-chunks"),
        pytest.param(("--schedule-policy", "lpm", "--prefill-max-requests", "2"), id="longest-prefix-first"),
    ],
)
def test_same_output_with_other_options(
    start_server: StartServer, random_llama: Any, flags: tuple[str, ...]
) -> None:
    server = start_server(random_llama, "--max-total-tokens", "8192", *flags, **ONE_THREAD)
    expected = run_alone(server, SUBJECTS)
    neighbours = [unmarked(subject) for subject in SUBJECTS]
    assert not mismatches(server, SUBJECTS, expected, CROWD_OF_8, neighbours)
    server.wait_until_idle()


def test_same_output_when_more_important_requests_push_in(
    start_server: StartServer, random_llama: Any
) -> None:
    flags = ("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "0")
    flags += ("--max-running-requests", "3", "--max-total-tokens", "4096")
    server = start_server(random_llama, *flags, **ONE_THREAD)
    subjects = marked(random_prompts(3, 20, 60, seed=33), max_new_tokens=150, ignore_eos=True)
    expected = run_alone(server, subjects)
    urgent = [unmarked(s) if i % 2 else s for i, s in enumerate(SUBJECTS)]
    alone = run_alone(server, urgent)
    calls: list[Callable[[], Output]] = [lambda s=s: server.generate(s, priority=0) for s in subjects]
    calls += [lambda s=s: server.generate(s, priority=10) for s in urgent]
    outputs = at_once(calls, gap_s=0.1)
    assert outputs[: len(subjects)] == expected
    assert outputs[len(subjects) :: 2] == alone[::2]
    assert any(output.meta["num_retractions"] for output in outputs[: len(subjects)]), "nobody was pushed out"
    server.wait_until_idle()


def test_a_timeout_cuts_the_deterministic_output_and_leaves_nothing(
    start_server: StartServer, random_llama: Any, tmp_path: Path
) -> None:
    """Running too long or waiting too long: 503, and what was streamed before is the beginning.

    All of them are in the commit log, those that never began without output.
    """
    log = tmp_path / "commits.jsonl"
    timeouts = {"SGLANG_REQ_RUNNING_TIMEOUT": "4", "SGLANG_REQ_WAITING_TIMEOUT": "1"}
    flags = ("--max-running-requests", "2", "--max-total-tokens", "4096", "--llm42-commit-log", str(log))
    server = start_server(random_llama, *flags, **ONE_THREAD, **timeouts)
    [first, second, third, fourth] = marked(random_prompts(4, 20, 60, seed=34), **ENDLESS)
    short = Request(first.prompt, True, {**first.sampling, "max_new_tokens": 24})
    [alone] = run_alone(server, [short])
    with ThreadPoolExecutor() as pool:
        streamed = pool.submit(lambda: list(server.stream(first)))
        whole = pool.submit(server.post, "/generate", second.body())
        time.sleep(0.5)
        waiting = pool.submit(server.post, "/generate", third.body())
        gone = pool.submit(server.post, "/generate", {**fourth.body(), "rid": "gone"})
        time.sleep(0.2)
        server.abort("gone")
        messages = streamed.result()
        assert whole.result().status_code == 503 and "running timeout" in whole.result().text
        assert waiting.result().status_code == 503 and "waiting timeout" in waiting.result().text
        aborted = Output.of(gone.result().json())
    longest = max((message for message in messages if message.token_ids), key=lambda m: len(m.token_ids))
    count = min(len(longest.token_ids), len(alone.token_ids))
    assert count > 0 and longest.token_ids[:count] == alone.token_ids[:count]
    server.wait_until_idle()
    assert run_alone(server, [short]) == [alone]

    entries = _entries(log, 6)
    by_prompt = {tuple(entry.fields["input_ids"]): entry for entry in entries[1:-1]}
    assert by_prompt.keys() == {request.prompt for request in (first, second, third, fourth)}
    assert all(by_prompt[request.prompt].log.tokens for request in (first, second))
    never_began = by_prompt[third.prompt], by_prompt[fourth.prompt]
    assert [entry.log.tokens for entry in never_began] == [(), ()]
    assert "waiting timeout" in never_began[0].fields["finish_reason"]["message"]
    assert never_began[1].fields["rid"] == "gone" and never_began[1].fields["finish_reason"] == aborted.finish


def _entries(log: Path, count: int) -> list[Entry]:
    """The lines of ``log`` as soon as there are ``count``."""
    deadline = time.monotonic() + 60
    while log_reader.count(log) < count:
        assert time.monotonic() < deadline, "lines are missing"
        time.sleep(0.1)
    entries = [line for line in log_reader.read(log) if isinstance(line, Entry)]
    assert len(entries) == count
    return entries
