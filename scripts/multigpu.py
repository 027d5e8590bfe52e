"""Everything that needs several GPUs, in one call: build, tests, benchmarks; the most valuable stages first.

    TORCH_SYMM_MEM_DISABLE_MULTICAST=1 python scripts/multigpu.py --output docs/benchmarks

Stages (``--stages`` chooses, each with a time limit; a stage that fails does not stop the others):

    build       the TokenWeave kernel
    kernel      tests of the kernel between the GPUs (``pytest -m multigpu tests/tokenweave``)
    allreduce   ``bench_tokenweave_multigpu.py``: row invariance of all-reduces, times of the fused kernel
    engine      ``pytest -m multigpu tests/gpu``: determinism with TP under load, TokenWeave against stock
    serving-70b, serving-8b    ``bench_tokenweave_serving.py``
    llm42       ``bench_llm42.py`` with TP: stock and 0, 10, 50, 100 % marked

What stages print goes to ``<output>/multigpu-<stage>.log``; a summary with times and exit statuses to
``<output>/multigpu.md``. Stages whose files exist go on where they stopped (see the programs).

NVLink multicast is left off. Exit status: 0 if every stage ended with 0, else 1.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
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


@dataclass(frozen=True)
class Stage:
    """A command with a time limit in seconds."""

    name: str
    command: tuple[str, ...]
    limit: float


def stages(world: int, output: Path, layers_70b: int) -> tuple[Stage, ...]:
    """All stages on ``world`` GPUs, in order of worth."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-v", "-m", "multigpu", "-p", "no:cacheprovider")
    torchrun = (python, "-m", "torch.distributed.run", "--nproc-per-node", str(world))

    def serve(model: str, layers: int) -> tuple[str, ...]:
        return (
            *(python, str(SCRIPTS / "bench_tokenweave_serving.py"), "--tp-size", str(world)),
            *("--model", model, "--layers", str(layers), "--seconds", "240"),
            *("--state", str(output / f"tokenweave-{model}-tp{world}.jsonl")),
            *("--output", str(output / f"tokenweave-{model}-tp{world}")),
        )

    llm42 = (
        *(python, str(SCRIPTS / "bench_llm42.py"), "--rounds", "1", "--shapes", "sharegpt-like"),
        *("--contenders", "stock,ours-100,ours-50,ours-10,ours-0", "--seconds", "240"),
        *(
            "--server-flags",
            f"--tp-size {world} --max-total-tokens 120000 --max-running-requests 256",
        ),
        *("--state", str(output / f"llm42-tp{world}.jsonl"), "--output", str(output / f"llm42-tp{world}")),
    )
    load = "from sglang_ext.tokenweave import build; build.load()"
    return (
        Stage("build", (python, "-c", load), 300),
        Stage("kernel", (*pytest, "tests/tokenweave"), 180),
        Stage(
            "allreduce",
            (*torchrun, str(SCRIPTS / "bench_tokenweave_multigpu.py"), "--output", str(output)),
            240,
        ),
        Stage("engine", (*pytest, "tests/gpu"), 400),
        Stage("serving-70b", serve("llama-70b", layers_70b), 500),
        Stage("serving-8b", serve("llama-8b", 32), 500),
        Stage("llm42", llm42, 500),
    )


def run(stage: Stage, output: Path) -> tuple[int | str, float]:
    """Exit status of a stage, or "time ran out", and its seconds; its output goes to its log."""
    began = time.monotonic()
    with (output / f"multigpu-{stage.name}.log").open("wb") as log:
        process = subprocess.Popen(
            stage.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=stage.limit)
        except subprocess.TimeoutExpired:
            # The programs leave through every ``finally`` on SIGTERM and stop their servers.
            process.terminate()
            try:
                process.wait(timeout=25)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
            status = "time ran out"
    return status, time.monotonic() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and write the summary."""
    import torch

    present = torch.cuda.device_count()
    names = [stage.name for stage in stages(2, Path(), 1)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--world", type=int, default=1 << (present.bit_length() - 1) if present else 0)
    parser.add_argument("--stages", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument(
        "--layers-70b", type=int, help="layers of the 70B shape (default: 5 a GPU, what fits four times)"
    )
    options = parser.parse_args(argv)
    chosen = options.stages.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"--stages: {sorted(unknown)} unknown; choose from {', '.join(names)}")
    if not 2 <= options.world <= present:
        parser.error(f"--world {options.world}: 2 or more GPUs are needed, this machine has {present}")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for stage in stages(options.world, output, options.layers_70b or 5 * options.world):
        if stage.name not in chosen:
            continue
        say(f"== {stage.name}: {shlex.join(stage.command)}")
        status, seconds = run(stage, output)
        rows.append((stage.name, status, f"{seconds:.0f}"))
        say(f"== {stage.name}: {status} after {seconds:.0f} s")
        _summarise(rows, output, options.world)
    return 0 if all(status == 0 for _, status, _ in rows) else 1


def _summarise(rows: Sequence[tuple[str, int | str, str]], output: Path, world: int) -> None:
    import torch

    machine = {"GPUs": f"{world} x {torch.cuda.get_device_name(0)}", **serving.machine()}
    (output / "multigpu.md").write_text(
        "\n".join(
            [
                "# Run on several GPUs",
                "",
                serving.table(("stage", "exit status", "seconds"), rows),
                "",
                serving.table(("machine", ""), machine.items()),
                "",
            ]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
