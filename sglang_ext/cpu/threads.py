"""Which cores a tensor-parallel rank computes on, and binding it to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

#: SGLang's variable: one comma- or range-list of cores per rank, separated by ``|``.
BIND_VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"


def cores_of_rank(nodes: Sequence[Sequence[int]], tp_rank: int, tp_size: int) -> list[int]:
    """Cores for one tensor-parallel rank.

    One rank gets every core; ranks that all find a NUMA node get a node each; more ranks than nodes share
    all cores in equal runs, neighbours on neighbouring cores. With fewer cores than ranks, cores are shared.

    Args:
        nodes: usable cores of each NUMA node.

    Raises:
        ValueError: no core is usable.
    """
    nodes = [node for node in nodes if node]
    cores = [core for node in nodes for core in node]
    if not cores:
        raise ValueError("no CPU core is usable by this process")
    if tp_size == 1:
        return cores
    if tp_size <= len(nodes):
        return list(nodes[tp_rank])
    if tp_size > len(cores):
        return [cores[tp_rank % len(cores)]]
    first, last = (len(cores) * rank // tp_size for rank in (tp_rank, tp_rank + 1))
    return cores[first:last]


def parse_cores(text: str) -> list[int]:
    """Cores in a list like ``0-3,8``.

    Raises:
        ValueError: naming the variable that such lists come from, if ``text`` is none.
    """
    try:
        ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
        return [core for ends in ranges for core in range(ends[0], ends[-1] + 1)]
    except ValueError as error:
        raise ValueError(f"{BIND_VARIABLE}: {text!r} is no list of cores such as 0-3,8") from error


def choose_cores(original: Callable[..., str], *, tp_rank: int, tp_size: int) -> str:
    """Core list of a rank: SGLang's reading of the variable if it is set, else :func:`cores_of_rank`."""
    if os.environ.get(BIND_VARIABLE, "all") != "all":
        return original(tp_rank=tp_rank, tp_size=tp_size)
    from sglang.srt.utils.common import get_physical_cpus_by_numa

    by_node = get_physical_cpus_by_numa()
    nodes = [sorted(by_node[node]) for node in sorted(by_node)]
    return ",".join(map(str, cores_of_rank(nodes, tp_rank, tp_size)))


def bind_cores(original: Callable[..., None], *, tp_size: int, tp_rank: int, local_omp_cpuid: str) -> None:
    """Bind this process to its cores, one compute thread per core.

    SGLang's own binding, which also sets up its shared-memory all-reduce, where its kernels are there.
    A single rank without the variable is left to the operating system and to ``OMP_NUM_THREADS``.
    """
    if hasattr(torch.ops.sgl_kernel, "init_cpu_threads_env"):
        original(tp_size=tp_size, tp_rank=tp_rank, local_omp_cpuid=local_omp_cpuid)
        return
    if tp_size == 1 and os.environ.get(BIND_VARIABLE, "all") == "all":
        return
    cores = parse_cores(local_omp_cpuid)
    for task in Path("/proc/self/task").iterdir():  # threads that exist do not follow their process
        os.sched_setaffinity(int(task.name), cores)
    torch.set_num_threads(len(cores))
