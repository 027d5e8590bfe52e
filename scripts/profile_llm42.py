"""Where the GPU's time goes while marked and unmarked requests run: busy, idle, both streams busy.

Starts one server after the other with scripts/bench_llm42.py's model and flags, sends the requests of a cell,
and lets SGLang's profiler record the kernels of some decode steps in the middle. Prints a Markdown table per
contender, with the kernels that took longest and what the GPU waited for before it went on.

Exit status: 0, or 2 if a server could not be used or no kernel was recorded (on a CPU there is none).
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_llm42 as bench
import requests
import serving
from serving import Server, ServingError, say

#: Categories of a trace's events that occupy the GPU.
ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")

#: Gaps shorter than this, in microseconds, lie between the kernels of one graph.
GAP_US = 20.0

#: Seconds until a trace must be written.
TRACE_TIMEOUT_S = 120

Span = tuple[float, float]


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy of a trace; times in microseconds."""

    name: str
    stream: int
    begin: float
    end: float


def kernels(trace: dict[str, Any]) -> list[Kernel]:
    """Everything that ran on the GPU, in order of its begin."""
    found = [
        Kernel(event["name"], event["args"]["stream"], event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") in ON_THE_GPU and "stream" in event.get("args", {})
    ]
    return sorted(found, key=lambda kernel: kernel.begin)


def union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint ascending spans that cover the same time."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """Time that disjoint ``spans`` cover."""
    return sum(end - begin for begin, end in spans)


def gaps(found: Sequence[Kernel]) -> Counter[str]:
    """Idle microseconds in gaps of at least :data:`GAP_US`, by the name of the kernel that ended them."""
    idle: Counter[str] = Counter()
    reached = found[0].begin
    for kernel in found:
        if kernel.begin - reached >= GAP_US:
            idle[kernel.name] += round(kernel.begin - reached)
        reached = max(reached, kernel.end)
    return idle


def summary(found: Sequence[Kernel], steps: int, top: int = 8) -> str:
    """Markdown tables of one trace over ``steps`` steps of the scheduler.

    Raises:
        ValueError: nothing ran on a GPU.
    """
    if not found:
        raise ValueError("no kernel was recorded")
    by_stream: defaultdict[int, list[Span]] = defaultdict(list)
    time_of: Counter[str] = Counter()
    for kernel in found:
        by_stream[kernel.stream].append((kernel.begin, kernel.end))
        time_of[kernel.name] += round(kernel.end - kernel.begin)
    whole = max(kernel.end for kernel in found) - found[0].begin
    busy_of = {stream: length(union(spans)) for stream, spans in by_stream.items()}
    busy = length(union((kernel.begin, kernel.end) for kernel in found))
    rows = [
        ("milliseconds a step", f"{whole / steps / 1000:.2f}"),
        ("GPU busy", f"{busy / whole:.1%}"),
        ("GPU idle", f"{1 - busy / whole:.1%}"),
        *(
            (f"stream {stream} busy", f"{share / whole:.1%}")
            for stream, share in sorted(busy_of.items(), key=lambda item: -item[1])
            if share / whole > 0.001
        ),
        ("several streams busy", f"{(sum(busy_of.values()) - busy) / whole:.1%}"),
    ]
    longest = [(name[:90], f"{spent / whole:.1%}") for name, spent in time_of.most_common(top)]
    waits = [(name[:90], f"{spent / whole:.1%}") for name, spent in gaps(found).most_common(top)]
    return "\n\n".join(
        [
            serving.table(("", ""), rows),
            serving.table(("kernel", "of the time"), longest),
            serving.table(("idle before", "of the time"), waits),
        ]
    )


def record(server: Server, percent: int, arguments: argparse.Namespace, folder: Path) -> list[Kernel]:
    """Kernels of some steps of the scheduler while a cell's requests run.

    Raises:
        ServingError: a request failed, or no trace was written.
    """
    work = bench.workload(bench.SHAPES[arguments.shape], arguments.requests, arguments.scale)
    marked = [bench.is_marked(index, percent) for index in range(len(work))]
    server.client.flush_cache()
    failure: list[BaseException] = []

    def load() -> None:
        try:
            bench.run_offline(server, work, marked)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(arguments.after)
    body = {"output_dir": str(folder), "num_steps": arguments.steps, "activities": ["GPU"]}
    reply = requests.post(f"{server.client.url}/start_profile", json=body, timeout=TRACE_TIMEOUT_S)
    thread.join()
    if failure:
        raise ServingError(f"the load failed: {failure[0]}")
    if reply.status_code != 200:
        raise ServingError(f"POST /start_profile: {reply.status_code} {reply.text[:500]}")
    return kernels(json.loads(gzip.decompress(_trace(folder).read_bytes())))


def _trace(folder: Path) -> Path:
    """The trace in ``folder``, once it has been written.

    Raises:
        ServingError: there is none in time.
    """
    deadline, size = time.monotonic() + TRACE_TIMEOUT_S, -1
    while time.monotonic() < deadline:
        for path in folder.rglob("*.trace.json.gz"):
            if path.stat().st_size == size:
                return path
            size = path.stat().st_size
        time.sleep(1)
    raise ServingError("SGLang wrote no trace: did the load end before --steps steps?")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", default="stock,ours-10,ours-100", help="of scripts/bench_llm42.py")
    parser.add_argument("--shape", default="sharegpt-like", choices=bench.SHAPES)
    parser.add_argument("--after", type=float, default=4.0, help="seconds of load before the recording")
    parser.add_argument("--steps", type=int, default=100, help="steps of the scheduler to record")
    parser.add_argument("--output", type=Path, help="file for the report")
    parser.add_argument("--traces", type=Path, help="folder for SGLang's traces (default: not kept)")
    mine, rest = parser.parse_known_args(argv)
    arguments = bench.parse(rest)
    for name, value in vars(mine).items():
        setattr(arguments, name, value)
    if mine.traces and mine.traces.exists() and (not mine.traces.is_dir() or any(mine.traces.iterdir())):
        parser.error(f"--traces {mine.traces}: an empty folder, or one to be made, is needed")
    if unknown := set(mine.contenders.split(",")) - set(bench.CONTENDERS):
        parser.error(f"--contenders: {sorted(unknown)} unknown; choose from {list(bench.CONTENDERS)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status as in the module's text."""
    arguments = parse(argv)
    serving.exit_on_termination()
    parts: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept = (arguments.traces or folder).resolve()  # the server writes there, from a folder of its own
        flags = bench.common_flags(arguments, folder)
        contenders = [bench.CONTENDERS[name] for name in arguments.contenders.split(",")]
        try:
            servers = bench.start(stack, list(dict.fromkeys(c.system for c in contenders)), flags, arguments)
            for contender in contenders:
                traces = kept / contender.name
                traces.mkdir(parents=True)
                found = record(servers[contender.system], contender.percent, arguments, traces)
                parts.append(f"## {contender.name}\n\n{summary(found, arguments.steps)}\n")
                say(parts[-1])
                if arguments.output:  # after each, so that an early end leaves whole ones behind
                    arguments.output.write_text("\n".join(parts))
        except (ServingError, ValueError, requests.RequestException, OSError) as error:
            say(f"error: {error}")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
