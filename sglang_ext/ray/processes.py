"""Child processes that end with the process that started them, however that one ends."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def ending_with_parent(signum: signal.Signals) -> Callable[[], None]:
    """What a child does before its program begins (``preexec_fn``): ask for a signal when its parent dies."""
    libc = ctypes.CDLL(None)  # here: between fork and exec only the call is safe

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signum)

    return ask
