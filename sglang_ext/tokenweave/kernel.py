"""Host side of the fused AllReduce + residual add + RMSNorm kernel: addresses, flags, time limit, launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sglang_ext.tokenweave import build

#: Limits of the kernel (``cuda/allreduce_rmsnorm.h``).
MAX_WORLD = 16
MAX_CTAS = 128
FLAGS_PER_RANK = MAX_CTAS * MAX_WORLD
#: Default bound of a barrier's wait. Long, because a peer may still be compiling something.
DEFAULT_TIMEOUT_S = 300.0

_PHASES = ("entry", "exit")
_COMPLETE = 2


class BarrierTimeoutError(RuntimeError):
    """A barrier of the kernel ran out of time; the message names rank, peer, phase and epochs."""


class _Record(ctypes.Structure):
    """``BarrierTimeout`` of the CUDA sources."""

    _fields_ = tuple(
        (name, ctypes.c_uint32) for name in ("happened", "rank", "peer", "cta", "phase", "expected", "seen")
    )


@dataclass
class TimeoutRecord:
    """Mapped host memory into which a barrier writes before it traps.

    It stays readable after the trap, when every CUDA call of the process fails.
    """

    memory: torch.Tensor = field(
        default_factory=lambda: torch.zeros(ctypes.sizeof(_Record), dtype=torch.uint8, pin_memory=True)
    )

    @property
    def address(self) -> int:
        """Device address (equal to the host address under unified addressing)."""
        return self.memory.data_ptr()

    def check(self) -> None:
        """Raise if a barrier timed out.

        Raises:
            BarrierTimeoutError: naming what was waited for.
        """
        record = _Record.from_address(self.memory.data_ptr())
        if record.happened != _COMPLETE:
            return
        raise BarrierTimeoutError(
            f"TokenWeave barrier timed out: rank {record.rank} waited for rank {record.peer} in block "
            f"{record.cta}, phase {_PHASES[record.phase]}, expected epoch {record.expected}, seen "
            f"{record.seen}. The ranks launched different kernels, or rank {record.peer} is stuck; "
            "--tokenweave-barrier-timeout sets the limit."
        )


@dataclass(frozen=True)
class RankBuffers:
    """Hidden-state rows and barrier flags of all ranks of a group, as this process addresses them.

    Attributes:
        hidden: this process's buffers [max_tokens, hidden], one per local rank.
        ranks: the local ranks: one in a server, all of them for virtual ranks on one GPU.
        buffers: address of every rank's buffer.
        flags: address of every rank's flags (``FLAGS_PER_RANK`` zeroed 32-bit words).
        multicast: multicast address of the buffers, 0 for the peer transport.
        owner: whatever must stay alive with the addresses.
    """

    hidden: tuple[torch.Tensor, ...]
    ranks: tuple[int, ...]
    buffers: tuple[int, ...]
    flags: tuple[int, ...]
    multicast: int = 0
    owner: object = None

    @property
    def world(self) -> int:
        """Ranks in the group."""
        return len(self.buffers)


def virtual_ranks(
    world: int, max_tokens: int, hidden: int, dtype: torch.dtype, device: torch.device | str = "cuda"
) -> RankBuffers:
    """Buffers of ``world`` virtual ranks on one GPU: one rank each in memory, all served by this process.

    With ``world`` 1 this is the degenerate group of a single rank.
    """
    rows = tuple(torch.empty(max_tokens, hidden, dtype=dtype, device=device) for _ in range(world))
    flags = torch.zeros(world, FLAGS_PER_RANK, dtype=torch.int32, device=device)
    return RankBuffers(
        hidden=rows,
        ranks=tuple(range(world)),
        buffers=tuple(tensor.data_ptr() for tensor in rows),
        flags=tuple(flags[rank].data_ptr() for rank in range(world)),
        owner=flags,
    )


class AllReduceRmsNorm:
    """Launches the kernel on one set of :class:`RankBuffers`.

    Equivalent plain PyTorch: :func:`sglang_ext.tokenweave.reference.allreduce_rmsnorm`.

    Args:
        buffers: where the rows are.
        timeout_s: bound of a barrier's wait.

    Raises:
        sglang_ext.tokenweave.build.KernelUnavailableError: no compiled kernel.
    """

    def __init__(self, buffers: RankBuffers, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        build.load()
        self.buffers = buffers
        self._timeout_ns = int(timeout_s * 1e9)
        self._record = TimeoutRecord()

    def __call__(
        self,
        tokens: int,
        residual: Sequence[torch.Tensor],
        weight: torch.Tensor | None,
        epsilon: float,
        ctas: int,
        weight_bias: float = 0.0,
        local_ranks: Sequence[int] | None = None,
        first_row: int = 0,
    ) -> None:
        """Reduce, add and normalise rows [first_row, first_row + tokens) of the buffers in place.

        Args:
            tokens: rows of this half.
            residual: residual shard of each local rank, updated in place; empty without ``weight``.
            weight: norm weight [hidden], or None for a plain all-reduce.
            epsilon: added to the mean square.
            ctas: thread blocks per rank.
            weight_bias: 1 for Gemma's (1 + w).
            local_ranks: the ranks of ``residual``; all local ranks by default.
            first_row: first row of the half in the buffers.

        Raises:
            BarrierTimeoutError: a barrier of an earlier launch timed out.
            RuntimeError: an argument is out of range or the launch failed.
        """
        self._record.check()
        if tokens == 0:
            return
        ranks = self.buffers.ranks if local_ranks is None else tuple(local_ranks)
        offset = first_row * self.buffers.hidden[0].stride(0) * self.buffers.hidden[0].element_size()
        hidden = [
            self.buffers.hidden[self.buffers.ranks.index(rank)][first_row : first_row + tokens]
            for rank in ranks
        ]
        torch.ops.sglang_ext_tokenweave.allreduce_rmsnorm(
            hidden,
            list(residual),
            weight,
            list(ranks),
            [address + offset for address in self.buffers.buffers],
            list(self.buffers.flags),
            self.buffers.multicast + offset if self.buffers.multicast else 0,
            epsilon,
            weight_bias,
            ctas,
            self._timeout_ns,
            self._record.address,
        )

    def check(self) -> None:
        """Raise if a barrier timed out; call it after a CUDA error, or now and then.

        Raises:
            BarrierTimeoutError: naming what was waited for.
        """
        self._record.check()
