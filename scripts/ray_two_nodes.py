"""The two-node check in one command: 64 deterministic prompts, one node against two, and the failure cases.

    python scripts/ray_two_nodes.py                 network namespaces, else Ray's fake cluster
    python scripts/ray_two_nodes.py --report docs/reports/ray-two-nodes.md

TP=2 over gloo on the CPU with LLM-42 and TokenWeave, a random Llama in which a rounding difference soon
becomes another token. Ends with status 1 if an output differs or a failure case does not end as it should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import requests
from ray_nodes import (
    FakeNodes,
    Namespaces,
    Nodes,
    NodesError,
    leftovers,
    pid_of_rank,
    why_no_namespaces,
)
from serving import machine, say, table

from sglang_ext.ray.status import EXIT_RANK_LOST

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

PROMPTS = 64

#: What can be lost.
CASES = ("rank", "node", "cable")

VOCABULARY = 512
NEW_TOKENS = 16
START_TIMEOUT_S = 1200
REQUEST_TIMEOUT_S = 300
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

FLAGS = ("--tp-size", "2", "--enable-llm42", "--llm42-window-size", "16", "--llm42-verify-batch-size", "4")
FLAGS += ("--max-total-tokens", "8192", "--skip-tokenizer-init", "--skip-server-warmup")
TOKENWEAVE = ("--enable-tokenweave", "--tokenweave-min-tokens", "16")
ON_RAY = ("--use-ray", "--nnodes", "2", "--ray-on-failure", "restart")

#: What every rank with TokenWeave says when its canonical passes are cut.
WOVEN = "TokenWeave: canonical passes of 4 x 16 rows run as two halves"


class CheckError(RuntimeError):
    """The check found what should not be, or could not go on."""


@dataclass
class Server:
    """A server in a process of its own."""

    model: Path
    log: Path
    flags: Sequence[str]
    nodes: Nodes | None = None
    process: subprocess.Popen[bytes] = field(init=False)
    url: str = field(init=False)

    def __post_init__(self) -> None:
        host = "127.0.0.1" if self.nodes is None else self.nodes.host
        port = random.SystemRandom().randrange(20000, 30000)
        self.url = f"http://{host}:{port}"
        command = [sys.executable, "-m", "sglang_ext.launch_server", "--model-path", str(self.model)]
        command += ["--host", host, "--port", str(port), *self.flags]
        variables = {**os.environ, **ENVIRONMENT}
        if self.nodes is not None:
            command = self.nodes.command(command)
            variables |= self.nodes.environment()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=variables
            )

    def wait_until_ready(self) -> float:
        """Seconds until it answers."""
        start = time.monotonic()
        while time.monotonic() - start < START_TIMEOUT_S:
            if self.process.poll() is not None:
                raise CheckError(f"a server ended with status {self.process.returncode}:\n{self._tail()}")
            if self._answers():
                return time.monotonic() - start
            time.sleep(0.2)
        raise CheckError(f"a server did not answer within {START_TIMEOUT_S} s:\n{self._tail()}")

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/model_info", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def _tail(self) -> str:
        return "\n".join(line[:300] for line in self.log.read_text(errors="replace").splitlines()[-40:])

    def post(self, body: dict[str, object]) -> requests.Response:
        """``POST /generate``."""
        return requests.post(f"{self.url}/generate", json=body, timeout=REQUEST_TIMEOUT_S)

    def outputs(self, bodies: Sequence[dict[str, object]], at_once: int = 16) -> list[tuple[int, ...]]:
        """Output token ids of marked requests, many at once."""
        with ThreadPoolExecutor(at_once) as pool:
            answers = list(pool.map(self.post, bodies))
        for answer in answers:
            if answer.status_code != 200 or not answer.json()["output_ids"]:
                raise CheckError(f"POST /generate: {answer.status_code} {answer.text[:300]}")
        return [tuple(answer.json()["output_ids"]) for answer in answers]

    def statistics(self) -> dict[str, int]:
        """LLM-42's counters."""
        return dict(requests.get(f"{self.url}/llm42_stats", timeout=60).json()["dp_0"])

    def fingerprint(self) -> str:
        """The canonical fingerprint."""
        states = requests.get(f"{self.url}/server_info", timeout=60).json()["internal_states"]
        return str(states[0]["llm42_fingerprint"])

    def losses(self) -> int:
        """How often the supervisor has seen the server end because it lost a rank."""
        return self.log.read_text(errors="replace").count(f"ended with status {EXIT_RANK_LOST}")

    def stop(self) -> None:
        """End it and all of its processes."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(30)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Stop ``server`` afterwards."""
    try:
        yield server
    finally:
        server.stop()


