"""Where to cut a batch in two, and whether to cut at all. Pure arithmetic: no torch, no SGLang.

A GEMM of a half costs as many *waves* as its tiles need on the GPU's multiprocessors, so two halves may
cost more than the whole (wave quantisation; TokenWeave, section on smart splitting). The cut is chosen by
the predicted time of the four-phase schedule, in which one half's communication runs beside the other
half's compute:

    attention(a) | comm(b),  attention(b) | comm(a),  mlp(a) | comm(b),  mlp(b) | comm(a)

and made only where that beats the unsplit layer with the fused kernel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

#: Cuts are multiples of this many tokens: the row tile of the GEMMs.
GRANULARITY = 128
#: Neither half is smaller than this share of the batch: the phases of the halves should be of like length.
SMALLEST_SHARE = 0.25


@dataclass(frozen=True)
class Gemm:
    """One matrix product of a layer, as sharded on a rank: [tokens, k] x [k, n]."""

    name: str
    n: int
    k: int


@dataclass(frozen=True)
class LayerShape:
    """The matrix products of one decoder layer on one rank, and its hidden size."""

    attention: tuple[Gemm, ...]
    mlp: tuple[Gemm, ...]
    hidden: int


def dense_layer(
    hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, world: int
) -> LayerShape:
    """Layer shape of a dense decoder (gated MLP) on one of ``world`` tensor-parallel ranks.

    Key/value heads are replicated where there are fewer of them than ranks, as SGLang does.
    """
    q_size = heads // world * head_dim
    kv_size = max(kv_heads // world, 1) * head_dim
    return LayerShape(
        attention=(Gemm("qkv_proj", q_size + 2 * kv_size, hidden), Gemm("o_proj", hidden, q_size)),
        mlp=(
            Gemm("gate_up_proj", 2 * intermediate // world, hidden),
            Gemm("down_proj", hidden, intermediate // world),
        ),
        hidden=hidden,
    )


@dataclass(frozen=True)
class Tile:
    """An output tile of a GEMM kernel and its throughput relative to the best tile."""

    rows: int
    columns: int
    efficiency: float


@dataclass(frozen=True)
class Gpu:
    """What the wave model knows of a GPU.

    Attributes:
        multiprocessors: SMs.
        flops_per_us: dense 16-bit operations per microsecond over all SMs, at the best tile.
        tiles: tiles that the GEMM library may choose from; it is taken to choose the fastest.
        launch_us: fixed cost of one GEMM.
    """

    multiprocessors: int
    flops_per_us: float
    tiles: tuple[Tile, ...] = (Tile(128, 256, 1.0), Tile(128, 128, 0.86), Tile(64, 256, 0.78))
    launch_us: float = 3.0


#: Peak rate reached on random bf16 data by large products (about 80 % of the data sheet's).
HOPPER = Gpu(multiprocessors=132, flops_per_us=790e6)


@dataclass(frozen=True)
class CommModel:
    """Time of the fused AllReduce-RMSNorm of one half: ``latency_us + bytes / bytes_per_us``.

    The defaults fit the times published for 8 H100 at hidden size 8192 with 8 thread blocks over multicast
    (18 us at 64 tokens, 87 at 1K, 291 at 4K, 562 at 8K); a measured table replaces them.
    """

    latency_us: float = 18.0
    bytes_per_us: float = 246e3

    def time_us(self, tokens: int, hidden: int) -> float:
        """Time for ``tokens`` rows of ``hidden`` 16-bit elements."""
        return self.latency_us + tokens * hidden * 2 / self.bytes_per_us


class ComputeModel(Protocol):
    """Time of a layer's compute on one rank, in microseconds."""

    def attention_us(self, tokens: int) -> float:
        """The attention block of ``tokens`` rows."""

    def mlp_us(self, tokens: int) -> float:
        """The MLP block of ``tokens`` rows."""


