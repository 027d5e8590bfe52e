"""Which batches take the fused step, from times."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.llm42.canonical_scope import canonical_scope
from sglang_ext.tokenweave import fused_sizes, runtime
from sglang_ext.tokenweave.communicator import KernelCommunicator, NormCall, Rows
from sglang_ext.tokenweave.fused_sizes import (
    CTAS,
    DEFAULT_CTAS,
    ROWS,
    FusedSizes,
    always,
    faster,
    measure,
    slowest,
    steps,
)
from sglang_ext.tokenweave.rows import owned_rows


def test_the_fastest_way_is_taken_for_each_number_of_rows() -> None:
    # Two H200, hidden size 4096 (docs/benchmarks/tokenweave_peer_world2.csv).
    own = (8.8, 11.0, 14.6, 37.8)
    fused = {8: (12.1, 13.7, 23.0, 61.1), 16: (11.1, 11.2, 16.8, 36.3), 32: (10.3, 10.6, 13.4, 35.5)}
    assert faster((64, 128, 256, 1024), own, fused) == FusedSizes((64, 128, 256, 1024), (0, 32, 32, 32))


def test_a_draw_is_fused() -> None:
    assert faster((64,), (10.0,), {8: (10.0,), 16: (12.0,)}).at(64) == 8


@pytest.mark.parametrize(
    ("tokens", "ctas"), [(1, 0), (64, 0), (65, 16), (128, 16), (129, 32), (512, 32), (99999, 32)]
)
def test_a_size_stands_for_those_down_to_the_one_before(tokens: int, ctas: int) -> None:
    assert FusedSizes((64, 128, 512), (0, 16, 32)).at(tokens) == ctas


@given(st.integers(1, 1 << 20))
def test_a_number_from_the_command_line_holds_for_all(tokens: int) -> None:
    assert always(24).at(tokens) == 24


@given(st.lists(st.tuples(*[st.floats(1, 1000)] * (1 + len(CTAS))), min_size=len(ROWS), max_size=len(ROWS)))
def test_nothing_slower_than_sglang_is_ever_taken(times: list[tuple[float, ...]]) -> None:
    own, *fused = zip(*times, strict=True)
    by_ctas = dict(zip(CTAS, fused, strict=True))
    sizes = faster(ROWS, own, by_ctas)
    for i, rows in enumerate(ROWS):
        chosen = sizes.at(rows)
        if chosen:
            assert by_ctas[chosen][i] == min(each[i] for each in fused) <= own[i]
        else:
            assert min(each[i] for each in fused) > own[i]


def test_canonical_passes_take_the_fused_step_even_where_it_is_slower() -> None:
    # What is faster may be something else after the next start; the bits of canonical passes may not.
    communicator = object.__new__(KernelCommunicator)
    communicator.fused = FusedSizes((64, 128), (0, 16))
    fuse = runtime._fuse_whole(communicator, "cuda")
    assert not fuse(64) and fuse(65)
    with canonical_scope():
        assert fuse(64)
    assert not fuse(64)


def test_a_canonical_pass_gets_thread_blocks_where_sglang_is_faster() -> None:
    launched: list[int] = []
    communicator: Any = object.__new__(KernelCommunicator)
    communicator.fused = FusedSizes((64, 128), (0, 32))
    communicator._place, communicator._max_tokens, communicator._ctas = [0, 0], 256, 8
    communicator._buffers = SimpleNamespace(hidden=(torch.zeros(512, 8),))
    communicator._kernel = lambda *arguments, **more: launched.append(arguments[4])
    norm = NormCall(torch.ones(8), 1e-6, 0.0, lambda *rows: rows)
    for rows in (64, 128):
        communicator.launch(torch.ones(rows, 8), torch.ones(rows, 8), norm, Rows(0, 0, rows), overlap=False)()
    assert launched == [DEFAULT_CTAS, 32]


def test_graphs_hold_fewer_steps_of_more_rows() -> None:
    assert [steps(rows) for rows in (1, 1024, 4096, 16384, 32768)] == [10, 10, 4, 1, 1]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    times = slowest([1.0 + rank, 5.0 - rank, 3.0], dist.group.WORLD)
    Path(folder, str(rank)).write_text(repr(times))


def test_all_ranks_have_the_times_of_the_slowest(tmp_path: Path) -> None:
    # Ranks that chose different ways would wait for each other for ever.
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert {(tmp_path / str(rank)).read_text() for rank in range(2)} == {"[2.0, 5.0, 3.0]"}


@pytest.mark.parametrize(
    ("flags", "fixed"),
    [
        ({}, False),
        ({"enable_deterministic_inference": True}, True),
        ({"enable_symm_mem": True}, True),
    ],
)
def test_where_nothing_is_measured(flags: dict[str, Any], fixed: bool) -> None:
    arguments = {"enable_deterministic_inference": False, "enable_symm_mem": False, **flags}
    assert runtime._fixed_kernels(SimpleNamespace(**arguments)) == fixed


class Device:
    """What :func:`measure` asks of a GPU, on a CPU: graphs that hold what was done, and its time.

    A step of SGLang takes 10 us and 0.03 a row; the fused one 12 us and 0.02, more with other than 16 blocks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.capturing: list[float] | None = None
        self.inputs: set[int] = set()
        device = self

        class Graph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                assert pool == "pool" and device.capturing is None
                device.capturing = self.held = []

            def capture_end(self) -> None:
                device.capturing = None

            def replay(self) -> None:
                assert self.held, "an empty graph"
                device.now += sum(self.held)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) / 1000

        class Norm(torch.nn.Module):
            def __init__(self, hidden: int) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(hidden))
                self.variance_epsilon = 1e-6

            def forward(self, rows: torch.Tensor, residual: torch.Tensor) -> None:
                assert rows.shape == residual.shape and rows.dtype == self.weight.dtype

        @contextmanager
        def graph_capture() -> Iterator[Any]:
            yield SimpleNamespace(stream=SimpleNamespace(synchronize=lambda: None))

        for name, value in {
            "torch.cuda.CUDAGraph": Graph,
            "torch.cuda.Event": Event,
            "torch.cuda.graph_pool_handle": lambda: "pool",
            "torch.cuda.synchronize": lambda: None,
            "torch.cuda.empty_cache": lambda: None,
            "sglang.srt.distributed.parallel_state.graph_capture": graph_capture,
            "sglang.srt.layers.layernorm.RMSNorm": Norm,
        }.items():
            monkeypatch.setattr(name, value)
        monkeypatch.setattr(fused_sizes, "slowest", lambda times, group: times)
        monkeypatch.setattr(fused_sizes, "_inputs", [])

    def took(self, microseconds: float) -> None:
        if self.capturing is not None:
            self.capturing.append(microseconds)

    def all_reduce(self, rows: torch.Tensor) -> torch.Tensor:
        self.took(10 + 0.03 * len(rows))
        if self.capturing is not None:
            self.inputs.add(rows.untyped_storage().data_ptr())
        return rows.clone()

    def launch(self, partial: torch.Tensor, shard: torch.Tensor, *others: Any, overlap: bool) -> Any:
        ctas = self.fused.at(len(partial))
        mine = owned_rows(len(partial), 2, 1)
        assert not overlap and len(shard) == mine.stop - mine.start
        self.took(12 + 0.02 * len(partial) + abs(ctas - 16))
        return lambda: partial

    fused = always(1)


