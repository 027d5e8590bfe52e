"""Tensor and data parallelism, dense models and mixtures of experts: the same output alone and in crowds.

Tensor-parallel ranks must take the same decisions, or the server hangs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import requests
from determinism import ALONE_WARM, CROWD_OF_8, CROWD_OF_17, Condition, mismatches, run_alone, unmarked
from live_server import Output, Request, Server, StartServer, at_once, running
from models import write_tiny_experts, write_tiny_llama
from workloads import LLM42_FLAGS, ONE_THREAD, VOCABULARY, marked, random_prompts

from sglang_ext.llm42.observability import log_files, log_reader

DP_RANKS = 2

#: For models without a tokenizer.
SMALL = ("--skip-tokenizer-init", "--max-total-tokens", "2048")

#: Seconds for the commit log's thread on a busy machine.
PATIENCE_S = 60.0

NEIGHBOURS = [
    Request(prompt, False, {"max_new_tokens": 30, "temperature": 0.9, "top_k": 30})
    for prompt in random_prompts(9, 10, 80, seed=7)
]


def _subjects(sampled: int = 5, greedy: int = 3, new_tokens: int = 40) -> list[Request]:
    prompts = random_prompts(sampled + greedy, 10, 80, seed=6)
    return [
        *marked(prompts[:sampled], max_new_tokens=new_tokens, temperature=1.0, top_p=0.95, ignore_eos=True),
        *marked(prompts[sampled:], max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True),
    ]


def _check(server: Server, subjects: Sequence[Request], conditions: Sequence[Condition]) -> list[Output]:
    """The determinism check; returns the outputs of each request alone."""
    alone = run_alone(server, subjects)
    assert len({output.token_ids for output in alone}) == len(subjects)
    for condition in conditions:
        assert not mismatches(server, subjects, alone, condition, NEIGHBOURS)
    return alone


def test_two_ranks(start_server: StartServer, random_llama: Path) -> None:
    server = start_server(random_llama, "--tp-size", "2", "--max-total-tokens", "2048", **ONE_THREAD)
    subjects = _subjects()
    alone = _check(server, subjects, (CROWD_OF_17, CROWD_OF_8, ALONE_WARM))
    assert server.statistics()["rollbacks"] > 0
    # Unmarked requests begin with copies of canonical prefixes, on both ranks alike.
    server.together([unmarked(subject) for subject in subjects])
    assert server.statistics()["shared_prefix_tokens"] > 0
    assert not mismatches(server, subjects, alone, CROWD_OF_17, NEIGHBOURS)
    server.wait_until_idle()


def test_four_ranks(start_server: StartServer, tmp_path: Path) -> None:
    """gloo's own all-reduce sums the rows of a pass in different orders from three ranks on."""
    model = write_tiny_llama(tmp_path, hidden=128, kv_heads=4, vocab=VOCABULARY, sensitive=True)
    server = start_server(model, "--tp-size", "4", *SMALL, **ONE_THREAD)
    _check(server, _subjects(3, 1, new_tokens=20), (CROWD_OF_8,))
    assert server.statistics()["rollbacks"] > 0


def test_experts_on_two_ranks(start_server: StartServer, tmp_path: Path) -> None:
    model = write_tiny_experts(tmp_path, family="mixtral", vocab=VOCABULARY)
    server = start_server(model, "--tp-size", "2", *SMALL, **ONE_THREAD)
    _check(server, _subjects(3, 1, new_tokens=20), (CROWD_OF_8,))
    assert server.statistics()["rollbacks"] > 0


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[tuple[Server, Path]]:
    """Two replicas of a mixture of experts, and the path given for their commit log."""
    folder = tmp_path_factory.mktemp("replicas")
    model = write_tiny_experts(
        folder / "model", family="qwen3_moe", experts=16, experts_per_token=4, vocab=VOCABULARY
    )
    log = folder / "log.jsonl"
    flags = ("--dp-size", str(DP_RANKS), *SMALL, "--llm42-commit-log", str(log))
    with running(Server(model, logs / "replicas.log", (*LLM42_FLAGS, *flags), ONE_THREAD)) as server:
        yield server, log


def test_experts_on_two_replicas(replicas: tuple[Server, Path]) -> None:
    """Requests that name no replica run on either."""
    server, log = replicas
    states = requests.get(f"{server.url}/server_info", timeout=60).json()["internal_states"]
    assert len(states) == DP_RANKS
    assert len({state["llm42_fingerprint"] for state in states}) == 1

    subjects = _subjects(3, 1, new_tokens=20)
    alone = _check(server, subjects, (CROWD_OF_8,))
    counters = server.statistics_of_ranks()
    assert sum(of_rank["rollbacks"] for of_rank in counters.values()) > 0
    for rank in range(DP_RANKS):
        server.flush_cache()
        assert _together_on(server, subjects, rank) == alone
        assert _wait_for_lines(log_files.of_rank(log, rank, DP_RANKS), len(subjects), f"{rank}-")


def test_counters_of_each_replica(replicas: tuple[Server, Path]) -> None:
    server, _ = replicas
    for rank in range(DP_RANKS):
        server.reset_statistics()
        counters = server.statistics_of_ranks()
        assert [*counters] == [f"dp_{rank}" for rank in range(DP_RANKS)]
        assert not any(value for of_rank in counters.values() for value in of_rank.values())
        _together_on(server, _subjects(1, 0, new_tokens=4), rank)
        counters = server.statistics_of_ranks()
        assert [of_rank["prompt_segments"] > 0 for of_rank in counters.values()] == [
            other == rank for other in range(DP_RANKS)
        ]


def _together_on(server: Server, subjects: Sequence[Request], rank: int) -> list[Output]:
    """Outputs of ``subjects``, all at once on one replica; their request ids begin with its rank."""
    return at_once(
        [
            partial(server.generate, subject, routed_dp_rank=rank, rid=f"{rank}-{number}-{uuid.uuid4()}")
            for number, subject in enumerate(subjects)
        ]
    )


def _wait_for_lines(log: Path, count: int, beginning: str) -> bool:
    """Whether ``log`` comes to hold ``count`` requests whose ids have this ``beginning``."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        entries = [line for line in log_reader.read(log) if isinstance(line, log_reader.Entry)]
        if sum(str(entry.fields["rid"]).startswith(beginning) for entry in entries) == count:
            return True
        time.sleep(0.1)
    return False
