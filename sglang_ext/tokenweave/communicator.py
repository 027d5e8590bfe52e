"""The fused step of a half: launched beside the other half's compute, joined when its output is needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from sglang_ext.tokenweave import collective, multiprocessors
from sglang_ext.tokenweave.fused_sizes import DEFAULT_CTAS, FusedSizes
from sglang_ext.tokenweave.kernel import AllReduceRmsNorm, RankBuffers


@dataclass(frozen=True)
class NormCall:
    """One norm: what the kernel needs, and the module's own code for the paths without kernel.

    Attributes:
        weight: norm weight [hidden].
        epsilon: added to the mean square.
        weight_bias: 1 for Gemma's (1 + w).
        module: (reduced rows, residual rows) -> (normalised rows, new residual rows).
    """

    weight: torch.Tensor
    epsilon: float
    weight_bias: float
    module: collective.Norm


@dataclass(frozen=True)
class Rows:
    """Where a half lies in its batch, and which half it is (0 or 1)."""

    half: int
    first: int
    tokens: int


#: Orders the current stream behind a launched step and returns its output [tokens, hidden].
Join = Callable[[], torch.Tensor]


class Communicator(Protocol):
    """How the fused step is done (see :mod:`sglang_ext.tokenweave.paths`)."""

    def fits(self, tokens: int) -> bool:
        """Whether a batch of ``tokens`` fits the buffers."""

    def launch(
        self, partial: torch.Tensor, shard: torch.Tensor, norm: NormCall, rows: Rows, overlap: bool
    ) -> Join:
        """Start the step for ``partial`` [rows.tokens, hidden]; ``shard`` is updated in place.

        The caller keeps ``partial`` and ``shard`` alive until it has joined.
        """

    def beside_compute(self) -> AbstractContextManager[None]:
        """Scope of a batch in two halves: compute inside it shares the GPU with the step."""

    def gather(self, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        """All ranks' rows from each rank's own."""


class CollectiveCommunicator:
    """The step out of ``torch.distributed`` calls, on a stream of its own where there are streams."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def fits(self, tokens: int) -> bool:
        """Any batch does: nothing is preallocated."""
        return True

    def launch(
        self, partial: torch.Tensor, shard: torch.Tensor, norm: NormCall, rows: Rows, overlap: bool
    ) -> Join:
        """See :class:`Communicator`."""

        def step() -> torch.Tensor:
            return collective.allreduce_rmsnorm(partial, shard, norm.module, self._group)

        if self._stream is None or not overlap:
            output = step()
            return lambda: output
        return _beside(self._stream, step)

    def beside_compute(self) -> AbstractContextManager[None]:
        """Nothing to arrange: NCCL decides itself how many multiprocessors it takes."""
        return nullcontext()

    def gather(self, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        """See :class:`Communicator`."""
        return collective.gather_rows(rows, tokens, self._group)


class KernelCommunicator:
    """The step by the fused kernel, on buffers that all ranks can reach.

    Each half has two places in the buffers by turns, so that an output stays whole while the next step of
    its half is staged.

    Args:
        buffers: at least ``2 * max_tokens`` rows.
        max_tokens: largest batch.
        group: process group for the rare gathers.
        ctas: thread blocks beside compute.
        fused: thread blocks where nothing runs beside the kernel, by number of rows.
        timeout_s: bound of a barrier's wait.
        reserve: keep matrix products off the kernel's multiprocessors.
    """

    def __init__(
        self,
        buffers: RankBuffers,
        max_tokens: int,
        group: dist.ProcessGroup | None,
        ctas: int,
        fused: FusedSizes,
        timeout_s: float,
        reserve: bool = True,
    ) -> None:
        self._reserve = reserve
        self._buffers = buffers
        self._kernel = AllReduceRmsNorm(buffers, timeout_s)
        self._max_tokens = max_tokens
        self._group = group
        self._ctas = ctas
        self.fused = fused
        self._place = [0, 0]
        # High priority: the kernel's few blocks must not queue behind the tiles of a large product.
        self._stream = torch.cuda.Stream(buffers.hidden[0].device, priority=-1)

    def fits(self, tokens: int) -> bool:
        """Whether the batch fits the buffers."""
        return tokens <= self._max_tokens

    def launch(
        self, partial: torch.Tensor, shard: torch.Tensor, norm: NormCall, rows: Rows, overlap: bool
    ) -> Join:
        """See :class:`Communicator`."""
        self._place[rows.half] ^= 1
        first = self._place[rows.half] * self._max_tokens + rows.first
        staged = self._buffers.hidden[0][first : first + rows.tokens]

        def step() -> torch.Tensor:
            staged.copy_(partial)
            self._kernel(
                rows.tokens,
                [shard],
                norm.weight,
                norm.epsilon,
                self._ctas if overlap else self.fused.at(rows.tokens) or DEFAULT_CTAS,
                norm.weight_bias,
                first_row=first,
            )
            return staged

        if not overlap:
            output = step()
            return lambda: output
        return _beside(self._stream, step)

    def beside_compute(self) -> AbstractContextManager[None]:
        """Matrix products keep off the kernel's multiprocessors, where that was measured to help."""
        if self._reserve and self._ctas in multiprocessors.HELPS_WITH:
            return multiprocessors.reserved_multiprocessors(self._ctas)
        return nullcontext()

    def gather(self, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        """See :class:`Communicator`."""
        assert self._group is not None, "virtual ranks have no process group to gather over"
        return collective.gather_rows(rows, tokens, self._group)


def _beside(stream: torch.cuda.Stream, step: Callable[[], torch.Tensor]) -> Join:
    """Run ``step`` on ``stream`` behind what the current stream holds now."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        output = step()
    done = stream.record_event()

    def join() -> torch.Tensor:
        torch.cuda.current_stream().wait_event(done)
        output.record_stream(torch.cuda.current_stream())
        return output

    return join
