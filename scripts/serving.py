"""What programs of this folder share: a server of their own, its HTTP client, prompts, machine, tables."""

from __future__ import annotations

import json
import os
import platform
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import requests

#: Seconds to wait for a server to answer, for one generation, and for an idle moment in which to flush.
START_TIMEOUT_S = 600
REQUEST_TIMEOUT_S = 900
FLUSH_TIMEOUT_S = 60

#: Ports of servers. Below those that Linux gives to outgoing connections, one of which could take the port
#: before the server, half a minute later, listens on it.
PORTS = range(20_000, 32_000)

PROMPTS_FILE = Path(__file__).parent / "data" / "prompts.json"

#: Packages whose version can change results or timings.
PACKAGES = ("sglang", "torch", "transformers", "sglang_ext")


#: SGLang ends the scheduler at the first KV slot that is lost, freed twice or used after it was freed.
STRICT_MEMORY_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


class ServingError(RuntimeError):
    """The server cannot be used; the message says why."""


def say(line: str, end: str = "\n") -> None:
    """Print progress on standard error."""
    print(line, file=sys.stderr, end=end, flush=True)


@dataclass(frozen=True)
class Output:
    """What one request returned.

    Attributes:
        ids: output token ids, at least one.
        text: output text.
        finish: finish reason as the server gives it, as JSON.
        meta: the rest of what is of interest in ``meta_info``.
    """

    ids: tuple[int, ...]
    text: str
    finish: str
    meta: dict[str, Any] = field(default_factory=dict, compare=False)

    def differences(self, reference: Output) -> tuple[str, ...]:
        """Which of ``tokens``, ``text`` and ``finish reason`` differ from those of ``reference``."""
        pairs = {
            "tokens": (self.ids, reference.ids),
            "text": (self.text, reference.text),
            "finish reason": (self.finish, reference.finish),
        }
        return tuple(name for name, (mine, theirs) in pairs.items() if mine != theirs)

    def first_difference(self, reference: Output) -> int | None:
        """Index of the first output token that differs, or None if all token ids are equal."""
        if self.ids == reference.ids:
            return None
        pairs = enumerate(zip(self.ids, reference.ids, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.ids), len(reference.ids)))


