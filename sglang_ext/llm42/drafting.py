"""Candidates: what marked rows feed into a decode step of SGLang's, and what is drawn from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_ext.llm42 import logprobs, marked_rows, sampling
from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42.transfer import to_device

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_ext.llm42.canonical_pass import CandidateTable


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
        drafting: rows that draft a candidate, or decide a token.
        idle: rows that have nothing to decode: prompt unfinished, or enough candidates waiting.
        size: rows that are computed if the step is canonical, else None.
        deciding: the drafting rows of a canonical step whose token is final.
        held: whether nobody decodes, so that passes follow each other.
        drafted: rows that did draw a token, once they have.
        narrow: of each of these, whether its candidate won narrowly, bool ``[len(drafted)]`` on the host,
            complete when SGLang has the step's result there.
        marked: the drafting rows, then the idle ones, on the device; None until the step runs.
        decided_logits: by row, logits ``[vocabulary]`` of deciding rows that report log-probabilities.
    """

    reqs: list[Req]
    positions: list[int]
    drafting: list[int]
    idle: list[int]
    size: int | None = None
    deciding: set[int] = field(default_factory=set)
    held: bool = False
    drafted: list[int] = field(default_factory=list)
    narrow: torch.Tensor | None = None
    marked: DeviceRows | None = None
    decided_logits: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def others(self) -> int:
        """Rows of unmarked requests."""
        return len(self.reqs) - len(self.drafting) - len(self.idle)

    @property
    def useful(self) -> bool:
        """Whether any row decodes."""
        return len(self.idle) < len(self.reqs)


class Drafting:
    """Feeds and samples the marked rows of one decode step after the other.

    Args:
        table: where candidates are kept.
        device: of the model.
        dtype: of its logits.
    """

    def __init__(self, table: CandidateTable, device: torch.device | str, dtype: torch.dtype) -> None:
        self._table = table
        self._device = device
        # Two units in the last place, relative.
        self._rounding = 2 * torch.finfo(dtype).eps
        self._sampling_step: DecodeStep | None = None
        self._rows_to_level: torch.Tensor | None = None
        self._last_rows: sampling.SamplingRows | None = None

    def feed(self, step: DecodeStep, batch: ScheduleBatch) -> None:
        """Put the last candidate of every drafting row, and padding for idle rows, into the batch's input."""
        self._sampling_step = step
        rows = step.drafting + step.idle
        if not rows:
            return
        step.marked = self._device_rows(step, rows)
        token_ids = self._table.read(step.marked.pool, step.marked.position)
        token_ids[len(step.drafting) :] = 0
        batch.input_ids = batch.input_ids.clone()
        batch.input_ids[step.marked.row] = token_ids.to(batch.input_ids.dtype)

    def sample(
        self,
        logits_output: LogitsProcessorOutput,
        sample_batch: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Sample a decode batch: SGLang's sampler for all rows, then the canonical one for the marked.

        SGLang's sampler chooses one path for a whole batch and works in place, so the marked rows' logits
        are set aside first. Candidates drawn with the noise of verification usually survive it; a deciding
        row of a canonical step has the bits of verification, too, so that what is drawn there is final.
        """
        step, self._sampling_step = self._sampling_step, None
        if step is None:
            return sample_batch()
        self._rows_to_level = None if step.marked is None else step.marked.row
        # With a grammar SGLang samples only after the previous result, which may have ended a request.
        drafting = [row for row in step.drafting if deterministic.lane_of(step.reqs[row]) is not None]
        if not drafting:
            return sample_batch()
        rows, pool, written = self._drafting_rows(step, drafting)
        logits = logits_output.next_token_logits[rows]
        token_ids = sample_batch()
        reqs = [step.reqs[row] for row in drafting]
        lanes = [lane for req in reqs if (lane := deterministic.lane_of(req)) is not None]
        logits = marked_rows.process(logits, reqs, [lane.pending for lane in lanes], self._table)
        positions = written + 1
        drafted, margins = sampling.sample_with_margin(logits, self._decode_rows(reqs), positions)
        step.drafted, step.narrow = drafting, self._narrow(logits, drafted, margins)
        self._table.write(pool, positions, drafted)
        for index, (row, lane) in enumerate(zip(drafting, lanes, strict=True)):
            if row not in step.deciding:
                lane.drafted()
                continue
            lane.decoded()
            if logprobs.wants_output(step.reqs[row]):
                # A copy: a view would keep the logits of all rows.
                step.decided_logits[row] = logits[index].clone()
        token_ids[rows] = drafted.to(token_ids.dtype)
        return token_ids

    def _decode_rows(self, reqs: Sequence[Req]) -> sampling.SamplingRows:
        """Sampling parameters of a decode step's marked rows: mostly those of the step before."""
        params = tuple(marked_rows.row_params(req) for req in reqs)
        if self._last_rows is None or self._last_rows.params != params:
            self._last_rows = sampling.SamplingRows.from_params(params, self._device)
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

    def _drafting_rows(self, step: DecodeStep, drafting: Sequence[int]) -> DeviceRows:
        """The rows ``drafting``: those that the step put on the device, unless a request has ended since."""
        if step.marked is not None and len(drafting) == len(step.drafting):
            return step.marked.first(len(drafting))
        return self._device_rows(step, drafting)

    def _device_rows(self, step: DecodeStep, rows: Sequence[int]) -> DeviceRows:
        """In one copy: on a GPU each costs more than what it carries."""
        pools = [step.reqs[row].req_pool_idx for row in rows]
        positions = [step.positions[row] for row in rows]
        return DeviceRows(*to_device([list(rows), pools, positions], self._device, torch.int64))
