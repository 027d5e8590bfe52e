"""Names of the commit log's files: one per data-parallel rank, and those rotated from it. Pure Python."""

from __future__ import annotations

import re
from pathlib import Path


def of_rank(path: Path, dp_rank: int, dp_size: int) -> Path:
    """The file that a data-parallel rank writes: ``path`` itself, or ``log.dp1.jsonl`` for ``log.jsonl``."""
    return path if dp_size == 1 else _ranked(path, dp_rank)


def _ranked(path: Path, dp_rank: int) -> Path:
    return path.with_name(f"{path.stem}.dp{dp_rank}{path.suffix}")


def rotated(path: Path, number: int) -> Path:
    """The file that was rotated ``number`` rotations ago, 1 being the newest: ``log.jsonl.1``."""
    return path.with_name(f"{path.name}.{number}")


def history(path: Path) -> list[Path]:
    """The files that belong to one log, oldest first: those rotated from ``path``, then ``path`` itself."""
    if not path.parent.is_dir():
        return []
    suffix = re.compile(re.escape(path.name) + r"\.([1-9][0-9]*)")
    numbers = [int(m[1]) for file in path.parent.iterdir() if (m := suffix.fullmatch(file.name))]
    files = [rotated(path, number) for number in sorted(numbers, reverse=True)]
    return files + [path] * path.exists()


def of_all_ranks(path: Path) -> list[Path]:
    """All files of ``path``, oldest first; where there are none, those of each data-parallel rank in turn."""
    if files := history(path):
        return files
    if not path.parent.is_dir():
        return []
    name = re.compile(re.escape(path.stem) + r"\.dp([0-9]+)" + re.escape(path.suffix) + r"(\.[1-9][0-9]*)?")
    ranks = {int(m[1]) for file in path.parent.iterdir() if (m := name.fullmatch(file.name))}
    return [file for rank in sorted(ranks) for file in history(_ranked(path, rank))]
