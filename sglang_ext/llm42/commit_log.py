"""The commit log: the only authority on which output tokens of a deterministic request are final.

One :class:`CommitLog` per request, an append-only sequence of records. Pure Python: it imports neither
torch nor SGLang and holds no tensors. Whatever may leave the request (streaming, stop checks,
log-probabilities, usage counts, radix insertion) follows what stands here.
"""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FORMAT_VERSION = 1
_DIGEST_TAG = b"sglang_ext.llm42.commit_log.v1\n"
# One unsigned 32-bit item; every platform that SGLang runs on has a four-byte unsigned int.
_TOKEN_TYPECODE = "I"
_MAX_TOKEN_ID = 2**32 - 1


class CommitLogError(ValueError):
    """A record that would break an invariant of the commit log; the log is left unchanged."""


@dataclass(frozen=True, slots=True)
class PrefillCommit:
    """The canonical pass has covered the prompt (and, on re-admission, the tokens committed so far).

    prompt_tokens: length of the prompt, in tokens, without any output.
    cached_tokens: how many of prompt and output came from canonical cache entries.
    start: output index of the token sampled from the last row.
    count: tokens committed: 1, or 0 when the pass sampled none.
    """

    prompt_tokens: int
    cached_tokens: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class WindowCommit:
    """One verification window: the tokens that it made final. A rollback is part of it.

    A rollback has no record of its own: it happens only where a window corrects a candidate, and its
    size follows from the window's counts, so that a second record could only repeat or contradict them.

    start: output index of the first token.
    count: tokens committed, at least one.
    matched: leading candidates, among the committed tokens, that the canonical pass agreed with.
    candidates: candidates outstanding when the window was consumed, those beyond the window included.
    cut: a finish ended the request inside the window; the judged tokens after it were discarded.
    """

    start: int
    count: int
    matched: int
    candidates: int
    cut: bool

    @property
    def corrected(self) -> bool:
        """Whether the last committed token replaced a candidate that differed."""
        return self.count > self.matched and self.matched < self.candidates

    @property
    def rolled_back(self) -> int:
        """Candidates discarded because of a mismatch: the one that differed and all after it.

        Candidates that a finish makes pointless are not counted: they lie beyond the output.
        """
        return self.candidates - self.matched if self.corrected else 0


@dataclass(frozen=True, slots=True)
class DecodeCommit:
    """Tokens that canonical decode steps decided one after the other; none of them was a candidate.

    start: output index of the first token.
    count: tokens committed, at least one.
    """

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Retract:
    """The request gave its memory back and waits for re-admission; its output tokens are kept."""

    output_tokens: int


@dataclass(frozen=True, slots=True)
class Release:
    """The request has ended; nothing follows."""

    reason: str
    output_tokens: int


Record = PrefillCommit | WindowCommit | DecodeCommit | Retract | Release

_KINDS: dict[str, type[Record]] = {
    "prefill": PrefillCommit,
    "window": WindowCommit,
    "decode": DecodeCommit,
    "retract": Retract,
    "release": Release,
}
_KIND_OF = {record_type: kind for kind, record_type in _KINDS.items()}
# What a JSON record carries beside the fields of its class.
_DERIVED_KEYS = {
    "prefill": {"kind", "tokens"},
    "window": {"kind", "tokens", "corrected", "rolled_back"},
    "decode": {"kind", "tokens"},
    "retract": {"kind"},
    "release": {"kind"},
}


