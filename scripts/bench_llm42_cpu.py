"""What deterministic requests cost on a CPU, as ratios of throughput within one run.

Two comparisons, each of servers that are up at the same time and take turns, one loaded while the others
sleep:

* ``shares``: none, a tenth, half and all of the requests are marked; against a server without LLM-42, and
  against one without LLM-42 that runs one request at a time, which is the other way to keep traffic from
  changing outputs.
* ``unmarked-small-kv``: no request is marked, and there is so little KV memory that requests queue or are
  retracted; a server with ``--enable-llm42`` against one without.

All requests have a fixed number of output tokens. Writes a Markdown report and all rounds as CSV.
Exit status: 0 if everything was measured, 2 if a server could not be used, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import requests
import serving
from serving import Server, ServingError, say

OUTPUT = Path("docs/benchmarks/llm42-cpu")

#: Idle servers wait instead of polling, so that they leave the cores to the loaded one. KV is as large as its
#: flag says; the fraction is only wide enough for SGLang, which sees the other server and counts it as used.
SERVER_FLAGS = ("--sleep-on-idle", "--mem-fraction-static", "0.5")

AMPLE_KV = ("--max-total-tokens", "20000")
#: Two of the longest prompts with their answers, or half a dozen average ones.
SMALL_KV = ("--max-total-tokens", "1536")

#: What SGLang logs when it takes memory back from running requests.
RETRACTION = "KV cache pool is full. Retract requests."


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes:
        name: as in the report.
        server: which server it loads: contenders of the same name share one.
        llm42: whether that server has ``--enable-llm42``.
        marked: which of the requests, by index, are marked.
        flags: further flags of its server.
    """

    name: str
    server: str
    llm42: bool
    marked: Callable[[int], bool]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What a comparison has to show.

    Attributes:
        contender: name of the contender that it is about.
        baseline: name of the contender that it is measured by.
        ratio: least ratio of their throughput.
    """

    contender: str
    baseline: str
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """Contenders under one load; ratios in the table are by the first.

    Attributes:
        name: as in ``--only``.
        text: what is compared, for the report.
        flags: flags of all its servers.
        contenders: who takes turns.
        targets: what it has to show.
    """

    name: str
    text: str
    flags: tuple[str, ...]
    contenders: tuple[Contender, ...]
    targets: tuple[Target, ...]


def _none(index: int) -> bool:
    return False


def _all(index: int) -> bool:
    return True


def _every_other(index: int) -> bool:
    return index % 2 == 0


def _every_tenth(index: int) -> bool:
    return index % 10 == 0


STOCK = Contender("without --enable-llm42", "stock", False, _none)
UNMARKED = Contender("with --enable-llm42", "llm42", True, _none)
ONE_AT_A_TIME = Contender(
    "one at a time, stock", "one-at-a-time", False, _none, ("--max-running-requests", "1")
)
ALL_MARKED = Contender("all marked", "llm42", True, _all)

COSTS_NOTHING = Target(UNMARKED.name, STOCK.name, 0.97)

COMPARISONS = (
    Comparison(
        "shares",
        "A growing share of the requests is marked",
        AMPLE_KV,
        (
            STOCK,
            UNMARKED,
            Contender("every tenth marked", "llm42", True, _every_tenth),
            Contender("every other marked", "llm42", True, _every_other),
            ALL_MARKED,
            ONE_AT_A_TIME,
        ),
        (COSTS_NOTHING, Target(ALL_MARKED.name, ONE_AT_A_TIME.name, 2.0)),
    ),
    Comparison(
        "unmarked-small-kv",
        "No request is marked, little KV",
        SMALL_KV,
        (STOCK, UNMARKED),
        (COSTS_NOTHING,),
    ),
)


@dataclass(frozen=True)
class Round:
    """One measurement.

    Attributes:
        comparison: name of the comparison.
        contender: name of the contender.
        number: round, from 0.
        seconds: from the first request sent to the last answer.
        tokens: output tokens of all requests.
        retractions: times that the server took memory back from running requests.
        counters: what ``GET /llm42_stats`` counted meanwhile.
    """

    comparison: str
    contender: str
    number: int
    seconds: float
    tokens: int
    retractions: int
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Load:
    """Requests of one round.

    Attributes:
        prompts: token ids, one request each.
        concurrency: requests in flight at once.
        new_tokens: output tokens of each request.
    """

    prompts: list[list[int]]
    concurrency: int
    new_tokens: int

    def run(self, server: Server, marked: Callable[[int], bool]) -> tuple[float, int]:
        """Send all requests; seconds, and output tokens.

        Raises:
            ServingError: a request failed or has another number of tokens.
        """
        sampling = {"temperature": 0.0, "max_new_tokens": self.new_tokens, "ignore_eos": True}
        start = time.monotonic()
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [
                pool.submit(server.client.generate, ids, marked(index), sampling)
                for index, ids in enumerate(self.prompts)
            ]
            lengths = [len(future.result().ids) for future in futures]
        seconds = time.monotonic() - start
        if set(lengths) != {self.new_tokens}:
            raise ServingError(f"asked for {self.new_tokens} tokens, got {sorted(set(lengths))}")
        return seconds, sum(lengths)


# Measuring


def measure(comparison: Comparison, load: Load, rounds: int, base_flags: Sequence[str]) -> list[Round]:
    """Start a comparison's servers, warm each up, and let the contenders take turns.

    Raises:
        ServingError: a server does not start, or a request fails.
    """
    say(f"{comparison.name}: {comparison.text}")
    found: list[Round] = []
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for contender in comparison.contenders:
            if contender.server not in servers:
                flags = server_flags(comparison, contender, base_flags)
                servers[contender.server] = stack.enter_context(serving.server(flags, contender.server))
            warm_up = Load(load.prompts[:2], 2, 8)
            warm_up.run(servers[contender.server], contender.marked)
        for number in range(rounds):
            # Turn about, so that a machine that gets slower or faster favours nobody.
            order = comparison.contenders if number % 2 == 0 else comparison.contenders[::-1]
            for contender in order:
                found.append(_measure_once(comparison, contender, number, load, servers[contender.server]))
    return found


def _measure_once(
    comparison: Comparison, contender: Contender, number: int, load: Load, server: Server
) -> Round:
    server.client.flush_cache()
    retractions = server.count_in_log(RETRACTION)
    before = server.client.statistics()
    seconds, tokens = load.run(server, contender.marked)
    counters = serving.increase(before, server.client.statistics())
    retractions = server.count_in_log(RETRACTION) - retractions
    result = Round(comparison.name, contender.name, number, seconds, tokens, retractions, counters)
    say(f"  round {number + 1}  {contender.name:<24}{result.throughput:7.1f} tokens/s")
    return result


def server_flags(comparison: Comparison, contender: Contender, base_flags: Sequence[str]) -> list[str]:
    """Flags of a contender's server: those of LLM-42 are for servers that have it."""
    split = base_flags.index("--enable-llm42")
    general, llm42 = base_flags[:split], base_flags[split:]
    return [*general, *comparison.flags, *contender.flags, *(llm42 if contender.llm42 else ())]


