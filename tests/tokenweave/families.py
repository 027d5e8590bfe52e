"""Stock SGLang against TokenWeave on CPU with TP=2, for tiny random models of several families.

    python tests/tokenweave/families.py [--families llama qwen2 ...] [--report FILE]

Each family is served twice in fresh processes: stock, and with TokenWeave, small thresholds and residual rows
of other ranks poisoned with NaN. Output ids must be equal and log-probabilities close. Prompts are chunked,
of mixed lengths, with cached prefixes, so that cuts fall within sequences and behind prefixes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Shape shared by all families; each adds what its configuration class calls for.
_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "initializer_range": 0.3}


@dataclass(frozen=True)
class Family:
    """A model family: configuration class of transformers, extra fields, and what TokenWeave does with it."""

    config: str
    fields: dict[str, Any]
    woven: bool


FAMILIES = {
    "llama": Family("LlamaConfig", {}, woven=True),
    "qwen2": Family("Qwen2Config", {}, woven=True),
    "qwen3": Family("Qwen3Config", {"head_dim": 16}, woven=True),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {**_EXPERTS, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
        woven=True,
    ),
    "mixtral": Family(
        "MixtralConfig", {**_EXPERTS, "num_local_experts": 4, "sliding_window": None}, woven=True
    ),
    # The all-reduce's output is scaled before the norm: nothing to fuse, stock from the second pass on.
    "granite": Family(
        "GraniteConfig", {"residual_multiplier": 0.5, "embedding_multiplier": 2.0}, woven=False
    ),
    # Norms stand behind the all-reduce without a residual.
    "gemma2": Family("Gemma2Config", {"head_dim": 16, "sliding_window": 512}, woven=False),
}

PROMPT_LENGTHS = (41, 3, 17, 30, 9, 64)
NEW_TOKENS = 12
CHUNK = 32


def build_model(family: str, folder: Path) -> None:
    """Write a tiny random model of ``family`` in the Hugging Face layout."""
    import torch
    import transformers

    spec = FAMILIES[family]
    config = getattr(transformers, spec.config)(**{**_SHAPE, **spec.fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def prompts() -> list[list[int]]:
    """Random prompts; the last two continue earlier ones, so that they find a cached prefix."""
    import random

    source = random.Random(7)
    made = [[source.randrange(3, 512) for _ in range(length)] for length in PROMPT_LENGTHS]
    return [*made, made[0] + made[1], made[5] + made[2]]


def serve(model: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Output ids and log-probabilities of every prompt, in one batch and then again with a warm cache."""
    import sglang

    engine = sglang.Engine(
        model_path=str(model),
        skip_tokenizer_init=True,
        device="cpu",
        tp_size=2,
        dtype="bfloat16",
        attention_backend="torch_native",
        chunked_prefill_size=CHUNK,
        max_total_tokens=4096,
        max_running_requests=16,
        log_level="info",
        random_seed=0,
        **options,
    )
    try:
        results = []
        for batch in (prompts(), prompts()[::-1]):
            answers = engine.generate(
                input_ids=batch,
                sampling_params={"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True},
                return_logprob=True,
            )
            for answer in answers:
                logprobs = [float(item[0]) for item in answer["meta_info"]["output_token_logprobs"]]
                results.append({"ids": list(answer["output_ids"]), "logprobs": logprobs})
        return results
    finally:
        engine.shutdown()


def serve_in_process(model: Path, options: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """:func:`serve` in a fresh process; the results and the log."""
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        request = json.dumps({"model": str(model), "options": options, "output": output.name})
        environment = {**os.environ, "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
        process = subprocess.run(
            [sys.executable, __file__, "--serve", request],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            env=environment,
        )
        log = process.stdout + process.stderr
        if process.returncode:
            raise RuntimeError(f"serving {model} with {options} failed:\n{log[-6000:]}")
        return json.loads(Path(output.name).read_text(encoding="utf-8")), log


WOVEN = {
    "enable_tokenweave": True,
    "tokenweave_split": "equal",
    "tokenweave_min_tokens": 4,
    "tokenweave_poison_residual": True,
}


def compare(family: str, folder: Path) -> dict[str, Any]:
    """Serve ``family`` both ways.

    Raises:
        AssertionError: outputs differ, nothing was compared, or the family was (not) woven as expected.
    """
    build_model(family, folder)
    stock, _ = serve_in_process(folder, {})
    woven, log = serve_in_process(folder, WOVEN)
    assert len(stock) == len(woven) == 2 * len(prompts())
    assert all(len(answer["ids"]) == NEW_TOKENS for answer in stock)
    assert len({tuple(answer["ids"]) for answer in stock}) > len(prompts()) // 2, (
        "the model says one thing only"
    )
    for index, (expected, got) in enumerate(zip(stock, woven, strict=True)):
        assert got["ids"] == expected["ids"], f"{family}, answer {index}: {got['ids']} != {expected['ids']}"
    distance = max(
        abs(a - b)
        for expected, got in zip(stock, woven, strict=True)
        for a, b in zip(expected["logprobs"], got["logprobs"], strict=True)
    )
    assert distance < 1e-3, f"{family}: log-probabilities differ by {distance}"
    cut = next((line for line in log.splitlines() if "first batch run as two halves" in line), None)
    off = next((line for line in log.splitlines() if "TokenWeave is off for this model" in line), None)
    assert (cut is not None, off is not None) == (FAMILIES[family].woven, not FAMILIES[family].woven), log[
        -6000:
    ]
    return {"family": family, "answers": len(stock), "max_logprob_distance": distance, "log": cut or off}


def main() -> None:
    """Compare the families named and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--report", type=Path, help="write the results as JSON")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        request = json.loads(options.serve)
        results = serve(Path(request["model"]), request["options"])
        Path(request["output"]).write_text(json.dumps(results), encoding="utf-8")
        return
    report = []
    for family in options.families:
        with tempfile.TemporaryDirectory() as folder:
            report.append(compare(family, Path(folder)))
        print(json.dumps(report[-1]), flush=True)
        if options.report:
            options.report.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
