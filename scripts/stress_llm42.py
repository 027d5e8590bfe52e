"""Stress deterministic requests: random traffic on a server with too little memory, every answer compared.

First each request of a fixed catalogue (``stress_catalogue.py``) runs alone on a fresh idle server with an
empty prefix cache: the references. Then clients (``stress_traffic.py``) send these requests to another server
in random order and at random times, marked and unmarked, streamed or not; they abort some and hang up on
others. The KV pool holds a fraction of what they ask for, so that requests are retracted and cached prefixes
evicted, and SGLang's strict memory checks are on. Every marked answer is compared with its reference: token
ids, text, finish reason, and log-probabilities bit by bit; what was cut off must be the beginning of it.

Traffic comes in rounds, each with a seed of its own. After a round the server must be idle with no KV slot in
use. References and finished rounds are appended to a state file, so an interrupted run goes on where it
stopped.

Exit status: 0 if no answer differs and nothing failed; 1 if one differs, a request failed or the server
ended; 2 if the run could not be done or was too tame: something that it must have seen did not happen; 130 if
it was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import serving
import state_file
import stress_catalogue as catalogue
from serving import Server, ServingError, say
from stress_catalogue import Answer, Model, Sample, Subject
from stress_traffic import ANSWER_TIMEOUT_S, Client, RequestError, Seen, ask

REPORT = Path("docs/reports/stress-llm42.md")
STATE = Path("build/stress-llm42.jsonl")

#: Seconds until the server must be idle after a round.
IDLE_TIMEOUT_S = 120

#: What must have happened, by name of the count, for the run to say something.
NEEDED = (
    "answers compared",
    "streams compared",
    "unmarked answers",
    "aborts",
    "disconnects",
    "flushes",
    "rollbacks",
    "tokens rolled back",
    "retractions",
    "retractions of compared answers",
    "evicted tokens",
    "cached prompt tokens",
)

#: Prometheus counters of SGLang, and their names here.
METRICS = {
    "sglang:num_retracted_requests_total": "retractions",
    "sglang:evicted_tokens_total": "evicted tokens",
}


@dataclass(frozen=True)
class Settings:
    """One stress run.

    Attributes:
        model: path or name, as ``--model`` of the server.
        flags: further flags of the server, ``--max-total-tokens`` among them.
        seed: of everything that is drawn.
        bases: requests of the catalogue's first generation.
        clients: requests at a time.
        round_s: seconds of one round.
        environment: environment variables of the servers, beside those of the strict memory checks.
    """

    model: str
    flags: tuple[str, ...]
    seed: int = 1
    bases: int = 84
    clients: int = 14
    round_s: float = 45.0
    environment: Mapping[str, str] = field(default_factory=dict)

    def command_line(self) -> list[str]:
        """Flags of the server, without its port."""
        return ["--model", self.model, "--enable-llm42", "--enable-metrics", *self.flags]

    def configuration(self, machine: Mapping[str, str]) -> dict[str, Any]:
        """What must be the same for all lines of one state file."""
        return {
            "server": self.command_line(),
            "seed": self.seed,
            "bases": self.bases,
            "clients": self.clients,
            "round_s": self.round_s,
            "environment": dict(self.environment),
            "machine": dict(machine),
        }


@dataclass
class State:
    """References and finished rounds, in memory and in a file of JSON lines that only grows.

    Attributes:
        path: the file.
        configuration: its first line.
        references: answers of the fresh idle server, by name of the subject.
        rounds: what finished rounds saw, by number.
    """

    path: Path
    configuration: dict[str, Any]
    references: dict[str, Answer] = field(default_factory=dict)
    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)
    _bodies: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, configuration: dict[str, Any]) -> State:
        """Read ``path``, or begin it; a last line that was cut off is dropped.

        Raises:
            StateError: the file is of another configuration, or a line in it cannot be read.
        """
        state = cls(path, configuration)
        for line in state_file.read(path, configuration):
            state._index(line)
        return state

    def reference(self, subject: Subject) -> Answer | None:
        """The reference of ``subject`` as it is asked now."""
        if self._bodies.get(subject.name) != _digest(subject.body):
            return None
        return self.references[subject.name]

    def add_reference(self, subject: Subject, answer: Answer) -> None:
        """Keep the answer of the idle server."""
        rows = [sample.row() for sample in answer]
        self._append({"reference": subject.name, "body": _digest(subject.body), "samples": rows})

    def add_round(self, number: int, seen: dict[str, Any]) -> None:
        """Keep a finished round."""
        self._append({"round": number, **seen})

    def _append(self, line: dict[str, Any]) -> None:
        self._index(line)
        state_file.append(self.path, line)

    def _index(self, line: dict[str, Any]) -> None:
        if "round" in line:
            self.rounds[line["round"]] = line
            return
        self._bodies[line["reference"]] = line["body"]
        self.references[line["reference"]] = tuple(map(Sample.from_row, line["samples"]))

    def total(self, what: str) -> Counter[str]:
        """Sum over all rounds of one group of counts."""
        return Counter(serving.total(seen[what] for seen in self.rounds.values()))

    def listed(self, what: str) -> list[dict[str, Any]]:
        """All differences or failures, each with its round."""
        return [{"round": n, **row} for n, seen in sorted(self.rounds.items()) for row in seen[what]]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# Running


def make_references(settings: Settings, model: Model, state: State) -> list[tuple[Subject, Answer]]:
    """The catalogue with references: each request alone on a fresh idle server with an empty prefix cache.

    Raises:
        ServingError: the server did not start or ended.
        RequestError: a request was refused.
    """
    first = catalogue.bases(model, settings.bases, settings.seed)
    missing = any(state.reference(subject) is None for subject in first)
    if not missing:
        pairs = _known(settings, model, state, first)
        if pairs is not None:
            return pairs
    with serving.server(
        settings.command_line(), "references", {**serving.STRICT_MEMORY_CHECKS, **settings.environment}
    ) as server:
        _answer_alone(server, first, state)
        second = catalogue.derived(model, first, _by_name(first, state), settings.seed)
        _answer_alone(server, second, state)
    return [(subject, _needed(state, subject)) for subject in (*first, *second)]


def _known(
    settings: Settings, model: Model, state: State, first: Sequence[Subject]
) -> list[tuple[Subject, Answer]] | None:
    """All pairs from the state file, or None if one is missing."""
    second = catalogue.derived(model, first, _by_name(first, state), settings.seed)
    pairs = [(subject, state.reference(subject)) for subject in (*first, *second)]
    known = [(subject, answer) for subject, answer in pairs if answer is not None]
    return known if len(known) == len(pairs) else None


def _by_name(subjects: Sequence[Subject], state: State) -> dict[str, Answer]:
    return {subject.name: _needed(state, subject) for subject in subjects}


def _needed(state: State, subject: Subject) -> Answer:
    answer = state.reference(subject)
    assert answer is not None, subject.name
    return answer


def _answer_alone(server: Server, subjects: Sequence[Subject], state: State) -> None:
    missing = [subject for subject in subjects if state.reference(subject) is None]
    for number, subject in enumerate(missing, 1):
        server.client.flush_cache()
        try:
            state.add_reference(subject, ask(server, subject.body))
        except RequestError as error:
            raise RequestError(f"{subject.name}: {error}\n{json.dumps(subject.body)}") from error
        if number % 10 == 0 or number == len(missing):
            say(f"  {number} of {len(missing)} references")


def run_round(
    server: Server,
    pairs: Sequence[tuple[Subject, Answer]],
    model: Model,
    settings: Settings,
    number: int,
) -> dict[str, Any]:
    """One round of traffic; its line of the state file.

    Raises:
        ServingError: the server ended, or did not become idle.
    """
    before, metrics = server.client.statistics(), _metrics(server)
    start = time.monotonic()
    clients = [
        Client(server, pairs, model, f"{number:04}-{client:02}", settings.seed)
        for client in range(settings.clients)
    ]
    seen = Seen()
    with ThreadPoolExecutor(settings.clients) as pool:
        for part in pool.map(lambda client: client.run(start + settings.round_s), clients):
            seen.add(part)
    _wait_until_idle(server)
    seconds = time.monotonic() - start
    # Half of the rounds begin with what others have left in the cache.
    if number % 2:
        server.client.flush_cache()
        seen.counts["flushes"] += 1
    work = serving.increase(before, server.client.statistics())
    seen.counts["rollbacks"] += work["rollbacks"]
    seen.counts["tokens rolled back"] += work["tokens_rolled_back"]
    seen.counts.update(serving.increase(metrics, _metrics(server)))
    return {
        "seconds": round(seconds, 1),
        "counts": dict(seen.counts),
        "features": dict(seen.features),
        "finishes": dict(seen.finishes),
        "statistics": work,
        "differences": seen.differences,
        "failures": seen.failures,
    }


def _metrics(server: Server) -> dict[str, int]:
    """SGLang's own counters, 0 where one has not counted yet."""
    lines = requests.get(f"{server.client.url}/metrics", timeout=ANSWER_TIMEOUT_S).text.splitlines()
    values = dict.fromkeys(METRICS.values(), 0)
    for line in lines:
        name = line.partition("{")[0]
        if name in METRICS:
            values[METRICS[name]] += round(float(line.rpartition(" ")[2]))
    return values


