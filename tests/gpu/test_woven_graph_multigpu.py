"""Canonical passes in two halves, captured in a CUDA graph on two GPUs, before the doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import write_tiny_llama

pytestmark = [pytest.mark.multigpu, pytest.mark.timeout(900)]

#: Heads of 128, for which FlashInfer's kernel is made.
SHAPE = {"hidden": 512, "intermediate": 1024, "layers": 4}

FLAGS = (
    *("--skip-tokenizer-init", "--attention-backend", "flashinfer", "--mem-fraction-static", "0.1"),
    *("--tp-size", "2", "--enable-tokenweave", "--llm42-window-size", "16", "--llm42-verify-batch-size", "8"),
)


@pytest.mark.parametrize("path", ["peer", "collective"])
def test_captured_halves_are_row_invariant(tmp_path: Path, path: str) -> None:
    model, report = write_tiny_llama(tmp_path / "model", **SHAPE), tmp_path / "report.json"
    command = [sys.executable, "-m", "sglang_ext.doctor", "--model", str(model), "--json", str(report)]
    done = subprocess.run(
        [*command, *FLAGS, "--tokenweave-path", path],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    certificate = json.loads(report.read_text())
    assert certificate["passed"]
    # The halves were captured, the graph's logits equal those of the operators, and the step was fused.
    notes = " ".join(certificate["notes"])
    assert "two halves of 64 rows" in notes and "passes of the CUDA graph gave equal logits" in notes
    compared = {operator["operator"]: operator["comparisons"] for operator in certificate["operators"]}
    assert compared["all-reduce + norm post_attention_layernorm"] > 500
    assert f"TokenWeave path on all 2 ranks: {path}" in done.stderr + done.stdout
