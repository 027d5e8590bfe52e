"""A second SGLang plugin, for benchmarks only: tensor-parallel ranks that do not wait for each other.

Loaded where this folder is on ``PYTHONPATH``. Every all-reduce returns this rank's own partial sums, so the
output is nonsense; the time is what a server would take if communication cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch


def register() -> None:
    """Take the all-reduces out of SGLang's groups."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    GroupCoordinator.all_reduce = own_part  # type: ignore[method-assign]


def own_part(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """In place of ``GroupCoordinator.all_reduce``."""
    return tensor
