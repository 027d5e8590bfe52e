"""Programs that run one after the other on a machine with GPUs, each with a time limit; used by ``gpu.py``
and ``multigpu.py``."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import serving
from serving import say

SCRIPTS = Path(__file__).parent
REPOSITORY = SCRIPTS.parent

#: Nothing here may make a multicast object: a program that ends badly with one can block the GPUs of a host.
ENVIRONMENT = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0", "PYTHONUNBUFFERED": "1"}

#: Programs leave through every ``finally`` on SIGTERM and stop their servers, within so many seconds.
GRACE = 25


@dataclass(frozen=True)
class Stage:
    """A command with a time limit in seconds."""

    name: str
    command: tuple[str, ...]
    limit: float


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """The options ``--output`` and ``--stages``."""
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder for all files")
    parser.add_argument("--stages", default=",".join(names), help=f"of {', '.join(names)}")


def chosen(
    parser: argparse.ArgumentParser, options: argparse.Namespace, stages: Sequence[Stage]
) -> list[Stage]:
    """The stages that ``--stages`` names, in their own order; an unknown name ends the program."""
    wanted, names = options.stages.split(","), [stage.name for stage in stages]
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--stages: {unknown} unknown; choose from {', '.join(names)}")
    return [stage for stage in stages if stage.name in wanted]


def run_all(stages: Sequence[Stage], output: Path, summary: str, title: str, gpus: str) -> int:
    """Run ``stages``; one that fails does not stop the others.

    Args:
        stages: in order of worth.
        output: folder for the logs ``<summary>-<stage>.log`` and for ``<summary>.md``, made if missing.
        summary: how these files begin.
        title: of the summary.
        gpus: what they ran on.

    Returns:
        0 if every stage ended with 0, else 1.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, int | str, str]] = []
    for stage in stages:
        say(f"== {stage.name}: {shlex.join(stage.command)}")
        status, seconds = run(stage, output / f"{summary}-{stage.name}.log")
        rows.append((stage.name, status, f"{seconds:.0f}"))
        say(f"== {stage.name}: {status} after {seconds:.0f} s")
        parts = [
            f"# {title}",
            "",
            serving.table(("stage", "exit status", "seconds"), rows),
            "",
            serving.table(("machine", ""), {"GPUs": gpus, **serving.machine()}.items()),
            "",
        ]
        (output / f"{summary}.md").write_text("\n".join(parts))
    return 0 if all(status == 0 for _, status, _ in rows) else 1


def run(stage: Stage, log: Path) -> tuple[int | str, float]:
    """Exit status of a stage, or "time ran out", and its seconds; its output goes to ``log``."""
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            stage.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=stage.limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
            status = "time ran out"
    return status, time.monotonic() - began
