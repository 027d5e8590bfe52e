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
import sys
from collections.abc import Sequence
from pathlib import Path

from stages import SCRIPTS, Stage, add_arguments, chosen, run_all


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and write the summary."""
    import torch

    present = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, [stage.name for stage in stages(2, Path(), 1)])
    parser.add_argument("--world", type=int, default=1 << (present.bit_length() - 1) if present else 0)
    parser.add_argument(
        "--layers-70b", type=int, help="layers of the 70B shape (default: 5 a GPU, what fits four times)"
    )
    options = parser.parse_args(argv)
    output = options.output.resolve()
    layers = options.layers_70b or 5 * options.world
    picked = chosen(parser, options, stages(options.world, output, layers))
    if not 2 <= options.world <= present:
        parser.error(f"--world {options.world}: 2 or more GPUs are needed, this machine has {present}")
    gpus = f"{options.world} x {torch.cuda.get_device_name(0)}"
    return run_all(picked, output, "multigpu", "Run on several GPUs", gpus)


if __name__ == "__main__":
    sys.exit(main())
