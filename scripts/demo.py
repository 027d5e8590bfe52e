"""Show what the project is for: the same prompts, stock and deterministic, while the server's load changes.

Starts ``python -m sglang_ext.launch_server`` on this machine, sends every prompt unmarked and marked, alone
and in crowds of several sizes, with cold and warm prefix cache, and prints where outputs differ from those of
the first run. Exit status: 0 if every deterministic output is identical to its first, 1 if one differs, 2 if
the server could not be used.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests
import serving
from serving import Client, Output, ServingError, say

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


Results = dict[tuple[Condition, Subject], Output]


def ask(client: Client, question: str, marked: bool, sampling: dict[str, Any], new_tokens: int) -> Output:
    """Run one question as a chat prompt."""
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return client.generate(text, marked, {"max_new_tokens": new_tokens, **sampling})


def crowds(subjects: Sequence[Subject], condition: Condition) -> Iterator[list[Subject]]:
    """Share the subjects out over crowds of one size, leaving at least a quarter of each to neighbours."""
    room = max(1, condition.crowd * 3 // 4)
    for start in range(0, len(subjects), room):
        yield list(subjects[start : start + room])


def run_crowd(client: Client, subjects: Sequence[Subject], size: int, new_tokens: int) -> list[Output]:
    """Send ``subjects`` together with neighbours that fill the crowd up to ``size``; outputs of the subjects.

    Neighbours are of other lengths, every second one is marked, and they sample with top_p.
    """
    with ThreadPoolExecutor(size) as pool:
        neighbours = []
        for index in range(size - len(subjects)):
            sampling = {"temperature": 1.0, "top_p": 0.9, "sampling_seed": index}
            question = NEIGHBOURS[index % len(NEIGHBOURS)]
            neighbours.append(pool.submit(ask, client, question, index % 2 == 1, sampling, new_tokens))
        watched = []
        for subject in subjects:
            question, sampling = PROMPTS[subject.prompt]
            watched.append(pool.submit(ask, client, question, subject.marked, sampling, new_tokens))
            time.sleep(0.01)  # arrive one after the other, as requests do
        for neighbour in neighbours:
            neighbour.result()
        return [future.result() for future in watched]


def run_condition(client: Client, condition: Condition, new_tokens: int) -> Results:
    """Run every prompt, unmarked and marked, under one condition."""
    subjects = [Subject(prompt, marked) for prompt in range(len(PROMPTS)) for marked in (False, True)]
    results: Results = {}
    start = time.monotonic()
    for group in crowds(subjects, condition):
        if not condition.warm:
            client.flush_cache()
        outputs = run_crowd(client, group, condition.crowd, new_tokens)
        for subject, output in zip(group, outputs, strict=True):
            results[condition, subject] = output
    cached = sum(output.meta["cached_tokens"] for output in results.values())
    elapsed = time.monotonic() - start
    say(f"  {condition.name:<12} {len(results)} outputs in {elapsed:3.0f} s, {cached} prompt tokens cached")
    return results


def count_differences(results: Results, marked: bool) -> tuple[int, int]:
    """How many outputs differ from the first condition's, and how many were compared."""
    compared = [
        output.differences(results[CONDITIONS[0], subject])
        for (condition, subject), output in results.items()
        if subject.marked is marked and condition != CONDITIONS[0]
    ]
    return sum(bool(what) for what in compared), len(compared)


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
            rollbacks = sum(rollbacks_of(results[condition, subject]) for condition in CONDITIONS)
            line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            name = "deterministic" if marked else "stock"
            print(f"{name:<15}{line}  {rollbacks if marked else '-'}")


def _cell(results: Results, condition: Condition, subject: Subject) -> str:
    first = results[CONDITIONS[0], subject]
    if condition == CONDITIONS[0]:
        return f"{len(first.ids)} tokens"
    output = results[condition, subject]
    what = output.differences(first)
    if not what:
        return "identical"
    index = output.first_difference(first)
    return what[0] if index is None else f"token {index}"


def rollbacks_of(output: Output) -> int:
    """How often candidates were rolled back; 0 for an unmarked request."""
    return output.meta.get("llm42_num_rollbacks", 0)


def print_summary(results: Results) -> None:
    """What the table amounts to."""
    print("\n'token 12' means: output differs from the first column's from its token 12 on.\n")
    for name, marked in (("stock", False), ("deterministic", True)):
        different, compared = count_differences(results, marked)
        print(f"{name + ':':<15}{different} of {compared} outputs differ from those of the same prompt alone")
    rollbacks = sum(map(rollbacks_of, results.values()))
    print(f"{'rollbacks:':<15}{rollbacks} times verification rejected candidates of the requests above")


def server_flags(model: str, extra_flags: Sequence[str]) -> list[str]:
    """Flags of the demonstration's server, without its port."""
    return ["--model", model, *SERVER_FLAGS, *extra_flags]


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


def demonstrate(client: Client, new_tokens: int) -> bool:
    """Run and print everything; whether all deterministic outputs are identical to their first."""
    say(f"Running {len(PROMPTS)} prompts, stock and deterministic, under {len(CONDITIONS)} loads")
    results: Results = {}
    for condition in CONDITIONS:
        results |= run_condition(client, condition, new_tokens)
    print_table(results)
    print_summary(results)
    return count_differences(results, marked=True)[0] == 0


def main() -> int:
    """Exit status as in the module's text."""
    arguments = parse_arguments()
    serving.exit_on_termination()
    flags = server_flags(arguments.model, arguments.server_args)
    try:
        if arguments.url:
            running = Client(arguments.url.rstrip("/"), enable_llm42=True)
            return 0 if demonstrate(running, arguments.new_tokens) else 1
        with serving.server(flags) as server:
            identical = demonstrate(server.client, arguments.new_tokens)
            if arguments.keep:
                print(f"\nThe server runs at {server.client.url}; Ctrl-C ends it.", flush=True)
                signal.pause()
    except (ServingError, requests.RequestException) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 0 if arguments.keep else 130
    command = shlex.join([sys.executable, "-m", "sglang_ext.launch_server", *flags, "--port", "30000"])
    print(f"\nA server of your own:\n  {command}")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
