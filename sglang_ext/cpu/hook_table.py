"""The rows of the hook table that let SGLang serve on a CPU (feature :attr:`Feature.CPU`)."""

from __future__ import annotations

from sglang_ext.hook_types import Feature, Hook, Kind


def _row(target: str, kind: Kind, replacement: str, why: str) -> Hook:
    return Hook(target, kind, f"sglang_ext.cpu.{replacement}", Feature.CPU, why)


HOOKS: tuple[Hook, ...] = (
    _row(
        "sglang.srt.utils.common.get_device",
        Kind.AROUND,
        "platform:default_device",
        "without --device SGLang looks for accelerators only and stops",
    ),
    _row(
        "sglang.srt.server_args.ServerArgs._handle_cpu_backends",
        Kind.AROUND,
        "platform:default_backends",
        "the default on x86 is intel_amx, which needs AMX; an idle scheduler polls at full speed",
    ),
    _row(
        "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.__init__",
        Kind.AROUND,
        "platform:init_rotary_embedding",
        "imports a vllm kernel that the CPU path never calls",
    ),
    _row(
        "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__",
        Kind.BEFORE,
        "platform:without_device_communicators",
        "pynccl, custom and symmetric-memory all-reduce need a device; gloo stays",
    ),
    _row(
        "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.create_weights",
        Kind.AFTER,
        "platform:zero_expert_weights",
        "experts padded to a multiple of 32 compute with uninitialised memory",
    ),
    _row(
        "torch.Tensor.record_stream",
        Kind.AROUND,
        "platform:record_stream",
        "FutureMap calls it for speculative batches; CPU memory belongs to no stream",
    ),
    _row(
        "sglang.srt.layers.vocab_parallel_embedding.get_masked_input_and_mask",
        Kind.AROUND,
        "platform:run_uncompiled",
        "torch.compile takes 15-20 s in the first TP>1 request and needs a C++ compiler",
    ),
    _row(
        "sglang.srt.sampling.penaltylib.repetition_penalty.apply_scaling_penalties",
        Kind.AROUND,
        "platform:run_uncompiled",
        "torch.compile in the first request with a repetition penalty",
    ),
    _row(
        "sglang.srt.layers.sampler.multinomial_with_seed",
        Kind.AROUND,
        "platform:run_uncompiled",
        "torch.compile in the first seeded request",
    ),
    _row(
        "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32",
        Kind.REPLACE,
        "sampling:murmur_hash32",
        "seeded sampling: Triton kernel",
    ),
    _row(
        "sglang.srt.layers.logits_processor.fused_softcap",
        Kind.REPLACE,
        "sampling:cap_logits",
        "capped logits (Gemma 2): Triton kernel",
    ),
    _row(
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask",
        Kind.REPLACE,
        "sampling:apply_grammar_mask_of",
        "grammar masks: raises on a CPU, where xgrammar's own kernel works",
    ),
    _row(
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend.apply_vocab_mask",
        Kind.REPLACE,
        "sampling:apply_grammar_mask",
        "the same for grammars inside reasoning",
    ),
    _row(
        "sglang.srt.constrained.xgrammar_backend._allocate_token_bitmask",
        Kind.REPLACE,
        "sampling:allocate_grammar_mask",
        "grammar masks: pinned memory needs a GPU",
    ),
    _row(
        "sglang.srt.utils.numa_utils.init_threads_binding",
        Kind.AROUND,
        "threads:choose_cores",
        "without SGLANG_CPU_OMP_THREADS_BIND more TP ranks than NUMA nodes are refused",
    ),
    _row(
        "sglang.srt.distributed.bootstrap._init_cpu_threads_env",
        Kind.AROUND,
        "threads:bind_cores",
        "binds through sgl_kernel on AMX and arm, not at all elsewhere",
    ),
    _row(
        "sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
        Kind.AROUND,
        "experts:moe_forward",
        "canonical passes: rows per expert, and with them the bits, depend on the other rows",
    ),
    _row(
        "torch.distributed.all_reduce",
        Kind.AROUND,
        "collectives:all_reduce",
        "canonical passes: gloo's order of summation depends on the row from three ranks on",
    ),
    _row(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
        Kind.REPLACE,
        "kv_memory:init_kv_copy",
        "warms up a Triton kernel whenever a speculative algorithm is on",
    ),
    _row(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._move_kv_cache_impl",
        Kind.BEFORE,
        "kv_memory:use_native_move",
        "copies KV slots with a Triton kernel",
    ),
    _row(
        "sglang.kernels.ops.memory.allocator.alloc_extend_kernel",
        Kind.REPLACE,
        "kv_memory:AllocExtend",
        "page_size > 1: Triton kernel",
    ),
    _row(
        "sglang.kernels.ops.memory.allocator.alloc_decode_kernel",
        Kind.REPLACE,
        "kv_memory:AllocDecode",
        "page_size > 1: Triton kernel",
    ),
    _row(
        "sglang.srt.mem_cache.allocation.assign_req_to_token_pool",
        Kind.REPLACE,
        "kv_memory:AssignReqToTokenPool",
        "slots of speculative batches: Triton kernel",
    ),
)
