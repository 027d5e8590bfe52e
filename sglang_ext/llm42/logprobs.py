"""Log-probabilities of deterministic requests, from canonical logits.

SGLang attaches log-probabilities of the rows that it decodes, which for a marked request are candidates.
Here they come from the rows of the canonical pass that decided the tokens, so they have the same bits under
every load. The meaning is SGLang's: output log-probabilities after the temperature (before top_k, top_p and
min_p), or of the raw logits with ``SGLANG_RETURN_ORIGINAL_LOGPROB``; prompt log-probabilities of the raw
logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_ext.llm42 import sampling
from sglang_ext.llm42.lane import Segment, SegmentKind

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


@dataclass(frozen=True)
class TokenLogprobs:
    """What one position reports.

    Attributes:
        value: log-probability of the token that stands there.
        top: values and token ids of the most likely tokens, if the request asked for some.
        chosen: values and token ids of the tokens that the request named.
    """

    value: float
    top: tuple[list[float], list[int]]
    chosen: tuple[list[float], list[int]] | None


def wants_output(req: Req) -> bool:
    """Whether ``req`` asked for log-probabilities of its output."""
    return req.return_logprob


def prompt_rows(segment: Segment, req: Req) -> range:
    """Rows of a prompt segment whose logits give the log-probability of the next prompt token.

    Empty unless the request asked for prompt log-probabilities, and once it has them (after a retraction).
    """
    if segment.kind is not SegmentKind.PROMPT or not req.return_logprob:
        return range(0)
    if req.logprob_start_len < 0 or req.logprob.input_token_logprobs_val is not None:
        return range(0)
    first = max(req.logprob_start_len, segment.start)
    last = min(segment.start + segment.rows, len(req.origin_input_ids) - 1)
    return range(first - segment.start, max(last, first) - segment.start)


def of_output_row(logits: torch.Tensor, token: int, req: Req) -> TokenLogprobs:
    """Log-probabilities of one output position; ``logits`` of shape ``[vocabulary]``."""
    from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB

    scaled = logits.float()
    if not SGLANG_RETURN_ORIGINAL_LOGPROB:
        scaled = scaled / req.sampling_params.temperature
    return _of_row(scaled, token, req)


def of_prompt_row(logits: torch.Tensor, token: int, req: Req) -> TokenLogprobs:
    """Log-probabilities of one prompt position; ``logits`` of shape ``[vocabulary]``."""
    return _of_row(logits.float(), token, req)


def _of_row(logits: torch.Tensor, token: int, req: Req) -> TokenLogprobs:
    row = sampling.log_softmax(logits[None])[0]
    row.clamp_(min=torch.finfo(row.dtype).min)
    count = req.logprob.top_logprobs_num
    top = row.topk(count) if count > 0 else None
    named = req.logprob.token_ids_logprob
    return TokenLogprobs(
        value=float(row[token]),
        top=([], []) if top is None else (top.values.tolist(), top.indices.tolist()),
        chosen=None if named is None else (row[torch.tensor(named, device=row.device)].tolist(), list(named)),
    )


def append_output(req: Req, entries: Sequence[TokenLogprobs]) -> None:
    """Attach the log-probabilities of newly committed tokens, in order, to ``req``."""
    tokens = req.output_ids[len(req.logprob.output_token_logprobs_val) :]
    for token, entry in zip(tokens, entries, strict=True):
        req.logprob.output_token_logprobs_val.append(entry.value)
        req.logprob.output_token_logprobs_idx.append(token)
        if req.logprob.top_logprobs_num > 0:
            req.logprob.output_top_logprobs_val.append(entry.top[0])
            req.logprob.output_top_logprobs_idx.append(entry.top[1])
        if entry.chosen is not None:
            req.logprob.output_token_ids_logprobs_val.append(entry.chosen[0])
            req.logprob.output_token_ids_logprobs_idx.append(entry.chosen[1])


def finish_prompt(req: Req, entries: Sequence[TokenLogprobs]) -> None:
    """Attach the prompt's log-probabilities, complete and in order, to ``req``.

    The first reported token has none (None, as SGLang does): the row before it was not asked for.
    """
    state = req.logprob
    if state.input_token_logprobs_val is not None:
        return
    start = req.logprob_start_len if req.logprob_start_len >= 0 else len(req.origin_input_ids)
    reported = list(req.origin_input_ids[start:])
    lead: list[None] = [None] if reported else []
    state.input_token_logprobs_val = [*lead, *(entry.value for entry in entries)]
    state.input_token_logprobs_idx = reported
    wants_top = state.top_logprobs_num > 0 and bool(reported)
    state.input_top_logprobs_val = [*lead, *(e.top[0] for e in entries)] if wants_top else []
    state.input_top_logprobs_idx = [*lead, *(e.top[1] for e in entries)] if wants_top else []
    wants_chosen = state.token_ids_logprob is not None and bool(reported)
    chosen = [e.chosen for e in entries if e.chosen is not None] if wants_chosen else []
    state.input_token_ids_logprobs_val = [*lead, *(c[0] for c in chosen)] if wants_chosen else []
    state.input_token_ids_logprobs_idx = [*lead, *(c[1] for c in chosen)] if wants_chosen else []
