"""Glue between SGLang's scheduler and :class:`sglang_ext.llm42.runtime.Runtime`.

Each function is the replacement of one row in :data:`HOOKS`; it looks whether a deterministic request is
concerned and otherwise leaves the matter to SGLang.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.doctor.certify import certify_decode, certify_few_rows, certify_quickly, certify_sizes
from sglang_ext.llm42 import allocation, logprobs
from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42.attention import canonical_attention_factory
from sglang_ext.llm42.commit import commit, commit_decoded
from sglang_ext.llm42.config import Llm42Config
from sglang_ext.llm42.drafting import DecodeStep
from sglang_ext.llm42.observability.observer import Observer
from sglang_ext.llm42.report import Report
from sglang_ext.llm42.request import DeterministicRequest, Verdict
from sglang_ext.llm42.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.utils import GenerationBatchResult

    from sglang_ext.doctor.report import SizeReport

logger = logging.getLogger(__name__)

_runtime: Runtime | None = None
_observer: Observer | None = None


def runtime() -> Runtime:
    """The runtime of this scheduler process.

    Raises:
        RuntimeError: the scheduler has not built its model yet.
    """
    if _runtime is None:
        raise RuntimeError("LLM-42 is not running in this process")
    return _runtime


def observer() -> Observer:
    """Metrics and commit log of this scheduler process.

    Raises:
        RuntimeError: the scheduler has not built its model yet.
    """
    if _observer is None:
        raise RuntimeError("LLM-42 is not running in this process")
    return _observer


# Start


def start_runtime(result: None, scheduler: Scheduler) -> None:
    """After ``Scheduler.init_model_worker``: weights and pools are there, so the lane can be built.

    Raises:
        CertificationError: rows of canonical passes are not invariant with this model and configuration.
    """
    global _runtime, _observer
    config = Llm42Config.from_server_args(scheduler.server_args)
    model_runner = scheduler.tp_worker.model_runner
    _runtime = Runtime(model_runner, config, canonical_attention_factory(model_runner))
    _observer = Observer.of_scheduler(scheduler, _runtime)
    scheduler.llm42 = _runtime
    scheduler.llm42_configuration_digest = _observer.configuration_digest
    scheduler.llm42_accepting_reqs = True
    certify(scheduler)


def certify(scheduler: Scheduler) -> None:
    """Check row invariance and note the canonical fingerprint; every rank must call it while idle.

    Raises:
        CertificationError: rows of canonical passes are not invariant with this model and configuration.
        RankMismatch: the ranks computed different logits.
    """
    with _under_watchdog(scheduler):
        _certify(scheduler)


@contextmanager
def _under_watchdog(scheduler: Scheduler) -> Iterator[None]:
    """Let SGLang's watchdog end the server if what runs in here takes longer than ``--watchdog-timeout``.

    It looks only while a batch runs or the scheduler is initializing, and a rank that waits in a collective
    for one that has failed has no batch.
    """
    # The watchdog's time begins when it sees another number here, else with the last batch.
    scheduler.forward_ct += 1
    before, scheduler.is_initializing = scheduler.is_initializing, True
    try:
        yield
    finally:
        scheduler.is_initializing = before


def _certify(scheduler: Scheduler) -> None:
    verification = runtime().verification
    verification.wait()
    passes = verification.passes
    certificate = certify_quickly(passes.full)
    scheduler.llm42_fingerprint = certificate.fingerprint
    logger.info(
        "Row invariance %s (checked in %.1f s); canonical fingerprint %s",
        certificate.conclusion(),
        certificate.seconds,
        certificate.fingerprint,
    )
    _allow("Smaller passes", lambda: certify_sizes(passes, quick=True), verification.allow_sizes)
    _allow("Logits of few rows", lambda: certify_few_rows(passes, quick=True), passes.allow_few)
    if (decode := runtime().canonical_decode) is not None:
        steps = decode.passes.values()
        _allow("Canonical decode steps", lambda: certify_decode(passes.full, steps, quick=True), decode.allow)


def _allow(
    what: str, certify: Callable[[], Sequence[SizeReport]], allow: Callable[[Iterable[int]], None]
) -> None:
    """Let those sizes run that ``certify`` finds to have the full pass's bits, and say what it found."""
    started = time.perf_counter()
    reports = certify()
    allow(report.segments for report in reports if report.passed)
    if reports:
        logger.info("%s (%.1f s): %s", what, time.perf_counter() - started, "; ".join(map(str, reports)))


# Life of a request


