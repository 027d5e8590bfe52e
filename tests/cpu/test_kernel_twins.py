"""Runs ``kernel_twins.py`` in a process of its own.

Triton decides when a module is imported whether its interpreter runs the kernels in it, and other tests have
imported Triton and SGLang without it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_twins_equal_the_kernels() -> None:
    file = Path(__file__).with_name("kernel_twins.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=file.parents[2])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
