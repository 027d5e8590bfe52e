"""The GPU benchmark's plan and arithmetic; its servers are measured, not tested."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_llm42 as bench
import pytest


def _result(shape: str, contender: str, number: int, seconds: float, outputs: list[str], **more: Any) -> Any:
    percent = bench.CONTENDERS[contender].percent
    marked = [index for index in range(len(outputs)) if bench.is_marked(index, percent)]
    cell = bench.Cell(shape, contender, number, more.pop("rate", 0.0))
    return bench.Result(cell, seconds, 10, 1000, more.pop("counters", {}), outputs, marked, **more)


def test_shares_are_exact_and_nested() -> None:
    marked = {
        percent: {i for i in range(1000) if bench.is_marked(i, percent)} for percent in (2, 10, 50, 100)
    }
    assert {percent: len(found) for percent, found in marked.items()} == {2: 20, 10: 100, 50: 500, 100: 1000}
    assert marked[2] < marked[10] < marked[50] < marked[100]


def test_workload_is_the_same_every_time_and_has_the_lengths_that_the_report_names() -> None:
    work = bench.workload(bench.SHAPES["sharegpt-like"], 4000, 1.0)
    assert work == bench.workload(bench.SHAPES["sharegpt-like"], 4000, 1.0)
    means = [
        sum(lengths) / len(work) for lengths in zip(*((len(r.ids), r.new_tokens) for r in work), strict=True)
    ]
    # Lengths are cut at 1,024, which takes something off the means of 217 and 200.
    assert 190 < means[0] < 220 and 175 < means[1] < 205
    assert max(r.new_tokens for r in work) == 1024
    fixed = bench.workload(bench.SHAPES["1k-256"], 3, 1.0)
    assert [(len(r.ids), r.new_tokens) for r in fixed] == [(1024, 256)] * 3


def test_cells_come_in_order_of_worth() -> None:
    arguments = bench.parse(
        [
            "--shapes",
            "sharegpt-like,1k-256",
            "--contenders",
            "stock,ours-100",
            "--rates",
            "4",
            "--rounds",
            "2",
        ]
    )
    order = [(c.shape, c.contender, c.round, c.rate) for c in bench.cells(arguments)]
    first = [(s, c, 0, 0.0) for s in ("sharegpt-like", "1k-256") for c in ("stock", "ours-100")]
    online = [("sharegpt-like", c, 0, 4.0) for c in ("stock", "ours-100")]
    assert order == [*first, *online, *((s, c, 1, r) for s, c, _, r in first)]


def test_ratios_are_of_one_round() -> None:
    results = [
        _result("1k-256", "stock", 0, 10.0, ["a"]),
        _result("1k-256", "stock", 1, 20.0, ["a"]),
        _result("1k-256", "ours-100", 1, 25.0, ["a"]),
        _result("sharegpt-like", "ours-100", 0, 25.0, ["a"]),
    ]
    assert bench._ratio(results[2], results) == pytest.approx(0.8)
    assert bench._ratio(results[3], results) is None
    assert "| ours-100 | 1 | 40 | 0.800 | 0.800 to 0.800 |" in bench.offline_table(results, "1k-256")


def test_every_marked_output_is_compared() -> None:
    outputs = [str(index) for index in range(100)]
    other = [*outputs[:-1], "other"]
    alike = [
        _result("1k-256", "ours-100", 0, 1.0, outputs),
        _result("1k-256", "ours-50", 0, 1.0, list(outputs)),
    ]
    assert bench.differences(alike)["marked"] == (50, 0)
    assert bench.is_marked(99, 100)
    differing = [alike[0], _result("1k-256", "ours-100", 1, 1.0, other)]
    assert bench.differences(differing)["marked"] == (100, 1)
    # Unmarked requests promise nothing, and other shapes are other requests.
    apart = [
        alike[0],
        _result("1k-256", "ours-0", 0, 1.0, other),
        _result("1k-1k", "ours-100", 0, 1.0, other),
    ]
    assert bench.differences(apart)["marked"] == (0, 0)
    # Nor do servers with another canonical shape give the same output.
    other_shape = [_result("1k-256", "small-100", number, 1.0, other) for number in range(2)]
    assert bench.differences([alike[0], *other_shape])["marked"] == (100, 0)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def measure(cell: Any, server: Any, count: int, scale: float) -> Any:
        if len(measured) == 2:
            raise bench.ServingError("gone")
        measured.append(cell)
        return _result(cell.shape, cell.contender, cell.round, 2.0, ["a", "b"], ttft=[0.1], e2e=[0.2])

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "start", lambda stack, systems, flags, arguments: dict.fromkeys(systems))
    monkeypatch.setattr(bench.serving, "exit_on_termination", lambda: None)
    flags = [
        "--device",
        "cpu",
        "--contenders",
        "stock,ours-100,ours-50",
        "--shapes",
        "1k-256",
        "--rounds",
        "1",
    ]
    files = ["--state", str(tmp_path / "state.jsonl"), "--output", str(tmp_path / "out")]
    assert bench.main([*flags, *files]) == 2
    assert [cell.contender for cell in measured] == ["stock", "ours-100"]
    measured.clear()
    assert bench.main([*flags, *files]) == 0
    assert [cell.contender for cell in measured] == ["ours-50"]
    stored = [json.loads(line) for line in (tmp_path / "state.jsonl").read_text().splitlines()[1:]]
    assert [bench.Result.from_json(item).cell.contender for item in stored] == [
        "stock",
        "ours-100",
        "ours-50",
    ]
    assert asdict(bench.Result.from_json(stored[0])) == stored[0]
    report = (tmp_path / "out.md").read_text()
    assert "ours-50" in report and "| marked | 2 | 0 |" in report
    assert (tmp_path / "out.csv").read_text().count("\n") == 4


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--online-contenders", "stock,nobody"])
    assert "--online-contenders: ['nobody'] unknown" in capsys.readouterr().err


def test_report_names_its_command_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/a/bench.py", "--rounds", "1", "--state", "/a/s", "--wait-for=/a/w", "--output", "/a/o"]
    monkeypatch.setattr("sys.argv", words)
    text = bench.report([_result("1k-256", "stock", 0, 1.0, ["x"])], bench.parse([]), [])
    assert "    python scripts/bench_llm42.py --rounds 1\n" in text
