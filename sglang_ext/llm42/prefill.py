"""Prefill batches of marked requests: they take memory and are not run.

SGLang runs a prefill batch instead of a decode step, and merges it into the running batch a turn later. The
prompts of marked requests are computed by canonical passes, so their batch joins the running batch in the
turn that admits it. That turn goes on as if they had not been there: with a prefill batch of unmarked
requests if some wait, else with a decode step. So the device does not run dry, and mixed traffic is not cut
into turns of one kind and of the other.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42 import weight_updates
from sglang_ext.llm42.runtime import empty_result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sglang.srt.managers.schedule_batch import ScheduleBatch


def get_new_batch_prefill(original: Callable[..., Any], scheduler: Any, running_batch: ScheduleBatch) -> Any:
    """Around ``Scheduler.get_new_batch_prefill``: no marked request begins before updated weights are
    certified, and those that begin join the running batch at once."""
    plan = weight_updates.plan_prefill(original, scheduler, running_batch)
    # Whom this call preempted must not return before the result of its last step has been processed.
    if _join(scheduler, plan) and not any(req.is_retracted for req in scheduler.waiting_queue):
        with _without_grammars(scheduler.grammar_manager):
            plan = weight_updates.plan_prefill(original, scheduler, plan.running_batch)
        _join(scheduler, plan)  # more of them, if a limit on one batch kept them out of the first
    return plan


@contextmanager
def _without_grammars(grammars: Any) -> Iterator[None]:
    """Hide requests whose grammars are compiled: SGLang waits some milliseconds for them at each look."""
    compiling, grammars.grammar_queue = grammars.grammar_queue, []
    try:
        yield
    finally:
        grammars.grammar_queue = compiling


def _join(scheduler: Any, plan: Any) -> bool:
    """Let a marked prefill batch of ``plan`` join its running batch; returns whether it was one.

    Apart from the forward, this does what SGLang does when it runs, reports and merges a prefill batch.
    """
    batch, running_batch = plan.batch_to_run, plan.running_batch
    if batch is None or not deterministic.has_state(batch.reqs[0]):
        return False
    scheduler.llm42.joined(len(batch.out_cache_loc))
    batch.prefill_input_ids_cpu = batch.input_ids = None
    # The next decode step looks up a last token for every row; ours replaces that of marked ones.
    scheduler._relay_forward_payload(batch.req_pool_indices, empty_result(len(batch.reqs), batch))
    scheduler.metrics_reporter.report_prefill_stats(
        batch=batch, prefill_stats=batch.prefill_stats, can_run_cuda_graph=False
    )
    if running_batch.is_empty():
        running_batch = batch
    else:
        running_batch.merge_batch(batch)
    plan.batch_to_run, plan.running_batch = None, running_batch
    return True
