"""The canonical fingerprint: a digest of what canonical passes compute for a fixed probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sglang_ext.doctor.digest import hex_digest

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator


class RankMismatch(RuntimeError):
    """Tensor-parallel ranks computed different canonical logits; all ranks raise it or none."""


def fingerprint(logits: torch.Tensor) -> str:
    """Fingerprint of the fixed probe: 64 hexadecimal digits.

    It changes with whatever changes the probe's canonical logits: weights, dtype, shape of the pass, kernels,
    library versions, processor, on a CPU the number of threads; and with nothing else.

    Args:
        logits: int64 ``[rows]``, digests of the logits of the probe's positions, those of its first pass.
    """
    return hex_digest(logits)


def agree(fingerprints: Sequence[str]) -> None:
    """Check that every rank has the same fingerprint.

    Raises:
        RankMismatch: they differ; the message names the ranks.
    """
    if len(set(fingerprints)) <= 1:
        return
    listed = ", ".join(f"rank {rank}: {value[:16]}" for rank, value in enumerate(fingerprints))
    raise RankMismatch(f"tensor-parallel ranks have different canonical fingerprints ({listed})")


def of_all_ranks(value: object, group: GroupCoordinator | None) -> list[object]:
    """``value`` of every tensor-parallel rank, in order of rank; every rank must call this."""
    if group is None or group.world_size == 1:
        return [value]
    values: list[object] = [None] * group.world_size
    torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values
