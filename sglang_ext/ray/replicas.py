"""``python -m sglang_ext.ray.replicas``: several servers on a Ray cluster behind one address.

    python -m sglang_ext.ray.replicas --replicas 4 --port 30000 -- --model-path ... --tp-size 8 --enable-llm42

What stands behind ``--`` is the command line of ``sglang_ext.launch_server`` for each replica. Requests are
distributed by :mod:`sglang_ext.ray.front`. Replicas are compared before the address opens: same versions,
flags, configuration and canonical fingerprint, so a deterministic request gets the same output from any of
them, also when a second one is tried because the first was lost. A replica restarts by itself and is compared
again before it gets requests. One that is lost for good is left out; the service ends when none is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from sglang_ext.ray import agreement, cluster, front, placement
from sglang_ext.ray.identity import identity_of
from sglang_ext.ray.processes import ending_with_parent
from sglang_ext.ray.requirements import NOT_INSTALLED, RESTART, RaySettings, ray_is_installed, world_size
from sglang_ext.ray.status import EXIT_NOT_STARTED, EXIT_RANK_LOST, refuse

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

PROGRAM = "sglang_ext.ray.replicas"

#: Flags that each replica gets from here.
OURS = ("--host", "--port", "--use-ray", "--ray-placement-group", "--ray-namespace", "--ray-on-failure")

#: Seconds between looks at the replicas; in which all actors that live answer one.
POLL_S = 2.0
ANSWER_TIMEOUT_S = 10.0


class ReplicaError(RuntimeError):
    """A replica did not come up, or a front has ended; the message says which."""


class NoReplicaLeft(RuntimeError):
    """All replicas are lost for good; the message says why the last one is."""


# On the nodes


class Replica:
    """A server in a process of its own on the node of this Ray actor."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, arguments: Sequence[str]) -> str:
        """Start ``python -m sglang_ext.launch_server`` on a free port; returns its URL."""
        import socket

        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "sglang_ext.launch_server", *arguments]
        address = ray.get_runtime_context().gcs_address
        self._process = subprocess.Popen(
            [*command, "--host", host, "--port", str(port), "--ray-address", address],
            process_group=0,
            preexec_fn=ending_with_parent(signal.SIGTERM),
            env={**os.environ, cluster.NODE_ADDRESS: host},
        )
        return f"http://{host}:{port}"

    def status(self) -> int | None:
        """Exit status of the server, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def stop(self, patience_s: float = 20.0) -> None:
        """End the server."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


# Where the address is


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted, until no replica is left, or until a front ends."""
    options, server_flags = parse(sys.argv[1:] if argv is None else argv)
    if not ray_is_installed():
        return refuse(PROGRAM, NOT_INSTALLED)
    from sglang_ext import launch_server
    from sglang_ext.hooks import HookError

    try:
        server_args = launch_server.parse([*server_flags, "--use-ray"])
    except (HookError, ValueError, OSError) as error:
        return refuse(PROGRAM, str(error))
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    try:
        cluster.connect(_settings(server_args), server_args.nnodes)
        with _replicas(options, server_flags, server_args) as (replicas, identity):
            _route(options, replicas, identity, server_args.api_key)
    except NoReplicaLeft as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return EXIT_RANK_LOST
    except (cluster.ClusterError, placement.PlacementError, agreement.Disagreement, ReplicaError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return EXIT_NOT_STARTED
    except KeyboardInterrupt:
        return 130
    finally:
        cluster.disconnect()


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the flags of each replica behind ``--``.

    Raises:
        SystemExit: an option is wrong (status 2); the message names it.
    """
    parser = argparse.ArgumentParser(PROGRAM, usage="%(prog)s [OPTIONS] -- FLAGS OF sglang_ext.launch_server")
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--host", default=front.LOOPBACK, help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--policy", choices=front.POLICIES, default=front.POLICIES[0])
    parser.add_argument(
        "--fronts",
        type=int,
        default=1,
        help="processes that serve the address, each on a core (default: %(default)s)",
    )
    at = list(argv).index("--") if "--" in argv else len(argv)
    options, behind = parser.parse_args(argv[:at]), list(argv[at + 1 :])
    if options.replicas < 1:
        parser.error(f"--replicas must be at least 1, not {options.replicas}")
    if options.fronts < 1:
        parser.error(f"--fronts must be at least 1, not {options.fronts}")
    if not behind:
        parser.error("give the server's flags behind --")
    for flag in behind:
        name = flag.partition("=")[0]
        if name in OURS:
            parser.error(f"{name} is chosen for each replica; leave it out behind --")
        if name.startswith("--ssl-"):
            parser.error(f"{name}: the front speaks plain HTTP with its replicas; put TLS in front of it")
    return options, behind