class CommitLog:
    """Append-only record of what is committed for one deterministic request.

    Every method checks its arguments before it changes anything and raises :class:`CommitLogError` when
    an invariant would break: commits only grow, a window commits at least one token, a rollback never
    reaches below the commit point, one prefill per admission comes before everything else, only a release
    follows a window cut by a finish, nothing follows a release.

    Tokens are stored once (four bytes each); records hold counts.
    """

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._tokens = array(_TOKEN_TYPECODE)
        self._hash = hashlib.sha256(_DIGEST_TAG)
        self._hashed = 0
        self._prompt_tokens: int | None = None
        self._prefilled = False
        # Totals over the records: meta_info reads them with every streamed chunk, and a sum over all
        # records there would make long requests quadratic.
        self._num_windows = 0
        self._num_rollbacks = 0
        self._tokens_rolled_back = 0

    # What stands in the log

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, oldest first."""
        return tuple(self._records)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All committed output token ids. Copies; use :meth:`tokens_from` for the newest ones."""
        return tuple(self._tokens)

    def tokens_from(self, start: int) -> list[int]:
        """Committed output token ids from output index ``start`` (0 to num_committed) on."""
        if not 0 <= start <= len(self._tokens):
            raise CommitLogError(f"output index {start} is outside 0..{len(self._tokens)}")
        return self._tokens[start:].tolist()

    @property
    def digest(self) -> str:
        """SHA-256, in hex, over the committed output token ids alone (little-endian 32-bit, after a
        version tag): independent of windows, rollbacks and retractions."""
        new = self._tokens[self._hashed :]
        self._hash.update(struct.pack(f"<{len(new)}I", *new))
        self._hashed = len(self._tokens)
        return self._hash.hexdigest()

    @property
    def num_committed(self) -> int:
        """Committed output tokens."""
        return len(self._tokens)

    @property
    def num_verification_windows(self) -> int:
        """Windows consumed."""
        return self._num_windows

    @property
    def num_rollbacks(self) -> int:
        """Windows that corrected a candidate."""
        return self._num_rollbacks

    @property
    def tokens_rolled_back(self) -> int:
        """Candidates discarded by rollbacks, over all windows."""
        return self._tokens_rolled_back

    @property
    def prefilled(self) -> bool:
        """Whether the current admission has its prefill commit, so that windows may follow."""
        return self._prefilled

    @property
    def released(self) -> bool:
        """Whether the request has ended."""
        return bool(self._records) and isinstance(self._records[-1], Release)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CommitLog):
            return NotImplemented
        return self._records == other._records and self._tokens == other._tokens

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"CommitLog(committed={self.num_committed}, windows={self.num_verification_windows}, "
            f"rollbacks={self.num_rollbacks}, released={self.released})"
        )

    # Appending

    def commit_prefill(
        self, prompt_tokens: int, cached_tokens: int, token: int | None = None
    ) -> PrefillCommit:
        """Record that prompt and committed output are in canonical KV, and commit the sampled ``token``.

        Once per admission: at the start and after each retraction.
        """
        tokens = [] if token is None else [token]
        record = PrefillCommit(prompt_tokens, cached_tokens, self.num_committed, len(tokens))
        self._append(record, tokens)
        return record

    def commit_window(
        self, start: int, tokens: Sequence[int], *, matched: int, candidates: int, kept: int | None = None
    ) -> WindowCommit:
        """Commit what one verification window judged.

        One call, after the caller has finish-checked the tokens one at a time, instead of begin, append
        and end: the log has no half-open state that an abort could leave behind.

        start: output index that the window's first token takes. It must be the commit point: a window
            launched before a retraction, or consumed twice, is refused here.
        tokens: canonical token ids judged: the ``matched`` leading candidates, then the canonical token
            that corrects the next candidate or, where none is outstanding, extends the output. Exactly
            ``matched`` tokens: all that were judged agreed, further candidates stay outstanding.
        matched: leading candidates that agreed.
        candidates: candidates outstanding when the window is consumed.
        kept: number of leading tokens to commit when a finish ended the request inside the window;
            the rest is discarded and only :meth:`release` may follow. ``None``: all.

        Raises CommitLogError.
        """
        judged = len(tokens)
        _check_count("matched", matched)
        _check_count("candidates", candidates)
        if matched > candidates:
            raise CommitLogError(f"{matched} candidates matched of {candidates}")
        if judged not in (matched, matched + 1):
            raise CommitLogError(f"a window judges {matched} or {matched + 1} tokens, not {judged}")
        if kept is None:
            kept = judged
        if not _is_int(kept) or not 1 <= kept <= judged:
            raise CommitLogError(f"kept must be in 1..{judged}, got {kept!r}: a window gains a token")
        record = WindowCommit(start, kept, min(matched, kept), candidates, kept < judged)
        self._append(record, tokens[:kept])
        return record

    def commit_decoded(self, start: int, token: int) -> DecodeCommit:
        """Commit a token that a canonical decode step decided.

        Consecutive ones share a record, which grows: a record for each token would weigh more than the token.

        start: output index that the token takes; it must be the commit point.
        Raises CommitLogError.
        """
        last = self._records[-1] if self._records else None
        if not isinstance(last, DecodeCommit):
            record = DecodeCommit(start, 1)
            self._append(record, [token])
            return record
        # Once for each token of the output.
        if start != len(self._tokens):
            self._check_span(start, 1, 1)
        _check_tokens((token,))
        self._tokens.append(token)
        self._records[-1] = record = DecodeCommit(last.start, last.count + 1)
        return record

    def retract(self, output_tokens: int) -> Retract:
        """Record a retraction. ``output_tokens`` is the scheduler's count and must be all committed."""
        record = Retract(output_tokens)
        self._append(record)
        return record

    def release(self, reason: str, output_tokens: int) -> Release:
        """Record the end of the request. ``output_tokens`` is the scheduler's count and must be all
        committed; ``reason`` is the finish reason ("stop", "length", "abort", ...)."""
        record = Release(reason, output_tokens)
        self._append(record)
        return record

    # JSON

    def as_json_records(self) -> list[dict[str, Any]]:
        """The records as JSON objects; each holds the token ids that it committed."""
        return [self._as_json(record) for record in self._records]

    def to_json_line(self, extra: Mapping[str, Any] | None = None) -> str:
        """One line of the JSON-lines commit log, without a newline at the end.

        extra: further fields (request id, prompt, sampling parameters), JSON-serialisable.
        Raises CommitLogError if ``extra`` uses a key of the log itself.
        """
        line: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "digest": self.digest,
            "records": self.as_json_records(),
        }
        clash = line.keys() & (extra or {}).keys()
        if clash:
            raise CommitLogError(f"extra fields {sorted(clash)} belong to the commit log")
        return json.dumps({**(extra or {}), **line}, separators=(",", ":"))

    @classmethod
    def from_json_line(cls, line: str) -> CommitLog:
        """Rebuild a log from :meth:`to_json_line`; checks version, every record and the digest."""
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise CommitLogError(f"not a JSON line: {error}") from error
        if not isinstance(fields, dict) or fields.get("version") != FORMAT_VERSION:
            raise CommitLogError(f"not a commit log line of version {FORMAT_VERSION}")
        log = cls.replay(fields.get("records"))
        if log.digest != fields.get("digest"):
            raise CommitLogError("the digest does not fit the committed tokens")
        return log

    @classmethod
    def replay(cls, records: Any) -> CommitLog:
        """Rebuild a log from :meth:`as_json_records`, with the checks of the original calls.

        Raises CommitLogError naming the first record that does not hold.
        """
        if not isinstance(records, Iterable) or isinstance(records, (str, bytes, Mapping)):
            raise CommitLogError("records must be a list")
        log = cls()
        for index, fields in enumerate(records):
            try:
                log._append(*_parse_record(fields))
                if log._as_json(log._records[-1]) != fields:
                    raise CommitLogError("derived fields contradict the record")
            except CommitLogError as error:
                raise CommitLogError(f"record {index}: {error}") from error
        return log

    def _as_json(self, record: Record) -> dict[str, Any]:
        fields: dict[str, Any] = {"kind": _KIND_OF[type(record)], **asdict(record)}
        if isinstance(record, (PrefillCommit, WindowCommit, DecodeCommit)):
            fields["tokens"] = self._tokens[record.start : record.start + record.count].tolist()
        if isinstance(record, WindowCommit):
            fields["corrected"] = record.corrected
            fields["rolled_back"] = record.rolled_back
        return fields

    # Invariants

    def _append(self, record: Record, tokens: Sequence[int] = ()) -> None:
        """The one place where the log changes: all checks first, then all changes."""
        self._check_open(record)
        _check_tokens(tokens)
        match record:
            case PrefillCommit():
                self._check_prefill(record, len(tokens))
            case WindowCommit():
                self._check_window(record, len(tokens))
            case DecodeCommit():
                self._check_decoded(record, len(tokens))
            case Retract() | Release():
                self._check_kept(record)

        self._records.append(record)
        self._tokens.extend(tokens)
        match record:
            case PrefillCommit():
                self._prompt_tokens = record.prompt_tokens
                self._prefilled = True
            case WindowCommit():
                self._num_windows += 1
                self._num_rollbacks += record.corrected
                self._tokens_rolled_back += record.rolled_back
            case Retract() | Release():
                self._prefilled = False

    def _check_open(self, record: Record) -> None:
        if not self._records:
            return
        last = self._records[-1]
        if isinstance(last, Release):
            raise CommitLogError(f"the request was released ({last.reason}); nothing can follow")
        if isinstance(last, WindowCommit) and last.cut and not isinstance(record, Release):
            raise CommitLogError("a finish cut the last window; only a release can follow")

    def _check_prefill(self, record: PrefillCommit, given: int) -> None:
        _check_count("prompt_tokens", record.prompt_tokens)
        _check_count("cached_tokens", record.cached_tokens)
        if self._prefilled:
            raise CommitLogError("this admission has its prefill commit already")
        if record.prompt_tokens == 0:
            raise CommitLogError("a prompt has at least one token")
        if self._prompt_tokens not in (None, record.prompt_tokens):
            raise CommitLogError(f"the prompt had {self._prompt_tokens} tokens, now {record.prompt_tokens}")
        total = record.prompt_tokens + self.num_committed
        if record.cached_tokens > total - given:
            raise CommitLogError(
                f"{record.cached_tokens} of {total} tokens cached, but a sampled token needs a computed row"
            )
        self._check_span(record.start, record.count, given)
        if record.count > 1:
            raise CommitLogError(f"a prefill commits at most one token, not {record.count}")

    def _check_window(self, record: WindowCommit, given: int) -> None:
        _check_count("matched", record.matched)
        _check_count("candidates", record.candidates)
        if not isinstance(record.cut, bool):
            raise CommitLogError(f"cut must be a bool, got {record.cut!r}")
        if not self._prefilled:
            raise CommitLogError("a window needs a prefill commit of this admission first")
        self._check_span(record.start, record.count, given)
        if record.count < 1:
            raise CommitLogError("a window commits at least one token")
        if record.matched > record.candidates:
            raise CommitLogError(f"{record.matched} candidates matched of {record.candidates}")
        if record.count not in (record.matched, record.matched + 1):
            raise CommitLogError(f"{record.matched} matched candidates and {record.count} committed tokens")
        if record.cut and record.count > record.matched:
            # The token after the last match is the last one judged: with it the window is whole.
            raise CommitLogError("a cut window ends on a matched candidate")

    def _check_decoded(self, record: DecodeCommit, given: int) -> None:
        if not self._prefilled:
            raise CommitLogError("decoded tokens need a prefill commit of this admission first")
        self._check_span(record.start, record.count, given)
        if record.count < 1:
            raise CommitLogError("a decode record commits at least one token")

    def _check_span(self, start: int, count: int, given: int) -> None:
        _check_count("start", start)
        _check_count("count", count)
        if start < self.num_committed:
            raise CommitLogError(
                f"start {start} lies below the commit point {self.num_committed}: a commit is final"
            )
        if start > self.num_committed:
            raise CommitLogError(f"start {start} leaves a gap after the commit point {self.num_committed}")
        if count != given:
            raise CommitLogError(f"{count} tokens announced, {given} given")

    def _check_kept(self, record: Retract | Release) -> None:
        _check_count("output_tokens", record.output_tokens)
        if record.output_tokens != self.num_committed:
            raise CommitLogError(
                f"{self.num_committed} tokens are committed, the scheduler keeps {record.output_tokens}"
            )
        if isinstance(record, Release) and (not isinstance(record.reason, str) or not record.reason):
            raise CommitLogError(f"a release needs a reason, got {record.reason!r}")


