"""A model and its memory pools as a scheduler process has them, without the scheduler."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sglang_ext.doctor.certify import certify, certify_decode, certify_few_rows, certify_sizes
from sglang_ext.doctor.report import Certificate

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import PortArgs

    from sglang_ext.server_args import ServerArgs


def certify_configuration(
    server_args: ServerArgs, port_args: PortArgs, tp_rank: int, quick: bool
) -> Certificate:
    """Load one tensor-parallel rank of the model and certify it, together with the other ranks.

    Raises:
        NotImplementedError: there is no row-invariant attention for the device.
    """
    from sglang_ext.llm42.attention import block_rows, canonical_attention_factory
    from sglang_ext.llm42.canonical_decode import canonical_decode_for
    from sglang_ext.llm42.canonical_graph import canonical_passes_for
    from sglang_ext.llm42.config import Llm42Config

    model_runner = load(server_args, port_args, tp_rank)
    config = Llm42Config.from_server_args(server_args)
    lane = config.lane(block_rows(model_runner.device, config.window_size))
    passes = canonical_passes_for(model_runner, lane, canonical_attention_factory(model_runner))
    certificate = certify(passes.full, quick)
    if not certificate.passed:
        return certificate
    sizes = certify_sizes(passes, quick) + certify_few_rows(passes, quick)
    if (decode := canonical_decode_for(model_runner, config)) is not None:
        sizes += certify_decode(passes.full, decode.passes.values(), quick)
    return dataclasses.replace(certificate, sizes=sizes)


def load(server_args: ServerArgs, port_args: PortArgs, tp_rank: int) -> ModelRunner:
    """SGLang's model runner with weights and memory pools, built as SGLang's one-batch benchmark does.

    CUDA graphs are left out: nothing decodes here.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import publish
    from sglang.srt.utils import configure_logger

    configure_logger(server_args, prefix=f" TP{tp_rank}")
    publish(server_args, role="scheduler")
    initialize_moe_config(server_args)
    initialize_fp8_gemm_config(server_args)
    initialize_fp4_gemm_config(server_args)
    parallel = parallel_state(server_args, tp_rank)
    model_runner = ModelRunner(
        model_config=ModelConfig.from_server_args(server_args),
        mem_fraction_static=server_args.mem_fraction_static,
        gpu_id=parallel.gpu_id,
        ps=parallel,
        nccl_port=port_args.nccl_port,
        server_args=server_args,
    )
    model_runner.alloc_memory_pool()
    model_runner.init_attention_backends()
    return model_runner


def parallel_state(server_args: ServerArgs, tp_rank: int) -> Any:
    """Where rank ``tp_rank`` stands; one node, tensor parallelism only, as ``--enable-llm42`` needs it."""
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState

    return ParallelState(
        tp_rank=tp_rank,
        tp_size=server_args.tp_size,
        pp_rank=0,
        pp_size=1,
        dp_rank=None,
        dp_size=server_args.dp_size,
        attn_tp_rank=tp_rank,
        attn_tp_size=server_args.tp_size,
        attn_cp_rank=0,
        attn_cp_size=1,
        attn_dp_rank=0,
        attn_dp_size=1,
        moe_ep_rank=tp_rank // (server_args.tp_size // server_args.ep_size),
        moe_ep_size=server_args.ep_size,
        moe_dp_rank=None,
        moe_dp_size=server_args.moe_dp_size,
        dcp_size=server_args.dcp_size,
        gpu_id=server_args.base_gpu_id + tp_rank * server_args.gpu_id_step,
    )
