"""The serving benchmark of TokenWeave and the script for several GPUs: reports, and how they go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_tokenweave_serving as bench
import pytest
from bench_tokenweave_serving import PREFILLS, Load, Result
from serving import ServingError, kept_in_docs


def _arguments(tmp_path: Path, *more: str) -> Any:
    paths = ("--state", str(tmp_path / "state.jsonl"), "--output", str(tmp_path / "out"))
    return bench.parse(["--tp-size", "4", "--rounds", "2", "--throughput-rounds", "0", *paths, *more])


def test_report_names_its_command_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/a/bench.py", "--tp-size", "4", "--state=/a/s", "--output", "/a/o", "--layers", "20"]
    monkeypatch.setattr("sys.argv", words)
    text = bench.report([Result("stock", "prefill-1024", 0, 0.1)], _arguments(tmp_path), [])
    assert "    python scripts/bench_tokenweave_serving.py --tp-size 4 --layers 20\n" in text


def test_files_of_the_docs_name_their_command_without_the_folder_of_its_machine() -> None:
    for output in (["--output", "/a/o"], ["--output=/a/o"]):
        command = kept_in_docs("bench.py", [*output, "--tokens", "64", "128"])
        assert command == "bench.py --output docs/benchmarks --tokens 64 128"


def test_report_gives_ratios_of_medians_to_stock(tmp_path: Path) -> None:
    times = {"stock": (0.2, 0.4, 0.3), "woven": (0.1, 0.2, 0.9)}
    results = [
        Result(name, "prefill-1024", number, seconds)
        for name, all_seconds in times.items()
        for number, seconds in enumerate(all_seconds)
    ]
    arguments = _arguments(tmp_path)
    text = bench.report(results, arguments, ["a note"])
    assert "| prefill-1024 | 3 | 300.0 ms, 1.000 | 200.0 ms, 1.500 |" in text
    assert "prefill-2048" not in text and "- a note" in text
    bench.write(results, arguments, [])
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == [
        f"{r.contender},{r.load},{r.round},{r.seconds}" for r in results
    ]


@pytest.mark.parametrize("contenders", ["woven,fused", "stock,fastest"])
def test_contenders_are_checked(tmp_path: Path, contenders: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _arguments(tmp_path, "--contenders", contenders)
    assert "--contenders" in capsys.readouterr().err


def test_contenders_take_turns_and_one_that_fails_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def run(server: Any, load: Load, seed: int) -> float:
        asked.append((server.name, load.name))
        if server.name == "fused" and load.name == "prefill-2048":
            raise ServingError("no answer")
        return 0.5

    monkeypatch.setattr(bench, "run", run)
    servers: Any = {name: SimpleNamespace(name=name) for name in ("stock", "fused", "woven")}
    kept: list[Result] = []
    done = {("woven", PREFILLS[0].name, 0)}
    lost = bench.measure(servers, _arguments(tmp_path, "--longest", "1024"), kept.append, done)
    assert lost == {}
    measured = [(r.contender, r.load, r.round) for r in kept]
    assert measured[:2] == [("stock", "prefill-512", 0), ("fused", "prefill-512", 0)]
    assert len(measured) == len(set(measured)) == 3 * 2 * 2 - 1 and not done & set(measured)

    kept.clear()
    lost = bench.measure(servers, _arguments(tmp_path), kept.append, set())
    assert list(lost) == ["fused"] and "no answer" in lost["fused"]
    assert {r.contender for r in kept} == {"stock", "woven"}
    assert len(kept) == 2 * 2 * len(PREFILLS)


def test_lines_about_tokenweave_are_found_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = "[2026-01-01 00:00:00 TP0] TokenWeave path on all 4 ranks: peer (reason)\n"
    log.write_text(line + line.replace("TP0", "TP1") + "[..] server_args=(TokenWeave)\n[..] Prefill batch\n")
    assert bench.tokenweave_lines(SimpleNamespace(log=log)) == [  # type: ignore[arg-type]
        "TokenWeave path on all 4 ranks: peer (reason)"
    ]
