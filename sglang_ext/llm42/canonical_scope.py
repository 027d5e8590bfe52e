"""Whether a canonical pass is running in this thread: operators with a row-invariant version ask here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_running: ContextVar[bool] = ContextVar("canonical_pass_running", default=False)


def in_canonical_pass() -> bool:
    """Whether the caller computes part of a canonical pass."""
    return _running.get()


@contextmanager
def canonical_scope() -> Iterator[None]:
    """Everything that this thread computes inside of the context belongs to a canonical pass."""
    token = _running.set(True)
    try:
        yield
    finally:
        _running.reset(token)
