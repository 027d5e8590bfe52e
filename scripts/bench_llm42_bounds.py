"""What a canonical pass costs on this GPU, and how much of it could be hidden beside decode.

For each canonical shape: the time of a pass alone, captured and eager, and of one that computes prompts. For
each decode batch: the time of a step alone, then of steps and passes one after the other, and of both on two
streams. The two bounds of hiding are their sum (one after the other) and the longer of them (perfectly
overlapped).

No scheduler and no server: SGLang's model runner with its own decode graphs, our captured pass, random
weights of Llama-3.1-8B's shape. Writes a CSV and prints a table. --high-priority-decode captures SGLang's
decode graphs on a stream of high priority; --sms runs the pass on so many multiprocessors (a green context).
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_llm42 import LLAMA_8B, WEIGHTS_PLUGIN, device_name
from serving import say, table

Launch = Callable[[], object]


def load(layers: int, high_priority: bool, batches: Sequence[int], folder: Path) -> Any:
    """SGLang's model runner with decode graphs for ``batches``."""
    sys.path.insert(0, str(WEIGHTS_PLUGIN))
    import random_weights
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs

    from sglang_ext import launch_server
    from sglang_ext.doctor import worker

    load_plugins()
    random_weights.register()
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": layers}))
    server_args = launch_server.parse(
        [
            *("--model", str(folder), "--load-format", "dummy", "--skip-tokenizer-init"),
            *(
                "--attention-backend",
                "flashinfer",
                "--context-length",
                "8192",
                "--max-total-tokens",
                "300000",
            ),
            *("--max-running-requests", "512", "--cuda-graph-backend-prefill", "disabled"),
            *("--cuda-graph-bs-decode", *map(str, batches), "--mem-fraction-static", "0.85"),
        ]
    )
    runner = worker.load(server_args, PortArgs.init_new(server_args), 0)
    original = torch.cuda.Stream
    if high_priority:
        torch.cuda.Stream = lambda *args, **kwargs: original(priority=-1)  # type: ignore[misc, assignment]
    try:
        runner.init_cuda_graphs()
    finally:
        torch.cuda.Stream = original  # type: ignore[misc]
    return runner


def decode_step(runner: Any, batch_size: int, length: int) -> Launch:
    """A decode step of ``batch_size`` requests that have ``length`` tokens; the same one at every call."""
    from sglang.benchmark import one_batch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    reqs = one_batch.prepare_synthetic_inputs_for_latency_test(
        batch_size, 1, [[7 + i] for i in range(batch_size)]
    )
    token_ids, _, batch = one_batch.extend(reqs, runner)
    # Prompts of `length` tokens would only take time: their slots are enough, whatever is in them.
    pool = runner.req_to_token_pool.req_to_token
    slots = runner.token_to_kv_pool_allocator.alloc(batch_size * length).view(batch_size, length)
    pool[batch.req_pool_indices, :length] = slots.to(pool.dtype)
    batch.seq_lens = torch.full_like(batch.seq_lens, length)
    batch.seq_lens_cpu = torch.full_like(batch.seq_lens_cpu, length)
    for req in reqs:
        req.kv_committed_len = req.kv.kv_allocated_len = length
    batch.input_ids = token_ids.to(torch.int64)
    batch.prepare_for_decode()
    forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
    return lambda: runner.forward(forward_batch)


@functools.cache
def green_context(sms: int) -> Any:
    """The context of ``sms`` multiprocessors; kept, because its streams and graphs end with it."""
    from torch.cuda.green_contexts import GreenContext

    return GreenContext.create(sms, 0)


