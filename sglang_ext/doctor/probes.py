"""What is tried: probe sequences and the ways of laying them out in canonical passes.

Pure logic, no tensors. A trial is a few requests and the passes that compute their positions. Each position
of a sequence must get the same bits in every trial and every pass, whatever stands around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

#: Key tiles and pages of the known attention kernels are divisors or multiples of this.
TILE = 64

#: Tiles that the prefixes of a full certification reach over.
TILES = 3

#: Positions of the probe of decode steps at server start, which compute it row by row.
STEP_LENGTH = 320

#: The sequence that is computed first and compared against; others are its neighbours.
PROBE = 0

_MASK = 2**64 - 1


class Garbage(StrEnum):
    """What stands in the KV cache beyond a request's own positions."""

    NONE = "none"  # the padding slot
    FINITE = "finite"  # large numbers
    NAN = "nan"


@dataclass(frozen=True)
class ProbeRequest:
    """A request of a trial.

    Attributes:
        sequence: number of its token sequence.
        shared: leading positions whose KV is that of the probe computed first, as after a prefix-cache hit;
            from there on it has slots of its own.
    """

    sequence: int
    shared: int = 0


@dataclass(frozen=True)
class Placement:
    """One segment of a pass.

    Attributes:
        request: index of the request in the trial.
        start: position of the first row.
        rows: rows in use.
        from_table: whether its tokens come as candidates from the device table.
    """

    request: int
    start: int
    rows: int
    from_table: bool = False


Pass = tuple[Placement, ...]


@dataclass(frozen=True)
class Trial:
    """A few requests and the passes that compute them.

    Attributes:
        name: what is varied, in words.
        requests: each has KV for the positions that it shares and those computed before.
        passes: in order; segments of one request ascend.
    """

    name: str
    requests: tuple[ProbeRequest, ...]
    passes: tuple[Pass, ...]
    garbage: Garbage = Garbage.NONE

    def end(self, request: int) -> int:
        """First position behind those that ``request`` computes."""
        ends = [p.start + p.rows for each in self.passes for p in each if p.request == request]
        return max(ends, default=self.requests[request].shared)


@dataclass(frozen=True)
class Space:
    """What there is to lay out in.

    Attributes:
        segments: segments of a canonical pass (G).
        rows: rows of a segment (W).
        concurrent: requests that a pass may hold, 1..G.
        length: positions of the probe.
        block_rows: rows of a block, of which a segment takes whole ones; W by default.
    """

    segments: int
    rows: int
    concurrent: int
    length: int
    block_rows: int = 0

    def __post_init__(self) -> None:
        if min(self.segments, self.rows, self.concurrent, self.length) < 1:
            raise ValueError(f"nothing can be laid out in {self}")
        if self.block_rows == 0:
            object.__setattr__(self, "block_rows", self.rows)

    def of_size(self, segments: int) -> Space:
        """That of a pass of other ``segments``, and otherwise the same."""
        return dataclasses.replace(self, segments=segments, concurrent=min(segments, self.concurrent))

    def rows_from(self, start: int) -> int:
        """Rows of a segment that starts at ``start`` and does not leave the probe."""
        return min(self.rows, self.length - start)


def token_ids(sequence: int, length: int, vocabulary: int) -> list[int]:
    """The tokens of a probe sequence: hashes of (sequence, position), the same everywhere and always."""
    return [_splitmix((sequence << 32) + position) % vocabulary for position in range(length)]


