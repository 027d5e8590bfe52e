"""What a certification found, as data, as JSON and as a readable table."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Where an operator first gave other bits for the same row.

    Attributes:
        perturbation: what was varied.
        where: module path, with the layer's number.
        position: absolute position of the token.
        segment, row: where it stood in the pass.
        segment_start: position of the segment's first row.
    """

    perturbation: str
    where: str
    position: int
    segment: int
    row: int
    segment_start: int

    def __str__(self) -> str:
        return (
            f"{self.where}, position {self.position} (row {self.row} of segment {self.segment}, which starts "
            f"at {self.segment_start}), {self.perturbation}"
        )


@dataclass(frozen=True)
class OperatorReport:
    """Comparisons of one kind of operator over all layers and trials.

    Attributes:
        comparisons: rows with equal inputs whose outputs were compared.
        differences: those whose outputs differed.
        first: the first of them.
    """

    operator: str
    comparisons: int
    differences: int
    first: Difference | None = None

    @property
    def passed(self) -> bool:
        """Whether the operator gave equal bits, as far as it was compared."""
        return self.differences == 0

    @property
    def verdict(self) -> str:
        """One word for the table."""
        if not self.passed:
            return "FAILS"
        return "passes" if self.comparisons else "not compared"


@dataclass(frozen=True)
class SizeReport:
    """Comparison of another canonical pass, or of a canonical decode step, with the full pass.

    Attributes:
        segments: its number of segments; of a decode step, its rows.
        comparisons: rows whose logits were compared.
        differences: those whose bits differed.
        decode: whether it is a decode step.
        few_rows: 0, or of how many rows it computed the logits; then it was compared with the same pass with
            logits of all rows.
    """

    segments: int
    comparisons: int
    differences: int
    decode: bool = False
    few_rows: int = 0

    @property
    def passed(self) -> bool:
        """Whether passes or steps of this size may run: rows were compared, and none differed."""
        return self.comparisons > 0 and self.differences == 0

    def __str__(self) -> str:
        verdict = "equal bits" if self.passed else "OTHER BITS, not used"
        rows = f"{self.differences} of {self.comparisons} rows differ"
        kind, unit = ("decode steps", "rows") if self.decode else ("passes", "segments")
        what = f"{kind} of {self.segments} {unit}"
        if self.few_rows:
            what += f" with logits of {self.few_rows} rows"
        return f"{what}: {verdict} ({rows})"


@dataclass(frozen=True)
class Certificate:
    """Outcome of a certification.

    Attributes:
        fingerprint: canonical fingerprint, 64 hexadecimal digits.
        operators: one report each; the pass as a whole is among them.
        faulty: the operator that differs first in the order of computation, None if all passed.
        segments, rows: the canonical shape (G, W).
        length: positions of the probe.
        passes: canonical passes that ran.
        threads: compute threads of torch; on a CPU, part of what the fingerprint depends on.
        seconds: duration.
        notes: what was left out, and why.
        sizes: smaller passes and canonical decode steps that were compared with the full pass.
    """

    fingerprint: str
    operators: tuple[OperatorReport, ...]
    faulty: str | None
    segments: int
    rows: int
    length: int
    passes: int
    threads: int
    seconds: float
    notes: tuple[str, ...] = ()
    sizes: tuple[SizeReport, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every row had the same bits wherever it stood."""
        return self.faulty is None and all(report.passed for report in self.operators)

    def report_of(self, operator: str) -> OperatorReport | None:
        """The report of ``operator``, if it was watched."""
        return next((report for report in self.operators if report.operator == operator), None)

    def as_json(self) -> str:
        """The certificate as a JSON object."""
        return json.dumps({"passed": self.passed, **dataclasses.asdict(self)}, indent=2) + "\n"

    def as_table(self) -> str:
        """The certificate for a reader, a line per operator."""
        width = max((len(report.operator) for report in self.operators), default=8)
        lines = [f"{'operator':<{width}}  {'':<12}  {'compared':>10}  {'different':>9}  first difference"]
        for report in self.operators:
            first = "" if report.first is None else str(report.first)
            lines.append(
                f"{report.operator:<{width}}  {report.verdict:<12}  {report.comparisons:>10}  "
                f"{report.differences:>9}  {first}".rstrip()
            )
        lines.append("")
        lines += [str(size) for size in self.sizes]
        lines += [f"note: {note}" for note in self.notes]
        lines.append(
            f"{self.segments} segments of {self.rows} rows, probe of {self.length} positions, {self.passes} "
            f"passes, {self.threads} threads, {self.seconds:.1f} s"
        )
        lines.append(f"canonical fingerprint {self.fingerprint}")
        lines.append(f"row invariance: {self.conclusion()}")
        return "\n".join(lines) + "\n"

    def conclusion(self) -> str:
        """One sentence: holds, or which operator breaks it."""
        if self.passed:
            return "holds"
        report = self.report_of(self.faulty or "")
        first = report.first if report is not None else None
        return f"does not hold: {self.faulty} differs first" + ("" if first is None else f" ({first})")
