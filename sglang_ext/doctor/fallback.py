"""Batch-invariant replacements of operators that fail the certification.

An operator that fails is replaced by one that passes, or the server refuses to start. The table says which
replacements there are. It is empty on purpose: operators that are known to depend on other rows are replaced
in every canonical pass, whatever a finite probe finds (on a CPU: ``sglang_ext/cpu/experts.py`` and
``collectives.py``), and with these none fails there. A replacement belongs here only once a certification
with it has passed on the device it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fallback:
    """A batch-invariant replacement of one kind of operator.

    Attributes:
        operator: its kind, as the certification's report names it.
        device: device type that it was certified on.
        apply: puts it in place in a model; called before the certification is repeated.
        costs: one line for the log: what is slower with it.
    """

    operator: str
    device: str
    apply: Callable[[torch.nn.Module], None]
    costs: str


FALLBACKS: tuple[Fallback, ...] = ()


def fallback_for(operator: str, device: str, table: tuple[Fallback, ...] | None = None) -> Fallback | None:
    """The replacement of ``operator`` on ``device``, if there is one."""
    rows = FALLBACKS if table is None else table
    by_operator: Mapping[tuple[str, str], Fallback] = {(row.operator, row.device): row for row in rows}
    return by_operator.get((operator, device))
