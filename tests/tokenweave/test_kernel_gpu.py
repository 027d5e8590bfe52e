"""The fused kernel on one GPU, with virtual ranks, against its bit-exact PyTorch twin and fp64."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch

# Each virtual rank's stream needs a hardware queue of its own, or their barriers would wait for ever.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

from sglang_ext.tokenweave import reference
from sglang_ext.tokenweave.kernel import AllReduceRmsNorm, virtual_ranks
from sglang_ext.tokenweave.rows import owned_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

EPSILON = 1e-5
TIMEOUT_S = 20.0
SENTINEL_ROWS = 3


@dataclass
class Case:
    """One group of virtual ranks with its inputs (on the GPU)."""

    world: int
    tokens: int
    hidden: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        torch.manual_seed(self.world * 10007 + self.tokens * 31 + self.hidden)
        self.buffers = virtual_ranks(self.world, self.tokens + SENTINEL_ROWS, self.hidden, self.dtype)
        self.kernel = AllReduceRmsNorm(self.buffers, timeout_s=TIMEOUT_S)
        self.weight = torch.randn(self.hidden, device="cuda").to(self.dtype)
        residual = torch.randn(self.tokens, self.hidden, device="cuda").to(self.dtype)
        self.shards = [residual[rows].clone() for rows in self.rows]
        for rank in range(self.world):
            self.buffers.hidden[rank].fill_(float("nan"))
        self.refill()

    @property
    def rows(self) -> list[slice]:
        return [owned_rows(self.tokens, self.world, rank) for rank in range(self.world)]

    def refill(self) -> None:
        """New partial sums in every rank's buffer."""
        self.partials = [
            torch.randn(self.tokens, self.hidden, device="cuda").to(self.dtype) for _ in range(self.world)
        ]
        for buffer, partial in zip(self.buffers.hidden, self.partials, strict=True):
            buffer[: self.tokens] = partial

    def expect(self, weight_bias: float = 0.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return reference.allreduce_rmsnorm(self.partials, self.shards, self.weight, EPSILON, weight_bias)

    def check(self, output: torch.Tensor, shards: list[torch.Tensor]) -> None:
        for rank, buffer in enumerate(self.buffers.hidden):
            assert torch.equal(buffer[: self.tokens], output), f"output of rank {rank}"
            assert torch.equal(self.shards[rank], shards[rank]), f"residual of rank {rank}"
            assert buffer[self.tokens :].isnan().all(), f"rank {rank} wrote behind the last row"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("hidden", [1024, 1032, 2048, 4096, 5120, 8192, 8200, 12288, 16384])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_equals_reference_bit_for_bit(world: int, hidden: int, dtype: torch.dtype) -> None:
    for tokens in sorted({1, max(world - 1, 1), world, 37, 257}):
        for weight_bias in (0.0, 1.0):
            case = Case(world, tokens, hidden, dtype)
            expected = case.expect(weight_bias)
            case.kernel(tokens, case.shards, case.weight, EPSILON, ctas=4, weight_bias=weight_bias)
            case.check(*expected)


@pytest.mark.parametrize("tokens", [1023, 1024, 1025])
@pytest.mark.parametrize("ctas", [1, 2, 7, 16])
def test_any_number_of_blocks_gives_the_same_bits(tokens: int, ctas: int) -> None:
    case = Case(8, tokens, 4096, torch.bfloat16)
    expected = case.expect()
    case.kernel(tokens, case.shards, case.weight, EPSILON, ctas=ctas)
    case.check(*expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_close_to_fp64(dtype: torch.dtype) -> None:
    case = Case(8, 301, 8192, dtype)
    total = torch.stack(case.partials).double().sum(0) + torch.cat(case.shards).double()
    exact = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPSILON) * case.weight.double()
    case.kernel(case.tokens, case.shards, case.weight, EPSILON, ctas=8)
    output = case.buffers.hidden[5][: case.tokens].double()
    assert (output - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps


def test_reference_on_the_cpu_gives_the_same_bits() -> None:
    case = Case(4, 33, 5120, torch.bfloat16)
    output, shards = reference.allreduce_rmsnorm(
        [partial.cpu() for partial in case.partials],
        [shard.cpu() for shard in case.shards],
        case.weight.cpu(),
        EPSILON,
    )
    case.kernel(case.tokens, case.shards, case.weight, EPSILON, ctas=8)
    case.check(output.cuda(), [shard.cuda() for shard in shards])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_one_launch_per_rank_as_in_a_server(world: int) -> None:
    case = Case(world, 515, 4096, torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(world)]
    torch.cuda.synchronize()
    for ctas in (8, 3, 16):
        case.refill()
        expected = case.expect()
        torch.cuda.synchronize()
        for rank in reversed(range(world)):
            with torch.cuda.stream(streams[rank]):
                case.kernel(
                    case.tokens, [case.shards[rank]], case.weight, EPSILON, ctas=ctas, local_ranks=[rank]
                )
        torch.cuda.synchronize()
        case.check(*expected)


def test_plain_allreduce_without_a_weight() -> None:
    case = Case(8, 77, 8192, torch.bfloat16)
    expected = reference.reduce_in_rank_order(case.partials)
    before = [shard.clone() for shard in case.shards]
    case.kernel(case.tokens, [], None, EPSILON, ctas=4)
    case.check(expected, before)


@pytest.mark.parametrize("hidden", [4096, 16384])
def test_graph_replay(hidden: int) -> None:
    case = Case(4, 129, hidden, torch.bfloat16)
    case.kernel(case.tokens, case.shards, case.weight, EPSILON, ctas=4)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for ctas in (4, 8):  # two dependent launches of different width in one graph
            case.kernel(case.tokens, case.shards, case.weight, EPSILON, ctas=ctas)
    for _ in range(5):
        case.refill()
        output, shards = case.expect()
        # The second launch reduces the output of the first, which all ranks hold alike.
        expected = reference.allreduce_rmsnorm([output] * case.world, shards, case.weight, EPSILON)
        graph.replay()
        case.check(*expected)
        # Launches outside the graph go on from the same epochs.
        case.refill()
        expected = case.expect()
        case.kernel(case.tokens, case.shards, case.weight, EPSILON, ctas=6)
        case.check(*expected)


def test_epochs_wrap_around() -> None:
    case = Case(4, 65, 2048, torch.bfloat16)
    case.buffers.owner.fill_(-3)  # type: ignore[attr-defined]
    for _ in range(4):
        case.refill()
        expected = case.expect()
        case.kernel(case.tokens, case.shards, case.weight, EPSILON, ctas=5)
        case.check(*expected)


def test_halves_of_one_buffer() -> None:
    case = Case(4, 100, 4096, torch.bfloat16)
    cut = 43
    parts = [(0, cut), (cut, case.tokens - cut)]
    outputs, kernel_shards = [], []
    for first, tokens in parts:
        rows = [slice(first, first + tokens)] * case.world
        partials = [partial[row] for partial, row in zip(case.partials, rows, strict=True)]
        shards = [
            torch.randn(row.stop - row.start, case.hidden, device="cuda").to(case.dtype)
            for row in (owned_rows(tokens, case.world, rank) for rank in range(case.world))
        ]
        output, expected = reference.allreduce_rmsnorm(partials, shards, case.weight, EPSILON)
        case.kernel(tokens, shards, case.weight, EPSILON, ctas=4, first_row=first)
        outputs.append(output)
        kernel_shards.append((shards, expected))
    for buffer in case.buffers.hidden:
        assert torch.equal(buffer[: case.tokens], torch.cat(outputs))
    for shards, expected in kernel_shards:
        assert all(torch.equal(a, b) for a, b in zip(shards, expected, strict=True))


def test_a_rows_bits_do_not_depend_on_its_place() -> None:
    row = [torch.randn(1, 8192, device="cuda").to(torch.bfloat16) for _ in range(8)]
    residual = torch.randn(1, 8192, device="cuda").to(torch.bfloat16)
    seen = set()
    for tokens in (1, 9, 64, 200):
        case = Case(8, tokens, 8192, torch.bfloat16)
        case.weight.fill_(1.5)
        for rank in range(8):
            case.buffers.hidden[rank][:tokens] = row[rank]
            case.shards[rank].copy_(residual.expand_as(case.shards[rank]))
        case.kernel(tokens, case.shards, case.weight, EPSILON, ctas=3)
        seen.update(bytes(out.view(torch.int16).cpu().numpy()) for out in case.buffers.hidden[2][:tokens])
    assert len(seen) == 1


def test_more_blocks_than_fit_are_refused() -> None:
    case = Case(8, 64, 8192, torch.bfloat16)
    with pytest.raises(RuntimeError, match="too many blocks in cooperative launch"):
        case.kernel(case.tokens, case.shards, case.weight, EPSILON, ctas=128)


def test_wrong_arguments_are_named() -> None:
    case = Case(2, 10, 1024, torch.bfloat16)
    with pytest.raises(RuntimeError, match="residual shard must be contiguous"):
        case.kernel(10, [shard[:2] for shard in case.shards], case.weight, EPSILON, ctas=2)
    with pytest.raises(RuntimeError, match="weight must be BFloat16"):
        case.kernel(10, case.shards, case.weight.float(), EPSILON, ctas=2)
    with pytest.raises(RuntimeError, match="launch failed: invalid argument"):
        case.kernel(10, case.shards, case.weight, EPSILON, ctas=0)


@pytest.mark.parametrize(("missing", "peer"), [(1, 1), (0, 0)])
def test_a_missing_rank_ends_with_a_message(missing: int, peer: int) -> None:
    """In a process of its own: the trap ends the CUDA context."""
    present = 1 - missing
    program = textwrap.dedent(
        f"""
        import torch
        from sglang_ext.tokenweave.kernel import AllReduceRmsNorm, BarrierTimeoutError, virtual_ranks
        buffers = virtual_ranks(2, 8, 1024, torch.bfloat16)
        kernel = AllReduceRmsNorm(buffers, timeout_s=0.5)
        shard = torch.zeros(4, 1024, dtype=torch.bfloat16, device="cuda")
        weight = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
        kernel(8, [shard], weight, 1e-5, ctas=1, local_ranks=[{present}])
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            kernel.check()
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode != 0
    assert "BarrierTimeoutError" in result.stderr
    assert (
        f"rank {present} waited for rank {peer} in block 0, phase entry, expected epoch 1, seen 0"
        in result.stderr
    )
