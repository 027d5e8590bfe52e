"""Which device a rank computes on: the declared corrections of SGLang's Ray actor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def ordinal_of(assigned: str, visible: str | None) -> int:
    """Ordinal, in a process, of the GPU that Ray assigned.

    Args:
        assigned: Ray's id: an entry of the node's ``CUDA_VISIBLE_DEVICES`` if it has one, else an index.
        visible: ``CUDA_VISIBLE_DEVICES`` of the process.

    Raises:
        ValueError: the process cannot see the GPU.
    """
    if visible is None:
        return int(assigned)
    entries = [entry.strip() for entry in visible.split(",")]
    if assigned in entries:
        return entries.index(assigned)
    raise ValueError(
        f"Ray assigned GPU {assigned} and CUDA_VISIBLE_DEVICES of the rank is {visible!r}: remove it from "
        "--ray-env and from the job's runtime environment; set it where the node's `ray start` runs."
    )


def as_ordinals(result: dict[str, list[str]], context: Any) -> dict[str, list[str]]:
    """After ``RuntimeContext.get_accelerator_ids`` in a rank: GPUs as ordinals, as SGLang takes them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ordinals = [str(ordinal_of(assigned, visible)) for assigned in result.get("GPU", [])]
    return {**result, "GPU": ordinals}


def set_device(original: Callable[[Any], None], device: Any) -> None:
    """Around ``torch.cuda.set_device`` in a rank: nothing where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        original(device)
