"""Deterministic requests of a program that holds the engine itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from workloads import ONE_THREAD


def test_an_engine_in_process_serves_marked_and_unmarked_requests(random_llama: Path) -> None:
    program = Path(__file__).with_name("in_process.py")
    done = subprocess.run(
        [sys.executable, str(program), str(random_llama)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **ONE_THREAD},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert len({tuple(ids) for ids, _, _ in seen["alone"]}) == len(seen["alone"])
    assert seen["together"][1::2] == seen["alone"][1::2]
    assert [digest for _, _, digest in seen["together"][::2]] == [None] * len(seen["together"][::2])
    assert seen["stream"] == seen["alone"][1]
    assert "is_deterministic" in seen["refused"]
