"""Canonical passes of one scheduler: planned, launched, judged, and applied to the requests they carry."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_ext.llm42 import logprobs, marked_rows, sampling
from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42.canonical_pass import CandidateTable, PassSegment
from sglang_ext.llm42.lane import LanePolicy, LaneRequest, Segment, SegmentKind, first_rows, leading_matches
from sglang_ext.llm42.pass_stream import PassStream, Results
from sglang_ext.llm42.request import Verdict
from sglang_ext.llm42.transfer import to_device

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ext.llm42.pass_sizes import PassSizes
    from sglang_ext.llm42.statistics import Statistics


@dataclass
class LaunchedPass:
    """A canonical pass whose result was not applied yet.

    Attributes:
        segments: what it carries, with the request of each.
        offsets: first index of each segment in the results; None where a segment decides nothing.
        results: canonical token of every deciding row, and the candidate that each of them judges (0 for
            prompts); ``n`` each.
        output_logits: logits of deciding rows by index, where log-probabilities are wanted.
        prompt_logits: segment number, position and logits of prompt rows, likewise.
    """

    segments: list[tuple[Segment, Req]]
    offsets: list[int | None]
    results: Results
    output_logits: dict[int, torch.Tensor]
    prompt_logits: list[tuple[int, int, torch.Tensor]]


#: Passes under way at once where no decode step runs beside them: the device goes on with the second while
#: the host applies the first.
PASSES_IN_A_ROW = 2


class Verification:
    """Runs canonical passes, one after the other.

    Args:
        passes: of every size.
        policy: says what the next pass carries.
        stream: where passes run.
        table: the candidates.
        statistics: counters of the scheduler.
    """

    def __init__(
        self,
        passes: PassSizes,
        policy: LanePolicy,
        stream: PassStream,
        table: CandidateTable,
        statistics: Statistics,
    ) -> None:
        self.passes = passes
        self.policy = policy
        self._device = passes.full.device
        self._stream = stream
        self._table = table
        self._statistics = statistics
        self._launched: deque[LaunchedPass] = deque()

    @property
    def under_way(self) -> Results | None:
        """Results of the pass that was launched last and not applied, if there is one."""
        return self._launched[-1].results if self._launched else None

    def allow_sizes(self, sizes: Iterable[int]) -> None:
        """Let smaller passes of ``sizes`` segments run, and no others; see :meth:`PassSizes.allow`."""
        self.passes.allow(sizes)
        self.policy.sizes = self.passes.blocks

    def launch(
        self, requests: Mapping[LaneRequest, Req], step: int, can_decode: bool, behind: bool = False
    ) -> None:
        """Launch the next pass if one should run and none is under way.

        Args:
            requests: those that hold memory, in order of admission.
            step: running number of the decode step.
            can_decode: whether the step decodes, too.
            behind: whether the pass may follow one that is under way.
        """
        live = [lane for lane, req in requests.items() if not req.finished()]
        if len(self._launched) >= (self._most_under_way if behind else 1):
            self.policy.update_due(live, step)
            return
        segments = self.policy.plan(live, step, can_decode)
        if not segments:
            return
        owned = [(segment, requests[segment.request]) for segment in segments]
        with self._stream.launching():
            self._launched.append(self._run(owned))
        blocks = self.policy.size_for(self.policy.blocks_of(segments))
        self._statistics.count_pass(segments, blocks * self.policy.config.block_rows)

    def _pass_segment(self, segment: Segment, req: Req) -> PassSegment:
        known = segment.kind is SegmentKind.PROMPT
        end = segment.start + segment.rows
        token_ids = req.full_untruncated_fill_ids[segment.start : end] if known else ()
        return PassSegment(segment.kind, req.req_pool_idx, segment.start, token_ids, segment.rows)

    def _run(self, owned: list[tuple[Segment, Req]]) -> LaunchedPass:
        """Run the pass and sample the canonical token of every row that decides something."""
        offsets: list[int | None] = []
        firsts: list[tuple[int, int, int]] = []
        deciders: list[Req] = []
        counts: list[int] = []
        earlier: list[int] = []
        begins = first_rows((segment.rows for segment, _ in owned), self.policy.config.block_rows)
        for begin, (segment, req) in zip(begins, owned, strict=False):
            rows = _deciding_rows(segment)
            offsets.append(len(earlier) if rows else None)
            if not rows:
                continue
            firsts.append((begin + rows.start, segment.start + rows.start + 1, req.req_pool_idx))
            deciders.append(req)
            counts.append(len(rows))
            # A row that is judged follows candidates; the end of a prompt follows none.
            earlier += rows if segment.kind is SegmentKind.VERIFY else [0]
        reqs = [req for req, count in zip(deciders, counts, strict=True) for _ in range(count)]
        prompt_rows = [
            (g, row) for g, (segment, req) in enumerate(owned) for row in logprobs.prompt_rows(segment, req)
        ]
        # Rows behind those that decide: their logits are wanted, too.
        firsts += [(begins[g] + row, 0, 0) for g, row in prompt_rows]
        row, position, pool = to_device(
            consecutive_rows(firsts, [*counts, *([1] * len(prompt_rows))]), self._device
        )
        pass_segments = [self._pass_segment(*item) for item in owned]
        logits = self.passes.run(pass_segments, self._table, row)
        position, pool = position[: len(reqs)], pool[: len(reqs)]
        prompt_logits = [
            (g, owned[g][0].start + row, logits[len(reqs) + i]) for i, (g, row) in enumerate(prompt_rows)
        ]
        deciding = marked_rows.process(logits[: len(reqs)], reqs, earlier, self._table)
        output_logits = {i: deciding[i] for i, req in enumerate(reqs) if logprobs.wants_output(req)}
        params = sampling.SamplingRows.from_params(
            [marked_rows.row_params(req) for req in deciders], self._device, counts
        )
        judged = sampling.sample(deciding, params, position)
        drafted = self._table.read(pool, position)
        results = self._stream.results((judged, drafted))
        return LaunchedPass(owned, offsets, results, output_logits, prompt_logits)

    @property
    def _most_under_way(self) -> int:
        return PASSES_IN_A_ROW if self._stream.beside else 1

    def apply_ended(self) -> None:
        """Apply passes that have ended; one in front of decode always: ranks must not ask their clocks."""
        while self._launched and (not self._stream.beside or self._launched[0].results.ready()):
            self.apply_oldest()

    def make_room(self) -> None:
        """Apply the oldest pass if no other may be launched behind those under way."""
        if len(self._launched) >= self._most_under_way:
            self.apply_oldest()

    def apply_oldest(self) -> None:
        """Apply the pass under way that was launched first; the host waits until it has ended."""
        self._apply(self._launched.popleft())

    def wait(self) -> None:
        """Return when no pass is under way on the device; results are applied later."""
        if self.under_way is not None:
            self.under_way.read()

    def _apply(self, launched: LaunchedPass) -> None:
        judged, candidates = launched.results.read()
        self._note_prompt_logprobs(launched)
        corrected: list[tuple[int, int, int]] = []
        for (segment, req), offset in zip(launched.segments, launched.offsets, strict=True):
            lane = segment.request
            state = deterministic.of(req)
            if state is None or state.lane is not lane:
                continue  # released or retracted meanwhile
            if segment.kind is SegmentKind.PROMPT:
                if lane.prompt_done(segment.rows):
                    assert offset is not None
                    entries = _output_logprobs(launched, req, offset, judged[offset : offset + 1])
                    state.decide(Verdict((judged[offset],), 0, 0, True, entries))
                    corrected.append((req.req_pool_idx, lane.known_end, judged[offset]))
                continue
            assert offset is not None
            window = slice(offset, offset + segment.rows)
            matched = leading_matches(candidates[window], judged[window])
            outstanding = lane.pending
            committed = lane.verify_done(segment.rows, matched)
            tokens = tuple(judged[window][:committed])
            entries = _output_logprobs(launched, req, offset, tokens)
            verdict = Verdict(tokens, matched, outstanding, False, entries)
            state.decide(verdict)
            self._statistics.count_verdict(verdict)
            if matched < segment.rows:
                assert lane.base is not None
                corrected.append((req.req_pool_idx, lane.base, tokens[-1]))
        if corrected:
            pool, position, token = to_device(corrected, self._device).T
            self._table.write(pool, position, token)

    def _note_prompt_logprobs(self, launched: LaunchedPass) -> None:
        for g, position, logits in launched.prompt_logits:
            segment, req = launched.segments[g]
            state = deterministic.of(req)
            if state is not None and state.lane is segment.request:
                token = req.origin_input_ids[position + 1]
                state.prompt_logprobs.append(logprobs.of_prompt_row(logits, token, req))


def _output_logprobs(
    launched: LaunchedPass, req: Req, offset: int, tokens: Sequence[int]
) -> tuple[logprobs.TokenLogprobs, ...]:
    """Log-probabilities of ``tokens``, decided by the rows from ``offset`` on; empty if not wanted."""
    if not logprobs.wants_output(req):
        return ()
    return tuple(
        logprobs.of_output_row(launched.output_logits[offset + i], token, req)
        for i, token in enumerate(tokens)
    )


def consecutive_rows(firsts: Sequence[tuple[int, int, int]], counts: Sequence[int]) -> torch.Tensor:
    """Rows of several segments in sequence, on the host.

    Args:
        firsts: of each segment row in the pass, position and pool index of its first row.
        counts: how many rows follow each other there, at least one.

    Returns:
        Row in the pass, position and pool index of every row; int64 ``[3, rows]``, contiguous.
    """
    repeats = torch.tensor(counts, dtype=torch.int64)
    rows = torch.tensor(firsts, dtype=torch.int64).reshape(-1, 3).repeat_interleave(repeats, 0)
    begins = repeats.cumsum(0) - repeats
    rows[:, :2] += (torch.arange(len(rows)) - begins.repeat_interleave(repeats))[:, None]
    return rows.T.contiguous()


def _deciding_rows(segment: Segment) -> range:
    """Rows of ``segment`` whose canonical token matters."""
    if segment.kind is SegmentKind.VERIFY:
        return range(segment.rows)
    return range(segment.rows - 1, segment.rows) if segment.finishes_prompt else range(0)
