"""SGLang's engine on a GPU with deterministic requests: passes beside decode, and what that must not do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crowds import PENALTIES, VOCABULARY, check_crowds, run
from models import write_tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

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


#: Requests queue and are retracted with 3,000 slots; with flags, passes run in front of decode. With "auto"
#: crowds go from verification to canonical decode and back: STEP_COST is low enough for them.
STEP_COST = 20
VERIFIED = {"llm42_canonical_decode": "never"}
ENGINES: dict[str, dict[str, Any]] = {
    "beside": {"max_total_tokens": 40000, **VERIFIED},
    "little-kv": {"max_total_tokens": 3000, **VERIFIED},
    "in-turn": {"max_total_tokens": 40000, "llm42_disable_overlap_verification": True, **VERIFIED},
    "canonical": {"max_total_tokens": 40000, "llm42_canonical_decode": "always"},
    "auto-little-kv": {"max_total_tokens": 3000, "llm42_canonical_decode": "auto"},
}


@pytest.fixture(scope="module", params=list(ENGINES))
def engine(request: pytest.FixtureRequest, model: Path, watch_file: Path) -> Iterator[Any]:
    import sglang

    environment = {
        "SYNC_WATCH_FILE": str(watch_file),
        "SYNC_WATCH_STEP_COST": str(STEP_COST),
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1" if "little-kv" in request.param else "0",
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


def test_marked_output_is_the_same_alone_and_in_crowds(engine: Any) -> None:
    check_crowds(engine, crowds=4, diverges=engine.kind != "canonical")


def test_penalised_output_is_the_same_alone_and_in_a_crowd(engine: Any) -> None:
    alone = [run(engine, [(number, True)], **PENALTIES)[0]["output_ids"] for number in range(4)]
    plain = [run(engine, [(number, True)])[0]["output_ids"] for number in range(4)]
    assert all(one != other for one, other in zip(alone, plain, strict=True)), "penalties changed nothing"
    engine.flush_cache()
    crowd = run(engine, [(number, number < 4 or number % 2 == 0) for number in range(30)], **PENALTIES)
    assert [output["output_ids"] for output in crowd[:4]] == alone


@pytest.mark.parametrize("penalties", [{}, PENALTIES], ids=["plain", "penalised"])
def test_a_step_that_consumes_nothing_waits_for_nothing(
    engine: Any, watch_file: Path, penalties: dict[str, float]
) -> None:
    # Totals are of an engine's whole life, the requests of earlier tests included.
    watch_file.unlink(missing_ok=True)
    run(engine, [(number, number % 3 != 0) for number in range(30)], **penalties)
    totals = json.loads(watch_file.read_text())
    assert totals["passes"] > 5 and totals["consuming_steps"] > 5
    if engine.kind in ("beside", "canonical"):
        assert totals["quiet_steps"] > 20
    assert totals["quiet_waits"] == 0, totals["where"][:2]
