"""Stock SGLang against TokenWeave on CPU with TP=2, for tiny random models of several families.

    python tests/tokenweave/families.py [--families llama qwen2 ...] [--report FILE.json] [--table FILE.md]

SGLang's own model runner and batches are driven as in its one-batch benchmark. Each family runs in fresh
processes, stock and with TokenWeave. The woven ranks run every batch whole and cut at every token index:
a batch of new prompts, one that continues them behind a cached prefix (so that cuts fall within sequences
with prefix), and decode steps. Residual rows of other ranks are poisoned with NaN. Greedy tokens must be
equal and log-probabilities close.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORLD = 2
LAYERS = 3
#: Shape shared by all families; each adds what its configuration class calls for.
_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """A model family: configuration class of transformers, extra fields, and whether norms can be fused."""

    config: str
    fields: dict[str, Any]
    woven: bool


_TWO_EXPERTS = {"num_experts_per_tok": 2, "initializer_range": 0.3}
FAMILIES = {
    "llama": Family("LlamaConfig", {}, woven=True),
    "qwen2": Family("Qwen2Config", {}, woven=True),
    "qwen3": Family("Qwen3Config", {"head_dim": 16}, woven=True),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {
            **_TWO_EXPERTS,
            "head_dim": 16,
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
        },
        woven=True,
    ),
    "mixtral": Family("MixtralConfig", {**_TWO_EXPERTS, "num_local_experts": 4}, woven=True),
    # The all-reduce's output is scaled before the norm: nothing to fuse.
    "granite": Family(
        "GraniteConfig", {"residual_multiplier": 0.5, "embedding_multiplier": 2.0}, woven=False
    ),
    # Norms without a residual stand behind the all-reduces. SGLang reads ``hidden_act``, which checkpoints
    # have beside ``hidden_activation``.
    "gemma2": Family(
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 512, "hidden_act": "gelu_pytorch_tanh"},
        woven=False,
    ),
}

#: New tokens of each request in the first batch and in the batch that continues it.
PROMPTS, CONTINUATIONS = (5, 1, 3), (4, 2, 3)
DECODE_STEPS = 3
#: Greatest distance of log-probabilities in fp32: other batch sizes, other order of additions.
TOLERANCE = 2e-3

Step = tuple[list[int], Any]


def build_model(family: str, folder: Path) -> None:
    """Write a tiny random model of ``family`` in the Hugging Face layout."""
    import torch
    import transformers

    spec = FAMILIES[family]
    config = getattr(transformers, spec.config)(**{**_SHAPE, **spec.fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Norm weights and biases that do something.
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=0.0 if "gemma" in family else 1.0, std=0.2)
    model.float().save_pretrained(folder)


def _tokens(seed: int, count: int) -> list[int]:
    import random

    source = random.Random(seed)
    return [source.randrange(3, 512) for _ in range(count)]


class Driver:
    """One rank's model runner, driven batch by batch."""

    def __init__(self, folder: Path, rank: int, port: int, flags: dict[str, Any]) -> None:
        from sglang.benchmark import one_batch
        from sglang.srt.layers.moe import initialize_moe_config
        from sglang.srt.runtime_context import publish
        from sglang.srt.server_args import PortArgs, ServerArgs

        arguments = ServerArgs(
            model_path=str(folder),
            skip_tokenizer_init=True,
            device="cpu",
            tp_size=WORLD,
            dtype="float32",
            attention_backend="torch_native",
            max_total_tokens=512,
            max_running_requests=8,
            disable_overlap_schedule=True,
            random_seed=0,
        )
        # Not setattr: SGLang's arguments are read-only once resolved, and need not know our flags here.
        vars(arguments).update(flags)
        ports = PortArgs.init_new(arguments)
        ports.nccl_port = port
        publish(arguments, role="scheduler")
        initialize_moe_config(arguments)
        one_batch.get_tokenizer = lambda *args, **kwargs: None
        self._one_batch = one_batch
        self._runner = one_batch.load_model(arguments, ports, 0, rank)[0]

    def run(self) -> list[Step]:
        """All batches from a clean cache: greedy tokens and log-probabilities of each step."""
        import torch

        self._runner.clear()
        torch.manual_seed(0)
        prompts = [_tokens(10 + i, n) for i, n in enumerate(PROMPTS)]
        requests = [self._request(i, prompt) for i, prompt in enumerate(prompts)]
        steps = []
        ids, logits, batch = self._runner.extend(requests)
        steps.append(self._step(ids, logits))
        for index, request in enumerate(requests):
            cached = len(prompts[index])
            request.full_untruncated_fill_ids.extend(_tokens(20 + index, CONTINUATIONS[index]))
            table = self._runner.torch_runner.req_to_token_pool.req_to_token
            request.prefix_indices = table[request.req_pool_idx, :cached].to(request.prefix_indices.dtype)
            request.logprob_start_len = -1
            request.set_extend_range(cached, len(request.full_untruncated_fill_ids))
        ids, logits, batch = self._runner.extend(requests)
        steps.append(self._step(ids, logits))
        for _ in range(DECODE_STEPS):
            ids, logits = self._runner.decode(ids, batch)
            steps.append(self._step(ids, logits))
        return steps

    @staticmethod
    def _request(index: int, prompt: list[int]) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        request = Req(
            rid=str(index),
            origin_input_text="",
            origin_input_ids=array("q", prompt),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=64),
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        request.set_extend_range(len(request.prefix_indices), len(request.origin_input_ids))
        return request

    @staticmethod
    def _step(ids: Any, logits: Any) -> Step:
        import torch

        return ids.tolist(), torch.log_softmax(logits.float(), dim=-1)


