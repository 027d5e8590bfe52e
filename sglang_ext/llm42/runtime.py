"""The scheduler-side engine of LLM-42: one per scheduler process.

Each decode step of a batch that holds deterministic requests goes through three calls:

1. :meth:`Runtime.begin_step`, before SGLang allocates memory: results of finished canonical passes are
   applied, then every row of the batch gets the position that it decodes at.
2. :meth:`Runtime.run_step`, in place of the forward: the next canonical pass is launched, then SGLang's own
   decode runs over the whole batch, marked and unmarked rows alike.
3. :func:`sglang_ext.llm42.commit.commit`, when SGLang processes the step's result: the tokens that passes
   decided are committed one at a time.

All decisions follow from values on the host that are equal on every tensor-parallel rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sglang_ext.llm42 import logit_processing, logprobs, sampling
from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42.admission import Admission
from sglang_ext.llm42.canonical_graph import canonical_passes_for
from sglang_ext.llm42.canonical_pass import AttentionFactory, CandidateTable, PassSegment
from sglang_ext.llm42.config import Llm42Config
from sglang_ext.llm42.lane import LanePolicy, LaneRequest, Segment, SegmentKind, leading_matches
from sglang_ext.llm42.pass_stream import Results, SlotGuard, pass_stream
from sglang_ext.llm42.prefix_sharing import PrefixSharing
from sglang_ext.llm42.request import Verdict
from sglang_ext.llm42.statistics import Statistics
from sglang_ext.llm42.transfer import to_device

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.model_runner import ModelRunner


class DeviceRows(NamedTuple):
    """Rows of a decode batch on the device; int64 ``[rows]`` each.

    Attributes:
        row: their numbers in the batch.
        pool: their requests' places in SGLang's ``req_to_token`` table.
        position: where each writes KV.
    """

    row: torch.Tensor
    pool: torch.Tensor
    position: torch.Tensor

    def first(self, count: int) -> DeviceRows:
        """The first ``count`` of them."""
        return DeviceRows(*(values[:count] for values in self))


@dataclass
class DecodeStep:
    """One decode step of a batch with deterministic requests.

    Attributes:
        reqs: the batch's requests, row by row.
        positions: position at which each row writes KV; 0 for an idle row.
        drafting: rows that draft a candidate.
        idle: rows that have nothing to decode: prompt unfinished, or enough candidates waiting.
        verdicts: what passes decided since the last step, by row.
        drafted: rows that did draft a candidate, once they have.
        narrow: of each of these, whether its candidate won narrowly, bool ``[len(drafted)]`` on the host,
            complete when SGLang has the step's result there.
        marked: the drafting rows, then the idle ones, on the device; None until the step runs.
    """

    reqs: list[Req]
    positions: list[int]
    drafting: list[int]
    idle: list[int]
    verdicts: dict[int, list[Verdict]]
    drafted: list[int] = field(default_factory=list)
    narrow: torch.Tensor | None = None
    marked: DeviceRows | None = None

    @property
    def others(self) -> int:
        """Rows of unmarked requests."""
        return len(self.reqs) - len(self.drafting) - len(self.idle)

    @property
    def useful(self) -> bool:
        """Whether any row decodes."""
        return len(self.idle) < len(self.reqs)


@dataclass
class LaunchedPass:
    """A canonical pass whose result was not applied yet.

    Attributes:
        segments: what it carries, with the request of each.
        offsets: first index of each segment in the results; None where a segment decides nothing.
        results: canonical token of every deciding row, and the candidate that each of them judges (0 for
            prompts); ``n`` each.
        output_logits: logits of deciding rows by index, where log-probabilities are wanted.
        prompt_logits: logits of prompt rows by position and segment number, likewise.
    """

    segments: list[tuple[Segment, Req]]
    offsets: list[int | None]
    results: Results
    output_logits: dict[int, torch.Tensor]
    prompt_logits: list[tuple[int, int, torch.Tensor]]


class Runtime:
    """Deterministic decoding for one scheduler.

    Args:
        model_runner: SGLang's model runner, ready to run.
        config: window, group and policy.
        attention: factory of the row-invariant attention backend for the canonical pass.

    Attributes:
        canonical_passes: the passes that decide every deterministic token.
        admission: of which kind the next prefill batch is.
        weights_generation: how often the weights were updated since the start.
    """

    def __init__(self, model_runner: ModelRunner, config: Llm42Config, attention: AttentionFactory) -> None:
        lane = config.lane
        self.config = config
        self.device = model_runner.device
        self.policy = LanePolicy(lane)
        self.capacity = lane.capacity
        self.statistics = Statistics()
        self.admission = Admission()
        self.weights_generation = 0
        # Two units in the last place of the logits' dtype, relative.
        self._rounding = 2 * torch.finfo(model_runner.dtype).eps
        self.canonical_passes = canonical_passes_for(model_runner, lane, attention)
        # Ranks that look at their own clocks might disagree about which pass has ended.
        beside = config.overlap_verification and model_runner.ps.tp_size == 1
        self._stream = pass_stream(self.canonical_passes.full, beside)
        self._slot_guard = SlotGuard(model_runner.token_to_kv_pool_allocator)
        self._table = CandidateTable(
            model_runner.req_to_token_pool.req_to_token.shape[0], lane.capacity, self.device
        )
        self._sharing = PrefixSharing(model_runner.token_to_kv_pool)
        self._anything_canonical = False
        self._anybody_joined = False
        self._requests: dict[LaneRequest, Req] = {}
        self._launched: deque[LaunchedPass] = deque()
        self._step_number = 0
        self._sampling_step: DecodeStep | None = None
        self._rows_to_level: torch.Tensor | None = None
        self._last_rows: sampling.SamplingRows | None = None

    # Life of a request

    @property
    def num_running(self) -> int:
        """Deterministic requests that hold memory."""
        return len(self._requests)

    def admit(self, req: Req) -> None:
        """``req`` got memory for its known tokens; its missing canonical KV is the lane's to compute."""
        state = deterministic.of(req)
        assert state is not None
        self._requests[state.admit(req)] = req
        self._anything_canonical = True

    def share_prefix(self, adder: Any, req: Req) -> None:
        """The unmarked ``req`` is about to be admitted; see :meth:`PrefixSharing.offer`."""
        if self._anything_canonical:
            copied = self._sharing.offer(adder, req, self.weights_generation)
            self.statistics.shared_prefix_tokens += copied

    def allow_sizes(self, sizes: Iterable[int]) -> None:
        """Let smaller passes of ``sizes`` segments run, and no others; see :meth:`PassSizes.allow`."""
        self.canonical_passes.allow(sizes)
        self.policy.sizes = self.canonical_passes.sizes

    def slots_freed(self, req: Req) -> None:
        """Slots of ``req`` are about to be freed, all or some of them."""
        lane = self._lane(req)
        if lane is None or lane.in_flight == 0:
            return
        for launched in self._launched:
            self._slot_guard.freeing(launched.results)

    def joined(self, slots: int) -> None:
        """Marked requests were given ``slots`` slots and joined the running batch."""
        self._slot_guard.taken(slots)
        self._anybody_joined = True

    def before_forward(self, slots: int, prompts: bool) -> None:
        """A forward of SGLang is about to be launched; see :class:`SlotGuard` and :class:`PrefixSharing`."""
        self._slot_guard.before_forward(slots, prompts or self._sharing.pending)
        self._sharing.copy()

    def release(self, req: Req) -> None:
        """``req`` is about to give its memory back: finished, aborted or retracted."""
        state = deterministic.of(req)
        if state is None or state.lane is None:
            return
        self.slots_freed(req)
        if not state.lane.decoding:
            # The prompt was interrupted: only what stands in canonical KV may enter the cache.
            req.kv_committed_len = state.lane.canonical_end
        self._requests.pop(state.lane, None)
        state.leave()

    def note_candidate(self, req: Req, position: int, ends: bool, narrow: bool) -> None:
        """The host has seen the candidate of ``req`` at ``position``.

        One that may end the output is verified soon; one that won narrowly is first where there is room.
        """
        lane = self._lane(req)
        if lane is None or not lane.pending or lane.being_judged(position):
            return
        lane.urgent |= ends
        lane.doubtful |= narrow

    # One decode step

    def begin_step(self, reqs: Sequence[Req]) -> DecodeStep:
        """Apply the passes that are done and give every row of the batch its position."""
        self._step_number += 1
        self._apply_ended()
        step = DecodeStep(list(reqs), [0] * len(reqs), [], [], {})
        hold = self._decide_hold(reqs)
        if self._launched and (hold or not self._any_decodes(reqs)):
            # There is nothing to do beside the pass.
            self._apply_launched()
        for row, req in enumerate(reqs):
            self._place(step, row, req, hold)
        return step

    def _apply_ended(self) -> None:
        """Apply passes that have ended; those in front of decode always: ranks must not ask their clocks."""
        if not self._stream.beside or all(launched.results.ready() for launched in self._launched):
            self._apply_launched()

    def _apply_launched(self) -> None:
        """Apply the passes under way; the host waits for those that have not ended."""
        while self._launched:
            self._apply(self._launched.popleft())

    def wait_for_passes(self) -> None:
        """Return when no pass is under way on the device; its result is applied later."""
        for launched in self._launched:
            launched.results.read()

    def _any_decodes(self, reqs: Sequence[Req]) -> bool:
        """Whether a row of the batch can decode while a pass is under way."""
        for req in reqs:
            if deterministic.of(req) is None:
                return True
            lane = self._lane(req)
            if lane is not None and not req.finished() and lane.can_decode(self.capacity):
                return True
        return False

    def _decide_hold(self, reqs: Sequence[Req]) -> bool:
        """Whether this step should only run a pass; never if an unmarked request waits for its next token."""
        lanes = [lane for req in reqs if not req.finished() and (lane := self._lane(req)) is not None]
        unmarked = any(deterministic.of(req) is None for req in reqs)
        return not unmarked and self.policy.decide_hold(lanes)

    def _place(self, step: DecodeStep, row: int, req: Req, hold: bool) -> None:
        state = deterministic.of(req)
        if state is None:
            step.positions[row] = req.kv_committed_len
            return
        if state.verdicts:
            step.verdicts[row] = list(state.verdicts)
            state.verdicts.clear()
        lane = state.lane
        if lane is None or hold or req.finished() or not lane.can_decode(self.capacity):
            step.idle.append(row)
            return
        step.positions[row] = lane.decode_position
        step.drafting.append(row)

    def run_step(
        self,
        step: DecodeStep,
        batch: ScheduleBatch,
        decode: Callable[[], GenerationBatchResult],
    ) -> GenerationBatchResult:
        """Launch the next canonical pass, then run SGLang's decode over the batch.

        Args:
            step: what :meth:`begin_step` returned for this batch.
            batch: the batch, prepared for decoding at the step's positions.
            decode: SGLang's own forward and sampling of ``batch``.

        Returns:
            SGLang's result with the step attached as ``llm42``.
        """
        self._anybody_joined = False
        self._launch(step.useful)
        if step.useful:
            self._feed_candidates(step, batch)
            self._sampling_step = step
            result = decode()
            self.statistics.count_decode(len(step.drafting), step.others)
        else:
            result = empty_result(len(step.reqs), batch)
        result.llm42 = step
        return result

    def sample(
        self,
        logits_output: LogitsProcessorOutput,
        sample_batch: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Sample a decode batch: SGLang's sampler for all rows, then the canonical one for the marked.

        SGLang's sampler chooses one path for a whole batch and works in place, so the marked rows' logits
        are set aside first. Candidates drawn with the noise of verification usually survive it.
        """
        step, self._sampling_step = self._sampling_step, None
        if step is None:
            return sample_batch()
        self._rows_to_level = None if step.marked is None else step.marked.row
        # With a grammar SGLang samples only after the previous result, which may have ended a request.
        drafting = [row for row in step.drafting if self._lane(step.reqs[row]) is not None]
        if not drafting:
            return sample_batch()
        rows, pool, written = self._drafting_rows(step, drafting)
        logits = logits_output.next_token_logits[rows]
        token_ids = sample_batch()
        reqs = [step.reqs[row] for row in drafting]
        lanes = [lane for req in reqs if (lane := self._lane(req)) is not None]
        logits = self._process(logits, reqs, [lane.pending for lane in lanes])
        positions = written + 1
        drafted, margins = sampling.sample_with_margin(logits, self._decode_rows(reqs), positions)
        step.drafted, step.narrow = drafting, self._narrow(logits, drafted, margins)
        self._table.write(pool, positions, drafted)
        for lane in lanes:
            lane.drafted()
        token_ids[rows] = drafted.to(token_ids.dtype)
        return token_ids

    def _decode_rows(self, reqs: Sequence[Req]) -> sampling.SamplingRows:
        """Sampling parameters of a decode step's marked rows: mostly those of the step before."""
        params = tuple(_row_params(req) for req in reqs)
        if self._last_rows is None or self._last_rows.params != params:
            self._last_rows = sampling.SamplingRows.from_params(params, self.device)
        return self._last_rows

    def level_marked_rows(self, logits: torch.Tensor) -> None:
        """Make all tokens equal in the marked rows of a decode batch, once SGLang has processed its logits.

        What SGLang's sampler draws there is discarded, but a row without a token to draw would end it and the
        scheduler. SGLang's state of a marked request can leave it such a row: its grammar matcher follows
        committed tokens, its penalties count decode steps, and start from zero after a retraction.
        """
        rows, self._rows_to_level = self._rows_to_level, None
        if rows is not None:
            logits.index_fill_(0, rows, 0)

    def _narrow(self, logits: torch.Tensor, token_ids: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
        """Whether rounding alone might have given another token; bool ``[rows]``, on its way to the host."""
        size = logits.gather(1, token_ids[:, None])[:, 0].float().abs()
        return (margins <= size * self._rounding).to("cpu", non_blocking=True)

    def _feed_candidates(self, step: DecodeStep, batch: ScheduleBatch) -> None:
        """Put the last candidate of every drafting row, and padding for idle rows, into the batch's input."""
        rows = step.drafting + step.idle
        if not rows:
            return
        step.marked = self._device_rows(step, rows)
        token_ids = self._table.read(step.marked.pool, step.marked.position)
        token_ids[len(step.drafting) :] = 0
        batch.input_ids = batch.input_ids.clone()
        batch.input_ids[step.marked.row] = token_ids.to(batch.input_ids.dtype)

    def _drafting_rows(self, step: DecodeStep, drafting: Sequence[int]) -> DeviceRows:
        """The rows ``drafting``: those that the step put on the device, unless a request has ended since."""
        if step.marked is not None and len(drafting) == len(step.drafting):
            return step.marked.first(len(drafting))
        return self._device_rows(step, drafting)

    def _device_rows(self, step: DecodeStep, rows: Sequence[int]) -> DeviceRows:
        """In one copy: on a GPU each costs more than what it carries."""
        pools = [step.reqs[row].req_pool_idx for row in rows]
        positions = [step.positions[row] for row in rows]
        return DeviceRows(*to_device([list(rows), pools, positions], self.device, torch.int64))

    # Canonical passes

    def launch_joined(self) -> None:
        """Begin with prompts that have just joined, unless a pass is under way: this turn computes a prefill
        batch, and more may follow before the next decode step."""
        joined, self._anybody_joined = self._anybody_joined, False
        if joined:
            self._apply_ended()
            self._launch(can_decode=True)

    def _launch(self, can_decode: bool) -> None:
        live = [lane for lane, req in self._requests.items() if not req.finished()]
        if self._launched:
            self.policy.update_due(live, self._step_number)
            return
        segments = self.policy.plan(live, self._step_number, can_decode)
        if not segments:
            return
        owned = [(segment, self._requests[segment.request]) for segment in segments]
        with self._stream.launching():
            logits = self.canonical_passes.run([self._pass_segment(*item) for item in owned], self._table)
            self._launched.append(self._judge(owned, logits))
        rows = self.policy.size_for(len(segments)) * self.config.window_size
        self.statistics.count_pass(segments, rows)

    def _pass_segment(self, segment: Segment, req: Req) -> PassSegment:
        known = segment.kind is SegmentKind.PROMPT
        end = segment.start + segment.rows
        token_ids = req.full_untruncated_fill_ids[segment.start : end] if known else ()
        return PassSegment(segment.kind, req.req_pool_idx, segment.start, token_ids, segment.rows)

    def _judge(self, owned: list[tuple[Segment, Req]], logits: torch.Tensor) -> LaunchedPass:
        """Sample the canonical token of every row that decides something."""
        offsets: list[int | None] = []
        firsts: list[tuple[int, int, int, int]] = []
        deciders: list[Req] = []
        counts: list[int] = []
        earlier: list[int] = []
        for g, (segment, req) in enumerate(owned):
            rows = _deciding_rows(segment)
            offsets.append(len(earlier) if rows else None)
            if not rows:
                continue
            firsts.append((g, rows.start, segment.start + rows.start + 1, req.req_pool_idx))
            deciders.append(req)
            counts.append(len(rows))
            # A row that is judged follows candidates; the end of a prompt follows none.
            earlier += rows if segment.kind is SegmentKind.VERIFY else [0]
        reqs = [req for req, count in zip(deciders, counts, strict=True) for _ in range(count)]
        prompt_logits = [
            (g, segment.start + row, logits[g, row].clone())
            for g, (segment, req) in enumerate(owned)
            for row in logprobs.prompt_rows(segment, req)
        ]
        group, row, position, pool = to_device(consecutive_rows(firsts, counts), self.device)
        deciding = self._process(logits[group, row], reqs, earlier)
        output_logits = {i: deciding[i] for i, req in enumerate(reqs) if logprobs.wants_output(req)}
        judged = sampling.sample(deciding, sampling_rows(deciders, self.device, counts), position)
        drafted = self._table.read(pool, position)
        results = self._stream.results((judged, drafted))
        return LaunchedPass(owned, offsets, results, output_logits, prompt_logits)

    def _process(self, logits: torch.Tensor, reqs: Sequence[Req], earlier: Sequence[int]) -> torch.Tensor:
        """Apply penalties, grammars and the like to rows that need it.

        Args:
            logits: one row per entry of ``reqs``, ours to change.
            earlier: number of candidates in front of each row.

        Returns:
            The logits to sample from: ``logits`` itself, or its float32 copy.
        """
        spans = [
            span for span in _request_spans(reqs, earlier) if logit_processing.required(reqs[span.start])
        ]
        if not spans:
            return logits
        logits = logits.float()
        logit_processing.apply(
            [
                self._request_rows(logits[span.start : span.stop], reqs[span.start], earlier[span.start])
                for span in spans
            ]
        )
        return logits

    def _request_rows(self, logits: torch.Tensor, req: Req, earlier: int) -> logit_processing.RequestRows:
        """Rows of ``req`` behind ``earlier``, ``earlier`` + 1 and so on of its candidates."""
        state = deterministic.of(req)
        assert state is not None and state.lane is not None
        if state.stop_tokens is None:
            state.stop_tokens = logit_processing.stop_tokens(req)
        first = (state.lane.base if state.lane.base is not None else state.lane.known_end) + 1
        positions = torch.arange(first, first + earlier + len(logits) - 1, device=self.device)
        candidates = self._table.read(torch.full_like(positions, req.req_pool_idx), positions)
        return logit_processing.RequestRows(
            logits, req, state.decided, candidates, earlier, state.matcher, state.stop_tokens
        )

    @staticmethod
    def _lane(req: Req) -> LaneRequest | None:
        state = deterministic.of(req)
        return None if state is None else state.lane

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
            self.statistics.count_verdict(verdict)
            if matched < segment.rows:
                assert lane.base is not None
                corrected.append((req.req_pool_idx, lane.base, tokens[-1]))
        if corrected:
            pool, position, token = to_device(corrected, self.device).T
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


def sampling_rows(
    reqs: Sequence[Req], device: Any, counts: Sequence[int] | None = None
) -> sampling.SamplingRows:
    """Sampling parameters of one row per entry of ``reqs`` or, with ``counts``, of so many per entry."""
    return sampling.SamplingRows.from_params([_row_params(req) for req in reqs], device, counts)


def consecutive_rows(firsts: Sequence[tuple[int, int, int, int]], counts: Sequence[int]) -> torch.Tensor:
    """Rows of several segments in sequence, on the host.

    Args:
        firsts: of each segment its number, and row, position and pool index of its first row.
        counts: how many rows follow each other there, at least one.

    Returns:
        Segment, row, position and pool index of every row; int64 ``[4, rows]``, contiguous.
    """
    repeats = torch.tensor(counts, dtype=torch.int64)
    rows = torch.tensor(firsts, dtype=torch.int64).reshape(-1, 4).repeat_interleave(repeats, 0)
    begins = repeats.cumsum(0) - repeats
    rows[:, 1:3] += (torch.arange(len(rows)) - begins.repeat_interleave(repeats))[:, None]
    return rows.T.contiguous()


def _request_spans(reqs: Sequence[Req], earlier: Sequence[int]) -> list[range]:
    """Rows that belong to one request and have one candidate more in front of each."""
    spans: list[range] = []
    for row, req in enumerate(reqs):
        if spans and reqs[row - 1] is req and earlier[row] == earlier[row - 1] + 1:
            spans[-1] = range(spans[-1].start, row + 1)
        else:
            spans.append(range(row, row + 1))
    return spans


def _row_params(req: Req) -> sampling.RowParams:
    state = deterministic.of(req)
    assert state is not None
    if state.row_params is None:
        params = req.sampling_params
        state.row_params = sampling.RowParams(
            params.temperature, params.top_k, params.top_p, params.min_p, state.seed
        )
    return state.row_params


def _deciding_rows(segment: Segment) -> range:
    """Rows of ``segment`` whose canonical token matters."""
    if segment.kind is SegmentKind.VERIFY:
        return range(segment.rows)
    return range(segment.rows - 1, segment.rows) if segment.finishes_prompt else range(0)


def empty_result(rows: int, batch: ScheduleBatch) -> GenerationBatchResult:
    """The result of a step in which no row decodes."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.utils import GenerationBatchResult

    logits_output = LogitsProcessorOutput(next_token_logits=None)
    if batch.return_logprob:
        # SGLang converts these for every row; marked rows take theirs from canonical logits.
        logits_output.next_token_logprobs = torch.zeros(rows, device=batch.device)
    return GenerationBatchResult(
        logits_output=logits_output,
        next_token_ids=torch.zeros(rows, dtype=torch.int64, device=batch.device),
    )
