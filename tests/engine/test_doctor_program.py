"""``python -m sglang_ext.doctor`` as users run it, on several ranks, and with operators that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_server import sabotage_variables
from models import write_tiny_experts, write_tiny_llama
from workloads import FLOAT32, ONE_THREAD

FLAGS = ("--llm42-window-size", "8", "--llm42-verify-batch-size", "3", "--context-length", "80")
TIME_LIMIT_S = 300


def _doctor(model: Path, folder: Path, *flags: str, sabotage: str = "") -> tuple[int, dict[str, Any]]:
    """Exit status and report."""
    control, report = folder / "sabotage", folder / "report.json"
    control.write_text(sabotage)
    command = [sys.executable, "-m", "sglang_ext.doctor", "--model", str(model), "--json", str(report)]
    done = subprocess.run(
        [*command, "--skip-tokenizer-init", *FLAGS, *flags],
        env={**os.environ, **ONE_THREAD, **sabotage_variables(control)},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert report.exists(), f"{done.returncode}: {done.stderr[-3000:]}"
    return done.returncode, json.loads(report.read_text())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_experts(tmp_path_factory.mktemp("mixtral"), family="mixtral")


def test_experts_on_two_ranks_hold(mixtral: Path, tmp_path: Path) -> None:
    status, report = _doctor(mixtral, tmp_path, "--tp-size", "2", *FLOAT32)
    assert status == 0 and report["passed"] and not report["notes"][1:]
    compared = {operator["operator"]: operator["comparisons"] for operator in report["operators"]}
    for operator in ("experts", "expert choice", "linear gate", "all-reduce", "lm_head", "canonical pass"):
        assert compared[operator] > 500


def test_sglangs_experts_are_found(mixtral: Path, tmp_path: Path) -> None:
    status, report = _doctor(mixtral, tmp_path, *FLOAT32, sabotage="stock_experts")
    assert status == 1 and report["faulty"] == "experts"


def test_gloos_all_reduce_on_four_ranks_is_found(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", kv_heads=4)
    status, report = _doctor(model, tmp_path, "--tp-size", "4", "--quick", sabotage="stock_all_reduce")
    assert status == 1 and report["faulty"] == "all-reduce"


WOVEN = ("--enable-tokenweave", "--llm42-verify-batch-size", "4")


def test_woven_passes_on_two_ranks_hold(mixtral: Path, tmp_path: Path) -> None:
    status, report = _doctor(mixtral, tmp_path, "--tp-size", "2", *FLOAT32, *WOVEN)
    assert status == 0 and report["passed"]
    assert report["notes"][0] == "passes run as two halves of 16 rows (TokenWeave)"
    compared = {operator["operator"]: operator["comparisons"] for operator in report["operators"]}
    fused = [f"all-reduce + norm {name}" for name in ("post_attention_layernorm", "input_layernorm", "norm")]
    for operator in (*fused, "experts", "expert choice", "attention", "lm_head", "canonical pass"):
        assert compared[operator] > 500
    assert compared["all-reduce"] == compared["embedding"], "all others are in the fused step"


def test_an_order_of_summation_that_depends_on_the_row_is_found(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", kv_heads=4)
    flags = ("--tp-size", "4", "--quick", *WOVEN)
    status, report = _doctor(model, tmp_path, *flags, sabotage="ring_order")
    assert status == 1 and report["faulty"] == "all-reduce + norm post_attention_layernorm"


def test_halves_in_the_wrong_order_are_found(tmp_path: Path) -> None:
    """The second half then attends before the first has written its keys and values."""
    model = write_tiny_llama(tmp_path / "model")
    flags = ("--tp-size", "2", "--quick", *WOVEN)
    status, report = _doctor(model, tmp_path, *flags, sabotage="second_half_first")
    assert status == 1 and report["faulty"] == "attention"
