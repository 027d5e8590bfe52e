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

#: What a canonical step costs beyond SGLang's own, and what it saves, by measurements of Llama-3.1-8B on an
#: H200 (docs/gpu.md). The unit is the time that verifying a token takes, there 25 microseconds; like a step's
#: time it grows with the model. Padded products and rearranged query heads cost about a millisecond,
STEP_COST = 40.0

#: and attention without split-KV for each position of the batch.
POSITION_COST = 0.00055

#: Where tokens are verified, so many are decoded twice,
REDECODED = 0.09

#: each of them for its row's share of a step, which takes so long, and so much longer for each row.
STEP_TIME, ROW_TIME = 256.0, 1.0

#: Once steps are canonical they stay so for a smaller saving: candidates drafted meanwhile would have to be
#: verified first.
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


def saving(rows: int, decidable: int) -> float:
    """Time that a canonical step of ``rows`` rows saves, if it decides ``decidable`` of them.

    What else it costs: :data:`STEP_COST`, and :data:`POSITION_COST` for each position.
    """
    return decidable * (1 + REDECODED * (STEP_TIME / rows + ROW_TIME))


class DecodePolicy:
    """Chooses the shape of one decode step after the other.

    Args:
        always: whether every step that decides a row is canonical, rather than where it saves time.

    Attributes:
        sizes: rows that a canonical step may have, ascending; none until the certification has found some
            that give a canonical pass's bits.
    """

    def __init__(self, always: bool = False) -> None:
        self.sizes: tuple[int, ...] = ()
        self._always = always
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
        worthwhile = decidable > 0 and (self._always or self._saves(rows, decidable, longest, total))
        self._canonical = size is not None and worthwhile
        return size if self._canonical else None

    def _saves(self, rows: int, decidable: int, longest: int, total: int) -> bool:
        if longest > max(SHORT, total * LONGEST_SHARE):
            return False
        cost = STEP_COST + POSITION_COST * total
        return saving(rows, decidable) >= (cost * STAYING_SHARE if self._canonical else cost)
