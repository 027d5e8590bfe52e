"""Canonical passes of several sizes that give every row the same bits.

A pass that holds two blocks need not compute eight, nor the logits of rows that decide nothing. What
deterministic output rests on is that a row's bits do not depend on its pass, and kernels often keep that
promise from one number of rows to another as well: a matrix product sums over its inner dimension in one
order unless the library splits it. Which sizes do is found out, not assumed: only those that the
certification has compared with the full pass may run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from sglang_ext.llm42.lane import first_rows

if TYPE_CHECKING:
    import torch

    from sglang_ext.llm42.canonical_graph import CapturedCanonicalPass
    from sglang_ext.llm42.canonical_pass import CandidateTable, CanonicalPass, PassSegment

    AnyCanonicalPass: TypeAlias = "CanonicalPass | CapturedCanonicalPass"

#: Sizes that are tried, as shares of the full pass. Below a quarter a row costs more than twice as much.
SHARES = (1 / 4, 3 / 8, 1 / 2, 3 / 4)

#: On a GPU, where to try a size takes little time: more of them, so that fewer rows are padding.
GPU_SHARES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


def smaller_sizes(segments: int, device: str) -> tuple[int, ...]:
    """Numbers of full segments to try beside ``segments`` on ``device``, ascending."""
    shares = GPU_SHARES if device == "cuda" else SHARES
    return tuple(sorted({max(1, int(segments * share)) for share in shares} - {segments}))


class PassSizes:
    """The canonical pass of G segments of W rows, and smaller ones.

    Args:
        full: the pass that decides what the bits are.
        smaller: passes of the same W and fewer segments. None of them runs before :meth:`allow`.

    Attributes:
        full: as above.
        smaller: by number of segments.
        sizes: numbers of segments of the passes that may run, ascending.
        few: those of them that may compute the logits of few rows alone; none before :meth:`allow_few`.
    """

    def __init__(self, full: AnyCanonicalPass, smaller: Iterable[AnyCanonicalPass] = ()) -> None:
        self.full = full
        self.smaller = {each.segments: each for each in smaller}
        self.sizes: tuple[int, ...] = (full.segments,)
        self.few: frozenset[int] = frozenset()

    @property
    def all(self) -> tuple[AnyCanonicalPass, ...]:
        """The passes of every size, whether they may run or not; the full one first."""
        return (self.full, *self.smaller.values())

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of the passes that may run, ascending."""
        return tuple(size * self.full.rows // self.full.block_rows for size in self.sizes)

    def allow(self, sizes: Iterable[int]) -> None:
        """Let smaller passes of these ``sizes`` run, and no others: they give the full pass's bits.

        Logits of few rows have to be allowed anew.

        Raises:
            ValueError: there is no such pass.
        """
        allowed = set(sizes)
        if unknown := allowed - self.smaller.keys():
            raise ValueError(f"no canonical pass of {sorted(unknown)} segments, only of {list(self.smaller)}")
        self.sizes = (*sorted(allowed), self.full.segments)
        self.few = frozenset()

    def allow_few(self, sizes: Iterable[int]) -> None:
        """Let passes of these ``sizes``, and no others, compute the logits of few rows alone: the same bits.

        Raises:
            ValueError: there is no such pass.
        """
        allowed = frozenset(sizes)
        if unknown := allowed - {each.segments for each in self.all if each.few_rows}:
            raise ValueError(f"no canonical pass of {sorted(unknown)} segments has logits of few rows")
        self.few = allowed

    def run(
        self, segments: Sequence[PassSegment], candidates: CandidateTable, rows: torch.Tensor
    ) -> torch.Tensor:
        """As :meth:`CanonicalPass.run`, by the smallest pass that may run and holds ``segments``.

        Args:
            rows: rows of the pass whose logits are wanted, int64 ``[n]`` on its device.

        Returns:
            Their logits, shape ``[n, vocabulary]``, in memory of their own.
        """
        taken = first_rows((segment.rows for segment in segments), self.full.block_rows)[-1]
        size = next(size for size in self.sizes if size * self.full.rows >= taken)
        chosen = self.smaller.get(size, self.full)
        if size in self.few and len(rows) <= chosen.few_rows:
            return chosen.run_few(segments, candidates, rows).clone()
        return chosen.run(segments, candidates)[rows]
