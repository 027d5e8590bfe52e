"""Committing on SGLang's own request object: how tokens are cut into verdicts changes nothing."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import make_tokenizer
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_transformers_utils import attach_additional_stop_token_ids

from sglang_ext.llm42 import commit as commit_module
from sglang_ext.llm42 import scheduler_hooks
from sglang_ext.llm42.commit import commit, commit_decoded, update_finish_state
from sglang_ext.llm42.commit_log import CommitLog
from sglang_ext.llm42.config import REQUEST_KEY
from sglang_ext.llm42.drafting import DecodeStep
from sglang_ext.llm42.request import DeterministicRequest, Verdict, attach, of

EOS = 1
#: Ids 2 and up; what overlaps makes stop strings span tokens in more than one way.
PIECES = ("a", "b", "ab", "ba", "c", "aab", " ", "x")
VOCABULARY = 2 + len(PIECES)
PROMPT = (2, 3, 4)

TOKENIZER = make_tokenizer(("<s>", "</s>", *PIECES))
attach_additional_stop_token_ids(TOKENIZER)


class Grammar:
    """Allows everything but one token, and is complete after another."""

    def __init__(self, last: int | None, forbidden: int | None = None) -> None:
        self.last, self.forbidden = last, forbidden
        self.accepted: list[int] = []
        self.finished = False

    def copy(self) -> Grammar:
        return type(self)(self.last, self.forbidden)

    def is_terminated(self) -> bool:
        return self.last in self.accepted

    def accept_token(self, token: int) -> None:
        if self.is_terminated():
            return
        if token == self.forbidden:
            raise ValueError("Tokens not accepted")
        self.accepted.append(token)

    def rollback(self, count: int) -> None:
        raise NotImplementedError("outlines has none, and llguidance none after a token that it refused")


@dataclass(frozen=True)
class Case:
    """A canonical token sequence and what may end it.

    Attributes:
        grammar: the token that ends its grammar, and one that it does not allow; None without a grammar.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    stops: dict[str, Any] = field(default_factory=dict)
    grammar: tuple[int | None, int | None] | None = None

    @property
    def sequence(self) -> tuple[int, ...]:
        """The tokens that the lane would judge: it never goes beyond the allowed length."""
        return self.tokens[: self.max_new_tokens]


@dataclass(frozen=True)
class Outcome:
    """What leaves a request."""

    token_ids: tuple[int, ...]
    text: str
    finish: dict[str, Any] | None
    finished_len: int | None


CASES = (
    Case((2, 3, 4, 5, 6, 7, 2, 3, 4, 5), 10),
    Case((2, 3, 4, EOS, 6, 7, 2, 3, 4, 5), 10),
    Case((2, 3, 4, 5, 6, 7, 2, 3, EOS, 5), 9),
    Case((2, 3, 4, 5, 6, 7, 2, 3, 4, EOS), 10),
    Case((2, 3, 4, 6, EOS, 7, 2, 3, 4, 5), 10, {"ignore_eos": True}),
    Case((2, 8, 2, 6, 3, 2, 5, EOS, 2, 2), 9, {"stop": ["bab"]}),
    Case((2, 8, 2, 3, 2, 3, EOS, 6, 2, 2), 8, {"stop": ["abab", "c"]}),
    Case((8, 8, 4, 6, 7, 9, 6, 6, 2, EOS), 10, {"stop": ["ca", "aabx"], "stop_token_ids": [9]}),
    Case((8, 8, 4, 6, 9, 7, 6, 6, 2, EOS), 6, {"stop_regex": ["c.a+b"], "stop_token_ids": [7]}),
    Case((8, 8, 4, 6, 7, 2, 6, 6, 2, EOS), 7, {"stop_regex": ["x|ca{2,3}b"], "stop": ["aba", "ba"]}),
    Case((2, 3, 7, 6, EOS, 8, 8, 8, 8, 8), 5, {"stop": ["c"], "stop_token_ids": [6]}),
    Case((2, 3, 4, EOS, 6, 7, 2, 3, 4, 5), 10, {}, (EOS, None)),
    Case((2, 3, 4, 6, EOS, 7, 2, 3, 4, 5), 10, {"ignore_eos": True}, (EOS, None)),
    Case((6, 3, 4, 2, 5, 7, 2, 3, 4, 5), 10, {"ignore_eos": True}, (6, None)),
    Case((2, 3, 4, 6, EOS, 7, 2, 3, 4, 5), 5, {"ignore_eos": True}, (EOS, None)),
)


