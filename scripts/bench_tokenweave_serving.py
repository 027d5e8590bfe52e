"""TokenWeave in SGLang on several GPUs: prefill latency and throughput against stock SGLang.

    python scripts/bench_tokenweave_serving.py --tp-size 4 --model llama-70b --layers 20

Contenders, all up at the same time on the same GPUs and taking turns, so that ratios are of one run:

    stock             SGLang with its defaults: its all-reduces, FlashInfer's fusion, CUDA graphs
    fused             --enable-tokenweave --tokenweave-split never: the fused step, no batch is cut
    woven             --enable-tokenweave, with a tuning table made on these GPUs, after it has learned
    no-communication  stock without all-reduces (scripts/no_communication): nonsense output, the bound
    woven-unreserved  woven, with --no-tokenweave-reserve: products use all multiprocessors (if asked for)

The models have random weights and few layers, so that four of each fit. Results are kept in a state file; an
interrupted run goes on where it stopped. Writes a Markdown report, CSV, and a PNG if matplotlib is there.

Exit status: 0, or 2 if stock could not be measured. A contender that does not start is named in the report.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import bench_llm42
import requests
import serving
import state_file
from serving import Server, ServingError, say

from sglang_ext.tokenweave.trials import ORDER

NO_COMMUNICATION = Path(__file__).parent / "no_communication"

#: Without their files; layers as asked for.
MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": bench_llm42.LLAMA_8B,
    "llama-70b": {
        **bench_llm42.LLAMA_8B,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    # For a trial of this program without a GPU.
    "tiny": {
        **bench_llm42.LLAMA_8B,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": bench_llm42.VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}

CONTENDERS: dict[str, tuple[str, ...]] = {
    "stock": (),
    "fused": ("--enable-tokenweave", "--tokenweave-split", "never"),
    "woven": ("--enable-tokenweave",),
    "no-communication": ("--enforce-disable-flashinfer-allreduce-fusion",),
    "woven-unreserved": ("--enable-tokenweave", "--no-tokenweave-reserve"),
}
DEFAULT_CONTENDERS = ("stock", "fused", "woven", "no-communication")
#: Those that cut batches.
WOVEN = ("woven", "woven-unreserved")
#: The bound may differ in what else SGLang does, so it is no contender for "never loses".
STOCK, BOUND = "stock", "no-communication"


@dataclass(frozen=True)
class Load:
    """What is sent at once: ``requests`` prompts of ``prompt`` random tokens, ``answer`` tokens each."""

    name: str
    requests: int
    prompt: int
    answer: int

    @property
    def is_latency(self) -> bool:
        """One prompt, one token: the time is the latency of its prefill."""
        return self.requests == 1


PREFILLS = tuple(Load(f"prefill-{n}", 1, n, 1) for n in (512, 1024, 2048, 4096, 8192, 16384))
THROUGHPUTS = (Load("4k-in-64-out", 32, 4096, 64), Load("512-in-256-out", 128, 512, 256))


@dataclass(frozen=True)
class Result:
    """Seconds that a load took on a contender, in a round."""

    contender: str
    load: str
    round: int
    seconds: float


def run(server: Server, load: Load, seed: int) -> float:
    """Seconds for ``load``, on prompts that no cache knows.

    Raises:
        ServingError: a request failed or has another number of tokens.
    """
    choice = random.Random(seed)
    prompts = [
        [choice.randrange(10, bench_llm42.VOCABULARY) for _ in range(load.prompt)]
        for _ in range(load.requests)
    ]
    sampling = {"temperature": 0.0, "max_new_tokens": load.answer, "ignore_eos": True}
    seconds, answers = server.client.generate_batch({"input_ids": prompts, "sampling_params": sampling})
    for answer in answers:
        if len(answer["output_ids"]) != load.answer:
            raise ServingError(f"asked for {load.answer} tokens: {answer['meta_info']}")
    return seconds


def common_flags(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Flags of all servers; writes the model's configuration into ``folder``."""
    config = {**MODELS[arguments.model], "num_hidden_layers": arguments.layers}
    (folder / "config.json").write_text(json.dumps(config))
    return [
        *("--model", str(folder), "--load-format", "dummy", "--skip-tokenizer-init"),
        *("--tp-size", str(arguments.tp_size), "--attention-backend", "flashinfer"),
        *("--chunked-prefill-size", str(arguments.chunk), "--max-prefill-tokens", str(arguments.chunk)),
        *("--context-length", "20480", "--mem-fraction-static", "0.92"),
        *("--max-total-tokens", str(arguments.max_total_tokens), "--max-running-requests", "128"),
        *shlex.split(arguments.server_flags),
    ]


