"""The commit log's file and the thread that writes it: rotation, kills, full disks, slow disks."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ext.llm42.observability import log_files, log_writer
from sglang_ext.llm42.observability.log_writer import ENTRY_WEIGHT, LogWriter, RotatingFile, _Access

#: Long enough for a thread on a busy machine; nothing here waits for it to pass.
PATIENCE_S = 30.0

WARNINGS = "sglang_ext.llm42.observability.log_writer"


def _contents(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in log_files.history(path)]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


# Names


def test_names_of_ranks_and_rotations(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert log_files.of_rank(path, 0, dp_size=1) == path
    assert log_files.of_rank(path, 3, dp_size=4).name == "log.dp3.jsonl"
    assert log_files.rotated(path, 2).name == "log.jsonl.2"


def test_history_is_oldest_first_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for name in ("log.jsonl", "log.jsonl.1", "log.jsonl.2", "log.jsonl.10", "log.jsonl.gz", "log.jsonl.0"):
        (tmp_path / name).touch()
    names = [file.name for file in log_files.history(path)]
    assert names == ["log.jsonl.10", "log.jsonl.2", "log.jsonl.1", "log.jsonl"]
    assert log_files.history(tmp_path / "none" / "log") == []


def test_files_of_all_ranks_are_found(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for name in ("log.dp10.jsonl", "log.dp2.jsonl", "log.dp2.jsonl.1", "log.dp3.jsonl.1", "log.dpx.jsonl"):
        (tmp_path / name).touch()
    names = [file.name for file in log_files.of_all_ranks(path)]
    assert names == ["log.dp2.jsonl.1", "log.dp2.jsonl", "log.dp3.jsonl.1", "log.dp10.jsonl"]
    path.touch()
    assert log_files.of_all_ranks(path) == [path]


# The file


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), max_size=30),
    max_bytes=st.integers(1, 120),
    keep=st.integers(1, 4),
    reopened=st.sets(st.integers(0, 29)),
)
def test_rotation_keeps_the_newest_lines_whole(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    max_bytes: int,
    keep: int,
    reopened: set[int],
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    file = RotatingFile(path, max_bytes, keep)
    lines = [b"%d:" % i + b"x" * size + b"\n" for i, size in enumerate(sizes)]
    for i, line in enumerate(lines):
        if i in reopened:
            file.close()
        file.append(line)
    file.close()

    contents = _contents(path)
    assert len(contents) <= keep + 1
    assert all(contents), "no file is rotated before it holds a line"
    for content in contents:
        assert len(content) <= max_bytes or content.count(b"\n") == 1
    kept = b"".join(contents).splitlines(keepends=True)
    assert kept == lines[len(lines) - len(kept) :]
    for older, newer in itertools.pairwise(contents):
        assert len(older) + len(newer.splitlines(keepends=True)[0]) > max_bytes, "rotated too early"
    if len(contents) <= keep:
        assert kept == lines, "nothing had to go"


@settings(deadline=None)
@given(torn=st.binary(min_size=1, max_size=20).filter(lambda piece: not piece.endswith(b"\n")))
def test_a_torn_line_stays_apart(tmp_path_factory: pytest.TempPathFactory, torn: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(b"first\n" + torn)
    file = RotatingFile(path, 1000, 1)
    file.append(b"second\n")
    file.append(b"third\n")
    assert path.read_bytes() == b"first\n" + torn + b"\nsecond\nthird\n"


def test_each_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(data) or write(fd, data))
    file = RotatingFile(tmp_path / "log", 1000, 1)
    file.append(b"one\n")
    file.append(b"two\n")
    assert written == [b"one\n", b"two\n"]


def test_a_file_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RotatingFile(path, 1000, 1)
    file.append(b"one\n")
    path.unlink()
    file.append(b"two\n")
    assert path.read_bytes() == b"two\n"


def test_prompts_are_for_the_owner_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    file = RotatingFile(path, 1, 2)
    for _ in range(3):
        file.append(b"one\n")
    assert [_mode(each) for each in log_files.history(path)] == [0o600] * 3
    assert caplog.messages == []


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660])
def test_the_operators_mode_stays_and_is_handed_on(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log"
    path.touch()
    path.chmod(mode)
    file = RotatingFile(path, 1, 5)
    for _ in range(3):
        file.append(b"one\n")
    path.unlink()  # as a log shipper may
    file.append(b"two\n")
    files = log_files.history(path)
    assert [_mode(each) for each in files] == [mode] * 3 and files[-1].read_bytes() == b"two\n"
    assert caplog.messages == []


def test_a_mode_for_everybody_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    path.touch()
    path.chmod(0o644)
    file = RotatingFile(path, 1, 5)
    for _ in range(3):
        file.append(b"one\n")
        file.close()
    assert [_mode(each) for each in log_files.history(path)] == [0o644] * 3
    (warning,) = caplog.messages
    assert str(path) in warning and "0644" in warning
    path.chmod(0o600)
    for _ in range(2):
        file.append(b"one\n")
    assert _mode(path) == 0o600 and len(caplog.messages) == 1, "as the operator changed it meanwhile"


@pytest.mark.parametrize(("allowed", "mode"), [(True, 0o640), (False, 0o600)])
def test_a_group_that_cannot_be_given_gets_no_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool, mode: int
) -> None:
    given: list[int] = []

    def fchown(fd: int, uid: int, gid: int) -> None:
        if not allowed:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        given.append(gid)

    def of(fd: int) -> _Access:
        """A new file's group is the first's plus one."""
        return _Access(stat.S_IMODE(os.fstat(fd).st_mode), 100 + (os.fstat(fd).st_ino != first))

    path = tmp_path / "log"
    path.touch()
    path.chmod(0o640)
    first = path.stat().st_ino
    monkeypatch.setattr(os, "fchown", fchown)
    monkeypatch.setattr(_Access, "of", staticmethod(of))
    file = RotatingFile(path, 1, 5)
    file.append(b"one\n")
    file.append(b"two\n")
    assert _mode(path) == mode and given == [100] * allowed


def test_a_full_device_is_an_error(tmp_path: Path) -> None:
    link = tmp_path / "log"
    link.symlink_to("/dev/full")
    file = RotatingFile(link, 1, 1)
    for _ in range(2):
        with pytest.raises(OSError) as error:
            file.append(b"line\n")
        assert error.value.errno == errno.ENOSPC
    assert link.is_symlink(), "a device is not rotated"


def test_a_device_is_not_rotated(tmp_path: Path) -> None:
    link = tmp_path / "log"
    link.symlink_to("/dev/null")
    file = RotatingFile(link, 8, 1)
    for _ in range(3):
        file.append(b"a line\n")
    assert list(tmp_path.iterdir()) == [link] and link.is_symlink()


def test_no_piece_is_left_where_a_disk_fills_up_inside_a_line(tmp_path: Path) -> None:
    """A limit on file sizes cuts a write short, as a disk does that fills up."""
    path = tmp_path / "log"
    file = RotatingFile(path, 1_000_000, 1)
    file.append(b"one\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError):
            file.append(b"a line that does not fit\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"one\n"
    file.append(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


# The thread


class _Disk:
    """A disk that can be full (appending fails) or stuck (appending waits)."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.full = False
        self.attempts = 0
        self.closed = False
        self.works = threading.Event()
        self.works.set()

    def append(self, line: bytes) -> None:
        self.attempts += 1
        assert self.works.wait(PATIENCE_S)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.lines.append(line)

    def close(self) -> None:
        self.closed = True