class Client:
    """The HTTP calls of one server.

    Args:
        url: the server's base URL.
        enable_llm42: whether it serves deterministic requests.
    """

    #: Parts of ``meta_info`` that are kept.
    META = (
        "cached_tokens",
        "llm42_num_rollbacks",
        "llm42_tokens_rolled_back",
        "llm42_num_verification_windows",
        "llm42_digest",
    )

    def __init__(self, url: str, enable_llm42: bool) -> None:
        self.url = url
        self.enable_llm42 = enable_llm42

    def generate(self, prompt: str | Sequence[int], marked: bool, sampling: dict[str, Any]) -> Output:
        """Run one prompt, as text or as token ids, through ``POST /generate``.

        Raises:
            ServingError: it was refused, returned nothing, or was marked and not treated as deterministic.
        """
        params = {**sampling, "is_deterministic": True} if marked else sampling
        body: dict[str, Any] = {"sampling_params": params}
        body |= {"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}
        reply = requests.post(f"{self.url}/generate", json=body, timeout=REQUEST_TIMEOUT_S)
        if reply.status_code != 200:
            raise ServingError(f"POST /generate: {reply.status_code} {reply.text[:500]}")
        answer = reply.json()
        meta = answer["meta_info"]
        if marked and "llm42_num_rollbacks" not in meta:
            raise ServingError("the server ignored is_deterministic: is --enable-llm42 among its flags?")
        if not answer["output_ids"]:
            raise ServingError(f"no output tokens; meta_info is {meta}")
        return Output(
            ids=tuple(answer["output_ids"]),
            text=answer["text"],
            finish=json.dumps(meta["finish_reason"], sort_keys=True),
            meta={name: meta[name] for name in self.META if name in meta},
        )

    def generate_batch(self, body: Mapping[str, Any]) -> tuple[float, list[dict[str, Any]]]:
        """Send many prompts in one ``POST /generate``; seconds until all answers are there, and these.

        Raises:
            ServingError: it was refused.
        """
        payload = json.dumps(body)
        start = time.perf_counter()
        reply = requests.post(
            f"{self.url}/generate",
            data=payload,
            headers={"Content-Type": "application/json"},
            timeout=REQUEST_TIMEOUT_S,
        )
        seconds = time.perf_counter() - start
        if reply.status_code != 200:
            raise ServingError(f"POST /generate: {reply.status_code} {reply.text[:500]}")
        return seconds, reply.json()

    def flush_cache(self) -> None:
        """Empty the prefix cache; the server refuses while requests are running, so try for a while.

        Raises:
            ServingError: it still refuses after :data:`FLUSH_TIMEOUT_S`.
        """
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while requests.post(f"{self.url}/flush_cache", timeout=REQUEST_TIMEOUT_S).status_code != 200:
            if time.monotonic() > deadline:
                raise ServingError(f"POST /flush_cache: the server still refuses after {FLUSH_TIMEOUT_S} s")
            time.sleep(0.05)

    def statistics(self) -> dict[str, int]:
        """Counters of ``GET /llm42_stats``; empty for a server without deterministic requests."""
        if not self.enable_llm42:
            return {}
        reply = requests.get(f"{self.url}/llm42_stats", timeout=REQUEST_TIMEOUT_S)
        reply.raise_for_status()
        return dict(reply.json()["dp_0"])


def increase(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """By how much each counter grew."""
    return {name: value - before.get(name, 0) for name, value in after.items()}


def total(counters: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sum of counters by name."""
    result: dict[str, int] = {}
    for row in counters:
        for name, value in row.items():
            result[name] = result.get(name, 0) + value
    return result


def free_port() -> int:
    """A port of loopback that nobody listens on, whatever seed this process has set.

    Raises:
        ServingError: all of :data:`PORTS` are taken.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServingError(f"all ports from {PORTS.start} to {PORTS.stop - 1} are taken")


@dataclass
class Server:
    """A running server.

    Attributes:
        client: its HTTP client.
        log: what it writes to its standard output and error.
        process: its first process, leader of a process group of its own.
    """

    client: Client
    log: Path
    process: subprocess.Popen[bytes]

    def tail(self, lines: int = 30) -> str:
        """The end of the log."""
        return _tail(self.log, lines)

    def count_in_log(self, text: str) -> int:
        """Lines of the log that contain ``text``."""
        return sum(text in line for line in self.log.read_text(errors="replace").splitlines())


@contextmanager
def server(
    flags: Sequence[str], name: str = "server", environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start ``python -m sglang_ext.launch_server`` on a free port on loopback, stop it at the end.

    Args:
        flags: its command line, without the port.
        name: of its log.
        environment: environment variables beside this process's own.

    Raises:
        ServingError: it ended or did not answer in time; the message has the end of its log.
    """
    port = free_port()
    # Of several servers that start at once, SGLang may give two the same port for their ranks.
    ranks = () if "--nccl-port" in flags else ("--nccl-port", str(free_port()))
    command = [sys.executable, "-m", "sglang_ext.launch_server", *flags, "--port", str(port), *ranks]
    log = Path(tempfile.mkdtemp(prefix="sglang_ext_")) / f"{name}.log"
    say(f"Starting {name} (log: {log})\n  {shlex.join(command[1:])}")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, url, log)
        yield Server(Client(url, "--enable-llm42" in flags), log, process)
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < START_TIMEOUT_S:
        if process.poll() is not None:
            raise ServingError(f"the server ended with status {process.returncode}:\n{_tail(log)}")
        try:
            if requests.get(f"{url}/health", timeout=5).status_code == 200:
                say(f"  ready after {elapsed:.0f} s")
                return
        except requests.RequestException:
            pass  # not listening yet
        time.sleep(0.5)
    raise ServingError(f"the server did not answer within {START_TIMEOUT_S} s:\n{_tail(log)}")


def _tail(log: Path, lines: int = 30, width: int = 300) -> str:
    """The end of a log, without the rest of very long lines: SGLang logs all its arguments in one."""
    return "\n".join(line[:width] for line in log.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its scheduler processes, which share its process group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=20)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def exit_on_termination() -> None:
    """Let SIGTERM leave through every ``finally``, so that servers are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


# Prompts


def messages(data: dict[str, Any], prompt: dict[str, str]) -> list[dict[str, str]]:
    """Chat messages of one entry of the prompts file."""
    system = [{"role": "system", "content": data["systems"][prompt["system"]]}] if "system" in prompt else []
    document = data["documents"][prompt["document"]] + "\n\n" if "document" in prompt else ""
    return [*system, {"role": "user", "content": document + prompt["user"]}]


def load_prompts(model: str) -> list[list[int]]:
    """Token ids of all prompts, under the chat template of ``model``.

    Raises:
        OSError: the model has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    from sglang_ext import demo_model

    data = json.loads(PROMPTS_FILE.read_text())
    tokenizer = AutoTokenizer.from_pretrained(demo_model.resolve(model))
    return [
        list(
            tokenizer.apply_chat_template(
                messages(data, prompt), add_generation_prompt=True, return_dict=False
            )
        )
        for prompt in data["prompts"]
    ]


# Reports


def machine() -> dict[str, str]:
    """Processor, cores and versions: what figures of this machine depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = {
        "CPU": f"{_cpu_model()} ({platform.machine()})",
        "cores": str(cores),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "system": platform.system(),
        "Python": platform.python_version(),
    }
    return rows | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from source"


def _cpu_model() -> str:
    """The processor's name, with family and model, since virtual machines often hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    name = values.get("model name", "unknown")
    if "cpu family" in values and "model" in values:
        name += f", family {values['cpu family']} model {values['model']}"
    return name


def without_files(argv: Sequence[str], options: Sequence[str], switches: Sequence[str] = ()) -> list[str]:
    """A command line for a report: without what only says where files are on the machine that wrote it.

    Args:
        argv: the words behind the program's name.
        options: names of options to leave out, each with its value; ``--name value`` and ``--name=value``.
        switches: names of options without a value to leave out.
    """
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in options:
            next(words, None)
        elif word not in switches and word.partition("=")[0] not in options:
            kept.append(word)
    return kept


def kept_in_docs(program: str, argv: Sequence[str]) -> str:
    """Command line of a program whose ``--output`` is a folder, for a file of ``docs/benchmarks``."""
    return shlex.join([program, "--output", "docs/benchmarks", *without_files(argv, ("--output",))])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def share(part: int, whole: int) -> str:
    """``part`` of ``whole`` as a percentage, or a dash if there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