def _request(case: Case, marked: bool) -> Req:
    params = SamplingParams(
        max_new_tokens=case.max_new_tokens, custom_params={REQUEST_KEY: marked}, **case.stops
    )
    params.normalize(TOKENIZER)
    req = Req("r", "", array("q", PROMPT), params, eos_token_ids={EOS}, vocab_size=VOCABULARY)
    req.tokenizer = TOKENIZER
    req.cached_tokens = 0
    req.grammar = Grammar(*case.grammar) if case.grammar else None
    attach(req, weights_generation=0)
    if marked:
        of(req).follow_grammar(req)
    return req


def _outcome(req: Req) -> Outcome:
    token_ids = tuple(req.output_ids_through_stop)
    finish = req.finished_reason.to_json() if req.finished_reason else None
    return Outcome(token_ids, TOKENIZER.decode(token_ids), finish, req.finished_len)


def _accept(req: Req, token_ids: list[int]) -> None:
    """SGLang's grammar step behind the finish check of a decode step."""
    if req.grammar is not None:
        SchedulerBatchResultProcessor._accept_grammar_tokens(None, req, token_ids)
        req.grammar.finished = req.finished()


def _one_by_one(case: Case) -> Outcome:
    """SGLang's own ordinary decoding of an unmarked request: one token, one check."""
    req = _request(case, marked=False)
    for token in case.sequence:
        req.output_ids.append(token)
        req.update_finish_state()
        _accept(req, [token])
        if req.finished():
            break
    return _outcome(req)


def _in_verdicts(case: Case, verdicts: Sequence[Sequence[Verdict]]) -> tuple[Outcome, DeterministicRequest]:
    """The same tokens decided by ``verdicts``, each inner sequence committed in one step of SGLang's."""
    req = _request(case, marked=True)
    for step in verdicts:
        token_ids = commit(req, step)
        # From here on as SGLang processes a step that accepted several tokens.
        req.output_ids.extend(token_ids)
        req.update_finish_state(max(1, len(token_ids)))
        _accept(req, token_ids)
        if req.finished():
            break
        assert req.kv_committed_len == len(PROMPT) + len(req.output_ids) - 1
    return _outcome(req), req.llm42


def _cut(
    tokens: Sequence[int], lengths: Sequence[int], corrected: Callable[[int], bool] = lambda i: i % 2 == 0
) -> list[Verdict]:
    """One verdict per length after the one that ends the prompt; ``corrected`` says which hold a mismatch."""
    verdicts = [Verdict((tokens[0],), 0, 0, ends_prefill=True)]
    start = 1
    for number, length in enumerate(lengths):
        wrong = corrected(number)
        verdicts.append(
            Verdict(tuple(tokens[start : start + length]), length - wrong, length + 2, ends_prefill=False)
        )
        start += length
    assert start == len(tokens)
    return verdicts


def _every_cut(count: int) -> Iterator[list[int]]:
    """Every way to write ``count`` as an ordered sum."""
    inner = range(1, count)
    for borders in (chosen for size in range(count) for chosen in combinations(inner, size)):
        edges = [0, *borders, count]
        yield [end - start for start, end in pairwise(edges)]


