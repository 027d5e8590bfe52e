"""Row-wise penalties, biases and grammars against SGLang's own, token by token."""

from __future__ import annotations

import types
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ext.llm42 import logit_processing
from sglang_ext.llm42.logit_processing import Matcher, RequestRows
from sglang_ext.llm42.request import DeterministicRequest

VOCABULARY = 12


def _req(**params: Any) -> Any:
    defaults = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "logit_bias": None,
        "stop_token_ids": None,
        "custom_params": None,
    }
    tokenizer = types.SimpleNamespace(eos_token_id=0, additional_stop_token_ids=None)
    return types.SimpleNamespace(
        sampling_params=types.SimpleNamespace(**(defaults | params)),
        grammar=None,
        to_finish=None,
        custom_logit_processor=None,
        tokenizer=tokenizer,
        output_ids=array("q"),
    )


def _apply(
    logits: torch.Tensor,
    req: Any,
    decided: Sequence[int],
    candidates: list[int],
    grammar: Matcher | None = None,
    earlier: int | None = None,
) -> None:
    """Process the row behind all candidates, or several in turn, the first behind ``earlier`` of them."""
    rows = logits if logits.dim() == 2 else logits[None]
    logit_processing.apply(
        [
            RequestRows(
                rows,
                req,
                array("q", decided),
                torch.tensor(candidates, dtype=torch.int64),
                len(candidates) if earlier is None else earlier,
                grammar,
                logit_processing.stop_tokens(req),
            )
        ]
    )


def _sglang(logits: torch.Tensor, req: Any, output: list[int]) -> torch.Tensor:
    """What SGLang's penalisers make of ``logits`` after ``output`` was decoded one by one."""
    from sglang.srt.sampling.penaltylib import (
        BatchedFrequencyPenalizer,
        BatchedMinNewTokensPenalizer,
        BatchedPenalizerOrchestrator,
        BatchedPresencePenalizer,
        BatchedRepetitionPenalizer,
    )

    class Batch:
        """The little of SGLang's batch that penalisers use; they keep a weak reference to it."""

        def __init__(self) -> None:
            self.reqs = [req]
            self.device = "cpu"

    batch = Batch()
    penalisers = {
        BatchedFrequencyPenalizer,
        BatchedMinNewTokensPenalizer,
        BatchedPresencePenalizer,
    }
    result = logits[None].clone()
    for kinds in (penalisers, {BatchedRepetitionPenalizer}):  # additive first, as in overlap mode
        orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, batch, kinds)
        for token in output:
            orchestrator.cumulate_output_tokens(torch.tensor([token]))
        if kinds is penalisers:
            orchestrator.apply(result)
        else:
            scaling = orchestrator.accumulate_scaling_penalties()
            if scaling is not None:
                result = torch.where(result < 0, result * scaling, result / scaling)
    return result[0]


tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=8)


