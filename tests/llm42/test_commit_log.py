"""The commit log's invariants, property-based: pure Python, no torch, no SGLang."""

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_ext.llm42.commit_log import (
    CommitLog,
    CommitLogError,
    DecodeCommit,
    PrefillCommit,
    Release,
    Retract,
    WindowCommit,
)

token_ids = st.integers(0, 2**32 - 1)


def expected_digest(tokens: list[int]) -> str:
    content = b"sglang_ext.llm42.commit_log.v1\n" + b"".join(struct.pack("<I", token) for token in tokens)
    return hashlib.sha256(content).hexdigest()


class CommitLogMachine(RuleBasedStateMachine):
    """A request's life in any legal order, against a model that holds nothing but a token list."""

    def __init__(self) -> None:
        super().__init__()
        self.log = CommitLog()
        self.committed: list[int] = []
        self.candidates: list[int] = []
        self.windows = self.rollbacks = self.rolled_back = 0
        self.prefilled = self.cut = self.released = False
        self.seen: list[tuple[int, ...]] = [()]

    @precondition(lambda self: not (self.prefilled or self.cut or self.released))
    @rule(token=st.none() | token_ids, data=st.data())
    def prefill(self, token: int | None, data: st.DataObject) -> None:
        limit = 7 + len(self.committed) - (token is not None)
        self.log.commit_prefill(7, data.draw(st.integers(0, limit)), token)
        self.prefilled = True
        if token is not None:
            self.committed.append(token)

    @precondition(lambda self: self.prefilled)
    @rule(token=token_ids)
    def decode(self, token: int) -> None:
        self.candidates.append(token)

    @precondition(lambda self: self.prefilled and not self.cut and not self.candidates)
    @rule(token=token_ids)
    def canonical_decode(self, token: int) -> None:
        follows = isinstance(self.log.records[-1], DecodeCommit)
        records = len(self.log.records)
        record = self.log.commit_decoded(len(self.committed), token)
        self.committed.append(token)
        assert record.start + record.count == len(self.committed)
        assert len(self.log.records) == records + (not follows)

    @precondition(lambda self: self.prefilled and not self.cut)
    @rule(data=st.data(), more=token_ids)
    def verify(self, data: st.DataObject, more: int) -> None:
        matched = data.draw(st.integers(0, len(self.candidates)))
        tokens = self.candidates[:matched]
        survives = 0 < matched < len(self.candidates) and data.draw(st.booleans())
        if not survives:
            tokens = [*tokens, more]
        before = list(self.committed)
        record = self.log.commit_window(len(before), tokens, matched=matched, candidates=len(self.candidates))

        rolled_back = 0 if survives else len(self.candidates) - matched
        assert record.rolled_back == rolled_back
        assert record.corrected == (rolled_back > 0)
        assert self.log.num_committed > len(before), "a verification gains at least one token"
        # A rollback discards candidates only: what was committed before it stands unchanged.
        assert list(self.log.tokens[: len(before)]) == before
        self.committed += tokens
        self.candidates = self.candidates[matched:] if survives else []
        self.windows += 1
        self.rollbacks += rolled_back > 0
        self.rolled_back += rolled_back

    @precondition(lambda self: self.prefilled and not self.cut and self.candidates)
    @rule(data=st.data(), more=token_ids)
    def verify_and_finish(self, data: st.DataObject, more: int) -> None:
        matched = data.draw(st.integers(1, len(self.candidates)))
        kept = data.draw(st.integers(1, matched))
        tokens = [*self.candidates[:matched], more]
        record = self.log.commit_window(
            len(self.committed), tokens, matched=matched, candidates=len(self.candidates), kept=kept
        )
        assert record.cut
        assert record.rolled_back == 0
        self.committed += tokens[:kept]
        self.windows += 1
        self.candidates = []
        self.cut = True

    @precondition(lambda self: not (self.cut or self.released))
    @rule()
    def retract(self) -> None:
        self.log.retract(len(self.committed))
        self.prefilled = False
        self.candidates = []

    @precondition(lambda self: not self.released)
    @rule(reason=st.sampled_from(["stop", "length", "abort"]))
    def release(self, reason: str) -> None:
        self.log.release(reason, len(self.committed))
        self.released = True
        self.prefilled = False

    @rule(start=st.integers(0, 40), token=token_ids, delta=st.sampled_from([-1, 1]))
    def refused_calls_change_nothing(self, start: int, token: int, delta: int) -> None:
        before = self.log.as_json_records()
        calls: list[Callable[[], Any]] = [
            lambda: self.log.retract(len(self.committed) + delta),
            lambda: self.log.release("stop", len(self.committed) + delta),
            lambda: self.log.commit_window(len(self.committed), [], matched=0, candidates=0),
            lambda: self.log.commit_window(len(self.committed), [token, -1], matched=1, candidates=1),
            lambda: self.log.commit_decoded(len(self.committed) + delta, token),
            lambda: self.log.commit_decoded(len(self.committed), -1),
        ]
        if not self.prefilled or self.cut:
            calls.append(lambda: self.log.commit_decoded(len(self.committed), token))
        if start != len(self.committed):
            calls.append(lambda: self.log.commit_window(start, [token], matched=0, candidates=0))
        if self.prefilled:
            calls.append(lambda: self.log.commit_prefill(7, 0))
        if self.released:
            calls.append(lambda: self.log.release("stop", len(self.committed)))
        for call in calls:
            with pytest.raises(CommitLogError):
                call()
        assert self.log.as_json_records() == before

    @invariant()
    def agrees_with_the_model(self) -> None:
        log = self.log
        assert list(log.tokens) == self.committed
        assert log.digest == expected_digest(self.committed)
        assert log.num_committed == len(self.committed)
        assert log.prefilled == self.prefilled
        assert log.released == self.released
        totals = (log.num_verification_windows, log.num_rollbacks, log.tokens_rolled_back)
        assert totals == (self.windows, self.rollbacks, self.rolled_back)

    @invariant()
    def commits_only_grow(self) -> None:
        now = self.log.tokens
        assert now[: len(self.seen[-1])] == self.seen[-1]
        self.seen.append(now)

    @invariant()
    def replays_to_itself(self) -> None:
        replayed = CommitLog.replay(json.loads(json.dumps(self.log.as_json_records())))
        assert replayed == self.log
        assert replayed.digest == self.log.digest
        assert replayed.num_rollbacks == self.log.num_rollbacks
        assert replayed.tokens_rolled_back == self.log.tokens_rolled_back
        assert CommitLog.from_json_line(self.log.to_json_line()) == self.log


CommitLogMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCommitLogMachine = CommitLogMachine.TestCase


@settings(deadline=None)
@given(st.lists(token_ids, min_size=1, max_size=40), st.data())
def test_digest_is_the_same_for_every_cutting(tokens: list[int], data: st.DataObject) -> None:
    """Any cutting into windows, with any rollbacks and retractions between, digests alike."""
    log = CommitLog()
    log.commit_prefill(3, 0)
    while (start := log.num_committed) < len(tokens):
        window = tokens[start : start + data.draw(st.integers(1, 7))]
        matched = data.draw(st.sampled_from([len(window) - 1, len(window)]))
        log.commit_window(start, window, matched=matched, candidates=matched + data.draw(st.integers(0, 5)))
        if data.draw(st.booleans()):
            log.retract(log.num_committed)
            log.commit_prefill(3, data.draw(st.integers(0, 3)))
    assert list(log.tokens) == tokens
    assert log.digest == expected_digest(tokens)


@given(st.lists(token_ids, min_size=1), st.data())
def test_digest_changes_with_any_token(tokens: list[int], data: st.DataObject) -> None:
    other = list(tokens)
    index = data.draw(st.integers(0, len(tokens) - 1))
    other[index] ^= data.draw(st.integers(1, 2**32 - 1))
    assert one_by_one(tokens).digest != one_by_one(other).digest
    assert one_by_one(tokens).digest != one_by_one(tokens[:-1]).digest


def one_by_one(tokens: list[int]) -> CommitLog:
    log = CommitLog()
    log.commit_prefill(1, 0)
    for start, token in enumerate(tokens):
        log.commit_window(start, [token], matched=0, candidates=0)
    return log


