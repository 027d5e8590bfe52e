"""The rows of the hook table that LLM-42 needs in the scheduler (feature :attr:`Feature.LLM42`)."""

from __future__ import annotations

from sglang_ext.hook_types import Feature, Hook, Kind

_BATCH = "sglang.srt.managers.schedule_batch"
_POLICY = "sglang.srt.managers.schedule_policy"
_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer"


def _row(target: str, kind: Kind, function: str, why: str, module: str = "scheduler_hooks") -> Hook:
    return Hook(target, kind, f"sglang_ext.llm42.{module}:{function}", Feature.LLM42, why)


_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

HOOKS: tuple[Hook, ...] = (
    _row(
        "sglang.srt.managers.scheduler.Scheduler.init_model_worker",
        Kind.AFTER,
        "start_runtime",
        "the runtime needs weights and KV pools",
    ),
    _row(
        f"{_BATCH}.Req.__init__",
        Kind.AFTER,
        "attach_state",
        "marked requests carry their state and the canonical radix-cache namespace",
    ),
    _row(
        f"{_POLICY}.SchedulePolicy.calc_priority",
        Kind.AFTER,
        "queue_sorted",
        "a request that waited for a batch of its kind is tried first",
    ),
    _row(
        f"{_POLICY}.PrefillAdder.preempt_to_schedule",
        Kind.AROUND,
        "preempt_to_schedule",
        "no request is retracted for one that waits for a batch of its kind",
    ),
    _row(
        f"{_POLICY}.PrefillAdder.add_one_req",
        Kind.AROUND,
        "add_one_req",
        "a prefill batch is all marked or all unmarked; marked prompts are computed by the lane",
    ),
    _row(
        f"{_BATCH}.ScheduleBatch.prepare_for_extend",
        Kind.AFTER,
        "prepare_for_extend",
        "marked requests enter the lane when their memory is allocated",
    ),
    _row(
        f"{_BATCH}.ScheduleBatch.new_tokens_required_next_decode",
        Kind.AROUND,
        "tokens_required",
        "a marked request may need no slot or, after its prompt, the first one",
    ),
    _row(
        f"{_BATCH}.ScheduleBatch.prepare_for_decode",
        Kind.AROUND,
        "prepare_for_decode",
        "marked requests decode at the position that the lane says",
    ),
    _row(
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        Kind.AROUND,
        "forward_batch_generation",
        "canonical passes are launched beside decode",
    ),
    _row(
        "sglang.srt.model_executor.model_runner.ModelRunner._forward_raw",
        Kind.AROUND,
        "forward_raw",
        "a decode step may run in a canonical shape, so that what it decides is final",
    ),
    _row(
        "sglang.srt.model_executor.model_runner.ModelRunner.sample",
        Kind.AROUND,
        "sample",
        "candidates are drawn by the canonical sampler, row by row",
    ),
    _row(
        "sglang.srt.model_executor.model_runner.ModelRunner._preprocess_logits",
        Kind.AFTER,
        "logits_preprocessed",
        "SGLang's state of a marked request may leave its row no token, which would end SGLang's sampler",
    ),
    _row(
        f"{_RESULTS}.process_batch_result_prefill",
        Kind.BEFORE,
        "process_prefill_result",
        "SGLang issue 34719",
    ),
    _row(
        f"{_RESULTS}._normalize_decode_outputs",
        Kind.AROUND,
        "decode_outputs",
        "a marked row yields committed tokens, none or several; SGLang issue 34719",
    ),
    _row(
        f"{_RESULTS}._handle_finish_state_updated_req",
        Kind.AFTER,
        "finish_state_updated",
        "commit logs close when a request ends",
    ),
    _row(
        "sglang.srt.managers.scheduler_components.output_sender.SenderWrapper.send_output",
        Kind.BEFORE,
        "output_sent",
        "commit logs close when a request ends that no step's result says it of, as while it waits",
    ),
    _row(
        f"{_RESULTS}.process_batch_result_decode",
        Kind.AFTER,
        "insert_prompts",
        "canonical prompts enter the radix cache when complete",
    ),
    _row(
        f"{_RESULTS}._apply_decode_logprobs",
        Kind.AROUND,
        "apply_logprobs",
        "log-probabilities of marked requests come from canonical logits",
    ),
    _row(
        f"{_BATCH}.Req.update_finish_state",
        Kind.AROUND,
        "update_finish_state",
        "finish checks token by token, when tokens are committed",
        module="commit",
    ),
    _row(
        f"{_BATCH}.Req.reset_for_retract",
        Kind.AFTER,
        "retracted",
        "the commit log records retractions",
    ),
    _row(
        "sglang.srt.mem_cache.common.release_kv_cache",
        Kind.BEFORE,
        "release_kv_cache",
        "a request that gives its memory back leaves the lane",
    ),
    _row(
        "sglang.srt.mem_cache.common._release_overallocated_kv_indices",
        Kind.AROUND,
        "release_overallocated",
        "slots of uncommitted candidates are freed where SGLang asserts that there are none",
    ),
    _row(
        f"{_STREAMER}._GenerationStreamAccumulator.accept",
        Kind.AROUND,
        "accept_for_streaming",
        "no empty chunk is streamed while candidates wait",
    ),
    *(
        _row(
            f"sglang.srt.distributed.parallel_state.GroupCoordinator._all_reduce_{where}_place",
            Kind.AROUND,
            f"all_reduce_{where}_place",
            "canonical passes on several GPUs: the order of summation must not depend on the row",
            module="collectives",
        )
        for where in ("out", "in")
    ),
    _row(
        "sglang.srt.layers.communicator.apply_flashinfer_allreduce_fusion",
        Kind.AROUND,
        "fused_all_reduce",
        "canonical passes on several GPUs: the fused kernel's algorithm follows the number of rows",
        module="collectives",
    ),
    _row(
        "sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill",
        Kind.AROUND,
        "get_new_batch_prefill",
        "a marked prefill batch joins the running batch unrun, after updated weights were certified",
        module="prefill",
    ),
    *(
        _row(
            f"{_WEIGHTS}.update_weights_from_{source}",
            Kind.AFTER,
            "weights_updated",
            "canonical KV of the old weights must not be used, requests that began with them must end",
            module="weight_updates",
        )
        for source in ("disk", "distributed", "tensor", "ipc")
    ),
)
