"""The rows of the hook table that TokenWeave needs (feature :attr:`Feature.TOKENWEAVE`)."""

from __future__ import annotations

from sglang_ext.hook_types import Feature, Hook, Kind


def _row(target: str, kind: Kind, function: str, why: str) -> Hook:
    replacement = f"sglang_ext.tokenweave.sglang_hooks:{function}"
    return Hook(f"sglang.srt.{target}", kind, replacement, Feature.TOKENWEAVE, why)


HOOKS: tuple[Hook, ...] = (
    _row(
        "model_executor.model_runner.ModelRunner.load_model",
        Kind.AFTER,
        "after_load_model",
        "the decoder stack is wrapped once the model exists",
    ),
    _row(
        "model_executor.model_runner.ModelRunner.forward",
        Kind.AROUND,
        "around_forward",
        "the first prefill batches of each size are timed, in halves and whole",
    ),
    _row(
        "model_executor.model_runner.build_attention_backends",
        Kind.AROUND,
        "around_build_attention_backends",
        "each half needs an attention plan of its own",
    ),
    _row(
        "distributed.parallel_state.GroupCoordinator.all_reduce",
        Kind.AROUND,
        "around_all_reduce",
        "the single funnel of every all-reduce; put off until a norm takes it",
    ),
    _row(
        "layers.layernorm.RMSNorm.forward",
        Kind.AROUND,
        "around_rmsnorm",
        "takes an all-reduce put off and does the fused step",
    ),
    _row(
        "layers.layernorm.GemmaRMSNorm.forward",
        Kind.AROUND,
        "around_gemma_rmsnorm",
        "the same for norms that scale by 1 + w",
    ),
    _row(
        "model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph",
        Kind.AROUND,
        "around_can_run_graph",
        "batches that are cut in two run outside of prefill graphs",
    ),
)
