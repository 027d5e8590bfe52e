"""Which batches that are not cut take the fused step, and with how many thread blocks: measured at start.

For few rows SGLang's own all-reduce and norm can be faster than the kernel, and how many thread blocks are
best depends on rows, hidden size, ranks and links. So a server times both, on its own GPUs and in CUDA
graphs, before it captures its own.
"""

from __future__ import annotations

import gc
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_ext.tokenweave.communicator import KernelCommunicator

#: Rows of the batches that are timed, up to the largest batch, which is timed, too.
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

#: SGLang's limit for its own all-reduce, beyond which it uses NCCL. Its CUDA graphs remember where their
#: input is, in all ranks, so the input of this measurement is never freed.
KEPT_BYTES = 16 << 20

#: Numbers of thread blocks that are tried.
CTAS = (8, 16, 32)

#: For batches that must take the fused step although SGLang's own is faster.
DEFAULT_CTAS = 16

_STEPS, _ROWS_PER_GRAPH, _REPEATS, _WARM_UP = 10, 16384, 7, 2

_inputs: list[Any] = []


@dataclass(frozen=True)
class FusedSizes:
    """Thread blocks of the fused step by number of rows; 0 where SGLang's own step is faster.

    Attributes:
        rows: ascending; each stands for the batches down to the one before, the last also for larger ones.
        ctas: thread blocks for each.
    """

    rows: tuple[int, ...]
    ctas: tuple[int, ...]

    def at(self, tokens: int) -> int:
        """Thread blocks for a batch of ``tokens``, 0 for SGLang's own step."""
        return self.ctas[min(bisect_left(self.rows, tokens), len(self.rows) - 1)]


def always(ctas: int) -> FusedSizes:
    """The fused step for all batches."""
    return FusedSizes((1,), (ctas,))


def faster(
    rows: Sequence[int], own_us: Sequence[float], fused_us: Mapping[int, Sequence[float]]
) -> FusedSizes:
    """What is fastest for each number of rows.

    Args:
        rows: ascending.
        own_us: microseconds of SGLang's own step.
        fused_us: those of the fused step, by thread blocks.
    """
    best = [min(fused_us, key=lambda ctas: fused_us[ctas][i]) for i in range(len(rows))]
    ctas = [best[i] if fused_us[best[i]][i] <= own_us[i] else 0 for i in range(len(rows))]
    return FusedSizes(tuple(rows), tuple(ctas))


def measure(
    communicator: KernelCommunicator, coordinator: Any, hidden: int, dtype: Any, max_tokens: int
) -> tuple[FusedSizes, str]:
    """Time the fused step and SGLang's own all-reduce and norm; a collective of all ranks.

    Args:
        communicator: does the fused step; its sizes are replaced.
        coordinator: SGLang's tensor-parallel group.
        hidden: elements of a row.
        dtype: of the hidden states.
        max_tokens: largest batch.

    Returns:
        The faster way by number of rows, the same on every rank, and the times, for the log.
    """
    import torch
    from sglang.srt.distributed.parallel_state import graph_capture

    rows = [*(n for n in ROWS if n < max_tokens), max_tokens]
    bench = _Bench(communicator, coordinator, hidden, dtype, rows[-1])
    graphs = []
    gc.disable()  # what is collected while a graph is captured may invalidate it
    try:
        with graph_capture() as context, torch.no_grad():
            for ctas in (0, *CTAS):
                graphs += [(bench.captured(n, ctas, context.stream), n) for n in rows]
    finally:
        gc.enable()
    times = slowest([bench.microseconds(graph, n) for graph, n in graphs], coordinator.cpu_group)
    own, *fused = (times[i : i + len(rows)] for i in range(0, len(times), len(rows)))
    del graphs, bench
    torch.cuda.empty_cache()
    sizes = faster(rows, own, dict(zip(CTAS, fused, strict=True)))
    parts = (
        f"{n} rows {'SGLang' if not sizes.at(n) else f'fused, {sizes.at(n)} blocks'} "
        f"({own[i]:.1f} and {min(each[i] for each in fused):.1f} us)"
        for i, n in enumerate(rows)
    )
    return sizes, ", ".join(parts)


def slowest(times: Sequence[float], group: Any) -> list[float]:
    """The largest of all ranks' times, one by one: the same list on every rank."""
    import torch

    largest = torch.tensor(times, dtype=torch.float64)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return [float(time) for time in largest]


class _Bench:
    """Both ways to do one step of up to ``most`` rows, as CUDA graphs."""

    def __init__(
        self, communicator: KernelCommunicator, coordinator: Any, hidden: int, dtype: Any, most: int
    ) -> None:
        import torch
        from sglang.srt.layers.layernorm import RMSNorm

        from sglang_ext.tokenweave.communicator import NormCall

        device = coordinator.device
        self.communicator, self.coordinator = communicator, coordinator
        self.kept = torch.zeros(KEPT_BYTES // (hidden * dtype.itemsize), hidden, dtype=dtype, device=device)
        _inputs.append(self.kept)
        self.input = torch.zeros(most, hidden, dtype=dtype, device=device)
        own = coordinator.ca_comm
        if own is not None and not own.disabled and own.should_custom_ar(self.input):
            _inputs.append(self.input)  # somebody raised SGLang's limit
        self.residual = torch.zeros_like(self.input)
        self.pool = torch.cuda.graph_pool_handle()
        module = RMSNorm(hidden).to(device=device, dtype=dtype)
        self.norm = NormCall(module.weight.data, module.variance_epsilon, 0.0, module)

    def captured(self, rows: int, ctas: int, stream: Any) -> Any:
        """A graph of some steps of ``rows`` rows, SGLang's own for 0 thread blocks."""
        import torch

        work = self._fused(rows, ctas) if ctas else self._own(rows)
        work()  # may compile something
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Without torch.cuda.graph, which collects garbage first: dozens of graphs are captured.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            for _ in range(steps(rows)):
                work()
        finally:
            graph.capture_end()
        return graph

    def microseconds(self, graph: Any, rows: int) -> float:
        """Median time of a step."""
        import torch

        spans = []
        for _ in range(_WARM_UP + _REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in spans[_WARM_UP:]]
        return 1000 * statistics.median(times) / steps(rows)

    def _own(self, rows: int) -> Callable[[], Any]:
        summand, residual = self._summand(rows), self.residual[:rows]
        return lambda: self.norm.module(self.coordinator.all_reduce(summand), residual)

    def _fused(self, rows: int, ctas: int) -> Callable[[], Any]:
        from sglang_ext.tokenweave.communicator import Rows
        from sglang_ext.tokenweave.rows import owned_rows

        shard = self.residual[owned_rows(rows, self.coordinator.world_size, self.coordinator.rank_in_group)]
        place = Rows(0, 0, rows)

        def work() -> Any:
            self.communicator.fused = always(ctas)
            return self.communicator.launch(self._summand(rows), shard, self.norm, place, overlap=False)()

        return work

    def _summand(self, rows: int) -> Any:
        return (self.kept if rows <= len(self.kept) else self.input)[:rows]


def steps(rows: int) -> int:
    """Steps in one graph of ``rows`` rows: all graphs run for about as long, few rows for less."""
    return max(1, min(_STEPS, _ROWS_PER_GRAPH // rows))
