"""Show what the project is for: the same prompts, stock and deterministic, while the server's load changes.

Starts ``python -m sglang_ext.launch_server`` on this machine, sends every prompt unmarked and marked, alone
and in crowds of several sizes, with cold and warm prefix cache, and prints where outputs differ from those of
the first run. Exit status: 0 if every deterministic output is identical to its first, 1 if one differs, 2 if
the server could not be used.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

#: Seconds to wait for the server to answer, and for one generation.
START_TIMEOUT_S = 300
REQUEST_TIMEOUT_S = 300

#: Small canonical passes (16 tokens x 4 requests): two CPU cores have no use for the default's 64 x 8.
SERVER_FLAGS = ("--enable-llm42", "--llm42-window-size", "16", "--llm42-verify-batch-size", "4")

GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "sampling_seed": 7}

PROMPTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Explain in a few sentences why the sky is blue.", GREEDY),
    ("Write a short story about a lighthouse keeper and a storm.", GREEDY),
    ("List five uses of a paper clip, with a reason for each.", GREEDY),
    ("What should I think about when I plan a small garden?", GREEDY),
    ("Invent a name for a bakery and describe what it sells.", SAMPLED),
    ("Describe a morning in a busy harbour.", SAMPLED),
)

NEIGHBOURS = (
    "Tell me about the history of bicycles.",
    "Count from one to fifty in words.",
    "Write a poem about autumn leaves, rivers, wind and the first snow of the year.",
    "Why do cats purr?",
    "Summarise the plot of a detective story that takes place on a train in winter.",
)


class DemoError(RuntimeError):
    """The demonstration cannot go on; the message says why."""


@dataclass(frozen=True)
class Condition:
    """One load under which every prompt is run.

    Attributes:
        name: column heading.
        crowd: number of requests sent together; 1 is alone.
        warm: whether the prefix cache is left as the run before filled it, instead of emptied.
    """

    name: str
    crowd: int
    warm: bool


#: The first is the reference that the others are compared with. The crowd of 17 holds all prompts at once,
#: so after it every one of them is in the prefix cache.
CONDITIONS = (
    Condition("alone", 1, warm=False),
    Condition("crowd of 3", 3, warm=False),
    Condition("crowd of 8", 8, warm=False),
    Condition("crowd of 17", 17, warm=False),
    Condition("17, warm", 17, warm=True),
    Condition("alone, warm", 1, warm=True),
)


@dataclass(frozen=True)
class Subject:
    """A prompt that is watched, unmarked ("stock") or marked deterministic."""

    prompt: int
    marked: bool


@dataclass(frozen=True)
class Output:
    """What one request returned.

    Attributes:
        ids: output token ids.
        text: output text.
        finish: finish reason as the server gives it.
        rollbacks: how often candidates were rolled back; 0 for an unmarked request.
        cached: prompt tokens that came from the prefix cache.
    """

    ids: tuple[int, ...]
    text: str
    finish: str
    rollbacks: int
    cached: int

    def difference(self, reference: Output) -> int | None:
        """Index of the first token that differs, or None if ids, text and finish reason are identical."""
        if (self.ids, self.text, self.finish) == (reference.ids, reference.text, reference.finish):
            return None
        pairs = enumerate(zip(self.ids, reference.ids, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.ids), len(reference.ids)))


Results = dict[tuple[Condition, Subject], Output]


def say(line: str) -> None:
    """Print one line of progress."""
    print(line, file=sys.stderr, flush=True)


class Client:
    """The few HTTP calls that the demonstration needs."""

    def __init__(self, url: str, new_tokens: int) -> None:
        self.url = url
        self.new_tokens = new_tokens

    def generate(self, prompt: str, marked: bool, sampling: dict[str, Any]) -> Output:
        """Run one chat prompt through ``POST /generate``.

        Raises:
            DemoError: the server refused it, or did not treat a marked request as deterministic.
        """
        params = {"max_new_tokens": self.new_tokens, **sampling}
        if marked:
            params["is_deterministic"] = True
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        body: dict[str, Any] = {"text": text, "sampling_params": params}
        reply = requests.post(f"{self.url}/generate", json=body, timeout=REQUEST_TIMEOUT_S)
        if reply.status_code != 200:
            raise DemoError(f"POST /generate: {reply.status_code} {reply.text[:500]}")
        answer = reply.json()
        meta = answer["meta_info"]
        if marked and "llm42_num_rollbacks" not in meta:
            raise DemoError("the server ignored is_deterministic: was it started with --enable-llm42?")
        return Output(
            ids=tuple(answer["output_ids"]),
            text=answer["text"],
            finish=str(meta["finish_reason"]),
            rollbacks=meta["llm42_num_rollbacks"] if marked else 0,
            cached=meta["cached_tokens"],
        )

    def flush_cache(self) -> None:
        """Empty the prefix cache; the server refuses while requests are running, so try for a while."""
        deadline = time.monotonic() + 20
        while requests.post(f"{self.url}/flush_cache", timeout=REQUEST_TIMEOUT_S).status_code != 200:
            if time.monotonic() > deadline:
                raise DemoError("POST /flush_cache: the server still refuses after 20 s")
            time.sleep(0.1)


def crowds(subjects: Sequence[Subject], condition: Condition) -> Iterator[list[Subject]]:
    """Share the subjects out over crowds of one size, leaving at least a quarter of each to neighbours."""
    room = max(1, condition.crowd * 3 // 4)
    for start in range(0, len(subjects), room):
        yield list(subjects[start : start + room])


def run_crowd(client: Client, subjects: Sequence[Subject], size: int) -> list[Output]:
    """Send ``subjects`` together with neighbours that fill the crowd up to ``size``; outputs of the subjects.

    Neighbours are of other lengths, every second one is marked, and they sample with top_p.
    """
    with ThreadPoolExecutor(size) as pool:
        neighbours = []
        for index in range(size - len(subjects)):
            sampling = {"temperature": 1.0, "top_p": 0.9, "sampling_seed": index}
            prompt = NEIGHBOURS[index % len(NEIGHBOURS)]
            neighbours.append(pool.submit(client.generate, prompt, index % 2 == 1, sampling))
        watched = []
        for subject in subjects:
            text, sampling = PROMPTS[subject.prompt]
            watched.append(pool.submit(client.generate, text, subject.marked, sampling))
            time.sleep(0.01)  # arrive one after the other, as requests do
        for neighbour in neighbours:
            neighbour.result()
        return [future.result() for future in watched]


def run_condition(client: Client, condition: Condition) -> Results:
    """Run every prompt, unmarked and marked, under one condition."""
    subjects = [Subject(prompt, marked) for prompt in range(len(PROMPTS)) for marked in (False, True)]
    results: Results = {}
    start = time.monotonic()
    for group in crowds(subjects, condition):
        if not condition.warm:
            client.flush_cache()
        for subject, output in zip(group, run_crowd(client, group, condition.crowd), strict=True):
            results[condition, subject] = output
    cached = sum(output.cached for output in results.values())
    elapsed = time.monotonic() - start
    say(f"  {condition.name:<12} {len(results)} outputs in {elapsed:3.0f} s, {cached} prompt tokens cached")
    return results


def count_differences(results: Results, marked: bool) -> tuple[int, int]:
    """How many outputs differ from the first condition's, and how many were compared."""
    compared = [
        output.difference(results[CONDITIONS[0], subject])
        for (condition, subject), output in results.items()
        if subject.marked is marked and condition != CONDITIONS[0]
    ]
    return sum(index is not None for index in compared), len(compared)