@pytest.fixture(autouse=True)
def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Req.update_finish_state`` as it is in a scheduler with LLM-42."""
    _hook(monkeypatch)


def _hook(patch: pytest.MonkeyPatch) -> None:
    original = Req.update_finish_state
    patch.setattr(
        Req, "update_finish_state", lambda req, new_len=1: update_finish_state(original, req, new_len)
    )


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_cut_finishes_alike(case: Case) -> None:
    expected = _one_by_one(case)
    digests = set()
    for lengths in _every_cut(len(case.sequence) - 1):
        verdicts = _cut(case.sequence, lengths)
        for steps in ([[v] for v in verdicts], [verdicts], [verdicts[:1], verdicts[1:]]):
            outcome, state = _in_verdicts(case, steps)
            assert outcome == expected, (lengths, len(steps))
            assert state.log.tokens == expected.token_ids
            digests.add(state.log.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("case", [case for case in CASES if case.grammar is None])
@pytest.mark.parametrize("queued", [0, 3])
def test_tokens_of_canonical_decode_steps_finish_alike(case: Case, queued: int) -> None:
    """One by one, or the first of them behind the verdict of a pass that is committed in the same step."""
    req = _request(case, marked=True)
    state = req.llm42
    waiting = _cut(case.sequence[: queued + 1], [queued] if queued else [])
    for token in case.sequence[queued + 1 :]:
        if waiting:
            token_ids = commit(req, [*waiting, Verdict((token,), 0, 0, ends_prefill=False, by_decode=True)])
            waiting = []
        else:
            token_ids = commit_decoded(req, state, token, None)
            assert token_ids == [token]
        req.output_ids.extend(token_ids)
        req.update_finish_state(max(1, len(token_ids)))
        if req.finished():
            break
        assert req.kv_committed_len == len(PROMPT) + len(req.output_ids) - 1
    assert _outcome(req) == _one_by_one(case)
    assert list(state.log.tokens) == list(_one_by_one(case).token_ids)
    assert not state.unchecked


def test_an_aborted_request_commits_no_decoded_token() -> None:
    req = _request(CASES[0], marked=True)
    commit(req, _cut(CASES[0].sequence[:1], []))
    req.to_finish = FINISH_ABORT()
    assert commit_decoded(req, req.llm42, 5, None) == []
    assert req.llm42.log.num_committed == 1 and not req.llm42.unchecked


def test_the_cases_end_in_every_way() -> None:
    finishes = [_one_by_one(case).finish for case in CASES]
    assert all(finishes)
    kinds = {(f["type"], type(f.get("matched")).__name__) for f in finishes if f}
    assert kinds == {("length", "NoneType"), ("stop", "int"), ("stop", "str")}
    assert len({str(f) for f in finishes}) >= 7


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_of_any_tokens(data: st.DataObject) -> None:
    text = st.text("abc x", min_size=1, max_size=4)
    case = Case(
        tuple(data.draw(st.lists(st.integers(1, VOCABULARY - 1), min_size=2, max_size=24))),
        data.draw(st.integers(2, 24)),
        {
            "stop": data.draw(st.lists(text, max_size=2)),
            "stop_regex": data.draw(st.lists(st.sampled_from(["a{3}", "[xc]a", "b +b"]), max_size=1)),
            "stop_token_ids": data.draw(st.lists(st.integers(2, VOCABULARY - 1), max_size=1)),
            "ignore_eos": data.draw(st.booleans()),
        },
        data.draw(st.none() | st.tuples(st.integers(1, VOCABULARY - 1), st.none())),
    )
    remaining, lengths = len(case.sequence) - 1, []
    while remaining:
        lengths.append(data.draw(st.integers(1, remaining)))
        remaining -= lengths[-1]
    verdicts = _cut(case.sequence, lengths, corrected=lambda i: data.draw(st.booleans()))
    steps: list[list[Verdict]] = [[]]
    for verdict in verdicts:
        steps[-1].append(verdict)
        if data.draw(st.booleans()):
            steps.append([])
    outcome, state = _in_verdicts(case, [step for step in steps if step])
    assert outcome == _one_by_one(case)
    assert state.log.tokens == outcome.token_ids


@pytest.mark.parametrize("together", [True, False])
def test_output_ends_at_a_token_that_the_grammar_refuses(together: bool) -> None:
    """A contradictory grammar: what was decided behind the token must not reach the client."""
    case = Case((2, 3, 4, 9, 6, 7, 2, 3), 8, grammar=(None, 9))
    for lengths in _every_cut(len(case.sequence) - 1):
        verdicts = _cut(case.sequence, lengths)
        req = _request(case, marked=True)
        for step in [verdicts] if together else [[verdict] for verdict in verdicts]:
            token_ids = commit(req, step)
            req.output_ids.extend(token_ids)
            req.update_finish_state(max(1, len(token_ids)))
            if req.finished():
                break
            _accept(req, token_ids)
        req.update_finish_state(1)
        assert list(req.output_ids) == [2, 3, 4, 9], lengths
        assert req.finished_reason.to_json()["type"] == "abort"


def test_an_aborted_request_commits_nothing_more() -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    case = CASES[0]
    req = _request(case, marked=True)
    first, *rest = _cut(case.sequence, [4, 5])
    req.output_ids.extend(commit(req, [first]))
    req.to_finish = FINISH_ABORT("gone")
    assert commit(req, rest) == []
    req.update_finish_state(1)
    assert req.finished() and list(req.output_ids) == [case.tokens[0]]
    assert req.llm42.log.num_committed == 1


def _retract(req: Req) -> None:
    """SGLang takes the request's memory back and, later, finds it some again."""
    of(req).leave()
    scheduler_hooks.retracted(req.reset_for_retract(), req)
    req.full_untruncated_fill_ids = array("q", [*req.origin_input_ids, *req.output_ids])
    of(req).admit(req)