def canonical_pass(
    runner: Any, rows: int, segments: int, length: int, sms: int
) -> tuple[Launch, Launch, Launch, Any]:
    """A pass whose segments verify at ``length`` tokens, captured and eager; one of prompts of a quarter of
    that length, captured; and the stream they belong on."""
    from sglang_ext.llm42.attention import block_rows, canonical_attention_factory
    from sglang_ext.llm42.canonical_graph import CapturedCanonicalPass
    from sglang_ext.llm42.canonical_pass import CandidateTable, CanonicalPass, PassSegment
    from sglang_ext.llm42.lane import SegmentKind

    stream = green_context(sms).Stream() if sms else torch.cuda.Stream()
    block = block_rows(runner.device, rows)
    eager = CanonicalPass(runner, segments, rows, canonical_attention_factory(runner), block_rows=block)
    captured = CapturedCanonicalPass(eager, stream)
    candidates = CandidateTable(runner.req_to_token_pool.req_to_token.shape[0], 4096, runner.device)
    work = [PassSegment(SegmentKind.VERIFY, 1 + g, length - rows - 1, (), rows) for g in range(segments)]
    prompt = min(max(1, length // 4 // block) * block, segments * rows)
    prompts = [
        PassSegment(SegmentKind.PROMPT, 1 + number, 0, [7] * prompt, prompt)
        for number in range(segments * rows // prompt)
    ]
    ends = torch.arange(1, len(prompts) + 1, device=runner.device) * prompt - 1
    return (
        lambda: captured.run(work, candidates),
        lambda: eager.run(work, candidates),
        lambda: captured.run_few(prompts, candidates, ends),
        stream,
    )


def milliseconds(launch: Launch, stream: Any, repeats: int) -> float:
    """Device time of one call, back to back on ``stream``."""
    with torch.cuda.stream(stream):
        for _ in range(3):
            launch()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            launch()
        end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / repeats


def together(
    step: Launch, steps: int, pass_: Launch, passes: int, streams: Sequence[Any]
) -> tuple[float, float]:
    """Milliseconds until ``steps`` decode steps have ended, and until ``passes`` passes beside them have."""
    torch.cuda.synchronize()
    begin, decode_end, pass_end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    begin.record(streams[0])
    streams[1].wait_event(begin)
    launched = 0
    for number in range(steps):
        with torch.cuda.stream(streams[0]):
            step()
        while launched < passes and launched * steps <= number * passes:
            with torch.cuda.stream(streams[1]):
                pass_()
            launched += 1
    decode_end.record(streams[0])
    pass_end.record(streams[1])
    torch.cuda.synchronize()
    return begin.elapsed_time(decode_end), begin.elapsed_time(pass_end)


def host_milliseconds(launch: Launch) -> float:
    """Time that the host needs to launch it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    launch()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1000 * elapsed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shapes", default="64x4,64x8,16x32,64x16,64x32", help="W x G")
    parser.add_argument("--batches", default="64,128,256", help="decode batch sizes")
    parser.add_argument("--length", type=int, default=512, help="tokens that each request has")
    parser.add_argument(
        "--sms", default="0", help="multiprocessors for passes, 0 for all; several to compare"
    )
    parser.add_argument("--high-priority-decode", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so many")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/llm42-bounds.csv"))
    return parser.parse_args(argv)


HEADER = (
    *("decode_priority", "sms", "W", "G", "batch"),
    *("pass_ms", "pass_eager_ms", "prompt_pass_ms", "pass_host_ms", "step_ms"),
    *("steps", "passes", "in_turn_ms", "perfect_ms", "beside_ms", "decode_ended_ms", "hidden"),
)


def measure(arguments: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Rows of the table; what was measured is kept when time runs out."""
    began = time.monotonic()
    batches = [int(size) for size in arguments.batches.split(",")]
    rows: list[tuple[Any, ...]] = []
    priority = "high" if arguments.high_priority_decode else "normal"
    with tempfile.TemporaryDirectory() as folder:
        runner = load(arguments.layers, arguments.high_priority_decode, batches, Path(folder))
        main_stream = torch.cuda.Stream()
        for sms in (int(count) for count in arguments.sms.split(",")):
            for text in arguments.shapes.split(","):
                width, segments = (int(number) for number in text.split("x"))
                step = decode_step(runner, max(batches), arguments.length)
                try:
                    run, eager, prefill, stream = canonical_pass(
                        runner, width, segments, arguments.length, sms
                    )
                    pass_ms = milliseconds(run, stream, arguments.repeats)
                    eager_ms = milliseconds(eager, stream, max(2, arguments.repeats // 4)) if not sms else 0.0
                    prompt_ms = milliseconds(prefill, stream, arguments.repeats)
                    host_ms = host_milliseconds(run)
                except Exception as error:
                    say(f"{text} on {sms} multiprocessors: {type(error).__name__}: {error}")
                    continue
                for batch in batches:
                    if time.monotonic() - began > arguments.seconds:
                        return rows
                    step = decode_step(runner, batch, arguments.length)
                    step_ms = milliseconds(step, main_stream, arguments.repeats)
                    # As many steps as take as long as the passes.
                    passes = max(2, arguments.repeats // 2)
                    steps = max(1, round(passes * pass_ms / step_ms))
                    decode_ended, all_ended = together(step, steps, run, passes, (main_stream, stream))
                    both = max(decode_ended, all_ended)
                    in_turn, perfect = (
                        steps * step_ms + passes * pass_ms,
                        max(steps * step_ms, passes * pass_ms),
                    )
                    hidden = (in_turn - both) / (in_turn - perfect)
                    values = (pass_ms, eager_ms, prompt_ms, host_ms, step_ms)
                    rows.append(
                        (
                            *(priority, sms, width, segments, batch),
                            *(round(v, 3) for v in values),
                            *(steps, passes),
                            *(round(v, 2) for v in (in_turn, perfect, both, decode_ended, hidden)),
                        )
                    )
                    say(table(HEADER, rows[-1:]).splitlines()[-1])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    arguments = parse(argv)
    os.environ.setdefault("RANDOM_WEIGHTS_OPEN_SHARE", "0.2")
    rows = measure(arguments)
    print(device_name())
    print(table(HEADER, rows))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    new = not arguments.output.exists()
    with arguments.output.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([HEADER, *rows] if new else rows)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