def test_records_of_a_request() -> None:
    log = CommitLog()
    log.commit_prefill(10, 4, 100)
    log.commit_window(1, [101, 102, 200], matched=2, candidates=6)
    log.commit_window(4, [201, 202], matched=1, candidates=1)
    log.retract(6)
    log.commit_prefill(10, 14)
    log.commit_window(6, [203, 204, 205, 206], matched=3, candidates=5, kept=2)
    log.release("stop", 8)

    assert log.records == (
        PrefillCommit(prompt_tokens=10, cached_tokens=4, start=0, count=1),
        WindowCommit(start=1, count=3, matched=2, candidates=6, cut=False),
        WindowCommit(start=4, count=2, matched=1, candidates=1, cut=False),
        Retract(output_tokens=6),
        PrefillCommit(prompt_tokens=10, cached_tokens=14, start=6, count=0),
        WindowCommit(start=6, count=2, matched=2, candidates=5, cut=True),
        Release(reason="stop", output_tokens=8),
    )
    assert log.tokens == (100, 101, 102, 200, 201, 202, 203, 204)
    assert log.tokens_from(6) == [203, 204]
    assert log.tokens_from(8) == []
    # The mismatch behind the finish is no rollback; the bonus token of the second window is none either.
    assert (log.num_verification_windows, log.num_rollbacks, log.tokens_rolled_back) == (3, 1, 4)
    assert log.as_json_records()[1] == {
        "kind": "window",
        "start": 1,
        "count": 3,
        "matched": 2,
        "candidates": 6,
        "cut": False,
        "corrected": True,
        "rolled_back": 4,
        "tokens": [101, 102, 200],
    }


def fresh() -> CommitLog:
    return CommitLog()


def running() -> CommitLog:
    log = CommitLog()
    log.commit_prefill(5, 2, 9)
    log.commit_window(1, [8, 7], matched=1, candidates=3)
    return log


def cut() -> CommitLog:
    log = running()
    log.commit_window(3, [1, 2, 3], matched=2, candidates=2, kept=1)
    return log


def released() -> CommitLog:
    log = running()
    log.release("length", 3)
    return log


def retracted() -> CommitLog:
    log = running()
    log.retract(3)
    return log


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        (fresh, lambda log: log.commit_window(0, [1], matched=0, candidates=0), "needs a prefill commit"),
        (retracted, lambda log: log.commit_window(3, [1], matched=0, candidates=0), "needs a prefill"),
        (fresh, lambda log: log.commit_prefill(0, 0), "at least one token"),
        (fresh, lambda log: log.commit_prefill(-1, 0), "prompt_tokens must be"),
        (fresh, lambda log: log.commit_prefill(5, -1), "cached_tokens must be"),
        (fresh, lambda log: log.commit_prefill(5, 6), "6 of 5 tokens cached"),
        (fresh, lambda log: log.commit_prefill(5, 5, 1), "needs a computed row"),
        (fresh, lambda log: log.commit_prefill(5, 0, -1), "token id must be"),
        (running, lambda log: log.commit_prefill(5, 0), "has its prefill commit already"),
        (retracted, lambda log: log.commit_prefill(6, 0), "had 5 tokens, now 6"),
        (running, lambda log: log.commit_window(3, [], matched=0, candidates=0), "gains a token"),
        (running, lambda log: log.commit_window(2, [1], matched=0, candidates=0), "below the commit point"),
        (running, lambda log: log.commit_window(4, [1], matched=0, candidates=0), "leaves a gap"),
        (running, lambda log: log.commit_window("3", [1], matched=0, candidates=0), "start must be"),
        (running, lambda log: log.commit_window(3, [1], matched=2, candidates=2), "judges 2 or 3"),
        (running, lambda log: log.commit_window(3, [1, 2], matched=0, candidates=2), "judges 0 or 1"),
        (running, lambda log: log.commit_window(3, [1, 2], matched=2, candidates=1), "2 candidates matched"),
        (running, lambda log: log.commit_window(3, [1], matched=-1, candidates=1), "matched must be"),
        (running, lambda log: log.commit_window(3, [1], matched=0, candidates=-1), "candidates must be"),
        (running, lambda log: log.commit_window(3, [1], matched=0, candidates=0, kept=0), "kept must be"),
        (running, lambda log: log.commit_window(3, [1], matched=0, candidates=0, kept=2), "kept must be"),
        (running, lambda log: log.commit_window(3, [True], matched=0, candidates=0), "token id must be"),
        (running, lambda log: log.commit_window(3, [1.0], matched=0, candidates=0), "token id must be"),
        (running, lambda log: log.commit_window(3, [2**32], matched=0, candidates=0), "token id must be"),
        (running, lambda log: log.retract(2), "3 tokens are committed, the scheduler keeps 2"),
        (running, lambda log: log.release("stop", 4), "3 tokens are committed, the scheduler keeps 4"),
        (running, lambda log: log.release("", 3), "needs a reason"),
        (running, lambda log: log.tokens_from(4), "outside"),
        (cut, lambda log: log.commit_window(4, [1], matched=0, candidates=0), "only a release"),
        (cut, lambda log: log.retract(4), "only a release"),
        (released, lambda log: log.release("stop", 3), "nothing can follow"),
        (released, lambda log: log.retract(3), "nothing can follow"),
        (released, lambda log: log.commit_prefill(5, 0), "nothing can follow"),
        (released, lambda log: log.commit_window(3, [1], matched=0, candidates=0), "nothing can follow"),
        (running, lambda log: log.to_json_line({"digest": ""}), "belong to the commit log"),
    ],
)
def test_error_paths(make: Callable[[], CommitLog], call: Callable[[CommitLog], Any], message: str) -> None:
    log = make()
    with pytest.raises(CommitLogError, match=message):
        call(log)
    assert log == make()
    assert log.digest == make().digest


