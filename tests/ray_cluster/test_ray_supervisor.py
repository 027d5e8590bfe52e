"""The supervisor of --ray-on-failure restart, with a shell in place of the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sglang_ext.ray import serve, supervisor
from sglang_ext.ray.requirements import RaySettings
from sglang_ext.ray.status import EXIT_NOT_STARTED, EXIT_RANK_LOST
from sglang_ext.ray.supervisor import Supervisor


def _supervisor(script: str, tmp_path: Path, max_restarts: int = 3) -> Supervisor:
    command = ["sh", "-c", f"echo run >> {tmp_path}/runs; runs=$(wc -l < {tmp_path}/runs); {script}"]
    return Supervisor(command, max_restarts, pause_s=0)


def _runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def test_a_server_that_ends_by_itself_is_not_started_again(tmp_path: Path) -> None:
    for status in (0, 2, EXIT_NOT_STARTED):
        assert _supervisor(f"exit {status}", tmp_path).run() == status
    assert _runs(tmp_path) == 3


def test_a_server_that_lost_a_rank_is_started_again(tmp_path: Path) -> None:
    one = _supervisor(f"[ $runs -ge 3 ] || exit {EXIT_RANK_LOST}", tmp_path)
    assert one.run() == 0
    assert one.restarts == 2 and _runs(tmp_path) == 3


def test_a_killed_server_is_started_again(tmp_path: Path) -> None:
    assert _supervisor("[ $runs -ge 2 ] || kill -9 $$", tmp_path).run() == 0
    assert _runs(tmp_path) == 2


def test_a_failed_restart_is_tried_again(tmp_path: Path) -> None:
    script = f"case $runs in 1) exit {EXIT_RANK_LOST};; 2) exit {EXIT_NOT_STARTED};; esac"
    assert _supervisor(script, tmp_path).run() == 0
    assert _runs(tmp_path) == 3


def test_restarts_in_a_row_are_bounded(tmp_path: Path) -> None:
    assert _supervisor(f"exit {EXIT_RANK_LOST}", tmp_path, max_restarts=2).run() == EXIT_RANK_LOST
    assert _runs(tmp_path) == 3


def test_service_in_between_forgets_earlier_failures(tmp_path: Path) -> None:
    one = _supervisor(f"[ $runs -ge 5 ] || exit {EXIT_RANK_LOST}", tmp_path, max_restarts=1)
    one._stable_s = 0
    assert one.run() == 0
    assert one.restarts == 4


def test_long_starts_in_vain_are_no_service(tmp_path: Path) -> None:
    one = _supervisor(f"[ $runs -eq 1 ] && exit {EXIT_RANK_LOST}; exit {EXIT_NOT_STARTED}", tmp_path)
    one._stable_s = 0
    assert one.run() == EXIT_NOT_STARTED
    assert _runs(tmp_path) == 4


def test_a_signal_is_handed_on_and_ends_it(tmp_path: Path) -> None:
    one = _supervisor("trap 'exit 0' TERM; while :; do sleep 0.05; done", tmp_path)
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(one.run()))
    thread.start()
    while not (tmp_path / "runs").exists():
        time.sleep(0.01)
    time.sleep(0.2)  # the trap
    one.stop(signal.SIGTERM)
    thread.join(10)
    assert statuses == [0] and _runs(tmp_path) == 1


def test_the_server_dies_with_its_supervisor(tmp_path: Path) -> None:
    code = (
        "from sglang_ext.ray.supervisor import Supervisor\n"
        f"Supervisor(['sh', '-c', 'echo $$ > {tmp_path}/pid; sleep 60'], 1).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    pid_file = tmp_path / "pid"
    while not (pid_file.exists() and pid_file.read_text().strip()):
        time.sleep(0.02)
    process.kill()
    process.wait()
    child = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_server_does_not_supervise_itself() -> None:
    command = supervisor.server_command(["--model", "m", "--ray-on-failure", "restart"])
    assert command[-2:] == ["--ray-on-failure", "exit"] and command[3:5] == ["--model", "m"]


def test_the_supervisor_loads_nothing_big() -> None:
    code = (
        "import sys, sglang_ext.ray.supervisor; print({'torch', 'ray', 'sglang', 'numpy'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--use-ray --ray-on-failure restart", True),
        ("--model m --ray-on-failure=restart --nnodes 2 --use-ray", True),
        ("--use-ray --ray-on-failure restart --ray-on-failure exit", False),
        ("--use-ray", False),
        ("--use-ray --ray-on-failure", False),
        ("--ray-on-failure restart", False),
    ],
)
def test_a_command_line_that_asks_for_it_is_seen_at_once(line: str, wanted: bool) -> None:
    assert serve.wants_supervisor(line.split()) is wanted


def test_the_number_of_restarts_is_read_from_the_command_line() -> None:
    assert serve.max_restarts_in(["--ray-max-restarts", "7"]) == 7
    for wrong in ([], ["--ray-max-restarts"], ["--ray-max-restarts", "many"]):
        assert serve.max_restarts_in(wrong) == RaySettings.max_restarts
