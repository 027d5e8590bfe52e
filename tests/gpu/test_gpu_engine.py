"""SGLang's engine on a GPU with deterministic requests: passes beside decode, and what that must not do."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import write_tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

VOCABULARY, NEW_TOKENS, SUBJECTS = 2048, 96, 12
WATCH = Path(__file__).parent / "sync_plugin"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("llama"),
        layers=4,
        hidden=1024,
        intermediate=2048,
        heads=8,
        kv_heads=2,
        vocab=VOCABULARY,
        sensitive=True,
    )


@pytest.fixture(scope="module")
def watch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watch") / "totals.json"


#: Requests queue and are retracted with 3,000 slots; with flags, passes run in front of decode.
ENGINES = {
    "beside": {"max_total_tokens": 40000},
    "little-kv": {"max_total_tokens": 3000},
    "in-turn": {"max_total_tokens": 40000, "llm42_disable_overlap_verification": True},
}


@pytest.fixture(scope="module", params=list(ENGINES))
def engine(request: pytest.FixtureRequest, model: Path, watch_file: Path) -> Iterator[Any]:
    import sglang

    environment = {
        "SYNC_WATCH_FILE": str(watch_file),
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1" if request.param == "little-kv" else "0",
    }
    # Processes that the engine spawns take over sys.path.
    sys.path.insert(0, str(WATCH))
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    made: Any = sglang.Engine(
        model_path=str(model),
        skip_tokenizer_init=True,
        attention_backend="flashinfer",
        mem_fraction_static=0.8,
        max_running_requests=64,
        cuda_graph_max_bs_decode=64,
        cuda_graph_backend_prefill="disabled",
        enable_llm42=True,
        llm42_window_size=16,
        llm42_verify_batch_size=8,
        **ENGINES[request.param],
    )
    made.kind = request.param
    yield made
    made.shutdown()
    sys.path.remove(str(WATCH))
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _prompt(seed: int) -> list[int]:
    choice = random.Random(seed)
    return [choice.randrange(2, VOCABULARY) for _ in range(choice.randint(5, 200))]


def _sampling(index: int, marked: bool) -> dict[str, Any]:
    params: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    if index % 2:
        params |= {"temperature": 0.8, "top_p": 0.95 if index % 4 == 3 else 1.0, "sampling_seed": index}
    else:
        params |= {"temperature": 0.0}
    return {**params, "is_deterministic": True} if marked else params


def _run(engine: Any, work: list[tuple[int, bool]]) -> list[dict[str, Any]]:
    """Outputs of (number of the request, whether it is marked)."""
    outputs = engine.generate(
        input_ids=[_prompt(number) for number, _ in work],
        sampling_params=[_sampling(*item) for item in work],
    )
    assert len(outputs) == len(work)
    assert all(len(output["output_ids"]) == NEW_TOKENS for output in outputs)
    return list(outputs)


def test_marked_output_is_the_same_alone_and_in_crowds(engine: Any) -> None:
    alone = [_run(engine, [(number, True)])[0]["output_ids"] for number in range(SUBJECTS)]
    assert len({tuple(ids) for ids in alone}) == SUBJECTS
    rollbacks = compared = 0
    for crowd in range(4):
        choice = random.Random(crowd)
        others = [(100 + crowd * 100 + i, choice.random() < 0.5) for i in range(10 + 25 * crowd)]
        work = [*((number, True) for number in range(SUBJECTS)), *others]
        choice.shuffle(work)
        engine.flush_cache()
        for (number, _), output in zip(work, _run(engine, work), strict=True):
            if number < SUBJECTS:
                assert output["output_ids"] == alone[number], (crowd, number)
                rollbacks += output["meta_info"]["llm42_num_rollbacks"]
                compared += 1
    assert compared == 4 * SUBJECTS
    assert rollbacks > 0, "nothing diverged, so nothing was shown"


def test_a_step_that_consumes_nothing_waits_for_nothing(engine: Any, watch_file: Path) -> None:
    watch_file.unlink(missing_ok=True)
    _run(engine, [(number, number % 3 != 0) for number in range(30)])
    totals = json.loads(watch_file.read_text())
    assert totals["passes"] > 5 and totals["consuming_steps"] > 5
    if engine.kind == "beside":
        assert totals["quiet_steps"] > 20
    assert totals["quiet_waits"] == 0, totals["where"][:2]
