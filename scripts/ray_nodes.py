"""Ray clusters of several nodes on one machine, for tests and for scripts/ray_two_nodes.py.

:class:`Namespaces` makes real separate hosts out of network namespaces: each has its own address, host name,
shared memory and Ray folder, and a cable that can be cut. It needs root, iproute2, nsenter and unshare.
:class:`FakeNodes` is Ray's own test cluster: several raylets with one address, where namespaces cannot be
made.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

#: Where Ray keeps what belongs to a host; hosts on one machine mount one each over it.
RAY_FOLDER = Path("/tmp/ray")

#: Ray's smallest comfortable object store; our ranks do not use it.
OBJECT_STORE_BYTES = 80 * 2**20

#: Cores of a node, as Ray counts them: more than one rank on a node is possible, but none is asked for.
CPUS = 2

#: Ray's health checks, shorter than its defaults (5 s, 3 s, 10 s, 5 times), to learn soon of a cut cable.
HEALTH_CHECKS = (
    '{"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, '
    '"health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}'
)

NODE_TIMEOUT_S = 120.0

#: How often a node is tried to be started.
START_ATTEMPTS = 4


class NodesError(RuntimeError):
    """A node could not be made; the message holds what was tried."""


class Nodes(Protocol):
    """A cluster; its first node is the head, on which servers run."""

    kind: str
    #: Of the cluster, for --ray-address.
    address: str
    #: Where servers on the head node are reached from outside.
    host: str

    def add(self) -> int:
        """Start another node; returns its number."""

    def kill(self, node: int) -> None:
        """End everything that runs on a node, at once."""

    def command(self, command: Sequence[str]) -> list[str]:
        """``command`` as it is run on the head node."""

    def environment(self) -> dict[str, str]:
        """Variables for servers on the head node."""

    def ray(self, code: str) -> str:
        """Output of a Python program on the head node that is connected to the cluster."""

    def stop(self) -> None:
        """End all nodes."""


def why_no_namespaces() -> str | None:
    """Why network namespaces cannot be made here, None if they can."""
    for program in ("ip", "nsenter", "unshare", "mount"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for needed in (Path(sys.prefix), Path(__file__).resolve().parent):
        if needed.is_relative_to(RAY_FOLDER):
            return f"{needed} lies in {RAY_FOLDER}, which every host has for itself"
    name = f"seprobe{os.getpid()}"
    steps = (
        ["ip", "netns", "add", name],
        ["ip", "netns", "exec", name, "unshare", "-m", "-u", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
        ["ip", "link", "add", "seprobe0", "type", "veth", "peer", "name", "seprobe1"],
        ["ip", "link", "add", "seprobeb", "type", "bridge"],
    )
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                return f"{' '.join(step)}: {done.stderr.strip()}"
        return None
    finally:
        for undo in (["link", "del", "seprobeb"], ["link", "del", "seprobe0"], ["netns", "del", name]):
            subprocess.run(["ip", *undo], capture_output=True)


class Namespaces:
    """Nodes in network namespaces on a bridge: node ``i`` has the address ``10.77.0.(i+1)``.

    Args:
        logs: not used; Ray's logs are in the hosts' own folders.
        dashboard: whether the head has Ray's dashboard, which takes jobs, on its loopback, port 8265.
    """

    kind = "network namespaces"
    NETWORK = "10.77.0"
    GATEWAY = "10.77.0.254"
    PORT = 6379

    def __init__(self, logs: Path, dashboard: bool = False) -> None:
        if reason := why_no_namespaces():
            raise NodesError(reason)
        self._dashboard = dashboard
        self._tag = f"se{os.getpid() % 100000}"
        self._logs = logs
        self._holders: dict[int, subprocess.Popen[bytes]] = {}
        self._count = 0
        self.host = f"{self.NETWORK}.1"
        self.address = f"{self.host}:{self.PORT}"
        try:
            _ip("link", "add", self._tag, "type", "bridge")
            _ip("addr", "add", f"{self.GATEWAY}/24", "dev", self._tag)
            _ip("link", "set", self._tag, "up")
            self.add()
        except BaseException:
            self.stop()
            raise

    def add(self) -> int:
        """Start another node; returns its number."""
        node = self._count
        self._count += 1
        self._make_host(node)
        role = ["--head", "--port", str(self.PORT), f"--include-dashboard={self._dashboard}"]
        role += ["--system-config", HEALTH_CHECKS]
        if node:
            role = ["--address", self.address]
        size = ["--num-cpus", str(CPUS), "--num-gpus", "0"]
        size += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
        size += ["--node-ip-address", f"{self.NETWORK}.{node + 1}"]
        command = [*_program("ray.scripts.scripts"), "start", *role, *size, "--disable-usage-stats"]
        for attempt in range(START_ATTEMPTS):
            try:
                self._on(node, command)
                return node
            except NodesError:
                # Ray gives a raylet 30 s, which is little on a busy machine.
                self._end_all_but_holder(node)
                if attempt == START_ATTEMPTS - 1:
                    raise
        return node

    def _end_all_but_holder(self, node: int) -> None:
        for pid in self._pids(node):
            if pid != self._holders[node].pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _make_host(self, node: int) -> None:
        name, cable = self._name(node), self._cable(node)
        _ip("netns", "add", name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", cable, "master", self._tag, "up")
        inside = ["ip", "netns", "exec", name, "ip"]
        for step in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{self.NETWORK}.{node + 1}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["route", "add", "default", "via", self.GATEWAY],
        ):
            _run([*inside, *step])
        # Keeps the host's mounts and name; Ray's folder and shared memory are the host's own.
        script = (
            f"mkdir -p {RAY_FOLDER} && mount -t tmpfs tmpfs {RAY_FOLDER} && mount -t tmpfs tmpfs /dev/shm && "
            f"hostname {name} && echo ready && exec sleep infinity"
        )
        command = ["ip", "netns", "exec", name, "unshare", "-m", "-u", "sh", "-c", script]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        self._holders[node] = holder
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != b"ready":
            raise NodesError(f"host {name} could not be set up")

    def _name(self, node: int) -> str:
        return f"{self._tag}-{node}"

    def _cable(self, node: int) -> str:
        return f"{self._tag}v{node}"

    def _on(self, node: int, command: Sequence[str], timeout: float = NODE_TIMEOUT_S) -> str:
        return _run(self._enter(node, command), timeout=timeout, env={**os.environ, **self.environment()})

    def _enter(self, node: int, command: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self._holders[node].pid), "-m", "-u", "-n", "--", *command]

    def command(self, command: Sequence[str]) -> list[str]:
        """``command`` as it is run on the head node."""
        return self._enter(0, command)

    def environment(self) -> dict[str, str]:
        """gloo must be told the interface: a host name that nobody resolves would make it use loopback."""
        return {"GLOO_SOCKET_IFNAME": "eth0", "RAY_ADDRESS": self.address}

    def ray(self, code: str) -> str:
        """Output of a Python program on the head node that is connected to the cluster."""
        return self._on(0, [sys.executable, "-c", _connected(self.address, code)])

    def kill(self, node: int) -> None:
        """End everything that runs on a node, at once."""
        holder = self._holders.pop(node)
        for pid in self._pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        holder.wait()

    def _pids(self, node: int) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self._name(node)], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    def cut(self, node: int) -> None:
        """Pull a node's cable: packets are lost, nobody is told."""
        _ip("link", "set", self._cable(node), "down")

    def mend(self, node: int) -> None:
        """Put the cable back."""
        _ip("link", "set", self._cable(node), "up")

    def stop(self) -> None:
        """End all nodes and take the network away."""
        for node in range(self._count):
            for _ in range(50):
                pids = self._pids(node)
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if not pids:
                    break
                time.sleep(0.1)
            subprocess.run(["ip", "netns", "del", self._name(node)], capture_output=True)
            subprocess.run(["ip", "link", "del", self._cable(node)], capture_output=True)
        for holder in self._holders.values():
            holder.wait(10)
        self._holders.clear()
        subprocess.run(["ip", "link", "del", self._tag], capture_output=True)


