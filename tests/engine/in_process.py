"""A program that uses ``sglang.Engine`` and prints what it generated as JSON; see ``test_in_process.py``."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import sglang

_CHANCE = random.Random(41)
PROMPTS = [[_CHANCE.randrange(2, 512) for _ in range(_CHANCE.randint(20, 80))] for _ in range(6)]
SAMPLING = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.95, "ignore_eos": True}


def marked(number: int) -> dict[str, Any]:
    """Sampling parameters of a deterministic request."""
    return {**SAMPLING, "is_deterministic": True, "sampling_seed": number}


def row(answer: dict[str, Any]) -> list[Any]:
    """What is compared of an answer."""
    return [answer["output_ids"], answer["text"], answer["meta_info"].get("llm42_digest")]


def main(model: str) -> None:
    """Each prompt alone, then all at once with every other one marked, then one as a stream."""
    engine = sglang.Engine(
        model_path=model,
        enable_llm42=True,
        llm42_window_size=16,
        llm42_verify_batch_size=4,
        max_total_tokens=8192,
        log_level="error",
    )
    alone = []
    for number, prompt in enumerate(PROMPTS):
        engine.flush_cache()
        alone.append(row(engine.generate(input_ids=prompt, sampling_params=marked(number))))
    mixed = [marked(number) if number % 2 else SAMPLING for number in range(len(PROMPTS))]
    together = [row(answer) for answer in engine.generate(input_ids=PROMPTS, sampling_params=mixed)]
    stream = list(engine.generate(input_ids=PROMPTS[1], sampling_params=marked(1), stream=True))
    try:
        engine.generate(input_ids=PROMPTS[0], sampling_params={**SAMPLING, "is_deterministic": "yes"})
        refused = ""
    except ValueError as error:
        refused = str(error)
    engine.shutdown()
    print(json.dumps({"alone": alone, "together": together, "stream": row(stream[-1]), "refused": refused}))


if __name__ == "__main__":
    main(sys.argv[1])
