"""All model families end to end: ``families.py`` in a process of its own, a few seconds each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("families.py")


@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_families_equal_stock_at_every_cut(tmp_path: Path) -> None:
    pytest.importorskip("sglang")
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--report", str(report)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=1700, check=False, env=environment
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    rows = json.loads(report.read_text(encoding="utf-8"))
    woven = [row["family"] for row in rows if row["woven"]]
    assert woven == ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"]
    assert [row["family"] for row in rows if not row["woven"]] == ["granite", "gemma2"]
    assert all(row["cuts"] == 8 and row["steps"] == 90 for row in rows)
    for row in rows:
        assert row["statistics"]["woven"] > row["cuts"] if row["woven"] else row["stock_reason"]
    # One line says why, from one rank.
    assert result.stderr.count("TokenWeave is off for this model: none of the model's all-reduces") == 2
