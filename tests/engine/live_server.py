"""A real server on this machine, and the few calls that the engine tests make to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from serving import STRICT_MEMORY_CHECKS, free_port

#: Seconds that a server may take to start, and a request to be answered, on a busy machine.
START_TIMEOUT_S = 400
REQUEST_TIMEOUT_S = 300

#: Seconds in which a server may end by itself. SGLang takes the end of its scheduler for a crash and waits
#: for five seconds then, which no test is about.
GRACE_S = 1.0

#: Folder of the test-only plugin, and the variable that names its control file.
SABOTAGE_FOLDER = Path(__file__).parent / "sabotage_plugin"
SABOTAGE_FILE = "SABOTAGE_FILE"


@dataclass(frozen=True)
class Request:
    """One request of ``POST /generate``.

    Attributes:
        prompt: token ids.
        marked: whether it is deterministic.
        sampling: further sampling parameters.
    """

    prompt: tuple[int, ...]
    marked: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def body(self) -> dict[str, Any]:
        """What is posted."""
        mark = {"is_deterministic": True} if self.marked else {}
        return {"input_ids": list(self.prompt), "sampling_params": {**self.sampling, **mark}}


@dataclass(frozen=True)
class Output:
    """What a request returned; equality leaves out ``meta``, which tells about the way there.

    Attributes:
        token_ids: output token ids.
        text: output text, empty where the server has no tokenizer.
        finish: finish reason as SGLang gives it.
        meta: everything in ``meta_info``.
    """

    token_ids: tuple[int, ...]
    text: str
    finish: Mapping[str, Any] | None
    meta: Mapping[str, Any] = field(compare=False, repr=False)

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Output:
        """From one answer of ``POST /generate``."""
        meta = answer["meta_info"]
        return cls(tuple(answer["output_ids"]), answer.get("text") or "", meta["finish_reason"], meta)


class ServerError(RuntimeError):
    """The server did not start, ended, or refused a request; the message holds the end of its log."""


class Server:
    """``python -m sglang_ext.launch_server`` in processes of its own.

    Args:
        model: folder of the model.
        log: file for everything that the server prints.
        flags: further command-line flags.
        environment: further environment variables.
        host: address to listen on.
        wrap: makes of the command the one that is run, to run it elsewhere.
        grace_s: seconds that :meth:`stop` gives it to end by itself.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        wrap: Callable[[Sequence[str]], Sequence[str]] = list,
        grace_s: float = GRACE_S,
    ) -> None:
        self.log = log
        self._grace_s = grace_s
        port = free_port()
        self.url = f"http://{host}:{port}"
        command = [sys.executable, "-m", "sglang_ext.launch_server", "--model-path", str(model)]
        command += ["--host", host, "--port", str(port), "--skip-server-warmup", *flags]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                wrap(command),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **STRICT_MEMORY_CHECKS, **(environment or {})},
            )

    # Life

    def wait_until_ready(self) -> None:
        """Return when the server answers.

        Raises:
            ServerError: it ended first, or START_TIMEOUT_S passed.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with status {self.process.returncode}:\n{self.tail()}")
            try:
                if requests.get(f"{self.url}/model_info", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass  # not listening yet
            time.sleep(0.25)
        raise ServerError(f"the server did not answer within {START_TIMEOUT_S} s:\n{self.tail()}")

    def stop(self) -> None:
        """End the server and all of its processes, which share a process group."""
        for how, seconds in ((signal.SIGTERM, self._grace_s), (signal.SIGKILL, 20.0)):
            try:
                os.killpg(self.process.pid, how)
            except ProcessLookupError:
                break
            try:
                self.process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait(timeout=20)

    def tail(self, lines: int = 40) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # Calls

    def post(self, path: str, body: Mapping[str, Any] | None = None, **kwargs: Any) -> requests.Response:
        """``POST path``; the answer may be an error of the request's.

        Raises:
            ServerError: there is no answer.
        """
        try:
            return requests.post(f"{self.url}{path}", json=body, timeout=REQUEST_TIMEOUT_S, **kwargs)
        except requests.RequestException as error:
            raise ServerError(f"POST {path}: {error}\n{self.tail()}") from error

    def generate(self, request: Request, **fields: Any) -> Output:
        """Run one request; ``fields`` are put into the body beside it."""
        answer = self.post("/generate", {**request.body(), **fields})
        if answer.status_code != 200:
            raise ServerError(f"POST /generate: {answer.status_code} {answer.text[:500]}\n{self.tail()}")
        return Output.of(answer.json())

    def stream(self, request: Request, **fields: Any) -> Iterator[Output]:
        """Run one request and yield what has come of it after each message."""
        body = {**request.body(), **fields, "stream": True}
        with self.post("/generate", body, stream=True) as answer:
            for line in answer.iter_lines():
                data = line.removeprefix(b"data: ")
                if data and data != b"[DONE]":
                    yield Output.of(json.loads(data))

    def together(self, crowd: Sequence[Request], gap_s: float = 0.01) -> list[Output]:
        """Run ``crowd`` at the same time, arriving one after the other."""
        return at_once([lambda request=request: self.generate(request) for request in crowd], gap_s)

    def abort(self, rid: str) -> None:
        """Ask for the end of one request."""
        self.post("/abort_request", {"rid": rid})

    def flush_cache(self) -> None:
        """Empty the prefix cache, as soon as no request is left.

        Raises:
            ServerError: the server still has requests after 30 s.
        """
        answer = self.post("/flush_cache?timeout=30")
        if answer.status_code != 200:
            raise ServerError(f"POST /flush_cache: {answer.text}\n{self.tail()}")

    def used_slots(self) -> int:
        """Slots of the KV pool that are neither free nor only cached."""
        loads = requests.get(f"{self.url}/v1/loads", timeout=60).json()["loads"]
        return sum(load["num_used_tokens"] for load in loads)

    def wait_until_idle(self) -> None:
        """Return when no KV slot is in use and SGLang's idle check has run.

        Raises:
            ServerError: some still are after 60 s.
        """
        deadline = time.monotonic() + 60
        while used := self.used_slots():
            if time.monotonic() > deadline:
                raise ServerError(f"{used} slots are still in use\n{self.tail()}")
            time.sleep(0.2)
        time.sleep(1)  # the check runs when nothing is left to do

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels."""
        lines = requests.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0] == name)

    def statistics(self) -> dict[str, int]:
        """LLM-42's counters since :meth:`reset_statistics`."""
        return self.statistics_of_ranks()["dp_0"]

    def statistics_of_ranks(self) -> dict[str, dict[str, int]]:
        """The same of every data-parallel rank."""
        return requests.get(f"{self.url}/llm42_stats", timeout=REQUEST_TIMEOUT_S).json()

    def reset_statistics(self) -> None:
        """Set LLM-42's counters to zero."""
        self.post("/reset_llm42_stats")


