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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42 import sampling
from sglang_ext.llm42.canonical_pass import AttentionFactory, CandidateTable, CanonicalPass, PassSegment
from sglang_ext.llm42.config import Llm42Config
from sglang_ext.llm42.lane import LanePolicy, LaneRequest, Segment, SegmentKind, leading_matches
from sglang_ext.llm42.request import Verdict
from sglang_ext.llm42.statistics import Statistics

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass
class DecodeStep:
    """One decode step of a batch with deterministic requests.

    Attributes:
        reqs: the batch's requests, row by row.
        positions: position at which each row writes KV; 0 for an idle row.
        drafting: rows that draft a candidate.
        idle: rows that have nothing to decode: prompt unfinished, or enough candidates waiting.
        verdicts: what passes decided since the last step, by row.
    """

    reqs: list[Req]
    positions: list[int]
    drafting: list[int]
    idle: list[int]
    verdicts: dict[int, list[Verdict]]

    @property
    def useful(self) -> bool:
        """Whether any row decodes."""
        return len(self.idle) < len(self.reqs)


@dataclass
class LaunchedPass:
    """A canonical pass whose result was not applied yet.

    Attributes:
        segments: what it carries, with the request of each.
        offsets: first index of each segment in ``judged``; None where a segment decides nothing.
        judged: canonical token of every deciding row, shape ``[n]``.
        candidates: the candidate that each of these rows judges (0 for prompts), shape ``[n]``.
    """

    segments: list[tuple[Segment, Req]]
    offsets: list[int | None]
    judged: torch.Tensor
    candidates: torch.Tensor


