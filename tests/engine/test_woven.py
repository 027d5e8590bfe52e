"""LLM-42 and TokenWeave together, on two tensor-parallel ranks: canonical passes run as two halves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from determinism import ALONE_WARM, CROWD_OF_8, CROWD_OF_17, Condition, mismatches, run_alone
from live_server import Output, Request, SabotagedServer, StartServer, running
from workloads import LLM42_FLAGS, ONE_THREAD, marked, random_prompts

#: Prefill batches of other requests are cut as well.
WOVEN = ("--tp-size", "2", "--enable-tokenweave", "--tokenweave-min-tokens", "16")

#: Passes have 4 segments of 16 rows and are cut behind the second.
HALF, PASS = 32, 64

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(random_llama: Path, logs: Path) -> Iterator[SabotagedServer]:
    flags = (*LLM42_FLAGS, *WOVEN, "--max-total-tokens", "2048")
    with running(SabotagedServer(random_llama, logs / "woven.log", flags, ONE_THREAD)) as server:
        yield server


def _subjects() -> list[Request]:
    prompts = random_prompts(8, 10, 80, seed=6)
    return [
        *marked(prompts[:5], max_new_tokens=40, temperature=1.0, top_p=0.95, ignore_eos=True),
        *marked(prompts[5:], max_new_tokens=40, temperature=0.0, ignore_eos=True),
    ]


NEIGHBOURS = [
    Request(prompt, False, {"max_new_tokens": 30, "temperature": 0.9, "top_k": 30})
    for prompt in random_prompts(9, 10, 80, seed=7)
]


@pytest.fixture(scope="module")
def alone(server: SabotagedServer) -> list[Output]:
    """What each subject gives alone, with a cold cache."""
    return run_alone(server, _subjects())


def test_canonical_passes_are_cut_from_the_start(server: SabotagedServer) -> None:
    log = server.log.read_text()
    assert log.count("TokenWeave: canonical passes of 4 x 16 rows run as two halves of 32 rows") == 1
    # Two steps in each of four layers and two halves; what is left is the embedding's all-reduce.
    first = "first batch run as two halves, 32 of 64 tokens first; 16 fused steps, 2 plain all-reduces"
    assert log.count(first) == 2


@pytest.mark.parametrize("condition", [CROWD_OF_17, CROWD_OF_8, ALONE_WARM], ids=lambda c: c.name)
def test_the_same_output_alone_and_in_crowds(
    server: SabotagedServer, alone: list[Output], condition: Condition
) -> None:
    subjects = _subjects()
    assert len({output.token_ids for output in alone}) == len(subjects)
    server.reset_statistics()
    assert not mismatches(server, subjects, alone, condition, NEIGHBOURS)
    counters = server.statistics()
    assert counters["verify_forward_passes"] > len(subjects) and counters["rollbacks"] > 0


def test_a_prompt_that_straddles_the_cut(server: SabotagedServer) -> None:
    """Its last two segments attend to what the first two write in the same pass."""
    prompt, other = random_prompts(2, PASS - 4, PASS - 4, seed=8)
    request = Request(prompt, True, GREEDY)

    def cold() -> tuple[Output, Any]:
        # Another request leaves its keys and values in the slots, not those that are to be computed.
        server.flush_cache()
        server.generate(Request(other, True, GREEDY))
        server.flush_cache()
        server.reset_statistics()
        return _with_logprobs(server, request)

    expected = cold()
    assert server.statistics()["prompt_segments"] == 4

    server.flush_cache()
    server.generate(Request(prompt[: HALF + 1], True, {**GREEDY, "max_new_tokens": 1}))
    # Now the first two segments' keys and values come from an earlier pass.
    after_prefix = _with_logprobs(server, request)
    assert after_prefix[0].meta["cached_tokens"] >= HALF
    assert after_prefix == expected

    with server.broken("second_half_first"):
        broken = cold()
    assert broken[1] != expected[1], "the cut lies where the prompt's segments do"
    assert cold() == expected


def _with_logprobs(server: SabotagedServer, request: Request) -> tuple[Output, Any]:
    output = server.generate(request, return_logprob=True)
    logprobs = output.meta["output_token_logprobs"]
    assert len(logprobs) == GREEDY["max_new_tokens"]
    return output, logprobs


def test_passes_may_be_left_whole(start_server: StartServer, tiny_llama: Path) -> None:
    flags = ("--skip-tokenizer-init", "--max-total-tokens", "1024", "--tokenweave-canonical-split", "never")
    server = start_server(tiny_llama, *WOVEN, *flags, **ONE_THREAD)
    assert "canonical passes of 4 x 16 rows run whole: --tokenweave-canonical-split never" in (
        server.log.read_text()
    )
    (prompt,) = random_prompts(1, 40, 40, seed=9)
    alone = server.generate(Request(prompt, True, GREEDY))
    assert "two halves" not in server.log.read_text()
    crowd = [Request(prompt, True, GREEDY), *NEIGHBOURS[:4]]
    server.flush_cache()
    assert server.together(crowd)[0] == alone
    assert "first batch run as two halves" in server.log.read_text(), "prefill of the others is cut"