def tune(arguments: argparse.Namespace, folder: Path) -> str:
    """Measure the tuning table for the model in ``folder``; returns what the program printed."""
    command = [
        *(sys.executable, "-m", "sglang_ext.tokenweave.tune", "--model-path", str(folder)),
        *("--tp-size", str(arguments.tp_size), "--max-tokens", str(arguments.chunk)),
        *("--output", str(folder / "tables")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise ServingError(f"the tuning program failed: {done.stderr[-2000:]}")
    return done.stdout


def start(
    stack: ExitStack, names: Sequence[str], flags: Sequence[str], folder: Path
) -> tuple[dict[str, Server], dict[str, str]]:
    """Start the servers, all at once; also why the others did not."""

    def begin(name: str) -> Server | str:
        own = list(CONTENDERS[name])
        if name in WOVEN:
            own += ["--tokenweave-table", str(folder / "tables")]
        environment = {}
        if name == BOUND:
            path = os.pathsep.join(filter(None, [str(NO_COMMUNICATION), os.environ.get("PYTHONPATH", "")]))
            environment = {"PYTHONPATH": path}
        try:
            return stack.enter_context(serving.server([*flags, *own], name, environment))
        except ServingError as error:
            return str(error)

    with ThreadPoolExecutor(len(names)) as pool:
        begun = dict(zip(names, pool.map(begin, names), strict=True))
    failed = {name: result for name, result in begun.items() if isinstance(result, str)}
    for name, reason in failed.items():
        say(f"{name} did not start: {reason}")
    return {name: result for name, result in begun.items() if isinstance(result, Server)}, failed


def measure(
    servers: dict[str, Server], arguments: argparse.Namespace, keep: Callable[[Result], None], done: set[Any]
) -> dict[str, str]:
    """Run every load on every server in turn; returns why contenders were given up."""
    lost: dict[str, str] = {}
    began = time.monotonic()
    prefills = [load for load in PREFILLS if load.prompt <= arguments.longest]
    for name, server in servers.items():
        # A server that cuts batches tries both ways on the first ones of each size.
        times = len(ORDER) + 1 if name in WOVEN else 1
        for load, number in product((*prefills, Load("warm-up", 16, 256, 16)), range(times)):
            if name not in lost:
                seed = zlib.crc32(f"warm-up {load.name} {number}".encode())
                _attempt(lost, name, lambda s=server, x=load, n=seed: run(s, x, n))  # type: ignore[misc]
    plan = [(load, number) for load in prefills for number in range(arguments.rounds)]
    plan += [(load, number) for load in THROUGHPUTS for number in range(arguments.throughput_rounds)]
    # By rounds, so that an early end leaves whole rounds behind.
    for load, number in sorted(plan, key=lambda item: (item[1], not item[0].is_latency)):
        for name, server in servers.items():
            if name in lost or (name, load.name, number) in done:
                continue
            if time.monotonic() - began > arguments.seconds:
                say("time ran out")
                return lost
            seed = zlib.crc32(f"{load.name} {number}".encode())
            seconds = _attempt(lost, name, lambda s=server, x=load, n=seed: run(s, x, n))  # type: ignore[misc]
            if seconds is not None:
                keep(Result(name, load.name, number, round(seconds, 5)))
    return lost


def _attempt(lost: dict[str, str], name: str, work: Callable[[], float]) -> float | None:
    try:
        return work()
    except (ServingError, requests.RequestException) as error:
        lost[name] = f"{type(error).__name__}: {str(error)[:300]}"
        say(f"{name} is given up: {lost[name]}")
        return None


# Report


def medians(results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Median seconds by load and contender."""
    grouped: dict[tuple[str, str], list[float]] = {}
    for result in results:
        grouped.setdefault((result.load, result.contender), []).append(result.seconds)
    return {key: statistics.median(values) for key, values in grouped.items()}


def report(results: Sequence[Result], arguments: argparse.Namespace, notes: Sequence[str]) -> str:
    """The Markdown report."""
    machine = {"GPU": bench_llm42.device_name().replace("\n", "; "), **serving.machine()}
    middle = medians(results)
    names = [name for name in CONTENDERS if any(r.contender == name for r in results)]
    rows = []
    for load in (*PREFILLS, *THROUGHPUTS):
        if (load.name, STOCK) not in middle:
            continue
        stock = middle[load.name, STOCK]
        rounds = sum(r.load == load.name and r.contender == STOCK for r in results)
        cells = [
            f"{1000 * middle[load.name, name]:.1f} ms, {stock / middle[load.name, name]:.3f}"
            if (load.name, name) in middle
            else "-"
            for name in names
        ]
        rows.append((load.name, rounds, *cells))
    options = serving.without_files(sys.argv[1:], ("--state", "--output"))
    lines = [
        f"# TokenWeave in SGLang: {arguments.model}, TP {arguments.tp_size}",
        "",
        f"{arguments.layers} layers, random weights. A prefill is one prompt and one output token, as a "
        "client sees it; the other loads are sent at once. Each cell: median time, and stock's time over it "
        "(above 1 is faster than stock). All servers are up together and take turns.",
        "",
        f"    {shlex.join(['python', 'scripts/bench_tokenweave_serving.py', *options])}",
        "",
        serving.table(("load", "rounds", *names), rows),
        "",
        *(f"- {note}" for note in notes),
        "",
        serving.table(("machine", ""), machine.items()),
        "",
    ]
    return "\n".join(lines)


def write(results: Sequence[Result], arguments: argparse.Namespace, notes: Sequence[str]) -> None:
    """Report, CSV and figure."""
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(report(results, arguments, notes))
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["contender", "load", "round", "seconds"])
        writer.writerows((r.contender, r.load, r.round, r.seconds) for r in results)
    _plot(results, output.with_suffix(".png"), f"{arguments.model}, TP {arguments.tp_size}")


def _plot(results: Sequence[Result], path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    middle = medians(results)
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in CONTENDERS:
        points = [
            (load.prompt, middle[load.name, STOCK] / middle[load.name, name])
            for load in PREFILLS
            if {(load.name, STOCK), (load.name, name)} <= middle.keys()
        ]
        if points:
            axes.semilogx(*zip(*points, strict=True), marker=".", label=name, base=2)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_title(title)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("stock's time / time")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


# Program


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="llama-70b")
    parser.add_argument("--layers", type=int, default=20, help="of the random model (default: 20)")
    parser.add_argument("--tp-size", type=int, required=True)
    parser.add_argument(
        "--contenders", default=",".join(DEFAULT_CONTENDERS), help=f"of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of each prefill (default: 9)")
    parser.add_argument("--throughput-rounds", type=int, default=2, help="of the other loads (default: 2)")
    parser.add_argument("--longest", type=int, default=16384, help="prefill in tokens (default: 16384)")
    parser.add_argument("--chunk", type=int, default=16384, help="--chunked-prefill-size of all servers")
    parser.add_argument("--max-total-tokens", type=int, default=140000, help="KV slots of each server")
    parser.add_argument("--server-flags", default="", help="further flags of all servers")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no measurement after so many")
    parser.add_argument("--state", type=Path, default=Path("bench_tokenweave_serving_state.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/tokenweave-serving"))
    arguments = parser.parse_args(argv)
    unknown = set(arguments.contenders.split(",")) - set(CONTENDERS)
    if unknown or STOCK not in arguments.contenders.split(","):
        parser.error(f"--contenders: some of {', '.join(CONTENDERS)}, {STOCK} among them")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, write the report, return the exit status."""
    arguments = parse(argv)
    serving.exit_on_termination()
    configuration = {
        name: getattr(arguments, name) for name in ("model", "layers", "tp_size", "chunk", "server_flags")
    }
    try:
        results = [Result(**item) for item in state_file.read(arguments.state, configuration)]
    except state_file.StateError as error:
        say(f"error: {error}")
        return 2
    notes: list[str] = []

    def keep(result: Result) -> None:
        results.append(result)
        state_file.append(arguments.state, asdict(result))

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = common_flags(arguments, folder)
        names = arguments.contenders.split(",")
        try:
            if set(WOVEN).intersection(names):
                printed = tune(arguments, folder).replace(str(folder), "FOLDER")
                notes += printed.splitlines()
                say(printed)
        except ServingError as error:
            say(f"error: {error}")
            notes.append(str(error).splitlines()[0])
        servers, failed = start(stack, names, flags, folder)
        notes += [f"{name} did not start: {reason.splitlines()[-1][:300]}" for name, reason in failed.items()]
        done = {(r.contender, r.load, r.round) for r in results}
        lost: dict[str, str] = {}
        try:
            lost = measure(servers, arguments, keep, done)
        finally:  # also where somebody's time limit ends it; servers take their time to stop
            notes += [f"{name} was given up: {reason}" for name, reason in lost.items()]
            for name, server in servers.items():
                if name in lost:
                    say(f"{name}'s log ends with:\n{server.tail(40)}")
                notes += [f"{name}: {line}" for line in tokenweave_lines(server)]
            write(results, arguments, notes)
    return 0 if any(r.contender == STOCK for r in results) else 2


def tokenweave_lines(server: Server) -> list[str]:
    """What a server's log says about TokenWeave, each line once, without its time."""
    lines = [
        line.split("] ", 1)[-1].strip()
        for line in server.log.read_text(errors="replace").splitlines()
        if "TokenWeave" in line and "server_args" not in line
    ]
    return list(dict.fromkeys(line[:700] for line in lines))[:20]


if __name__ == "__main__":
    sys.exit(main())