@pytest.mark.parametrize("times", [1, 2])
def test_a_request_that_its_grammar_has_ended_may_be_retracted_first(times: int) -> None:
    """SGLang ends it a step later, and takes its memory in between if that runs short."""
    case = Case((2, 3, 4, 9, 6, 7, 2, 3), 8, grammar=(None, 9))
    for lengths in _every_cut(len(case.sequence) - 1):
        req = _request(case, marked=True)
        token_ids = commit(req, _cut(case.sequence, lengths))
        req.output_ids.extend(token_ids)
        req.update_finish_state(max(1, len(token_ids)))
        _accept(req, token_ids)
        assert req.to_finish is not None and not req.finished()
        for _ in range(times):
            _retract(req)
        _end_doomed(req)
        assert list(req.output_ids) == [2, 3, 4, 9], lengths
        assert CommitLog.replay(of(req).log.as_json_records()) == of(req).log


@pytest.mark.parametrize("retracted_before", [False, True])
def test_an_aborted_request_may_be_retracted_before_it_ends(retracted_before: bool) -> None:
    """By its client, by a timeout or because weights were updated; or by SGLang where no memory is left."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    case = Case((2, 3, 4, 5, 6, 7, 2, 3), 8, grammar=(None, None))
    req = _request(case, marked=True)
    req.output_ids.extend(commit(req, _cut(case.sequence[:6], [3, 2])))
    if retracted_before:
        _retract(req)
    req.to_finish = FINISH_ABORT("gone")
    _retract(req)
    _end_doomed(req)
    assert list(req.output_ids) == [2, 3, 4, 5, 6, 7]
    kinds = [record["kind"] for record in of(req).log.as_json_records()]
    assert kinds == ["prefill", "window", "window", *["retract"] * retracted_before, "release"]


def _end_doomed(req: Req) -> None:
    """The step in which SGLang ends a request: whatever passes decided meanwhile is not committed."""
    of(req).decide(Verdict((5,), 0, 0, ends_prefill=True))
    assert commit(req, list(of(req).verdicts)) == []
    req.update_finish_state(0)
    assert req.finished_reason.to_json()["type"] == "abort"
    of(req).log.release("abort", len(req.output_ids))


def test_a_result_commits_once_what_was_decided_after_its_step_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the result of the step that begins then: with the overlap scheduler that is a step later."""
    req = _request(CASES[0], marked=True)
    step = DecodeStep([req], [0], [], [0])
    of(req).decide(Verdict((2,), 0, 0, ends_prefill=True))
    monkeypatch.setattr(scheduler_hooks, "_observer", SimpleNamespace(step_done=lambda: None))
    processor = SimpleNamespace(metrics_reporter=SimpleNamespace(num_generated_tokens=1))

    def outputs() -> list[list[int]]:
        token_ids, _ = scheduler_hooks.decode_outputs(
            lambda processor, **kwargs: ([[9]], None),
            processor,
            batch=cast("Any", SimpleNamespace(reqs=[req])),
            result=SimpleNamespace(llm42=step),
            logits_output=None,
        )
        return token_ids

    assert outputs() == [[2]] and processor.metrics_reporter.num_generated_tokens == 1
    assert outputs() == [[]] and processor.metrics_reporter.num_generated_tokens == 0


def test_checking_whole_windows_would_finish_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our check token by token the outcome depends on the cut: these cases can tell."""

    def append_whole(req: Req, state: DeterministicRequest, verdict: Verdict) -> None:
        req.output_ids.extend(verdict.tokens)
        req.update_finish_state(len(verdict.tokens))

    monkeypatch.setattr(commit_module, "_append_verdict", append_whole)
    differing = [
        case
        for case in CASES
        if any(
            _in_verdicts(case, [[v] for v in _cut(case.sequence, lengths)])[0] != _one_by_one(case)
            for lengths in _every_cut(len(case.sequence) - 1)
        )
    ]
    assert len(differing) >= 4
