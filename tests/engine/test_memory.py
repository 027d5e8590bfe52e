"""KV accounting: after any mix of traffic SGLang's strict checks pass and every slot comes back.

The checks end the scheduler, and with it the server, at the first step after which slots are missing, free
twice, or in use and free at once.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from determinism import run_alone, unmarked
from live_server import Output, Request, SabotagedServer, Server, ServerError, at_once, running
from workloads import LLM42_FLAGS, ONE_THREAD, VOCABULARY, marked, random_prompts

#: Slots of the KV pool, a third of what the traffic would need at once, so that requests are retracted and
#: cached prefixes evicted.
POOL = 960

#: A low estimate of how many tokens requests will generate lets more of them in than the pool can hold.
TIGHT = ("--max-total-tokens", str(POOL), "--schedule-conservativeness", "0.05")

RETRACTED = re.compile("Retract requests|Testing retraction")

#: Rounds of traffic, two at least; whether a request is retracted depends on how many meet.
MOST_ROUNDS = 10

SUBJECTS = [
    *marked(random_prompts(6, 10, 90, seed=2), max_new_tokens=64, ignore_eos=True, temperature=1.0),
    *marked(random_prompts(3, 10, 60, seed=3), max_new_tokens=40, ignore_eos=True, temperature=0.0),
]
#: They end inside a window, where candidates are left over; at the length limit none are.
STOPPED = marked(
    random_prompts(8, 10, 40, seed=5),
    max_new_tokens=64,
    temperature=1.0,
    stop_token_ids=list(range(2, VOCABULARY, 5)),
)
LONG = Request(random_prompts(1, 600, 600, seed=4)[0], True, {"max_new_tokens": 8})


def _streamed(server: Server, request: Request) -> Output:
    """The end of a stream whose every message continued the one before."""
    outputs = list(server.stream(request))
    assert len(outputs) > 1
    for earlier, later in pairwise(outputs):
        assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
        assert later.text.startswith(earlier.text)
    return outputs[-1]


def _aborted_while_streaming(server: Server, request: Request, rid: str) -> None:
    """Ask for the end of a request as soon as it has a token."""
    for number, _ in enumerate(server.stream(request, rid=rid)):
        if number == 0:
            server.abort(rid)


def _left_alone(server: Server, request: Request) -> None:
    """Close the connection after the first message, as a client that has gone does."""
    next(server.stream(request))


def _aborted_after(server: Server, request: Request, rid: str, delay_s: float) -> None:
    """Ask for the end of a request after a while, be it waiting, in its prompt or decoding."""

    def abort() -> None:
        time.sleep(delay_s)
        server.abort(rid)

    at_once([lambda: server.post("/generate", {**request.body(), "rid": rid}), abort])


def _traffic(server: Server, round_: int) -> list[Output]:
    """All sorts of requests at once, in another order each round; returns the outputs of SUBJECTS."""
    watched: list[Callable[[], Any]] = [
        (lambda s=s: _streamed(server, s)) if i % 3 == 0 else (lambda s=s: server.generate(s))
        for i, s in enumerate(SUBJECTS)
    ]
    others: list[Callable[[], Any]] = [lambda s=s: server.generate(unmarked(s)) for s in SUBJECTS]
    others += [lambda s=s: _left_alone(server, s) for s in (SUBJECTS[0], unmarked(SUBJECTS[1]))]
    for i, subject in enumerate(SUBJECTS[2:5]):
        rid = f"decoding-{round_}-{i}"
        others.append(lambda s=subject, rid=rid: _aborted_while_streaming(server, s, rid))
    for i, delay_s in enumerate((0.02, 0.05, 0.1, 0.3)):
        rid = f"prompt-{round_}-{i}"
        others.append(lambda rid=rid, delay_s=delay_s: _aborted_after(server, LONG, rid, delay_s))
    calls = list(enumerate(watched + others))
    random.Random(round_).shuffle(calls)
    results = dict(zip((i for i, _ in calls), at_once([call for _, call in calls], gap_s=0.02), strict=True))
    return [results[i] for i in range(len(SUBJECTS))]


#: Flags and environment variables of the servers, by name.
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "page-1": (TIGHT, {}),
    "page-16": ((*TIGHT, "--page-size", "16"), {}),
    "retract-often": (
        ("--max-total-tokens", "4096", "--disable-overlap-schedule"),
        {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "12"},
    ),
}


@pytest.fixture(scope="module", params=SETTINGS)
def server(request: pytest.FixtureRequest, random_llama: Path, logs: Path) -> Iterator[SabotagedServer]:
    """A server with little memory, which the test-only plugin can make leak."""
    flags, environment = SETTINGS[request.param]
    log = logs / f"memory-{request.param}.log"
    server = SabotagedServer(random_llama, log, (*LLM42_FLAGS, *flags), {**ONE_THREAD, **environment})
    with running(server):
        yield server


def test_every_slot_comes_back(server: SabotagedServer) -> None:
    expected = run_alone(server, SUBJECTS)
    for round_ in range(MOST_ROUNDS):
        assert _traffic(server, round_) == expected
        if round_ > 0 and RETRACTED.search(server.log.read_text()):
            break
    server.wait_until_idle()
    server.flush_cache()
    log = server.log.read_text()
    assert RETRACTED.search(log), "the traffic was too tame: no request was retracted"
    assert not any(word in log.lower() for word in ("leak detected", "double free", "use-after-free"))
    assert run_alone(server, SUBJECTS[:1]) == expected[:1]


@pytest.mark.parametrize("server", ["page-1"], indirect=True)
def test_a_leak_ends_the_server(server: SabotagedServer) -> None:
    """The checks that the test above relies on are on, and see what this package could forget."""
    with pytest.raises(ServerError), server.broken("leak_candidates"):
        for _ in range(5):
            server.together(STOPPED)
    assert "leak detected" in server.log.read_text().lower()
