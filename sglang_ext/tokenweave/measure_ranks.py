"""Time of the fused kernel between this machine's GPUs: what the tuning program fits its model to.

A process per GPU, as in a server; peer transport, so that no multicast object is made for a measurement.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_ext.tokenweave.split import CommModel

#: Token counts of a half that the model is fitted to.
TOKENS = (512, 1024, 2048, 4096)
_REPEATS, _WARM_UP = 10, 3
#: Steps in one graph, so that launches cost nothing.
_STEPS = 10
_TIMEOUT_S = 60.0


def measure_comm(world: int, hidden: int, dtype_name: str, ctas: int) -> CommModel:
    """Measure the fused kernel on the first ``world`` GPUs and fit its time model.

    Args:
        world: ranks, one process and one GPU each.
        hidden: elements of a row.
        dtype_name: "bfloat16" or "float16".
        ctas: thread blocks of the kernel beside compute.

    Raises:
        RuntimeError: a process failed; its own message stands on standard error.
    """
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "times"
        arguments = (world, hidden, dtype_name, ctas, str(Path(folder) / "store"), str(result))
        mp.start_processes(_rank, arguments, nprocs=world, start_method="spawn")
        times = [float(line) for line in result.read_text().split()]
    return fit(TOKENS, times, hidden)


def fit(tokens: Sequence[int], times_us: Sequence[float], hidden: int) -> CommModel:
    """The line through measured times (least squares), with a latency that is not negative.

    Raises:
        ValueError: the times do not grow with the tokens.
    """
    sizes = [count * hidden * 2 for count in tokens]
    slope, latency = statistics.linear_regression(sizes, times_us)
    if latency < 0:
        slope, latency = statistics.linear_regression(sizes, times_us, proportional=True)
    if slope <= 0:
        raise ValueError(f"the fused step's times do not grow with the tokens: {list(times_us)} us")
    return CommModel(latency_us=latency, bytes_per_us=1 / slope)


def _rank(rank: int, world: int, hidden: int, dtype_name: str, ctas: int, store: str, result: str) -> None:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    times = _times(rank, world, hidden, getattr(torch, dtype_name), ctas)
    slowest = torch.tensor(times)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    if rank == 0:
        Path(result).write_text("\n".join(map(str, slowest.tolist())))
    dist.destroy_process_group()


def _times(rank: int, world: int, hidden: int, dtype: Any, ctas: int) -> list[float]:
    """Median microseconds of this rank for each of :data:`TOKENS`."""
    import torch
    import torch.distributed as dist

    from sglang_ext.tokenweave.kernel import AllReduceRmsNorm
    from sglang_ext.tokenweave.rows import owned_rows
    from sglang_ext.tokenweave.symmetric import symmetric_ranks

    group = dist.group.WORLD
    assert group is not None
    device = torch.device("cuda", rank)
    buffers = symmetric_ranks(group, max(TOKENS), hidden, dtype, device, multicast=False)
    kernel = AllReduceRmsNorm(buffers, timeout_s=_TIMEOUT_S)
    weight = torch.ones(hidden, dtype=dtype, device=device)
    buffers.hidden[0].normal_()
    medians = []
    for tokens in TOKENS:
        mine = owned_rows(tokens, world, rank)
        shard = torch.randn(mine.stop - mine.start, hidden, device=device).to(dtype)
        graph = torch.cuda.CUDAGraph()
        kernel(tokens, [shard], weight, 1e-5, ctas)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(_STEPS):
                kernel(tokens, [shard], weight, 1e-5, ctas)
        spans = []
        for _ in range(_WARM_UP + _REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            dist.barrier()
            begin.record()
            graph.replay()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) * 1e3 / _STEPS for a, b in spans[_WARM_UP:]]
        medians.append(statistics.median(times))
    return medians