def _wait_until_idle(server: Server) -> None:
    """Until no KV slot is in use; cached ones are not.

    Raises:
        ServingError: some still are after IDLE_TIMEOUT_S.
    """
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while used := _used_slots(server):
        if time.monotonic() > deadline:
            raise ServingError(f"{used} KV slots are in use on an idle server:\n{server.tail()}")
        time.sleep(0.2)
    time.sleep(1.0)  # SGLang checks its memory when nothing is left to do


def _used_slots(server: Server) -> int:
    loads = requests.get(f"{server.client.url}/v1/loads", timeout=ANSWER_TIMEOUT_S).json()["loads"]
    return sum(load["num_used_tokens"] for load in loads)


def run(settings: Settings, model: Model, state: State, rounds: Sequence[int]) -> None:
    """Make references that are missing and run the given rounds that are not in ``state`` yet.

    Raises:
        ServingError: a server did not start, ended, or kept KV slots.
        RequestError: a request of the catalogue was refused on the idle server.
    """
    pairs = make_references(settings, model, state)
    say(f"{len(pairs)} requests in the catalogue")
    missing = [number for number in rounds if number not in state.rounds]
    if not missing:
        return
    environment = {**serving.STRICT_MEMORY_CHECKS, **settings.environment}
    with serving.server(settings.command_line(), "stress", environment) as server:
        for number in missing:
            seen = run_round(server, pairs, model, settings, number)
            state.add_round(number, seen)
            counts = seen["counts"]
            say(
                f"  round {number}: {counts.get('answers compared', 0)} compared, "
                f"{len(seen['differences'])} differences, {len(seen['failures'])} failures, "
                f"{counts['retractions']} retractions, {counts['rollbacks']} rollbacks"
            )