def _is_int(value: object) -> bool:
    # bool is an int in Python, and True as a token id is always a mistake.
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(name: str, value: object) -> None:
    if not _is_int(value) or value < 0:  # type: ignore[operator]
        raise CommitLogError(f"{name} must be an int of at least 0, got {value!r}")


def _check_tokens(tokens: Sequence[int]) -> None:
    for token in tokens:
        if not _is_int(token) or not 0 <= token <= _MAX_TOKEN_ID:
            raise CommitLogError(f"a token id must be an int in 0..{_MAX_TOKEN_ID}, got {token!r}")


def _parse_record(fields: Any) -> tuple[Record, list[int]]:
    if not isinstance(fields, Mapping) or fields.get("kind") not in _KINDS:
        raise CommitLogError(f"unknown kind of record: {fields!r}")
    kind = fields["kind"]
    record_type = _KINDS[kind]
    expected = _DERIVED_KEYS[kind] | set(record_type.__dataclass_fields__)
    if fields.keys() != expected:
        raise CommitLogError(f"a {kind} record has the fields {sorted(expected)}, not {sorted(fields)}")
    tokens = fields.get("tokens", [])
    if not isinstance(tokens, list):
        raise CommitLogError(f"tokens must be a list, got {tokens!r}")
    return record_type(**{name: fields[name] for name in record_type.__dataclass_fields__}), tokens