def _settings(server_args: Any) -> RaySettings:
    import dataclasses

    settings = RaySettings.from_server_args(server_args)
    return dataclasses.replace(settings, namespace=f"{PROGRAM}-{uuid.uuid4().hex[:8]}")


class Replicas:
    """The replicas that are not lost for good.

    Args:
        actors: Ray's handles, by the URL of the server.
        release: gives back what a lost one still holds, by its URL.
    """

    def __init__(self, actors: Mapping[str, Any], release: Callable[[str], None] = lambda url: None) -> None:
        self.actors = dict(actors)
        self._release = release
        self._silent: set[str] = set()

    def lost(self) -> dict[str, str]:
        """Why a replica is lost, by its URL; an actor that only does not answer is not lost yet.

        A server that restarts by itself has not ended: its supervisor runs on.
        """
        import ray
        from ray.exceptions import RayError

        asked = {actor.status.remote(): url for url, actor in self.actors.items()}
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
        self._tell_silent({asked[reference] for reference in silent})
        found = {}
        for reference in answered:
            try:
                status = ray.get(reference, timeout=ANSWER_TIMEOUT_S)
            except RayError as error:
                first_line = next(iter(str(error).strip().splitlines()), "")
                found[asked[reference]] = f"its actor is lost ({type(error).__name__}: {first_line})"
            else:
                if status is not None:
                    found[asked[reference]] = f"it ended with status {status}; its log says why"
        return found

    def _tell_silent(self, silent: set[str]) -> None:
        for url in sorted(silent - self._silent):
            _say(f"the actor of the replica at {url} does not answer; waiting for what Ray finds")
        self._silent = silent

    def require_all(self) -> None:
        """While they start.

        Raises:
            ReplicaError: one is lost.
        """
        for url, why in self.lost().items():
            raise ReplicaError(f"the replica at {url} is lost: {why}")

    def leave_lost_out(self) -> None:
        """While they serve: go on with those that are left. The fronts see by themselves who does not answer.

        Raises:
            NoReplicaLeft: there is none.
        """
        for url, why in self.lost().items():
            del self.actors[url]
            _say(f"the replica at {url} is lost for good: {why}; {len(self.actors)} left")
            if not self.actors:
                raise NoReplicaLeft(f"no replica is left: the last one, at {url}, is lost: {why}")
            self._release(url)


