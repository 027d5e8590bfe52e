"""Decode steps of a canonical shape: what they decide is what verification decides, and nothing is lost.

One server whose steps are all canonical where a row can be decided, with the random Llama, in which rounding
soon changes a token. The test-only plugin lets it verify instead, or change its mind.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from determinism import AFTER_TWINS, ALONE_WARM, CROWD_OF_3, CROWD_OF_17, mismatches, run_alone
from live_server import Output, Request, SabotagedServer, at_once, running
from workloads import LLM42_FLAGS, ONE_THREAD, VOCABULARY, marked, random_prompts

CONDITIONS = (AFTER_TWINS, ALONE_WARM, CROWD_OF_17, CROWD_OF_3)

#: Little enough for requests to be retracted.
FLAGS = (
    *LLM42_FLAGS,
    *("--llm42-canonical-decode", "always"),
    *("--max-total-tokens", "1200", "--schedule-conservativeness", "0.05", "--max-running-requests", "24"),
)

NEW_TOKENS = 48
SUBJECTS = [
    *marked(random_prompts(4, 10, 70), max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.0),
    *marked(random_prompts(3, 10, 70, seed=1), max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=1.0),
    # Some end within.
    *marked(
        random_prompts(3, 10, 70, seed=2),
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        top_p=0.9,
        stop_token_ids=list(range(2, VOCABULARY, 12)),
    ),
]
#: Their tokens hang on those before, so that canonical steps draft for them.
PENALISED = marked(
    random_prompts(3, 10, 70, seed=3),
    max_new_tokens=NEW_TOKENS,
    ignore_eos=True,
    frequency_penalty=0.3,
    repetition_penalty=1.1,
)
NEIGHBOURS = [
    Request(prompt, False, {"max_new_tokens": NEW_TOKENS, "temperature": 1.0})
    for prompt in random_prompts(9, 10, 70, seed=4)
]


@pytest.fixture(scope="module")
def server(random_llama: Path, logs: Path) -> Iterator[SabotagedServer]:
    made = SabotagedServer(random_llama, logs / "canonical_decode.log", FLAGS, ONE_THREAD)
    with running(made):
        yield made


@pytest.fixture(scope="module")
def verified(server: SabotagedServer) -> list[Output]:
    """Outputs of the subjects alone, by verification."""
    with server.broken("verified_decode"):
        before = server.statistics()
        outputs = run_alone(server, SUBJECTS)
        after = server.statistics()
    assert after["canonical_decode_steps"] == before["canonical_decode_steps"]
    assert after["verify_total_reqs"] > before["verify_total_reqs"]
    return outputs


def _differing(server: SabotagedServer, subjects: Sequence[Request], expected: Sequence[Output]) -> list[Any]:
    return [
        found
        for condition in CONDITIONS
        for found in mismatches(server, subjects, expected, condition, NEIGHBOURS)
    ]


def test_outputs_are_those_of_verification(server: SabotagedServer, verified: list[Output]) -> None:
    assert any(output.finish and output.finish["type"] == "stop" for output in verified)
    server.reset_statistics()
    assert run_alone(server, SUBJECTS) == verified
    assert _differing(server, SUBJECTS, verified) == []
    seen = server.statistics()
    assert seen["decode_decided_rows"] == seen["decode_deterministic_rows"] > 0
    assert seen["decode_other_rows"] > 0
    assert seen["verify_total_reqs"] == seen["rollbacks"] == 0


def test_going_to_and_fro_changes_nothing(server: SabotagedServer, verified: list[Output]) -> None:
    server.reset_statistics()
    with server.broken("alternating_decode"):
        assert _differing(server, SUBJECTS, verified) == []
    seen = server.statistics()
    assert seen["decode_decided_rows"] > 100 and seen["verify_total_tokens"] > 100
    assert seen["rollbacks"] > 0, "SGLang's steps have the same bits, so nothing was shown"


def test_check_notices_steps_that_are_not_canonical(server: SabotagedServer, verified: list[Output]) -> None:
    with server.broken("stock_decode_decides"):
        assert _differing(server, SUBJECTS, verified)


def test_penalised_requests_are_verified_beside_others(server: SabotagedServer) -> None:
    expected = run_alone(server, PENALISED)
    server.reset_statistics()
    crowd = [*PENALISED, *SUBJECTS, *NEIGHBOURS]
    assert server.together(crowd)[: len(PENALISED)] == expected
    seen = server.statistics()
    assert 0 < seen["decode_decided_rows"] < seen["decode_deterministic_rows"]
    assert seen["verify_total_tokens"] > 0


def test_log_probabilities_are_those_of_verification(server: SabotagedServer) -> None:
    def asked() -> list[Any]:
        outputs = []
        for subject in SUBJECTS[::3]:
            server.flush_cache()
            meta = server.generate(
                subject,
                return_logprob=True,
                top_logprobs_num=2,
                token_ids_logprob=[5, 9],
                logprob_start_len=0,
            ).meta
            outputs.append({name: value for name, value in meta.items() if "logprobs" in name})
        return outputs

    with server.broken("verified_decode"):
        expected = asked()
    server.reset_statistics()
    assert asked() == expected
    assert len(expected[0]["output_token_logprobs"]) == NEW_TOKENS
    assert server.statistics()["verify_total_reqs"] == 0


def test_every_token_is_streamed_when_it_is_decided(server: SabotagedServer, verified: list[Output]) -> None:
    outputs = list(server.stream(SUBJECTS[0]))
    assert outputs[-1].token_ids == verified[0].token_ids
    lengths = [len(output.token_ids) for output in outputs]
    assert lengths == list(range(1, NEW_TOKENS + 1))


def test_aborts_leave_no_slot_behind(server: SabotagedServer, verified: list[Output]) -> None:
    """SGLang's strict checks end the server at the first slot that is missing or free twice."""

    def aborted(number: int, request: Request) -> None:
        rid = f"aborted-{number}"
        calls = [
            lambda: server.post("/generate", {**request.body(), "rid": rid}),
            lambda: (time.sleep(0.02 * number), server.abort(rid)),
        ]
        at_once(calls)

    def left(request: Request) -> None:
        next(server.stream(request))

    at_once(
        [
            *(lambda i=i, s=s: aborted(i, s) for i, s in enumerate(SUBJECTS)),
            *(lambda s=s: left(s) for s in SUBJECTS[:3]),
            *(lambda n=n: server.generate(n) for n in NEIGHBOURS),
        ]
    )
    server.wait_until_idle()
    server.flush_cache()
    assert server.used_slots() == 0
    assert run_alone(server, SUBJECTS[:2]) == verified[:2]


@pytest.mark.parametrize("mode", ["", "alternating_decode"])
def test_retracted_requests_go_on_alike(server: SabotagedServer, verified: list[Output], mode: str) -> None:
    """More at once than memory holds; which are retracted depends on how many meet."""
    with server.broken(mode):
        for _ in range(8):
            outputs = server.together([*SUBJECTS, *NEIGHBOURS, *NEIGHBOURS], gap_s=0)
            assert outputs[: len(SUBJECTS)] == verified
            if any(output.meta["num_retractions"] for output in outputs[: len(SUBJECTS)]):
                return
    pytest.fail("no deterministic request was retracted")