class _Counts:
    def __init__(self) -> None:
        self.written = 0
        self.dropped = 0

    def line_written(self) -> None:
        self.written += 1

    def line_dropped(self) -> None:
        self.dropped += 1


def _writer(disk: _Disk, counts: _Counts, *, lines: int = 1000, retry_s: float = 0.01) -> LogWriter:
    return LogWriter(
        disk,
        "--llm42-commit-log here",
        on_written=counts.line_written,
        on_dropped=counts.line_dropped,
        capacity=lines * ENTRY_WEIGHT,
        retry_s=retry_s,
    )


def test_lines_are_written_in_order_by_another_thread() -> None:
    disk, counts, threads = _Disk(), _Counts(), set()

    def render(number: int) -> str:
        threads.add(threading.current_thread())
        return str(number)

    writer = _writer(disk, counts)
    assert all(writer.offer(lambda number=number: render(number), 0) for number in range(100))
    writer.close(PATIENCE_S)
    assert disk.lines == [b"%d\n" % number for number in range(100)]
    assert counts.written == 100 and counts.dropped == 0
    assert threading.current_thread() not in threads
    assert disk.closed
    assert not writer.offer(lambda: "late", 0) and counts.dropped == 1


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.integers(0, 300), max_size=30), lines=st.integers(1, 6))
def test_a_stuck_disk_fills_the_queue_and_never_blocks(weights: list[int], lines: int) -> None:
    disk, counts = _Disk(), _Counts()
    disk.works.clear()
    writer = _writer(disk, counts, lines=lines)
    writer.offer(lambda: "first", 0)
    _wait_until(lambda: disk.attempts == 1)  # taken out of the queue, stuck in the disk

    queued, expected = 0, []
    for number, tokens in enumerate(weights):
        fits = not queued or queued + tokens + ENTRY_WEIGHT <= lines * ENTRY_WEIGHT
        assert writer.offer(lambda number=number: str(number), tokens) == fits
        if fits:
            queued += tokens + ENTRY_WEIGHT
            expected.append(b"%d\n" % number)
    assert counts.dropped == len(weights) - len(expected)

    disk.works.set()
    writer.close(PATIENCE_S)
    assert disk.lines == [b"first\n", *expected]
    assert counts.written == len(expected) + 1


