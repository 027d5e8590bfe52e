"""Which decode steps run in a canonical shape.

A decode step whose shape never changes, with the attention of canonical passes, gives its rows the bits that
a canonical pass would give them. What such a step decides is final: there is nothing to verify. It costs more
than SGLang's own step (padding to the fixed number of rows, attention without split-KV), and saves the
verification of every token that it decides.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from enum import StrEnum

#: Rows of the steps that are tried on a GPU. Below 64 a matrix product costs as much; above the last of these
#: SGLang itself captures no graph by default.
GPU_SIZES = (64, 128, 192, 256, 320, 384, 512)

#: On a CPU each row costs, but products of few rows often have other bits than the full pass, whose number of
#: rows is tried, too.
CPU_SIZES = (4, 8, 16, 32, 64, 128, 256)

#: Rows that have to be decided in a step for it to be worthwhile. By the times of its kernels a step of
#: Llama-3.1-8B takes an H200 about 1.6 ms more than SGLang's, with 100 requests as with 250. To verify a
#: token takes 25 microseconds, and a tenth of the tokens is decoded twice.
WORTHWHILE_ROWS = 64

#: Of these, so many are enough to stay: candidates drafted meanwhile would have to be verified first.
STAYING_SHARE = 3 / 4


#: A request's keys are read by one thread block for each key head, so that one long request among short ones
#: takes as long as all of them: positions up to which it does not matter, and beyond them the share of all.
SHORT, LONGEST_SHARE = 4096, 1 / 16


class DecodeMode(StrEnum):
    """Values of ``--llm42-canonical-decode``."""

    AUTO = "auto"  # on a GPU, where it is worthwhile
    ALWAYS = "always"  # wherever a row can be decided
    NEVER = "never"


def sizes_to_try(device: str, most: int, full: int) -> tuple[int, ...]:
    """Sizes of canonical decode steps on ``device``, ascending.

    Args:
        most: rows that a batch may have.
        full: rows of the full canonical pass.
    """
    if device == "cuda":
        return GPU_SIZES[: bisect_left(GPU_SIZES, most) + 1]
    sizes = sorted({*CPU_SIZES, full})
    return tuple(sorted({*sizes[: bisect_left(sizes, most) + 1], full}))


class DecodePolicy:
    """Chooses the shape of one decode step after the other.

    Args:
        least: rows that a step has to decide to be canonical, see :data:`WORTHWHILE_ROWS`; at least 1.

    Attributes:
        sizes: rows that a canonical step may have, ascending; none until the certification has found some
            that give a canonical pass's bits.
    """

    def __init__(self, least: int) -> None:
        self.sizes: tuple[int, ...] = ()
        self._least = least
        self._canonical = False

    def allow(self, sizes: Iterable[int]) -> None:
        """Let steps of ``sizes`` rows run, and no others."""
        self.sizes = tuple(sorted(sizes))

    def choose(self, rows: int, decidable: int, longest: int = 0, total: int = 0) -> int | None:
        """The size of the next step; to be called once for each step.

        Args:
            rows: requests of the batch.
            decidable: those of them that are deterministic, decode, and draw from logits as they are.
            longest: positions of the longest request.
            total: positions of all.

        Returns:
            The smallest allowed size that holds ``rows``, or None for SGLang's own step.
        """
        size = next((size for size in self.sizes if size >= rows), None)
        least = self._least * STAYING_SHARE if self._canonical else self._least
        slow = self._least > 1 and longest > max(SHORT, total * LONGEST_SHARE)
        self._canonical = size is not None and decidable > 0 and decidable >= least and not slow
        return size if self._canonical else None
