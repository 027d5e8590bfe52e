"""The one place that chooses how the fused AllReduce + residual add + RMSNorm is done.

Every rank must choose alike, or the ranks would wait for each other for ever: :func:`choose` is pure,
:func:`agree` compares the choices of all ranks and logs the common one once. So must they cut batches alike.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import torch
import torch.distributed as dist

from sglang_ext.tokenweave import build
from sglang_ext.tokenweave.kernel import MAX_WORLD
from sglang_ext.tokenweave.reference import MAX_HIDDEN

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


class PathError(RuntimeError):
    """The path asked for cannot be used, or the ranks chose differently; the message says which and why."""


class Path(StrEnum):
    """How the fused step moves data."""

    MULTICAST = "multicast"  # the kernel; the NVLink switch reduces and broadcasts
    PEER = "peer"  # the kernel; plain loads and stores on every rank's buffer
    COLLECTIVE = "collective"  # torch.distributed calls (gloo on CPU, NCCL)


@dataclass(frozen=True)
class Capabilities:
    """What this rank can do.

    Attributes:
        world: ranks of the tensor-parallel group.
        device: "cuda" or "cpu".
        capability: compute capability of the GPU, (0, 0) without one.
        kernel_problem: why the compiled kernel is not available, or None if it is.
        shape_problem: why the kernel does not take this model's rows, or None if it does.
        peer_problem: why the ranks cannot reach each other's memory, or None if they can.
        multicast_problem: why NVLink multicast cannot be used, or None if it can.
    """

    world: int
    device: str
    capability: tuple[int, int] = (0, 0)
    kernel_problem: str | None = None
    shape_problem: str | None = None
    peer_problem: str | None = None
    multicast_problem: str | None = None

    def problem(self, path: Path) -> str | None:
        """Why ``path`` cannot be used here, or None if it can."""
        if path is Path.COLLECTIVE:
            return None
        if self.device != "cuda":
            return "there is no CUDA GPU"
        peer = self.kernel_problem or self.shape_problem or self.peer_problem
        if path is Path.PEER or peer:
            return peer
        if self.capability < (9, 0):
            return (
                f"multicast needs compute capability 9.0, this GPU has {'.'.join(map(str, self.capability))}"
            )
        return self.multicast_problem


@dataclass(frozen=True)
class Choice:
    """A path and the sentence that explains it."""

    path: Path
    reason: str


def choose(requested: str, capabilities: Capabilities) -> Choice:
    """The path for ``requested``: a path's name, or "auto" for the first that works, fastest first.

    Raises:
        PathError: the path asked for by name cannot be used.
    """
    if requested != "auto":
        path = Path(requested)
        if problem := capabilities.problem(path):
            raise PathError(f"--tokenweave-path {path.value} cannot be used: {problem}")
        return Choice(path, "asked for by --tokenweave-path")
    refused: list[str] = []
    for path in Path:
        problem = capabilities.problem(path)
        if problem is None:
            return Choice(path, "; ".join(refused) or "fastest path available")
        refused.append(f"no {path.value}: {problem}")
    raise AssertionError("the collective path is always available")


def agree(choice: Choice, group: dist.ProcessGroup) -> None:
    """Check that all ranks of ``group`` (CPU backend) chose the same path; rank 0 logs it.

    Raises:
        PathError: listing every rank's choice.
    """
    choices = _of_all_ranks(group, choice)
    if len({other.path for other in choices}) != 1:
        listed = ", ".join(f"rank {i}: {c.path.value} ({c.reason})" for i, c in enumerate(choices))
        raise PathError(f"TokenWeave's ranks chose different paths: {listed}; name one by --tokenweave-path")
    if dist.get_rank(group) == 0:
        logger.info(
            "TokenWeave path on all %d ranks: %s (%s)", len(choices), choice.path.value, choice.reason
        )


def agree_on_cuts(cuts: Sequence[int | None], group: dist.ProcessGroup) -> None:
    """Check that all ranks of ``group`` (CPU backend) would cut batches alike.

    The rule may rest on a GPU's size or on a table in a local folder, which need not be the same everywhere.

    Args:
        cuts: this rank's cut for the same batch sizes on all ranks.

    Raises:
        PathError: another rank would cut otherwise.
    """
    of_ranks = _of_all_ranks(group, tuple(cuts))
    different = [rank for rank, other in enumerate(of_ranks) if other != of_ranks[0]]
    if different:
        raise PathError(
            f"TokenWeave would cut batches otherwise on ranks {different} than on rank 0: their GPUs or "
            "their tuning tables differ; use one --tokenweave-table folder, or --tokenweave-split equal"
        )


def peer_problem(device: torch.device, group: dist.ProcessGroup) -> str | None:
    """Why a rank of ``group`` (CPU backend, one node) cannot reach another's memory; the same on all ranks.

    A GPU that this process cannot see (launchers may show each rank only its own) cannot be asked about and
    counts as reachable.
    """
    uuids = _of_all_ranks(group, str(torch.cuda.get_device_properties(device).uuid))
    visible = {
        str(torch.cuda.get_device_properties(i).uuid): torch.device("cuda", i)
        for i in range(torch.cuda.device_count())
    }
    own = next(
        (
            f"GPU {visible[uuid].index} of rank {rank} is out of reach of rank {dist.get_rank(group)}"
            for rank, uuid in enumerate(uuids)
            if uuid in visible
            and visible[uuid] != device
            and not torch.cuda.can_device_access_peer(device, visible[uuid])
        ),
        None,
    )
    return next((problem for problem in _of_all_ranks(group, own) if problem), None)


def _of_all_ranks(group: dist.ProcessGroup, value: Value) -> list[Value]:
    """Every rank's ``value``, by rank."""
    values: list[Value] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def probe(
    world: int, device: torch.device, hidden: int, dtype: torch.dtype, peer_problem: str | None
) -> Capabilities:
    """What this rank can do, without allocating anything or touching another rank.

    Args:
        world: ranks of the tensor-parallel group.
        device: this rank's.
        hidden: elements of a row.
        dtype: of the rows.
        peer_problem: why the ranks cannot reach each other's memory, or None (:func:`peer_problem`).
    """
    if device.type != "cuda":
        return Capabilities(world=world, device=device.type)
    return Capabilities(
        world=world,
        device="cuda",
        capability=torch.cuda.get_device_capability(device),
        kernel_problem=_kernel_problem(),
        shape_problem=_shape_problem(world, hidden, dtype),
        peer_problem=peer_problem,
        multicast_problem=_multicast_problem(device),
    )


def _kernel_problem() -> str | None:
    try:
        build.load()
    except build.KernelUnavailableError as error:
        return str(error)
    return None


def _shape_problem(world: int, hidden: int, dtype: torch.dtype) -> str | None:
    if world > MAX_WORLD:
        return f"the kernel serves at most {MAX_WORLD} ranks, not {world}"
    if hidden % 8 or hidden > MAX_HIDDEN:
        return f"the kernel needs a hidden size that is a multiple of 8 up to {MAX_HIDDEN}, not {hidden}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel serves bfloat16 and float16, not {dtype}"
    return None


def _multicast_problem(device: torch.device) -> str | None:
    if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0") not in ("", "0"):
        return "TORCH_SYMM_MEM_DISABLE_MULTICAST is set"
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _SymmetricMemory

    if not _SymmetricMemory.has_multicast_support(DeviceType.CUDA, device.index or 0):
        return "the GPU or its driver has no multicast support"
    return None
