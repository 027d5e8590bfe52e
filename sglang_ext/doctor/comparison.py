"""Comparing what trials computed, position by position, and finding the operator that differs first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sglang_ext.doctor.operators import ATTENTION, Event
from sglang_ext.doctor.probes import Placement, Trial
from sglang_ext.doctor.report import Difference, OperatorReport
from sglang_ext.llm42.lane import first_rows

#: Name in the report of the pass as a whole: its logits.
WHOLE_PASS = "canonical pass"

#: Name in the report of arithmetic in a model's own code, outside of its modules.
BETWEEN = "between modules"


@dataclass
class _Seen:
    """What was first computed for the positions of one sequence.

    ``known`` bool ``[length]``; ``logits`` int64 ``[length]``; ``operators`` int64 ``[3, events, length]``:
    inputs, outputs and this rank's own inputs, empty without operators.
    """

    known: torch.Tensor
    logits: torch.Tensor
    operators: torch.Tensor


@dataclass
class _Tally:
    """Running figures of one operator."""

    comparisons: int = 0
    differences: int = 0
    first: Difference | None = None


@dataclass
class _Rows:
    """Where some consecutive rows of a pass belong."""

    trial: Trial
    segment: int
    placement: Placement
    first_row: int

    def difference(self, offset: int, where: str) -> Difference:
        return Difference(
            perturbation=self.trial.name,
            where=where,
            position=self.placement.start + offset,
            segment=self.segment,
            row=offset,
            segment_start=self.placement.start,
        )


@dataclass
class Comparison:
    """Compares each computed position with its first computation.

    Args:
        length: positions that a sequence may have.
        block_rows: rows of a block of the pass.
    """

    length: int
    block_rows: int
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _tallies: dict[str, _Tally] = field(default_factory=dict)
    _events: list[tuple[str, str]] = field(default_factory=list)
    _failed: list[str] = field(default_factory=list)

    def add_pass(
        self,
        trial: Trial,
        placements: Sequence[Placement],
        logits: torch.Tensor,
        events: Sequence[Event],
        taints: dict[int, torch.Tensor],
    ) -> None:
        """Take the results of one pass.

        Args:
            logits: int64 digests of the logits of all rows.
            events: the operators of the pass, or none where they were not recorded.
            taints: by request of the trial, the attention calls in whose prefix something differed; updated.

        Raises:
            RuntimeError: the pass ran other operators than the first one.
        """
        self._check_events(events)
        operators = _stacked(events, len(logits))
        firsts = first_rows((placement.rows for placement in placements), self.block_rows)
        for segment, (placement, first) in enumerate(zip(placements, firsts, strict=False)):
            rows = _Rows(trial, segment, placement, first)
            here = slice(rows.first_row, rows.first_row + placement.rows)
            taint = taints.setdefault(placement.request, torch.zeros(len(events), dtype=torch.bool))
            sequence = trial.requests[placement.request].sequence
            self._add_rows(rows, sequence, logits[here], operators[..., here], events, taint)

    def reports(self) -> list[OperatorReport]:
        """A report per operator, in order of their first call, and one of the pass as a whole."""
        return [
            OperatorReport(name, tally.comparisons, tally.differences, tally.first)
            for name, tally in self._tallies.items()
        ]

    def faulty(self) -> str | None:
        """The operator at fault that was met first, the pass as a whole where none is; None if all agrees."""
        operators = [operator for operator in self._failed if operator != WHOLE_PASS]
        return next(iter(operators or self._failed), None)

    def _check_events(self, events: Sequence[Event]) -> None:
        calls = [(event.operator, event.path) for event in events]
        if not self._events:
            self._events = calls
            for operator, _ in calls:
                self._tallies.setdefault(operator, _Tally())
            self._tallies.setdefault(WHOLE_PASS, _Tally())
        elif calls != self._events:
            raise RuntimeError("a canonical pass ran other operators than the one before")

    def _add_rows(
        self,
        rows: _Rows,
        sequence: int,
        logits: torch.Tensor,
        operators: torch.Tensor,
        events: Sequence[Event],
        taint: torch.Tensor,
    ) -> None:
        seen = self._seen.setdefault(sequence, self._nothing_seen(len(events)))
        span = slice(rows.placement.start, rows.placement.start + rows.placement.rows)
        known = seen.known[span]
        same_logits = seen.logits[span] == logits
        self._count(WHOLE_PASS, rows, known, known & ~same_logits, "logits")
        if events:
            same_in, same_out, same_own_in = torch.eq(seen.operators[..., span], operators).unbind()
            self._blame(rows, known, same_in, same_out, same_own_in, events, taint)
        new = ~known
        for stored, value in ((seen.logits, logits), (seen.operators, operators)):
            stored[..., span] = torch.where(new, value, stored[..., span])
        seen.known[span] = True

    def _nothing_seen(self, events: int) -> _Seen:
        return _Seen(
            torch.zeros(self.length, dtype=torch.bool),
            torch.zeros(self.length, dtype=torch.int64),
            torch.zeros(3, events, self.length, dtype=torch.int64),
        )

    def _blame(
        self,
        rows: _Rows,
        known: torch.Tensor,
        same_in: torch.Tensor,
        same_out: torch.Tensor,
        same_own_in: torch.Tensor,
        events: Sequence[Event],
        taint: torch.Tensor,
    ) -> None:
        """An operator is at fault where equal inputs gave unequal outputs.

        To attention the keys and values of the whole prefix are inputs as well; to an operator that holds a
        collective, what other tensor-parallel ranks put in. Those ranks report what is wrong with it.
        """
        foreign = known & same_own_in & ~same_in
        is_attention = torch.tensor([event.operator == ATTENTION for event in events])
        changed = is_attention[:, None] & known & ~same_in
        # By rows in front of it: what changed in the row itself shows in its own inputs.
        tainted = taint[:, None] | (changed.cumsum(1) > changed.long())
        taint |= changed.any(1)
        comparable = known & same_in & ~tainted
        wrong = comparable & ~same_out
        for number, event in enumerate(events):
            if event.nested:
                comparable[number] &= ~foreign[event.nested].any(0)
                wrong[number] &= comparable[number] & ~wrong[event.nested].any(0)
            self._count(event.operator, rows, comparable[number], wrong[number], event.path)
        inherited = wrong.any(0) | tainted.any(0) | foreign.any(0)
        self._blame_between(rows, known, same_in, inherited, events)

    def _blame_between(
        self,
        rows: _Rows,
        known: torch.Tensor,
        same_in: torch.Tensor,
        inherited: torch.Tensor,
        events: Sequence[Event],
    ) -> None:
        """Rows whose inputs changed somewhere although no operator was at fault, here or on another rank."""
        unexplained = known & ~same_in.all(0) & ~inherited
        if not unexplained.any():
            return
        offset = int(unexplained.nonzero()[0])
        number = int((~same_in[:, offset]).nonzero()[0])
        self._tallies.setdefault(BETWEEN, _Tally())
        self._count(BETWEEN, rows, known, unexplained, f"before {events[number].path}")

    def _count(
        self, operator: str, rows: _Rows, compared: torch.Tensor, different: torch.Tensor, where: str
    ) -> None:
        tally = self._tallies[operator]
        tally.comparisons += int(compared.sum())
        count = int(different.sum())
        tally.differences += count
        if count and tally.first is None:
            tally.first = rows.difference(int(different.nonzero()[0]), where)
            self._failed.append(operator)


def _stacked(events: Sequence[Event], rows: int) -> torch.Tensor:
    """Inputs, outputs and own inputs of all events, ``[3, events, rows]``."""
    if not events:
        return torch.zeros(3, 0, rows, dtype=torch.int64)
    return torch.stack([torch.stack([e.inputs, e.outputs, e.own_inputs]) for e in events], dim=1)
