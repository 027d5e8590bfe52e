"""Throughput and latency of stock SGLang, its deterministic mode, and ours with shares of marked requests.

All servers are up at the same time and take turns, so that ratios are of one run: first offline throughput
(one batch of requests, all at once), then, with --rates, online latency (requests at random times). On a GPU
the model is a Llama-3.1-8B with random weights (see scripts/random_weights), on a CPU the demo model.

Every marked request must give the same tokens in every cell: that is checked too. Cells run in order of
worth; each result is kept in a state file at once, so an interrupted run goes on where it stopped. Writes a
Markdown report, all cells as CSV, and a PNG if matplotlib is there.

Exit status: 0 if every cell was measured and no marked request differed, 1 if one differed, 2 if a server
could not be used, 3 if time ran out.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import hashlib
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import requests
import serving
import state_file
from serving import Server, ServingError, increase, say, share

OUTPUT = Path("docs/benchmarks/llm42")
STATE = Path("bench_llm42_state.jsonl")
WEIGHTS_PLUGIN = Path(__file__).parent / "random_weights"

#: Llama-3.1-8B, without its files.
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}

#: Requests of an online cell, of those of an offline one.
ONLINE_PART = 0.3

#: Token ids of prompts; below every vocabulary that is measured.
VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """Lengths of prompts and answers.

    Attributes:
        text: where they come from, for the report.
        prompt, answer: mean length in tokens.
        spread: standard deviation of the logarithm of a length; 0 for fixed lengths.
        part: of --requests that a cell has, so that cells take about as long.
    """

    text: str
    prompt: int
    answer: int
    spread: float = 0.0
    part: float = 1.0

    def lengths(self, count: int, seed: int, scale: float) -> list[tuple[int, int]]:
        """Prompt and answer lengths of ``count`` requests."""
        choice = random.Random(seed)
        return [
            (self._length(choice, self.prompt, scale), self._length(choice, self.answer, scale))
            for _ in range(count)
        ]

    def _length(self, choice: random.Random, mean: int, scale: float) -> int:
        if not self.spread:
            return max(2, round(mean * scale))
        length = choice.lognormvariate(math.log(mean) - self.spread**2 / 2, self.spread)
        return max(4, round(min(length, 1024) * scale))


SHAPES = {
    "sharegpt-like": Shape(
        "log-normal lengths with means 217 and 200 (those of 1,000 ShareGPT requests as vLLM and SGLang "
        "sample them), spread 1, at most 1,024; not the data set itself",
        217,
        200,
        1.0,
    ),
    "1k-256": Shape("1,024 tokens in, 256 out", 1024, 256, part=0.35),
    "1k-1k": Shape("1,024 tokens in, 1,024 out", 1024, 1024, part=0.15),
    "4k-1k": Shape("4,096 tokens in, 1,024 out", 4096, 1024, part=0.05),
}


@dataclass(frozen=True)
class Contender:
    """A server, and how many of its requests are marked.

    Attributes:
        name: as in the report.
        system: which server; contenders of one system share it.
        percent: share of marked requests.
    """

    name: str
    system: str
    percent: int = 0


STOCK = Contender("stock", "stock")

#: The system whose canonical passes have a quarter of --group, and one size.
SMALL = "small"
CONTENDERS = {
    c.name: c
    for c in (
        STOCK,
        Contender("ours-100", "ours", 100),
        Contender("ours-50", "ours", 50),
        Contender("ours-10", "ours", 10),
        Contender("sglang-deterministic", "deterministic"),
        Contender("ours-0", "ours", 0),
        Contender("ours-2", "ours", 2),
        Contender("ours-5", "ours", 5),
        Contender("ours-20", "ours", 20),
        Contender("in-turn-100", "in-turn", 100),
        Contender("verified-100", "verified", 100),
        Contender("verified-50", "verified", 50),
        Contender("verified-10", "verified", 10),
        Contender("one-size-100", "one-size", 100),
        Contender("one-size-10", "one-size", 10),
        Contender("small-100", SMALL, 100),
        Contender("small-50", SMALL, 50),
        Contender("small-10", SMALL, 10),
    )
}
DEFAULT_CONTENDERS = "stock,ours-100,ours-50,ours-10,sglang-deterministic,ours-0"


@dataclass(frozen=True)
class Cell:
    """One measurement; ``rate`` is requests per second, 0 for offline throughput."""

    shape: str
    contender: str
    round: int
    rate: float = 0.0


@dataclass
class Result:
    """What a cell gave.

    Attributes:
        seconds: from the first request sent to the last answer.
        tokens_in, tokens_out: tokens of all requests.
        counters: what ``GET /llm42_stats`` counted meanwhile.
        outputs: a digest of the output of every request, by index.
        marked: which requests were marked.
        ttft, e2e: seconds to the first token and to the last, request by request, where that was measured.
    """

    cell: Cell
    seconds: float
    tokens_in: int
    tokens_out: int
    counters: dict[str, int]
    outputs: list[str]
    marked: list[int]
    ttft: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return self.tokens_out / self.seconds

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**data, "cell": Cell(**data["cell"])})


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens it wants."""

    ids: list[int]
    new_tokens: int