def test_a_full_disk_is_one_warning_and_loses_nothing_that_fits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, WARNINGS)
    disk, counts = _Disk(), _Counts()
    disk.full = True
    writer = _writer(disk, counts, lines=5)
    writer.offer(lambda: "0", 0)
    _wait_until(lambda: disk.attempts >= 3)
    accepted = [writer.offer(lambda number=number: str(number), 0) for number in range(1, 51)]
    assert sum(accepted) == 5 and counts.dropped == 45
    assert counts.written == 0
    (warning,) = caplog.messages
    assert (
        "--llm42-commit-log here" in warning and "No space left" in warning and "Serving goes on" in warning
    )

    disk.full = False
    _wait_until(lambda: counts.written == 6)
    assert disk.lines == [b"%d\n" % number for number in range(6)]
    assert len(caplog.messages) == 2 and "again" in caplog.messages[1]
    writer.close(PATIENCE_S)


def test_a_slow_disk_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, WARNINGS)
    disk, counts = _Disk(), _Counts()
    disk.works.clear()
    writer = _writer(disk, counts, lines=2)
    for _ in range(50):
        writer.offer(lambda: "x", 0)
    assert counts.dropped >= 47
    assert len(caplog.messages) == 1 and "dropped" in caplog.messages[0]
    disk.works.set()
    writer.close(PATIENCE_S)


def test_a_disk_that_is_always_a_little_too_slow_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, WARNINGS)
    disk, counts = _Disk(), _Counts()
    turns = threading.Semaphore(0)
    disk.works.wait = lambda timeout=None: turns.acquire(timeout=timeout)  # type: ignore[method-assign]
    writer = _writer(disk, counts, lines=2)
    for number in range(10):
        for _ in range(5):
            writer.offer(lambda: "x", 0)
        turns.release()
        _wait_until(lambda number=number: disk.attempts >= number + 2)
    assert counts.dropped > 30 and len(caplog.messages) == 1
    turns.release(100)
    writer.close(PATIENCE_S)


def test_the_end_does_not_wait_for_a_full_disk() -> None:
    disk, counts = _Disk(), _Counts()
    disk.full = True
    writer = _writer(disk, counts, retry_s=3600.0)
    for _ in range(3):
        writer.offer(lambda: "x", 0)
    _wait_until(lambda: disk.attempts == 1)
    before = time.monotonic()
    writer.close(PATIENCE_S)
    assert time.monotonic() - before < PATIENCE_S
    assert counts.dropped == 3 and disk.closed


def test_a_request_that_cannot_be_rendered_costs_only_its_own_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk, counts = _Disk(), _Counts()
    writer = _writer(disk, counts)

    def impossible() -> str:
        raise TypeError("not JSON")

    writer.offer(impossible, 0)
    writer.offer(lambda: "fine", 0)
    writer.close(PATIENCE_S)
    assert disk.lines == [b"fine\n"] and (counts.written, counts.dropped) == (1, 1)
    assert "not JSON" in caplog.text


def test_the_real_full_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, WARNINGS)
    link = tmp_path / "log"
    link.symlink_to("/dev/full")
    counts = _Counts()
    file = RotatingFile(link, 100, 1)
    writer = LogWriter(
        file,
        "log",
        on_written=counts.line_written,
        on_dropped=counts.line_dropped,
        capacity=ENTRY_WEIGHT,
        retry_s=0.01,
    )
    for _ in range(20):
        writer.offer(lambda: "line", 0)
        time.sleep(0.002)
    link.unlink()  # room again
    _wait_until(lambda: counts.written >= 1)
    writer.close(PATIENCE_S)
    assert counts.written + counts.dropped == 20 and counts.dropped >= 18
    assert link.read_text() == "line\n" * counts.written
    assert sum("No space left" in message for message in caplog.messages) == 1


def test_time_is_that_of_the_epoch() -> None:
    assert abs(log_writer.now() - time.time()) < PATIENCE_S
