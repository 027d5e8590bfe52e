"""What is sent again for a logged request, and whether the answer is the same. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_ext.llm42.observability.log_reader import Entry

#: Tokens shown before the first difference, and from it on.
CONTEXT_TOKENS = 12
SHOWN_TOKENS = 6

#: Fields of a line, beside prompt and sampling parameters, that are sent as they are.
_FURTHER = ("custom_logit_processor", "require_reasoning")

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Answer:
    """What a server returned for a request.

    Attributes:
        token_ids: output token ids.
        finish_reason: as in ``meta_info``.
        digest: ``llm42_digest`` of ``meta_info``, None where there is none.
    """

    token_ids: tuple[int, ...]
    finish_reason: Mapping[str, Any] | None
    digest: str | None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Answer:
        """From the answer of ``POST /generate``.

        Raises:
            KeyError, TypeError: it has another form.
        """
        meta = body["meta_info"]
        return cls(tuple(body["output_ids"]), meta["finish_reason"], meta.get("llm42_digest"))


@dataclass(frozen=True)
class Difference:
    """How an answer differs from what is logged.

    Attributes:
        logged: output token ids in the log.
        token_ids: those of the answer.
        finish_reasons: logged and new one where they differ, else None.
        digests_differ: whether the digests of the committed tokens differ.
    """

    logged: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reasons: tuple[Mapping[str, Any], Mapping[str, Any] | None] | None
    digests_differ: bool

    @property
    def first_token(self) -> int | None:
        """Output index of the first differing token, which may lie just past one of the two outputs; None if
        all are equal."""
        if self.logged == self.token_ids:
            return None
        pairs = enumerate(zip(self.logged, self.token_ids, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.logged), len(self.token_ids)))


def was_cut(entry: Entry) -> bool:
    """Whether the request was aborted: where, no configuration determines."""
    return entry.fields["finish_reason"].get("type") == "abort"


def body_of(entry: Entry) -> dict[str, Any] | None:
    """The body of ``POST /generate`` that runs a logged request again; None where nothing was put out.

    An aborted request is asked for as many tokens as it had.
    """
    count = entry.log.num_committed
    if count == 0:
        return None
    params = {**entry.fields["sampling_params"], "is_deterministic": True}
    if was_cut(entry):
        params["max_new_tokens"] = count
        params["min_new_tokens"] = min(params.get("min_new_tokens") or 0, count)
    further = {name: entry.fields[name] for name in _FURTHER if name in entry.fields}
    return {"input_ids": entry.fields["input_ids"], "sampling_params": params, **further}


def compare(entry: Entry, answer: Answer) -> Difference | None:
    """How ``answer`` differs from what is logged; None if it is the same."""
    logged_finish = entry.fields["finish_reason"]
    finish_differs = not was_cut(entry) and answer.finish_reason != logged_finish
    difference = Difference(
        entry.log.tokens,
        answer.token_ids,
        (logged_finish, answer.finish_reason) if finish_differs else None,
        answer.digest != entry.log.digest,
    )
    same = difference.first_token is None and not finish_differs and not difference.digests_differ
    return None if same else difference


def describe(difference: Difference, decode: Decode | None = None) -> list[str]:
    """Lines that explain a difference; with ``decode`` the tokens are also shown as text."""
    lines = []
    first = difference.first_token
    if first is not None:
        context = difference.logged[max(0, first - CONTEXT_TOKENS) : first]
        logged = difference.logged[first : first + SHOWN_TOKENS]
        got = difference.token_ids[first : first + SHOWN_TOKENS]
        lines.append(
            f"first differing token: output index {first} "
            f"({len(difference.logged)} tokens logged, {len(difference.token_ids)} now)"
        )
        lines += [
            f"  {label:<7} {_shown(tokens, decode)}"
            for label, tokens in (("after", context), ("logged", logged), ("now", got))
        ]
    elif difference.digests_differ:
        lines.append("output tokens are equal, the digest of the committed tokens is not")
    if difference.finish_reasons is not None:
        logged_finish, finish = difference.finish_reasons
        lines.append(f"finish reason: logged {dict(logged_finish)}, now {finish and dict(finish)}")
    return lines


def _shown(tokens: Sequence[int], decode: Decode | None) -> str:
    if not tokens:
        return "(nothing)"
    ids = " ".join(map(str, tokens))
    return ids if decode is None else f"{ids}  {decode(tokens)!r}"