def print_table(results: Results) -> None:
    """Two lines for each prompt: where the stock and the deterministic outputs leave their first one."""
    widths = [max(len(condition.name), 11) for condition in CONDITIONS]
    headings = "  ".join(c.name.ljust(width) for c, width in zip(CONDITIONS, widths, strict=True))
    print(f"\n{'':15}{headings}  rollbacks")
    for prompt, (text, sampling) in enumerate(PROMPTS):
        kind = "greedy" if sampling is GREEDY else f"temperature {sampling['temperature']}, seeded"
        print(f"\n{text}  ({kind})")
        for marked in (False, True):
            subject = Subject(prompt, marked)
            cells = [_cell(results, condition, subject) for condition in CONDITIONS]
            rollbacks = sum(results[condition, subject].rollbacks for condition in CONDITIONS)
            line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            name = "deterministic" if marked else "stock"
            print(f"{name:<15}{line}  {rollbacks if marked else '-'}")


def _cell(results: Results, condition: Condition, subject: Subject) -> str:
    first = results[CONDITIONS[0], subject]
    if condition == CONDITIONS[0]:
        return f"{len(first.ids)} tokens"
    index = results[condition, subject].difference(first)
    return "identical" if index is None else f"token {index}"


def print_summary(results: Results) -> None:
    """What the table amounts to."""
    print("\n'token 12' means: output differs from the first column's from its token 12 on.\n")
    for name, marked in (("stock", False), ("deterministic", True)):
        different, compared = count_differences(results, marked)
        print(f"{name + ':':<15}{different} of {compared} outputs differ from those of the same prompt alone")
    rollbacks = sum(output.rollbacks for output in results.values())
    print(f"{'rollbacks:':<15}{rollbacks} times verification rejected candidates of the requests above")