def waves(tokens: int, columns: int, tile: Tile, multiprocessors: int) -> int:
    """Waves of output tiles that a GEMM of ``tokens`` rows needs."""
    tiles = -(-tokens // tile.rows) * -(-columns // tile.columns)
    return -(-tiles // multiprocessors)


@dataclass(frozen=True)
class WaveModel:
    """Compute times from tiles and waves, for GEMMs that were not measured.

    Attributes:
        shape: the layer.
        gpu: the GPU.
        reserved: multiprocessors that the fused kernel holds meanwhile.
    """

    shape: LayerShape
    gpu: Gpu = HOPPER
    reserved: int = 0

    def attention_us(self, tokens: int) -> float:
        """The attention block's matrix products (attention itself is linear in the cut and left out)."""
        return self._block_us(self.shape.attention, tokens)

    def mlp_us(self, tokens: int) -> float:
        """The MLP block's matrix products."""
        return self._block_us(self.shape.mlp, tokens)

    def _block_us(self, gemms: Iterable[Gemm], tokens: int) -> float:
        return sum(self._gemm_us(gemm, tokens) for gemm in gemms)

    def _gemm_us(self, gemm: Gemm, tokens: int) -> float:
        available = max(self.gpu.multiprocessors - self.reserved, 1)
        per_sm = self.gpu.flops_per_us / self.gpu.multiprocessors

        def time(tile: Tile) -> float:
            flops = 2 * tile.rows * tile.columns * gemm.k
            return waves(tokens, gemm.n, tile, available) * flops / (per_sm * tile.efficiency)

        return self.gpu.launch_us + min(time(tile) for tile in self.gpu.tiles)


@dataclass(frozen=True)
class MeasuredModel:
    """Compute times from a table of measurements at ascending token counts.

    Between two counts the time is that of the larger, because time is a staircase; beyond the last it is
    extrapolated from it in proportion.
    """

    tokens: tuple[int, ...]
    attention: tuple[float, ...]
    mlp: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tokens or any(a >= b for a, b in zip(self.tokens, self.tokens[1:], strict=False)):
            raise ValueError("token counts of a measured table must be ascending and not empty")
        if not len(self.tokens) == len(self.attention) == len(self.mlp):
            raise ValueError("a measured table needs one attention and one MLP time per token count")

    def attention_us(self, tokens: int) -> float:
        """The attention block's matrix products."""
        return self._look_up(self.attention, tokens)

    def mlp_us(self, tokens: int) -> float:
        """The MLP block's matrix products."""
        return self._look_up(self.mlp, tokens)

    def _look_up(self, times: Sequence[float], tokens: int) -> float:
        index = bisect_left(self.tokens, tokens)
        if index < len(self.tokens):
            return times[index]
        return times[-1] * tokens / self.tokens[-1]


@dataclass(frozen=True)
class Decision:
    """What to do with a batch of ``tokens``.

    Attributes:
        tokens: size of the batch.
        cut: tokens of the first half, or None: fused kernel without a split.
        split_us: predicted time of one layer with the best cut (infinite if none was possible).
        whole_us: predicted time of one unsplit layer with the fused kernel.
        reason: one sentence for the log.
    """

    tokens: int
    cut: int | None
    split_us: float
    whole_us: float
    reason: str


@dataclass(frozen=True)
class SplitRule:
    """Chooses the cut of a batch.

    Attributes:
        beside: compute times while the fused kernel is resident on some multiprocessors.
        alone: compute times with the whole GPU.
        comm: time of the fused kernel.
        hidden: hidden size.
        min_tokens: smaller batches are never cut.
        host_us: time that the host needs to launch one layer of both halves; the split layer cannot be
            faster (eager launches, where the unsplit one may be a graph).
        margin: share of the unsplit time that a cut must win to be made.
        granularity: cuts are multiples of it.
    """

    beside: ComputeModel
    alone: ComputeModel
    comm: CommModel
    hidden: int
    min_tokens: int = 1024
    host_us: float = 0.0
    margin: float = 0.02
    granularity: int = GRANULARITY

    def decide(self, tokens: int) -> Decision:
        """The cut for a batch of ``tokens``, with the prediction that it rests on."""
        whole = self.whole_us(tokens)
        if tokens < self.min_tokens:
            reason = f"{tokens} tokens are fewer than the threshold of {self.min_tokens}"
            return Decision(tokens, None, float("inf"), whole, reason)
        cuts = candidate_cuts(tokens, self.granularity)
        if not cuts:
            return Decision(tokens, None, float("inf"), whole, f"{tokens} tokens are too few for a cut")
        # Of equally fast cuts the most even one.
        best = min(cuts, key=lambda cut: (self.split_us(tokens, cut), abs(2 * cut - tokens)))
        split = self.split_us(tokens, best)
        if split > whole * (1 - self.margin):
            reason = f"a cut at {best} of {tokens} is predicted to lose ({split:.0f} against {whole:.0f} us)"
            return Decision(tokens, None, split, whole, reason)
        reason = f"cut at {best} of {tokens} ({split:.0f} against {whole:.0f} us a layer)"
        return Decision(tokens, best, split, whole, reason)

    def whole_us(self, tokens: int) -> float:
        """Predicted time of one layer, unsplit, with the fused kernel."""
        comm = self.comm.time_us(tokens, self.hidden)
        return self.alone.attention_us(tokens) + self.alone.mlp_us(tokens) + 2 * comm

    def split_us(self, tokens: int, cut: int) -> float:
        """Predicted time of one layer cut at ``cut``."""
        first, second = cut, tokens - cut

        def phase(block: Callable[[int], float], mine: int, other: int) -> float:
            return max(block(mine), self.comm.time_us(other, self.hidden))

        attention, mlp = self.beside.attention_us, self.beside.mlp_us
        gpu = (
            phase(attention, first, second)
            + phase(attention, second, first)
            + phase(mlp, first, second)
            + phase(mlp, second, first)
        )
        return max(gpu, self.host_us)


def candidate_cuts(tokens: int, granularity: int = GRANULARITY) -> list[int]:
    """Cuts of ``tokens`` worth considering: multiples of the granularity, each half large enough.

    Multiples counted from either end, so that a ragged total may leave its rest in either half.
    """
    smallest = max(int(tokens * SMALLEST_SHARE), 1)
    from_start = range(granularity, tokens, granularity)
    cuts = {cut for start in from_start for cut in (start, tokens - start)}
    return sorted(cut for cut in cuts if cut >= smallest and tokens - cut >= smallest)


def equal_cut(tokens: int, segment: int) -> int:
    """Cut of a canonical pass: two halves of equally many segments.

    Raises:
        ValueError: the pass cannot be cut in equal halves of whole segments.
    """
    if tokens % (2 * segment):
        raise ValueError(f"a pass of {tokens} rows has no equal halves of whole segments of {segment} rows")
    return tokens // 2