@given(
    output=tokens,
    cut=st.integers(0, 8),
    frequency=st.sampled_from([0.0, 0.5, -1.0]),
    presence=st.sampled_from([0.0, 0.7]),
    repetition=st.sampled_from([1.0, 1.3, 0.8]),
    minimum=st.integers(0, 6),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_a_row_is_penalised_like_the_same_output_decoded_alone(
    output: list[int],
    cut: int,
    frequency: float,
    presence: float,
    repetition: float,
    minimum: int,
    seed: int,
) -> None:
    req = _req(
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty=repetition,
        min_new_tokens=minimum,
        stop_token_ids={3},
    )
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    expected = _sglang(logits, req, output)
    row = logits.clone()
    _apply(row, req, output[:cut], output[cut:])
    torch.testing.assert_close(row, expected)


@given(output=tokens, seed=st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_bits_do_not_depend_on_which_tokens_are_still_candidates(output: list[int], seed: int) -> None:
    req = _req(frequency_penalty=0.3, presence_penalty=0.2, repetition_penalty=1.7, logit_bias={"5": -2.5})
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    rows = []
    for cut in range(len(output) + 1):
        row = logits.clone()
        _apply(row, req, output[:cut], output[cut:])
        rows.append(row)
    assert all(torch.equal(row, rows[0]) for row in rows)


@given(
    decided=tokens,
    candidates=tokens,
    data=st.data(),
    frequency=st.sampled_from([0.0, 0.3]),
    repetition=st.sampled_from([1.0, 1.7]),
    minimum=st.integers(0, 12),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_rows_processed_together_have_the_bits_of_each_alone(
    decided: list[int],
    candidates: list[int],
    data: st.DataObject,
    frequency: float,
    repetition: float,
    minimum: int,
    seed: int,
) -> None:
    req = _req(
        frequency_penalty=frequency,
        presence_penalty=0.2,
        repetition_penalty=repetition,
        min_new_tokens=minimum,
        logit_bias={"5": -2.5},
    )
    earlier = data.draw(st.integers(0, len(candidates)))
    rows = len(candidates) - earlier + 1
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    together = logits.clone()
    _apply(together, req, decided, candidates, earlier=earlier)
    for row in range(rows):
        _apply(logits[row], req, decided, candidates[: earlier + row])
    assert torch.equal(together, logits)


def test_a_request_without_any_processing_is_left_alone() -> None:
    assert not logit_processing.required(_req())
    assert logit_processing.required(_req(logit_bias={"1": 1.0}))
    assert logit_processing.required(_req(min_new_tokens=1))


class _Digits:
    """A grammar of ``[0-9]*`` that ends with token 11; counts what it has accepted, as xgrammar's do."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def copy(self) -> _Digits:
        return type(self)()

    def is_terminated(self) -> bool:
        return self.accepted[-1:] == [11]

    def accept_token(self, token: int) -> None:
        if token == 10:
            raise ValueError("not in the grammar")
        self.accepted.append(token)

    def rollback(self, count: int) -> None:
        del self.accepted[-count:]

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: Any) -> torch.Tensor:
        return torch.ones(batch_size, vocab_size, dtype=torch.bool)

    def fill_vocab_mask(self, mask: torch.Tensor, row: int) -> None:
        mask[row, 10] = False
        mask[row, 11] = bool(self.accepted)

    def move_vocab_mask(self, mask: torch.Tensor, device: Any) -> torch.Tensor:
        return mask

    def apply_vocab_mask(self, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        logits.masked_fill_(~vocab_mask, float("-inf"))


class _NeverRewound(_Digits):
    """As outlines' grammars."""

    def rollback(self, count: int) -> None:
        raise NotImplementedError


class _Brittle(_Digits):
    """As llguidance's: copies keep what was accepted, and a refused token spoils all that follows."""

    spoilt = False

    def copy(self) -> _Brittle:
        made = _Brittle()
        made.accepted, made.spoilt = list(self.accepted), self.spoilt
        return made

    def accept_token(self, token: int) -> None:
        self.spoilt |= token == 10
        self._check()
        super().accept_token(token)

    def rollback(self, count: int) -> None:
        self._check()
        super().rollback(count)

    def fill_vocab_mask(self, mask: torch.Tensor, row: int) -> None:
        self._check()
        super().fill_vocab_mask(mask, row)

    def _check(self) -> None:
        if self.spoilt:
            raise ValueError("in error since a token was refused")


def _forbidden(matcher: Matcher, candidates: list[int]) -> list[int]:
    row = torch.zeros(VOCABULARY)
    _apply(row, _req(), [], candidates, matcher)
    return row.isinf().nonzero().flatten().tolist()


@pytest.mark.parametrize("kind", [_Digits, _NeverRewound, _Brittle])
def test_the_grammar_is_asked_behind_the_candidates_and_rewound(kind: type[_Digits]) -> None:
    matcher = Matcher(kind())
    for candidates, forbidden in [([], [10, 11]), ([4], [10]), ([4, 10, 5], []), ([4, 11, 5], [])]:
        assert _forbidden(matcher, candidates) == forbidden
        assert _forbidden(matcher, []) == [10, 11]
    matcher.follow(4)
    for candidates in ([10], [4, 11], [4]):
        _forbidden(matcher, candidates)
        assert _forbidden(matcher, []) == [10]


@pytest.fixture
def xgrammar_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hook table has for a CPU."""
    from sglang.srt.constrained import xgrammar_backend

    from sglang_ext.cpu import sampling

    monkeypatch.setattr(xgrammar_backend, "_allocate_token_bitmask", sampling.allocate_grammar_mask)
    monkeypatch.setattr(xgrammar_backend.XGrammarGrammar, "apply_vocab_mask", sampling.apply_grammar_mask_of)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    """llguidance needs a tokenizer of bytes."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def _backend(name: str, tokenizer: Any) -> Any:
    if name == "xgrammar":
        from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

        return XGrammarGrammarBackend(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend

    return GuidanceBackend(tokenizer, n_vocab=len(tokenizer))


@pytest.mark.parametrize("before", ["", "zzq"], ids=["plain", "behind reasoning"])
@pytest.mark.parametrize("name", ["xgrammar", "llguidance"])
def test_a_retracted_request_goes_on_in_its_grammar(
    xgrammar_on_a_cpu: None, tokenizer: Any, name: str, before: str
) -> None:
    """SGLang's grammar object has followed the output by then, and backends copy it in different ways."""
    from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject

    def ids(text: str) -> list[int]:
        return [tokenizer.convert_tokens_to_ids(character) for character in text]

    req = _req(max_new_tokens=40)
    req.grammar = _backend(name, tokenizer).dispatch_regex("abc[xy]z")
    if before:
        req.grammar = ReasonerGrammarObject(req.grammar, ids("q"))
        req.grammar.maybe_init_reasoning(True)
    req.prefix_indices, req.stream = (), False
    req.origin_input_ids = req.full_untruncated_fill_ids = [1, 2]
    state = DeterministicRequest(seed=1, seed_is_default=False)

    def allowed(candidates: str) -> set[str]:
        row = torch.zeros(len(tokenizer))
        _apply(row, req, state.decided, ids(candidates), state.matcher)
        return {*tokenizer.convert_ids_to_tokens(row.isfinite().nonzero().flatten().tolist())} & {*"abcxyz"}

    state.admit(req)
    assert allowed(before) == {"a"}
    for token in ids(before + "ab"):
        req.output_ids.append(token)
        req.grammar.accept_token(token)
    state.leave()
    state.admit(req)
    for candidates, expected in [("", {"c"}), ("c", {"x", "y"}), ("cx", {"z"}), ("", {"c"})]:
        assert allowed(candidates) == expected


def test_a_custom_processor_sees_the_row_own_output() -> None:
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    class Forbid(CustomLogitProcessor):
        def __call__(self, logits: torch.Tensor, custom_params: Any = None) -> torch.Tensor:
            for token in custom_params[0]["__req__"].output_ids:
                logits[0, token] = float("-inf")
            return logits

    req = _req()
    req.custom_logit_processor = Forbid.to_str()
    req.sampling_params.custom_params = {"__req__": req}
    row = torch.zeros(VOCABULARY)
    _apply(row, req, [2, 3], [7])
    assert row.isinf().nonzero().flatten().tolist() == [2, 3, 7]
    assert len(req.output_ids) == 0
