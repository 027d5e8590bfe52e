"""Small values from the host to the device of a canonical pass, without waiting for that device."""

from __future__ import annotations

from typing import Any

import torch


def to_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``torch.tensor(values)`` on ``device``.

    ``torch.tensor(values, device="cuda")`` waits until the current stream has done all its work. Here the
    copy starts from pinned memory, which torch keeps until it has happened.

    Args:
        values: a number or (nested) lists of numbers, or a tensor on the host.
    """
    if isinstance(values, torch.Tensor):
        values = values.to(dtype=dtype)
        if torch.device(device).type == "cuda":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)
    if torch.device(device).type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
