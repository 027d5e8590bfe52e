"""Tuning program: measures a model's own GEMM shards on this GPU and stores the table that chooses cuts.

    python -m sglang_ext.tokenweave.tune --model-path MODEL --tp-size 8

The time of every token count on a grid is measured once, on one GPU; each cut's cost is then the sum of two
entries, so no pairs need to be measured (9 s for the shards of a 70B Llama, see ``docs/tokenweave.md``).
Where the machine has as many GPUs as ranks, the fused step is measured between them as well; elsewhere the
server assumes published times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_ext.tokenweave import table
from sglang_ext.tokenweave.split import GRANULARITY, CommModel, LayerShape, dense_layer

#: Blocks of the resident kernel while its tax is measured.
_CTAS = 8
_TAX_TOKENS = 2048


def is_mixture_of_experts(config: dict[str, Any]) -> bool:
    """Whether a Hugging Face config describes a mixture of experts."""
    return any(config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def layer_of_config(config: dict[str, Any], world: int) -> LayerShape:
    """Layer shape of a decoder from its Hugging Face ``config.json``.

    A mixture of experts is taken as a dense layer of the experts that one token uses: how many rows each
    expert gets is not known beforehand.

    Raises:
        ValueError: a field is missing.
    """
    config = config.get("text_config", config)
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        intermediate = int(config["intermediate_size"])
        if is_mixture_of_experts(config):
            intermediate = int(config.get("moe_intermediate_size") or intermediate)
            intermediate *= int(config["num_experts_per_tok"])
        return dense_layer(
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            world=world,
        )
    except KeyError as error:
        raise ValueError(f"the model's config has no {error}") from error


def measure_table(
    shape: LayerShape, max_tokens: int, dtype_name: str, step: int = GRANULARITY
) -> table.Table:
    """Measure ``shape`` on the current GPU at every multiple of ``step`` tokens up to ``max_tokens``."""
    import torch

    from sglang_ext.tokenweave import measure

    dtype = getattr(torch, dtype_name)
    timer = measure.Timer()
    attention = measure.Products(shape.attention, max_tokens, dtype)
    mlp = measure.Products(shape.mlp, max_tokens, dtype)
    tokens = tuple(range(step, max_tokens + 1, step))
    attention_us = tuple(timer.median_graph_us(lambda n=n: attention(n)) for n in tokens)  # type: ignore[misc]
    mlp_us = tuple(timer.median_graph_us(lambda n=n: mlp(n)) for n in tokens)  # type: ignore[misc]
    return table.Table(
        shape=table.shape_key(shape, dtype_name),
        gpu=measure.gpu_name(),
        tokens=tokens,
        attention=attention_us,
        mlp=mlp_us,
        sm_tax=_measure_tax(timer, mlp, shape.hidden, min(_TAX_TOKENS, max_tokens), dtype),
        made_with=measure.versions(),
    )


def _measure_tax(timer: Any, mlp: Any, hidden: int, tokens: int, dtype: Any) -> float:
    """Growth of the MLP block's time while the fused kernel is resident all along."""
    from sglang_ext.tokenweave.measure import ResidentKernel
    from sglang_ext.tokenweave.multiprocessors import reserved_multiprocessors

    alone = timer.median_graph_us(lambda: mlp(tokens))
    resident = ResidentKernel(hidden, 16384, dtype)
    rows = resident.rows_lasting(timer, 0.8 * alone, _CTAS, 16384)
    with reserved_multiprocessors(_CTAS):
        both = timer.median_graph_us(lambda: resident.beside(lambda: mlp(tokens), rows, _CTAS))
    return max(both / alone, 1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the tuning program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, required=True, help="folder with the model's config.json")
    parser.add_argument("--tp-size", type=int, required=True, help="tensor-parallel ranks of the server")
    parser.add_argument("--max-tokens", type=int, default=8192, help="largest batch (chunked prefill size)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--output", type=Path, default=table.default_folder(), help="folder for the table")
    options = parser.parse_args(arguments)
    config = json.loads((options.model_path / "config.json").read_text(encoding="utf-8"))
    if is_mixture_of_experts(config.get("text_config", config)):
        parser.error("tables are for dense models; the server uses the wave model for a mixture of experts")
    shape = layer_of_config(config, options.tp_size)
    comm = _measured_comm(options.tp_size, shape.hidden, options.dtype)
    measured = replace(measure_table(shape, options.max_tokens, options.dtype), comm=comm)
    print(f"{table.save(measured, options.output)}: {len(measured.tokens)} token counts, {measured.gpu}")


def _measured_comm(world: int, hidden: int, dtype_name: str) -> CommModel | None:
    """The fused step's time between this machine's GPUs, or None where there are too few."""
    import torch

    from sglang_ext.tokenweave.measure_ranks import measure_comm

    if not 1 < world <= torch.cuda.device_count():
        print(f"{torch.cuda.device_count()} GPUs for {world} ranks: the fused step is not measured")
        return None
    # In processes of their own, before this one takes memory on a GPU.
    comm = measure_comm(world, hidden, dtype_name, _CTAS)
    print(f"fused step: {comm.latency_us:.1f} us and {comm.bytes_per_us / 1e3:.0f} GB/s with {_CTAS} blocks")
    return comm


if __name__ == "__main__":
    main()
