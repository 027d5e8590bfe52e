"""Reading the commit log, however it was cut: rotated, torn by a kill, still being written. Pure Python."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_ext.llm42.commit_log import CommitLog, CommitLogError


@dataclass(frozen=True)
class Entry:
    """One finished request.

    Attributes:
        where: file and line number.
        fields: the line's JSON object.
        log: what was committed, checked against the line's digest.
    """

    where: str
    fields: Mapping[str, Any]
    log: CommitLog


@dataclass(frozen=True)
class Torn:
    """A line that is no JSON object: its writer was killed, or still is at it."""

    where: str


@dataclass(frozen=True)
class Altered:
    """A whole line whose contents do not fit together: its writer did not write it like this.

    Attributes:
        where: file and line number.
        reason: what does not fit.
    """

    where: str
    reason: str


def read(path: Path) -> Iterator[Entry | Torn | Altered]:
    """The lines of one file, in order.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield parse(line, f"{path.name}:{number}")


def count(path: Path) -> int:
    """Number of lines of a file, an unfinished one included.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return sum(1 for _ in file)


def parse(line: bytes, where: str) -> Entry | Torn | Altered:
    """One line."""
    try:
        text = line.decode()
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return Torn(where)
    if not isinstance(fields, dict):
        return Torn(where)
    try:
        log = CommitLog.from_json_line(text)
        _check(fields)
    except CommitLogError as error:
        return Altered(where, str(error))
    return Entry(where, fields, log)


def _check(fields: Mapping[str, Any]) -> None:
    ids = fields.get("input_ids")
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise CommitLogError("input_ids must be a list of token ids")
    for name in ("sampling_params", "finish_reason"):
        if not isinstance(fields.get(name), dict):
            raise CommitLogError(f"{name} must be an object")
