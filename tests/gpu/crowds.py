"""Deterministic requests on an engine, alone and in crowds: for engine tests of one GPU and of several."""

from __future__ import annotations

import random
from typing import Any

VOCABULARY, NEW_TOKENS, SUBJECTS = 2048, 96, 12


def prompt(seed: int, length: int | None = None) -> list[int]:
    """Random token ids, 5 to 200 of them unless ``length`` is given."""
    choice = random.Random(seed)
    return [choice.randrange(2, VOCABULARY) for _ in range(length or choice.randint(5, 200))]


#: All that count the output's tokens. ``min_new_tokens`` needs a tokenizer, which these engines have not.
PENALTIES = {"frequency_penalty": 0.2, "presence_penalty": 0.1, "repetition_penalty": 1.1}


def sampling(index: int, marked: bool) -> dict[str, Any]:
    """Sampling parameters of request ``index``: greedy, or sampled with a seed of its own."""
    params: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    if index % 2:
        params |= {"temperature": 0.8, "top_p": 0.95 if index % 4 == 3 else 1.0, "sampling_seed": index}
    else:
        params |= {"temperature": 0.0}
    return {**params, "is_deterministic": True} if marked else params


def run(engine: Any, work: list[tuple[int, bool]], **more: Any) -> list[dict[str, Any]]:
    """Outputs of (number of the request, whether it is marked); ``more`` sampling parameters for all."""
    outputs = engine.generate(
        input_ids=[prompt(number) for number, _ in work],
        sampling_params=[sampling(*item) | more for item in work],
    )
    assert len(outputs) == len(work)
    assert all(len(output["output_ids"]) == NEW_TOKENS for output in outputs)
    return list(outputs)


def check_crowds(engine: Any, crowds: int, diverges: bool = True) -> None:
    """Marked requests give the same tokens alone and among others, half of them marked.

    Args:
        diverges: whether candidates are drafted, and some must be rolled back; else none may be.
    """
    alone = [run(engine, [(number, True)])[0]["output_ids"] for number in range(SUBJECTS)]
    assert len({tuple(ids) for ids in alone}) == SUBJECTS
    rollbacks = compared = 0
    for crowd in range(crowds):
        choice = random.Random(crowd)
        others = [(100 + crowd * 100 + i, choice.random() < 0.5) for i in range(10 + 25 * crowd)]
        work = [*((number, True) for number in range(SUBJECTS)), *others]
        choice.shuffle(work)
        engine.flush_cache()
        for (number, _), output in zip(work, run(engine, work), strict=True):
            if number < SUBJECTS:
                assert output["output_ids"] == alone[number], (crowd, number)
                rollbacks += output["meta_info"]["llm42_num_rollbacks"]
                compared += 1
    assert compared == crowds * SUBJECTS
    assert (rollbacks > 0) == diverges, "nothing diverged, so nothing was shown"
