"""The programs that run everything on a machine with GPUs: commands are accepted, nothing stops the rest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bench_llm42
import bench_llm42_bounds
import gpu
import multigpu
import profile_llm42
import pytest
import stages
from stages import Stage

PARSERS = {
    "bench_llm42.py": bench_llm42.parse,
    "bench_llm42_bounds.py": bench_llm42_bounds.parse,
    "profile_llm42.py": profile_llm42.parse,
}

ALL = (*gpu.stages(Path("out"), Path("model")), *multigpu.stages(2, Path("out"), 5))
OURS = [stage for stage in ALL if Path(stage.command[1]).name in PARSERS]


@pytest.mark.parametrize("stage", OURS, ids=lambda stage: stage.name)
def test_its_program_accepts_the_command(stage: Stage) -> None:
    options = PARSERS[Path(stage.command[1]).name](stage.command[2:])
    assert Path("out") in options.output.parents


def test_every_benchmark_of_one_gpu_is_tried_here() -> None:
    assert {stage.name for stage in OURS} >= {
        "headline",
        "deterministic",
        "profile",
        "bounds",
        "shares",
        "long",
    }


@pytest.mark.parametrize("stage", ALL, ids=lambda stage: stage.name)
def test_its_files_are_there(stage: Stage) -> None:
    scripts = [word for word in stage.command if word.endswith(".py")]
    assert all(Path(script).is_file() for script in scripts)
    folders = [word for word in stage.command if word == "tests" or word.startswith("tests/")]
    assert all((stages.REPOSITORY / folder).is_dir() for folder in folders)


def test_no_stage_makes_multicast_objects(tmp_path: Path) -> None:
    stage = _python("check", "import os; assert os.environ['TORCH_SYMM_MEM_DISABLE_MULTICAST'] == '1'")
    assert stages.run(stage, tmp_path / "log")[0] == 0


@pytest.mark.parametrize("all_stages", [gpu.stages(Path(), Path()), multigpu.stages(2, Path(), 5)])
def test_names_are_given_once_and_no_stage_takes_long(all_stages: tuple[Stage, ...]) -> None:
    assert len({stage.name for stage in all_stages}) == len(all_stages)
    assert all(stage.limit <= 720 for stage in all_stages)


def _python(name: str, text: str, limit: float = 60) -> Stage:
    return Stage(name, (sys.executable, "-c", text), limit)


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    output = tmp_path / "new"
    ran = [_python("bad", "print('why'); raise SystemExit(3)"), _python("good", "print('fine')")]
    assert stages.run_all(ran, output, "gpu", "Title", "1 x card") == 1
    assert (output / "gpu-bad.log").read_text() == "why\n"
    assert (output / "gpu-good.log").read_text() == "fine\n"
    summary = (output / "gpu.md").read_text()
    assert summary.startswith("# Title") and "| bad | 3 |" in summary and "| good | 0 |" in summary
    assert "1 x card" in summary
    assert stages.run_all(ran[1:], output, "gpu", "Title", "1 x card") == 0


@pytest.mark.parametrize("text", ["pass", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_a_stage_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(stages, "GRACE", 0.5)
    stage = _python("long", f"{text}; import time; print('up', flush=True); time.sleep(60)", limit=3)
    status, seconds = stages.run(stage, tmp_path / "log")
    assert status == "time ran out" and seconds < 30
    assert (tmp_path / "log").read_text() == "up\n"


def test_an_unknown_stage_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    stages.add_arguments(parser, ["a", "b"])
    options = parser.parse_args(["--stages", "b,c"])
    with pytest.raises(SystemExit):
        stages.chosen(parser, options, [_python("a", ""), _python("b", "")])
    assert "'c'" in capsys.readouterr().err


def test_stages_run_in_their_own_order() -> None:
    parser = argparse.ArgumentParser()
    both = [_python("a", ""), _python("b", "")]
    stages.add_arguments(parser, ["a", "b"])
    assert stages.chosen(parser, parser.parse_args(["--stages", "b,a"]), both) == both
    assert stages.chosen(parser, parser.parse_args([]), both) == both
