"""Three minutes of the stress run (``scripts/stress_llm42.py``), on a random model that often rolls back."""

from __future__ import annotations

import json
from pathlib import Path

import stress_llm42 as stress
from stress_catalogue import Model
from stress_llm42 import Settings, State
from workloads import ONE_THREAD, VOCABULARY, random_prompts

ROUND_S = 30.0
ROUNDS = 6

#: Slots of the KV pool, a third of what the clients ask for at once.
POOL = 960

GRAMMARS = (
    {"regex": r"(yes|no) [a-f]{3,30}!"},
    {"regex": r"(w[0-9]+ ){4,12}"},
    {
        "json_schema": json.dumps(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 9},
                    "kind": {"enum": ["plant", "animal"]},
                },
                "required": ["name", "kind"],
                "additionalProperties": False,
            }
        )
    },
)


def test_every_answer_is_that_of_an_idle_server(spelling_llama: Path, tmp_path: Path) -> None:
    settings = Settings(
        model=str(spelling_llama),
        flags=stress.server_flags(POOL, window_size=16, verify_batch_size=4),
        bases=60,
        clients=12,
        round_s=ROUND_S,
        environment=ONE_THREAD,
    )
    model = Model(random_prompts(24, 20, 100), VOCABULARY, 1, GRAMMARS)
    state = State.open(tmp_path / "state.jsonl", settings.configuration({}))
    stress.run(settings, model, state, range(ROUNDS))
    assert stress.verdict(state) == 0, "see above: differences, failed requests, or what was missing"
    assert len(state.rounds) == ROUNDS
