"""The mark of a deterministic request, as clients write it and as the scheduler reads it.

Clients set ``is_deterministic`` (a bool) in the sampling parameters. SGLang's ``SamplingParams`` has no such
field, so the mark travels as ``custom_params["llm42"] = True``, which clients may also write themselves.
No SGLang in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_ext.llm42.config import REQUEST_KEY

#: What clients call the mark.
MARK_FIELD = "is_deterministic"


def checked_mark(value: Any, field: str = MARK_FIELD) -> bool | None:
    """``value`` if it is a bool or None (says nothing).

    Raises:
        ValueError: it is anything else; the message names ``field``.
    """
    if value is None or isinstance(value, bool):
        return value
    raise ValueError(f"{field} must be true or false, not {value!r}.")


def mark_of(params: Mapping[str, Any]) -> bool | None:
    """What sampling parameters say about the mark; None if they say nothing.

    Raises:
        ValueError: the mark is not a bool.
    """
    mark = checked_mark(params.get(MARK_FIELD))
    if mark is not None:
        return mark
    return mark_in(params.get("custom_params"))


def mark_in(custom_params: Any) -> bool | None:
    """What ``custom_params`` as a client wrote them say about the mark; None if they say nothing.

    Raises:
        ValueError: the mark is not a bool.
    """
    if not isinstance(custom_params, Mapping):
        return None
    return checked_mark(custom_params.get(REQUEST_KEY), f"custom_params.{REQUEST_KEY}")


def with_mark(params: Mapping[str, Any], mark: bool) -> dict[str, Any]:
    """A copy of ``params`` in the form that the scheduler reads."""
    marked = {name: value for name, value in params.items() if name != MARK_FIELD}
    given = params.get("custom_params")
    if not mark and given and not isinstance(given, Mapping):
        return marked  # no form of ours: SGLang's to judge
    custom = {name: value for name, value in (given or {}).items() if name != REQUEST_KEY}
    if mark:
        custom[REQUEST_KEY] = True
    marked["custom_params"] = custom or None
    return marked


def is_marked(custom_params: Any) -> bool:
    """Whether a request with these ``custom_params`` is deterministic, once :func:`with_mark` was applied.

    Unmarked requests may hold anything there, which SGLang takes.
    """
    return isinstance(custom_params, Mapping) and custom_params.get(REQUEST_KEY) is True
