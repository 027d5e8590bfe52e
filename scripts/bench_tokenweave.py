"""TokenWeave on one GPU: split cost, fused kernel, compute beside the resident kernel, predicted timeline.

    python scripts/bench_tokenweave.py --output docs/benchmarks

Writes one CSV and one PNG per part. The layer is the tensor-parallel shard of a 70B Llama on 8 ranks.
Nothing crosses NVLink here: ranks are virtual, all on one GPU; the timeline is a prediction and says so.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import serving
import torch
import torch.nn.functional as F

from sglang_ext.tokenweave import split
from sglang_ext.tokenweave.kernel import AllReduceRmsNorm, virtual_ranks
from sglang_ext.tokenweave.measure import Products, ResidentKernel, Timer, gpu_name, random_rows, versions
from sglang_ext.tokenweave.multiprocessors import reserved_multiprocessors
from sglang_ext.tokenweave.rows import owned_rows

WORLD = 8
SHAPE = split.dense_layer(8192, 28672, 64, 8, 128, world=WORLD)
HIDDEN = SHAPE.hidden
HEAD_DIM = 128
Q_HEADS = 64 // WORLD
DTYPE = torch.bfloat16
EPSILON = 1e-5

#: Microseconds published for 8 H100 at hidden size 8192 (TokenWeave artifact, figures 4 and 10): multimem
#: all-reduce at its best block count, full RMSNorm, fused kernel with 8 and 16 blocks.
PUBLISHED = {
    1024: {"all_reduce": 74.8, "rmsnorm": 29.9, "fused_8": 87.0, "fused_16": 75.0},
    4096: {"all_reduce": 257.0, "rmsnorm": 96.0, "fused_8": 291.0, "fused_16": 258.0},
    8192: {"all_reduce": 500.0, "rmsnorm": 184.0, "fused_8": 562.0, "fused_16": 503.0},
}

Row = dict[str, Any]


class Layer:
    """Compute of one layer shard: attention with its projections, and the gated MLP."""

    def __init__(self, max_tokens: int) -> None:
        self._attention = Products(SHAPE.attention, max_tokens, DTYPE)
        self._mlp = Products(SHAPE.mlp, max_tokens, DTYPE)
        self._query = torch.randn(1, Q_HEADS, max_tokens, HEAD_DIM, device="cuda").to(DTYPE)
        self._key = torch.randn(1, 1, max_tokens, HEAD_DIM, device="cuda").to(DTYPE)
        self._gate_up = random_rows(max_tokens, SHAPE.mlp[0].n, DTYPE)

    def attention(self, tokens: int, prefix: int = 0) -> None:
        """Projections and causal attention of ``tokens`` queries behind ``prefix`` cached ones."""
        self._attention(tokens)
        query = self._query[:, :, :tokens]
        key = self._key[:, :, : prefix + tokens].expand(-1, Q_HEADS, -1, -1)
        if not prefix:
            F.scaled_dot_product_attention(query, key, key, is_causal=True)
            return
        # The causal part and the full part on the prefix; their merge is left out (two small passes).
        F.scaled_dot_product_attention(query, key[:, :, prefix:], key[:, :, prefix:], is_causal=True)
        F.scaled_dot_product_attention(query, key[:, :, :prefix], key[:, :, :prefix])

    def mlp(self, tokens: int) -> None:
        """Gate and up projection, a pass with the traffic of silu-and-multiply, down projection."""
        self._mlp(tokens)
        gate, up = self._gate_up[:tokens].chunk(2, dim=-1)
        torch.mul(gate, up)

    def attention_products(self, tokens: int) -> None:
        """The projections alone."""
        self._attention(tokens)

    def mlp_products(self, tokens: int) -> None:
        """The MLP's matrix products alone."""
        self._mlp(tokens)