def too_tame(state: State) -> list[str]:
    """Counts that are zero and must not be."""
    counts = state.total("counts")
    features = {*catalogue.OPTIONS, *catalogue.DERIVATIONS, "greedy", "sampled"}
    seen = state.total("features")
    return [name for name in NEEDED if not counts[name]] + sorted(name for name in features if not seen[name])


# Report


def report(state: State, command: str, machine: Mapping[str, str]) -> str:
    """The report as Markdown."""
    differences, failures = state.listed("differences"), state.listed("failures")
    counts = state.total("counts")
    seconds = sum(seen["seconds"] for seen in state.rounds.values())
    tame = too_tame(state)
    parts = [
        "# Stress run",
        f"**{len(differences)} differences in {counts['answers compared']} compared answers**, "
        f"{len(failures)} failed requests, in {len(state.rounds)} rounds of together {seconds / 60:.1f} "
        "minutes. Compared with the same request alone on a fresh idle server with an empty prefix cache: "
        "token ids, text, finish reason, and log-probabilities bit by bit. SGLang's strict memory checks "
        "were on, and after every round no KV slot was in use.",
        "```\n" + command + "\n```",
        *([f"Too tame, it says nothing about: {', '.join(tame)}."] if tame else []),
        "## Configuration",
        serving.table(("", ""), [*machine.items(), *_configuration_rows(state)]),
        "## What happened",
        serving.table(("", "count"), sorted(counts.items())),
        "## Canonical passes",
        serving.table(("", "count"), sorted(state.total("statistics").items())),
        "## Compared answers by feature",
        serving.table(("feature", "compared answers"), sorted(state.total("features").items())),
        "## Compared samples by finish reason",
        serving.table(("finish reason", "samples"), sorted(state.total("finishes").items())),
    ]
    if differences:
        parts += ["## Differences", *map(_reproduction, differences)]
    if failures:
        parts += ["## Failed requests", *(f"```json\n{json.dumps(row)}\n```" for row in failures)]
    return "\n\n".join(parts) + "\n"


def _configuration_rows(state: State) -> list[tuple[str, object]]:
    settings = state.configuration
    return [
        ("server flags", f"`{shlex.join(settings['server'])}`"),
        ("requests in the catalogue", len(state.references)),
        ("clients", settings["clients"]),
        ("seed", settings["seed"]),
    ]


def _reproduction(row: Mapping[str, Any]) -> str:
    """A difference with all that it takes to see it again."""
    place = "" if row["token"] is None else f", first differing token {row['token']}"
    number = row["round"]
    return (
        f"Round {number}, {row['subject']}, sample {row['sample']}: {', '.join(row['what'])}{place}. "
        f"To run the round again: the command above with `--only-round {number}` and another `--state`.\n\n"
        f"```json\n{json.dumps({name: row[name] for name in ('body', 'expected', 'got')})}\n```"
    )


# Command line