def workload(shape: Shape, count: int, scale: float) -> list[Request]:
    """Requests of a shape: random tokens, the same in every cell."""
    choice = random.Random(7)
    return [
        Request([choice.randrange(10, VOCABULARY) for _ in range(prompt)], answer)
        for prompt, answer in shape.lengths(count, 1, scale)
    ]


def is_marked(index: int, percent: int) -> bool:
    """Whether request ``index`` is marked: evenly spread, and marked at a higher percentage too."""
    position = (index * 37) % 100
    return position < percent


def _sampling(request: Request, marked: bool) -> dict[str, Any]:
    params = {"temperature": 0.0, "max_new_tokens": request.new_tokens, "ignore_eos": True}
    return {**params, "is_deterministic": True} if marked else params


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:12]


def _checked(request: Request, answer: dict[str, Any]) -> str:
    ids = answer["output_ids"]
    if len(ids) != request.new_tokens:
        raise ServingError(f"asked for {request.new_tokens} tokens, got {len(ids)}: {answer['meta_info']}")
    return _digest(ids)


def run_offline(server: Server, work: Sequence[Request], marked: Sequence[bool]) -> tuple[float, list[str]]:
    """Seconds for all requests at once, and a digest of each output.

    Raises:
        ServingError: a request failed or has another number of tokens.
    """
    body = {
        "input_ids": [request.ids for request in work],
        "sampling_params": [_sampling(*item) for item in zip(work, marked, strict=True)],
    }
    seconds, answers = server.client.generate_batch(body)
    return seconds, [_checked(*item) for item in zip(work, answers, strict=True)]


async def run_online(
    server: Server, work: Sequence[Request], marked: Sequence[bool], rate: float
) -> tuple[float, list[str], list[float], list[float]]:
    """The same with requests at random times; also seconds to first and last token of each.

    Raises:
        ServingError: a request failed or has another number of tokens.
    """
    import aiohttp

    choice = random.Random(3)
    delays = [choice.expovariate(rate) for _ in work]

    async def one(session: aiohttp.ClientSession, index: int) -> tuple[str, float, float]:
        request = work[index]
        body = {
            "input_ids": request.ids,
            "sampling_params": _sampling(request, marked[index]),
            "stream": True,
        }
        sent, first, last = time.perf_counter(), 0.0, b""
        async with session.post(f"{server.client.url}/generate", json=body) as reply:
            if reply.status != 200:
                raise ServingError(f"POST /generate: {reply.status} {(await reply.text())[:500]}")
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - sent
                    last = line
        return _checked(request, json.loads(last[6:])), first, time.perf_counter() - sent

    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(serving.REQUEST_TIMEOUT_S),
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=1 << 22,
    ) as session:
        start = time.perf_counter()
        tasks = []
        for index, delay in enumerate(delays):
            await asyncio.sleep(delay)
            tasks.append(asyncio.create_task(one(session, index)))
        answers = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - start
    return seconds, [a[0] for a in answers], [a[1] for a in answers], [a[2] for a in answers]