def attach_state(result: None, req: Req, *args: Any, **kwargs: Any) -> None:
    """After ``Req.__init__``: marked requests get their state and their radix-cache namespace."""
    deterministic.attach(req, runtime().weights_generation)
    state = deterministic.of(req)
    if state is not None:
        req.customized_info = {"llm42": Report(state)}


def queue_sorted(result: None, policy: Any, waiting_queue: list[Req], *args: Any, **kwargs: Any) -> None:
    """After ``SchedulePolicy.calc_priority``, with which a turn's admission begins."""
    runtime().admission.begin_turn(waiting_queue, policy.enable_priority_scheduling)


def preempt_to_schedule(
    original: Callable[..., bool], adder: Any, req: Req, *args: Any, **kwargs: Any
) -> bool:
    """Around ``PrefillAdder.preempt_to_schedule``: nothing is taken for a request that has to wait anyway.

    SGLang goes on to ``add_one_req``, which says so.
    """
    if not runtime().admission.admits(adder.can_run_list, req):
        return True
    return original(adder, req, *args, **kwargs)


def add_one_req(
    original: Callable[..., Any], adder: Any, req: Req, has_chunked_req: bool, *args: Any, **kwargs: Any
) -> Any:
    """Around ``PrefillAdder.add_one_req``: prefill batches are all marked or all unmarked; see
    :class:`Admission`.

    A marked request only takes memory here, so SGLang's limits on computed tokens do not apply to it. An
    unmarked one may find a canonical prefix.
    """
    from sglang.srt.managers.schedule_policy import AddReqResult

    admission, batch = runtime().admission, adder.can_run_list
    if not admission.admits(batch, req):
        # With a prompt's last part has_chunked_req is false, but its row of the pool is taken.
        has_part = has_chunked_req or batch[0].req_pool_idx is not None
        return AddReqResult.CONTINUE if admission.passes_over(batch, req, has_part) else AddReqResult.OTHER
    admission.tried(req)
    if deterministic.of(req) is None:
        runtime().share_prefix(adder, req)
        return original(adder, req, has_chunked_req, *args, **kwargs)
    with _unlimited_tokens(adder):
        return original(adder, req, has_chunked_req, *args, **kwargs)


@contextmanager
def _unlimited_tokens(adder: Any) -> Iterator[None]:
    limits = adder.rem_chunk_tokens, adder.rem_input_tokens
    adder.rem_chunk_tokens, adder.rem_input_tokens = None, 1 << 40
    try:
        yield
    finally:
        adder.rem_chunk_tokens, adder.rem_input_tokens = limits


def prepare_for_extend(result: None, batch: ScheduleBatch) -> None:
    """After ``ScheduleBatch.prepare_for_extend``: marked requests enter the lane."""
    for req in batch.reqs:
        if deterministic.has_state(req):
            req.kv_committed_len = len(req.prefix_indices)
            runtime().admit(req)
            # SGLang would not run a batch again that has no output to generate; the lane has yet to start.
            batch.is_prefill_only = False


def release_kv_cache(req: Req, *args: Any, **kwargs: Any) -> None:
    """Before ``release_kv_cache``: a marked request leaves the lane, whatever the reason."""
    runtime().release(req)


