"""What the scheduler tells metrics and commit log; nothing at all where neither was asked for."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_ext.llm42.observability import configuration, log_files
from sglang_ext.llm42.observability.log_line import WEIGHT_VERSION_KEY, FinishedRequest
from sglang_ext.llm42.observability.log_writer import LogWriter, RotatingFile, now
from sglang_ext.llm42.observability.metrics import Metrics
from sglang_ext.tokenweave import runtime as tokenweave

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_ext.llm42.request import DeterministicRequest
    from sglang_ext.llm42.runtime import Runtime

logger = logging.getLogger(__name__)


class Observer:
    """One per scheduler process.

    Args:
        runtime: whose figures are shown.
        metrics: where they are shown, None without ``--enable-metrics``.
        writer: where finished requests go, None without ``--llm42-commit-log`` and on all tensor-parallel
            ranks but the first.
        configuration_digest: digest of the server's configuration.
    """

    def __init__(
        self, runtime: Runtime, metrics: Metrics | None, writer: LogWriter | None, configuration_digest: str
    ) -> None:
        self._runtime = runtime
        self._metrics = metrics
        self._writer = writer
        self.configuration_digest = configuration_digest

    @classmethod
    def of_scheduler(cls, scheduler: Scheduler, runtime: Runtime) -> Observer:
        """What the server's arguments ask for, once the model is loaded."""
        metrics = _metrics(scheduler)
        digest = configuration.digest(
            configuration.describe(
                scheduler.server_args, scheduler.tp_worker.model_runner, _tokenweave(runtime)
            )
        )
        return cls(runtime, metrics, _writer(scheduler, metrics), digest)

    def step_done(self) -> None:
        """A step with deterministic requests has been processed."""
        if self._metrics is not None:
            self._metrics.update(self._runtime.statistics, self._runtime.num_running)

    def accepting(self, accepted: bool) -> None:
        """From now on deterministic requests are accepted, or refused."""
        if self._metrics is not None:
            self._metrics.accepting(accepted)

    def finished(self, req: Req, state: DeterministicRequest, finish_reason: Mapping[str, Any]) -> None:
        """A deterministic request has ended, be it before it began, and its log is released.

        A request that asked for no tokens leaves no line: SGLang sends such ones itself, to cache the prompt
        of several samples.
        """
        self.step_done()
        if self._writer is None or not req.sampling_params.max_new_tokens:
            return
        request = _finished_request(req, state, finish_reason, self.configuration_digest)
        self._writer.offer(request.line, request.tokens)


def _tokenweave(runtime: Runtime) -> dict[str, Any] | None:
    """How TokenWeave runs canonical passes, which flags leave to the GPUs, the model and the buffers' size.

    Fixed since the passes were built: the path of the fused step, the rows of a pass's first half (None for a
    whole one), and whether a pass has room in the step's buffers.
    What is measured at start, and so may be another thing at the next, is left out: it has no say in which
    step canonical passes take, and the number of the step's thread blocks changes no row.
    """
    started = tokenweave.current()
    if started is None or started.weaver.stock_reason:
        return None
    full = runtime.verification.passes.full
    return {
        "path": started.path.value,
        "cut": full.eager.cut,
        "fits": started.weaver.communicator.fits(full.segments * full.rows),
    }


def _metrics(scheduler: Scheduler) -> Metrics | None:
    context: Any = scheduler.metrics_collector_context
    return Metrics.beside(context.collector) if context.current_scheduler_metrics_enabled else None


def _writer(scheduler: Scheduler, metrics: Metrics | None) -> LogWriter | None:
    args: Any = scheduler.server_args
    if args.llm42_commit_log is None or scheduler.ps.tp_rank != 0:
        return None
    path = log_files.of_rank(Path(args.llm42_commit_log), scheduler.ps.dp_rank or 0, args.dp_size)
    file = RotatingFile(path, args.llm42_commit_log_max_bytes, args.llm42_commit_log_keep)
    name = f"--llm42-commit-log {path}"
    if metrics is None:
        writer = LogWriter(file, name)
    else:
        writer = LogWriter(file, name, on_written=metrics.line_written, on_dropped=metrics.line_dropped)
    atexit.register(writer.close)
    logger.info("Deterministic requests are logged to %s.", path)
    return writer


def _finished_request(
    req: Req, state: DeterministicRequest, finish_reason: Mapping[str, Any], configuration_digest: str
) -> FinishedRequest:
    params = req.sampling_params
    further: dict[str, Any] = {}
    if req.custom_logit_processor:
        further["custom_logit_processor"] = req.custom_logit_processor
    if req.require_reasoning:
        further["require_reasoning"] = True
    return FinishedRequest(
        rid=req.rid,
        prompt=req.origin_input_ids,
        sampling_params=params,
        seed=state.seed,
        log=state.log,
        finish_reason=finish_reason,
        weight_version=(params.custom_params or {}).get(WEIGHT_VERSION_KEY),
        configuration=configuration_digest,
        finished_at=now(),
        further=further,
    )