def measure(cell: Cell, server: Server, count: int, scale: float) -> Result:
    """Run one cell on its server, prefix cache empty.

    Raises:
        ServingError: a request failed.
    """
    part = SHAPES[cell.shape].part * (ONLINE_PART if cell.rate else 1)
    work = workload(SHAPES[cell.shape], max(1, round(count * part)), scale)
    percent = CONTENDERS[cell.contender].percent
    marked = [is_marked(index, percent) for index in range(len(work))]
    server.client.flush_cache()
    before = server.client.statistics()
    ttft: list[float] = []
    e2e: list[float] = []
    if cell.rate:
        seconds, outputs, ttft, e2e = asyncio.run(run_online(server, work, marked, cell.rate))
    else:
        seconds, outputs = run_offline(server, work, marked)
    return Result(
        cell,
        round(seconds, 4),
        sum(len(request.ids) for request in work),
        sum(request.new_tokens for request in work),
        increase(before, server.client.statistics()),
        outputs,
        [index for index, is_set in enumerate(marked) if is_set],
        [round(x, 4) for x in ttft],
        [round(x, 4) for x in e2e],
    )


# Servers


def system_flags(system: str, arguments: argparse.Namespace) -> list[str]:
    """What a system's server is started with beside the flags of all."""
    if system == "stock":
        return []
    if system == "deterministic":
        return ["--enable-deterministic-inference"]
    shape = ("--llm42-window-size", arguments.window, "--llm42-verify-batch-size", arguments.group)
    variant = {
        "in-turn": ["--llm42-disable-overlap-verification"],
        "one-size": ["--llm42-disable-smaller-passes"],
        "verified": ["--llm42-canonical-decode", "never"],
        SMALL: ["--llm42-verify-batch-size", str(arguments.group // 4), "--llm42-disable-smaller-passes"],
    }.get(system, [])
    return ["--enable-llm42", *map(str, shape), *variant, *shlex.split(arguments.ours_flags)]


def common_flags(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Flags of all servers."""
    flags = shlex.split(arguments.server_flags)
    if arguments.device == "cpu":
        return ["--model", "smollm2", "--sleep-on-idle", "--mem-fraction-static", "0.5", *flags]
    config = {**LLAMA_8B, "num_hidden_layers": arguments.layers}
    (folder / "config.json").write_text(json.dumps(config))
    return [
        *("--model", str(folder), "--load-format", "dummy", "--skip-tokenizer-init"),
        *("--attention-backend", "flashinfer", "--context-length", "16384"),
        *("--mem-fraction-static", "0.92", "--stream-interval", "8"),
        *flags,
    ]


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Environment of all servers."""
    if arguments.device == "cpu":
        return {}
    path = os.pathsep.join(filter(None, [str(WEIGHTS_PLUGIN), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "RANDOM_WEIGHTS_OPEN_SHARE": str(arguments.open_share)}


def start(
    stack: ExitStack, systems: Sequence[str], flags: Sequence[str], arguments: argparse.Namespace
) -> dict[str, Server]:
    """Start the servers, all at once on a GPU, and send each a few requests to warm up."""
    environ = environment(arguments)

    def begin(system: str) -> Server:
        return stack.enter_context(
            serving.server([*flags, *system_flags(system, arguments)], system, environ)
        )

    with ThreadPoolExecutor(1 if arguments.device == "cpu" else len(systems)) as pool:
        servers = dict(zip(systems, pool.map(begin, systems), strict=True))
    warm = workload(SHAPES["sharegpt-like"], min(arguments.requests, 64), arguments.scale)
    for system, server in servers.items():
        began = time.perf_counter()
        for percent in (0, 50) if server.client.enable_llm42 else (0,):
            run_offline(server, warm, [is_marked(index, percent) for index in range(len(warm))])
        # Python's collector looks at all that was imported now and then, which takes 0.4 s.
        requests.post(f"{server.client.url}/freeze_gc", timeout=60).raise_for_status()
        say(f"{system} is warm after {time.perf_counter() - began:.1f} s")
    return servers


# Report


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """All cells in order of worth: the online ones come after the first round."""
    for number in range(arguments.rounds):
        for shape in arguments.shapes.split(","):
            for contender in arguments.contenders.split(","):
                yield Cell(shape, contender, number)
        for rate in filter(None, arguments.rates.split(",") if number == 0 else ()):
            for contender in arguments.online_contenders.split(","):
                yield Cell(arguments.shapes.split(",")[0], contender, 0, float(rate))


def differences(results: Sequence[Result]) -> dict[str, tuple[int, int]]:
    """Comparisons and differences of outputs with those of the first cell that has the request alike.

    Marked requests are compared with marked ones of servers with the same canonical shape, to which output
    belongs, and for scale those of stock with stock.
    """
    found = {"marked": [0, 0], "stock, not marked": [0, 0]}
    first: dict[tuple[str, bool, str, int], str] = {}
    for result in results:
        small = CONTENDERS[result.cell.contender].system == SMALL
        kinds = [("marked", result.marked)]
        if result.cell.contender == STOCK.name:
            kinds.append(("stock, not marked", list(range(len(result.outputs)))))
        for kind, indices in kinds:
            for index in indices:
                key = (kind, small, result.cell.shape, index)
                if key not in first:
                    first[key] = result.outputs[index]
                    continue
                found[kind][0] += 1
                found[kind][1] += first[key] != result.outputs[index]
    return {kind: (compared, differing) for kind, (compared, differing) in found.items()}


def _ratio(result: Result, results: Sequence[Result]) -> float | None:
    """Throughput over stock's in the same round."""
    same = [
        r
        for r in results
        if (r.cell.shape, r.cell.round, r.cell.rate, r.cell.contender)
        == (result.cell.shape, result.cell.round, result.cell.rate, STOCK.name)
    ]
    return result.throughput / same[0].throughput if same else None


def offline_table(results: Sequence[Result], shape: str) -> str:
    """Throughput of a shape, a line per contender: medians over rounds."""
    rows = []
    for contender in CONTENDERS:
        mine = [r for r in results if (r.cell.shape, r.cell.contender, r.cell.rate) == (shape, contender, 0)]
        if not mine:
            continue
        ratios = [ratio for r in mine if (ratio := _ratio(r, results)) is not None]
        counters = serving.total(r.counters for r in mine)
        out = sum(r.tokens_out for r in mine)
        marked = sum(r.tokens_out * len(r.marked) // len(r.outputs) for r in mine)
        passes = counters.get("verify_forward_passes", 0)
        rows.append(
            (
                contender,
                len(mine),
                f"{statistics.median(r.throughput for r in mine):.0f}",
                f"{statistics.median(ratios):.3f}" if ratios else "-",
                f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else "-",
                passes,
                share(counters.get("tokens_rolled_back", 0), marked),
                share(counters.get("verify_total_tokens", 0), out),
                share(
                    counters.get("padded_rows", 0),
                    sum(
                        counters.get(name, 0)
                        for name in ("padded_rows", "verify_total_tokens", "prompt_tokens")
                    ),
                ),
            )
        )
    header = (
        *("contender", "rounds", "output tokens/s", "of stock", "lowest to highest", "passes"),
        *("recomputed of marked (about)", "verified of all output", "padding in passes"),
    )
    return serving.table(header, rows)


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def online_table(results: Sequence[Result]) -> str:
    """Latency, a line per rate and contender."""
    rows = [
        (
            r.cell.shape,
            f"{r.cell.rate:g}",
            r.cell.contender,
            *(f"{1000 * _percentile(r.ttft, p):.0f}" for p in (50, 99)),
            *(f"{_percentile(r.e2e, p):.2f}" for p in (50, 99)),
            f"{r.throughput:.0f}",
        )
        for r in results
        if r.cell.rate
    ]
    header = (
        "shape",
        "requests/s",
        "contender",
        "TTFT P50 ms",
        "TTFT P99 ms",
        "E2E P50 s",
        "E2E P99 s",
        "tokens/s",
    )
    return serving.table(header, rows)


def device_name() -> str:
    """The GPU as its driver calls it, empty without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _without_paths(flags: Sequence[str]) -> list[str]:
    """Flags without the folder of the random model, which is another one every time."""
    return ["MODEL" if flag.startswith(tempfile.gettempdir()) else flag for flag in flags]


def report(results: Sequence[Result], arguments: argparse.Namespace, flags: Sequence[str]) -> str:
    """The Markdown report."""
    machine = {"GPU": "; ".join(device_name().splitlines()) or "none", **serving.machine()}
    model = (
        f"Llama-3.1-8B's shape with {arguments.layers} layers and random weights (scripts/random_weights, "
        f"open share {arguments.open_share:g})"
        if arguments.device != "cpu"
        else "the demo model (SmolLM2-135M-Instruct)"
    )
    options = serving.without_files(sys.argv[1:], ("--state", "--output", "--wait-for"))
    lines = [
        "# LLM-42: throughput against stock SGLang",
        "",
        f"Model: {model}. Greedy, fixed output lengths (ignore_eos). Prefix caches are emptied before "
        "every cell. All servers are up together and take turns; a ratio is of one round. Once warm, each "
        "froze what Python's collector need not look at (SGLang's /freeze_gc). "
        f"W = {arguments.window}, G = {arguments.group}; {arguments.requests} requests per cell.",
        "",
        f"    {shlex.join(['python', 'scripts/bench_llm42.py', *options])}",
        "",
        f"Servers: `{shlex.join(_without_paths(flags))}`",
        "",
        serving.table(("machine", ""), machine.items()),
        "",
    ]
    for shape in dict.fromkeys(r.cell.shape for r in results if not r.cell.rate):
        lines += [f"## Offline, {shape}", "", SHAPES[shape].text + ".", "", offline_table(results, shape), ""]
    if any(r.cell.rate for r in results):
        lines += ["## Online", "", online_table(results), ""]
    lines += ["## Determinism", ""]
    rows = [(kind, *pair) for kind, pair in differences(results).items()]
    lines += [serving.table(("outputs", "compared", "different"), rows), ""]
    return "\n".join(lines)


def write(results: Sequence[Result], arguments: argparse.Namespace, flags: Sequence[str]) -> None:
    """Report, CSV and, if possible, figure."""
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(report(results, arguments, flags))
    names = sorted({name for r in results for name in r.counters})
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        header = ["shape", "rate", "contender", "round", "seconds", "tokens_in", "tokens_out", "of_stock"]
        writer.writerow([*header, "ttft_p50", "ttft_p99", "e2e_p50", "e2e_p99", *names])
        for r in results:
            ratio = _ratio(r, results)
            latencies = [
                f"{_percentile(values, p):.4f}" if values else ""
                for values in (r.ttft, r.e2e)
                for p in (50, 99)
            ]
            c = r.cell
            first = [c.shape, c.rate, c.contender, c.round, r.seconds, r.tokens_in, r.tokens_out]
            counters = [r.counters.get(name, "") for name in names]
            writer.writerow([*first, "" if ratio is None else f"{ratio:.4f}", *latencies, *counters])
    _plot(results, output.with_suffix(".png"))


def _plot(results: Sequence[Result], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no matplotlib: no figure")
        return
    shapes = list(dict.fromkeys(r.cell.shape for r in results if not r.cell.rate))
    if not shapes:
        return
    figure = Figure(figsize=(4.5 * len(shapes), 3.2), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        names, values = [], []
        for name in CONTENDERS:
            mine = [r for r in results if (r.cell.shape, r.cell.contender, r.cell.rate) == (shape, name, 0)]
            ratios = [ratio for r in mine if (ratio := _ratio(r, results)) is not None]
            if ratios:
                names.append(name)
                values.append(statistics.median(ratios))
        axes.barh(names[::-1], values[::-1])
        axes.axvline(1, color="gray", linewidth=0.8)
        axes.set_title(shape)
        axes.set_xlabel("throughput of stock")
    figure.savefig(path, dpi=120)


# Program


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if device_name() else "cpu")
    parser.add_argument("--shapes", default="sharegpt-like,1k-256", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--contenders", default=DEFAULT_CONTENDERS, help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--requests", type=int, default=768, help="of a cell; shapes with long ones have a part"
    )
    parser.add_argument("--rates", default="", help="requests per second of online cells, such as 4,8")
    parser.add_argument("--online-contenders", default="stock,ours-100", help="of online cells")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32, help="of the random model")
    parser.add_argument("--open-share", type=float, default=0.1, help="see scripts/random_weights")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all lengths, for a trial")
    parser.add_argument(
        "--server-flags",
        default="--max-total-tokens 120000 --max-running-requests 256",
        help="of all servers",
    )
    parser.add_argument("--ours-flags", default="", help="of ours")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--wait-for", type=Path, help="measure once this file exists, servers being up")
    parser.add_argument("--state", type=Path, default=STATE, help="where results are kept")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="path without suffix")
    arguments = parser.parse_args(argv)
    known_options = (("shapes", SHAPES), ("contenders", CONTENDERS), ("online_contenders", CONTENDERS))
    for option, known in known_options:
        unknown = set(getattr(arguments, option).split(",")) - set(known)
        if unknown:
            parser.error(
                f"--{option.replace('_', '-')}: {sorted(unknown)} unknown; choose from {list(known)}"
            )
    if min(arguments.rounds, arguments.requests) < 1:
        parser.error("--rounds and --requests must be at least 1")
    return arguments


def configuration(arguments: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """What must not change while a state file grows."""
    names = ("requests", "window", "group", "layers", "open_share", "scale", "ours_flags", "device")
    model = flags.index("--model") + 1
    return {
        **{name: getattr(arguments, name) for name in names},
        "flags": [*flags[:model], *flags[model + 1 :]],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, write the report, return the exit status."""
    began = time.monotonic()
    arguments = parse(argv)
    serving.exit_on_termination()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = common_flags(arguments, folder)
        try:
            known = state_file.read(arguments.state, configuration(arguments, flags))
        except state_file.StateError as error:
            say(f"error: {error}")
            return 2
        results = [Result.from_json(item) for item in known]
        done = {result.cell for result in results}
        missing = [cell for cell in cells(arguments) if cell not in done]
        systems = list(dict.fromkeys(CONTENDERS[cell.contender].system for cell in missing))
        try:
            servers = start(stack, systems, flags, arguments) if systems else {}
            while missing and arguments.wait_for and not arguments.wait_for.exists():
                time.sleep(0.5)
            for cell in missing:
                if time.monotonic() - began > arguments.seconds:
                    say("time ran out")
                    write(results, arguments, flags)
                    return 3
                result = measure(
                    cell, servers[CONTENDERS[cell.contender].system], arguments.requests, arguments.scale
                )
                results.append(result)
                state_file.append(arguments.state, asdict(result))
                ratio = _ratio(result, results)
                say(
                    f"{cell}: {result.throughput:.0f} tokens/s" + (f", {ratio:.3f} of stock" if ratio else "")
                )
                write(results, arguments, flags)
        except (ServingError, requests.RequestException, OSError) as error:
            say(f"error: {error}")
            return 2
        write(results, arguments, flags)
    return 1 if differences(results)["marked"][1] else 0


if __name__ == "__main__":
    sys.exit(main())
