"""What an operator sees of a real server: metrics, the commit log, and a replay of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from live_server import Output, Request, Server, running
from prometheus_client.parser import text_string_to_metric_families
from workloads import LLM42_FLAGS, ONE_THREAD, marked, random_prompts

from sglang_ext.llm42.commit_log import CommitLog
from sglang_ext.llm42.observability import log_files, log_reader
from sglang_ext.llm42.observability.log_reader import Entry
from sglang_ext.llm42.observability.metrics import COUNTERS
from sglang_ext.replay import __main__ as replay

#: Small enough that the requests below fill several files.
MAX_BYTES = 8192
KEEP = 20

#: Seconds for the writer's thread on a busy machine.
PATIENCE_S = 60.0

LINES = "sglang:llm42_commit_log_lines_total"


@dataclass(frozen=True)
class Served:
    """A server after it has answered.

    Attributes:
        server: the server.
        log: its commit log.
        requests: marked requests, in the order in which they were sent.
        outputs: what each of them gave.
    """

    server: Server
    log: Path
    requests: list[Request]
    outputs: list[Output]


def _requests() -> list[Request]:
    prompts = random_prompts(12, 5, 40)
    return [
        *marked(prompts[:4], temperature=0.0, max_new_tokens=24),
        *marked(prompts[4:8], temperature=0.9, top_p=0.9, top_k=100, max_new_tokens=24),
        *marked(prompts[8:10], temperature=1.0, max_new_tokens=30, stop_token_ids=list(range(2, 60))),
        *marked(prompts[10:], temperature=0.8, max_new_tokens=20, ignore_eos=True, repetition_penalty=1.1),
    ]


@pytest.fixture(scope="module")
def served(random_llama: Path, logs: Path) -> Iterator[Served]:
    """Marked requests among unmarked ones, all of them answered."""
    log = logs / "commits.jsonl"
    flags = ("--enable-metrics", "--llm42-commit-log", str(log), "--llm42-commit-log-keep", str(KEEP))
    flags += ("--llm42-commit-log-max-bytes", str(MAX_BYTES), "--max-total-tokens", "8192")
    server = Server(random_llama, logs / "observability.log", (*LLM42_FLAGS, *flags), ONE_THREAD)
    with running(server):
        chosen = _requests()
        others = [Request(request.prompt, False, {"max_new_tokens": 16}) for request in chosen[:4]]
        outputs = server.together([*chosen, *others])[: len(chosen)]
        yield Served(server, log, chosen, outputs)


def _entries(log: Path) -> list[Entry]:
    lines = [line for file in log_files.history(log) for line in log_reader.read(file)]
    entries = [line for line in lines if isinstance(line, Entry)]
    assert len(entries) == len(lines), "no line is torn or altered"
    return entries


def _figures(server: Server) -> dict[str, float]:
    """Our metrics of the only scheduler."""
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    ours = [s for s in samples if s.name.startswith("sglang:llm42_")]
    theirs = [s for s in samples if s.name.startswith("sglang:") and s not in ours]
    assert ours and any(s.labels == ours[0].labels for s in theirs), "the labels are SGLang's"
    return {s.name: s.value for s in ours}


def _wait_for_lines(served: Served) -> None:
    """Until the writer's thread has written a line for each request."""
    deadline = time.monotonic() + PATIENCE_S
    while _figures(served.server)[LINES] < len(served.requests):
        assert time.monotonic() < deadline, "lines are missing"
        time.sleep(0.1)


def test_every_marked_request_is_logged_as_it_was_answered(served: Served) -> None:
    _wait_for_lines(served)
    entries = {tuple(entry.fields["input_ids"]): entry for entry in _entries(served.log)}
    assert len(_entries(served.log)) == len(entries) == len(served.requests)
    for request, output in zip(served.requests, served.outputs, strict=True):
        entry = entries[request.prompt]
        assert output.token_ids and entry.log.tokens == output.token_ids
        assert entry.fields["digest"] == output.meta["llm42_digest"]
        assert entry.fields["finish_reason"] == output.finish
        assert entry.fields["rid"] == output.meta["id"]
        assert entry.fields["weight_version"] == output.meta["weight_version"]
        assert entry.fields["sampling_params"]["sampling_seed"] == request.sampling["sampling_seed"]
    files = log_files.history(served.log)
    assert len(files) > 1 and all(file.stat().st_size <= MAX_BYTES for file in files)


def test_metrics_agree_with_the_statistics_and_survive_their_reset(served: Served) -> None:
    _wait_for_lines(served)
    statistics, figures = served.server.statistics(), _figures(served.server)
    assert {field: figures[name] for field, (name, _) in COUNTERS.items()} == {
        field: statistics[field] for field in COUNTERS
    }
    assert figures["sglang:llm42_canonical_passes_total"] > 0
    assert figures["sglang:llm42_candidates_accepted_total"] > 0
    assert figures["sglang:llm42_num_running_reqs"] == 0
    assert figures[LINES] == len(served.requests)
    assert figures["sglang:llm42_commit_log_dropped_lines_total"] == 0

    served.server.reset_statistics()
    served.server.generate(Request((9, 8, 7), True, {"max_new_tokens": 4, "ignore_eos": True}))
    assert 0 < served.server.statistics()["prompt_tokens"] <= 3
    assert (
        _figures(served.server)["sglang:llm42_prompt_rows_total"]
        == figures["sglang:llm42_prompt_rows_total"] + served.server.statistics()["prompt_tokens"]
    )


def test_replay_finds_no_difference_and_finds_a_forged_token(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "commits.jsonl"
    entries = _entries(served.log)[: len(served.requests)]
    copy.write_text("".join(json.dumps(dict(entry.fields)) + "\n" for entry in entries))
    command = [str(copy), "--url", served.server.url, "--concurrency", "3"]
    assert replay.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{len(entries)} equal, 0 different\n"
    assert replay.PROGRAM not in captured.err, "the same configuration and weights"

    forged = [dict(entry.fields) for entry in entries]
    position, forged[2] = _forge(entries[2])
    copy.write_text("".join(json.dumps(fields) + "\n" for fields in forged))
    assert replay.main(command) == replay.EXIT_DIFFERENT
    out = capsys.readouterr().out
    assert f"commits.jsonl:3 rid {forged[2]['rid']}: different" in out
    assert f"first differing token: output index {position} " in out
    assert f"{len(entries) - 1} equal, 1 different" in out


def _forge(entry: Entry) -> tuple[int, dict[str, Any]]:
    """The line with its last token replaced, and a digest that fits; with the token's output index."""
    records = json.loads(json.dumps(entry.fields["records"]))
    last = next(record for record in reversed(records) if record.get("tokens"))
    last["tokens"][-1] = last["tokens"][-1] ^ 1
    digest = CommitLog.replay(records).digest
    return entry.log.num_committed - 1, {**entry.fields, "records": records, "digest": digest}
