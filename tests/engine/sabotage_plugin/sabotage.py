"""A second SGLang plugin, for tests only: breaks one part of sglang_ext while a file says so.

Loaded where this folder is on ``PYTHONPATH``. The file named by the environment variable ``SABOTAGE_FILE``
holds the name of a :class:`Mode` or nothing; it is read at every use, so that one server can be broken in
several ways and mended again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

CONTROL = "SABOTAGE_FILE"

#: Tokens and overhead that fit into the queue of :attr:`Mode.SMALL_LOG_QUEUE`.
SMALL_QUEUE = 500

#: Share of candidates that :attr:`Mode.CORRUPT_CANDIDATES` and :attr:`Mode.END_CANDIDATES` replace.
CORRUPTED_SHARE = 0.18

#: Steps of a kind in :attr:`Mode.ALTERNATING_DECODE`; no divisor of a window, so that these are cut anywhere.
ALTERNATING_STEPS = 11

#: End of sequence of the random test models (``tests/models.py``).
END_OF_SEQUENCE = 1


class Mode(StrEnum):
    """What is broken."""

    NOTHING = ""
    TORCH_ATTENTION = "torch_attention"  # canonical passes attend with torch's scaled_dot_product_attention
    PLACED_ATTENTION = "placed_attention"  # a row of canonical attention hangs on its place in the pass
    STOCK_PREFILL = "stock_prefill"  # prompts of marked requests are computed by SGLang's prefill
    SHARED_CACHE = "shared_cache"  # marked requests match and insert in everybody's cache namespace
    BATCH_SAMPLER = "batch_sampler"  # candidates and canonical rows are drawn by SGLang's sampler
    WHOLE_WINDOW_FINISH = "whole_window_finish"  # the tokens of a window are finish-checked as one lump
    CORRUPT_CANDIDATES = "corrupt_candidates"  # a share of the candidates is replaced by other tokens
    END_CANDIDATES = "end_candidates"  # a share of the candidates is replaced by the end of sequence
    LEAK_CANDIDATES = "leak_candidates"  # slots of candidates are never freed
    STOCK_EXPERTS = "stock_experts"  # canonical passes run SGLang's experts
    STOCK_ALL_REDUCE = "stock_all_reduce"  # canonical passes run gloo's all-reduce
    SECOND_HALF_FIRST = "second_half_first"  # the second half of a woven pass attends before the first
    RING_ORDER = "ring_order"  # the fused step sums a row's parts in its owner's order, rounding each time
    VERIFIED_DECODE = "verified_decode"  # no decode step is canonical
    ALTERNATING_DECODE = "alternating_decode"  # decode steps are canonical for a while, then not, and so on
    STOCK_DECODE_DECIDES = "stock_decode_decides"  # what SGLang's own forward gives is taken for canonical
    FAILING_RANK = "failing_rank"  # the second rank runs out of memory in the middle of a certification
    SMALL_LOG_QUEUE = "small_log_queue"  # from the start: the commit log's queue holds a few lines


def active(mode: Mode) -> bool:
    """Whether ``mode`` is what the control file asks for."""
    return Path(os.environ[CONTROL]).read_text() == mode


def register() -> None:
    """Wrap the parts of sglang_ext that the modes break, before its hooks are installed."""
    from sglang_ext.cpu import collectives, experts
    from sglang_ext.doctor import bench
    from sglang_ext.llm42 import (
        commit,
        decode_policy,
        prefill,
        request,
        runtime,
        sampling,
        scheduler_hooks,
    )
    from sglang_ext.llm42.observability import log_writer
    from sglang_ext.tokenweave import collective, interleave

    _wrap(scheduler_hooks, "canonical_attention_factory", _attention_factory)
    _wrap(prefill, "_join", _join)
    _wrap(scheduler_hooks, "release_overallocated", _release_overallocated)
    _wrap(request, "attach", _attach)
    _wrap(decode_policy.DecodePolicy, "choose", _choose)
    _wrap(runtime.Runtime, "decode_forward", _decode_forward)
    _wrap(commit, "_append_verdict", _append_verdict)
    _wrap(sampling, "_sample", _sample)
    _wrap(experts, "invariant_experts", _invariant_experts)
    _wrap(collectives, "_order_matters", _order_matters)
    _wrap(interleave.Interleaver, "run", _run_halves)
    _wrap(collective, "reduce_in_rank_order", _reduce)
    _wrap(bench.Bench, "_run_trial", _run_trial)
    _wrap(log_writer.LogWriter, "__init__", _log_writer)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _attention_factory(original: Callable[..., Any], model_runner: Any) -> type:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    canonical: Any = original(model_runner)

    class Attention(canonical):
        def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            owner = TorchNativeAttnBackend if active(Mode.TORCH_ATTENTION) else canonical
            output = owner.forward_extend(self, *args, **kwargs)
            if active(Mode.PLACED_ATTENTION):
                places = torch.arange(output.shape[0], device=output.device, dtype=output.dtype)
                output = output * (1 + places[:, None] / output.shape[0])
            return output

    return Attention


def _join(original: Callable[..., bool], scheduler: Any, plan: Any) -> bool:
    from sglang.srt.managers.overlap_utils import resolve_forward_inputs

    batch = plan.batch_to_run
    if batch is not None and batch.reqs[0].llm42 is not None and active(Mode.STOCK_PREFILL):
        resolve_forward_inputs(batch, scheduler.future_map)
        scheduler.tp_worker.forward_batch_generation(batch)
        for req in batch.reqs:
            # The lane still computes the last row: its logits give the first token.
            lane = req.llm42.lane
            lane.canonical_end = lane.planned_end = lane.known_end - 1
    return original(scheduler, plan)


def _release_overallocated(
    original: Callable[..., None], stock: Callable[..., None], req: Any, *args: Any
) -> None:
    if req.llm42 is None or not active(Mode.LEAK_CANDIDATES):
        original(stock, req, *args)


def _log_writer(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    small = {"capacity": SMALL_QUEUE} if active(Mode.SMALL_LOG_QUEUE) else {}
    original(*args, **kwargs, **small)


def _attach(original: Callable[..., None], req: Any, weights_generation: int) -> None:
    shared = req.extra_key
    original(req, weights_generation)
    if active(Mode.SHARED_CACHE):
        req.extra_key = shared


_steps = itertools.count()


def _choose(original: Callable[..., int | None], policy: Any, *batch: int) -> int | None:
    size = original(policy, *batch)
    if active(Mode.VERIFIED_DECODE):
        return None
    if active(Mode.ALTERNATING_DECODE) and next(_steps) // ALTERNATING_STEPS % 2:
        return None
    return size


def _decode_forward(original: Callable[..., Any], runtime: Any, batch: Any) -> Any:
    output = original(runtime, batch)
    return None if active(Mode.STOCK_DECODE_DECIDES) else output


def _append_verdict(original: Callable[..., None], req: Any, state: Any, verdict: Any) -> None:
    if not active(Mode.WHOLE_WINDOW_FINISH) or verdict.ends_prefill:
        original(req, state, verdict)
        return
    start = len(req.output_ids)
    req.output_ids.extend(verdict.tokens)
    req.update_finish_state(len(verdict.tokens))
    if req.finished_len is not None:
        del req.output_ids[req.finished_len :]
    kept = len(req.output_ids) - start
    state.log.commit_window(
        start, verdict.tokens, matched=verdict.matched, candidates=verdict.candidates, kept=kept
    )


_random = torch.Generator().manual_seed(0)


def _sample(
    original: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    rows: Any,
    positions: torch.Tensor,
    margins: torch.Tensor | None,
) -> torch.Tensor:
    """Around the sampler of candidates, whose margins are wanted, and of canonical rows."""
    token_ids = original(logits, rows, positions, margins)
    if active(Mode.BATCH_SAMPLER):
        return _sample_as_batch(logits, rows, positions)
    # Rollbacks alone change nothing, but cut windows differently: what the last two are sensitive to.
    cutting = (Mode.CORRUPT_CANDIDATES, Mode.TORCH_ATTENTION, Mode.WHOLE_WINDOW_FINISH)
    corrupting = any(map(active, cutting))
    ending = active(Mode.END_CANDIDATES)
    if margins is None or not (corrupting or ending):
        return token_ids
    wrong = torch.rand(len(token_ids), generator=_random) < CORRUPTED_SHARE
    other = torch.full_like(token_ids, END_OF_SEQUENCE) if ending else (token_ids + 7) % logits.shape[1]
    return torch.where(wrong, other, token_ids)


def _sample_as_batch(logits: torch.Tensor, rows: Any, positions: torch.Tensor) -> torch.Tensor:
    """As ``sglang.srt.layers.sampler.Sampler``: one path for all rows, chosen by what any of them needs."""
    from sglang.srt.layers import sampler

    if not rows.any_sampled:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / rows.temperature[:, None], dim=-1)
    if not rows.any_truncated and not bool(rows.greedy.any()):
        drawn = sampler.sampling_from_probs_torch(probabilities, sampling_seed=rows.seed, positions=positions)
    else:
        drawn = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
            probabilities,
            torch.where(rows.greedy, 1, rows.top_k),
            rows.top_p,
            rows.min_p,
            bool((rows.min_p > 0).any()),
            rows.seed,
            positions,
        )
    return drawn.view(-1).to(torch.int64)


def _invariant_experts(original: Callable[..., Any], stock: Callable[..., Any], *args: Any) -> Any:
    return stock(*args) if active(Mode.STOCK_EXPERTS) else original(stock, *args)


def _order_matters(original: Callable[..., bool], *args: Any) -> bool:
    return original(*args) and not active(Mode.STOCK_ALL_REDUCE)


def _run_halves(original: Callable[..., list[Any]], interleaver: Any, halves: Sequence[Any]) -> list[Any]:
    if not active(Mode.SECOND_HALF_FIRST):
        return original(interleaver, halves)
    return original(interleaver, halves[::-1])[::-1]


def _reduce(original: Callable[..., torch.Tensor], partials: Sequence[torch.Tensor]) -> torch.Tensor:
    """As a ring does it: the rank that owns a row is the last to add its part."""
    if not active(Mode.RING_ORDER):
        return original(partials)
    own = torch.distributed.get_rank()
    total = partials[(own + 1) % len(partials)].clone()
    for step in range(2, len(partials) + 1):
        total += partials[(own + step) % len(partials)]
    return total


def _run_trial(original: Callable[..., None], bench: Any, *args: Any, **kwargs: Any) -> None:
    """After the first pass, so that the other ranks wait for this one in the next."""
    if bench.passes and active(Mode.FAILING_RANK) and torch.distributed.get_rank() == 1:
        raise torch.OutOfMemoryError("out of memory on this rank alone")
    original(bench, *args, **kwargs)
