"""What the profile says about a trace; recording needs a GPU."""

from __future__ import annotations

from pathlib import Path

import profile_llm42
import pytest
from profile_llm42 import Kernel, gaps, kernels, length, summary, union


def event(
    name: str, stream: int, begin: float, duration: float, category: str = "kernel"
) -> dict[str, object]:
    return {"name": name, "cat": category, "ts": begin, "dur": duration, "args": {"stream": stream}}


TRACE = {
    "traceEvents": [
        event("pass", 20, 100, 400),
        event("decode", 7, 0, 300),
        event("host", 7, 0, 5000, category="cpu_op"),
        event("decode", 7, 600, 200),
        event("copy", 7, 810, 190, category="gpu_memcpy"),
        {"name": "process", "ph": "M"},
    ]
}


def test_only_what_runs_on_the_gpu_counts() -> None:
    found = kernels(TRACE)
    assert [(kernel.name, kernel.begin) for kernel in found] == [
        ("decode", 0),
        ("pass", 100),
        ("decode", 600),
        ("copy", 810),
    ]


def test_spans() -> None:
    merged = union([(5, 9), (0, 2), (1, 3), (8, 12)])
    assert merged == [(0, 3), (5, 12)]
    assert length(merged) == 10


def test_idle_time_is_that_of_no_stream() -> None:
    assert gaps(kernels(TRACE)) == {"decode": 100}


def test_summary() -> None:
    text = summary(kernels(TRACE), steps=2)
    for line in (
        "| milliseconds a step | 0.50 |",
        "| GPU busy | 89.0% |",
        "| GPU idle | 11.0% |",
        "| stream 7 busy | 69.0% |",
        "| stream 20 busy | 40.0% |",
        "| several streams busy | 20.0% |",
        "| pass | 40.0% |",
        "| decode | 10.0% |",
    ):
        assert line in text


def test_nothing_recorded_is_said() -> None:
    with pytest.raises(ValueError, match="no kernel was recorded"):
        summary([], steps=1)
    assert kernels({"traceEvents": []}) == []
    assert Kernel("a", 1, 0, 1).end == 1


def test_unknown_contenders_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_llm42.parse(["--contenders", "nobody"])
    assert "nobody" in capsys.readouterr().err


def test_traces_do_not_mix_with_files_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, full = tmp_path / "fresh", tmp_path / "full"
    full.mkdir()
    assert profile_llm42.parse(["--traces", str(fresh)]).traces == fresh
    assert profile_llm42.parse(["--traces", str(full)]).traces == full
    (full / "old.trace.json.gz").touch()
    for path in (full, full / "old.trace.json.gz"):
        with pytest.raises(SystemExit):
            profile_llm42.parse(["--traces", str(path)])
        assert f"--traces {path}: an empty folder" in capsys.readouterr().err
