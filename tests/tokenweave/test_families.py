"""Two model families end to end in CI; ``families.py`` runs them all."""

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
def test_two_families_equal_stock_at_every_cut(tmp_path: Path) -> None:
    pytest.importorskip("sglang")
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--families", "llama", "mixtral", "--report", str(report)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=1700, check=False, env=environment
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    rows = json.loads(report.read_text(encoding="utf-8"))
    assert [row["family"] for row in rows] == ["llama", "mixtral"]
    assert all(row["cuts"] == 8 and row["statistics"]["woven"] > row["cuts"] for row in rows)
