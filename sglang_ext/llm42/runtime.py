"""The scheduler-side engine of LLM-42: one per scheduler process.

Each decode step of a batch that holds deterministic requests goes through three calls:

1. :meth:`Runtime.begin_step`, before SGLang allocates memory: results of finished canonical passes are
   applied, then every row of the batch gets the position that it decodes at.
2. :meth:`Runtime.run_step`, in place of the forward: the next canonical pass is launched, then SGLang's own
   decode runs over the whole batch, marked and unmarked rows alike. Its forward may be a canonical one
   (:meth:`Runtime.decode_forward`): what that decides is final.
3. :func:`sglang_ext.llm42.commit.commit`, when SGLang processes a step's result: the tokens that passes and
   canonical steps have decided by then are committed one at a time.

All decisions follow from values on the host that are equal on every tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42.admission import Admission
from sglang_ext.llm42.attention import block_rows
from sglang_ext.llm42.canonical_decode import canonical_decode_for
from sglang_ext.llm42.canonical_graph import canonical_passes_for
from sglang_ext.llm42.canonical_pass import AttentionFactory, CandidateTable
from sglang_ext.llm42.config import Llm42Config
from sglang_ext.llm42.drafting import DecodeStep, Drafting
from sglang_ext.llm42.lane import LanePolicy, LaneRequest
from sglang_ext.llm42.pass_stream import SlotGuard, pass_stream
from sglang_ext.llm42.prefix_sharing import PrefixSharing
from sglang_ext.llm42.request import DeterministicRequest
from sglang_ext.llm42.statistics import Statistics
from sglang_ext.llm42.verification import Verification

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class _Row(NamedTuple):
    """A request of a decode batch.

    Attributes:
        state: None if it is unmarked.
        lane: None if it is unmarked, holds no memory or has finished.
    """

    req: Req
    state: DeterministicRequest | None
    lane: LaneRequest | None

    @classmethod
    def of(cls, req: Req) -> _Row:
        state = deterministic.of(req)
        return cls(req, state, None if state is None or req.finished() else state.lane)


class Runtime:
    """Deterministic decoding for one scheduler.

    Args:
        model_runner: SGLang's model runner, ready to run.
        config: window, group and policy.
        attention: factory of the row-invariant attention backend for the canonical pass.

    Attributes:
        verification: the canonical passes that decide deterministic tokens.
        canonical_decode: the decode steps that do, None where there are none.
        drafting: candidates of decode steps.
        statistics: counters.
        admission: of which kind the next prefill batch is.
        weights_generation: how often the weights were updated since the start.
    """

    def __init__(self, model_runner: ModelRunner, config: Llm42Config, attention: AttentionFactory) -> None:
        lane = config.lane(block_rows(model_runner.device, config.window_size))
        self.config = config
        self.statistics = Statistics()
        self.admission = Admission()
        self.weights_generation = 0
        passes = canonical_passes_for(model_runner, lane, attention)
        # Ranks that look at their own clocks might disagree about which pass has ended.
        beside = config.overlap_verification and model_runner.ps.tp_size == 1
        stream = pass_stream(passes.full, beside)
        pool_rows = model_runner.req_to_token_pool.req_to_token.shape[0]
        table = CandidateTable(pool_rows, lane.capacity, model_runner.device)
        self._policy = LanePolicy(lane)
        self._capacity = lane.capacity
        self.verification = Verification(passes, self._policy, stream, table, self.statistics)
        self.drafting = Drafting(table, model_runner.device, model_runner.dtype)
        self.canonical_decode = canonical_decode_for(model_runner, config)
        self._forward_stream: Any = model_runner.forward_stream if model_runner.device == "cuda" else None
        self._canonical_step: DecodeStep | None = None
        self._slot_guard = SlotGuard(model_runner.token_to_kv_pool_allocator)
        self._sharing = PrefixSharing(model_runner.token_to_kv_pool)
        self._anything_canonical = False
        self._anybody_joined = False
        self._requests: dict[LaneRequest, Req] = {}
        self._step_number = 0

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

    def slots_freed(self, req: Req) -> None:
        """Slots of ``req`` are about to be freed, all or some of them."""
        lane = deterministic.lane_of(req)
        if lane is None or lane.in_flight == 0:
            return
        if (under_way := self.verification.under_way) is not None:
            self._slot_guard.freeing(under_way)

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
        lane = deterministic.lane_of(req)
        if lane is None or not lane.pending or lane.being_judged(position):
            return
        lane.urgent |= ends
        lane.doubtful |= narrow

    # One decode step

    def begin_step(self, reqs: Sequence[Req]) -> DecodeStep:
        """Apply the pass that is done and give every row of the batch its position."""
        self._step_number += 1
        self.verification.apply_ended()
        rows = [_Row.of(req) for req in reqs]
        step = DecodeStep(list(reqs), [0] * len(reqs), [], [], self._choose_size(rows))
        self._settle(step, rows)
        step.held = self._decide_hold(rows)
        if step.held:
            self.verification.make_room()
        while self.verification.under_way is not None and not (step.held or self._any_decodes(step, rows)):
            # There is nothing to do beside the pass.
            self.verification.apply_oldest()
        for number, row in enumerate(rows):
            self._place(step, number, row)
        return step

    def _choose_size(self, rows: Sequence[_Row]) -> int | None:
        """Rows of the step if it is to be canonical, else None: also where an unmarked request wants what a
        canonical pass does not compute, hidden states or the positions of images."""
        if self.canonical_decode is None:
            return None
        if any(req.return_hidden_states or req.multimodal_inputs is not None for req, _, _ in rows):
            return None
        decidable = longest = total = 0
        for req, state, lane in rows:
            if state is not None and lane is not None:
                decidable += state.decidable and lane.decoding and not lane.complete
            longest = max(longest, req.kv_committed_len)
            total += req.kv_committed_len
        return self.canonical_decode.policy.choose(len(rows), decidable, longest, total)

    def _settle(self, step: DecodeStep, rows: Sequence[_Row]) -> None:
        """Have the candidates verified of rows that ``step`` could decide, if no pass is under way.

        Their pass is launched before the step, not with it: a row that drafted beside the launch would have a
        candidate left when the pass ends, and so forever.
        """
        if step.size is None or self.verification.under_way is not None:
            return
        unsettled = [
            row.lane for row in rows if row.lane is not None and row.lane.pending and _may_decide(step, row)
        ]
        for lane in unsettled:
            lane.urgent = True
        if unsettled:
            if self._forward_stream is not None:
                # The decode step before, which wrote the candidates, may still run, on another stream than
                # the one on which SGLang prepares this step.
                torch.cuda.current_stream().wait_stream(self._forward_stream)
            self.verification.launch(self._requests, self._step_number, can_decode=True)

    def _any_decodes(self, step: DecodeStep, rows: Sequence[_Row]) -> bool:
        """Whether a row of the batch can decode while a pass is under way."""
        return any(row.state is None or self._can_decode(step, row) for row in rows)

    def _can_decode(self, step: DecodeStep, row: _Row) -> bool:
        """Whether a deterministic row can decode in ``step``.

        In a canonical one those that may decide wait while their candidates are verified: then they are
        settled, while they would not be if they went on drafting.
        """
        if row.lane is None or not row.lane.can_decode(self._capacity):
            return False
        return not _may_decide(step, row) or row.lane.in_flight == 0

    def _decide_hold(self, rows: Sequence[_Row]) -> bool:
        """Whether this step should only run a pass; never if an unmarked request waits for its next token."""
        if any(row.state is None for row in rows):
            return False
        return self._policy.decide_hold(row.lane for row in rows if row.lane is not None)

    def _place(self, step: DecodeStep, number: int, row: _Row) -> None:
        req, state, lane = row
        if state is None:
            step.positions[number] = req.kv_committed_len
            return
        if lane is None or step.held:
            step.idle.append(number)
            return
        if not self._can_decode(step, row):
            step.idle.append(number)
            return
        step.positions[number] = lane.decode_position
        step.drafting.append(number)
        if _may_decide(step, row) and lane.settled:
            step.deciding.add(number)

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
        self.verification.launch(self._requests, self._step_number, step.useful, behind=step.held)
        if step.useful:
            self.drafting.feed(step, batch)
            self._canonical_step = None if step.size is None else step
            try:
                result = decode()
            finally:
                self._canonical_step = None
            deciding = None if step.size is None else len(step.deciding)
            self.statistics.count_decode(len(step.drafting), step.others, deciding)
        else:
            result = empty_result(len(step.reqs), batch)
        result.llm42 = step
        return result

    def decode_forward(self, batch: ForwardBatch) -> LogitsProcessorOutput | None:
        """The forward of the step that is running if it is canonical; None for SGLang's own."""
        step, self._canonical_step = self._canonical_step, None
        if step is None or step.size is None:
            return None
        assert self.canonical_decode is not None and batch.batch_size == len(step.positions)
        return self.canonical_decode.forward(step.size, batch, step.positions)

    def launch_joined(self) -> None:
        """Begin with prompts that have just joined, unless a pass is under way: this turn computes a prefill
        batch, and more may follow before the next decode step."""
        joined, self._anybody_joined = self._anybody_joined, False
        if joined:
            self.verification.apply_ended()
            self.verification.launch(self._requests, self._step_number, can_decode=True)


def _may_decide(step: DecodeStep, row: _Row) -> bool:
    """Whether the token of ``row`` is final if ``step`` runs it on canonical keys and values."""
    return step.size is not None and row.state is not None and row.state.decidable


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
