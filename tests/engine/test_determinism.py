"""The promise on a real model: marked requests give the same output whatever else the server does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from determinism import (
    ALONE_WARM,
    CROWD_OF_3,
    CROWD_OF_8,
    CROWD_OF_17,
    Condition,
    mismatches,
    run_alone,
    run_condition,
    unmarked,
)
from live_server import Output, Request, Server, StartServer
from workloads import DEMO_FLAGS

QUESTIONS = (
    "Tell me about the moon.",
    "Write a haiku about rain.",
    "Why is the sky blue?",
    "What is a compiler?",
    "Give me a short story about a fox.",
)
NEW_TOKENS = 40
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "sampling_seed": 7}

#: Share of the candidates judged that verification must accept: decode and verification run the same model.
ACCEPTED_SHARE = 0.8


@dataclass(frozen=True)
class Subjects:
    """Marked requests and what each of them gave alone, with a cold cache."""

    requests: Sequence[Request]
    alone: Sequence[Output]


def _chat(tokenizer: Any, question: str) -> tuple[int, ...]:
    messages = [{"role": "user", "content": question}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[tuple[int, ...]]:
    """The questions as chat prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [_chat(tokenizer, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def neighbours(prompts: list[tuple[int, ...]]) -> list[Request]:
    """Unmarked requests of other lengths, most of them with top_p, which changes SGLang's sampling path."""
    sampling = ({"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.7, "top_k": 20}, {"temperature": 0.0})
    return [
        Request(prompt[: 8 + 5 * i], False, {"max_new_tokens": 20 + 6 * i, **sampling[i % 3]})
        for i, prompt in enumerate([*prompts, prompts[0]])
    ]


@pytest.fixture(scope="module")
def subjects(demo_server: Server, prompts: list[tuple[int, ...]]) -> Subjects:
    """Every prompt, marked, run alone; greedy and sampled by turns."""
    requests = [
        Request(prompt, True, {"max_new_tokens": NEW_TOKENS, **(GREEDY if i % 2 else SAMPLED)})
        for i, prompt in enumerate(prompts)
    ]
    return Subjects(requests, run_alone(demo_server, requests))


def test_answers_are_answers(subjects: Subjects) -> None:
    """What the other tests compare is not empty, and not all the same."""
    assert all(len(output.token_ids) >= 8 and output.text.strip() for output in subjects.alone)
    assert len({output.token_ids for output in subjects.alone}) == len(QUESTIONS)
    assert all(output.meta["llm42_num_verification_windows"] >= 1 for output in subjects.alone)


@pytest.mark.parametrize("condition", [CROWD_OF_3, CROWD_OF_8, ALONE_WARM], ids=lambda c: c.name)
def test_same_output_in_any_company(
    demo_server: Server, subjects: Subjects, neighbours: list[Request], condition: Condition
) -> None:
    assert not mismatches(demo_server, subjects.requests, subjects.alone, condition, neighbours)


def test_same_output_in_a_crowd_that_shares_decode_batches(
    demo_server: Server, subjects: Subjects, neighbours: list[Request]
) -> None:
    """Also: the crowd was decoded together, nearly all candidates were right, and some were not."""
    demo_server.reset_statistics()
    assert not mismatches(demo_server, subjects.requests, subjects.alone, CROWD_OF_17, neighbours)
    figures = demo_server.statistics()
    judged = figures["candidates_accepted"] + figures["candidates_rejected"]
    assert judged > 0
    assert figures["candidates_accepted"] > ACCEPTED_SHARE * judged
    # A batch of one row at a time would take a step for every token.
    tokens = sum(len(output.token_ids) for output in subjects.alone)
    assert figures["decode_steps"] < tokens / 2


def test_the_promise_is_not_empty(demo_server: Server, subjects: Subjects, neighbours: list[Request]) -> None:
    """Ordinary decoding does depend on the load here: candidates were rejected, or stock output changed."""
    rollbacks = sum(output.meta["llm42_num_rollbacks"] for output in subjects.alone)
    stock = [unmarked(request) for request in subjects.requests]
    crowd = run_condition(demo_server, stock, CROWD_OF_17, neighbours)
    differing = sum(got != alone for got, alone in zip(crowd, subjects.alone, strict=True))
    assert rollbacks + differing > 0


def test_same_output_after_a_restart(
    start_server: StartServer, smollm2: Path, subjects: Subjects, neighbours: list[Request]
) -> None:
    restarted = start_server(smollm2, *DEMO_FLAGS, "--chunked-prefill-size", "32")
    assert not mismatches(restarted, subjects.requests, subjects.alone, CROWD_OF_17, neighbours)
