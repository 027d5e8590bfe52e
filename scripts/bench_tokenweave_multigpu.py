"""All-reduce + residual add + RMSNorm between real GPUs: the fused kernel against what SGLang has.

    TORCH_SYMM_MEM_DISABLE_MULTICAST=1 torchrun --nproc-per-node 4 scripts/bench_tokenweave_multigpu.py \\
        --output docs/benchmarks

Contenders, each as CUDA graphs of several steps, so that launches cost nothing; every time is the slowest
rank's median:

    nccl         NCCL's all-reduce, then SGLang's fused add and norm of all rows on every rank
    custom       SGLang's own all-reduce (``CustomAllReduceV2``), then the same; where SGLang would use it
    two_shot     ``symm_mem.two_shot_all_reduce_``, then the same
    flashinfer   FlashInfer's fused all-reduce and norm; up to SGLang's limit of 2,048 tokens
    fused_N      ours over the peer transport with N thread blocks

Before that it looks at which all-reduces are row invariant: the same rows in another order must give the same
bits in that order (what LLM-42's canonical passes need). Writes ``tokenweave_peer_worldN.csv``, ``.png`` and
``all_reduce_invariance_worldN.csv``. A contender that cannot run is named with the reason and left out.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import serving
import torch
import torch.distributed as dist

from sglang_ext.llm42.collectives import sum_in_rank_order
from sglang_ext.tokenweave.kernel import AllReduceRmsNorm
from sglang_ext.tokenweave.measure import gpu_name, versions
from sglang_ext.tokenweave.rows import owned_rows, rows_per_rank
from sglang_ext.tokenweave.symmetric import symmetric_ranks

DTYPE = torch.bfloat16
EPSILON = 1e-5
HIDDEN = (4096, 8192)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
CTAS = (2, 4, 8, 16, 32)
#: Steps in one graph: about as many rows in all, so that every graph runs for about as long.
ROWS_PER_GRAPH = 16384
MOST_STEPS = 20
REPEATS = 7
#: SGLang's limit for FlashInfer's fused all-reduce (``FUSE_ALLREDUCE_MAX_BATCH_SIZE``).
FLASHINFER_MAX_TOKENS = 2048

Work = Callable[[], object]


@dataclass
class Rank:
    """What one rank measures with.

    Attributes:
        nccl: group over which NCCL reduces.
        gloo: group over which handles are exchanged.
    """

    rank: int
    world: int
    device: torch.device
    nccl: Any
    gloo: Any

    def slowest_us(self, capture: Callable[[Work], torch.cuda.CUDAGraph], work: Work, refill: Work) -> float:
        """Median time of one graph replay on the slowest rank, in microseconds."""
        graph = capture(work)
        spans = []
        for _ in range(REPEATS):
            refill()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            dist.barrier(self.gloo)
            begin.record()
            graph.replay()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) * 1e3 for begin, end in spans[2:]]
        median = torch.tensor(statistics.median(times), device=self.device)
        dist.all_reduce(median, op=dist.ReduceOp.MAX, group=self.nccl)
        return float(median)

    def all_agree(self, problem: str | None) -> str | None:
        """The first problem that any rank has."""
        problems: list[str | None] = [None] * self.world
        dist.all_gather_object(problems, problem, group=self.gloo)
        return next((found for found in problems if found), None)

    def log(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def captured(steps: int, scope: AbstractContextManager[Any]) -> Callable[[Work], torch.cuda.CUDAGraph]:
    """A function that captures ``steps`` repetitions of a work, within ``scope``."""

    def capture(work: Work) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with scope:
            work()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                for _ in range(steps):
                    work()
        return graph

    return capture


class Contenders:
    """Buffers and kernels for one hidden size.

    Attributes:
        problems: why a contender cannot run, by name.
    """

    def __init__(self, rank: Rank, hidden: int, max_tokens: int) -> None:
        self.rank, self.hidden, self.max_tokens = rank, hidden, max_tokens
        self.problems: dict[str, str] = {}
        device = rank.device
        self.buffers = symmetric_ranks(rank.gloo, max_tokens, hidden, DTYPE, device, multicast=False)
        self.kernel = AllReduceRmsNorm(self.buffers, timeout_s=60)
        self.rows = torch.empty(max_tokens, hidden, device=device, dtype=DTYPE)
        self.residual = torch.randn(max_tokens, hidden, device=device).to(DTYPE)
        share = rows_per_rank(max_tokens, rank.world)
        self.shard = torch.randn(share, hidden, device=device).to(DTYPE)
        self.weight = torch.ones(hidden, device=device, dtype=DTYPE)
        self.custom = self._set_up("custom", self._make_custom)
        self.flashinfer = self._set_up("flashinfer", self._make_flashinfer)
        self.two_shot = self._set_up("two_shot", self._make_two_shot)
        self.norm = self._set_up("norm", self._make_norm)

    def _set_up(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, or None with the reason noted; the same on all ranks."""
        made, problem = None, None
        try:
            made = make()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problem = self.rank.all_agree(problem)
        if problem is None:
            return made
        self.problems[name] = problem.splitlines()[0][:300]
        self.rank.log(f"{name} is left out: {self.problems[name]}")
        return None

    def _make_norm(self) -> Any:
        from sgl_kernel import fused_add_rmsnorm

        fused_add_rmsnorm(self.rows[:1].zero_(), self.residual[:1].clone(), self.weight, EPSILON)
        return fused_add_rmsnorm

    def _make_custom(self) -> Any:
        from sglang.srt.distributed.device_communicators.custom_all_reduce_v2 import CustomAllReduceV2

        made = CustomAllReduceV2(self.rank.gloo, self.rank.device)
        if made.disabled:
            raise RuntimeError("SGLang does not use it on these GPUs")
        return made

    def _make_flashinfer(self) -> Any:
        import flashinfer.comm as comm

        # Its other backend, mnnvl, makes multicast objects.
        return comm.create_allreduce_fusion_workspace(
            backend="trtllm",
            world_size=self.rank.world,
            rank=self.rank.rank,
            max_token_num=FLASHINFER_MAX_TOKENS,
            hidden_dim=self.hidden,
            dtype=DTYPE,
            gpus_per_node=self.rank.world,
            group=self.rank.nccl,
        )

    def _make_two_shot(self) -> Any:
        memory, _ = self.buffers.owner  # type: ignore[misc]
        name = self.rank.gloo.group_name
        rows = memory[: self.max_tokens * self.hidden * DTYPE.itemsize].view(DTYPE)
        torch.ops.symm_mem.two_shot_all_reduce_(rows[: 64 * self.hidden], "sum", name)
        torch.cuda.synchronize()
        return lambda tokens: torch.ops.symm_mem.two_shot_all_reduce_(
            rows[: tokens * self.hidden], "sum", name
        )

    # Plain all-reduces: rows [tokens, hidden] of self.rows or of the symmetric buffer, in place or not

    def reduced(self, name: str, tokens: int) -> Callable[[], torch.Tensor] | None:
        """The all-reduce ``name`` of the first ``tokens`` rows, or None where it does not apply.

        ``nccl``, ``custom`` and ``rank_order`` read :meth:`source`, as all do.
        """
        rows = self.source(name, tokens)
        if name == "nccl":

            def nccl() -> torch.Tensor:
                dist.all_reduce(rows, group=self.rank.nccl)
                return rows

            return nccl
        if name == "custom" and self.custom is not None and self.custom.should_custom_ar(rows):
            return lambda: self.custom.custom_all_reduce(rows)
        if name == "two_shot" and self.two_shot is not None:

            def two_shot() -> torch.Tensor:
                self.two_shot(tokens)
                return rows

            return two_shot
        if name == "rank_order":
            return lambda: sum_in_rank_order(rows, self.rank.world, self._gather)
        if name.startswith("ours_"):

            def ours() -> torch.Tensor:
                self.kernel(tokens, [], None, EPSILON, int(name.removeprefix("ours_")))
                return rows

            return ours
        return None

    def source(self, name: str, tokens: int) -> torch.Tensor:
        """Where contender ``name`` expects its summands [tokens, hidden]."""
        symmetric = name == "two_shot" or name.startswith(("ours_", "fused_"))
        return (self.buffers.hidden[0] if symmetric else self.rows)[:tokens]

    def _gather(self, output: torch.Tensor, mine: torch.Tensor) -> None:
        dist.all_gather_into_tensor(output, mine, group=self.rank.nccl)

    # With residual add and norm

    def step(self, name: str, tokens: int) -> Work | None:
        """All-reduce, residual add and norm of ``tokens`` rows by contender ``name``, or None."""
        residual = self.residual[:tokens]
        if name.startswith("fused_"):
            ctas = int(name.removeprefix("fused_"))
            mine = owned_rows(tokens, self.rank.world, self.rank.rank)
            shard = self.shard[: mine.stop - mine.start]
            return lambda: self.kernel(tokens, [shard], self.weight, EPSILON, ctas)
        if name == "flashinfer":
            return self._flashinfer_step(tokens)
        if name == "norm_only" and self.norm is not None:
            return lambda: self.norm(self.rows[:tokens], residual, self.weight, EPSILON)
        reduce = self.reduced(name, tokens)
        if reduce is None or self.norm is None:
            return None
        return lambda: self.norm(reduce(), residual, self.weight, EPSILON)

    def scope(self, name: str) -> AbstractContextManager[Any]:
        """Where contender ``name`` wants to be captured."""
        return self.custom.capture() if name == "custom" else nullcontext()

    def _flashinfer_step(self, tokens: int) -> Work | None:
        if self.flashinfer is None or tokens > FLASHINFER_MAX_TOKENS:
            return None
        import flashinfer.comm as comm

        rows, residual = self.rows[:tokens], self.residual[:tokens]
        output, new_residual = torch.empty_like(rows), torch.empty_like(rows)
        return lambda: comm.allreduce_fusion(
            input=rows,
            workspace=self.flashinfer,
            pattern=comm.AllReduceFusionPattern.kARResidualRMSNorm,
            launch_with_pdl=True,
            residual_in=residual,
            residual_out=new_residual,
            norm_out=output,
            rms_gamma=self.weight,
            rms_eps=EPSILON,
        )

    def flashinfer_output(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """FlashInfer's fused output for ``rows``, or None where it does not apply."""
        self.rows[: len(rows)] = rows
        self.residual[: len(rows)] = residual
        work = self._flashinfer_step(len(rows))
        if work is None:
            return None
        result = work()
        torch.cuda.synchronize()
        return result if isinstance(result, torch.Tensor) else None


def measure(rank: Rank, hidden: int, tokens_list: Sequence[int]) -> list[dict[str, Any]]:
    """A row per number of tokens: microseconds of every contender."""
    contenders = Contenders(rank, hidden, max(tokens_list))
    names = ["nccl", "custom", "two_shot", "flashinfer", *(f"fused_{c}" for c in CTAS), "norm_only"]
    rows = []
    for tokens in tokens_list:
        steps = max(1, min(MOST_STEPS, ROWS_PER_GRAPH // tokens))
        row: dict[str, Any] = {"world": rank.world, "hidden": hidden, "tokens": tokens}

        def refill(tokens: int = tokens) -> None:
            # Small: sums in place grow by the number of ranks with every step.
            contenders.rows[:tokens].normal_(std=1e-3)
            contenders.buffers.hidden[0][:tokens].normal_(std=1e-3)
            contenders.residual[:tokens].normal_()
            contenders.shard.normal_()

        for name in names:
            refill()
            work = contenders.step(name, tokens)
            if work is None:
                continue
            problem = None
            try:
                row[f"{name}_us"] = (
                    rank.slowest_us(captured(steps, contenders.scope(name)), work, refill) / steps
                )
            except RuntimeError as error:
                problem = str(error)
            if problem := rank.all_agree(problem):
                rank.log(f"{name} of {tokens} x {hidden} failed: {problem.splitlines()[0][:300]}")
        rows.append(row)
        rank.log(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return rows


def invariance(rank: Rank, hidden: int, tokens_list: Sequence[int]) -> list[dict[str, Any]]:
    """A row per all-reduce and number of tokens: how many rows changed bits when they changed places."""
    contenders = Contenders(rank, hidden, max(tokens_list))
    results = []
    for tokens in tokens_list:
        generator = torch.Generator(device=rank.device).manual_seed(rank.rank)
        mine = torch.randn(tokens, hidden, device=rank.device, generator=generator).to(DTYPE)
        residual = torch.randn(
            tokens, hidden, device=rank.device, generator=torch.Generator(rank.device).manual_seed(99)
        ).to(DTYPE)
        orders = [
            torch.arange(tokens, device=rank.device),
            torch.arange(tokens, device=rank.device).flip(0),
            torch.arange(tokens, device=rank.device).roll(tokens // rank.world + 1),
        ]
        for name in ("nccl", "custom", "two_shot", "flashinfer", "rank_order", "ours_8"):
            outputs = [_output(contenders, name, mine[order], residual[order]) for order in orders]
            if outputs[0] is None:
                continue
            changed = torch.zeros(tokens, dtype=torch.bool, device=rank.device)
            for order, output in zip(orders[1:], outputs[1:], strict=True):
                assert output is not None
                changed[order] |= (output != outputs[0][order]).any(1)
            results.append(
                {
                    "world": rank.world,
                    "hidden": hidden,
                    "tokens": tokens,
                    "all_reduce": name,
                    "rows_changed": int(changed.sum()),
                }
            )
            rank.log(str(results[-1]))
    return results


def _output(
    contenders: Contenders, name: str, rows: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor | None:
    if name == "flashinfer":
        output = contenders.flashinfer_output(rows, residual)
        return None if output is None else output.clone()
    contenders.source(name, len(rows)).copy_(rows)
    reduce = contenders.reduced(name, len(rows))
    if reduce is None:
        return None
    torch.cuda.synchronize()
    dist.barrier(contenders.rank.gloo)
    output = reduce().clone()
    torch.cuda.synchronize()
    return output


def start_groups(rank: int, world: int, device: torch.device) -> None:
    """Process groups as SGLang makes them (its own all-reduce asks for them), else plain ones."""
    try:
        from sglang.srt.distributed import init_distributed_environment
    except ImportError:
        dist.init_process_group("nccl", device_id=device)
        return
    init_distributed_environment(world_size=world, rank=rank, local_rank=rank, backend="nccl")


def write_csv(path: Path, rows: Sequence[dict[str, Any]], world: int) -> None:
    """Rows as CSV, with device and command in front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made_with = " ".join(f"{name} {value}" for name, value in versions().items())
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# device: {world} x {gpu_name()}; {made_with}\n")
        command = serving.kept_in_docs("scripts/bench_tokenweave_multigpu.py", sys.argv[1:])
        file.write(f"# command: torchrun --nproc-per-node {world} {command}\n")
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def plot(path: Path, rows: Sequence[dict[str, Any]], world: int) -> None:
    """Time per step over tokens, a panel per hidden size; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    sizes = list(dict.fromkeys(row["hidden"] for row in rows))
    figure = Figure(figsize=(5.5 * len(sizes), 4), layout="constrained")
    for axes, hidden in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        mine = [row for row in rows if row["hidden"] == hidden]
        for name in dict.fromkeys(name for row in mine for name in row if name.endswith("_us")):
            points = [(row["tokens"], row[name]) for row in mine if name in row]
            style = "-" if name.startswith("fused_") else "--"
            axes.loglog(*zip(*points, strict=True), style, marker=".", label=name.removesuffix("_us"))
        axes.set_title(f"hidden {hidden}, {world} x {gpu_name()}", fontsize=9)
        axes.set_xlabel("tokens")
        axes.set_ylabel("µs")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def best(row: dict[str, Any], names: Iterable[str]) -> float:
    """The shortest of the named times, infinity if there is none."""
    return min((row[f"{name}_us"] for name in names if f"{name}_us" in row), default=math.inf)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on every rank; rank 0 writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN), help="hidden sizes")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="numbers of tokens")
    options = parser.parse_args(arguments)
    local, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(local)
    device = torch.device("cuda", local)
    start_groups(local, world, device)
    rank = Rank(local, world, device, dist.group.WORLD, dist.new_group(backend="gloo"))
    for name, study in (("all_reduce_invariance", invariance), ("tokenweave_peer", measure)):
        rows: list[dict[str, Any]] = []
        for hidden in options.hidden:
            if study is invariance:
                rows += study(rank, hidden, [t for t in options.tokens if 256 <= t <= 2048] or options.tokens)
            else:
                rows += study(rank, hidden, options.tokens)
            torch.cuda.empty_cache()
            if rank.rank == 0 and rows:
                path = options.output / f"{name}_world{world}.csv"
                write_csv(path, rows, world)
                if study is measure:
                    plot(path.with_suffix(".png"), rows, world)
    if rank.rank == 0:
        separate = ("nccl", "custom", "two_shot", "flashinfer")
        for row in rows:
            ratio = best(row, separate) / best(row, [f"fused_{ctas}" for ctas in CTAS])
            print(f"hidden {row['hidden']}, {row['tokens']} tokens: best other / best fused = {ratio:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