# Reporting


def throughputs(rounds: Sequence[Round], contender: str) -> list[float]:
    """Throughput of one contender, round by round."""
    return [r.throughput for r in sorted(rounds, key=lambda r: r.number) if r.contender == contender]


def round_ratio(rounds: Sequence[Round], baseline: str, contender: str) -> float:
    """Median over rounds of the contender's throughput by the baseline's in the same round."""
    pairs = zip(throughputs(rounds, contender), throughputs(rounds, baseline), strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def comparison_section(comparison: Comparison, rounds: Sequence[Round], flags: Sequence[str]) -> str:
    """Markdown of one comparison."""
    baseline = comparison.contenders[0]
    rows = []
    for contender in comparison.contenders:
        values = throughputs(rounds, contender.name)
        retractions = sum(r.retractions for r in rounds if r.contender == contender.name)
        ratio = round_ratio(rounds, baseline.name, contender.name)
        each = ", ".join(f"{value:.1f}" for value in values)
        rows.append((contender.name, each, f"{statistics.median(values):.1f}", f"{ratio:.3f}", retractions))
    parts = [
        f"## {comparison.text}",
        serving.table(
            ("contender", "output tokens/s, by round", "median", "ratio, median of rounds", "retractions"),
            rows,
        ),
        "\n".join(f"* {verdict(target, rounds)}" for target in comparison.targets),
        "Server flags:",
        "\n".join(
            f"* {contender.name}: `{shlex.join(server_flags(comparison, contender, flags))}`"
            for contender in comparison.contenders
        ),
    ]
    work = [_work_row(c, rounds) for c in comparison.contenders if any(map(c.marked, range(10)))]
    if work:
        header = (
            "contender",
            "candidates accepted",
            "rollbacks",
            "verification segments",
            "decode steps",
            "of them with marked and unmarked rows",
            "marked rows",
            "unmarked rows",
            "canonical passes",
            "padded rows of these",
            "decoded again after a rollback",
            "verification, share of rows in these steps and passes",
        )
        parts.append(serving.table(header, work))
    return "\n\n".join(parts)


def verdict(target: Target, rounds: Sequence[Round]) -> str:
    """Whether ``target`` is met, in a sentence."""
    ratio = round_ratio(rounds, target.baseline, target.contender)
    met = "met" if ratio >= target.ratio else "missed"
    return (
        f"Target: {target.contender!r} at least {target.ratio} times {target.baseline!r}: "
        f"**{ratio:.3f}, {met}**."
    )


def _work_row(contender: Contender, rounds: Sequence[Round]) -> list[object]:
    counters = serving.total(r.counters for r in rounds if r.contender == contender.name)
    accepted = counters["candidates_accepted"]
    canonical = counters["verify_total_tokens"] + counters["prompt_tokens"] + counters["padded_rows"]
    decoded = counters["decode_deterministic_rows"] + counters["decode_other_rows"]
    return [
        contender.name,
        serving.share(accepted, accepted + counters["tokens_rolled_back"]),
        counters["rollbacks"],
        counters["verify_total_reqs"],
        counters["decode_steps"],
        counters["mixed_decode_steps"],
        counters["decode_deterministic_rows"],
        counters["decode_other_rows"],
        counters["verify_forward_passes"],
        serving.share(counters["padded_rows"], canonical),
        serving.share(counters["tokens_rolled_back"], counters["decode_deterministic_rows"]),
        serving.share(counters["verify_total_tokens"], canonical + decoded),
    ]


def report(
    results: Sequence[tuple[Comparison, list[Round]]],
    load: Load,
    command: str,
    machine: dict[str, str],
    flags: Sequence[str],
) -> str:
    """The report as Markdown."""
    lengths = [len(ids) for ids in load.prompts]
    rows = [
        *machine.items(),
        ("requests of a round", f"{len(lengths)}, {load.concurrency} at once"),
        ("prompts", f"{min(lengths)} to {max(lengths)} tokens"),
        ("output", f"{load.new_tokens} tokens each, greedy, end of sequence ignored"),
    ]
    parts = [
        "# Deterministic requests on a CPU: throughput",
        "Contenders take turns on servers that are up at the same time. Only the ratios mean something "
        "beyond this machine.",
        f"```\n{command}\n```",
        serving.table(("", ""), rows),
        *(comparison_section(comparison, rounds, flags) for comparison, rounds in results),
    ]
    return "\n\n".join(parts) + "\n"


def write_csv(path: Path, rounds: Sequence[Round]) -> None:
    """Every round as a line; counters that a server does not have stay empty."""
    names = list(dict.fromkeys(name for r in rounds for name in r.counters))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "comparison",
                "contender",
                "round",
                "seconds",
                "output_tokens",
                "tokens_per_s",
                "retractions",
                *names,
            ]
        )
        for r in rounds:
            measured = [r.number, f"{r.seconds:.3f}", r.tokens, f"{r.throughput:.2f}", r.retractions]
            writer.writerow([r.comparison, r.contender, *measured, *(r.counters.get(n, "") for n in names)])


