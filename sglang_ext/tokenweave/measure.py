"""Timing of GPU work for the tuning program and the benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from sglang_ext.tokenweave.kernel import AllReduceRmsNorm, virtual_ranks
from sglang_ext.tokenweave.split import Gemm

#: Larger than the last-level cache of any GPU that this runs on.
_FLUSH_BYTES = 256 << 20
_EPSILON = 1e-5


class Timer:
    """Median time of a piece of GPU work, with a cold L2 cache before each repetition."""

    def __init__(self, repeats: int = 20, warmup: int = 3) -> None:
        self._repeats = repeats
        self._warmup = warmup
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def median_us(self, work: Callable[[], object]) -> float:
        """Median over the repetitions of the time between two events around ``work``, in microseconds."""
        for _ in range(self._warmup):
            work()
        spans = []
        for _ in range(self._repeats):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in spans)

    def median_graph_us(self, work: Callable[[], object]) -> float:
        """Like :meth:`median_us`, but of a captured graph: launch gaps stay out of the time."""
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return self.median_us(graph.replay)


class Products:
    """The matrix products of one block of a layer shard, each on its own random data."""

    def __init__(self, gemms: tuple[Gemm, ...], max_tokens: int, dtype: torch.dtype) -> None:
        self._inputs = [torch.randn(max_tokens, gemm.k, device="cuda").to(dtype) for gemm in gemms]
        self._weights = [
            (torch.randn(gemm.n, gemm.k, device="cuda") / gemm.k**0.5).to(dtype) for gemm in gemms
        ]
        self._outputs = [torch.empty(max_tokens, gemm.n, device="cuda", dtype=dtype) for gemm in gemms]

    def __call__(self, tokens: int) -> None:
        """Run the products for ``tokens`` rows."""
        for x, weight, out in zip(self._inputs, self._weights, self._outputs, strict=True):
            torch.mm(x[:tokens], weight.t(), out=out[:tokens])


class ResidentKernel:
    """The fused kernel of a single rank on a stream of its own, to stand beside compute.

    It has the instructions and the memory traffic of one rank's rows, but none of it crosses NVLink.
    """

    def __init__(self, hidden: int, max_rows: int, dtype: torch.dtype) -> None:
        self._buffers = virtual_ranks(1, max_rows, hidden, dtype)
        self._buffers.hidden[0].normal_()
        self._kernel = AllReduceRmsNorm(self._buffers)
        self._residual = torch.zeros(max_rows, hidden, device="cuda", dtype=dtype)
        self._weight = torch.ones(hidden, device="cuda", dtype=dtype)
        self.stream = torch.cuda.Stream(priority=-1)

    def __call__(self, rows: int, ctas: int) -> None:
        """Normalise ``rows`` rows with ``ctas`` thread blocks on the current stream."""
        self._kernel(rows, [self._residual[:rows]], self._weight, _EPSILON, ctas)

    def beside(self, compute: Callable[[], object], rows: int, ctas: int) -> None:
        """The schedule's phase: the kernel on its stream, ``compute`` on the current one, then join."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self(rows, ctas)
        compute()
        current.wait_stream(self.stream)

    def rows_lasting(self, timer: Timer, span_us: float, ctas: int, limit: int) -> int:
        """Rows whose normalisation takes about ``span_us`` with ``ctas`` blocks, at most ``limit``."""
        probe = min(64 * ctas, limit)
        time = timer.median_graph_us(lambda: self(probe, ctas))
        return max(min(int(probe * span_us / time), limit), ctas)


def gpu_name() -> str:
    """Name of the current GPU."""
    return str(torch.cuda.get_device_name())


def versions() -> dict[str, str]:
    """Versions on which measured times depend."""
    return {"torch": torch.__version__, "cuda": str(torch.version.cuda)}


def random_rows(tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Random rows on the GPU."""
    return torch.randn(tokens, hidden, device="cuda").to(dtype)