def release_overallocated(
    original: Callable[..., None], req: Req, start: int, end: int, tree_cache: Any
) -> None:
    """Around ``_release_overallocated_kv_indices``, which asserts that nothing is left without speculation:
    a marked request's candidates are."""
    if deterministic.of(req) is None:
        original(req, start, end, tree_cache)
        return
    allocator = tree_cache.token_to_kv_pool_allocator
    start = -(-start // allocator.page_size) * allocator.page_size
    if start < end:
        slots = tree_cache.req_to_token_pool.req_to_token[req.req_pool_idx][start:end]
        allocator.free_segment(slots, start_pos=start)


def retracted(result: None, req: Req) -> None:
    """After ``Req.reset_for_retract``: what is committed stays, candidates are gone.

    A request that is about to be ended (:attr:`Req.to_finish`) returns for nothing but its end, which is the
    next and last record. Its last window may have been cut where the grammar refused a token.
    """
    state = deterministic.of(req)
    if state is not None and req.to_finish is None:
        state.log.retract(len(req.output_ids))


# A step


def tokens_required(
    original: Callable[..., int], batch: ScheduleBatch, selected_indices: list[int] | None = None
) -> int:
    """Around ``ScheduleBatch.new_tokens_required_next_decode``."""
    if not allocation.any_deterministic(batch.reqs):
        return original(batch, selected_indices)
    reqs = batch.reqs if selected_indices is None else [batch.reqs[i] for i in selected_indices]
    return allocation.slots_needed(reqs, batch.token_to_kv_pool_allocator.page_size)


def prepare_for_decode(original: Callable[..., None], batch: ScheduleBatch) -> None:
    """Around ``ScheduleBatch.prepare_for_decode``."""
    batch.llm42 = None
    if not allocation.any_deterministic(batch.reqs):
        original(batch)
        return
    batch.llm42 = runtime().begin_step(batch.reqs)
    allocation.prepare_for_decode(batch, batch.llm42)


def forward_batch_generation(
    original: Callable[..., GenerationBatchResult],
    worker: Any,
    batch: ScheduleBatch | None,
    *args: Any,
    **kw: Any,
) -> GenerationBatchResult:
    """Around ``TpModelWorker.forward_batch_generation``."""
    if batch is None:
        return original(worker, batch, *args, **kw)
    _before_forward(batch)
    step: DecodeStep | None = getattr(batch, "llm42", None)
    if step is None:
        return original(worker, batch, *args, **kw)
    return runtime().run_step(step, batch, lambda: original(worker, batch, *args, **kw))


def _before_forward(batch: ScheduleBatch) -> None:
    """Let this batch's forward wait if it may write to slots that a canonical pass under way still uses, and
    start on marked prompts if it is not a decode step, which would."""
    if _runtime is None:
        return
    prompts = batch.forward_mode.is_extend()
    slots = 0 if batch.out_cache_loc is None else len(batch.out_cache_loc)
    _runtime.before_forward(slots, prompts)
    if prompts:
        _runtime.launch_joined()


def forward_raw(original: Callable[..., Any], model_runner: Any, forward_batch: Any, *args: Any) -> Any:
    """Around ``ModelRunner._forward_raw``."""
    from sglang.srt.model_executor.model_runner import ModelRunnerOutput

    output = None if _runtime is None else _runtime.decode_forward(forward_batch)
    if output is None:
        return original(model_runner, forward_batch, *args)
    on_gpu = model_runner.device == "cuda"
    return ModelRunnerOutput(logits_output=output, can_run_graph=on_gpu)


def sample(
    original: Callable[..., torch.Tensor], model_runner: Any, logits_output: Any, forward_batch: Any
) -> Any:
    """Around ``ModelRunner.sample``."""
    return runtime().drafting.sample(
        logits_output, lambda: original(model_runner, logits_output, forward_batch)
    )


def logits_preprocessed(result: None, model_runner: Any, logits_output: Any, sampling_info: Any) -> None:
    """After ``ModelRunner._preprocess_logits``: what is in the marked rows is not SGLang's to sample."""
    runtime().drafting.level_marked_rows(logits_output.next_token_logits)


# Results


def process_prefill_result(processor: Any, batch: ScheduleBatch, result: GenerationBatchResult) -> None:
    """Before ``process_batch_result_prefill``; see :func:`_fill_token_ids_logprobs`."""
    _fill_token_ids_logprobs(result.logits_output)


def decode_outputs(
    original: Callable[..., Any], processor: Any, *, batch: ScheduleBatch, result: Any, **kwargs: Any
) -> tuple[list[list[int]], Any]:
    """Around ``_normalize_decode_outputs``: a marked row yields what is committed, not what was drafted."""
    _fill_token_ids_logprobs(kwargs["logits_output"])
    token_ids, token_logprobs = original(processor, batch=batch, result=result, **kwargs)
    step: DecodeStep | None = getattr(result, "llm42", None)
    if step is None:
        return token_ids, token_logprobs
    narrow = dict(zip(step.drafted, [] if step.narrow is None else step.narrow.tolist(), strict=True))
    committed = 0
    for row, req in enumerate(batch.reqs):
        state = deterministic.of(req)
        if state is None:
            continue
        drafted, token_ids[row] = token_ids[row], []
        if req.finished() or req.is_retracted:
            continue
        if row in step.deciding and row in narrow:
            token_ids[row] = _commit_decided(step, row, req, state, drafted[0])
        else:
            if row in narrow:
                position = step.positions[row] + 1
                runtime().note_candidate(req, position, _may_end(req, drafted[0]), narrow[row])
            token_ids[row] = commit(req, state.take_verdicts())
        committed += len(token_ids[row]) - 1
    processor.metrics_reporter.num_generated_tokens += committed
    observer().step_done()
    return token_ids, token_logprobs


def _commit_decided(
    step: DecodeStep, row: int, req: Req, state: DeterministicRequest, token: int
) -> list[int]:
    """Commit what a canonical decode step decided in ``row``, behind what passes decided before."""
    logits = step.decided_logits.get(row)
    entry = None if logits is None else logprobs.of_output_row(logits, token, req)
    if not state.verdicts:
        return commit_decoded(req, state, token, entry)
    state.decide(Verdict((token,), 0, 0, False, () if entry is None else (entry,), by_decode=True))
    return commit(req, state.take_verdicts())


def _fill_token_ids_logprobs(logits_output: Any) -> None:
    """Put an empty tensor where a request of the batch did not ask for log-probabilities of chosen tokens.

    SGLang leaves a list there and then takes it for a tensor, which ends the scheduler (its issue 34719); a
    batch that mixes such requests is nothing unusual.
    """
    values = getattr(logits_output, "next_token_token_ids_logprobs_val", None)
    if values:
        logits_output.next_token_token_ids_logprobs_val = [
            value if torch.is_tensor(value) else torch.tensor(value) for value in values
        ]


def _may_end(req: Req, token: int) -> bool:
    """Whether ``token`` would end the output of ``req`` by its id."""
    params = req.sampling_params
    if params.ignore_eos:
        return False
    ends = {*(req.eos_token_ids or ()), *(params.stop_token_ids or ())}
    if req.tokenizer is not None:
        ends |= {req.tokenizer.eos_token_id, *(req.tokenizer.additional_stop_token_ids or ())}
    return token in ends


def finish_state_updated(result: None, processor: Any, req: Req, *args: Any, **kwargs: Any) -> None:
    """After ``_handle_finish_state_updated_req``: the commit log of a request that has ended is closed."""
    state = deterministic.of(req)
    if state is not None and req.finished():
        _ended(req, state, req.finished_reason.to_json())


def output_sent(sender: Any, output: Any, recv_obj: Any = None) -> None:
    """Before ``SenderWrapper.send_output``: a request that ends without a step's result ends with a message.

    Aborted or timed out while it waited, refused by a full queue, by its priority or by us, given up when
    memory does not suffice for it alone: whatever the reason, SGLang sends an ``AbortReq`` to the server's
    process, together with the request, and forgets it.
    """
    from sglang.srt.managers.io_struct import AbortReq

    state = deterministic.of(recv_obj) if isinstance(output, AbortReq) else None
    if state is None or state.log.released:
        return
    # What SGLang's server process answers where the message gives no reason.
    default = {"type": "abort", "message": output.abort_message or "Abort in waiting queue"}
    _ended(recv_obj, state, output.finished_reason or default)


def _ended(req: Req, state: DeterministicRequest, finish_reason: Mapping[str, Any]) -> None:
    state.log.release(finish_reason["type"], state.log.num_committed)
    observer().finished(req, state, finish_reason)


def insert_prompts(result: None, processor: Any, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> None:
    """After ``process_batch_result_decode``: prompts whose canonical KV is complete enter the radix cache.

    Not earlier: while a result is processed, SGLang collects freed slots as views of ``req_to_token`` and
    frees them at the end. Insertion rewrites that table, so the views would show slots of the cache.
    """
    from sglang.srt.mem_cache.common import maybe_cache_unfinished_req

    for req in batch.reqs:
        state = deterministic.of(req)
        if state is None or not state.insert_prompt:
            continue
        state.insert_prompt = False
        if not req.finished() and not req.is_retracted:
            # It may be re-pointed to slots that the cache holds; its own are freed then.
            runtime().slots_freed(req)
            req.time_stats.set_prefill_finished_time()
            maybe_cache_unfinished_req(req, processor.tree_cache)


def apply_logprobs(original: Callable[..., None], processor: Any, *, req: Req, **kwargs: Any) -> None:
    """Around ``_apply_decode_logprobs``: a marked request reports what canonical logits say."""
    state = deterministic.of(req)
    if state is None:
        original(processor, req=req, **kwargs)
        return
    if req.output_ids:
        logprobs.finish_prompt(req, state.prompt_logprobs)
    logprobs.append_output(req, state.output_logprobs)
    state.output_logprobs.clear()


def accept_for_streaming(original: Callable[..., None], accumulator: Any, *, req: Req) -> None:
    """Around the output accumulator's ``accept``: no empty chunks while candidates wait."""
    waiting = deterministic.has_state(req) and not req.finished()
    if waiting and req.send_token_offset >= len(req.output_ids):
        return
    original(accumulator, req=req)
