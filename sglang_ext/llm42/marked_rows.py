"""Rows of logits that belong to marked requests: what is applied to them, and how a token is drawn from each.

The same for the candidates of decode steps and for the rows that canonical passes decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sglang_ext.llm42 import logit_processing, sampling
from sglang_ext.llm42 import request as deterministic

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ext.llm42.canonical_pass import CandidateTable


def row_params(req: Req) -> sampling.RowParams:
    """Sampling parameters of every row of ``req``."""
    state = deterministic.of(req)
    assert state is not None
    if state.row_params is None:
        params = req.sampling_params
        state.row_params = sampling.RowParams(
            params.temperature, params.top_k, params.top_p, params.min_p, state.seed
        )
    return state.row_params


def process(
    logits: torch.Tensor, reqs: Sequence[Req], earlier: Sequence[int], table: CandidateTable
) -> torch.Tensor:
    """Apply penalties, grammars and the like to rows that need it.

    Args:
        logits: one row per entry of ``reqs``, ours to change.
        earlier: number of candidates in front of each row.
        table: the candidates.

    Returns:
        The logits to sample from: ``logits`` itself, or its float32 copy.
    """
    spans = [span for span in _request_spans(reqs, earlier) if logit_processing.required(reqs[span.start])]
    if not spans:
        return logits
    logits = logits.float()
    logit_processing.apply(
        [
            _request_rows(logits[span.start : span.stop], reqs[span.start], earlier[span.start], table)
            for span in spans
        ]
    )
    return logits


def _request_spans(reqs: Sequence[Req], earlier: Sequence[int]) -> list[range]:
    """Rows that belong to one request and have one candidate more in front of each."""
    spans: list[range] = []
    for row, req in enumerate(reqs):
        if spans and reqs[row - 1] is req and earlier[row] == earlier[row - 1] + 1:
            spans[-1] = range(spans[-1].start, row + 1)
        else:
            spans.append(range(row, row + 1))
    return spans


def _request_rows(
    logits: torch.Tensor, req: Req, earlier: int, table: CandidateTable
) -> logit_processing.RequestRows:
    """Rows of ``req`` behind ``earlier``, ``earlier`` + 1 and so on of its candidates."""
    state = deterministic.of(req)
    assert state is not None and state.lane is not None
    if state.stop_tokens is None:
        state.stop_tokens = logit_processing.stop_tokens(req)
    first = (state.lane.base if state.lane.base is not None else state.lane.known_end) + 1
    positions = torch.arange(first, first + earlier + len(logits) - 1, device=logits.device)
    candidates = table.read(torch.full_like(positions, req.req_pool_idx), positions)
    return logit_processing.RequestRows(
        logits, req, state.decided, candidates, earlier, state.matcher, state.stop_tokens
    )
