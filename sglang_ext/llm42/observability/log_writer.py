"""Writing the commit log: whole lines into a rotated file, from a thread of its own. Pure Python.

The scheduler must neither wait for a disk nor end because of one. It offers finished requests to a bounded
queue; a thread turns them into lines and writes them. Where the disk refuses, the thread keeps the line and
tries again later; meanwhile the queue fills, and what does not fit is dropped and counted.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sglang_ext.llm42.observability import log_files

logger = logging.getLogger(__name__)

#: Room in the queue, in tokens of prompt and output.
QUEUE_TOKENS = 4_000_000

#: What an entry weighs beside its tokens, so that many short ones are bounded as well.
ENTRY_WEIGHT = 100

#: Seconds until a file that could not be written is tried again.
RETRY_S = 10.0


class LineFile(Protocol):
    """Where lines go."""

    def append(self, line: bytes) -> None:
        """Write ``line``, which ends with a newline, as a whole.

        Raises:
            OSError: it is not written.
        """

    def close(self) -> None:
        """Give the file back."""


@dataclass(frozen=True)
class _Access:
    """Who may open a file.

    Attributes:
        mode: its permission bits.
        group: id of its group, None for that of new files.
    """

    mode: int
    group: int | None

    @classmethod
    def of(cls, fd: int) -> _Access:
        """That of an open file."""
        status = os.fstat(fd)
        return cls(stat.S_IMODE(status.st_mode), status.st_gid)

    def give(self, fd: int, path: Path) -> None:
        """Give it to a new file, which its owner alone may open.

        Where the group cannot be given, what it may do is not either.
        """
        mode, new = self.mode, self.of(fd)
        if self.group is not None and self.group != new.group:
            try:
                os.fchown(fd, -1, self.group)
            except OSError as error:
                mode &= ~stat.S_IRWXG
                logger.warning("--llm42-commit-log %s: not for the group of the last file (%s).", path, error)
        if mode != new.mode:
            os.fchmod(fd, mode)


class RotatingFile:
    """A file of lines that is renamed to ``NAME.1``, ``NAME.2``, ... when it is full.

    A line is written by a single ``write`` at the end of the file, so a killed process leaves at most a torn
    last line; the next one then starts on a line of its own. Devices and pipes are written, but neither
    rotated nor repaired.

    The first file is created readable to its owner only, since it holds prompts. Mode and group of one that
    exists are the operator's choice (a log shipper's group, say): they stay, and each file made in its place
    gets them, too. That everybody may read or write it is said once.

    Args:
        path: the file; made if absent, continued if not.
        max_bytes: size that a file does not exceed, unless a single line does.
        keep: rotated files to keep.
    """

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._fd: int | None = None
        self._size = 0
        self._regular = True
        self._torn = False
        self._access = _Access(stat.S_IRUSR | stat.S_IWUSR, None)

    def append(self, line: bytes) -> None:
        """Write ``line``, which ends with a newline, as a whole.

        Raises:
            OSError: it is not written.
        """
        if self._fd is not None and not self._is_current():
            self.close()
        if self._fd is None:
            self._open()
        if self._regular and self._size and self._size + len(line) > self._max_bytes:
            self._rotate()
        self._write(b"\n" + line if self._torn else line)

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._fd is not None:
            self._note_access()
            os.close(self._fd)
            self._fd = None

    def _is_current(self) -> bool:
        """Whether the name still stands for the open file: it may have been removed to make room."""
        assert self._fd is not None
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        new = not self.path.exists()
        self._fd = os.open(self.path, flags, stat.S_IRUSR | stat.S_IWUSR)
        status = os.fstat(self._fd)
        self._regular = stat.S_ISREG(status.st_mode)
        self._size = status.st_size
        self._torn = bool(self._regular and self._size) and os.pread(self._fd, 1, self._size - 1) != b"\n"
        if new:
            self._access.give(self._fd, self.path)
        self._note_access()

    def _note_access(self) -> None:
        """Remember who may read the open file, for the one that follows it; the operator may change it."""
        assert self._fd is not None
        if not self._regular:
            return
        access = _Access.of(self._fd)
        if access.mode & stat.S_IRWXO and access != self._access:
            logger.warning(
                "--llm42-commit-log %s: its mode, %04o, is open to every user of this machine, and it holds "
                "prompts and outputs. It stays so, and files that follow get it, too, until you change it.",
                self.path,
                access.mode,
            )
        self._access = access

    def _rotate(self) -> None:
        self.close()
        for number in range(self._keep - 1, 0, -1):
            if (file := log_files.rotated(self.path, number)).exists():
                os.replace(file, log_files.rotated(self.path, number + 1))
        os.replace(self.path, log_files.rotated(self.path, 1))
        self._open()

    def _write(self, data: bytes) -> None:
        assert self._fd is not None
        try:
            if os.write(self._fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            # Where the piece cannot be taken back, opening the file again will find it.
            with suppress(OSError):
                if self._regular:
                    os.ftruncate(self._fd, self._size)
            self.close()
            raise
        self._size += len(data)
        self._torn = False


class LogWriter:
    """A bounded queue of entries and the thread that writes them; it never blocks who offers one.

    Args:
        file: where the lines go.
        name: what the log is called in messages.
        on_written: called, in the writer's thread, after a line was written.
        on_dropped: called, in either thread, for each entry that will not be written.
        capacity: weight that the queue may hold; a single heavier entry fits into an empty queue.
        retry_s: seconds until a file that could not be written is tried again.
    """

    def __init__(
        self,
        file: LineFile,
        name: str,
        *,
        on_written: Callable[[], None] = lambda: None,
        on_dropped: Callable[[], None] = lambda: None,
        capacity: int = QUEUE_TOKENS,
        retry_s: float = RETRY_S,
    ) -> None:
        self._file = file
        self._name = name
        self._on_written = on_written
        self._on_dropped = on_dropped
        self._capacity = capacity
        self._retry_s = retry_s
        self._queue: deque[tuple[Callable[[], str], int]] = deque()
        self._weight = 0
        self._closing = False
        self._changed = threading.Condition()
        self._failing = False
        self._full = False
        self._thread = threading.Thread(target=self._run, name="llm42-commit-log", daemon=True)
        self._thread.start()

    def offer(self, render: Callable[[], str], tokens: int) -> bool:
        """Put an entry into the queue.

        Args:
            render: makes the line, without a newline; called in the writer's thread.
            tokens: how many token ids the line holds.

        Returns:
            Whether there was room; if not, the entry is dropped.
        """
        weight = tokens + ENTRY_WEIGHT
        with self._changed:
            accepted = not self._closing and (not self._queue or self._weight + weight <= self._capacity)
            warn = not accepted and not self._full and not self._failing
            self._full |= not accepted
            if accepted:
                self._queue.append((render, weight))
                self._weight += weight
                self._changed.notify()
        if accepted:
            return True
        self._on_dropped()
        if warn:
            logger.warning(
                "%s: requests finish faster than their lines can be written; lines are dropped and counted.",
                self._name,
            )
        return False

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, trying a failing file once more, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    # The writer's thread

    def _run(self) -> None:
        while (render := self._next()) is not None:
            line = self._rendered(render)
            if line is None or not self._written(line):
                self._on_dropped()
            else:
                self._on_written()
        self._file.close()

    def _next(self) -> Callable[[], str] | None:
        """The oldest entry, as soon as there is one; None at the end."""
        with self._changed:
            if not self._queue:
                self._full = False
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            render, weight = self._queue.popleft()
            self._weight -= weight
            return render

    def _rendered(self, render: Callable[[], str]) -> bytes | None:
        try:
            return render().encode() + b"\n"
        except Exception:
            # A field that JSON cannot express: this line is lost, the next ones need not be.
            logger.exception("%s: a finished request cannot be written as a line.", self._name)
            return None

    def _written(self, line: bytes) -> bool:
        """Write ``line``, however long that takes; false if the end came first."""
        while not self._tried(line):
            with self._changed:
                if self._closing:
                    return False
                self._changed.wait_for(lambda: self._closing, self._retry_s)
        return True

    def _tried(self, line: bytes) -> bool:
        try:
            self._file.append(line)
        except OSError as error:
            self._report_failure(error)
            return False
        if self._failing:
            self._failing = False
            logger.warning("%s: written again.", self._name)
        return True

    def _report_failure(self, error: OSError) -> None:
        if self._failing:
            return
        self._failing = True
        logger.warning(
            "%s: cannot be written (%s). Serving goes on; writing is tried again every %g s, and lines that "
            "do not fit into memory until then are dropped and counted.",
            self._name,
            error,
            self._retry_s,
        )


def now() -> float:
    """Seconds since the epoch, as lines carry them."""
    return round(time.time(), 3)
