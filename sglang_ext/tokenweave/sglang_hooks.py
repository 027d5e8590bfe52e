"""The functions that SGLang calls in place of its own (rows in ``hook_table.py``); thin glue only."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from sglang_ext.tokenweave import runtime
from sglang_ext.tokenweave.communicator import NormCall
from sglang_ext.tokenweave.lazy import LazyTensor, materialized


def after_load_model(result: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``ModelRunner.load_model``: start the runtime and wrap the decoder stack."""
    started = runtime.start(model_runner)
    if started is not None:
        wrap_decoder_stack(model_runner.model, started)


def wrap_decoder_stack(model: torch.nn.Module, started: runtime.Runtime) -> None:
    """Have the module that owns the decoder layers run through the weaver.

    SGLang's prefill graph runner reads this forward's signature and replaces it for a while, hence
    ``functools.wraps`` and an instance attribute.
    """
    stack = runtime.decoder_stack(model)
    assert stack is not None, "the runtime starts for models with a decoder stack only"
    original = stack.forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return started.forward(original, signature.bind(*args, **kwargs))

    stack.forward = forward


def around_forward(
    original: Callable[..., Any], model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``ModelRunner.forward``: the rule that chooses cuts learns from its time."""
    started = runtime.current()

    def forward() -> Any:
        return original(model_runner, forward_batch, *args, **kwargs)

    if started is None or model_runner.is_draft_worker:
        return forward()
    return started.timed(forward_batch, forward)


def around_build_attention_backends(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND ``build_attention_backends``: two more backends, so that each half has plans of its own."""
    backends = original(*args, **kwargs)
    started, model_runner = runtime.current(), kwargs.get("model_runner", args[0] if args else None)
    if started is not None and model_runner is not None and not model_runner.is_draft_worker:
        started.attention_backends = [original(*args, **kwargs).attn_backend for _ in range(2)]
    return backends


def around_all_reduce(
    original: Callable[..., torch.Tensor], coordinator: Any, tensor: torch.Tensor
) -> torch.Tensor:
    """AROUND ``GroupCoordinator.all_reduce``: put it off until somebody needs the sum."""
    started = runtime.current()
    tensor = materialized(tensor)
    if started is None or coordinator.world_size == 1 or not started.covers(coordinator):
        return original(coordinator, tensor)
    return started.weaver.all_reduce(tensor, lambda partial: original(coordinator, partial))


def around_rmsnorm(
    original: Callable[..., Any], module: Any, x: Any, residual: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``RMSNorm.forward``: the fused step where ``x`` is an all-reduce put off."""
    return _norm(original, module, 0.0, x, residual, args, kwargs)


def around_gemma_rmsnorm(
    original: Callable[..., Any], module: Any, x: Any, residual: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``GemmaRMSNorm.forward``: the same with Gemma's (1 + w)."""
    return _norm(original, module, 1.0, x, residual, args, kwargs)


def around_can_run_graph(original: Callable[..., bool], runner: Any, forward_batch: Any) -> bool:
    """AROUND ``PrefillCudaGraphRunner.can_run_graph``: batches that will be cut run outside of graphs."""
    started = runtime.current()
    if started is not None and started.cuts_prefill(len(forward_batch.input_ids)):
        return False
    return bool(original(runner, forward_batch))


def _norm(
    original: Callable[..., Any],
    module: Any,
    weight_bias: float,
    x: Any,
    residual: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    started = runtime.current()
    if started is None or not (isinstance(x, LazyTensor) or isinstance(residual, LazyTensor)):
        return original(module, x, residual, *args, **kwargs)
    extras = [value for value in (*args, *kwargs.values()) if value is not None]
    if not extras:
        call = _norm_call(original, module, weight_bias, x)
        if (fused := started.weaver.norm(x, residual, call)) is not None:
            return fused
    return original(
        module, materialized(x), materialized(residual), *materialized(args), **materialized(kwargs)
    )


def _norm_call(
    original: Callable[..., Any], module: Any, weight_bias: float, x: torch.Tensor
) -> NormCall | None:
    """What the fused step needs of ``module``, or None if it computes something else."""
    weight = module.weight
    special = ("variance_size_override", "fp32_residual", "cast_x_before_out_mul")
    if any(getattr(module, name, None) for name in special) or weight.dtype != x.dtype:
        return None
    return NormCall(
        weight=weight.data,
        epsilon=module.variance_epsilon,
        weight_bias=weight_bias,
        module=lambda rows, residual: original(module, rows, residual),
    )
