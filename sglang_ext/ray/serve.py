"""Serving on Ray: SGLang's server between joining the cluster and leaving it clean."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_ext.ray.requirements import RESTART, RaySettings
from sglang_ext.ray.status import EXIT_NOT_STARTED

if TYPE_CHECKING:
    from sglang_ext.server_args import ServerArgs


def wants_supervisor(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for a supervised server, seen without loading anything big."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--use-ray", action="store_true")
    parser.add_argument("--ray-on-failure", nargs="?")
    found, _ = parser.parse_known_args(arguments)
    return found.use_ray and found.ray_on_failure == RESTART


def become_supervisor(max_restarts: int, arguments: Sequence[str]) -> None:
    """Replace this process by the supervisor of a server with these arguments; does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    supervisor = [sys.executable, "-m", "sglang_ext.ray.supervisor", str(max_restarts)]
    os.execv(sys.executable, [*supervisor, *arguments])


def max_restarts_in(arguments: Sequence[str]) -> int:
    """The last ``--ray-max-restarts``; what is wrong with it, the supervised server says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ray-max-restarts", nargs="?")
    value = parser.parse_known_args(arguments)[0].ray_max_restarts
    return int(value) if str(value).isdecimal() else RaySettings.max_restarts


def serve(program: str, server_args: ServerArgs, arguments: Sequence[str]) -> int:
    """Serve until interrupted, or until a rank is lost.

    Args:
        program: name to begin messages with.
        server_args: parsed from ``arguments``.
        arguments: the command line, for a supervisor that starts the server again.

    Returns:
        The exit status (:mod:`sglang_ext.ray.status`). With ``--ray-on-failure restart`` in a configuration
        file this call does not return: the process becomes the supervisor.
    """
    settings = RaySettings.from_server_args(server_args)
    if settings.on_failure == RESTART:
        become_supervisor(settings.max_restarts, arguments)
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
