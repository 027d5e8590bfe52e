"""Counters of one scheduler's LLM-42 runtime, as ``GET /llm42_stats`` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from sglang_ext.llm42.lane import Segment, SegmentKind
from sglang_ext.llm42.request import Verdict


@dataclass
class Statistics:
    """Running totals since start or the last reset.

    Attributes:
        decode_steps: ordinary decode steps of batches that held deterministic requests.
        mixed_decode_steps: those of them in which both kinds of requests decoded a token.
        canonical_decode_steps: those of them that ran in a canonical shape.
        decode_deterministic_rows: rows of decode steps that drafted a candidate or decided a token.
        decode_decided_rows: those of them that decided a token, which needs no verification.
        decode_other_rows: rows of unmarked requests in these steps.
        verify_forward_passes: canonical passes run.
        verify_total_reqs: verification segments in them.
        verify_total_tokens: rows of these segments, each judging one candidate.
        prompt_segments: prompt segments in canonical passes.
        prompt_tokens: rows of these segments.
        padded_rows: rows of canonical passes that carried nothing.
        candidates_accepted: judged candidates that agreed.
        candidates_rejected: judged candidates that a canonical token replaced.
        rollbacks: verifications with a rejected candidate.
        tokens_rolled_back: candidates discarded by rollbacks.
        shared_prefix_tokens: tokens of canonical prefixes copied for unmarked requests.
    """

    decode_steps: int = 0
    mixed_decode_steps: int = 0
    canonical_decode_steps: int = 0
    decode_deterministic_rows: int = 0
    decode_decided_rows: int = 0
    decode_other_rows: int = 0
    verify_forward_passes: int = 0
    verify_total_reqs: int = 0
    verify_total_tokens: int = 0
    prompt_segments: int = 0
    prompt_tokens: int = 0
    padded_rows: int = 0
    candidates_accepted: int = 0
    candidates_rejected: int = 0
    rollbacks: int = 0
    tokens_rolled_back: int = 0
    shared_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        self._before_reset = dict.fromkeys(self.as_dict(), 0)

    def count_decode(self, deterministic: int, other: int, deciding: int | None = None) -> None:
        """A decode step ran with this many rows of deterministic and of unmarked requests.

        Args:
            deciding: in a canonical step, how many of the former decided their token, else None.
        """
        self.decode_steps += 1
        self.canonical_decode_steps += deciding is not None
        self.decode_decided_rows += deciding or 0
        self.mixed_decode_steps += bool(deterministic and other)
        self.decode_deterministic_rows += deterministic
        self.decode_other_rows += other

    def count_pass(self, segments: Sequence[Segment], rows: int) -> None:
        """A canonical pass of ``rows`` rows was launched with these segments."""
        self.verify_forward_passes += 1
        used = 0
        for segment in segments:
            used += segment.rows
            if segment.kind is SegmentKind.VERIFY:
                self.verify_total_reqs += 1
                self.verify_total_tokens += segment.rows
            else:
                self.prompt_segments += 1
                self.prompt_tokens += segment.rows
        self.padded_rows += rows - used

    def count_verdict(self, verdict: Verdict) -> None:
        """A verification was applied."""
        self.candidates_accepted += verdict.matched
        if verdict.matched < len(verdict.tokens):
            self.candidates_rejected += 1
            self.rollbacks += 1
            self.tokens_rolled_back += verdict.candidates - verdict.matched

    def as_dict(self) -> dict[str, int]:
        """All counters by name, since the last reset."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def totals(self) -> dict[str, int]:
        """All counters by name, since start: what only grows."""
        return {name: value + self._before_reset[name] for name, value in self.as_dict().items()}

    def reset(self) -> None:
        """Set all counters to zero; :meth:`totals` stay."""
        self._before_reset = self.totals()
        for f in fields(self):
            setattr(self, f.name, 0)
