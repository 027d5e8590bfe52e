"""The canonical lane: which rows of which deterministic request go into the next canonical pass.

Pure bookkeeping: positions and counts, no tensors, no SGLang. A *position* is the absolute index of a token
in its sequence (prompt and output together). For a request that decodes, ``base`` is the position of its
last committed token: everything before it has canonical KV, and its candidates stand behind it::

      prompt and committed output        t0     c1     c2     c3
    0 ......................... base-1 | base  base+1 base+2 base+3     pending = 3
      canonical KV                     | KV of t0, c1, c2 came from ordinary decode; c3 has none yet

A verification segment takes the rows ``base .. base+r-1`` with ``r = min(pending, W)``; row ``i`` judges the
candidate at ``base+i+1``. The next decode step writes KV at ``base+pending``, behind every one of these
rows, so a request may keep decoding while its segment is verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple


class SegmentKind(StrEnum):
    """What a segment is for."""

    PROMPT = "prompt"  # known tokens whose canonical KV is missing
    VERIFY = "verify"  # the last committed token and candidates behind it


def blocks_of(rows: int, block_rows: int) -> int:
    """Blocks of ``block_rows`` rows that a segment of ``rows`` rows takes."""
    return -(-rows // block_rows)


def first_rows(rows: Iterable[int], block_rows: int) -> list[int]:
    """First row in the pass of each segment, and behind them the first that is free.

    Args:
        rows: of each segment, in the order in which they stand in the pass.
        block_rows: rows of a block.
    """
    return [0, *accumulate(blocks_of(count, block_rows) * block_rows for count in rows)]


@dataclass(frozen=True)
class LaneConfig:
    """Shape and policy of the lane.

    Attributes:
        window_size: most rows of a segment (W).
        verify_batch_size: segments of W rows that the largest canonical pass holds (G).
        max_wait_steps: decode steps a due segment may wait for the pass to fill up.
        capacity: candidates a request may hold before it stops decoding.
        smaller_passes: whether smaller passes may be tried.
        block_rows: a segment takes whole blocks of so many rows, so that a short one leaves room for others;
            a divisor of W, W itself by default.
    """

    window_size: int
    verify_batch_size: int
    max_wait_steps: int = 4
    capacity: int = field(default=0)
    smaller_passes: bool = True
    block_rows: int = field(default=0)

    def __post_init__(self) -> None:
        if self.window_size < 1 or self.verify_batch_size < 1 or self.max_wait_steps < 0:
            raise ValueError(f"not a lane: {self}")
        if self.block_rows == 0:
            object.__setattr__(self, "block_rows", self.window_size)
        if self.block_rows < 0 or self.window_size % self.block_rows:
            raise ValueError(
                f"{self.block_rows} rows of a block do not divide {self.window_size} of a window"
            )
        if self.capacity == 0:
            object.__setattr__(self, "capacity", 2 * self.window_size)
        if self.capacity < self.window_size:
            raise ValueError(f"capacity {self.capacity} is below window_size {self.window_size}")

    @property
    def blocks(self) -> int:
        """Blocks of the largest canonical pass."""
        return self.window_size * self.verify_batch_size // self.block_rows

    def blocks_of(self, rows: int) -> int:
        """Blocks that a segment of ``rows`` rows takes."""
        return blocks_of(rows, self.block_rows)

    @property
    def patience(self) -> int:
        """Decode steps a full window may wait while its request goes on; a quarter of a window more of
        candidates is at stake if it does not hold."""
        return max(self.max_wait_steps, self.window_size // 4)


@dataclass(eq=False)
class LaneRequest:
    """Positions of one deterministic request in the lane.

    Attributes:
        known_end: positions below this have known token ids when the request is admitted: the prompt and,
            after a retraction, the output committed before.
        max_end: no token may stand at or behind this position (prompt length + max_new_tokens).
        canonical_end: positions below this have canonical KV, in passes whose result was applied.
        planned_end: the same, counting passes under way.
        base: position of the last committed token once the first token is known, else None.
        pending: candidates behind ``base``.
        in_flight: rows of this request in a pass whose result was not applied yet.
        due_since: step at which the request became due, None while it is not.
        urgent: verify as soon as possible (an end of sequence is among the candidates, say).
        doubtful: a candidate won so narrowly that it may be rejected, with everything behind it.
        streamed: the client reads along.
    """

    known_end: int
    max_end: int
    canonical_end: int
    planned_end: int = field(init=False)
    base: int | None = None
    pending: int = 0
    in_flight: int = 0
    due_since: int | None = None
    urgent: bool = False
    doubtful: bool = False
    streamed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.canonical_end < self.known_end:
            raise ValueError(
                f"canonical_end {self.canonical_end} must leave at least one of {self.known_end} known "
                "positions to recompute: its logits give the next token"
            )
        self.planned_end = self.canonical_end

    @property
    def prefilling(self) -> bool:
        """Whether prompt rows are still to be planned."""
        return self.planned_end < self.known_end

    @property
    def decoding(self) -> bool:
        """Whether the first token is known, so that candidates can be drafted."""
        return self.base is not None

    @property
    def length_reached(self) -> bool:
        """Whether committed tokens and candidates already fill the allowed length."""
        return self.base is not None and self.base + self.pending + 1 >= self.max_end

    @property
    def complete(self) -> bool:
        """Whether the committed tokens alone fill the allowed length."""
        return self.base is not None and self.base + 1 >= self.max_end

    @property
    def decode_position(self) -> int:
        """Position whose KV the next decode step writes.

        Raises:
            ValueError: the first token is not known yet.
        """
        if self.base is None:
            raise ValueError("no token to decode from: the prompt is not finished")
        return self.base + self.pending

    def can_decode(self, capacity: int) -> bool:
        """Whether the next decode step may draft another candidate."""
        return self.decoding and self.pending < capacity and not self.length_reached

    @property
    def settled(self) -> bool:
        """Whether all tokens so far are decided, and everything in front of the last one is canonical KV."""
        return self.decoding and self.pending == 0 and self.in_flight == 0

    def drafted(self) -> None:
        """One more candidate was drafted."""
        self.pending += 1

    def decoded(self) -> None:
        """A canonical decode step wrote the KV at ``base`` and decided the token behind it.

        Raises:
            ValueError: the request is not settled, so that this row's bits are not canonical.
        """
        if not self.settled:
            raise ValueError(f"a decode step decides nothing for a request that is not settled: {self}")
        assert self.base is not None
        self.base += 1
        self.canonical_end = self.planned_end = self.base

    def prompt_planned(self, rows: int) -> None:
        """``rows`` prompt rows from ``planned_end`` on went into a pass."""
        self.planned_end += rows
        self.in_flight += rows

    def verify_planned(self, rows: int) -> None:
        """``rows`` rows from ``base`` on went into a pass; what is behind them stays as urgent as it was."""
        self.in_flight += rows
        self.due_since = None
        if rows == self.pending:
            self.urgent = self.doubtful = False

    def being_judged(self, position: int) -> bool:
        """Whether the candidate at ``position`` is committed, or in a pass under way."""
        return self.base is not None and position <= self.base + self.in_flight

    def prompt_done(self, rows: int) -> bool:
        """``rows`` prompt rows were computed; returns whether that was the end of the prompt."""
        self.in_flight -= rows
        self.canonical_end += rows
        if self.canonical_end < self.known_end:
            return False
        self.base = self.known_end
        return True

    def verify_done(self, rows: int, matched: int) -> int:
        """``rows`` rows were verified and the first ``matched`` candidates agreed.

        Returns:
            Number of tokens committed, 1 to ``rows``: the matching candidates, and at a mismatch the
            canonical token in place of the first candidate that differs.
        """
        if self.base is None or not 0 <= matched <= rows <= self.pending:
            raise ValueError(f"matched {matched} of {rows} rows with {self.pending} pending at {self.base}")
        self.in_flight -= rows
        committed = min(matched + 1, rows)
        self.base += committed
        self.canonical_end = self.planned_end = self.base
        self.pending = self.pending - rows if matched == rows else 0
        return committed


class Segment(NamedTuple):
    """Up to W consecutive rows of one request in a canonical pass."""

    request: LaneRequest
    kind: SegmentKind
    start: int  # position of the first row
    rows: int  # 1..W

    @property
    def finishes_prompt(self) -> bool:
        """Whether the last row's logits give the request's next token."""
        return self.kind is SegmentKind.PROMPT and self.start + self.rows == self.request.known_end


#: Rows of prompts that passes compute between two decode steps: those of a prefill batch of SGLang's
#: (``--chunked-prefill-size`` on most GPUs).
HELD_ROWS = 8192

#: A pass of fewer rows takes hardly less time than a decode step, so many of them would hold decode for long.
LEAST_HELD_PASS, HELD_PASSES = 256, 16


class LanePolicy:
    """Decides when a canonical pass runs and what it carries.

    The rule, in order:

    1. A request is *due* when W candidates wait (half as many if its client reads along), when its
       candidates reach the length limit, or when it is urgent. A prompt is due from its admission.
    2. A pass runs at once when a prompt waits, a request is urgent, due segments fill the largest pass, or
       nothing could decode meanwhile. It runs after ``max_wait_steps`` when due segments fill the smallest
       pass, when a client reads along, or when a request waits for nothing but this verification. Otherwise
       it runs when the oldest due segment has waited ``patience`` steps.
    3. Half of the blocks are kept for prompts and half for verification as long as both wait; within each
       kind the oldest is served first. What stays free is filled with the other kind.
    4. The pass has the smallest size that holds these. Blocks still free verify requests that are not due
       yet, those with a doubtful candidate first, then those with most candidates: the pass costs the same
       with or without them, and a divergence found early wastes less. (To let doubt make a request due costs
       more in passes than it saves in decoding.)
    5. Passes follow each other without a decode step, as SGLang's own prefill batches do, while prompts fill
       another whole one, which would hide nothing beside decode, up to ``HELD_ROWS`` rows in a row; and while
       more requests wait for their prompt than could decode, up to ``max_wait_steps`` passes. The last of
       them runs beside decode.

    Attributes:
        sizes: numbers of blocks that a pass may have, ascending up to the largest pass; further ones may be
            set once it is known that they give the same bits.
    """

    def __init__(self, config: LaneConfig) -> None:
        self.config = config
        self.sizes: tuple[int, ...] = (config.blocks,)
        # Who gets the larger half of an odd number of blocks; it alternates, or one kind would starve.
        self._prompts_round_up = True
        # Decode steps that were left out in a row.
        self._held = 0
        rows = config.blocks * config.block_rows
        self._most_held = config.max_wait_steps
        if rows >= LEAST_HELD_PASS:
            self._most_held = max(config.max_wait_steps, min(HELD_PASSES, HELD_ROWS // rows))
        # A stream that waits for whole windows comes in bursts; shorter windows would cost more passes.
        self._stream_window = max(1, config.window_size // 2)

    def decide_hold(self, requests: Iterable[LaneRequest]) -> bool:
        """Decide whether a step only runs a pass, by rule 5; to be called once for each step.

        Args:
            requests: all requests of a batch in which nobody else decodes.
        """
        waiting = decoding = blocks = 0
        for request in requests:
            waiting += not request.decoding
            decoding += request.can_decode(self.config.capacity)
            blocks += self._prompt_blocks(request)
        most = 0
        if blocks >= self.config.blocks:
            most = self._most_held
        elif blocks and waiting > decoding:
            most = self.config.max_wait_steps
        hold = decoding > 0 and self._held < most
        self._held = self._held + 1 if hold else 0
        return hold

    def update_due(self, requests: Iterable[LaneRequest], step: int) -> None:
        """Note from which ``step`` on each request is due."""
        for request in requests:
            if request.due_since is None and (request.prefilling or self._verify_due(request)):
                request.due_since = step

    def plan(self, requests: Sequence[LaneRequest], step: int, can_decode: bool) -> list[Segment]:
        """Choose the next pass and mark its rows as planned.

        Args:
            requests: live requests in order of admission.
            step: running number of the decode step, for waiting times.
            can_decode: whether an ordinary decode step would do useful work now.

        Returns:
            Segments that fit the largest pass, those of one request in ascending position and next to each
            other; empty if no pass should run.
        """
        self.update_due(requests, step)
        prompts = [r for r in requests if r.prefilling]
        due = sorted((r for r in requests if self._verify_due(r)), key=_due_order)
        if not self._should_run(prompts, due, step, can_decode):
            return []
        budget = self.config.blocks
        wanted_prompt = sum(self._prompt_blocks(r) for r in prompts)
        wanted_due = self._verify_blocks(due)
        prompt_budget = _share(budget, wanted_prompt, wanted_due, self._prompts_round_up)
        if wanted_prompt and due:
            self._prompts_round_up = not self._prompts_round_up
        segments = self._take_prompts(sorted(prompts, key=_due_order), prompt_budget)
        early = sorted(
            (r for r in requests if self._verifiable(r) and not self._verify_due(r)),
            key=lambda r: (not r.doubtful, -r.pending),
        )
        taken = self.blocks_of(segments)
        free = self.size_for(min(budget, taken + wanted_due)) - taken
        for request in (*due, *early):
            if free == 0:
                break
            segments.append(self._verify_segment(request, free * self.config.block_rows))
            free -= self.config.blocks_of(segments[-1].rows)
        return segments

    def blocks_of(self, segments: Iterable[Segment]) -> int:
        """Blocks that ``segments`` take together."""
        return sum(self.config.blocks_of(segment.rows) for segment in segments)

    def size_for(self, blocks: int) -> int:
        """The smallest size of a pass that holds ``blocks`` blocks."""
        return next(size for size in self.sizes if size >= blocks)

    def _should_run(
        self, prompts: Sequence[LaneRequest], due: Sequence[LaneRequest], step: int, can_decode: bool
    ) -> bool:
        if prompts:
            return True
        if not due:
            return False
        wanted = self._verify_blocks(due)
        if not can_decode or wanted >= self.config.blocks or any(r.urgent for r in due):
            return True
        soon = due if wanted >= self.sizes[0] else [r for r in due if r.streamed or r.length_reached]
        return _waited(soon, step) >= self.config.max_wait_steps or _waited(due, step) >= self.config.patience

    def _verifiable(self, request: LaneRequest) -> bool:
        return request.decoding and request.pending > 0 and request.in_flight == 0

    def _verify_due(self, request: LaneRequest) -> bool:
        if not self._verifiable(request):
            return False
        enough = self._stream_window if request.streamed else self.config.window_size
        return request.pending >= enough or request.length_reached or request.urgent

    def _prompt_blocks(self, request: LaneRequest) -> int:
        return self.config.blocks_of(request.known_end - request.planned_end)

    def _verify_blocks(self, requests: Iterable[LaneRequest]) -> int:
        return sum(self.config.blocks_of(min(r.pending, self.config.window_size)) for r in requests)

    def _take_prompts(self, prompts: Iterable[LaneRequest], budget: int) -> list[Segment]:
        """As many rows of ``prompts`` as ``budget`` blocks hold."""
        segments: list[Segment] = []
        for request in prompts:
            while request.prefilling and budget > 0:
                most = min(self.config.window_size, budget * self.config.block_rows)
                rows = min(most, request.known_end - request.planned_end)
                segments.append(Segment(request, SegmentKind.PROMPT, request.planned_end, rows))
                request.prompt_planned(rows)
                budget -= self.config.blocks_of(rows)
            if not request.prefilling:
                request.due_since = None
        return segments

    def _verify_segment(self, request: LaneRequest, most: int) -> Segment:
        assert request.base is not None
        rows = min(request.pending, self.config.window_size, most)
        request.verify_planned(rows)
        return Segment(request, SegmentKind.VERIFY, request.base, rows)


def _waited(due: Iterable[LaneRequest], step: int) -> int:
    """Steps since the first of ``due`` became due; -1 if there is none."""
    return max((step - r.due_since for r in due if r.due_since is not None), default=-1)


def _due_order(request: LaneRequest) -> int:
    return request.due_since if request.due_since is not None else 0


def _share(budget: int, first: int, second: int, round_up: bool) -> int:
    """Blocks for the first of two kinds that want ``first`` and ``second``: half, and what is left over."""
    half = (budget + 1) // 2 if round_up else budget // 2
    return min(first, max(budget - second, half))


def leading_matches(candidates: Sequence[int], judged: Sequence[int]) -> int:
    """Number of leading positions at which both sequences agree."""
    for i, (candidate, token) in enumerate(zip(candidates, judged, strict=True)):
        if candidate != token:
            return i
    return len(judged)
