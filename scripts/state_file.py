"""Results of a long run in a file of JSON lines that only grows, so that an interrupted run can go on.

The first line says what must not change between runs; each other line is one result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class StateError(ValueError):
    """The state file is of another configuration, or damaged."""


def read(path: Path, configuration: dict[str, Any]) -> list[dict[str, Any]]:
    """Results in ``path``, which is begun if there is no such file.

    A last line that was cut off while it was written is dropped.

    Raises:
        StateError: the file is of another configuration, or a line in it cannot be read.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(configuration) + "\n")
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    try:
        found, *results = map(json.loads, complete.splitlines())
    except ValueError as error:
        raise StateError(f"{path} cannot be read: {error}; remove it, or use --state") from error
    if found != configuration:
        changed = sorted(k for k in {*found, *configuration} if found.get(k) != configuration.get(k))
        raise StateError(
            f"{path} is of another configuration ({', '.join(changed)}); remove it, or use --state"
        )
    if complete != text:
        path.write_text(complete)
    return results


def append(path: Path, result: dict[str, Any]) -> None:
    """Add one result."""
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")
