"""``--ray-on-failure restart``: starts the server, and starts it again when it loses a rank.

    python -m sglang_ext.ray.supervisor MAX_RESTARTS ARGUMENTS_OF_THE_SERVER

The server runs in a process of its own, so that nothing of a failed start or a lost group is left in the
next one. This process imports neither torch nor SGLang nor Ray.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from sglang_ext.ray.processes import ending_with_parent
from sglang_ext.ray.status import EXIT_NOT_STARTED, EXIT_USAGE

#: Seconds of service after which earlier failures are forgotten.
STABLE_S = 600.0

#: Seconds before a restart: Ray takes a moment to give the lost group's resources back.
PAUSE_S = 2.0


class Supervisor:
    """Runs one command until it ends for good.

    Args:
        command: the server.
        max_restarts: in a row.
        pause_s, stable_s: see :data:`PAUSE_S`, :data:`STABLE_S`.
    """

    def __init__(
        self,
        command: Sequence[str],
        max_restarts: int,
        pause_s: float = PAUSE_S,
        stable_s: float = STABLE_S,
    ) -> None:
        self.command = list(command)
        self.max_restarts = max_restarts
        self.restarts = 0
        self._pause_s = pause_s
        self._stable_s = stable_s
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped_by: int | None = None

    def stop(self, signum: int, frame: FrameType | None = None) -> None:
        """Signal handler: hand the signal on to the server and do not start it again."""
        self._stopped_by = signum
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signum)

    def run(self) -> int:
        """Serve; returns the exit status to leave with."""
        in_a_row = 0
        while True:
            started = time.monotonic()
            status = self._run_once()
            if self._stopped_by is not None:
                return 128 + self._stopped_by if status else 0
            if status in (0, EXIT_USAGE) or (status == EXIT_NOT_STARTED and self.restarts == 0):
                return status
            # A start that waited in vain for nodes takes long as well, and is no service.
            if status != EXIT_NOT_STARTED and time.monotonic() - started >= self._stable_s:
                in_a_row = 0
            if in_a_row == self.max_restarts:
                _say(f"giving up after --ray-max-restarts {self.max_restarts} restarts in a row")
                return status if status > 0 else 128 - status
            in_a_row += 1
            self.restarts += 1
            _say(f"the server ended with status {status}; restart {in_a_row} of {self.max_restarts}")
            time.sleep(self._pause_s)
            if self._stopped_by is not None:
                return 128 + self._stopped_by

    def _run_once(self) -> int:
        # In a process group of its own: Ctrl-C at a terminal reaches the server once, through this process.
        ending = ending_with_parent(signal.SIGKILL)
        self._child = subprocess.Popen(self.command, process_group=0, preexec_fn=ending)
        if self._stopped_by is not None:  # the signal came before the child was there
            self._child.send_signal(self._stopped_by)
        return self._child.wait()


def _say(text: str) -> None:
    print(f"sglang_ext.ray.supervisor: {text}", file=sys.stderr, flush=True)


def server_command(arguments: Sequence[str]) -> list[str]:
    """The server's command; the last --ray-on-failure counts, so it does not supervise itself."""
    return [sys.executable, "-m", "sglang_ext.launch_server", *arguments, "--ray-on-failure", "exit"]


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise the server of ``argv`` (see the module)."""
    max_restarts, *arguments = sys.argv[1:] if argv is None else argv
    supervisor = Supervisor(server_command(arguments), int(max_restarts))
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, supervisor.stop)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
