"""SGLang's own engine on this CPU with the plugin loaded, against the same model in transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.engine

VOCABULARY = 512
CHUNK = 64


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[(1, 16), (2, 1)], ids=lambda p: f"tp{p[0]}-page{p[1]}")
def engine(request: pytest.FixtureRequest, model_path: Path) -> Iterator[Any]:
    """Engine with as few arguments as a user would give, chunked prefill and SGLang's memory checks on."""
    import sglang

    tp_size, page_size = request.param
    with pytest.MonkeyPatch.context() as patch:
        for check in ("STRICT_MEM_CHECK_DURING_BUSY", "DEBUG_MEMORY_POOL", "CHECK_KV_PAGE_INVARIANTS"):
            name = f"SGLANG_ENABLE_{check}" if check.startswith("STRICT") else f"SGLANG_{check}"
            patch.setenv(name, "1")
        engine = sglang.Engine(
            model_path=str(model_path),
            tp_size=tp_size,
            page_size=page_size,
            dtype="float32",
            skip_tokenizer_init=True,
            chunked_prefill_size=CHUNK,
            max_total_tokens=4096,
            max_running_requests=16,
            log_level="error",
        )
    yield engine
    engine.shutdown()


def prompts(seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, VOCABULARY) for _ in range(length)] for length in (5, 16, 33, 70, 200)]


def generate(engine: Any, prompts: list[list[int]], **parameters: Any) -> list[dict[str, Any]]:
    sampling = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True, **parameters}
    return engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)


def test_serves_as_transformers_computes(engine: Any, model_path: Path) -> None:
    assert (engine.server_args.device, engine.server_args.attention_backend) == ("cpu", "torch_native")
    model = LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for repetition in range(2):
        for prompt, answer in zip(prompts(0), generate(engine, prompts(0)), strict=True):
            cached = answer["meta_info"]["cached_tokens"]
            assert cached > len(prompt) // 2 or len(prompt) < 33 if repetition else cached == 0
            tokens = answer["output_ids"]
            assert len(tokens) == 20
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)
            served = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
            torch.testing.assert_close(served, expected[range(20), tokens], atol=1e-3, rtol=1e-3)
            assert tokens == expected.argmax(-1).tolist()


def test_streams_what_it_returns(engine: Any) -> None:
    whole = generate(engine, [prompts(1)[2]])[0]["output_ids"]
    sampling = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
    chunks = list(engine.generate(input_ids=prompts(1)[2], sampling_params=sampling, stream=True))
    assert len(chunks) > 1
    streamed = [token for chunk in chunks for token in chunk["output_ids"]]
    assert streamed == whole or chunks[-1]["output_ids"] == whole


def test_samples_with_penalties_and_filters(engine: Any) -> None:
    parameters = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
    answers = generate(engine, prompts(2), **parameters)
    assert all(len(answer["output_ids"]) == 20 for answer in answers)


def test_serves_more_than_the_pool_holds(engine: Any) -> None:
    """Waiting requests, eviction and reuse of slots and pages, under SGLang's leak checks."""
    generator = random.Random(3)
    many = [[generator.randrange(3, VOCABULARY) for _ in range(150)] for _ in range(40)]
    answers = generate(engine, many, max_new_tokens=8)
    assert all(len(answer["output_ids"]) == 8 for answer in answers)
