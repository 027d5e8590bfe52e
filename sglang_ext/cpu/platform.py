"""Device defaults, communicators, layer construction and compiled functions of SGLang on a CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

#: Constructor arguments of GroupCoordinator that switch a device communicator on.
DEVICE_COMMUNICATORS = (
    "use_pynccl",
    "use_pymscclpp",
    "use_custom_allreduce",
    "use_torch_symm_mem_all_reduce",
    "use_hpu_communicator",
    "use_xpu_communicator",
    "use_npu_communicator",
)


def default_device(original: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """SGLang's accelerator if it finds one, else ``"cpu"``."""
    try:
        return str(original(*args, **kwargs))
    except RuntimeError:
        return "cpu"


def default_backends(original: Callable[[Any], None], server_args: Any) -> None:
    """Choose ``torch_native`` where SGLang would choose ``intel_amx`` on a CPU that has no AMX, and let an
    idle scheduler sleep: polling, SGLang's default, takes a core away from whatever else computes."""
    from sglang.srt.utils import cpu_has_amx_support

    if server_args.device == "cpu" and server_args.attention_backend is None and not cpu_has_amx_support():
        server_args.attention_backend = "torch_native"
    if server_args.device == "cpu":
        server_args.sleep_on_idle = True
    original(server_args)


def init_rotary_embedding(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    """Build a rotary embedding on the branch of SGLang's own CPU engine, which needs no fallback kernel.

    Elsewhere the constructor imports ``vllm._custom_ops`` for ``forward_cuda``; a CPU dispatches to
    ``forward_native``. The module's flag is changed for the call only: nothing else may take this process
    for SGLang's AMX engine.
    """
    from sglang.srt.layers.rotary_embedding import base

    saved = base._is_cpu
    base._is_cpu = True
    try:
        original(layer, *args, **kwargs)
    finally:
        base._is_cpu = saved


def without_device_communicators(
    group: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``GroupCoordinator.__init__`` with every device communicator off; gloo groups remain."""
    bound = inspect.signature(type(group).__init__).bind(group, *args, **kwargs)
    for name in DEVICE_COMMUNICATORS:
        bound.arguments[name] = False
    return bound.args, bound.kwargs


def zero_expert_weights(result: None, method: Any, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """After ``UnquantizedFusedMoEMethod.create_weights``: zeros instead of memory as it was found.

    On a CPU SGLang rounds the width of experts per rank up to a multiple of 32. Only where its AMX engine
    runs does it zero what no weight is loaded into.
    """
    for name in ("w13_weight", "w2_weight"):
        getattr(layer, name).data.zero_()


def record_stream(original: Callable[..., None], tensor: torch.Tensor, stream: Any) -> None:
    """``Tensor.record_stream`` that does nothing for CPU tensors: their memory is freed by no stream."""
    if tensor.device.type != "cpu":
        original(tensor, stream)


def run_uncompiled(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the function below ``torch.compile``: a few elementwise operations are not worth a compiler."""
    return inspect.unwrap(original)(*args, **kwargs)
