"""``python -m sglang_ext.launch_server --enable-tokenweave`` against a stock server, over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_server import Output, Request, Server, running
from workloads import FLOAT32, ONE_THREAD, random_prompts

#: In float32 products of other sizes differ too little to change greedy tokens. Prompts are computed in
#: chunks, so that cuts lie within sequences that continue a prefix.
FLAGS = (
    *("--skip-tokenizer-init", *FLOAT32, "--max-total-tokens", "2048"),
    *("--chunked-prefill-size", "48", "--tp-size"),
)

PROMPTS = random_prompts(10, 20, 120, seed=11)


def _serve(model: Path, log: Path, *flags: str) -> tuple[list[Output], str]:
    """Outputs of the prompts one by one and all at once, and the server's log."""
    requests = [
        Request(prompt, False, {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True})
        for prompt in PROMPTS
    ]
    with running(Server(model, log, (*FLAGS, *flags), ONE_THREAD)) as server:
        outputs = [server.generate(request) for request in requests[:5]]
        server.flush_cache()
        outputs += server.together(requests)
        server.wait_until_idle()
    return outputs, log.read_text()


@pytest.fixture(scope="module")
def stock(tiny_llama: Path, logs: Path) -> list[Output]:
    outputs, log = _serve(tiny_llama, logs / "stock.log", "2")
    assert "TokenWeave" not in log
    assert len({output.token_ids for output in outputs}) == len(PROMPTS)
    return outputs


@pytest.mark.parametrize("split", ["equal", "7"])
def test_output_equals_a_stock_servers(tiny_llama: Path, logs: Path, stock: list[Output], split: str) -> None:
    flags = ("--enable-tokenweave", "--tokenweave-min-tokens", "8", "--tokenweave-split", split)
    outputs, log = _serve(tiny_llama, logs / f"woven-{split}.log", "2", *flags)
    assert outputs == stock
    assert log.count("TokenWeave path on all 2 ranks: collective") == 1
    assert log.count("TokenWeave: first batch run as two halves") == 2, "one line of each rank"
    # Every step behind a block of the two layers is fused, and nothing ran uncut for want of knowledge.
    assert "8 fused steps, 2 plain all-reduces" in log
    assert "does not cut batches of this kind" not in log


def test_one_rank_runs_stock_and_says_so(tiny_llama: Path, logs: Path) -> None:
    outputs, log = _serve(tiny_llama, logs / "one-rank.log", "1", "--enable-tokenweave")
    assert len(outputs) == 5 + len(PROMPTS)
    reason = "TokenWeave is off: there is only one tensor-parallel rank; SGLang runs stock"
    assert log.count(reason) == 1
    assert "two halves" not in log