def _splitmix(value: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014)."""
    value = (value + 1) * 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def quick_length(segments: int, rows: int) -> int:
    """Positions of the probe of a quick certification: what one pass computes."""
    return segments * rows


def full_length(segments: int, rows: int) -> int:
    """Positions of the probe of a full certification: some tiles and a window, a pass at least."""
    return max(segments * rows, TILES * TILE + 2 * rows)


def reference(space: Space) -> Trial:
    """The probe from its start, in ascending segments, as many to a pass as fit."""
    request = ProbeRequest(PROBE)
    return Trial("reference", (request,), tuple(_cut(space, [space.rows])))


def quick_trials(space: Space) -> Iterator[Trial]:
    """A few passes that between them vary everything once; see :func:`full_trials`."""
    if space.block_rows < space.rows:
        yield _short_segments(space)
        yield _joined_windows(space, _starts(space)[-1] // 3)
    yield _recut(space, "segments recut", shift=1)
    yield _recut(space, "neighbours changed", shift=space.rows // 2 + 1, strangers=True)


def full_trials(space: Space) -> Iterator[Trial]:
    """Everything that the rest of a pass, or the way to it, may vary in."""
    starts = _starts(space)
    for start in starts:
        requests = (ProbeRequest(PROBE, start),) * space.concurrent
        yield Trial("every segment index", requests, (_placements(space, requests),))
    if space.block_rows < space.rows:
        yield _short_segments(space)
        for start in starts:
            yield _joined_windows(space, start)
    for position in sorted({space.rows_from(0) - 1, *(s for s in starts if s >= space.rows)}):
        yield from _every_row(space, position)
    for variant in range(3):
        yield _recut(space, "neighbours changed", shift=1 + variant, strangers=True, phase=variant)
    yield from _mixed(space, starts, "prefixes mixed")
    yield from _mixed(space, starts, "lengths mixed", mixed_rows=True)
    yield from _mixed(space, starts, "tokens from the candidate table", from_table=True)
    yield from _mixed(space, starts, "KV garbage", mixed_rows=True, garbage=Garbage.FINITE)
    yield from _mixed(space, starts, "KV poisoned with NaN", mixed_rows=True, garbage=Garbage.NAN)
    for start in starts:
        requests = (ProbeRequest(PROBE, start),)
        yield Trial("alone", requests, (_placements(space, requests),))
    for lengths in ([max(1, space.rows - 1)], [1, space.rows, max(1, space.rows // 2)]):
        request = ProbeRequest(PROBE)
        yield Trial("recomputed, cut otherwise, in other slots", (request,), tuple(_cut(space, lengths)))


def step_trials(space: Space) -> Iterator[Trial]:
    """For decode steps, which have one row in a segment: every place of a row, beside every other prefix."""
    starts = _starts(space)
    for start in starts:
        requests = (ProbeRequest(PROBE, start),) * space.concurrent
        yield Trial("every row", requests, (_placements(space, requests),))
    for variant in range(3):
        yield _recut(space, "neighbours changed", shift=1 + variant, strangers=True, phase=variant)
    yield from _mixed(space, starts, "prefixes mixed")
    yield from _mixed(space, starts, "KV poisoned with NaN", garbage=Garbage.NAN)


def row_by_row(space: Space) -> Trial:
    """The whole probe as decode steps compute it: each row in a segment, on keys and values of such rows."""
    return Trial("recomputed row by row", (ProbeRequest(PROBE),), tuple(_cut(space, [1])))


def _starts(space: Space) -> list[int]:
    """Prefix lengths that matter: none, one, around the edges of tiles, and as long as possible."""
    edges = {edge + delta for edge in range(TILE, space.length, TILE) for delta in (-1, 0, 1)}
    wanted = {0, 1, space.rows // 2, space.length - space.rows, space.length - 1} | edges
    return sorted(start for start in wanted if 0 <= start < space.length)


def _placements(space: Space, requests: tuple[ProbeRequest, ...], from_table: bool = False) -> Pass:
    """A segment for each request, from the end of what it shares."""
    return tuple(
        Placement(number, request.shared, space.rows_from(request.shared), from_table)
        for number, request in enumerate(requests)
    )


def _cut(space: Space, lengths: list[int], start: int = 0) -> Iterator[Pass]:
    """The probe from ``start`` on as request 0, in segments of ``lengths`` in turn."""
    segments: list[Placement] = []
    while start < space.length:
        rows = min(lengths[len(segments) % len(lengths)], space.length - start)
        segments.append(Placement(0, start, rows))
        start += rows
    for first in range(0, len(segments), space.segments):
        yield tuple(segments[first : first + space.segments])


def _recut(space: Space, name: str, shift: int, strangers: bool = False, phase: int = 0) -> Trial:
    """One pass: segments all over the probe, last ones first, cut elsewhere than in the reference.

    With ``strangers`` every other segment holds another sequence, and there is garbage in the KV cache.
    """
    requests: list[ProbeRequest] = []
    placements: list[Placement] = []
    for number in range(space.concurrent):
        if strangers and space.concurrent > 1 and (number + phase) % 2:
            requests.append(ProbeRequest(PROBE + 1 + number + phase * space.concurrent))
            placements.append(Placement(number, 0, max(1, space.rows_from(0) - number % space.rows)))
            continue
        part = (space.concurrent - 1 - number) * space.length // space.concurrent
        start = min(part + (shift + 3 * number) % space.rows, space.length - 1)
        requests.append(ProbeRequest(PROBE, start))
        placements.append(Placement(number, start, max(1, space.rows_from(start) - number % 3)))
    garbage = Garbage.FINITE if strangers else Garbage.NONE
    return Trial(name, tuple(requests), (tuple(placements),), garbage)


def _short_segments(space: Space) -> Trial:
    """Segments that leave a part of their block free, so that a pass holds as many as it has blocks."""
    each = max(1, min(space.rows, space.segments * space.rows // space.concurrent) // space.block_rows)
    requests: list[ProbeRequest] = []
    placements: list[Placement] = []
    for number in range(space.concurrent):
        start = number * space.length // space.concurrent
        requests.append(ProbeRequest(PROBE, start))
        for block in range(each):
            rows = min(1 + (number + 3 * block) % max(1, space.block_rows - 1), space.length - start)
            if rows:
                placements.append(Placement(number, start, rows))
                start += rows
    return Trial("a segment in each block", tuple(requests), (tuple(placements),))


def _joined_windows(space: Space, start: int) -> Trial:
    """The probe from ``start`` on in windows that follow each other, as a prompt behind a cached prefix."""
    request = ProbeRequest(PROBE, start)
    return Trial("windows in a row", (request,), tuple(_cut(space, [space.rows], start)))


def _every_row(space: Space, position: int) -> Iterator[Trial]:
    """``position`` at every row of a segment."""
    shares = [position - row for row in range(space.rows) if position >= row]
    for first in range(0, len(shares), space.concurrent):
        requests = tuple(ProbeRequest(PROBE, share) for share in shares[first : first + space.concurrent])
        yield Trial("every row index", requests, (_placements(space, requests),))


def _mixed(
    space: Space,
    starts: list[int],
    name: str,
    mixed_rows: bool = False,
    from_table: bool = False,
    garbage: Garbage = Garbage.NONE,
) -> Iterator[Trial]:
    """Prefixes of all lengths side by side; short and long ones meet in every pass."""
    order = [starts[i // 2] if i % 2 == 0 else starts[-1 - i // 2] for i in range(len(starts))]
    for first in range(0, len(order), space.concurrent):
        requests = tuple(ProbeRequest(PROBE, start) for start in order[first : first + space.concurrent])
        placements = _placements(space, requests, from_table)
        if mixed_rows:
            placements = tuple(
                Placement(p.request, p.start, 1 + (first + 5 * p.request) % p.rows) for p in placements
            )
        yield Trial(name, requests, (placements,), garbage)