# Command line


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``--quick`` sets what was not said otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [comparison.name for comparison in COMPARISONS]
    parser.add_argument("--model", default="smollm2", help="a chat model (default: the demo model)")
    parser.add_argument("--window-size", type=int, default=16, help="rows of a segment (default: 16)")
    parser.add_argument("--verify-batch-size", type=int, default=4, help="segments of a pass (default: 4)")
    parser.add_argument("--requests", type=int, help="requests of a round (default: 32; quick: 6)")
    parser.add_argument("--concurrency", type=int, help="requests in flight (default: 16; quick: 6)")
    parser.add_argument("--new-tokens", type=int, help="output tokens of a request (default: 64; quick: 16)")
    parser.add_argument("--rounds", type=int, help="rounds of a comparison (default: 5; quick: 2)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="comparisons (default: all)")
    parser.add_argument("--quick", action="store_true", help="small rounds, to see that it works")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"report and CSV, without suffix (default: {OUTPUT})"
    )
    arguments = parser.parse_args(argv)
    defaults = (6, 6, 16, 2) if arguments.quick else (32, 16, 64, 5)
    for name, default in zip(("requests", "concurrency", "new_tokens", "rounds"), defaults, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def command_line(argv: Sequence[str]) -> str:
    """The command that gives this report, without the option that says where it goes."""
    kept = serving.without_files(argv, ("--output",))
    return shlex.join(["python", "scripts/bench_llm42_cpu.py", *kept])


def base_flags(arguments: argparse.Namespace) -> list[str]:
    """Flags of every server, then those of LLM-42."""
    window, group = str(arguments.window_size), str(arguments.verify_batch_size)
    llm42 = ("--enable-llm42", "--llm42-window-size", window, "--llm42-verify-batch-size", group)
    return ["--model", arguments.model, *SERVER_FLAGS, *llm42]


def main() -> int:
    """Exit status as in the module's text."""
    serving.exit_on_termination()
    arguments = parse_arguments()
    flags = base_flags(arguments)
    results: list[tuple[Comparison, list[Round]]] = []
    try:
        prompts = serving.load_prompts(arguments.model)
        chosen = [prompts[index % len(prompts)] for index in range(arguments.requests)]
        load = Load(chosen, arguments.concurrency, arguments.new_tokens)
        for comparison in COMPARISONS:
            if comparison.name not in arguments.only:
                continue
            rounds = measure(comparison, load, arguments.rounds, flags)
            results.append((comparison, rounds))
            say(comparison_section(comparison, rounds, flags))
            _write(arguments.output, results, load, flags)
    except (ServingError, requests.RequestException, ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _write(
    output: Path, results: Sequence[tuple[Comparison, list[Round]]], load: Load, flags: Sequence[str]
) -> None:
    """Write what is measured so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    text = report(results, load, command_line(sys.argv[1:]), serving.machine(), flags)
    output.with_suffix(".md").write_text(text)
    write_csv(output.with_suffix(".csv"), [r for _, rounds in results for r in rounds])
    say(f"Report: {output.with_suffix('.md')}")


if __name__ == "__main__":
    sys.exit(main())
