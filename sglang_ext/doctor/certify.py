"""Certification of one canonical pass: trials, comparison, fingerprint, verdict."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import torch

from sglang_ext.doctor import fallback, probes, sampling_checks
from sglang_ext.doctor.comparison import WHOLE_PASS, Comparison
from sglang_ext.doctor.digest import row_digests
from sglang_ext.doctor.fingerprint import agree, fingerprint, of_all_ranks
from sglang_ext.doctor.operators import Recorder
from sglang_ext.doctor.probes import Pass, Space, Trial
from sglang_ext.doctor.report import Certificate
from sglang_ext.doctor.workspace import Workspace, borrow, room
from sglang_ext.llm42.canonical_pass import CandidateTable, PassSegment
from sglang_ext.llm42.lane import SegmentKind

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    from sglang_ext.llm42.canonical_graph import CapturedCanonicalPass
    from sglang_ext.llm42.canonical_pass import CanonicalPass

    AnyCanonicalPass = CanonicalPass | CapturedCanonicalPass

logger = logging.getLogger(__name__)

#: Rows of logits that log-softmax and the sampler are tried on.
SAMPLED_ROWS = 18
SAMPLED_ROWS_QUICK = 6


class CertificationError(RuntimeError):
    """The engine does not have the property that deterministic output rests on."""


def certify_quickly(canonical_pass: AnyCanonicalPass) -> Certificate:
    """The short certification at server start: three passes, before traffic.

    Every tensor-parallel rank must call it. The memory pools are left as they were.

    Returns:
        The certificate, passed; its fingerprint is the same on all ranks.

    Raises:
        CertificationError: a row's bits depend on where it stands, the message names the operator; or the
            logits are NaN.
        RankMismatch: the ranks computed different logits.
    """
    certificate = certify(canonical_pass, quick=True)
    if certificate.passed:
        return certificate
    replacement = _apply_fallback(canonical_pass, certificate)
    if replacement is not None:
        certificate = certify(canonical_pass, quick=True)
        if certificate.passed:
            return dataclasses.replace(certificate, notes=(*certificate.notes, replacement))
    raise CertificationError(
        f"--enable-llm42 cannot keep its promise with this model and configuration: row invariance "
        f"{certificate.conclusion()}. Start without --enable-llm42, or run python -m sglang_ext.doctor with "
        "the same flags for a full report."
    )


def certify(canonical_pass: AnyCanonicalPass, quick: bool = False) -> Certificate:
    """Run the trials on ``canonical_pass`` and report on every operator.

    A quick certification compares logits only, and looks at the operators where those differ. A pass that is
    captured in a CUDA graph is certified as captured; its operators are watched when it runs eagerly.

    Every tensor-parallel rank must call it, before traffic: it borrows from the memory pools.

    Raises:
        CertificationError: the memory pools are too small for any probe, or the logits are NaN.
        RankMismatch: the ranks computed different logits.
    """
    started = time.perf_counter()
    group = _group(canonical_pass)
    captured = canonical_pass.eager is not canonical_pass
    certificate = _run(canonical_pass, quick, watch=not quick and not captured)
    if captured and not quick:
        certificate = _with_operators(certificate, _run(canonical_pass.eager, quick, watch=True))
    if quick and any(of_all_ranks(not certificate.passed, group)):
        # Logits of another rank may differ where ours do not: all ranks look for the operator together.
        watched = _run(canonical_pass.eager, quick, watch=True)
        certificate = _with_operators(certificate, watched) if captured else watched
    certificate = _merged(certificate, group)
    return dataclasses.replace(certificate, seconds=round(time.perf_counter() - started, 3))


def _with_operators(captured: Certificate, eager: Certificate) -> Certificate:
    """The certificate of a captured pass, with what was seen of the operators when it ran eagerly.

    Both must pass, and give the same logits: tokens come from the captured one alone.
    """
    passes = captured.passes + eager.passes
    if captured.fingerprint != eager.fingerprint:
        note = "the CUDA graph computes other bits than the operators it was captured from"
        return dataclasses.replace(captured, passes=passes, faulty=WHOLE_PASS, notes=(*captured.notes, note))
    if not captured.passed and eager.passed:
        note = "it fails in the CUDA graph alone: run eagerly, every operator passes"
        return dataclasses.replace(captured, passes=passes, notes=(*captured.notes, note))
    note = f"{captured.passes} passes of the CUDA graph gave equal logits as well"
    return dataclasses.replace(
        eager, passes=passes, notes=(*eager.notes, note) if captured.passed else eager.notes
    )


def _run(canonical_pass: AnyCanonicalPass, quick: bool, watch: bool) -> Certificate:
    space, notes = _space(canonical_pass, quick)
    trials = probes.quick_trials(space) if quick else probes.full_trials(space)
    with borrow(canonical_pass.model_runner, space.concurrent, space.rows, space.length) as workspace:
        bench = _Bench(canonical_pass, space, workspace, watch)
        bench.run([probes.reference(space), *trials])
    sampled = bench.sampled_logits[: SAMPLED_ROWS_QUICK if quick else SAMPLED_ROWS]
    reports = [*bench.comparison.reports(), *sampling_checks.check(sampled, space.rows)]
    faulty = bench.comparison.faulty() or next((r.operator for r in reports if not r.passed), None)
    return Certificate(
        fingerprint=fingerprint(bench.fingerprint_rows),
        operators=tuple(reports),
        faulty=faulty,
        segments=space.segments,
        rows=space.rows,
        length=space.length,
        passes=bench.passes,
        threads=torch.get_num_threads(),
        seconds=0.0,
        notes=tuple(notes),
    )


def _space(canonical_pass: AnyCanonicalPass, quick: bool) -> tuple[Space, list[str]]:
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
    return Space(segments, rows, concurrent, length), notes


def _merged(certificate: Certificate, group: GroupCoordinator | None) -> Certificate:
    """The certificate for all ranks: if any fails, that of the first one that names an operator."""
    of_ranks = cast("list[Certificate]", of_all_ranks(certificate, group))
    failing = [rank for rank, each in enumerate(of_ranks) if not each.passed]
    if failing:
        failed = next((rank for rank in failing if of_ranks[rank].faulty != WHOLE_PASS), failing[0])
        note = () if len(of_ranks) == 1 else (f"as seen on tensor-parallel rank {failed}",)
        return dataclasses.replace(of_ranks[failed], notes=(*of_ranks[failed].notes, *note))
    agree([each.fingerprint for each in of_ranks])
    return certificate


def _apply_fallback(canonical_pass: AnyCanonicalPass, certificate: Certificate) -> str | None:
    """Replace the faulty operator if there is a replacement; returns what to say about it."""
    device = torch.device(canonical_pass.device).type
    replacement = fallback.fallback_for(certificate.faulty or "", device)
    if replacement is None:
        return None
    replacement.apply(canonical_pass.model_runner.model)
    note = f"{replacement.operator} was replaced by a batch-invariant one: {replacement.costs}"
    logger.warning(note)
    return note


def _group(canonical_pass: AnyCanonicalPass) -> GroupCoordinator | None:
    return getattr(canonical_pass.model_runner, "tp_group", None)


class _Bench:
    """Runs trials in a workspace and compares what they computed."""

    def __init__(
        self, canonical_pass: AnyCanonicalPass, space: Space, workspace: Workspace, watch: bool
    ) -> None:
        runner = canonical_pass.model_runner
        self.comparison = Comparison(space.length, space.rows)
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
        self._recorder = Recorder(runner.model, total, _group(canonical_pass)) if watch else None

    def run(self, trials: Iterable[Trial]) -> None:
        """Run all ``trials``; the first one is the reference, whose KV the others share."""
        with nullcontext() if self._recorder is None else self._recorder.recording():
            for number, trial in enumerate(trials):
                self._run_trial(trial, is_reference=number == 0)

    def _run_trial(self, trial: Trial, is_reference: bool) -> None:
        workspace = self._workspace
        workspace.begin_trial(trial.garbage)
        for number, request in enumerate(trial.requests):
            if is_reference:
                workspace.place_probe(workspace.rows[number])
            else:
                workspace.place(workspace.rows[number], request.shared, trial.end(number), trial.garbage)
        taints: dict[int, torch.Tensor] = {}
        for placements in trial.passes:
            logits = self._pass.run([self._segment(trial, p) for p in placements], self._table)
            flat = logits.reshape(-1, logits.shape[-1])
            digests = row_digests(flat, len(flat)).cpu()
            if not self.passes:
                self._keep_probe(placements, flat, digests)
            events = [] if self._recorder is None else self._recorder.take()
            self.comparison.add_pass(trial, placements, digests, events, taints)
            self.passes += 1

    def _keep_probe(self, placements: Pass, logits: torch.Tensor, digests: torch.Tensor) -> None:
        """Keep what the fingerprint and the sampler's checks need of the first pass.

        Raises:
            CertificationError: the logits are NaN, which would count as equal bits everywhere.
        """
        count = sum(placement.rows for placement in placements)
        if bool(logits[:count].isnan().any()):
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