def at_once(calls: Sequence[Callable[[], Any]], gap_s: float = 0.01) -> list[Any]:
    """Results of ``calls``, made in threads that start ``gap_s`` seconds after each other."""
    with ThreadPoolExecutor(max(1, len(calls))) as pool:
        futures = []
        for call in calls:
            futures.append(pool.submit(call))
            time.sleep(gap_s)
        return [future.result() for future in futures]


def sabotage_variables(control: Path) -> dict[str, str]:
    """Environment variables of a process with the test-only plugin, which breaks what ``control`` says."""
    path = os.pathsep.join(filter(None, [str(SABOTAGE_FOLDER), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, SABOTAGE_FILE: str(control)}


class SabotagedServer(Server):
    """A server with the test-only plugin, to break ``mode`` from the start or what :meth:`broken` says."""

    def __init__(
        self,
        model: Path,
        log: Path,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        mode: str = "",
    ) -> None:
        self._control = log.with_suffix(".sabotage")
        self._control.write_text(mode)
        super().__init__(model, log, flags, {**sabotage_variables(self._control), **(environment or {})})

    @contextmanager
    def broken(self, mode: str) -> Iterator[None]:
        """Break one thing, named by a ``Mode`` of the plugin; afterwards all is whole and the cache empty."""
        self.break_for_good(mode)
        try:
            yield
        finally:
            self._control.write_text("")
            self.flush_cache()

    def break_for_good(self, mode: str) -> None:
        """The same, and the server is not expected to outlive it."""
        self._control.write_text(mode)


#: ``start_server(model, *flags, **environment)`` of the fixture with this name.
StartServer = Callable[..., Server]


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Wait until ``server`` answers, and stop it afterwards."""
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
