"""Run two halves of a forward pass by turns on one thread, switching wherever a half says so."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import TypeVar

from greenlet import getcurrent, greenlet

Result = TypeVar("Result")

#: Called when a half is about to be left; returns what puts its global state back on return.
SaveState = Callable[[], Callable[[], None]]


class Interleaver:
    """Coroutines over unmodified code: each half runs on its own stack (greenlet)."""

    def __init__(self, save_state: SaveState) -> None:
        self._save_state = save_state

    def run(self, halves: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run ``halves`` in turn, from one :meth:`give_turn` to the next, and return their results.

        If one raises, the others are ended where they stand and the exception goes on.
        """
        restore_caller = self._save_state()
        results: dict[int, Result] = {}
        stacks = [greenlet(half) for half in halves]
        for stack in stacks:
            stack.gr_context = contextvars.copy_context()
        try:
            while len(results) < len(stacks):
                for index, stack in enumerate(stacks):
                    if stack.dead:
                        continue
                    value = stack.switch()
                    if stack.dead:
                        results[index] = value
        finally:
            for stack in stacks:
                if not stack.dead:
                    stack.throw()
            restore_caller()
        return [results[index] for index in range(len(stacks))]

    def give_turn(self) -> None:
        """Called within a half: let the other half run until it gives the turn back or ends."""
        restore = self._save_state()
        parent = getcurrent().parent
        if parent is None:
            raise RuntimeError("give_turn was called outside of a half")
        parent.switch()
        restore()
