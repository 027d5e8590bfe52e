"""Digest of what, beside the request and the weights, a deterministic output depends on.

It tells two configurations apart that cannot be expected to agree, from what is declared and installed. Not
in it: the weights, whose version stands beside it in the commit log; the tokenizer's files; environment
variables. What the canonical fingerprint sees of these is in ``docs/determinism.md``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: Packages whose code computes logits, masks or tokens.
PACKAGES = (
    "sglang",
    "sglang_ext",
    "torch",
    "transformers",
    "tokenizers",
    # kernels, and what they are compiled with
    "sglang-kernel",
    "flashinfer-python",
    "flash-attn-4",
    "sgl-deep-gemm",
    "quack-kernels",
    "humming-kernels",
    "tilelang",
    "triton",
    "nvidia-cutlass-dsl",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu13",
    # number formats
    "compressed-tensors",
    "torchao",
    # grammars
    "xgrammar",
    "llguidance",
    "outlines",
)

#: Server arguments that choose kernels, shapes or number formats, or which tokens a request's own parameters
#: allow. As SGLang has resolved them; where it leaves "auto", the rest of the description decides.
#: ``tests/observability/test_configuration.py`` says of every other argument why it is not here.
ARGUMENTS = (
    # model code and number formats
    "model_impl",
    "trust_remote_code",
    "load_format",
    "dtype",
    "quantization",
    "quantization_param_path",
    "modelopt_quant",
    "quantize_and_serve",
    "rl_quant_profile",
    "torchao_config",
    "kv_cache_dtype",
    "enable_fp32_lm_head",
    "enable_tf32_matmul",
    "rl_on_policy_target",
    "forward_hooks",
    # the model's parts on several ranks, and sums between them
    "tp_size",
    "ep_size",
    "moe_dense_tp_size",
    "init_expert_location",
    "enable_attn_tp_input_scattered",
    "disable_attn_tp_gather",
    "disable_custom_all_reduce",
    "enable_nccl_nvls",
    "enable_symm_mem",
    "enable_torch_symm_mem",
    "enable_mscclpp",
    "enable_scattered_sconv",
    "enable_quant_communications",
    "enable_flashinfer_allreduce_fusion",
    "enforce_disable_flashinfer_allreduce_fusion",
    "flashinfer_allreduce_fusion_backend",
    "enable_aiter_allreduce_fusion",
    # attention
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "triton_attention_reduce_in_fp32",
    "triton_attention_num_kv_splits",
    "triton_attention_split_tile_size",
    "flashinfer_mla_disable_ragged",
    "disable_chunked_prefix_cache",
    "dsa_prefill_backend",
    "dsa_decode_backend",
    "dsa_paged_mqa_logits_backend",
    "dsa_topk_backend",
    "enable_deepseek_v4_fp4_indexer",
    "enable_fused_qk_norm_rope",
    # matrix products and experts
    "bf16_gemm_backend",
    "fp8_gemm_runner_backend",
    "fp4_gemm_runner_backend",
    "disable_flashinfer_autotune",
    "flashinfer_autotune_skip_ops",
    "enable_torch_compile",
    "moe_runner_backend",
    "flashinfer_mxfp4_moe_precision",
    "enable_fused_moe_sum_all_reduce",
    "disable_flashinfer_cutlass_moe_fp4_allgather",
    "disable_shared_experts_fusion",
    "enforce_shared_experts_fusion",
    # which tokens may follow, and which end a request
    "grammar_backend",
    "constrained_json_whitespace_pattern",
    "constrained_json_disable_any_whitespace",
    "reasoning_parser",
    "enable_strict_thinking",
    "tokenizer_mode",
    "tokenizer_backend",
    "skip_tokenizer_init",
    # ours
    "enable_tokenweave",
    "tokenweave_ctas",
    "tokenweave_reserve",
    "llm42_window_size",
    "llm42_verify_batch_size",
)

#: Entries of a model's configuration that say where it lies or who wrote it.
_NOT_THE_MODEL = ("_name_or_path", "name_or_path", "transformers_version")


def digest(description: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a description of a configuration, whatever the order of its entries."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(
    server_args: Any, model_runner: Any, tokenweave: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration of this scheduler.

    Args:
        server_args: SGLang's, resolved.
        model_runner: SGLang's, with its model.
        tokenweave: how TokenWeave runs canonical passes, as it turned out; None where it does not.
    """
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "arguments": {name: getattr(server_args, name, None) for name in ARGUMENTS},
        "tokenweave": tokenweave,
        "dtype": str(model_runner.dtype),
        "model": _model(model_runner.model_config.hf_config),
        "device": _device(str(model_runner.device)),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _model(hf_config: Any) -> dict[str, Any]:
    return {name: value for name, value in hf_config.to_dict().items() if name not in _NOT_THE_MODEL}


def _device(device: str) -> dict[str, Any]:
    import torch

    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "name": properties.name,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {
        "name": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