class FakeNodes:
    """Ray's test cluster: nodes that share address, host name and files."""

    kind = "Ray's fake cluster"
    host = "127.0.0.1"

    def __init__(self, logs: Path) -> None:
        from ray.cluster_utils import Cluster

        del logs
        self._cluster = Cluster(initialize_head=True, head_node_args=self._arguments())
        self._nodes: list[Any] = [self._cluster.head_node]
        self.address = self._cluster.address

    @staticmethod
    def _arguments() -> dict[str, Any]:
        return {
            "num_cpus": CPUS,
            "num_gpus": 0,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }

    def add(self) -> int:
        """Start another node; returns its number."""
        self._nodes.append(self._cluster.add_node(**self._arguments()))
        return len(self._nodes) - 1

    def kill(self, node: int) -> None:
        """End a node at once."""
        self._cluster.remove_node(self._nodes[node], allow_graceful=False)

    def command(self, command: Sequence[str]) -> list[str]:
        """``command`` itself."""
        return list(command)

    def environment(self) -> dict[str, str]:
        """Variables for servers."""
        return {"RAY_ADDRESS": self.address}

    def ray(self, code: str) -> str:
        """Output of a Python program that is connected to the cluster."""
        return _run([sys.executable, "-c", _connected(self.address, code)], timeout=NODE_TIMEOUT_S)

    def stop(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def leftovers(nodes: Nodes) -> str:
    """Actors that live and placement groups that are not removed, as text; empty if there are none."""
    code = (
        "from ray._private.state import actors\n"
        "from ray.util import placement_group_table\n"
        "left = [a['Name'] for a in actors().values() if a['State'] not in ('DEAD',)]\n"
        "left += [g['name'] or g['placement_group_id'] for g in placement_group_table().values()"
        " if g['state'] != 'REMOVED']\n"
        "print('LEFT', *left)"
    )
    line = next(line for line in nodes.ray(code).splitlines() if line.startswith("LEFT"))
    return line.removeprefix("LEFT").strip()


def pid_of_rank(nodes: Nodes, tp_rank: int) -> int:
    """Process id of the one live rank with this number."""
    code = (
        "from ray._private.state import actors\n"
        f"print('PID', *[a['Pid'] for a in actors().values() if a['State'] == 'ALIVE'"
        f" and '_tp{tp_rank}_' in a['Name']])"
    )
    line = next(line for line in nodes.ray(code).splitlines() if line.startswith("PID"))
    (pid,) = line.split()[1:]
    return int(pid)


def _connected(address: str, code: str) -> str:
    start = f"import ray\nray.init({address!r}, log_to_driver=False, logging_level='ERROR')\n"
    return f"{start}{code}\nray.shutdown()\n"


def _program(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: Sequence[str], timeout: float = 30, env: Mapping[str, str] | None = None) -> str:
    # Output goes to a file: daemons that a command leaves behind would keep a pipe open.
    import tempfile

    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env=env,
        )
        output.seek(0)
        text = output.read()
    if done.returncode:
        raise NodesError(f"{' '.join(command)}: status {done.returncode}\n{text[-3000:]}")
    return text
