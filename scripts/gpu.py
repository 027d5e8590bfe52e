"""Everything that needs one GPU, in one call: tests and benchmarks of LLM-42; the most valuable stages first.

    python scripts/gpu.py --output docs/benchmarks

Stages (``--stages`` chooses, each with a time limit; a stage that fails does not stop the others):

    tests           ``pytest -m gpu``: determinism under load, graphs, streams, memory, kernels
    headline        ``bench_llm42.py``: stock and 100, 50, 10 % marked, two shapes, twice
    deterministic   stock and SGLang's deterministic mode, the same shapes
    profile         ``profile_llm42.py``: where the time of a step goes
    online          latency at 8 and 16 requests a second
    bounds          ``bench_llm42_bounds.py``: cost of a pass, and how much of it decode can hide
    shares          2, 5, 20 % marked
    long            1K in and 1K out, 4K in and 1K out
    doctor          row invariance of every operator at the 8B shape

The model is a Llama-3.1-8B with random weights; two servers at a time fit into 80 GB. What stages print goes
to ``<output>/gpu-<stage>.log``; a summary with times and exit statuses to ``<output>/gpu.md``. Benchmarks
whose state files exist go on where they stopped.

Exit status: 0 if every stage ended with 0, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench_llm42 import LLAMA_8B
from stages import SCRIPTS, Stage, add_arguments, chosen, run_all


def stages(output: Path, model: Path) -> tuple[Stage, ...]:
    """All stages, in order of worth.

    Args:
        output: folder for reports and state files.
        model: folder with the 8B shape's configuration, for the doctor.
    """
    python = sys.executable
    tests = (python, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "tests")

    def bench(name: str, contenders: str, shapes: str, seconds: int, *more: str) -> Stage:
        command = (
            *(python, str(SCRIPTS / "bench_llm42.py"), "--contenders", contenders, "--shapes", shapes),
            *("--seconds", str(seconds), "--state", str(output / f"llm42-{name}.jsonl")),
            *("--output", str(output / f"llm42-{name}"), *more),
        )
        return Stage(name, command, seconds + 60)  # a cell that has begun is measured to its end

    profile = (
        *(python, str(SCRIPTS / "profile_llm42.py"), "--contenders", "stock,ours-10,ours-50,ours-100"),
        *("--output", str(output / "llm42-profile.md")),
    )
    doctor = (
        *(python, "-m", "sglang_ext.doctor", "--model", str(model), "--load-format", "dummy"),
        *("--skip-tokenizer-init", "--attention-backend", "flashinfer"),
        *("--json", str(output / "llm42-doctor.json")),
    )
    bounds = (python, str(SCRIPTS / "bench_llm42_bounds.py"), "--output", str(output / "llm42-bounds.csv"))
    both = "sharegpt-like,1k-256"
    return (
        Stage("tests", tests, 600),
        bench("headline", "stock,ours-100,ours-50,ours-10", both, 660),
        bench("deterministic", "stock,sglang-deterministic", both, 420, "--rounds", "1"),
        Stage("profile", profile, 300),
        bench("online", "stock,ours-100", "sharegpt-like", 360, "--rounds", "1", "--rates", "8,16"),
        Stage("bounds", bounds, 400),
        bench("shares", "stock,ours-2,ours-5,ours-20", "sharegpt-like", 300, "--rounds", "1"),
        bench("long", "stock,ours-100,ours-50,ours-10", "1k-1k,4k-1k", 480, "--rounds", "1"),
        Stage("doctor", doctor, 300),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and write the summary."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, [stage.name for stage in stages(Path(), Path())])
    options = parser.parse_args(argv)
    output = options.output.resolve()
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(LLAMA_8B))
        picked = chosen(parser, options, stages(output, Path(model)))
        if not torch.cuda.is_available():
            parser.error("a CUDA GPU is needed, this machine has none")
        return run_all(picked, output, "gpu", "Run on one GPU", torch.cuda.get_device_name(0))


if __name__ == "__main__":
    sys.exit(main())
