"""Batches of like size are tried in halves and whole; a cut is kept only where it was seen to be faster.

Predictions leave things out: what else a batch's launches wait for, how much the fused step slows the
products beside it, graphs that only whole batches have. The device's time of forward passes has it all in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

#: Whether the batches of one size run in halves, in this order. The first of each way may compile something
#: and does not count. Means over the others favour neither way where batches become slower one by one, or
#: where slow and fast ones alternate.
WARM_UP = (True, False)
ORDER = (*WARM_UP, True, False, False, True, False, True, True, False)

#: Sizes of batches in a factor of two.
SIZES_PER_OCTAVE = 4

#: Batches that were to run in halves and could not be cut, after which a size is settled.
MOST_MISSES = 8


class Clock(Protocol):
    """The device's time."""

    def mark(self) -> Any:
        """The moment when the device has done what it was given until now."""

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks; waits for the second one."""


class DeviceClock:
    """CUDA events on the current stream."""

    def mark(self) -> Any:
        """See :class:`Clock`."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """See :class:`Clock`."""
        end.synchronize()
        return float(begin.elapsed_time(end))


@dataclass
class _Size:
    """What is known of one size of batches: spans until it is settled, then whether halves won."""

    spans: list[tuple[int, Any, Any]] = field(default_factory=list)
    misses: int = 0
    halves_win: bool | None = None


class Trials:
    """Tries both ways on the first batches of each size, then keeps the faster one.

    Every rank must see the same batches in the same order; then all settle at the same batch, and alike.

    Args:
        clock: of the device.
        agree: the largest of all ranks' values, a collective.
        margin: share of the whole batch's time that halves must win.
    """

    def __init__(self, clock: Clock, agree: Callable[[float], float], margin: float) -> None:
        self.clock = clock
        self._agree = agree
        self._margin = margin
        self._sizes: dict[int, _Size] = {}

    def halves_next(self, tokens: int) -> bool:
        """Whether the next batch of ``tokens`` that is a trial is to run in halves."""
        size = self._size(tokens)
        return ORDER[len(size.spans)] if size.halves_win is None else size.halves_win

    def halves_win(self, tokens: int) -> bool | None:
        """Whether batches of ``tokens`` run in halves from now on, None if that is not settled."""
        return self._size(tokens).halves_win

    def add(
        self, tokens: int, in_halves: bool, begin: Any, end: Any, expected: Callable[[int], float]
    ) -> str | None:
        """Note a trial; the last one of a size waits for the device and settles it.

        Args:
            tokens: of the batch.
            in_halves: how it ran. One that could not be cut although it was to be does not count.
            begin, end: marks around its forward pass.
            expected: relative time of so many tokens, for batches of one size are not equally large.

        Returns:
            What was settled, for the log, if something was.
        """
        size = self._size(tokens)
        if size.halves_win is not None:
            return None
        if in_halves != self.halves_next(tokens):
            size.misses += 1
            size.halves_win = False if size.misses == MOST_MISSES else None
            return None
        size.spans.append((tokens, begin, end))
        if len(size.spans) < len(ORDER):
            return None
        times = {way: self._times(size, way, expected) for way in (True, False)}
        # One batch that something else held up moves the mean, not the fastest: both must win.
        mean = self._agree(fmean(times[True])) / self._agree(fmean(times[False]))
        fastest = self._agree(min(times[True])) / self._agree(min(times[False]))
        size.halves_win = mean <= 1 - self._margin and fastest <= 1
        size.spans.clear()
        how = "in halves" if size.halves_win else "whole"
        return (
            f"batches of about {tokens} tokens run {how} from now on: in halves they took {mean:.3f} of "
            f"their time whole, the fastest {fastest:.3f}"
        )

    def _times(self, size: _Size, way: bool, expected: Callable[[int], float]) -> list[float]:
        spans = [span for in_halves, span in zip(ORDER, size.spans, strict=True) if in_halves == way]
        return [self.clock.between(begin, end) / expected(tokens) for tokens, begin, end in spans[1:]]

    def _size(self, tokens: int) -> _Size:
        return self._sizes.setdefault(math.floor(SIZES_PER_OCTAVE * math.log2(tokens)), _Size())
