"""Show that deterministic requests get the same output under every load: a matrix of prompts and conditions.

Starts ``python -m sglang_ext.launch_server`` itself, runs fixed chat prompts marked deterministic, alone and
in crowds of marked and unmarked requests, with cold and warm prefix cache and after a restart, and compares
token ids, text and finish reason with those of the same prompt alone on a cold cache. Unmarked requests among
them show what a stock request does under the same loads.

Every finished crowd is appended to a state file, so an interrupted run goes on where it stopped, also with
more prompts or conditions than before. The report is written from that file.

Exit status: 0 if every output is identical to its reference, 1 if one differs, 2 if the run could not be
done, 130 if it was interrupted (the report then covers what is finished).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shlex
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import serving
import state_file
from serving import Output, Server, ServingError, say

REPORT = Path("docs/reports/determinism-matrix.md")
STATE = Path("build/determinism-matrix.jsonl")

#: How a prompt is sampled.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "sampling_seed": 1234},
}

#: Room for a crowd of 17 with the longest prompts, and for what they leave in the prefix cache.
SERVER_FLAGS = ("--max-total-tokens", "40000", "--mem-fraction-static", "0.4")

#: Every n-th prompt is also run unmarked and greedy: alone, and as a neighbour in crowds.
STOCK_STRIDE = 4

#: Most seconds between the first and the last arrival in a crowd, per request.
STAGGER_S = 0.05


@dataclass(frozen=True)
class Condition:
    """One load under which prompts are run.

    Attributes:
        name: as in ``--conditions`` and in the report.
        text: what it is, for the report.
        crowd: requests sent together; 1 is alone.
        marked: how many of them are checked prompts; the others are unmarked.
        warm: whether every prompt of the crowd is in the prefix cache already; otherwise it is emptied.
        restart: whether to use a server that was started after the references were made.
        stride: every n-th prompt is run.
    """

    name: str
    text: str
    crowd: int
    marked: int
    warm: bool = False
    restart: bool = False
    stride: int = 1


#: The first is the reference that the others are compared with. Every prompt meets every size of crowd, both
#: states of the cache and a restart, though not every combination of these.
CONDITIONS: tuple[Condition, ...] = (
    Condition("alone", "alone, cold cache (the reference)", 1, 1),
    Condition("alone-warm", "alone, warm cache", 1, 1, warm=True, stride=8),
    Condition("crowd-3", "crowd of 3, cold cache", 3, 2),
    Condition("crowd-8", "crowd of 8, cold cache", 8, 6, stride=4),
    Condition("crowd-17", "crowd of 17, cold cache", 17, 13, stride=4),
    Condition("crowd-17-warm", "crowd of 17, warm cache", 17, 13, warm=True),
    Condition("restart-alone", "after a restart, alone, cold cache", 1, 1, restart=True, stride=8),
    Condition("restart-crowd-8", "after a restart, crowd of 8, cold cache", 8, 6, restart=True),
)
REFERENCE = CONDITIONS[0]


@dataclass(frozen=True, order=True)
class Subject:
    """A prompt under one way of sampling.

    Attributes:
        prompt: index in the prompts file.
        mode: key of :data:`MODES`.
    """

    prompt: int
    mode: str


@dataclass
class State:
    """All finished crowds, in memory and in a file of JSON lines that only grows.

    The first line says what must not change between runs; each other line is one finished crowd.
    """

    configuration: dict[str, Any]
    path: Path | None = None
    crowds: list[dict[str, Any]] = field(default_factory=list)
    marked: dict[tuple[str, Subject], Output] = field(default_factory=dict)
    stock: dict[str, list[tuple[Subject, Output]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, configuration: dict[str, Any]) -> State:
        """Read ``path``, or begin it.

        A last line that was cut off while it was written is dropped.

        Raises:
            StateError: the file is of another configuration, or a line in it cannot be read.
        """
        state = cls(configuration, path)
        for crowd in state_file.read(path, configuration):
            state._index(crowd)
        return state

    def add(self, crowd: dict[str, Any]) -> None:
        """Append a finished crowd to memory and file."""
        self._index(crowd)
        if self.path is not None:
            state_file.append(self.path, crowd)

    @property
    def servers(self) -> int:
        """Servers that were started so far."""
        return 1 + max((crowd["server"] for crowd in self.crowds), default=-1)

    def _index(self, crowd: dict[str, Any]) -> None:
        self.crowds.append(crowd)
        for row in crowd["outputs"]:
            subject = Subject(row["prompt"], row["mode"])
            output = Output(tuple(row["ids"]), row["text"], row["finish"], row["meta"])
            if row["marked"]:
                self.marked[crowd["condition"], subject] = output
            else:
                self.stock.setdefault(crowd["condition"], []).append((subject, output))

    def stock_reference(self) -> dict[Subject, Output]:
        """Outputs of unmarked requests that ran alone on a cold cache."""
        return dict(self.stock.get(REFERENCE.name, ()))


def output_row(subject: Subject, marked: bool, output: Output) -> dict[str, Any]:
    """One output as it stands in the state file."""
    return {
        "prompt": subject.prompt,
        "mode": subject.mode,
        "marked": marked,
        "ids": list(output.ids),
        "text": output.text,
        "finish": output.finish,
        "meta": output.meta,
    }


# Planning


@dataclass(frozen=True)
class Crowd:
    """Requests that are sent together.

    Attributes:
        condition: the load that they make up.
        checked: marked requests.
        stock: unmarked requests of prompts that are compared with the same prompt alone.
        fillers: number of further unmarked requests, which sample with top_p.
    """

    condition: Condition
    checked: tuple[Subject, ...]
    stock: tuple[Subject, ...]
    fillers: int


def subjects_of(condition: Condition, prompts: int, modes: Sequence[str]) -> list[Subject]:
    """What is checked under one condition."""
    return [Subject(prompt, mode) for prompt in range(0, prompts, condition.stride) for mode in modes]


def stock_subjects(prompts: int) -> list[Subject]:
    """Prompts that are also run unmarked."""
    return [Subject(prompt, "greedy") for prompt in range(0, prompts, STOCK_STRIDE)]


def plan(condition: Condition, prompts: int, modes: Sequence[str], state: State) -> list[Crowd]:
    """The crowds of one condition that are still to be run.

    Who meets whom is shuffled, differently for each condition but always alike.
    """
    missing = [s for s in subjects_of(condition, prompts, modes) if (condition.name, s) not in state.marked]
    if condition.crowd == 1:
        crowds = [Crowd(condition, (subject,), (), 0) for subject in missing]
        if condition == REFERENCE:
            done = state.stock_reference()
            crowds += [Crowd(condition, (), (s,), 0) for s in stock_subjects(prompts) if s not in done]
        return crowds
    shuffle = random.Random(condition.name)
    shuffle.shuffle(missing)
    watched = stock_subjects(prompts)
    shuffle.shuffle(watched)
    crowds = []
    for number, start in enumerate(range(0, len(missing), condition.marked)):
        checked = tuple(missing[start : start + condition.marked])
        others = condition.crowd - len(checked)
        # In a crowd of three, stock prompts and top_p take turns as the only neighbour.
        slots = (others + number % 2) // 2
        stock = tuple(watched[(number * slots + i) % len(watched)] for i in range(min(slots, len(watched))))
        crowds.append(Crowd(condition, checked, stock, others - len(stock)))
    return crowds


# Running


@dataclass
class Runner:
    """Sends crowds to a server.

    Attributes:
        prompts: token ids of every prompt.
        max_new_tokens: length of an answer.
    """

    prompts: list[list[int]]
    max_new_tokens: int

    def run(self, server: Server, number: int, crowd: Crowd) -> dict[str, Any]:
        """Run one crowd; its line of the state file.

        Raises:
            ServingError: a request was refused, or a marked one not treated as deterministic.
        """
        client = server.client
        if crowd.condition.warm:
            for subject in crowd.checked:
                client.generate(self.prompts[subject.prompt], True, {"max_new_tokens": 1, "temperature": 0.0})
        else:
            client.flush_cache()
        before = client.statistics()
        start = time.monotonic()
        outputs, filler_tokens = self._send(server, crowd)
        seconds = time.monotonic() - start
        return {
            "condition": crowd.condition.name,
            "server": number,
            "seconds": round(seconds, 3),
            "filler_tokens": filler_tokens,
            "statistics": serving.increase(before, client.statistics()),
            "outputs": outputs,
        }

    def _send(self, server: Server, crowd: Crowd) -> tuple[list[dict[str, Any]], int]:
        """All requests of a crowd, marked and unmarked in mixed order; rows, and tokens of fillers."""
        order = random.Random(repr((crowd.condition.name, crowd.checked)))
        requests_ = [(subject, True) for subject in crowd.checked]
        requests_ += [(subject, False) for subject in crowd.stock]
        arrivals: list[tuple[Subject, bool] | int] = [*requests_, *range(crowd.fillers)]
        order.shuffle(arrivals)
        sent: list[tuple[Subject, bool, Future[Output]]] = []
        fillers: list[Future[Output]] = []
        with ThreadPoolExecutor(crowd.condition.crowd) as pool:
            for arrival in arrivals:
                if isinstance(arrival, int):
                    fillers.append(pool.submit(server.client.generate, *self._filler(order)))
                else:
                    subject, marked = arrival
                    sampling = {"max_new_tokens": self.max_new_tokens, **MODES[subject.mode]}
                    ids = self.prompts[subject.prompt]
                    sent.append((subject, marked, pool.submit(server.client.generate, ids, marked, sampling)))
                if len(arrivals) > 1:
                    time.sleep(order.uniform(0, STAGGER_S))
        rows = [output_row(subject, marked, future.result()) for subject, marked, future in sent]
        return rows, sum(len(future.result().ids) for future in fillers)

    def _filler(self, order: random.Random) -> tuple[list[int], bool, dict[str, Any]]:
        """An unmarked request with top_p, of any prompt and length: a neighbour that changes the batch."""
        length = order.randint(max(1, self.max_new_tokens // 4), max(1, self.max_new_tokens * 3 // 4))
        sampling = {"max_new_tokens": length, "temperature": 1.0, "top_p": order.choice((0.7, 0.9, 0.95))}
        return order.choice(self.prompts), False, sampling


class Progress:
    """One line with what is done, mismatches, and the time left as far as it can be told."""

    def __init__(self, crowds: Iterable[Crowd], servers: int) -> None:
        self.servers = servers
        self._left = sum(map(self.cost, crowds))
        self._done = 0.0
        self._seconds = 0.0

    @staticmethod
    def cost(crowd: Crowd) -> float:
        """Relative duration of a crowd: a step of a batch is longer than one of a single request."""
        return 1 + 0.2 * (crowd.condition.crowd - 1)

    def advance(self, crowd: Crowd, seconds: float, mismatches: int) -> None:
        """A crowd was finished in so many seconds of all servers; starts of servers are not among them."""
        self._left -= self.cost(crowd)
        self._done += self.cost(crowd)
        self._seconds += seconds
        eta = self._seconds / self._done * self._left
        percent = 100 * self._done / (self._done + self._left)
        line = f"{percent:5.1f} %  {crowd.condition.name:<16}{mismatches} mismatches"
        say(f"{line}  about {_duration(eta)} left")


def _duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Work:
    """Runs crowds on several servers at once, each server taking the next crowd when it is free.

    Args:
        runner: sends the crowds.
        state: gets the results.
        progress: is told of each.
    """

    def __init__(self, runner: Runner, state: State, progress: Progress) -> None:
        self._runner = runner
        self._state = state
        self._progress = progress
        self._lock = threading.Lock()

    def run(self, crowds: Iterable[Crowd], servers: Mapping[int, Server]) -> None:
        """Run all ``crowds``.

        Raises:
            ServingError: see :class:`Runner`; what the other servers are doing is finished first.
        """
        left = deque(crowds)
        with ThreadPoolExecutor(len(servers)) as pool:
            futures = [pool.submit(self._serve, left, number, server) for number, server in servers.items()]
            try:
                for future in futures:
                    future.result()
            finally:
                left.clear()

    def _serve(self, left: deque[Crowd], number: int, server: Server) -> None:
        while left:
            try:
                crowd = left.popleft()
            except IndexError:
                return  # another server was faster
            start = time.monotonic()
            try:
                row = self._runner.run(server, number, crowd)
            except BaseException:
                left.clear()
                raise
            with self._lock:
                self._state.add(row)
                found = len(mismatches(self._state))
                self._progress.advance(crowd, (time.monotonic() - start) / self._progress.servers, found)


def run_all(
    plans: Sequence[tuple[Condition, list[Crowd]]],
    runner: Runner,
    state: State,
    flags: Sequence[str],
    servers: int,
) -> None:
    """Run each condition after the other, starting servers as seldom as that allows.

    Args:
        plans: crowds of every condition that are still to be run, in the order of the conditions.
        runner: sends them.
        state: gets the results.
        flags: flags of the servers.
        servers: how many share the crowds of a condition.

    Raises:
        ServingError: see :class:`Runner`.
    """
    progress = Progress((crowd for _, crowds in plans for crowd in crowds), servers)
    work = Work(runner, state, progress)
    with ExitStack() as stack:
        current: dict[int, Server] = {}
        started, restarted = state.servers, False
        for condition, crowds in plans:
            if not current or (condition.restart and not restarted):
                stack.close()
                current = {}
                for number in range(started, started + servers):
                    current[number] = stack.enter_context(serving.server(flags, f"server-{number}"))
                started += servers
                restarted = condition.restart
            work.run(crowds, current)


# Comparing


@dataclass(frozen=True)
class Mismatch:
    """A marked output that is not its reference.

    Attributes:
        condition: name of the condition.
        subject: which prompt.
        what: which of tokens, text and finish reason differ.
        token: index of the first output token that differs, or None.
    """

    condition: str
    subject: Subject
    what: tuple[str, ...]
    token: int | None


def comparisons(state: State, condition: str) -> Iterator[tuple[Subject, Output, Output]]:
    """Marked outputs under a condition, each with its reference, as far as both are there."""
    for (name, subject), output in state.marked.items():
        reference = state.marked.get((REFERENCE.name, subject))
        if name == condition and reference is not None:
            yield subject, output, reference


def mismatches(state: State) -> list[Mismatch]:
    """All marked outputs that differ from their reference."""
    return [
        Mismatch(condition.name, subject, what, output.first_difference(reference))
        for condition in CONDITIONS[1:]
        for subject, output, reference in comparisons(state, condition.name)
        if (what := output.differences(reference))
    ]


def stock_differences(state: State, condition: str) -> list[int | None]:
    """For every unmarked output with a reference: index of the first differing token, or None."""
    reference = state.stock_reference()
    return [
        output.first_difference(reference[subject])
        for subject, output in state.stock.get(condition, ())
        if subject in reference
    ]


# Report


def report(state: State, command: str, machine: dict[str, str], prompts: Sequence[int]) -> str:
    """The report as Markdown.

    Args:
        state: what was run.
        command: command line that makes this report.
        machine: description of the machine, by row.
        prompts: lengths of all prompts in tokens.
    """
    used = sorted({subject.prompt for _, subject in state.marked})
    lengths = [prompts[prompt] for prompt in used]
    conditions = [c for c in CONDITIONS if any(name == c.name for name, _ in state.marked)]
    found = mismatches(state)
    parts = [
        "# Determinism matrix",
        _headline(state, found, len(used)),
        "```\n" + command + "\n```",
        "## Configuration",
        serving.table(("", ""), [*machine.items(), *_configuration_rows(state, lengths)]),
        "## Deterministic outputs that differ from the same prompt alone on a cold cache",
        serving.table(
            ("condition", "compared", "tokens", "text", "finish reason", "cached prompt tokens"),
            [_mismatch_row(state, c) for c in conditions],
        ),
        "## Stock outputs of the same server that differ from the same prompt alone on a cold cache",
        "The unmarked neighbours in these crowds; greedy.",
        serving.table(
            ("condition", "compared", "differ", "first differing token, median"),
            [_stock_row(state, c) for c in conditions if state.stock.get(c.name)],
        ),
        "## Decode, verify, roll back",
        serving.table(
            (
                "condition",
                "requests with a rollback",
                "rollbacks",
                "verification windows",
                "candidates accepted",
                "decode steps",
                "of them with marked and unmarked rows",
                "canonical passes",
                "output tokens/s",
                "duration",
            ),
            [_work_row(state, c) for c in conditions],
        ),
        "Candidates accepted: those that a verification confirmed, out of these and all that rollbacks "
        "discarded. Durations are of the crowds themselves, marked and unmarked requests together.",
    ]
    if found:
        rows = [(m.condition, m.subject.prompt, m.subject.mode, ", ".join(m.what), m.token) for m in found]
        parts += ["## Mismatches", serving.table(("condition", "prompt", "mode", "what", "token"), rows)]
    return "\n\n".join(parts) + "\n"


def _headline(state: State, found: Sequence[Mismatch], prompts: int) -> str:
    compared = sum(len(list(comparisons(state, c.name))) for c in CONDITIONS[1:])
    stock = [d for c in CONDITIONS[1:] for d in stock_differences(state, c.name)]
    differ = sum(d is not None for d in stock)
    return (
        f"**{len(found)} mismatches in {compared} comparisons** of deterministic outputs of {prompts} chat "
        f"prompts (token ids, text and finish reason). Of {len(stock)} stock outputs compared in the same "
        f"way, {differ} differ."
    )


def _configuration_rows(state: State, lengths: Sequence[int]) -> list[tuple[str, object]]:
    settings = state.configuration
    span = f", {min(lengths)} to {max(lengths)} tokens" if lengths else ""
    return [
        ("model", settings["model"]),
        ("server flags", f"`{shlex.join(settings['flags'])}`"),
        ("prompts", f"{len(lengths)}{span}"),
        ("new tokens", f"at most {settings['max_new_tokens']}"),
        *((mode, f"`{json.dumps(settings['modes'][mode])}`") for mode in settings["modes"]),
        ("servers started", state.servers),
    ]


def _mismatch_row(state: State, condition: Condition) -> list[object]:
    pairs = list(comparisons(state, condition.name))
    cached = sum(output.meta.get("cached_tokens", 0) for _, output, _ in pairs)
    if condition == REFERENCE:
        return [condition.text, f"{len(pairs)} references", "-", "-", "-", cached]
    differ = [output.differences(reference) for _, output, reference in pairs]
    counts = [sum(name in what for what in differ) for name in ("tokens", "text", "finish reason")]
    return [condition.text, len(pairs), *counts, cached]


def _stock_row(state: State, condition: Condition) -> list[object]:
    places = stock_differences(state, condition.name)
    if condition == REFERENCE:
        return [condition.text, f"{len(places)} references", "-", "-"]
    differ = [place for place in places if place is not None]
    median = f"{statistics.median(differ):g}" if differ else "-"
    return [condition.text, len(places), len(differ), median]


def _work_row(state: State, condition: Condition) -> list[object]:
    crowds = [crowd for crowd in state.crowds if crowd["condition"] == condition.name]
    outputs = [row for crowd in crowds for row in crowd["outputs"]]
    meta = [row["meta"] for row in outputs if row["marked"]]
    counters = serving.total(crowd["statistics"] for crowd in crowds)
    seconds = sum(crowd["seconds"] for crowd in crowds)
    tokens = sum(len(row["ids"]) for row in outputs) + sum(crowd["filler_tokens"] for crowd in crowds)
    accepted = counters.get("candidates_accepted", 0)
    return [
        condition.text,
        f"{sum(m['llm42_num_rollbacks'] > 0 for m in meta)} of {len(meta)}",
        sum(m["llm42_num_rollbacks"] for m in meta),
        sum(m["llm42_num_verification_windows"] for m in meta),
        serving.share(accepted, accepted + counters.get("tokens_rolled_back", 0)),
        counters.get("decode_steps", 0),
        counters.get("mixed_decode_steps", 0),
        counters.get("verify_forward_passes", 0),
        f"{tokens / seconds:.1f}" if seconds else "-",
        _duration(seconds),
    ]


# Command line


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [condition.name for condition in CONDITIONS]
    parser.add_argument("--model", default="smollm2", help="a chat model (default: the demo model)")
    parser.add_argument("--window-size", type=int, default=16, help="rows of a segment (default: 16)")
    parser.add_argument("--verify-batch-size", type=int, default=4, help="segments of a pass (default: 4)")
    parser.add_argument("--prompts", type=int, default=64, help="use the first N prompts (default: 64, all)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="length of an answer (default: 128)")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="ways of sampling (default: both)"
    )
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"loads to run, the first always among them (default: all; {', '.join(names)})",
    )
    parser.add_argument(
        "--servers",
        type=int,
        default=1,
        metavar="N",
        help="servers that share the work (default: 1); on a CPU give each its cores by OMP_NUM_THREADS",
    )
    parser.add_argument("--state", type=Path, default=STATE, help=f"results so far (default: {STATE})")
    parser.add_argument("--report", type=Path, default=REPORT, help=f"the report (default: {REPORT})")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there")
    parser.add_argument("server_args", nargs="*", help="further flags of the server, after --")
    return parser.parse_args(argv)


def command_line(argv: Sequence[str]) -> str:
    """The command that gives this report: without the options that only say where files are."""
    kept = serving.without_files(argv, ("--state", "--report"), ("--report-only",))
    return shlex.join(["python", "scripts/determinism_matrix.py", *kept])


def configuration(
    arguments: argparse.Namespace, flags: Sequence[str], versions: dict[str, str]
) -> dict[str, Any]:
    """What must be the same for all results in one state file."""
    return {
        "model": arguments.model,
        "flags": list(flags),
        "max_new_tokens": arguments.max_new_tokens,
        "modes": MODES,
        "prompts_digest": hashlib.sha256(serving.PROMPTS_FILE.read_bytes()).hexdigest(),
        "machine": versions,
    }


def server_flags(arguments: argparse.Namespace) -> list[str]:
    """Flags of the server, without its port."""
    return [
        "--model",
        arguments.model,
        "--enable-llm42",
        "--llm42-window-size",
        str(arguments.window_size),
        "--llm42-verify-batch-size",
        str(arguments.verify_batch_size),
        *SERVER_FLAGS,
        *arguments.server_args,
    ]


def main() -> int:
    """Exit status as in the module's text."""
    serving.exit_on_termination()
    arguments = parse_arguments()
    flags = server_flags(arguments)
    machine = serving.machine()
    try:
        state = State.open(arguments.state, configuration(arguments, flags, machine))
        prompts = serving.load_prompts(arguments.model)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    if not 1 <= arguments.prompts <= len(prompts):
        say(f"error: --prompts must be 1 to {len(prompts)}, not {arguments.prompts}")
        return 2
    if arguments.servers < 1:
        say(f"error: --servers must be at least 1, not {arguments.servers}")
        return 2
    chosen = [c for c in CONDITIONS if c == REFERENCE or c.name in arguments.conditions]
    plans = [(c, plan(c, arguments.prompts, arguments.modes, state)) for c in chosen]
    status = 0
    try:
        if not arguments.report_only:
            run_all(
                [(condition, crowds) for condition, crowds in plans if crowds],
                Runner(prompts, arguments.max_new_tokens),
                state,
                flags,
                arguments.servers,
            )
    except (ServingError, requests.RequestException) as error:
        say(f"error: {error}")
        status = 2
    except KeyboardInterrupt:
        say("Interrupted; the same command goes on from here.")
        status = 130
    lengths = [len(ids) for ids in prompts]
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(report(state, command_line(sys.argv[1:]), machine, lengths))
    found = mismatches(state)
    for mismatch in found:
        say(f"MISMATCH {mismatch}")
    say(f"{len(found)} mismatches; report: {arguments.report}")
    return status or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
