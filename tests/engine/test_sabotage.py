"""Each part that determinism rests on, broken on purpose: the determinism check must notice.

One server with the random Llama, in which a rounding difference soon becomes another token, is broken in one
way after the other by the test-only plugin. Whole, it passes the very check that it fails when broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from determinism import (
    AFTER_TWINS,
    ALONE_WARM,
    CROWD_OF_3,
    CROWD_OF_17,
    Condition,
    Mismatch,
    mismatches,
    run_alone,
)
from live_server import Output, Request, SabotagedServer
from workloads import random_prompts

NEW_TOKENS = 48
CONDITIONS = (AFTER_TWINS, ALONE_WARM, CROWD_OF_17, CROWD_OF_3)

#: How the marked requests sample, in turn.
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
)

#: Long prompts first, then beginnings of them, which match the cached long ones where the cache is warm.
LONG_PROMPTS = random_prompts(4, 60, 75)
PROMPTS = [*LONG_PROMPTS, *(prompt[: 30 + 7 * i] for i, prompt in enumerate(LONG_PROMPTS))]
NEIGHBOURS = [
    Request(prompt, False, {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "top_p": 0.9})
    for prompt in random_prompts(9, 10, 70, seed=1)
]
SUBJECTS = [
    Request(
        prompt,
        True,
        {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "sampling_seed": i, **SAMPLING[i % len(SAMPLING)]},
    )
    for i, prompt in enumerate(PROMPTS)
]


def _check(
    server: SabotagedServer,
    subjects: Sequence[Request] = SUBJECTS,
    conditions: Sequence[Condition] = CONDITIONS,
) -> list[Mismatch]:
    """The determinism check; ends at the first condition that has mismatches."""
    expected = run_alone(server, subjects)
    for condition in conditions:
        if found := mismatches(server, subjects, expected, condition, NEIGHBOURS):
            return found
    return []


def _with_stops(outputs: Sequence[Output]) -> list[Request]:
    """The subjects with a length limit a few tokens behind a stop string, as their outputs have them.

    SGLang looks at the length first, so that a window which holds both ends differently from two windows.
    """
    requests = []
    for i, (subject, output) in enumerate(zip(SUBJECTS, outputs, strict=True)):
        for place in (18 + i, 28 + i):
            words = output.text.split()[place : place + 2]
            sampling = {**subject.sampling, "max_new_tokens": place + 6, "stop": [" ".join(words)]}
            requests.append(Request(subject.prompt, True, sampling))
    return requests


@pytest.fixture(scope="module")
def whole(sabotaged_server: SabotagedServer) -> list[Output]:
    """Outputs of the subjects alone on the server as it should be."""
    return run_alone(sabotaged_server, SUBJECTS)


def test_whole_server_passes_the_check(sabotaged_server: SabotagedServer, whole: list[Output]) -> None:
    assert {len(output.token_ids) for output in whole} == {NEW_TOKENS}
    assert _check(sabotaged_server) == []


def test_whole_server_passes_the_check_with_stops(
    sabotaged_server: SabotagedServer, whole: list[Output]
) -> None:
    subjects = _with_stops(whole)
    assert {output.finish["type"] for output in run_alone(sabotaged_server, subjects)} == {"stop"}
    assert _check(sabotaged_server, subjects) == []


@pytest.mark.parametrize("mode", ["torch_attention", "stock_prefill", "shared_cache", "batch_sampler"])
def test_check_notices(sabotaged_server: SabotagedServer, mode: str) -> None:
    with sabotaged_server.broken(mode):
        assert _check(sabotaged_server)


def test_check_notices_finish_checks_of_whole_windows(
    sabotaged_server: SabotagedServer, whole: list[Output]
) -> None:
    with sabotaged_server.broken("whole_window_finish"):
        assert _check(sabotaged_server, _with_stops(whole))


def test_corrupted_candidates_change_nothing(sabotaged_server: SabotagedServer, whole: list[Output]) -> None:
    """Candidates are proposals only: with one in six replaced, output stays and rollbacks abound."""
    sabotaged_server.reset_statistics()
    with sabotaged_server.broken("corrupt_candidates"):
        assert run_alone(sabotaged_server, SUBJECTS) == whole
        for condition in CONDITIONS:
            assert not mismatches(sabotaged_server, SUBJECTS, whole, condition, NEIGHBOURS)
        figures = sabotaged_server.statistics()
    assert figures["rollbacks"] > len(SUBJECTS) * (1 + len(CONDITIONS))
    judged = figures["candidates_accepted"] + figures["candidates_rejected"]
    assert figures["candidates_rejected"] > 0.08 * judged
