"""Run the fused kernel under compute-sanitizer (memcheck, racecheck, synccheck) on one GPU.

    python tests/tokenweave/sanitize.py

Exits with 1 if a tool reports an error, with 2 if nvcc or compute-sanitizer is missing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sglang_ext.tokenweave import build

TOOLS = ("memcheck", "racecheck", "synccheck")


def main() -> int:
    """Compile the workload for the GPU present and run it under each tool."""
    home = build.cuda_home()
    sanitizer = shutil.which("compute-sanitizer") or (home and shutil.which(home / "bin/compute-sanitizer"))
    if home is None or not sanitizer:
        print("nvcc and compute-sanitizer are needed", file=sys.stderr)
        return 2
    sources = build.source_folder()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "sanitize"
        command = [home / "bin/nvcc", *build.NVCC_FLAGS, "-lineinfo", "-arch=native", f"-I{sources}"]
        command += ["-o", program, Path(__file__).with_suffix(".cu"), sources / "allreduce_rmsnorm.cu"]
        subprocess.run(command, check=True)
        failed = [tool for tool in TOOLS if not _passes(str(sanitizer), tool, program)]
    print(f"failed: {', '.join(failed)}" if failed else f"clean under {', '.join(TOOLS)}")
    return int(bool(failed))


def _passes(sanitizer: str, tool: str, program: Path) -> bool:
    print(f"== {tool}", flush=True)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", str(program)]
    return subprocess.run(command, check=False, timeout=300).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
