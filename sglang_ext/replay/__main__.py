"""``python -m sglang_ext.replay LOG --url http://HOST:PORT``: run logged requests again and compare.

Exit status: 0 if every request gave the same output, 1 if any differed, 2 if that could not be said of all.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_ext.llm42.observability import log_files, log_reader
from sglang_ext.llm42.observability.log_reader import Altered, Entry, Torn
from sglang_ext.replay.client import Client, ReplayError, ServerInfo
from sglang_ext.replay.comparison import Decode, Difference, body_of, compare, describe

if TYPE_CHECKING:
    from tqdm import tqdm

PROGRAM = "sglang_ext.replay"

EXIT_DIFFERENT = 1
EXIT_INCOMPLETE = 2


@dataclass
class Tally:
    """What became of the lines read.

    Attributes:
        equal: requests with the logged output.
        different: requests with another output, and lines that were altered.
        failed: requests without an answer.
        empty: requests that had put out nothing, not sent.
        torn: lines without a whole JSON object.
        configurations: configuration digests met in the log.
        weight_versions: weight versions met in the log.
    """

    equal: int = 0
    different: int = 0
    failed: int = 0
    empty: int = 0
    torn: int = 0
    configurations: set[str] = field(default_factory=set)
    weight_versions: set[str] = field(default_factory=set)

    def summary(self) -> str:
        """All in a line."""
        parts = [f"{self.equal} equal", f"{self.different} different"]
        parts += [f"{self.failed} failed"] * bool(self.failed)
        parts += [f"{self.empty} without output"] * bool(self.empty)
        parts += [f"{self.torn} torn lines skipped"] * bool(self.torn)
        return ", ".join(parts)

    @property
    def status(self) -> int:
        """Exit status."""
        if self.different:
            return EXIT_DIFFERENT
        return EXIT_INCOMPLETE if self.failed or not self.equal else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Replay what ``argv`` (the command line's by default) names and return the exit status."""
    args = _parser().parse_args(argv)
    files = [file for path in args.log for file in log_files.of_all_ranks(path)]
    if not files:
        return _refuse(f"there is no log {' or '.join(map(str, args.log))}")
    client = Client(args.url, args.api_key, args.timeout)
    try:
        info = client.info()
        tally = _replay(files, client, args, _decoder(args.tokenizer, info))
    except (ReplayError, OSError) as error:
        return _refuse(str(error))
    for warning in _warnings(tally, info):
        print(f"{PROGRAM}: {warning}", file=sys.stderr)
    print(tally.summary())
    return tally.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Send the deterministic requests of a commit log to a server again and compare outputs.",
    )
    parser.add_argument(
        "log",
        nargs="+",
        type=Path,
        metavar="LOG",
        help="commit log; files rotated from it and those of data-parallel ranks are found",
    )
    parser.add_argument("--url", required=True, help="the server, for example http://127.0.0.1:30000")
    parser.add_argument("--concurrency", type=_positive, default=1, help="requests at a time (default: 1)")
    parser.add_argument("--limit", type=_positive, help="stop after this many requests")
    parser.add_argument("--tokenizer", help="tokenizer to show text with (default: the server's)")
    parser.add_argument("--api-key", help="the server's --api-key")
    parser.add_argument(
        "--timeout", type=float, default=3600.0, help="seconds per request (default: %(default)s)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


# Running


def _replay(files: Sequence[Path], client: Client, args: argparse.Namespace, decode: Decode | None) -> Tally:
    from tqdm import tqdm

    tally = Tally()
    total = sum(map(log_reader.count, files))
    with tqdm(total=min(total, args.limit or total), unit="request", disable=None) as bar:
        entries = _sendable(_lines(files), tally, bar, args.limit)
        for entry, future in _answers(entries, client, args.concurrency):
            _judge(entry, future, tally, decode, bar)
            bar.update()
    return tally


def _lines(files: Iterable[Path]) -> Iterator[Entry | Torn | Altered]:
    for file in files:
        yield from log_reader.read(file)


def _sendable(
    lines: Iterable[Entry | Torn | Altered], tally: Tally, bar: tqdm, limit: int | None
) -> Iterator[Entry]:
    """The requests to send, at most ``limit``; of everything else ``tally`` takes note."""
    sent = 0
    for line in lines:
        if sent == limit:
            return
        if isinstance(line, Torn):
            tally.torn += 1
        elif isinstance(line, Altered):
            tally.different += 1
            bar.write(f"{line.where}: altered: {line.reason}")
        elif body_of(line) is None:
            tally.empty += 1
        else:
            sent += 1
            yield line
            continue
        if limit is None:
            bar.update()


def _answers(
    entries: Iterable[Entry], client: Client, concurrency: int
) -> Iterator[tuple[Entry, Future[Difference | None]]]:
    """Each request and the future of its comparison, in the log's order; only a few are held in memory."""

    def run(entry: Entry) -> Difference | None:
        body = body_of(entry)
        assert body is not None
        return compare(entry, client.generate(body))

    with ThreadPoolExecutor(concurrency) as pool:
        waiting: deque[tuple[Entry, Future[Difference | None]]] = deque()
        try:
            for entry in entries:
                waiting.append((entry, pool.submit(run, entry)))
                if len(waiting) > concurrency:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _judge(
    entry: Entry, future: Future[Difference | None], tally: Tally, decode: Decode | None, bar: tqdm
) -> None:
    fields = entry.fields
    tally.configurations.add(str(fields.get("configuration")))
    tally.weight_versions.add(str(fields.get("weight_version")))
    name = f"{entry.where} rid {fields.get('rid')}"
    try:
        difference = future.result()
    except ReplayError as error:
        tally.failed += 1
        bar.write(f"{name}: failed: {error}")
        return
    if difference is None:
        tally.equal += 1
        return
    tally.different += 1
    bar.write("\n  ".join([f"{name}: different", *describe(difference, decode)]))


# Telling


def _decoder(tokenizer: str | None, info: ServerInfo) -> Decode | None:
    """How to show token ids as text: None where the server's tokenizer cannot be loaded here.

    Raises:
        ReplayError: the tokenizer asked for cannot be loaded.
    """
    name = tokenizer or info.tokenizer
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=tokenizer is None)
    except (OSError, ValueError) as error:
        if tokenizer is not None:
            raise ReplayError(f"--tokenizer {tokenizer}: {error}") from error
        return None
    return lambda tokens: str(loaded.decode(list(tokens)))


def _warnings(tally: Tally, info: ServerInfo) -> list[str]:
    """What makes differences likely."""
    found = []
    if info.configurations and tally.configurations - info.configurations:
        found.append(
            "requests were logged under another configuration (versions, device, threads, layout or "
            "canonical shape) than this server's, which may give other output"
        )
    others = tally.weight_versions - {str(info.weight_version), "None"}
    if others:
        found.append(
            f"requests were logged with weights {', '.join(sorted(others))}; this server has "
            f"{info.weight_version}"
        )
    return found


def _refuse(reason: str) -> int:
    print(f"{PROGRAM}: {reason}", file=sys.stderr)
    return EXIT_INCOMPLETE


if __name__ == "__main__":
    sys.exit(main())
