"""Penalties, grammars, biases and custom processors of deterministic requests, row by row.

SGLang processes the logits of a decode batch with state that has seen every token of the request. A row of
a canonical pass stands somewhere inside the request's candidates, so here each row is processed as if the
request had ended just before it: with the tokens decided so far and the candidates in front of the row.
The order of the steps is SGLang's: additive penalties, repetition penalty, grammar, logit bias, custom
processor.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class RowView(NamedTuple):
    """What a row may know of its request.

    Attributes:
        decided: output tokens that canonical passes decided.
        candidates: ids of the candidates in front of the row, int64, on the logits' device.
        grammar: matcher that has accepted ``decided``, or None.
    """

    decided: Sequence[int]
    candidates: torch.Tensor
    grammar: Matcher | None


class Matcher:
    """Follows the output through a request's grammar, and looks ahead over candidates.

    SGLang's own matcher follows the committed output when it processes a step. Grammar backends differ in
    what they can rewind: xgrammar all of it, llguidance nothing once it has refused a token, outlines nothing
    at all. Copies of llguidance's grammars and of those behind reasoning keep what was accepted, others lose
    it. So this one starts from a grammar that has accepted nothing, and starts again where rewinding fails.

    Args:
        pristine: SGLang's grammar object, before it has accepted a token; only copies of it are used.
        output: tokens to follow first.

    Attributes:
        refused: whether the grammar did not accept the last token that :meth:`follow` was told.

    Raises:
        ValueError: the grammar refuses one of ``output``.
    """

    def __init__(self, pristine: Any, output: Sequence[int] = ()) -> None:
        self.refused = False
        self._pristine = pristine
        self._output = list(output)
        self._grammar = self._start()

    def _start(self) -> Any:
        grammar = self._pristine.copy()
        for token in self._output:
            grammar.accept_token(token)
        return grammar

    def is_terminated(self) -> bool:
        """Whether the grammar has come to its end."""
        return self._grammar.is_terminated()

    def follow(self, token: int) -> None:
        """``token`` is the next one of the output; once the grammar has ended or refused, nothing matters."""
        if self.refused or self.is_terminated():
            return
        try:
            self._grammar.accept_token(token)
        except ValueError:
            self.refused = True
            return
        self._output.append(token)

    def constrain(self, logits: torch.Tensor, candidates: Sequence[int]) -> None:
        """Mask what the grammar does not allow after ``candidates``; ``logits`` of shape ``[vocabulary]``."""
        ahead = 0
        try:
            for token in candidates:
                if self.is_terminated():
                    break
                self._grammar.accept_token(token)
                ahead += 1
        except ValueError:
            # An earlier row rejects this candidate, so this row decides nothing.
            self._grammar = self._start()
            return
        try:
            if not self.is_terminated():
                self._mask(logits)
        finally:
            if ahead:
                self._rewind(ahead)

    def _mask(self, logits: torch.Tensor) -> None:
        grammar = self._grammar
        mask = grammar.allocate_vocab_mask(logits.shape[0], 1, logits.device)
        grammar.fill_vocab_mask(mask, 0)
        mask = grammar.move_vocab_mask(mask, logits.device)
        grammar.apply_vocab_mask(logits=logits[None], vocab_mask=mask)

    def _rewind(self, tokens: int) -> None:
        try:
            self._grammar.rollback(tokens)
        except NotImplementedError:
            self._grammar = self._start()


def required(req: Req) -> bool:
    """Whether the logits of ``req`` are changed at all before sampling."""
    params = req.sampling_params
    return bool(
        params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1.0
        or params.min_new_tokens > 0
        or params.logit_bias
        or req.grammar is not None
        or req.custom_logit_processor
    )


def apply(logits: torch.Tensor, req: Req, view: RowView) -> None:
    """Process one row in place; ``logits`` is float32 of shape ``[vocabulary]``."""
    _penalise(logits, req, view)
    if view.grammar is not None:
        view.grammar.constrain(logits, view.candidates.tolist())
    if req.sampling_params.logit_bias:
        for token, bias in req.sampling_params.logit_bias.items():
            logits[int(token)] += bias
    if req.custom_logit_processor:
        _custom(logits, req, view)


def _penalise(logits: torch.Tensor, req: Req, view: RowView) -> None:
    params = req.sampling_params
    additive = params.frequency_penalty or params.presence_penalty
    if additive or params.repetition_penalty != 1.0:
        counts = torch.zeros_like(logits)
        seen = torch.tensor(list(view.decided), dtype=torch.int64, device=logits.device)
        for tokens in (seen, view.candidates):
            counts.scatter_add_(0, tokens, torch.ones_like(tokens, dtype=logits.dtype))
        present = counts > 0
        logits -= params.frequency_penalty * counts
        logits -= params.presence_penalty * present
        if params.repetition_penalty != 1.0:
            scaled = torch.where(
                logits < 0, logits * params.repetition_penalty, logits / params.repetition_penalty
            )
            logits.copy_(torch.where(present, scaled, logits))
    if len(view.decided) + len(view.candidates) < params.min_new_tokens:
        logits[torch.tensor(_stop_tokens(req), dtype=torch.int64, device=logits.device)] = float("-inf")


def _stop_tokens(req: Req) -> list[int]:
    """Token ids that ``min_new_tokens`` holds back."""
    tokens = set(req.sampling_params.stop_token_ids or ())
    if req.tokenizer is not None:
        tokens |= set(req.tokenizer.additional_stop_token_ids or ())
        if req.tokenizer.eos_token_id is not None:
            tokens.add(req.tokenizer.eos_token_id)
    return sorted(tokens)


def _custom(logits: torch.Tensor, req: Req, view: RowView) -> None:
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    processor = CustomLogitProcessor.from_str(req.custom_logit_processor)
    params = dict(req.sampling_params.custom_params or {})
    if "__req__" in params:
        # Processors look at the request's output: show them the row's own.
        seen = copy.copy(req)
        seen.output_ids = type(req.output_ids)("q", [*view.decided, *view.candidates.tolist()])
        params["__req__"] = seen
    logits.copy_(processor(logits[None], [params])[0])
