"""One pass under trial: what there is room for, and trials that run in a workspace and are compared."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from sglang_ext.doctor import probes
from sglang_ext.doctor.comparison import Comparison
from sglang_ext.doctor.digest import row_digests
from sglang_ext.doctor.fingerprint import of_all_ranks
from sglang_ext.doctor.operators import Recorder
from sglang_ext.doctor.probes import Pass, Space, Trial
from sglang_ext.doctor.workspace import Workspace, room
from sglang_ext.llm42.canonical_pass import CandidateTable, PassSegment
from sglang_ext.llm42.lane import SegmentKind, first_rows
from sglang_ext.tokenweave.runtime import running_half

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    from sglang_ext.llm42.pass_sizes import AnyCanonicalPass

#: Rows of logits kept for the checks of log-softmax and sampler.
SAMPLED_ROWS = 18


class CertificationError(RuntimeError):
    """The engine does not have the property that deterministic output rests on.

    All ranks raise it or none.
    """


def space_of(canonical_pass: AnyCanonicalPass, quick: bool) -> tuple[Space, list[str]]:
    """What the pools leave room for, and what therefore is left out."""
    runner = canonical_pass.model_runner
    segments, rows = canonical_pass.segments, canonical_pass.rows
    wanted = (probes.quick_length if quick else probes.full_length)(segments, rows)
    context = min(int(runner.model_config.context_len), runner.req_to_token_pool.req_to_token.shape[1])
    concurrent = min(segments, len(runner.req_to_token_pool.free_slots))
    fits = room(runner, concurrent, rows)
    length = min(wanted, context, fits)
    if length < 1 or concurrent < 1:
        raise CertificationError(
            f"the KV cache is too small to certify passes of {segments} segments of {rows} rows: "
            f"{runner.token_to_kv_pool_allocator.available_size()} slots for {concurrent} requests; raise "
            "--max-total-tokens"
        )
    notes = []
    if (cut := canonical_pass.eager.cut) is not None:
        notes.append(f"passes run as two halves of {cut} rows (TokenWeave)")
    if length < wanted:
        notes.append(
            f"the probe has {length} positions instead of {wanted}: longer prefixes were not tried "
            f"(context length {context}, room for {fits} in the KV cache)"
        )
    if concurrent < segments:
        notes.append(
            f"{concurrent} of {segments} segments were used by different requests: "
            "--max-running-requests allows no more"
        )
    return Space(segments, rows, concurrent, length, canonical_pass.block_rows), notes


def group_of(canonical_pass: AnyCanonicalPass) -> GroupCoordinator | None:
    """The tensor-parallel group that computes the pass."""
    return getattr(canonical_pass.model_runner, "tp_group", None)


class Bench:
    """Runs trials in a workspace and compares what they computed.

    Args:
        canonical_pass: under trial.
        space: what its trials are laid out in.
        workspace: memory of the trials' requests.
        watch: whether operators are compared, too, rather than logits alone.
        comparison: goes on from what was computed before; a new one if None.
    """

    def __init__(
        self,
        canonical_pass: AnyCanonicalPass,
        space: Space,
        workspace: Workspace,
        watch: bool = False,
        comparison: Comparison | None = None,
    ) -> None:
        runner = canonical_pass.model_runner
        block_rows = canonical_pass.block_rows
        self.comparison = Comparison(space.length, block_rows) if comparison is None else comparison
        self.passes = 0
        self.fingerprint_rows = torch.empty(0, dtype=torch.int64)
        self.sampled_logits = torch.empty(0)
        self._pass = canonical_pass
        self._space = space
        self._workspace = workspace
        self._vocabulary = int(runner.model_config.vocab_size)
        self._table = CandidateTable(
            runner.req_to_token_pool.req_to_token.shape[0], space.rows, canonical_pass.device
        )
        total = space.segments * space.rows
        group = group_of(canonical_pass)
        self._recorder = Recorder(runner.model, total, group, running_half) if watch else None

    def run(self, trials: Iterable[Trial], reference: Trial | None = None) -> None:
        """Run all ``trials``, in front of them the ``reference``, whose KV they share.

        Without one they share the KV of the reference that was last run in the workspace.
        """
        with nullcontext() if self._recorder is None else self._recorder.recording():
            if reference is not None:
                self._run_trial(reference, is_reference=True)
            for trial in trials:
                self._run_trial(trial, is_reference=False)

    def few_row_differences(self, trials: Iterable[Trial]) -> tuple[int, int]:
        """Run ``trials`` with logits of all rows, then of few at a time, and compare.

        Returns:
            Rows compared, and those of them that have other bits.
        """
        compared = different = 0
        for trial in trials:
            self._place(trial, is_reference=False)
            for placements in trial.passes:
                segments = [self._segment(trial, p) for p in placements]
                everything = self._digests(self._pass.run(segments, self._table))
                for rows in self._spread_rows(placements):
                    chosen = rows.to(self._pass.device)
                    found = self._digests(self._pass.run_few(segments, self._table, chosen))
                    compared += len(found)
                    different += int((found != everything[rows]).sum())
        return compared, different

    def _spread_rows(self, placements: Pass) -> list[torch.Tensor]:
        """All rows in use in as few choices as the pass allows, each spread over the pass."""
        firsts = first_rows((p.rows for p in placements), self._pass.block_rows)
        used = torch.cat([torch.arange(f, f + p.rows) for f, p in zip(firsts, placements, strict=False)])
        choices = -(-len(used) // self._pass.few_rows)
        return [used[number::choices] for number in range(choices)]

    def _place(self, trial: Trial, is_reference: bool) -> None:
        workspace = self._workspace
        workspace.begin_trial(trial.garbage)
        for number, request in enumerate(trial.requests):
            if is_reference:
                workspace.place_probe(workspace.rows[number])
            else:
                workspace.place(workspace.rows[number], request.shared, trial.end(number), trial.garbage)

    @staticmethod
    def _digests(logits: torch.Tensor) -> torch.Tensor:
        return row_digests(logits, len(logits)).cpu()

    def _run_trial(self, trial: Trial, is_reference: bool) -> None:
        self._place(trial, is_reference)
        taints: dict[int, torch.Tensor] = {}
        for placements in trial.passes:
            logits = self._pass.run([self._segment(trial, p) for p in placements], self._table)
            digests = self._digests(logits)
            if not self.passes:
                self._keep_probe(placements, logits, digests)
            events = [] if self._recorder is None else self._recorder.take()
            self.comparison.add_pass(trial, placements, digests, events, taints)
            self.passes += 1

    def _keep_probe(self, placements: Pass, logits: torch.Tensor, digests: torch.Tensor) -> None:
        """Keep what the fingerprint and the sampler's checks need of the first pass.

        Raises:
            CertificationError: the logits are NaN on some rank, which would count as equal bits everywhere.
        """
        count = sum(placement.rows for placement in placements)
        # A rank that raised alone would leave the others waiting for it.
        if any(of_all_ranks(bool(logits[:count].isnan().any()), group_of(self._pass))):
            raise CertificationError(
                "--enable-llm42 does not work with this model and configuration: canonical logits are not "
                "numbers (NaN), so nothing can be said about row invariance."
            )
        self.fingerprint_rows = digests[:count].clone()
        self.sampled_logits = logits[: min(count, SAMPLED_ROWS)].clone()

    def _segment(self, trial: Trial, placement: probes.Placement) -> PassSegment:
        start, end = placement.start, placement.start + placement.rows
        tokens = probes.token_ids(trial.requests[placement.request].sequence, end, self._vocabulary)[start:]
        row = self._workspace.rows[placement.request]
        if not placement.from_table:
            return PassSegment(SegmentKind.PROMPT, row, start, tokens, placement.rows)
        positions = torch.arange(start, end, device=self._pass.device)
        self._table.write(
            torch.full_like(positions, row), positions, torch.tensor(tokens, device=self._pass.device)
        )
        return PassSegment(SegmentKind.VERIFY, row, start, (), placement.rows)
