"""Prometheus metrics of LLM-42, beside SGLang's own on ``/metrics`` (``--enable-metrics``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sglang_ext.llm42.statistics import Statistics

#: Counter by field of :class:`Statistics`.
COUNTERS: Mapping[str, tuple[str, str]] = {
    "verify_forward_passes": ("sglang:llm42_canonical_passes_total", "Canonical passes run."),
    "verify_total_tokens": (
        "sglang:llm42_verify_rows_total",
        "Rows of canonical passes that judged a candidate.",
    ),
    "prompt_tokens": ("sglang:llm42_prompt_rows_total", "Rows of canonical passes that computed a prompt."),
    "padded_rows": ("sglang:llm42_padded_rows_total", "Rows of canonical passes that carried nothing."),
    "candidates_accepted": (
        "sglang:llm42_candidates_accepted_total",
        "Candidates that verification agreed with.",
    ),
    "candidates_rejected": (
        "sglang:llm42_candidates_rejected_total",
        "Candidates that verification replaced.",
    ),
    "decode_decided_rows": (
        "sglang:llm42_decided_rows_total",
        "Rows of canonical decode steps that decided a token.",
    ),
    "rollbacks": ("sglang:llm42_rollbacks_total", "Verifications with a rejected candidate."),
    "tokens_rolled_back": ("sglang:llm42_tokens_rolled_back_total", "Candidates discarded by rollbacks."),
    "shared_prefix_tokens": (
        "sglang:llm42_shared_prefix_tokens_total",
        "Tokens of canonical prefixes copied for unmarked requests.",
    ),
}
ACCEPTING = (
    "sglang:llm42_accepting_reqs",
    "Whether deterministic requests are accepted: 0 after updated weights failed their certification.",
)
RUNNING = ("sglang:llm42_num_running_reqs", "Deterministic requests that are running.")
LINES = ("sglang:llm42_commit_log_lines_total", "Lines written to the commit log.")
DROPPED = ("sglang:llm42_commit_log_dropped_lines_total", "Lines that the commit log lost.")

#: Seconds between two updates while requests are running.
INTERVAL_S = 1.0


class Metrics:
    """The metrics of one scheduler.

    Must be made after SGLang's collector, which is when ``PROMETHEUS_MULTIPROC_DIR`` is set.

    Args:
        labels: those of SGLang's own metrics in this scheduler.
        counter: ``prometheus_client.Counter`` or what stands for it.
        gauge: ``prometheus_client.Gauge`` or what stands for it.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        labels: Mapping[str, Any],
        counter: Callable[..., Any],
        gauge: Callable[..., Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        names = list(labels)

        def new_counter(name: str, documentation: str) -> Any:
            return counter(name=name, documentation=documentation, labelnames=names).labels(**labels)

        def new_gauge(name: str, documentation: str) -> Any:
            return gauge(
                name=name, documentation=documentation, labelnames=names, multiprocess_mode="mostrecent"
            ).labels(**labels)

        self._counters = {field: new_counter(*row) for field, row in COUNTERS.items()}
        self._running = new_gauge(*RUNNING)
        self._running.set(0)
        self._accepting = new_gauge(*ACCEPTING)
        # A server whose weights are not certified at its start does not start.
        self._accepting.set(1)
        self._lines = new_counter(*LINES)
        self._dropped = new_counter(*DROPPED)
        self._shown = dict.fromkeys(COUNTERS, 0)
        self._clock = clock
        self._next_update = clock()

    @classmethod
    def beside(cls, collector: Any) -> Metrics:
        """Metrics with the labels, and the kind of counters, of SGLang's collector for the scheduler."""
        import prometheus_client

        return cls(
            collector.labels,
            collector._counter_cls or prometheus_client.Counter,
            collector._gauge_cls or prometheus_client.Gauge,
        )

    def update(self, statistics: Statistics, running: int) -> None:
        """Show the newest figures, unless that was done a moment ago and requests are still running."""
        now = self._clock()
        if running and now < self._next_update:
            return
        self._next_update = now + INTERVAL_S
        self._running.set(running)
        totals = statistics.totals()
        for field, counter in self._counters.items():
            if increase := totals[field] - self._shown[field]:
                counter.inc(increase)
                self._shown[field] = totals[field]

    def accepting(self, accepted: bool) -> None:
        """Show whether deterministic requests are accepted."""
        self._accepting.set(int(accepted))

    def line_written(self) -> None:
        """A line was written to the commit log; may be called in any thread."""
        self._lines.inc()

    def line_dropped(self) -> None:
        """A line of the commit log was lost; may be called in any thread."""
        self._dropped.inc()
