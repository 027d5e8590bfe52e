"""Penalties, grammars, biases and custom processors of deterministic requests, row by row.

SGLang processes the logits of a decode batch with state that has seen every token of the request. A row of
a canonical pass stands somewhere inside the request's candidates, so here each row is processed as if the
request had ended just before it: with the tokens decided so far and the candidates in front of the row.
The order of the steps is SGLang's: additive penalties, repetition penalty, grammar, logit bias, custom
processor.

Rows of one request that follow each other are penalised together, and all that penalties need of the host
travels in one copy: this stands in every decode step and in every pass.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from sglang_ext.llm42.transfer import to_device

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class RequestRows(NamedTuple):
    """Rows of one request that follow each other, and what they may know of it.

    Attributes:
        logits: float32 ``[rows, vocabulary]``, changed in place.
        req: whose they are.
        decided: output tokens that canonical passes decided.
        candidates: ids of the candidates in front of the last row, int64, on the logits' device.
        earlier: how many of these stand in front of the first row; each later row has one more.
        grammar: matcher that has accepted ``decided``, or None.
        stop_tokens: ids that ``min_new_tokens`` holds back.
    """

    logits: torch.Tensor
    req: Req
    decided: array[int]
    candidates: torch.Tensor
    earlier: int
    grammar: Matcher | None
    stop_tokens: Sequence[int]


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


def apply(parts: Sequence[RequestRows]) -> None:
    """Process the logits of ``parts`` in place."""
    _penalise(parts)
    for part in parts:
        params, custom = part.req.sampling_params, part.req.custom_logit_processor
        # Only these look at candidates on the host, which waits for them.
        candidates = part.candidates.tolist() if part.grammar is not None or custom else []
        if part.grammar is not None:
            for row, logits in enumerate(part.logits):
                part.grammar.constrain(logits, candidates[: part.earlier + row])
        for token, bias in (params.logit_bias or {}).items():
            part.logits[:, int(token)] += bias
        if custom:
            for row, logits in enumerate(part.logits):
                _custom(logits, part.req, [*part.decided, *candidates[: part.earlier + row]])


def _penalise(parts: Sequence[RequestRows]) -> None:
    sent = [tokens for part in parts for tokens in (_counted(part), _held_back(part))]
    if not any(len(tokens) for tokens in sent):
        on_device: Sequence[torch.Tensor] = [part.candidates[:0] for part in parts for _ in range(2)]
    else:
        packed = to_device(torch.cat(sent), parts[0].logits.device)
        on_device = packed.split([len(tokens) for tokens in sent])
    for part, decided, stop_tokens in zip(parts, on_device[::2], on_device[1::2], strict=True):
        if _by_count(part.req):
            _penalise_by_count(part, decided)
        if len(stop_tokens):
            part.logits[: _rows_before_minimum(part)].index_fill_(1, stop_tokens, float("-inf"))


def _by_count(req: Req) -> bool:
    """Whether it matters how often a token occurs in the output of ``req``."""
    params = req.sampling_params
    return bool(params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0)


def _rows_before_minimum(part: RequestRows) -> int:
    """How many of the rows, the first ones, ``min_new_tokens`` concerns."""
    missing = part.req.sampling_params.min_new_tokens - len(part.decided) - part.earlier
    return max(0, min(missing, len(part.logits)))


def _counted(part: RequestRows) -> torch.Tensor:
    """Output tokens that penalties count, int64 on the host."""
    return torch.from_numpy(numpy.array(part.decided if _by_count(part.req) else (), dtype=numpy.int64))


def _held_back(part: RequestRows) -> torch.Tensor:
    """Tokens that ``min_new_tokens`` holds back from some of the rows, int64 on the host."""
    return torch.tensor(part.stop_tokens if _rows_before_minimum(part) else (), dtype=torch.int64)


def _penalise_by_count(part: RequestRows, decided: torch.Tensor) -> None:
    """Frequency, presence and repetition penalty; ``decided`` is on the logits' device."""
    params, logits = part.req.sampling_params, part.logits
    counts = _counts(part, decided)
    present = counts > 0
    logits -= params.frequency_penalty * counts
    logits -= params.presence_penalty * present
    if params.repetition_penalty != 1.0:
        scaled = torch.where(
            logits < 0, logits * params.repetition_penalty, logits / params.repetition_penalty
        )
        logits.copy_(torch.where(present, scaled, logits))


def _counts(part: RequestRows, decided: torch.Tensor) -> torch.Tensor:
    """How often each token occurs in front of each row; float32 ``[rows or 1, vocabulary]``.

    Sums of whole numbers: exact, whatever their order.
    """
    logits = part.logits
    counts = torch.zeros_like(logits[:1])
    counts[0].scatter_add_(0, decided, torch.ones_like(decided, dtype=logits.dtype))
    if not len(part.candidates):
        return counts
    rows, candidates = len(logits), len(part.candidates)
    earlier = torch.arange(part.earlier, part.earlier + rows, device=logits.device)
    in_front = torch.arange(candidates, device=logits.device) < earlier[:, None]
    counts = counts.repeat(rows, 1)
    return counts.scatter_add_(1, part.candidates.expand(rows, -1), in_front.to(logits.dtype))


def stop_tokens(req: Req) -> tuple[int, ...]:
    """Token ids that ``min_new_tokens`` holds back, if the request has it."""
    if req.sampling_params.min_new_tokens <= 0:
        return ()
    tokens = set(req.sampling_params.stop_token_ids or ())
    if req.tokenizer is not None:
        tokens |= set(req.tokenizer.additional_stop_token_ids or ())
        if req.tokenizer.eos_token_id is not None:
            tokens.add(req.tokenizer.eos_token_id)
    return tuple(sorted(tokens))


def _custom(logits: torch.Tensor, req: Req, output: Sequence[int]) -> None:
    """The request's own processor, for the row behind ``output``."""
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    processor = CustomLogitProcessor.from_str(req.custom_logit_processor)
    params = dict(req.sampling_params.custom_params or {})
    if "__req__" in params:
        # Processors look at the request's output: show them the row's own.
        seen = copy.copy(req)
        seen.output_ids = type(req.output_ids)("q", output)
        params["__req__"] = seen
    logits.copy_(processor(logits[None], [params])[0])
