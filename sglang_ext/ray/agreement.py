"""Whether the ranks of a server are alike: same versions, flags, model, canonical shape and fingerprint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ABSENT = "absent"

#: Differences that a message lists.
MAX_LISTED = 8


class Disagreement(RuntimeError):
    """Ranks or replicas of a server differ in what its output depends on."""


def differences(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is not the same in all ``reports``.

    Args:
        reports: by rank (or replica) and its node; nested mappings are compared entry by entry.

    Returns:
        For each entry that differs its dotted name and who has which value:
        ``"packages.torch: '2.11.0' on tp0 (10.0.0.1), '2.10.0' on tp1 (10.0.0.2)"``.
    """
    flat = {who: dict(_flattened(report)) for who, report in reports.items()}
    names = {name: None for entries in flat.values() for name in entries}
    found = []
    for name in names:
        by_value: dict[str, list[str]] = {}
        for who, entries in flat.items():
            by_value.setdefault(repr(entries[name]) if name in entries else ABSENT, []).append(who)
        if len(by_value) > 1:
            sides = ", ".join(f"{value} on {' and '.join(who)}" for value, who in by_value.items())
            found.append(f"{name}: {sides}")
    return found


def require(reports: Mapping[str, Mapping[str, Any]], what: str) -> None:
    """Check that ``reports`` are all the same.

    Raises:
        Disagreement: naming what differs; ``what`` says of whom ("ranks", "replicas").
    """
    found = differences(reports)
    if not found:
        return
    listed = "; ".join(found[:MAX_LISTED])
    more = f"; and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    raise Disagreement(f"the {what} of this server do not agree, so it does not start: {listed}{more}")


def _flattened(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in report.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
