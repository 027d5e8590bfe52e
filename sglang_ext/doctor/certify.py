"""Certification of one canonical pass: trials, comparison, fingerprint, verdict."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from sglang_ext.doctor import fallback, probes, sampling_checks
from sglang_ext.doctor.bench import SAMPLED_ROWS, Bench, CertificationError, group_of, space_of
from sglang_ext.doctor.comparison import WHOLE_PASS, Comparison
from sglang_ext.doctor.fingerprint import agree, fingerprint, of_all_ranks
from sglang_ext.doctor.probes import Space
from sglang_ext.doctor.report import Certificate, SizeReport
from sglang_ext.doctor.workspace import Workspace, borrow, room

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    from sglang_ext.llm42.pass_sizes import AnyCanonicalPass, PassSizes

logger = logging.getLogger(__name__)

#: Rows of logits that log-softmax and the sampler are tried on at server start.
SAMPLED_ROWS_QUICK = 6


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
    group = group_of(canonical_pass)
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
    space, notes = space_of(canonical_pass, quick)
    trials = probes.quick_trials(space) if quick else probes.full_trials(space)
    with borrow(canonical_pass.model_runner, space.concurrent, space.rows, space.length) as workspace:
        bench = Bench(canonical_pass, space, workspace, watch)
        bench.run(trials, probes.reference(space))
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


def certify_sizes(passes: PassSizes, quick: bool = False) -> tuple[SizeReport, ...]:
    """Compare the smaller passes with the full one, row by row; the full one has passed already.

    Every tensor-parallel rank must call it, before traffic: it borrows from the memory pools.

    Returns:
        A report for each smaller size, ascending, the same on all ranks.
    """
    if not passes.smaller:
        return ()
    space, _ = space_of(passes.full, quick)
    with borrow(passes.full.model_runner, space.concurrent, space.rows, space.length) as workspace:
        bench = Bench(passes.full, space, workspace)
        bench.run((), probes.reference(space))
        reports = [
            _compare_size(bench.comparison, each, space, workspace, quick) for each in passes.smaller.values()
        ]
    return _worst_of_ranks(reports, group_of(passes.full))


def certify_few_rows(passes: PassSizes, quick: bool = False) -> tuple[SizeReport, ...]:
    """Compare passes with logits of few rows with the same passes with logits of all, row by row.

    Every tensor-parallel rank must call it, before traffic: it borrows from the memory pools.

    Returns:
        A report for each size that has such logits, the full one first, the same on all ranks.
    """
    able = [each for each in passes.all if each.few_rows]
    if not able:
        return ()
    full, _ = space_of(passes.full, quick)
    reports = []
    with borrow(passes.full.model_runner, full.concurrent, full.rows, full.length) as workspace:
        Bench(passes.full, full, workspace).run((), probes.reference(full))
        for each in able:
            space = full.of_size(each.segments)
            trials = list(probes.quick_trials(space))[-1 if quick else 0 :]
            compared = Bench(each, space, workspace).few_row_differences(trials)
            reports.append(SizeReport(each.segments, *compared, few_rows=each.few_rows))
    return _worst_of_ranks(reports, group_of(passes.full))


def _compare_size(
    seen: Comparison, canonical_pass: AnyCanonicalPass, full: Space, workspace: Workspace, quick: bool
) -> SizeReport:
    """Run trials on a smaller pass, where the keys and values of the full one are; unless ``quick``, it
    computes the whole probe by itself first."""
    segments = canonical_pass.segments
    space = full.of_size(segments)
    bench = Bench(canonical_pass, space, workspace, comparison=copy.deepcopy(seen))
    bench.run(probes.quick_trials(space), None if quick else probes.reference(space))
    return _size_report(bench, segments)


def _size_report(bench: Bench, segments: int, decode: bool = False) -> SizeReport:
    logits = next(report for report in bench.comparison.reports() if report.operator == WHOLE_PASS)
    return SizeReport(segments, logits.comparisons, logits.differences, decode)


def _worst_of_ranks(reports: Sequence[SizeReport], group: GroupCoordinator | None) -> tuple[SizeReport, ...]:
    """Of each size the report of the rank that saw most differences."""
    of_ranks = cast("list[list[SizeReport]]", of_all_ranks(reports, group))
    return tuple(max(each, key=lambda report: report.differences) for each in zip(*of_ranks, strict=True))


def certify_decode(
    full: AnyCanonicalPass, steps: Iterable[AnyCanonicalPass], quick: bool = False
) -> tuple[SizeReport, ...]:
    """Compare canonical decode steps, passes of one row per segment, with the ``full`` pass, row by row.

    Every tensor-parallel rank must call it, before traffic: it borrows from the memory pools.

    Returns:
        A report for each step, in the order of ``steps``, the same on all ranks.

    Raises:
        CertificationError: the memory pools are too small for any probe of the full pass.
    """
    steps = list(steps)
    if not steps:
        return ()
    space, _ = space_of(full, quick)
    runner = full.model_runner
    most = min(max(step.segments for step in steps), len(runner.req_to_token_pool.free_slots))
    while most > 1 and room(runner, most, 1) < 1:
        most //= 2
    length = min(space.length, room(runner, most, 1), probes.STEP_LENGTH if quick else space.length)
    space = dataclasses.replace(space, length=max(1, length))
    with borrow(runner, most, 1, space.length) as workspace:
        bench = Bench(full, space, workspace)
        bench.run((), probes.reference(space))
        reports = [_compare_step(bench.comparison, step, space, most, workspace, quick) for step in steps]
    return _worst_of_ranks(reports, group_of(full))


def _compare_step(
    seen: Comparison, step: AnyCanonicalPass, full: Space, most: int, workspace: Workspace, quick: bool
) -> SizeReport:
    """Run trials on a decode step where the keys and values of the full pass are, then the whole probe on the
    keys and values of such steps."""
    space = Space(step.segments, 1, min(step.segments, most), full.length)
    comparison = copy.deepcopy(seen)
    comparison.block_rows = 1
    bench = Bench(step, space, workspace, comparison=comparison)
    try:
        bench.run(probes.quick_trials(space) if quick else probes.step_trials(space))
        bench.run((probes.row_by_row(space),))
    except CertificationError:  # NaN where the full pass has numbers, on some rank, so on all
        return SizeReport(step.segments, 1, 1, decode=True)
    return _size_report(bench, step.segments, decode=True)