def describe(model: str) -> Model:
    """What the catalogue needs of a chat model.

    Raises:
        OSError: the model has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    from sglang_ext import demo_model

    tokenizer = AutoTokenizer.from_pretrained(demo_model.resolve(model))
    return Model(serving.load_prompts(model), len(tokenizer), tokenizer.eos_token_id, GRAMMARS)


GRAMMARS: tuple[dict[str, Any], ...] = (
    {"regex": r"(yes|no|perhaps), because [a-z ]{5,60}\."},
    {"regex": r"[0-9]{2}:[0-9]{2}(:[0-9]{2})?"},
    {
        "json_schema": json.dumps(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 12},
                    "number": {"type": "integer", "minimum": 0, "maximum": 999},
                    "kind": {"enum": ["plant", "animal", "stone"]},
                },
                "required": ["name", "number", "kind"],
                "additionalProperties": False,
            }
        )
    },
    {"json_schema": json.dumps({"type": "array", "items": {"type": "boolean"}, "maxItems": 6})},
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a chat model (default: the demo model)")
    parser.add_argument("--minutes", type=float, default=15.0, help="length of the traffic (default: 15)")
    parser.add_argument("--only-round", type=int, metavar="N", help="run this round alone")
    parser.add_argument("--seed", type=int, default=1, help="of catalogue and traffic (default: 1)")
    parser.add_argument("--bases", type=int, default=84, help="requests to begin with (default: 84)")
    parser.add_argument("--clients", type=int, default=14, help="requests at a time (default: 14)")
    parser.add_argument("--pool", type=int, default=640, help="KV slots of the server (default: 640)")
    parser.add_argument("--window-size", type=int, default=16, help="rows of a segment (default: 16)")
    parser.add_argument("--verify-batch-size", type=int, default=4, help="segments of a pass (default: 4)")
    parser.add_argument("--state", type=Path, default=STATE, help=f"results so far (default: {STATE})")
    parser.add_argument("--report", type=Path, default=REPORT, help=f"the report (default: {REPORT})")
    parser.add_argument("server_args", nargs="*", help="further flags of the server, after --")
    return parser.parse_args(argv)


def server_flags(pool: int, window_size: int, verify_batch_size: int) -> tuple[str, ...]:
    """Flags that make memory short: a small pool, and a low estimate of what requests will generate, which
    lets in more of them than it can hold."""
    return (
        "--llm42-window-size",
        str(window_size),
        "--llm42-verify-batch-size",
        str(verify_batch_size),
        "--max-total-tokens",
        str(pool),
        "--schedule-conservativeness",
        "0.05",
        "--chunked-prefill-size",
        "128",
    )


def main() -> int:
    """Exit status as in the module's text."""
    serving.exit_on_termination()
    arguments = parse_arguments()
    flags = server_flags(arguments.pool, arguments.window_size, arguments.verify_batch_size)
    settings = Settings(
        arguments.model,
        (*flags, "--mem-fraction-static", "0.3", *arguments.server_args),
        seed=arguments.seed,
        bases=arguments.bases,
        clients=arguments.clients,
    )
    machine = serving.machine()
    try:
        state = State.open(arguments.state, settings.configuration(machine))
        model = describe(arguments.model)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    rounds = range(max(1, round(arguments.minutes * 60 / settings.round_s)))
    if arguments.only_round is not None:
        rounds = range(arguments.only_round, arguments.only_round + 1)
    status = 0
    try:
        run(settings, model, state, rounds)
    except (ServingError, RequestError, requests.RequestException) as error:
        say(f"error: {error}")
        status = 1 if state.references else 2
    except KeyboardInterrupt:
        say("Interrupted; the same command goes on from here.")
        status = 130
    command = shlex.join(["python", "scripts/stress_llm42.py", *_options(sys.argv[1:])])
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(report(state, command, machine))
    return verdict(state) if status == 0 else status


def _options(argv: Sequence[str]) -> list[str]:
    """The command line without the options that only say where files are."""
    return serving.without_files(argv, ("--state", "--report"))


def verdict(state: State) -> int:
    """Print the counts and what is wrong; the exit status."""
    for name, count in sorted(state.total("counts").items()):
        say(f"  {count:8} {name}")
    differences, failures = state.listed("differences"), state.listed("failures")
    for row in differences:
        say(f"DIFFERENT {json.dumps(row)}")
    for row in failures:
        say(f"FAILED {json.dumps(row)}")
    tame = too_tame(state)
    if tame:
        say(f"TOO TAME: there was no {', no '.join(tame)}")
    say(f"{len(differences)} differences, {len(failures)} failed requests")
    return 1 if differences or failures else 2 if tame else 0


if __name__ == "__main__":
    sys.exit(main())