class Runtime:
    """Deterministic decoding for one scheduler.

    Args:
        model_runner: SGLang's model runner, ready to run.
        config: window, group and policy.
        attention: factory of the row-invariant attention backend for the canonical pass.
    """

    def __init__(self, model_runner: ModelRunner, config: Llm42Config, attention: AttentionFactory) -> None:
        lane = config.lane
        self.config = config
        self.device = model_runner.device
        self.policy = LanePolicy(lane)
        self.capacity = lane.capacity
        self.statistics = Statistics()
        self._pass = CanonicalPass(model_runner, lane, attention)
        self._table = CandidateTable(
            model_runner.req_to_token_pool.req_to_token.shape[0], lane.capacity, self.device
        )
        self._req_to_token = model_runner.req_to_token_pool.req_to_token
        self._requests: dict[LaneRequest, Req] = {}
        self._launched: deque[LaunchedPass] = deque()
        self._step_number = 0
        self._sampling_step: DecodeStep | None = None

    # Life of a request

    def admit(self, req: Req) -> None:
        """``req`` got memory for its known tokens; its missing canonical KV is the lane's to compute."""
        state = deterministic.of(req)
        assert state is not None
        self._requests[state.admit(req)] = req

    def release(self, req: Req) -> None:
        """``req`` is about to give its memory back: finished, aborted or retracted."""
        state = deterministic.of(req)
        if state is None or state.lane is None:
            return
        if not state.lane.decoding:
            # The prompt was interrupted: only what stands in canonical KV may enter the cache.
            req.kv_committed_len = state.lane.canonical_end
        self._requests.pop(state.lane, None)
        state.leave()

    def note_candidate(self, req: Req, ends: bool) -> None:
        """The host has seen a candidate of ``req``; one that may end the output is verified soon."""
        state = deterministic.of(req)
        if ends and state is not None and state.lane is not None and state.lane.pending:
            state.lane.urgent = True

    # One decode step

    def begin_step(self, reqs: Sequence[Req]) -> DecodeStep:
        """Apply the passes that are done and give every row of the batch its position."""
        self._step_number += 1
        while self._launched:
            self._apply(self._launched.popleft())
        step = DecodeStep(list(reqs), [0] * len(reqs), [], [], {})
        for row, req in enumerate(reqs):
            self._place(step, row, req)
        return step

    def _place(self, step: DecodeStep, row: int, req: Req) -> None:
        state = deterministic.of(req)
        if state is None:
            step.positions[row] = req.kv_committed_len
            return
        if state.verdicts:
            step.verdicts[row] = list(state.verdicts)
            state.verdicts.clear()
        lane = state.lane
        if lane is None or req.finished() or not lane.can_decode(self.capacity):
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
        self._launch(step)
        if step.useful:
            self._feed_candidates(step, batch)
            self._sampling_step = step
            result = decode()
            self.statistics.decode_steps += 1
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
        if step is None or not step.drafting:
            return sample_batch()
        rows = torch.tensor(step.drafting, device=self.device)
        logits = logits_output.next_token_logits[rows].clone()
        token_ids = sample_batch()
        reqs = [step.reqs[row] for row in step.drafting]
        positions = torch.tensor([step.positions[row] + 1 for row in step.drafting], device=self.device)
        drafted = sampling.sample(logits, sampling_rows(reqs, self.device), positions)
        pool = torch.tensor([req.req_pool_idx for req in reqs], device=self.device)
        self._table.write(pool, positions, drafted)
        for req in reqs:
            lane = deterministic.of(req).lane  # type: ignore[union-attr]
            if lane is not None:
                lane.drafted()
        token_ids[rows] = drafted.to(token_ids.dtype)
        return token_ids

    def _feed_candidates(self, step: DecodeStep, batch: ScheduleBatch) -> None:
        """Put the last candidate of every drafting row, and padding for idle rows, into the batch's input."""
        rows = step.drafting + step.idle
        if not rows:
            return
        pool = torch.tensor([step.reqs[r].req_pool_idx for r in rows], device=self.device)
        positions = torch.tensor([step.positions[r] for r in rows], device=self.device)
        token_ids = self._table.read(pool, positions)
        token_ids[len(step.drafting) :] = 0
        batch.input_ids = batch.input_ids.clone()
        batch.input_ids[torch.tensor(rows, device=self.device)] = token_ids.to(batch.input_ids.dtype)

    # Canonical passes

    def _launch(self, step: DecodeStep) -> None:
        live = [lane for lane, req in self._requests.items() if not req.finished()]
        segments = self.policy.plan(live, self._step_number, can_decode=step.useful)
        if not segments:
            return
        owned = [(segment, self._requests[segment.request]) for segment in segments]
        logits = self._pass.run([self._pass_segment(*item) for item in owned], self._table)
        self._launched.append(self._judge(owned, logits))
        self.statistics.count_pass(segments, self.config.lane.rows)

    def _pass_segment(self, segment: Segment, req: Req) -> PassSegment:
        known = segment.kind is SegmentKind.PROMPT
        end = segment.start + segment.rows
        token_ids = req.full_untruncated_fill_ids[segment.start : end] if known else ()
        return PassSegment(segment.kind, req.req_pool_idx, segment.start, token_ids, segment.rows)

    def _judge(self, owned: list[tuple[Segment, Req]], logits: torch.Tensor) -> LaunchedPass:
        """Sample the canonical token of every row that decides something."""
        offsets: list[int | None] = []
        index: list[tuple[int, int]] = []
        positions: list[int] = []
        pools: list[int] = []
        reqs: list[Req] = []
        for g, (segment, req) in enumerate(owned):
            rows = _deciding_rows(segment)
            offsets.append(len(index) if rows else None)
            index += [(g, row) for row in rows]
            positions += [segment.start + row + 1 for row in rows]
            pools += [req.req_pool_idx] * len(rows)
            reqs += [req] * len(rows)
        where = torch.tensor(index, dtype=torch.int64, device=self.device).reshape(-1, 2)
        position = torch.tensor(positions, dtype=torch.int64, device=self.device)
        judged = sampling.sample(logits[where[:, 0], where[:, 1]], sampling_rows(reqs, self.device), position)
        pool = torch.tensor(pools, dtype=torch.int64, device=self.device)
        return LaunchedPass(owned, offsets, judged, self._table.read(pool, position))

    def _apply(self, launched: LaunchedPass) -> None:
        judged, candidates = launched.judged.tolist(), launched.candidates.tolist()
        corrected: list[tuple[int, int, int]] = []
        for (segment, req), offset in zip(launched.segments, launched.offsets, strict=True):
            lane = segment.request
            state = deterministic.of(req)
            if state is None or state.lane is not lane:
                continue  # released or retracted meanwhile
            if segment.kind is SegmentKind.PROMPT:
                if lane.prompt_done(segment.rows):
                    assert offset is not None
                    state.verdicts.append(Verdict((judged[offset],), 0, 0, ends_prefill=True))
                    corrected.append((req.req_pool_idx, lane.known_end, judged[offset]))
                continue
            assert offset is not None
            window = slice(offset, offset + segment.rows)
            matched = leading_matches(candidates[window], judged[window])
            outstanding = lane.pending
            committed = lane.verify_done(segment.rows, matched)
            tokens = tuple(judged[window][:committed])
            verdict = Verdict(tokens, matched, outstanding, ends_prefill=False)
            state.verdicts.append(verdict)
            self.statistics.count_verdict(verdict)
            if matched < segment.rows:
                assert lane.base is not None
                corrected.append((req.req_pool_idx, lane.base, tokens[-1]))
        if corrected:
            pool, position, token = torch.tensor(corrected, device=self.device).T
            self._table.write(pool, position, token)


def sampling_rows(reqs: Sequence[Req], device: Any) -> sampling.SamplingRows:
    """Sampling parameters of one row per entry of ``reqs`` (a request may stand there several times)."""
    params = [req.sampling_params for req in reqs]
    return sampling.SamplingRows.from_lists(
        temperatures=[p.temperature for p in params],
        top_ks=[p.top_k for p in params],
        top_ps=[p.top_p for p in params],
        min_ps=[p.min_p for p in params],
        seeds=[deterministic.of(req).seed for req in reqs],  # type: ignore[union-attr]
        device=device,
    )


def _deciding_rows(segment: Segment) -> range:
    """Rows of ``segment`` whose canonical token matters."""
    if segment.kind is SegmentKind.VERIFY:
        return range(segment.rows)
    return range(segment.rows - 1, segment.rows) if segment.finishes_prompt else range(0)


def empty_result(rows: int, batch: ScheduleBatch) -> GenerationBatchResult:
    """The result of a step in which no row decodes."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.utils import GenerationBatchResult

    return GenerationBatchResult(
        logits_output=LogitsProcessorOutput(next_token_logits=None),
        next_token_ids=torch.zeros(rows, dtype=torch.int64, device=batch.device),
    )
