"""Canonical passes of several sizes that give every row the same bits.

A pass that holds two segments need not compute eight. What deterministic output rests on is that a row's
bits do not depend on its pass, and kernels often keep that promise from one number of rows to another as
well: a matrix product sums over its inner dimension in one order unless the library splits it. Which sizes do
is found out, not assumed: only those that the certification has compared with the full pass may run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

    from sglang_ext.llm42.canonical_graph import CapturedCanonicalPass
    from sglang_ext.llm42.canonical_pass import CandidateTable, CanonicalPass, PassSegment

    AnyCanonicalPass: TypeAlias = "CanonicalPass | CapturedCanonicalPass"

#: Sizes that are tried, as shares of the full pass.
SHARES = (1 / 4, 3 / 8, 1 / 2, 3 / 4)


def smaller_sizes(segments: int) -> tuple[int, ...]:
    """Numbers of segments to try beside ``segments``, ascending."""
    return tuple(sorted({max(1, int(segments * share)) for share in SHARES} - {segments}))


class PassSizes:
    """The canonical pass of G segments, and smaller ones.

    Args:
        full: the pass that decides what the bits are.
        smaller: passes of the same rows and fewer segments. None of them runs before :meth:`allow`.

    Attributes:
        full: as above.
        smaller: by number of segments.
        sizes: numbers of segments of the passes that may run, ascending.
    """

    def __init__(self, full: AnyCanonicalPass, smaller: Iterable[AnyCanonicalPass] = ()) -> None:
        self.full = full
        self.smaller = {each.segments: each for each in smaller}
        self.sizes: tuple[int, ...] = (full.segments,)

    def allow(self, sizes: Iterable[int]) -> None:
        """Let smaller passes of these ``sizes`` run, and no others: they give the full pass's bits.

        Raises:
            ValueError: there is no such pass.
        """
        allowed = set(sizes)
        if unknown := allowed - self.smaller.keys():
            raise ValueError(f"no canonical pass of {sorted(unknown)} segments, only of {list(self.smaller)}")
        self.sizes = (*sorted(allowed), self.full.segments)

    def run(self, segments: Sequence[PassSegment], candidates: CandidateTable) -> torch.Tensor:
        """As :meth:`CanonicalPass.run`, by the smallest pass that may run and holds ``segments``.

        Returns:
            Logits, shape ``[size, W, vocabulary]``; the next run may overwrite them.
        """
        size = next(size for size in self.sizes if size >= len(segments))
        return self.smaller.get(size, self.full).run(segments, candidates)