@contextmanager
def server(model: str, extra_flags: Sequence[str]) -> Iterator[str]:
    """Start the server on a free port, wait until it answers, yield its URL, and stop it.

    Raises:
        DemoError: it ended or did not answer in time; the message has the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "sglang_ext.launch_server",
        *server_flags(model, extra_flags),
        "--port",
        str(port),
    ]
    log = Path(tempfile.mkdtemp(prefix="sglang_ext_demo_")) / "server.log"
    say(f"Starting the server (log: {log})\n  {shlex.join(command)}")
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def server_flags(model: str, extra_flags: Sequence[str]) -> list[str]:
    """Flags of the demonstration's server, without its port."""
    return ["--model-path", model, *SERVER_FLAGS, *extra_flags]


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return when ``GET /health`` answers 200.

    Raises:
        DemoError: the process ended first, or START_TIMEOUT_S passed.
    """
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < START_TIMEOUT_S:
        if process.poll() is not None:
            raise DemoError(f"the server ended with status {process.returncode}:\n{tail(log)}")
        try:
            if requests.get(f"{url}/health", timeout=5).status_code == 200:
                say(f"  ready after {elapsed:.0f} s")
                return
        except requests.RequestException:
            pass  # not listening yet
        time.sleep(0.5)
    raise DemoError(f"the server did not answer within {START_TIMEOUT_S} s:\n{tail(log)}")


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its scheduler processes, which share its process group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=15)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="scripts/demo.sh"
    )
    parser.add_argument("--model", default="smollm2", help="a ChatML model (default: the demo model)")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of an answer (default: 64)")
    parser.add_argument("--url", help="use this running server and start none")
    parser.add_argument("--keep", action="store_true", help="leave the server running until Ctrl-C")
    parser.add_argument("server_args", nargs="*", help="further flags of the server, after --")
    return parser.parse_args()


def demonstrate(url: str, new_tokens: int) -> bool:
    """Run and print everything; whether all deterministic outputs are identical to their first."""
    client = Client(url, new_tokens)
    say(f"Running {len(PROMPTS)} prompts, stock and deterministic, under {len(CONDITIONS)} loads")
    results: Results = {}
    for condition in CONDITIONS:
        results |= run_condition(client, condition)
    print_table(results)
    print_summary(results)
    return count_differences(results, marked=True)[0] == 0


def main() -> int:
    """Exit status as in the module's text."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through server(), which ends the server
    try:
        if arguments.url:
            return 0 if demonstrate(arguments.url, arguments.new_tokens) else 1
        with server(arguments.model, arguments.server_args) as url:
            identical = demonstrate(url, arguments.new_tokens)
            if arguments.keep:
                print(f"\nThe server runs at {url}; Ctrl-C ends it.", flush=True)
                signal.pause()
    except (DemoError, requests.RequestException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0 if arguments.keep else 130
    flags = shlex.join(server_flags(arguments.model, arguments.server_args))
    print(f"\nA server of your own:\n  {sys.executable} -m sglang_ext.launch_server {flags} --port 30000")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
