"""Flags of the test servers, and what they are asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from live_server import Request

#: Small canonical passes, 64 rows: two CPU cores have no use for the defaults.
LLM42_FLAGS = ("--enable-llm42", "--llm42-window-size", "16", "--llm42-verify-batch-size", "4")

#: For the demo model in bfloat16, whose rounding soon changes a token: passes of 32 rows, which two cores
#: compute for a second.
DEMO_FLAGS = (*LLM42_FLAGS, "--llm42-verify-batch-size", "2", "--max-total-tokens", "16384")

#: Where a test does not need that rounding: without instructions for bfloat16, products of the demo model's
#: canonical passes take four to seven times as long in it. And where it would hide something: in bfloat16,
#: products of the tiny models have the same bits for any number of rows.
FLOAT32 = ("--dtype", "float32")

#: For the random models, whose operators are too small to share between threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

VOCABULARY = 512


def random_prompts(count: int, shortest: int, longest: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of random token ids for the random models, of different lengths."""
    chance = random.Random(seed)
    return [
        tuple(chance.randrange(2, VOCABULARY) for _ in range(chance.randint(shortest, longest)))
        for _ in range(count)
    ]


def marked(prompts: Sequence[tuple[int, ...]], **sampling: Any) -> list[Request]:
    """A deterministic request for each prompt, the sampling seed counting up from 1."""
    return [Request(p, True, {"sampling_seed": i, **sampling}) for i, p in enumerate(prompts, 1)]