def _say(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


@contextmanager
def _replicas(
    options: argparse.Namespace, server_flags: Sequence[str], server_args: Any
) -> Iterator[tuple[Replicas, dict[str, Any]]]:
    """Start all replicas and compare them; yields them and their common identity."""
    import ray
    from ray.exceptions import RayError

    groups: list[PlacementGroup] = []
    starting: list[tuple[Any, Any]] = []
    actors: dict[str, Any] = {}

    def release(url: str) -> None:
        index = list(actors).index(url)
        _end([starting[index][0]], [groups[index]])

    try:
        for index in range(options.replicas):
            group = _room(index, server_args)
            groups.append(group)
            actor = _actor(group)
            flags = [*server_flags, "--use-ray", "--ray-on-failure", RESTART]
            flags += ["--ray-placement-group", _name(index)]
            flags += ["--ray-namespace", ray.get_runtime_context().namespace]
            starting.append((actor, actor.start.remote(flags)))
        for index, (actor, url) in enumerate(starting):
            try:
                actors[ray.get(url, timeout=server_args.ray_start_timeout)] = actor
            except RayError as error:
                raise ReplicaError(f"replica {index} did not start: {error}") from error
        replicas = Replicas(actors, release)
        infos = _wait_for_all(list(actors), server_args, replicas.require_all)
        compare(infos)
        yield replicas, identity_of(infos[next(iter(infos))])
    finally:
        _end([actor for actor, _ in starting], groups)


def _name(index: int) -> str:
    return f"replica-{index}"


def _room(index: int, server_args: Any) -> PlacementGroup:
    from ray.util.placement_group import placement_group

    nnodes = server_args.nnodes
    bundle = placement.bundle(world_size(server_args) // nnodes, server_args.device)
    strategy = "STRICT_PACK" if nnodes == 1 else "STRICT_SPREAD"
    group = placement_group([dict(bundle) for _ in range(nnodes)], strategy=strategy, name=_name(index))
    timeout = server_args.ray_start_timeout
    if not group.wait(timeout):
        raise placement.PlacementError(
            f"--replicas: no room for replica {index} ({nnodes} node(s) with {bundle} each) within "
            f"--ray-start-timeout {timeout:g} s."
        )
    return group


def _actor(group: PlacementGroup) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from sglang_ext.ray.environment import KEEP_ALL_GPUS, handed_on

    actor_class: Any = ray.remote(Replica)
    return actor_class.options(
        num_cpus=0,
        num_gpus=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        runtime_env={"env_vars": {**handed_on(os.environ), **KEEP_ALL_GPUS}},
    ).remote()


def _end(actors: Sequence[Any], groups: Sequence[PlacementGroup]) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    stopping = [actor.stop.remote() for actor in actors]
    if stopping:
        ray.wait(stopping, num_returns=len(stopping), timeout=30)
    for actor in actors:
        ray.kill(actor)
    for group in groups:
        remove_placement_group(group)


def _wait_for_all(urls: Sequence[str], server_args: Any, check: Callable[[], None]) -> dict[str, Any]:
    """``/server_info`` of every replica, once all answer.

    Raises:
        ReplicaError: one has ended, or does not answer in time.
    """
    import requests

    key = server_args.api_key  # /server_info is open where only an admin key is set
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    infos: dict[str, Any] = {}
    deadline = time.monotonic() + 2 * server_args.ray_start_timeout
    while len(infos) < len(urls):
        check()
        for url in urls:
            if url not in infos:
                with contextlib.suppress(requests.RequestException, ValueError):
                    answer = requests.get(f"{url}/server_info", headers=headers, timeout=10)
                    if answer.status_code == 200:
                        infos[url] = answer.json()
        if time.monotonic() > deadline:
            raise ReplicaError(f"no answer from {', '.join(set(urls) - set(infos))}")
        time.sleep(POLL_S)
    return {url: infos[url] for url in urls}


def compare(infos: dict[str, Any]) -> None:
    """Check that replicas are alike, from their ``/server_info``.

    Raises:
        Disagreement: naming what differs.
    """
    agreement.require({url: identity_of(info) for url, info in infos.items()}, "replicas")


def _route(
    options: argparse.Namespace, replicas: Replicas, identity: Mapping[str, Any], api_key: str | None
) -> NoReturn:
    """Run the fronts until one ends, or no replica is left.

    Raises:
        ReplicaError: a front has ended.
        NoReplicaLeft: all replicas are lost.
    """
    urls = list(replicas.actors)
    command = front_command(options, urls)
    environment = front_environment(identity, api_key)
    ending = ending_with_parent(signal.SIGTERM)
    fronts = [
        subprocess.Popen(command, process_group=0, preexec_fn=ending, env=environment)
        for _ in range(options.fronts)
    ]
    print(f"{PROGRAM}: {len(urls)} replicas behind http://{options.host}:{options.port}", flush=True)
    try:
        while True:
            for process in fronts:
                if process.poll() is not None:
                    raise ReplicaError(f"a front ended with status {process.returncode}; its log says why")
            replicas.leave_lost_out()
            time.sleep(POLL_S)
    finally:
        for process in fronts:
            process.terminate()
        for process in fronts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def front_command(options: argparse.Namespace, urls: Sequence[str]) -> list[str]:
    """Command line of the process that serves the address."""
    command = [sys.executable, "-m", "sglang_ext.ray.front", *urls, "--host", options.host]
    command += ["--port", str(options.port), "--policy", options.policy]
    return [*command, "--share-port"] if options.fronts > 1 else command


def front_environment(identity: Mapping[str, Any], api_key: str | None) -> dict[str, str]:
    """Environment of that process: what it must know and lists of processes must not show."""
    environment = {**os.environ, front.EXPECTED: json.dumps(identity)}
    return {**environment, front.API_KEY: api_key} if api_key else environment


if __name__ == "__main__":
    sys.exit(main())
