"""The configuration digest: what changes it, what does not, and that no argument was forgotten."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext.llm42.observability import configuration, observer
from sglang_ext.server_args import ServerArgs
from sglang_ext.tokenweave import runtime as tokenweave
from sglang_ext.tokenweave.paths import Path

#: Arguments that cannot change a deterministic output, by the reason. A star stands for the rest of a name.
WITHOUT_INFLUENCE = {
    "refused with --enable-llm42, or a setting of what is refused": """
        speculative_* decoupled_spec_* enable_multi_layer_eagle spec_trace_dir pp_size pp_max_micro_batch_size
        pp_async_batch_depth enable_mixed_chunk enable_dp_attention* enable_dp_lm_head dcp_* dwdp_size
        attn_cp_size enable_prefill_cp cp_strategy
        enable_dsa_cache_layer_split enable_dsa_prefill_context_parallel dsa_prefill_cp_mode
        enable_prefill_context_parallel prefill_cp_mode enable_cp_decode_attn_tp moe_dp_size moe_a2a_backend
        deepep_* fuseep_mode enable_waterfill ep_num_redundant_experts ep_dispatch_algorithm enable_eplb
        eplb_* elastic_ep_* enable_elastic_expert_backup ep_join_* max_ep_size mooncake_ib_device kt_*
        enable_hierarchical_cache hicache_* enable_hisparse hisparse_config enable_lmcache lmcache_config_file
        enable_flexkv flexkv_config_file radix_cache_backend enable_streaming_session
        enable_session_radix_cache disaggregation_* num_reserved_decode_tokens optimistic_prefill_attempts
        enable_deterministic_inference enable_lora* lora_* max_lora* max_loaded_loras max_loras_per_batch
        experts_shared_outer_loras enable_return_routed_experts enable_two_batch_overlap
        enable_single_batch_overlap tbo_token_distribution_threshold enable_pdmux pdmux_config_path
        sm_group_num dllm_* is_embedding prefill_only_disable_kv_cache encoder_* language_only
        enable_adaptive_dispatch_to_encoder smg_* grpc_* tokenizer_worker_num
        enable_page_major_kv_layout enable_unified_memory
    """,
    "kinds of models or of input that are refused": """
        mamba_* max_mamba_cache_size enable_mamba_cache_stochastic_rounding uses_mamba_radix_cache
        enable_int8_mamba_checkpoint int8_mamba_ckpt_size linear_attn_* enable_linear_replayssm*
        linear_replayssm_cache_len swa_full_tokens_ratio disable_hybrid_swa_memory enable_multimodal mm_*
        enable_broadcast_mm_inputs_process enable_prefix_mm_cache limit_mm_data_per_request
        enable_mm_global_cache disable_fast_image_processor keep_mm_feature_on_device
        enable_precise_embedding_interpolation asr_* enable_mis
    """,
    "the weights, which the digest leaves to their version, or where they come from": """
        model_path revision model_checksum custom_weight_loader weight_* model_loader_extra_config
        modelopt_checkpoint_* modelopt_export_path remote_instance_weight_loader_* download_dir
        delete_ckpt_after_loading checkpoint_engine_wait_weights_before_ready modelexpress_config
        engine_info_bootstrap_port enable_weights_cpu_backup enable_draft_weights_cpu_backup decrypted_*
        random_seed
    """,
    "the tokenizer's files, which the digest leaves out": "tokenizer_path",
    "to be seen in the model's configuration": "json_model_override_args model_config_parser",
    "to be seen in the device": "device base_gpu_id gpu_id_step numa_node",
    "part of the request by the time it is logged": """
        chat_template hf_chat_template_name completion_template default_chat_template_kwargs
        tool_call_parser tool_server sampling_defaults preferred_sampling_params context_length
        allow_auto_truncate enable_custom_logit_processor default_priority_value
        abort_on_priority_when_disabled
    """,
    "decode's alone: canonical passes have a graph and a sampler of their own": """
        sampling_backend cuda_graph_* disable_prefill_cuda_graph disable_decode_cuda_graph disable_cuda_graph*
        enable_profile_cuda_graph enable_cudagraph_gc debug_cuda_graph torch_compile_max_bs
        enable_torch_compile_debug_mode
    """,
    "scheduling and memory": """
        mem_fraction_static max_running_requests max_queued_requests max_total_tokens chunked_prefill_size
        enable_dynamic_chunking max_prefill_tokens prefill_max_requests schedule_*
        enable_priority_scheduling disable_priority_preemption priority_scheduling_preemption_threshold
        retraction_policy page_size radix_eviction_policy disable_radix_cache
        disable_overlap_schedule num_continuous_decode_steps scheduler_recv_interval dp_size
        load_balance_method enable_prefill_delayer prefill_delayer_* min_free_slots_delay strip_thinking_cache
        cpu_offload_gb offload_* enable_memory_saver kv_events_config
    """,
    "processes and their connections": """
        detokenizer_worker_num nccl_port dist_* nnodes node_rank enable_p2p_check pre_warm_nccl
        watchdog_timeout soft_watchdog_timeout sleep_on_idle use_ray custom_sigquit_handler gc_threshold host
        port fastapi_root_path sidecar* skip_server_warmup warmups enable_http2 ssl_* enable_ssl_refresh
        api_key admin_api_key served_model_name file_storage_path stream_* batch_notify_size
        incremental_streaming_output enable_dynamic_batch_tokenizer dynamic_batch_tokenizer_*
        enable_tokenizer_batch_encode disable_tokenizer_batch_decode disable_outlines_disk_cache ray_*
    """,
    "what is reported": """
        enable_cache_report log_* uvicorn_access_log_exclude_prefixes crash_dump_folder show_time_cost
        enable_metrics* enable_mfu_metrics load_snapshot_publish_interval tokenizer_metrics_*
        extra_metric_labels bucket_* prompt_tokens_buckets generation_tokens_buckets
        gc_warning_threshold_secs decode_log_interval enable_request_time_stats_logging
        enable_forward_pass_metrics forward_pass_metrics_* enable_trace trace_modules otlp_traces_endpoint
        export_metrics_* stat_loggers enable_layerwise_nvtx_marker expert_distribution_recorder_*
        enable_expert_distribution_metrics kv_canary* debug_tensor_dump_* msprobe_dump_config
        enable_return_hidden_states return_hidden_states_mode enable_return_indexer_topk
    """,
    "ours: the promise is that they change nothing, or what they do is described as it turned out": """
        enable_llm42 llm42_max_wait_steps llm42_mark_all llm42_disable_* llm42_canonical_decode
        llm42_commit_log* tokenweave_split tokenweave_canonical_split tokenweave_min_tokens tokenweave_path
        tokenweave_fused_ctas tokenweave_barrier_timeout tokenweave_table
    """,
}


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


PATTERNS = [pattern for names in WITHOUT_INFLUENCE.values() for pattern in names.split()]
ALL = tuple(ServerArgs.__dataclass_fields__)
SPARED = [name for name in ALL if any(_matches(pattern, name) for pattern in PATTERNS)]


def test_every_argument_is_in_the_digest_or_cannot_change_an_output() -> None:
    assert len(ALL) > 400
    assert not sorted(set(ALL) - {*configuration.ARGUMENTS} - {*SPARED}), "neither: decide"
    assert not sorted({*configuration.ARGUMENTS} & {*SPARED}), "both"


def test_what_is_named_exists() -> None:
    assert set(configuration.ARGUMENTS) <= set(ALL)
    assert len(set(configuration.ARGUMENTS)) == len(configuration.ARGUMENTS)
    assert not [pattern for pattern in PATTERNS if not any(_matches(pattern, name) for name in ALL)]


# The digest


def _runner(**config: Any) -> Any:
    hf_config = SimpleNamespace(to_dict=lambda: {"hidden_size": 8, "_name_or_path": "/here", **config})
    return SimpleNamespace(dtype="bfloat16", device="cpu", model_config=SimpleNamespace(hf_config=hf_config))


def _digest(model_runner: Any = None, woven: dict[str, Any] | None = None, **arguments: Any) -> str:
    defaults = {name: field.default for name, field in ServerArgs.__dataclass_fields__.items()}
    args = SimpleNamespace(**{**defaults, **arguments})
    return configuration.digest(configuration.describe(args, model_runner or _runner(), woven))


def test_every_argument_of_the_digest_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "_version", lambda name: "1")  # looking all of them up takes a while
    digests = {_digest(), *(_digest(**{name: "another"}) for name in configuration.ARGUMENTS)}
    assert len(digests) == 1 + len(configuration.ARGUMENTS)


def test_no_other_argument_does() -> None:
    assert len(SPARED) > 300
    assert _digest(**dict.fromkeys(SPARED, "another")) == _digest()


def test_the_model_changes_it_and_where_it_lies_does_not() -> None:
    assert _digest(_runner(_name_or_path="/there")) == _digest()
    assert _digest(_runner(hidden_size=9)) != _digest()


def test_versions_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _digest()
    monkeypatch.setattr(configuration, "_version", lambda name: "2" if name == "xgrammar" else "1")
    other = _digest()
    monkeypatch.setattr(configuration, "_version", lambda name: "1")
    assert len({before, other, _digest()}) == 3


def test_another_process_computes_the_same() -> None:
    """Whatever the seed of its string hashes."""
    code = "import test_configuration as t; print(t._digest(dtype='half', forward_hooks=[{'b': 1, 'a': 2}]))"
    threads = str(torch.get_num_threads())
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": threads}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == _digest(dtype="half", forward_hooks=[{"a": 2, "b": 1}]), run.stderr


# TokenWeave as it turned out


def _woven(
    monkeypatch: pytest.MonkeyPatch,
    path: Path = Path.PEER,
    cut: int | None = 32,
    fits: bool = True,
    stock: str | None = None,
) -> dict[str, Any] | None:
    weaver: Any = SimpleNamespace(stock_reason=stock, communicator=SimpleNamespace(fits=lambda rows: fits))
    monkeypatch.setattr(tokenweave, "_runtime", tokenweave.Runtime(weaver, None, path))
    full = SimpleNamespace(segments=4, rows=16, eager=SimpleNamespace(cut=cut))
    runtime: Any = SimpleNamespace(verification=SimpleNamespace(passes=SimpleNamespace(full=full)))
    return observer._tokenweave(runtime)


def test_the_path_that_was_chosen_counts_and_not_how_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = _woven(monkeypatch)
    assert peer == {"path": "peer", "cut": 32, "fits": True}
    assert _digest(woven=peer, tokenweave_path="auto") == _digest(woven=peer, tokenweave_path="peer")
    others = [
        _woven(monkeypatch, path=Path.COLLECTIVE),
        _woven(monkeypatch, cut=None),
        _woven(monkeypatch, fits=False),
        _woven(monkeypatch, stock="no norms"),
    ]
    assert len({_digest(woven=woven, tokenweave_path="auto") for woven in (peer, *others)}) == 5


def test_where_tokenweave_does_not_run_there_is_nothing_to_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _woven(monkeypatch, stock="no norms") is None
    monkeypatch.setattr(tokenweave, "_runtime", None)
    assert observer._tokenweave(SimpleNamespace()) is None  # type: ignore[arg-type]
