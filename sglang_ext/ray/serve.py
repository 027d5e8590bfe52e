"""Serving on Ray: SGLang's server between joining the cluster and leaving it clean."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_ext.ray.requirements import RESTART, RaySettings
from sglang_ext.ray.status import EXIT_NOT_STARTED

if TYPE_CHECKING:
    from sglang_ext.server_args import ServerArgs


def serve(program: str, server_args: ServerArgs, arguments: Sequence[str]) -> int:
    """Serve until interrupted, or until a rank is lost.

    Args:
        program: name to begin messages with.
        server_args: parsed from ``arguments``.
        arguments: the command line, for a supervisor that starts the server again.

    Returns:
        The exit status (:mod:`sglang_ext.ray.status`). With ``--ray-on-failure restart`` this call does not
        return: the process becomes the supervisor.
    """
    settings = RaySettings.from_server_args(server_args)
    if settings.on_failure == RESTART:
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor = [sys.executable, "-m", "sglang_ext.ray.supervisor", str(settings.max_restarts)]
        os.execv(sys.executable, [*supervisor, *arguments])
    return _serve(program, server_args)


def _serve(program: str, server_args: ServerArgs) -> int:
    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    from sglang_ext.ray import cluster, group

    # Until Ray and then SGLang put theirs in place, SIGTERM would end this process without the lines below.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        run_server(server_args)
        return 0
    except (cluster.ClusterError, group.StartError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_NOT_STARTED
    except KeyboardInterrupt:
        return 130
    finally:
        group.close_current()
        cluster.disconnect()
        kill_process_tree(os.getpid(), include_parent=False)