@pytest.mark.parametrize("custom_takes_all", [False, True])
def test_a_measurement_from_end_to_end(monkeypatch: pytest.MonkeyPatch, custom_takes_all: bool) -> None:
    device: Any = Device(monkeypatch)
    custom = SimpleNamespace(disabled=False, should_custom_ar=lambda rows: custom_takes_all)
    coordinator = SimpleNamespace(
        all_reduce=device.all_reduce,
        device="cpu",
        ca_comm=custom,
        world_size=2,
        rank_in_group=1,
        cpu_group=None,
    )
    # Inputs of 16 MiB have 1,024 rows of this size.
    sizes, said = measure(device, coordinator, 8192, torch.bfloat16, 3000)
    assert sizes.rows == (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 3000)
    assert sizes.ctas == (0, 0, 0, 0, 0, 16, 16, 16, 16, 16)
    assert (
        "128 rows SGLang (13.8 and 14.6 us)" in said
        and "3000 rows fused, 16 blocks (100.0 and 72.0 us)" in said
    )
    # SGLang's graphs remember their inputs: up to its limit, or to where somebody set it, none is freed.
    kept = {tensor.untyped_storage().data_ptr() for tensor in fused_sizes._inputs}
    assert len(kept) == (2 if custom_takes_all else 1)
    assert len(device.inputs) == 2 and (device.inputs <= kept) == custom_takes_all
    assert gc.isenabled()
