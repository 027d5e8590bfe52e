"""Committing: the one place where a deterministic request's output grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_ext.llm42 import request as deterministic
from sglang_ext.llm42.request import DeterministicRequest, Verdict

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ext.llm42.logprobs import TokenLogprobs


def commit(req: Req, verdicts: Sequence[Verdict]) -> list[int]:
    """Commit what canonical passes and decode steps decided, one token at a time, up to the first finish.

    SGLang would check several new tokens as one lump (length, then strings, then end of sequence), which
    makes the finish reason depend on where a window ended. Here each token is checked as if it had been
    decoded alone. SGLang appends the returned tokens itself and then asks for the finish state once:
    :func:`update_finish_state` answers with what was found here.

    Args:
        req: a deterministic request that has not finished.
        verdicts: decisions in order, none of them committed yet.

    Returns:
        The committed token ids; ``req.output_ids`` is as before, the commit log and
        ``req.kv_committed_len`` are up to date.
    """
    state = deterministic.of(req)
    assert state is not None
    if req.to_finish is not None:
        return []  # aborted: SGLang ends the request where it stands
    before = len(req.output_ids)
    state.committing = True
    grammar = req.grammar
    if state.committed is not None:
        # A request ends with the token after the one that ends its grammar (where that one does not end it
        # itself: with ignore_eos), so each check must know of the tokens before it. SGLang advances its own
        # matcher once it has the committed tokens.
        req.grammar = state.committed
    try:
        for verdict in verdicts:
            _append_verdict(req, state, verdict)
            if req.finished() or _refused(state):
                break
    finally:
        req.grammar = grammar
        state.committing = False
    kept = list(req.output_ids[before:])
    del req.output_ids[before:]
    if req.finished():
        state.stashed_finish = (req.finished_reason, req.finished_len)
        req.finished_reason = req.finished_len = None
    if kept:
        # The last token's keys and values are written when it is next fed.
        req.kv_committed_len = len(req.origin_input_ids) + before + len(kept) - 1
    return kept


def commit_decoded(
    req: Req, state: DeterministicRequest, token: int, entry: TokenLogprobs | None
) -> list[int]:
    """Commit the one token that a canonical decode step decided, as :func:`commit` does with several.

    SGLang's own check of a single token is ours, so it is left to SGLang.

    Args:
        state: that of ``req``, of which nothing else waits to be committed.
        entry: its log-probabilities, if the request wants them.
    """
    if req.to_finish is not None:
        return []
    before = len(req.output_ids)
    state.log.commit_decoded(before, token)
    state.decided.append(token)
    if entry is not None:
        state.output_logprobs.append(entry)
    state.unchecked = True
    req.kv_committed_len = len(req.origin_input_ids) + before
    return [token]


def _refused(state: DeterministicRequest) -> bool:
    """Whether the grammar did not accept the last token; SGLang ends the request there."""
    return state.committed is not None and state.committed.refused


def _append_verdict(req: Req, state: DeterministicRequest, verdict: Verdict) -> None:
    start = len(req.output_ids)
    for token in verdict.tokens:
        req.output_ids.append(token)
        req.update_finish_state(1)
        if req.finished():
            break
        if state.committed is not None:
            state.committed.follow(token)
        if _refused(state):
            break
    kept = list(req.output_ids[start:])
    state.output_logprobs.extend(verdict.logprobs[: len(kept)])
    if verdict.ends_prefill:
        state.log.commit_prefill(len(req.origin_input_ids), req.cached_tokens, kept[0])
        state.insert_prompt = True
        return
    if verdict.by_decode:
        state.log.commit_decoded(start, kept[0])
        return
    tokens = kept + list(verdict.tokens[len(kept) :])
    state.log.commit_window(
        start, tokens, matched=verdict.matched, candidates=verdict.candidates, kept=len(kept)
    )


def update_finish_state(original: object, req: Req, new_accepted_len: int = 1) -> None:
    """Around ``Req.update_finish_state``: a deterministic request's tokens were checked when committed."""
    state = deterministic.of(req)
    if state is None or state.committing or state.unchecked or req.to_finish is not None:
        if state is not None:
            state.unchecked = False
        original(req, new_accepted_len)  # type: ignore[operator]
    elif state.stashed_finish is not None:
        req.finished_reason, req.finished_len = state.stashed_finish
        state.stashed_finish = None
