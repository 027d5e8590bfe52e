"""SGLang's engine on several GPUs: deterministic requests in crowds, and TokenWeave against stock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from crowds import VOCABULARY, check_crowds, prompt
from models import write_tiny_llama

pytestmark = [pytest.mark.multigpu, pytest.mark.engine]

PROMPTS = (700, 1023, 1600)

#: Tokens of the first half of every batch.
CUT = 333

#: The largest power of two of this machine's GPUs, at most 4.
WORLD = 4 if torch.cuda.device_count() >= 4 else 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("llama"),
        layers=4,
        hidden=2048,
        intermediate=2048,
        heads=16,
        kv_heads=4,
        vocab=VOCABULARY,
        max_positions=4096,
        sensitive=True,
    )


@contextmanager
def _engine(model: Path, **flags: Any) -> Iterator[Any]:
    import sglang

    # On shared hosts no multicast object may be made.
    assert os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") == "1", "set TORCH_SYMM_MEM_DISABLE_MULTICAST=1"
    engine = sglang.Engine(
        model_path=str(model),
        skip_tokenizer_init=True,
        tp_size=WORLD,
        attention_backend="flashinfer",
        mem_fraction_static=0.7,
        max_total_tokens=40000,
        max_running_requests=64,
        cuda_graph_max_bs_decode=64,
        **flags,
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def test_marked_output_is_the_same_alone_and_in_crowds(model: Path) -> None:
    flags = {
        "enable_llm42": True,
        "llm42_window_size": 16,
        "llm42_verify_batch_size": 8,
        "cuda_graph_backend_prefill": "disabled",
    }
    with _engine(model, **flags) as engine:
        check_crowds(engine, crowds=3)


def _prompt_logprobs(engine: Any) -> list[list[float]]:
    """Log-probabilities of the tokens of :data:`PROMPTS`, alone, then all at once."""
    prompts = [prompt(seed, length) for seed, length in enumerate(PROMPTS)]

    def ask(ids: list[list[int]]) -> list[list[float]]:
        outputs = engine.generate(
            input_ids=ids,
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=0,
        )
        return [[pair[0] for pair in o["meta_info"]["input_token_logprobs"][1:]] for o in outputs]

    found = [ask([ids])[0] for ids in prompts]
    engine.flush_cache()
    return found + ask(prompts)


def test_tokenweave_computes_what_stock_computes(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with _engine(model) as engine:
        stock = _prompt_logprobs(engine)
    # What rounding alone does: attention over the same prompts in pieces of the same size.
    with _engine(model, chunked_prefill_size=CUT) as engine:
        pieces = _prompt_logprobs(engine)
    capfd.readouterr()
    # A cut inside of prompts, in different places of each.
    flags = {"tokenweave_split": str(CUT), "tokenweave_min_tokens": 512, "tokenweave_path": "peer"}
    with _engine(model, enable_tokenweave=True, log_level="info", **flags) as engine:
        woven = _prompt_logprobs(engine)
    said = "".join(capfd.readouterr())
    assert f"TokenWeave path on all {WORLD} ranks: peer" in said
    assert "first batch run as two halves" in said
    assert "TokenWeave is off" not in said and "does not cut" not in said
    assert [len(row) for row in woven] == [n - 1 for n in (*PROMPTS, *PROMPTS)]
    noise, errors = _distances(pieces, stock), _distances(woven, stock)
    print(f"noise {noise}, errors {errors}")
    # The model's logits have a standard deviation of about 20: a row that went wrong differs by that.
    assert max(largest for largest, _ in noise) < 5
    for which in (0, 1):
        found, bound = (max(pair[which] for pair in pairs) for pairs in (errors, noise))
        assert found <= 2 * bound + 0.02, (noise, errors)


def _distances(mine: list[list[float]], theirs: list[list[float]]) -> list[tuple[float, float]]:
    """Largest and mean distance of each prompt's values."""
    apart = [(torch.tensor(a) - torch.tensor(b)).abs() for a, b in zip(mine, theirs, strict=True)]
    return [(float(each.max()), float(each.mean())) for each in apart]
