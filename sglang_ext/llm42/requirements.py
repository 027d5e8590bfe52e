"""What a server must not be started with together with ``--enable-llm42``, and why.

Each of these would make a deterministic request's output depend on other traffic, or reaches a part of
SGLang that the canonical lane does not know yet. Refusing is better than a promise that does not hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_ext.llm42.decode_policy import DecodeMode

if TYPE_CHECKING:
    from sglang_ext.server_args import ServerArgs

MAX_WINDOW_SIZE = 1024

#: The Hopper generation of GPUs.
HOPPER = 9

#: Values of ``--kv-cache-dtype`` that are a model's own precision; which one, the canonical pass checks.
_PLAIN_KV = ("auto", "bf16", "bfloat16")

#: Model paths for which SGLang reads no model configuration.
_NO_MODEL = ("none", "dummy")


@dataclass(frozen=True)
class Unsupported:
    """Something that a server with deterministic requests cannot have yet.

    Attributes:
        what: flag that asks for it, or kind of model.
        applies: whether the server's arguments (or the model's configuration) have it.
        reason: completes "... because".
    """

    what: str
    applies: Callable[[Any], object]
    reason: str


FLAGS: tuple[Unsupported, ...] = (
    Unsupported(
        "--speculative-algorithm",
        lambda args: args.speculative_algorithm,
        "verification works on candidates of ordinary decoding",
    ),
    Unsupported("--pp-size > 1", lambda args: args.pp_size > 1, "canonical passes run on one pipeline stage"),
    Unsupported(
        "--enable-mixed-chunk",
        lambda args: args.enable_mixed_chunk,
        "deterministic prompts must not share a forward pass with decode",
    ),
    Unsupported(
        "--enable-dp-attention",
        lambda args: args.enable_dp_attention,
        "the rows of a pass would depend on the other ranks' traffic",
    ),
    Unsupported(
        "--enable-prefill-cp, --attn-cp-size or --dcp-size > 1",
        lambda args: args.enable_prefill_cp or args.attn_cp_size > 1 or args.dcp_size > 1,
        "context parallelism splits attention over ranks",
    ),
    Unsupported(
        "--ep-size > 1",
        lambda args: args.ep_size > 1,
        "a rank would compute the rows that chose its experts, and their number depends on the other rows",
    ),
    Unsupported(
        "--moe-a2a-backend",
        lambda args: args.moe_a2a_backend not in (None, "none"),
        "which rows reach an expert depends on the traffic of all ranks",
    ),
    Unsupported(
        "--enable-eplb, --ep-num-redundant-experts or --ep-dispatch-algorithm",
        lambda args: args.enable_eplb or args.ep_num_redundant_experts > 0 or args.ep_dispatch_algorithm,
        "which copy of an expert computes a row depends on traffic",
    ),
    Unsupported(
        "--elastic-ep-backend", lambda args: args.elastic_ep_backend, "ranks with experts come and go"
    ),
    Unsupported(
        "--moe-dp-size > 1 or --dwdp-size > 1",
        lambda args: args.moe_dp_size > 1 or args.dwdp_size > 1,
        "experts would serve several data-parallel ranks",
    ),
    Unsupported(
        "--kt-weight-path",
        lambda args: args.kt_weight_path,
        "its kernels compute as many rows of an expert as chose it",
    ),
    Unsupported(
        "--enable-hierarchical-cache",
        lambda args: args.enable_hierarchical_cache,
        "its storage does not know which KV is canonical",
    ),
    Unsupported(
        "--enable-hisparse",
        lambda args: args.enable_hisparse,
        "its storage does not know which KV is canonical",
    ),
    Unsupported(
        "--enable-lmcache",
        lambda args: args.enable_lmcache,
        "its storage does not know which KV is canonical",
    ),
    Unsupported(
        "--enable-flexkv", lambda args: args.enable_flexkv, "its storage does not know which KV is canonical"
    ),
    Unsupported(
        "--radix-cache-backend",
        lambda args: args.radix_cache_backend,
        "only SGLang's own radix cache keeps canonical KV apart",
    ),
    Unsupported(
        "--enable-streaming-session or --enable-session-radix-cache",
        lambda args: args.enable_streaming_session or args.enable_session_radix_cache,
        "sessions carry KV from turn to turn that need not be canonical",
    ),
    Unsupported(
        "--disaggregation-mode",
        lambda args: args.disaggregation_mode != "null",
        "prompts are computed by the same passes as verification, so on the same server",
    ),
    Unsupported(
        "--enable-deterministic-inference",
        lambda args: args.enable_deterministic_inference,
        "it makes all requests deterministic in another way",
    ),
    Unsupported(
        "--enable-lora or --lora-paths",
        lambda args: args.enable_lora or args.lora_paths,
        "canonical passes do not apply adapters yet",
    ),
    Unsupported(
        "--enable-return-routed-experts",
        lambda args: args.enable_return_routed_experts,
        "SGLang notes them by KV slot and row, in buffers that canonical passes would write, too",
    ),
    Unsupported(
        "--enable-symm-mem with --tp-size > 2",
        lambda args: args.enable_symm_mem and args.tp_size > 2,
        "its all-reduce does not sum in the order of the ranks",
    ),
    Unsupported(
        "--enable-two-batch-overlap or --enable-single-batch-overlap",
        lambda args: args.enable_two_batch_overlap or args.enable_single_batch_overlap,
        "canonical passes have one fixed shape",
    ),
    Unsupported(
        "--enable-pdmux", lambda args: args.enable_pdmux, "prefill and decode would share the GPU unevenly"
    ),
    Unsupported(
        "--tokenizer-worker-num > 1",
        lambda args: args.tokenizer_worker_num > 1,
        "requests are marked and checked in the one tokenizer process",
    ),
    Unsupported(
        "--smg-grpc-mode or --grpc-mode",
        lambda args: args.smg_grpc_mode or args.grpc_mode,
        "that server does not pass the place where requests are marked and checked",
    ),
    Unsupported(
        "--attention-backend other than flashinfer on a GPU",
        lambda args: args.device == "cuda" and {*args.get_attention_backends()} - {None, "flashinfer"},
        "canonical passes use FlashInfer's kernel, and no other backend was tried beside it (SGLang's own "
        "choice on Hopper is another, so the flag must be given)",
    ),
    Unsupported(
        "--kv-cache-dtype in 8 bits or fewer",
        lambda args: args.kv_cache_dtype not in _PLAIN_KV,
        "canonical attention reads a cache in the model's own precision",
    ),
    Unsupported(
        "--dllm-algorithm", lambda args: args.dllm_algorithm, "diffusion models do not decode token by token"
    ),
    Unsupported("--is-embedding", lambda args: args.is_embedding, "embedding models generate nothing"),
    Unsupported(
        "--encoder-only or --language-only",
        lambda args: args.encoder_only or args.language_only,
        "multi-modal inputs are not deterministic yet",
    ),
)

MODELS: tuple[Unsupported, ...] = (
    Unsupported(
        "models with sliding-window attention",
        lambda config: _has_sliding_window(config),
        "their KV is dropped behind the window",
    ),
    Unsupported(
        "models with state-space or linear-attention layers",
        lambda config: _has_recurrent_layers(config),
        "their state cannot be rolled back",
    ),
    Unsupported(
        "models with multi-head latent attention (MLA)",
        lambda config: config.attention_arch.name == "MLA",
        "canonical attention reads keys and values, not what both are computed from",
    ),
    Unsupported(
        "models with LongRoPE",
        lambda config: _has_long_rope(config),
        "one long request in a batch changes the rotation of all its rows",
    ),
    Unsupported(
        "encoder-decoder models",
        lambda config: config.is_encoder_decoder,
        "canonical passes know decoders only",
    ),
)


def nonsense(args: ServerArgs) -> list[str]:
    """One sentence for each flag of ours whose value makes no sense."""
    found = []
    if not _is_int(args.llm42_window_size) or not 1 <= args.llm42_window_size <= MAX_WINDOW_SIZE:
        found.append(f"--llm42-window-size must be 1 to {MAX_WINDOW_SIZE}, not {args.llm42_window_size!r}.")
    if not _is_int(args.llm42_verify_batch_size) or args.llm42_verify_batch_size < 1:
        found.append(f"--llm42-verify-batch-size must be at least 1, not {args.llm42_verify_batch_size!r}.")
    if not _is_int(args.llm42_max_wait_steps) or args.llm42_max_wait_steps < 0:
        found.append(f"--llm42-max-wait-steps must be at least 0, not {args.llm42_max_wait_steps!r}.")
    modes = [mode.value for mode in DecodeMode]
    if args.llm42_canonical_decode not in modes:
        found.append(
            f"--llm42-canonical-decode must be {', '.join(modes[:-1])} or {modes[-1]}, not "
            f"{args.llm42_canonical_decode!r}."
        )
    if args.llm42_mark_all and not args.enable_llm42:
        found.append("--llm42-mark-all needs --enable-llm42.")
    return found + _commit_log_nonsense(args)


def _commit_log_nonsense(args: ServerArgs) -> list[str]:
    found = []
    for name in ("llm42_commit_log_max_bytes", "llm42_commit_log_keep"):
        if not _is_int(value := getattr(args, name)) or value < 1:
            found.append(f"--{name.replace('_', '-')} must be at least 1, not {value!r}.")
    if args.llm42_commit_log is None:
        return found
    if not args.enable_llm42:
        found.append("--llm42-commit-log needs --enable-llm42.")
    if reason := _why_not_writable(Path(args.llm42_commit_log)):
        found.append(f"--llm42-commit-log {args.llm42_commit_log}: {reason}.")
    return found


def _why_not_writable(path: Path) -> str | None:
    """Why a file cannot be written and rotated there, None if it can."""
    if not path.name or path.is_dir():
        return "is a folder; name a file in it"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"the folder {path.parent} cannot be written"
    if path.exists() and not os.access(path, os.W_OK):
        return "the file cannot be written"
    return None


def unsupported(args: ServerArgs) -> list[str]:
    """One sentence for each flag that cannot be used together with ``--enable-llm42`` yet."""
    found = [_sentence(row) for row in FLAGS if row.applies(args)]
    if other := _other_gpus(args):
        found.append(
            f"--enable-llm42 does not work with GPUs other than Hopper yet, and here are {other}: canonical "
            "attention is FlashInfer's fa3 kernel, which is compiled for Hopper alone."
        )
    if _rust_server():
        found.append("--enable-llm42 does not work with SGLANG_RUST_SERVER yet: marks are read in Python.")
    preferred = args.preferred_sampling_params
    if isinstance(preferred, dict) and "is_deterministic" in preferred:
        found.append("--preferred-sampling-params cannot hold is_deterministic: use --llm42-mark-all.")
    return found


def unsupported_model(args: ServerArgs) -> list[str]:
    """One sentence for each trait of the model that ``--enable-llm42`` cannot serve yet."""
    if args.model_path.lower() in _NO_MODEL:
        return []
    config = args.get_model_config()
    return [_sentence(row) for row in MODELS if row.applies(config)]


def _sentence(row: Unsupported) -> str:
    return f"--enable-llm42 does not work with {row.what} yet: {row.reason}."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _has_sliding_window(config: Any) -> bool:
    if config.is_hybrid_swa:
        return True
    return bool(config.sliding_window_size) and getattr(config.hf_text_config, "use_sliding_window", True)


def _has_long_rope(config: Any) -> bool:
    """SGLang's version chooses the factors of a whole batch by its longest request."""
    for name in ("rope_parameters", "rope_scaling"):
        scaling = getattr(config.hf_text_config, name, None)
        if isinstance(scaling, dict) and "longrope" in (scaling.get("rope_type"), scaling.get("type")):
            return True
    return False


def _has_recurrent_layers(config: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(config) is not None


def _other_gpus(args: ServerArgs) -> str:
    """The visible GPUs that are not Hopper, with their compute capability."""
    import torch

    if args.device != "cuda" or not torch.cuda.is_available():
        return ""
    found = set()
    for gpu in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(gpu)
        if major != HOPPER:
            found.add(f"{torch.cuda.get_device_name(gpu)} ({major}.{minor})")
    return ", ".join(sorted(found))


def _rust_server() -> bool:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_RUST_SERVER.get())