def _run_rank(folder: Path, rank: int, port: int, woven: bool, output: Path) -> None:
    import torch

    torch.set_num_threads(1)
    from sglang_ext.tokenweave import runtime

    flags = {
        "enable_tokenweave": woven,
        "tokenweave_split": "never",
        "tokenweave_poison_residual": True,
    }
    driver = Driver(folder, rank, port, flags)
    results: dict[Any, Any] = {"whole": driver.run()}
    started = runtime.current()
    assert (started is not None) == woven
    if started is not None:
        weaver = started.weaver
        results["observed"] = dict(vars(weaver.statistics))
        results["stock_reason"] = weaver.stock_reason
        for cut in range(1, max(sum(PROMPTS), sum(CONTINUATIONS))):
            with weaver.cut_at(cut):
                results[cut] = driver.run()
        results["statistics"] = dict(vars(weaver.statistics))
        results["refused"] = sorted(started.refused)
    torch.save(results, output)


def _rank_process(*arguments: Any) -> None:
    try:
        _run_rank(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # SGLang leaves threads behind


def _run_group(folder: Path, woven: bool) -> list[dict[Any, Any]]:
    import torch
    from sglang.srt.utils.network import get_free_port

    port = get_free_port()
    context = multiprocessing.get_context("fork")
    outputs = [folder / f"{'woven' if woven else 'stock'}{rank}.pt" for rank in range(WORLD)]
    ranks = [
        context.Process(target=_rank_process, args=(folder, rank, port, woven, outputs[rank]))
        for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=3000)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * WORLD, f"ranks ended with {codes}"
    return [torch.load(output, weights_only=False) for output in outputs]


def _distance(expected: list[Step], got: list[Step], what: str) -> float:
    assert len(expected) == len(got) == 2 + DECODE_STEPS
    distance = 0.0
    for step, ((ids, logprobs), (other_ids, other_logprobs)) in enumerate(zip(expected, got, strict=True)):
        assert len(ids) == len(PROMPTS)
        assert other_ids == ids, f"{what}, step {step}: tokens {other_ids} instead of {ids}"
        distance = max(distance, float((logprobs - other_logprobs).abs().max()))
    assert distance < TOLERANCE, f"{what}: log-probabilities differ by {distance}"
    return distance


def compare(family: str) -> dict[str, Any]:
    """Run ``family`` both ways and compare.

    Raises:
        AssertionError: outputs differ, or the family was not woven (or not left alone) as expected.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = multiprocessing.get_context("fork")
        builder = context.Process(target=build_model, args=(family, folder))
        builder.start()
        builder.join()
        stock, woven = _run_group(folder, woven=False), _run_group(folder, woven=True)
    distances = []
    for rank in range(WORLD):
        expected, results = stock[rank]["whole"], woven[rank]
        cuts = [key for key in results if isinstance(key, int)]
        assert len(cuts) == max(sum(PROMPTS), sum(CONTINUATIONS)) - 1
        distances += [_distance(expected, results[key], f"{family}, cut {key}") for key in ["whole", *cuts]]
        _check_statistics(family, results)
    return {
        "family": family,
        "woven": FAMILIES[family].woven,
        "cuts": len(cuts),
        "steps": len(distances) * (2 + DECODE_STEPS),
        "max_logprob_distance": max(distances),
        "stock_reason": woven[0]["stock_reason"],
        "statistics": woven[0]["statistics"],
        "seconds": round(time.monotonic() - begin),
    }


def _check_statistics(family: str, results: dict[Any, Any]) -> None:
    counts, batches = results["statistics"], 2 + DECODE_STEPS
    assert results["refused"] == []
    if not FAMILIES[family].woven:
        assert counts["fused"] == counts["woven"] == 0 and results["stock_reason"]
        return
    # Every all-reduce behind a block is fused, in each half: two per layer.
    assert results["observed"]["fused"] == 2 * LAYERS * batches, results["observed"]
    both = sum((cut < sum(PROMPTS)) + (cut < sum(CONTINUATIONS)) for cut in results if isinstance(cut, int))
    assert counts["woven"] == both
    runs = 1 + sum(isinstance(cut, int) for cut in results)
    assert counts["fused"] == 2 * LAYERS * (2 * both + runs * batches - both), counts
    # What remains is the embedding's all-reduce, and no residual had to be gathered.
    assert counts["resolved"] == 2 * both + runs * batches - both and counts["gathered"] == 0, counts


def as_table(rows: list[dict[str, Any]]) -> str:
    """The results for a reader, in Markdown; what is said of all families was asserted by :func:`compare`."""
    import platform
    from importlib.metadata import version

    woven = [row["family"] for row in rows if row["woven"]]
    lines = [
        "# TokenWeave on seven model families" if len(rows) == len(FAMILIES) else "# TokenWeave by family",
        "",
        f"Greedy output ids of {len(rows)} families with TokenWeave on equal those of stock SGLang, on a CPU "
        f"with {WORLD} tensor-parallel ranks (gloo). {len(woven)} are woven, whole and at every cut; the "
        "others log why they are not and run stock, whatever cut is asked for.",
        "",
        "```",
        "python tests/tokenweave/families.py --table docs/reports/tokenweave-families.md",
        "```",
        "",
        f"Random models, {LAYERS} layers, hidden size {_SHAPE['hidden_size']}, float32. Batches: new prompts "
        f"of {_listed(PROMPTS)} tokens; {_listed(CONTINUATIONS)} more tokens of each behind a cached prefix; "
        f"{DECODE_STEPS} decode steps. Cuts: every token index of both prefill batches. Residual rows of "
        "other ranks are NaN. Log-probabilities differ because products of other sizes add in other orders.",
        "",
        "| family | cuts | steps compared | batches in two halves | fused steps | plain all-reduces "
        "| largest log-probability difference | runs stock because |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        counts = row["statistics"]
        lines.append(
            f"| {row['family']} | {row['cuts']} | {row['steps']} | {counts['woven']} | {counts['fused']} "
            f"| {counts['resolved']} | {row['max_logprob_distance']:.1e} | {row['stock_reason'] or '-'} |"
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("sglang", "torch", "transformers"))
    lines += ["", f"Python {platform.python_version()}, {versions}, {platform.machine()}.", ""]
    return "\n".join(lines)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"


def prepare() -> None:
    """Import SGLang and put the hooks in place, once, before ranks are forked."""
    from sglang_ext import hooks

    hooks.install(hooks.Feature.CPU)
    hooks.install(hooks.Feature.TOKENWEAVE)
    from sglang.benchmark import one_batch  # noqa: F401
    from sglang.srt.models.registry import ModelRegistry

    assert ModelRegistry.get_supported_archs()


def main() -> None:
    """Compare the families named and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--report", type=Path, help="write the results as JSON")
    parser.add_argument("--table", type=Path, help="write the results as Markdown")
    options = parser.parse_args()
    prepare()
    report = []
    for family in options.families:
        report.append(compare(family))
        print(json.dumps(report[-1]), flush=True)
        if options.report:
            options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.table:
        options.table.write_text(as_table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