def workload() -> list[dict[str, object]]:
    """Bodies of the 64 requests: every fourth greedy, the others sampled in different ways."""
    chance = random.Random(42)
    ways: tuple[dict[str, object], ...] = (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 40},
    )
    return [
        {
            "input_ids": [chance.randrange(2, VOCABULARY) for _ in range(chance.randint(5, 120))],
            "sampling_params": {
                **ways[i % len(ways)],
                "is_deterministic": True,
                "sampling_seed": i,
                "max_new_tokens": NEW_TOKENS,
                "ignore_eos": True,
            },
        }
        for i in range(PROMPTS)
    ]


LONG: dict[str, object] = {
    "input_ids": [5, 6, 7],
    "sampling_params": {"is_deterministic": True, "max_new_tokens": 900, "ignore_eos": True},
}


class Check:
    """The check and what it found."""

    def __init__(
        self, nodes_class: Callable[[Path], Nodes], folder: Path, cases: Sequence[str], tokenweave: bool
    ) -> None:
        from models import write_tiny_llama

        self._nodes_class = nodes_class
        self._folder = folder
        self._cases = cases
        self._tokenweave = tokenweave
        self._flags = (*FLAGS, *TOKENWEAVE) if tokenweave else FLAGS
        self._last = 1  # the newest node
        self._starts = 0
        self.rows: list[tuple[str, str, str, str]] = []
        self.facts: dict[str, str] = {}
        self.model = folder / "model"
        self.model.mkdir()
        write_tiny_llama(self.model, layers=4, hidden=256, intermediate=512, sensitive=True)
        self.bodies = workload()
        self.expected: list[tuple[int, ...]] = []

    def run(self) -> None:
        """All of it.

        Raises:
            CheckError: something is not as it should be.
        """
        self._one_node()
        nodes = self._nodes_class(self._folder)
        try:
            nodes.add()
            with serving(self._server((*self._flags, *ON_RAY), nodes)) as server:
                self._two_nodes(server)
                for case in self._cases:
                    self._fail(case, server, nodes)
                server.process.send_signal(signal.SIGTERM)
                server.process.wait(120)
                self._no_leftovers(nodes)
        finally:
            nodes.stop()

    def _server(self, flags: Sequence[str], nodes: Nodes | None = None) -> Server:
        self._starts += 1
        return Server(self.model, self._folder / f"server-{self._starts}.log", flags, nodes)

    def _one_node(self) -> None:
        say("One node, without Ray")
        with serving(self._server(self._flags)) as server:
            self.facts["start, one node"] = f"{server.wait_until_ready():.0f} s"
            start = time.monotonic()
            self.expected = server.outputs(self.bodies)
            self.facts["64 requests, one node"] = f"{time.monotonic() - start:.1f} s"
            self.facts["canonical fingerprint, one node"] = server.fingerprint()[:16]
        if len(set(self.expected)) != PROMPTS:
            raise CheckError("two of the prompts have the same output: the comparison would show little")

    def _two_nodes(self, server: Server) -> None:
        say("Two nodes")
        self.facts["start, two nodes"] = f"{server.wait_until_ready():.0f} s"
        if self._tokenweave and WOVEN not in server.log.read_text(errors="replace"):
            raise CheckError("no rank says that its canonical passes are woven")
        start = time.monotonic()
        same = self._compare(server, "two nodes")
        self.facts["64 requests, two nodes"] = f"{time.monotonic() - start:.1f} s"
        self.facts["canonical fingerprint, two nodes"] = server.fingerprint()[:16]
        self.facts["rollbacks, two nodes"] = str(server.statistics()["rollbacks"])
        self.rows.append(("two nodes, nothing lost", "-", "-", same))

    def _compare(self, server: Server, when: str) -> str:
        outputs = server.outputs(self.bodies)
        same = sum(a == b for a, b in zip(self.expected, outputs, strict=True))
        say(f"  {when}: {same} of {PROMPTS} outputs as on one node")
        if same != PROMPTS:
            raise CheckError(f"{when}: only {same} of {PROMPTS} outputs are those of one node")
        return f"{same} of {PROMPTS}"

    def _fail(self, case: str, server: Server, nodes: Nodes) -> None:
        if case == "rank":
            pid = pid_of_rank(nodes, 1)
            self._lose("process of rank 1 killed", server, lambda: os.kill(pid, signal.SIGKILL))
        elif case == "node":
            last, self._last = self._last, self._last + 1
            self._lose("node killed, another joins", server, lambda: nodes.kill(last), nodes.add)
        elif isinstance(nodes, Namespaces):
            last, self._last = self._last, self._last + 1
            self._lose("cable cut, another node joins", server, lambda: nodes.cut(last), nodes.add)
        else:
            say(f"{nodes.kind}: there is no cable to cut")

    def _lose(
        self,
        case: str,
        server: Server,
        how: Callable[[], None],
        replace: Callable[[], object] | None = None,
    ) -> None:
        """Lose a rank during a request: when did the client know, when was service back, what comes then?"""
        say(case)
        before = server.statistics()["decode_steps"]
        lost_before = server.losses()
        with ThreadPoolExecutor(1) as pool:
            answer: Future[requests.Response] = pool.submit(server.post, LONG)
            while server.statistics()["decode_steps"] < before + 5:
                time.sleep(0.05)
            start = time.monotonic()
            how()
            status = answer.result(180).status_code
            known = time.monotonic() - start
        say(f"  the client knew after {known:.1f} s: status {status}")
        if status != 503:
            raise CheckError(f"{case}: the request in flight got status {status}, not 503")
        while server.losses() == lost_before:
            time.sleep(0.1)
        ended = time.monotonic() - start
        joined = ""
        if replace is not None:
            replace()
            joined = f", the node had joined after {time.monotonic() - start:.0f} s"
        server.wait_until_ready()
        back = time.monotonic() - start
        say(f"  the server ended after {ended:.1f} s, service was back after {back:.0f} s")
        same = self._compare(server, "afterwards")
        self.rows.append((case, f"{known:.1f} s (503)", f"{back:.0f} s{joined}", same))

    def _no_leftovers(self, nodes: Nodes) -> None:
        for _ in range(60):
            left = leftovers(nodes)
            if not left:
                return
            time.sleep(1)
        raise CheckError(f"left behind on the cluster: {left}")

    def report(self, kind: str) -> str:
        """Markdown."""
        header = ("case", "client knew", "service back", f"outputs as on one node (of {PROMPTS})")
        return "\n".join(
            [
                "# Two Ray nodes on one machine",
                "",
                f"`python scripts/ray_two_nodes.py`, nodes: {kind}. TP=2 over gloo, LLM-42 with W=16,",
                f"G=4, TokenWeave {'on' if self._tokenweave else 'off'}, a random Llama with 4 layers;",
                f"{PROMPTS} deterministic prompts, {NEW_TOKENS} new tokens each, 16 at once,",
                "against the outputs of a server without Ray on one node.",
                "",
                table(header, self.rows),
                "",
                table(("fact", "value"), self.facts.items()),
                "",
                table(("machine", ""), machine().items()),
                "",
            ]
        )


def main() -> int:
    """Run the check; 1 if it failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", choices=("auto", "namespaces", "fake"), default="auto")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="what is lost, in turn")
    parser.add_argument("--without-tokenweave", action="store_true")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    reason = why_no_namespaces()
    if options.nodes == "namespaces" and reason:
        parser.error(f"--nodes namespaces: {reason}")
    fake = options.nodes == "fake" or (options.nodes == "auto" and reason is not None)
    if fake and reason:
        say(f"Ray's fake cluster instead of network namespaces: {reason}")
    nodes_class: Callable[[Path], Nodes] = FakeNodes if fake else Namespaces
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="sglang_ext_ray_"))
    say(f"Logs: {folder}")
    check = Check(nodes_class, folder, options.cases, not options.without_tokenweave)
    try:
        check.run()
    except (CheckError, NodesError) as error:
        say(f"FAILED: {error}")
        return 1
    text = check.report(FakeNodes.kind if fake else Namespaces.kind)
    if options.report is not None:
        options.report.write_text(text)
    print(text)
    (folder / "rows.json").write_text(json.dumps({"rows": check.rows, "facts": check.facts}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