def bench_gemm_times(timer: Timer, layer: Layer) -> list[Row]:
    """The tuning table's measurements beside the wave model's."""
    model = split.WaveModel(SHAPE)
    return [
        {
            "tokens": tokens,
            "attention_us": timer.median_graph_us(lambda n=tokens: layer.attention_products(n)),
            "attention_wave_model_us": model.attention_us(tokens),
            "mlp_us": timer.median_graph_us(lambda n=tokens: layer.mlp_products(n)),
            "mlp_wave_model_us": model.mlp_us(tokens),
        }
        for tokens in range(split.GRANULARITY, 4096 + 1, split.GRANULARITY)
    ]


def bench_split_cost(timer: Timer, layer: Layer, table: list[Row]) -> list[Row]:
    """MLP block cut in two, over unsplit: equal, wave model's, tuning table's and the best of all cuts."""
    time_at = {row["tokens"]: row["mlp_us"] for row in table}
    model = split.WaveModel(SHAPE)
    rows = []
    for tokens in range(1024, 4096 + 1, 256):
        cuts = [cut for cut in split.candidate_cuts(tokens) if 2 * cut <= tokens]

        def measured(cut: int, tokens: int = tokens) -> float:
            return timer.median_graph_us(lambda: (layer.mlp_products(cut), layer.mlp_products(tokens - cut)))

        by_model = min(cuts, key=lambda c, n=tokens: (model.mlp_us(c) + model.mlp_us(n - c), n - 2 * c))  # type: ignore[misc]
        by_table = min(cuts, key=lambda c, n=tokens: (time_at[c] + time_at[n - c], n - 2 * c))  # type: ignore[misc]
        whole = timer.median_graph_us(lambda n=tokens: layer.mlp_products(n))
        ratio = {cut: measured(cut) / whole for cut in {*cuts, tokens // 2}}
        best = min(cuts, key=ratio.__getitem__)
        rows.append(
            {
                "tokens": tokens,
                "unsplit_us": whole,
                "equal_ratio": ratio[tokens // 2],
                "wave_model_cut": by_model,
                "wave_model_ratio": ratio[by_model],
                "table_cut": by_table,
                "table_ratio": ratio[by_table],
                "best_cut": best,
                "best_ratio": ratio[best],
            }
        )
    return rows


def bench_kernel(timer: Timer) -> list[Row]:
    """Fused kernel against plain all-reduce followed by add + norm of all rows on every rank.

    Eight virtual ranks in one launch, so 8 x ``ctas`` blocks share one GPU's memory bandwidth.
    """
    max_tokens = 8192
    buffers = virtual_ranks(WORLD, max_tokens, HIDDEN, DTYPE)
    for buffer in buffers.hidden:
        buffer.normal_()
    kernel = AllReduceRmsNorm(buffers)
    weight = random_rows(1, HIDDEN, DTYPE)[0]
    every = virtual_ranks(1, WORLD * max_tokens, HIDDEN, DTYPE)
    every.hidden[0].normal_()
    norm = AllReduceRmsNorm(every)
    residual = random_rows(WORLD * max_tokens, HIDDEN, DTYPE)
    rows = []
    for tokens in (64, 512, 1024, 2048, 4096, 8192):
        owned = [owned_rows(tokens, WORLD, rank) for rank in range(WORLD)]
        shards = [residual[piece] for piece in owned]
        for ctas in (1, 2, 4, 8, 16):

            def fused(tokens: int = tokens, ctas: int = ctas, shards: list[torch.Tensor] = shards) -> None:
                kernel(tokens, shards, weight, EPSILON, ctas)

            def all_reduce(tokens: int = tokens, ctas: int = ctas) -> None:
                kernel(tokens, [], None, EPSILON, ctas)

            def add_norm(tokens: int = tokens, ctas: int = ctas) -> None:
                norm(WORLD * tokens, [residual[: WORLD * tokens]], weight, EPSILON, WORLD * ctas)

            def share(tokens: int = tokens, ctas: int = ctas) -> None:
                norm(tokens // WORLD, [residual[: tokens // WORLD]], weight, EPSILON, ctas)

            times = {
                "fused_us": timer.median_graph_us(fused),
                "all_reduce_us": timer.median_graph_us(all_reduce),
                "add_norm_us": timer.median_graph_us(add_norm),
                "one_rank_add_norm_us": timer.median_graph_us(share),
            }
            separate = times["all_reduce_us"] + times["add_norm_us"]
            rows.append(
                {"tokens": tokens, "ctas": ctas, **times, "separate_over_fused": separate / times["fused_us"]}
            )
    return rows


def bench_resident(timer: Timer, layer: Layer) -> list[Row]:
    """Compute of a half beside the fused kernel: how much of either is hidden, how much exposed.

    The kernel's rows are chosen so that it lasts about 80 % of the compute. "reserved": the GEMM library is
    told to leave the kernel's multiprocessors alone.
    """
    resident = ResidentKernel(HIDDEN, 32768, DTYPE)
    rows = []
    for half in (512, 1024, 2048):
        blocks = {
            "attention": lambda h=half: layer.attention(h, prefix=h),
            "mlp": lambda h=half: layer.mlp(h),
        }
        for name, block in blocks.items():
            alone = timer.median_graph_us(block)
            for ctas in (2, 4, 8, 16):
                count = resident.rows_lasting(timer, 0.8 * alone, ctas, 32768)
                kernel = timer.median_graph_us(lambda c=count, n=ctas: resident(c, n))
                both = timer.median_graph_us(lambda b=block, c=count, n=ctas: resident.beside(b, c, n))
                with reserved_multiprocessors(ctas):
                    reserved = timer.median_graph_us(
                        lambda b=block, c=count, n=ctas: resident.beside(b, c, n)
                    )
                rows.append(
                    {
                        "block": name,
                        "half_tokens": half,
                        "ctas": ctas,
                        "kernel_rows": count,
                        "compute_alone_us": alone,
                        "kernel_alone_us": kernel,
                        "together_us": both,
                        "hidden_share": (alone + kernel - both) / kernel,
                        "compute_growth": both / alone,
                        "reserved_together_us": reserved,
                        "reserved_hidden_share": (alone + kernel - reserved) / kernel,
                        "reserved_compute_growth": reserved / alone,
                    }
                )
    return rows


def predict_timeline(timer: Timer, layer: Layer, resident: list[Row]) -> list[Row]:
    """PREDICTION of one layer's time on 8 ranks from compute measured here and published kernel times."""
    comm = split.CommModel()
    rows = []
    for tokens, published in PUBLISHED.items():
        half = tokens // 2
        attention = timer.median_graph_us(lambda n=tokens: layer.attention(n))
        mlp = timer.median_graph_us(lambda n=tokens: layer.mlp(n))
        first = timer.median_graph_us(lambda n=half: layer.attention(n))
        second = timer.median_graph_us(lambda n=half: layer.attention(n, prefix=n))
        half_mlp = timer.median_graph_us(lambda n=half: layer.mlp(n))
        nearest = min({row["half_tokens"] for row in resident}, key=lambda h, n=half: abs(h - n))  # type: ignore[misc]
        growth = {
            row["block"]: min(row["compute_growth"], row["reserved_compute_growth"])
            for row in resident
            if row["ctas"] == 8 and row["half_tokens"] == nearest
        }
        beside = comm.time_us(half, HIDDEN)
        phases = (first * growth["attention"], second * growth["attention"], *2 * (half_mlp * growth["mlp"],))
        compute = attention + mlp
        stock = compute + 2 * (published["all_reduce"] + published["rmsnorm"])
        rows.append(
            {
                "kind": "prediction",
                "tokens": tokens,
                "compute_us": compute,
                "separate_us": stock,
                "fused_only_us": compute + 2 * published["fused_16"],
                "woven_us": sum(max(phase, beside) for phase in phases),
                "woven_speedup_over_separate": stock / sum(max(phase, beside) for phase in phases),
            }
        )
    return rows


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write ``rows`` with the device and the command on comment lines before the header."""
    made_with = " ".join(f"{name} {value}" for name, value in versions().items())
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# device: {gpu_name()}; {made_with}\n")
        command = serving.kept_in_docs("scripts/bench_tokenweave.py", sys.argv[1:])
        file.write(f"# command: python {command}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every part and write its CSV and PNG."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for CSV and PNG files")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    timer, layer = Timer(repeats=60), Layer(8192)
    results: dict[str, list[Row]] = {}
    for name, part in {
        "gemm_times": lambda: bench_gemm_times(timer, layer),
        "split_cost": lambda: bench_split_cost(timer, layer, results["gemm_times"]),
        "kernel": lambda: bench_kernel(timer),
        "resident": lambda: bench_resident(timer, layer),
        "prediction": lambda: predict_timeline(timer, layer, results["resident"]),
    }.items():
        begin = time.monotonic()
        results[name] = part()
        write_csv(output / f"tokenweave_{name}.csv", results[name])
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    plot(results, output)


def plot(results: dict[str, list[Row]], output: Path) -> None:
    """One figure per part."""
    from matplotlib import pyplot

    def figure(name: str, title: str, x: str, y: str, lines: dict[str, tuple[list[Any], list[Any]]]) -> None:
        canvas, axes = pyplot.subplots(figsize=(7, 4.5))
        for label, (xs, ys) in lines.items():
            axes.plot(xs, ys, marker="o", markersize=3, label=label)
        axes.set(title=f"{title}\n{gpu_name()}", xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        canvas.tight_layout()
        canvas.savefig(output / f"tokenweave_{name}.png", dpi=120)

    rows = results["split_cost"]
    tokens = [row["tokens"] for row in rows]
    figure(
        "split_cost",
        "MLP shard (70B Llama, TP 8) cut in two",
        "tokens",
        "time / unsplit time",
        {
            key: (tokens, [row[f"{key}_ratio"] for row in rows])
            for key in ("equal", "wave_model", "table", "best")
        },
    )
    rows = results["gemm_times"]
    tokens = [row["tokens"] for row in rows]
    columns = ("attention_us", "attention_wave_model_us", "mlp_us", "mlp_wave_model_us")
    figure(
        "gemm_times",
        "GEMMs of a layer shard (70B Llama, TP 8): measured and wave model",
        "tokens",
        "microseconds",
        {key: (tokens, [row[key] for row in rows]) for key in columns},
    )
    rows = results["kernel"]
    figure(
        "kernel",
        "All-reduce then add + norm, over the fused kernel (8 virtual ranks)",
        "tokens",
        "separate time / fused time",
        {
            f"{ctas} blocks per rank": (
                [row["tokens"] for row in rows if row["ctas"] == ctas],
                [row["separate_over_fused"] for row in rows if row["ctas"] == ctas],
            )
            for ctas in (1, 2, 4, 8, 16)
        },
    )
    rows = results["resident"]
    figure(
        "resident",
        "Compute of a half beside the resident fused kernel",
        "thread blocks of the kernel",
        "time / time alone",
        {
            f"{block}, {half} tokens": (
                [row["ctas"] for row in rows if (row["block"], row["half_tokens"]) == (block, half)],
                [
                    row["compute_growth"]
                    for row in rows
                    if (row["block"], row["half_tokens"]) == (block, half)
                ],
            )
            for block in ("attention", "mlp")
            for half in (512, 1024, 2048)
        },
    )
    rows = results["prediction"]
    figure(
        "prediction",
        "PREDICTED layer time on 8 ranks (compute measured, communication as published)",
        "tokens",
        "microseconds",
        {
            key: ([row["tokens"] for row in rows], [row[f"{key}_us"] for row in rows])
            for key in ("compute", "separate", "fused_only", "woven")
        },
    )


if __name__ == "__main__":
    main()