def change(index: int, **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda records: records[index].update(fields)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(0, kind="prologue"), "record 0: unknown kind"),
        (change(0, surplus=1), "record 0: a prefill record has the fields"),
        (lambda records: records[1].pop("matched"), "record 1: a window record has the fields"),
        (lambda records: records.pop(0), "record 0: .*needs a prefill commit"),
        (lambda records: records.reverse(), "record 0: 0 tokens are committed"),
        (lambda records: records.append(records[-1]), "record 3: .*nothing can follow"),
        (change(1, start=0), "record 1: .*below the commit point"),
        (change(1, tokens=[8]), "record 1: 2 tokens announced, 1 given"),
        (change(1, tokens="ab"), "record 1: tokens must be a list"),
        (change(1, tokens=[8, -7]), "record 1: a token id must be"),
        (change(1, count=0, tokens=[]), "record 1: a window commits at least one"),
        (change(1, matched=5, candidates=5), "record 1: 5 matched candidates and 2 committed"),
        (change(1, candidates=0), "record 1: 1 candidates matched of 0"),
        (change(1, corrected=False), "record 1: derived fields"),
        (change(1, rolled_back=1), "record 1: derived fields"),
        (change(1, cut=True), "record 1: a cut window ends on a matched"),
        (change(1, cut=None), "record 1: cut must be"),
        (change(0, count=2, tokens=[9, 9]), "record 0: a prefill commits at most one"),
        (change(2, output_tokens=2), "record 2: 3 tokens are committed"),
        (change(2, reason=None), "record 2: a release needs a reason"),
    ],
)
def test_replay_refuses_what_the_calls_refuse(
    spoil: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    records = released().as_json_records()
    assert CommitLog.replay(records) == released()
    spoil(records)
    with pytest.raises(CommitLogError, match=message):
        CommitLog.replay(records)


def test_json_line() -> None:
    line = released().to_json_line({"rid": "a\nb", "input_ids": [1, 2]})
    assert "\n" not in line
    assert json.loads(line)["rid"] == "a\nb"
    assert CommitLog.from_json_line(line) == released()

    for spoil, message in [
        (line[:-1], "not a JSON line"),
        ("[]", "not a commit log line"),
        (line.replace('"version":1', '"version":2'), "of version 1"),
        (line.replace(released().digest, running().digest[::-1]), "digest does not fit"),
        (json.dumps({"version": 1, "digest": "", "records": None}), "records must be a list"),
    ]:
        with pytest.raises(CommitLogError, match=message):
            CommitLog.from_json_line(spoil)


def test_a_long_request_holds_its_tokens_once() -> None:
    """100,000 tokens in windows of 9: four bytes per token, and no token ids in the records."""
    log = CommitLog()
    log.commit_prefill(1, 0)
    for start in range(0, 100_000 - 9, 9):
        log.commit_window(start, list(range(start, start + 9)), matched=8, candidates=15)
    assert len(log._tokens) * log._tokens.itemsize < 500_000
    held = {type(getattr(record, name)) for record in log.records for name in record.__dataclass_fields__}
    assert held == {int, bool}
    assert log.num_rollbacks == len(log.records) - 1


def test_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, sglang_ext.llm42.commit_log\n"
        "assert not {'torch', 'sglang', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
