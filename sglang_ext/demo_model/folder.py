"""A cached folder that is written once, whole or not at all, and checked by hash whenever it is used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MANIFEST = "sglang_ext_manifest.json"

#: Seconds to wait for another process that is making the folder (it takes about half a minute).
LOCK_TIMEOUT_S = 300


class FolderError(RuntimeError):
    """The folder cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Recipe:
    """What a folder was made from; another recipe makes a folder stale.

    Attributes:
        source_sha256: SHA-256 of the source file, in hexadecimal.
        format: number of the way of writing it.
    """

    source_sha256: str
    format: int


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem_of(folder: Path, recipe: Recipe) -> str | None:
    """Why ``folder`` cannot be used as it is, or None if every file is as its manifest says."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return "it has no readable manifest"
    if manifest["recipe"] != asdict(recipe):
        return "it was made from another source or by another version"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != expected:
            return f"{name} has changed since it was written"
    return None


def build_once(
    folder: Path,
    recipe: Recipe,
    write: Callable[[Path, Callable[[str], None]], None],
    required_bytes: int,
    say: Callable[[str], None],
) -> Path:
    """Return ``folder``, after making it with ``write`` if it is absent, stale or damaged.

    Files are written to a folder beside it and renamed when complete, so no reader ever sees a part. Of
    several processes one writes and the others wait for it.

    Args:
        folder: absolute path of the folder to make.
        recipe: what it is made from, recorded in its manifest.
        write: fills the (existing, empty) folder that it is given.
        required_bytes: free space to ask for before starting.
        say: receives one line of progress at a time.

    Raises:
        FolderError: the disk is full, a path cannot be written, or ``folder`` holds something that was not
            written by this function. Errors of ``write`` pass through; nothing is left behind.
    """
    if problem_of(folder, recipe) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, say):
            problem = problem_of(folder, recipe)
            if problem is not None:
                _replace(folder, problem, recipe, write, required_bytes, say)
    except Timeout as error:
        raise FolderError(
            f"another process has held {error.lock_file} for {LOCK_TIMEOUT_S} s; end it and try again, or "
            "choose another folder."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FolderError(_disk_full(folder, required_bytes)) from error
        if isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise FolderError(f"cannot write {folder}: {error}. Choose another folder.") from error
        raise
    return folder


@contextmanager
def _lock(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file beside ``folder``; say so if that means waiting for another process.

    Raises:
        Timeout: another process held it for ``LOCK_TIMEOUT_S`` seconds. (A subclass of OSError.)
    """
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Waiting for another process that is making {folder}")
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    try:
        yield
    finally:
        lock.release()


def _replace(
    folder: Path,
    problem: str,
    recipe: Recipe,
    write: Callable[[Path, Callable[[str], None]], None],
    required_bytes: int,
    say: Callable[[str], None],
) -> None:
    """Make ``folder`` anew; the caller holds the lock."""
    _refuse_foreign(folder)
    if shutil.disk_usage(folder.parent).free < required_bytes:
        raise FolderError(_disk_full(folder, required_bytes))
    say(f"Making {folder}" + (f", because {problem}" if folder.exists() else " (once)"))
    start = time.monotonic()
    partial = folder.parent / f".{folder.name}.partial"
    _remove(partial)  # left by a process that was killed
    partial.mkdir()
    try:
        write(partial, say)
        _seal(partial, recipe)
        _remove(folder)
        partial.rename(folder)
    finally:
        _remove(partial)
    say(f"Done in {time.monotonic() - start:.0f} s")


def _refuse_foreign(folder: Path) -> None:
    """Raise if ``folder`` is somebody else's, which must not be deleted."""
    if not folder.exists() or _read_manifest(folder) is not None:
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise FolderError(
            f"{folder} exists and was not written by sglang_ext (no {MANIFEST}). Choose another folder or "
            "remove it."
        )


def _seal(folder: Path, recipe: Recipe) -> None:
    """Write the manifest: the recipe and every file's hash."""
    mode = _default_file_mode(folder)
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(mode)  # safetensors come out readable by their owner only
        files[path.name] = sha256_of(path)
    manifest = {"recipe": asdict(recipe), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _default_file_mode(folder: Path) -> int:
    """Mode of a file made under the process's umask (reading the umask itself would mean setting it)."""
    probe = folder / MANIFEST
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None if there is none or it is not one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if (
        not isinstance(manifest, dict)
        or not isinstance(manifest.get("files"), dict)
        or "recipe" not in manifest
    ):
        return None
    return manifest


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _disk_full(folder: Path, required_bytes: int) -> str:
    free = shutil.disk_usage(os.fspath(folder.parent)).free
    return (
        f"no space for {folder}: it needs {required_bytes / 1e6:.0f} MB and {free / 1e6:.0f} MB are free. "
        "Free some space or choose another folder."
    )
