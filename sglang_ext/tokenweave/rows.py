"""Which rank owns which rows of a half: pure arithmetic, the same as ``owned_rows`` in the CUDA sources."""

from __future__ import annotations


def rows_per_rank(tokens: int, world: int) -> int:
    """Rows of the largest share: ceil(tokens / world)."""
    return -(-tokens // world)


def owned_rows(tokens: int, world: int, rank: int) -> slice:
    """Rows that ``rank`` owns out of ``tokens``: contiguous, ascending, maybe none at the end."""
    share = rows_per_rank(tokens, world)
    begin = min(rank * share, tokens)
    return slice(begin, min(begin + share, tokens))
