"""Decode steps of a canonical shape: SGLang's batch as a canonical pass of one row per request.

The step stands in for the forward of a decode batch. Keys, values and logits of its rows have the bits that a
canonical pass gives them, which the certification at server start compares: only sizes that do may run. Steps
run on SGLang's forward stream, beside canonical passes, so they share no memory with these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.doctor.fingerprint import of_all_ranks
from sglang_ext.llm42 import decode_policy
from sglang_ext.llm42.attention import decode_attention_factory
from sglang_ext.llm42.canonical_graph import GIB, CapturedCanonicalPass
from sglang_ext.llm42.canonical_pass import CanonicalPass
from sglang_ext.llm42.decode_policy import DecodeMode, DecodePolicy, sizes_to_try
from sglang_ext.llm42.row_padding import find_padding
from sglang_ext.tokenweave import runtime as tokenweave

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_ext.llm42.canonical_pass import AttentionFactory
    from sglang_ext.llm42.config import Llm42Config
    from sglang_ext.llm42.pass_sizes import AnyCanonicalPass

logger = logging.getLogger(__name__)

#: Bytes for FlashInfer's workspaces and what a step's layers compute.
SPARE_MEMORY = 1 << 30


class CanonicalDecode:
    """Runs decode steps in canonical shapes.

    Args:
        passes: canonical passes of one row per segment, ascending.
        policy: says which steps these are.

    Attributes:
        passes: by their number of rows.
        policy: as above; no size may run before :meth:`allow`.
    """

    def __init__(self, passes: Iterable[AnyCanonicalPass], policy: DecodePolicy) -> None:
        self.passes = {each.segments: each for each in passes}
        self.policy = policy

    def allow(self, sizes: Iterable[int]) -> None:
        """Let steps of these ``sizes`` run, and no others: they give a canonical pass's bits.

        Raises:
            ValueError: there is no such pass.
        """
        allowed = set(sizes)
        if unknown := allowed - self.passes.keys():
            raise ValueError(
                f"no canonical decode step of {sorted(unknown)} rows, only of {list(self.passes)}"
            )
        self.policy.allow(allowed)

    def forward(self, size: int, batch: ForwardBatch, positions: Sequence[int]) -> LogitsProcessorOutput:
        """The model's forward of a decode batch, on the current stream.

        Args:
            size: rows to compute, at least as many as ``batch`` has.
            batch: SGLang's, of which token ids, KV slots and places in ``req_to_token`` are read.
            positions: of each of its rows, on the host.

        Returns:
            Logits ``[rows of batch, vocabulary]``; the next step may overwrite them.
        """
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        logits = self.passes[size].run_rows(batch, positions)
        return LogitsProcessorOutput(next_token_logits=logits)


def canonical_decode_for(model_runner: ModelRunner, config: Llm42Config) -> CanonicalDecode | None:
    """The canonical decode steps of a server, None where it has none.

    Args:
        model_runner: SGLang's model runner, with pools allocated, weights loaded and its own graphs captured.
        config: when such steps run, and the shape of the full pass.

    Raises:
        CaptureError: a capture failed.
    """
    mode = config.canonical_decode
    most = model_runner.max_running_requests
    never_pays = model_runner.device != "cuda" or decode_policy.saving(most, most) < decode_policy.STEP_COST
    if mode is DecodeMode.NEVER or (mode is DecodeMode.AUTO and never_pays):
        return None
    if tokenweave.current() is not None:
        if mode is DecodeMode.ALWAYS:
            logger.warning("--llm42-canonical-decode always: not with TokenWeave; decode steps are verified")
        return None
    full = config.window_size * config.verify_batch_size
    sizes = sizes_to_try(model_runner.device, most, full)
    if mode is DecodeMode.AUTO and not _all_have_room(model_runner, sizes):
        logger.warning(
            "No canonical decode steps: less than %.1f GiB of the GPU's memory are left. Deterministic "
            "requests are verified, which is slower where many run at once. Lower --mem-fraction-static for "
            "such steps.",
            _memory_needed(model_runner, sizes) / GIB,
        )
        return None
    attention = decode_attention_factory(model_runner, config.window_size)
    return CanonicalDecode(
        _passes(model_runner, sizes, full, attention), DecodePolicy(mode is DecodeMode.ALWAYS)
    )


def _all_have_room(model_runner: ModelRunner, sizes: Sequence[int]) -> bool:
    """Whether there is memory left for these steps on every tensor-parallel rank: all of them must ask."""
    free, _ = torch.cuda.mem_get_info()
    fits = free >= _memory_needed(model_runner, sizes)
    return all(of_all_ranks(fits, getattr(model_runner, "tp_group", None)))


def _memory_needed(model_runner: ModelRunner, sizes: Sequence[int]) -> int:
    """Bytes, on the safe side: lists of KV slots, also those that the certification saves, logits, and
    :data:`SPARE_MEMORY` for the rest."""
    width = int(model_runner.req_to_token_pool.req_to_token.shape[1])
    slots = 2 * max(sizes) * width * 4
    return slots + max(sizes) * int(model_runner.model_config.vocab_size) * 4 + SPARE_MEMORY


def _passes(
    model_runner: ModelRunner, sizes: Sequence[int], full: int, attention: AttentionFactory
) -> list[AnyCanonicalPass]:
    """The largest first: the others share its memory."""
    captured: list[Any] = []
    for size in sorted(sizes, reverse=True):
        padding = find_padding(model_runner.model, size, full)
        step: Any = CanonicalPass(model_runner, size, 1, attention, padding=padding)
        if torch.device(step.device).type == "cuda":
            step = CapturedCanonicalPass(step, larger=captured[0] if captured else None)
        captured.append(step)
    return captured[::-1]
