"""``python -m sglang_ext.replay`` against a small HTTP server that plays SGLang's."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import finished, released_log
from models import make_tokenizer

from sglang_ext.llm42.observability import log_reader
from sglang_ext.llm42.observability.log_reader import Entry
from sglang_ext.replay import __main__ as replay
from sglang_ext.replay.comparison import Answer, body_of, compare, describe

TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def _entry(output: list[int], **kwargs: Any) -> Entry:
    entry = log_reader.parse(finished(output, **kwargs).line().encode(), "log:1")
    assert isinstance(entry, Entry)
    return entry


def _answer(output: list[int], finish_reason: Mapping[str, Any] | None = None) -> Answer:
    finish = finish_reason or {"type": "length", "length": len(output)}
    return Answer(tuple(output), finish, released_log(3, output).digest)


# Comparing


@settings(deadline=None)
@given(logged=TOKENS, now=TOKENS)
def test_the_first_difference_is_found(logged: list[int], now: list[int]) -> None:
    finish = {"type": "stop", "matched": 1}
    difference = compare(_entry(logged, finish_reason=finish), _answer(now, finish))
    if logged == now:
        assert difference is None
        return
    assert difference is not None and difference.digests_differ and difference.finish_reasons is None
    first = difference.first_token
    assert first is not None
    assert logged[:first] == now[:first]
    assert logged[first : first + 1] != now[first : first + 1]


def test_a_difference_is_shown_with_context_and_text() -> None:
    difference = compare(_entry([*range(20, 40), 1, 2, 3]), _answer([*range(20, 40), 9, 2, 3]))
    assert difference is not None
    text = "\n".join(describe(difference, lambda tokens: "".join(chr(97 + t % 26) for t in tokens)))
    assert "output index 20 (23 tokens logged, 23 now)" in text
    assert "after   28 29 30 31 32 33 34 35 36 37 38 39  'cdefghijklmn'" in text
    assert "logged  1 2 3  'bcd'" in text and "now     9 2 3  'jcd'" in text
    assert "'" not in "\n".join(describe(difference)), "without a tokenizer only ids"


def test_an_output_that_only_ends_sooner_is_different() -> None:
    difference = compare(_entry([1, 2, 3]), _answer([1, 2]))
    assert difference is not None and difference.first_token == 2
    text = "\n".join(describe(difference))
    assert "now     (nothing)" in text
    assert "'length': 3" in text and "'length': 2" in text


def test_another_finish_reason_is_different() -> None:
    difference = compare(_entry([1, 2]), _answer([1, 2], {"type": "stop", "matched": 2}))
    assert difference is not None and difference.first_token is None
    (line,) = describe(difference)
    assert line.startswith("finish reason: logged {'type': 'length'") and "'matched': 2" in line


@pytest.mark.parametrize("digest", [None, "0" * 64])
def test_the_digest_is_checked(digest: str | None) -> None:
    answer = _answer([1, 2])
    difference = compare(_entry([1, 2]), Answer(answer.token_ids, answer.finish_reason, digest))
    assert difference is not None and difference.digests_differ
    assert "digest" in describe(difference)[0]


def test_what_is_sent() -> None:
    body = body_of(_entry([1, 2], prompt=[8, 9], temperature=0.5, further={"require_reasoning": True}))
    assert body is not None
    assert body["input_ids"] == [8, 9] and body["require_reasoning"] is True
    params = body["sampling_params"]
    assert params["is_deterministic"] is True and params["sampling_seed"] == 7
    assert params["temperature"] == 0.5 and params["max_new_tokens"] == 2
    assert set(body) == {"input_ids", "sampling_params", "require_reasoning"}


def test_an_aborted_request_is_compared_as_far_as_it_got() -> None:
    entry = _entry([1, 2], finish_reason={"type": "abort"}, max_new_tokens=50, min_new_tokens=10)
    body = body_of(entry)
    assert body is not None
    params = body["sampling_params"]
    assert (params["max_new_tokens"], params["min_new_tokens"]) == (2, 2)
    assert compare(entry, _answer([1, 2])) is None
    assert compare(entry, _answer([1, 3])) is not None
    assert body_of(_entry([], finish_reason={"type": "abort"}, max_new_tokens=50)) is None


# A server


@dataclass
class _Server:
    """Answers a request with prompt ``p`` by ``output_of(p)``, as many tokens as asked for."""

    output_of: Callable[[list[int]], list[int]] = lambda prompt: [prompt[0] + i for i in range(100)]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    refuse: frozenset[int] = frozenset()
    tokenizer: str | None = None
    weight_version: str = "w1"
    configuration: str = "c1"
    delay_s: float = 0.0
    running: int = 0
    most_running: int = 0
    authorization: set[str | None] = field(default_factory=set)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, path: str) -> Any:
        if path == "/model_info":
            return {"tokenizer_path": self.tokenizer, "weight_version": self.weight_version}
        assert path == "/server_info"
        return {"internal_states": [{"llm42_configuration": self.configuration}]}

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.bodies.append(body)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(self.delay_s)
        with self.lock:
            self.running -= 1
        prompt = body["input_ids"]
        if prompt[0] in self.refuse:
            return 400, {"error": "refused"}
        output = self.output_of(prompt)[: body["sampling_params"]["max_new_tokens"]]
        return 200, {
            "output_ids": output,
            "meta_info": {
                "finish_reason": {"type": "length", "length": len(output)},
                "llm42_digest": released_log(len(prompt), output).digest,
            },
        }


@pytest.fixture
def server() -> Iterator[_Server]:
    """A running one."""
    state = _Server()

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status: int, body: Any) -> None:
            state.authorization.add(self.headers["Authorization"])
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._send(200, state.get(self.path))

        def do_POST(self) -> None:
            assert self.path == "/generate"
            self._send(*state.generate(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}/"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def _request(start: int, length: int = 5, **kwargs: Any) -> str:
    """The line of a request that :class:`_Server` answers alike."""
    output = [start + i for i in range(length)]
    return finished(output, rid=f"r{start}", prompt=[start, 1], **kwargs).line() + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Ten requests in three files, the last line torn."""
    path = tmp_path / "log.jsonl"
    lines = [_request(10 * i) for i in range(10)]
    (tmp_path / "log.jsonl.2").write_text("".join(lines[:3]))
    (tmp_path / "log.jsonl.1").write_text("".join(lines[3:7]))
    path.write_text("".join(lines[7:]) + lines[0][:50])
    return path


def test_equal(server: _Server, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(log), "--url", server.url]) == 0
    captured = capsys.readouterr()
    assert captured.out == "10 equal, 0 different, 1 torn lines skipped\n"
    assert captured.err == ""
    assert [body["input_ids"][0] for body in server.bodies] == list(range(0, 100, 10)), "oldest first"
    assert server.authorization == {None}


def test_different(server: _Server, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = server.output_of
    server.output_of = lambda prompt: [t + (prompt[0] == 40 and t >= 42) for t in plain(prompt)]
    assert replay.main([str(log), "--url", server.url]) == replay.EXIT_DIFFERENT
    out = capsys.readouterr().out
    assert "log.jsonl.1:2 rid r40: different\n  first differing token: output index 2 " in out
    assert "after   40 41\n" in out and "logged  42 43 44\n" in out and "now     43 44 45\n" in out
    assert out.endswith("9 equal, 1 different, 1 torn lines skipped\n")


def test_limit_and_api_key(server: _Server, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(log), "--url", server.url, "--limit", "4", "--api-key", "k"]) == 0
    assert len(server.bodies) == 4
    assert capsys.readouterr().out == "4 equal, 0 different\n"
    assert server.authorization == {"Bearer k"}


def test_concurrency(server: _Server, log: Path) -> None:
    server.delay_s = 0.05
    assert replay.main([str(log), "--url", server.url, "--concurrency", "4"]) == 0
    assert 2 <= server.most_running <= 4
    server.most_running = 0
    assert replay.main([str(log), "--url", server.url]) == 0
    assert server.most_running == 1


def test_altered_lines_are_differences(
    server: _Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_text(_request(10) + _request(20).replace('"digest":"', '"digest":"0'))
    assert replay.main([str(path), "--url", server.url]) == replay.EXIT_DIFFERENT
    assert "log:2: altered: the digest does not fit" in capsys.readouterr().out
    assert len(server.bodies) == 1


def test_requests_that_fail_or_had_no_output(
    server: _Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refuse = frozenset({20})
    path = tmp_path / "log"
    empty = finished([], finish_reason={"type": "abort"}, max_new_tokens=5).line() + "\n"
    path.write_text(_request(10) + _request(20) + empty)
    assert replay.main([str(path), "--url", server.url]) == replay.EXIT_INCOMPLETE
    out = capsys.readouterr().out
    assert "log:2 rid r20: failed: POST /generate: 400" in out
    assert out.endswith("1 equal, 0 different, 1 failed, 1 without output\n")


def test_nothing_compared_is_no_success(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    assert replay.main([str(tmp_path / "log"), "--url", server.url]) == replay.EXIT_INCOMPLETE


def test_no_log_or_no_server_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none"
    assert replay.main([str(missing), "--url", "http://127.0.0.1:9"]) == replay.EXIT_INCOMPLETE
    assert f"there is no log {missing}" in capsys.readouterr().err
    (tmp_path / "log").write_text(_request(10))
    assert replay.main([str(tmp_path / "log"), "--url", "http://127.0.0.1:9"]) == replay.EXIT_INCOMPLETE
    assert "GET http://127.0.0.1:9/model_info" in capsys.readouterr().err


def test_another_configuration_or_weights_are_named(
    server: _Server, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.configuration, server.weight_version = "c2", "w2"
    assert replay.main([str(log), "--url", server.url, "--limit", "1"]) == 0
    err = capsys.readouterr().err
    assert "another configuration" in err and "with weights w1; this server has w2" in err


@pytest.mark.parametrize("named", [True, False])
def test_text_is_shown_where_a_tokenizer_is_found(
    server: _Server, tmp_path: Path, named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    make_tokenizer(["<s>", "</s>", *(f"w{i} " for i in range(2, 60))]).save_pretrained(folder)
    server.tokenizer = None if named else str(folder)
    server.output_of = lambda prompt: [50] * 5
    (tmp_path / "log").write_text(_request(40))
    chosen = ["--tokenizer", str(folder)] if named else []
    assert replay.main([str(tmp_path / "log"), "--url", server.url, *chosen]) == replay.EXIT_DIFFERENT
    out = capsys.readouterr().out
    assert "logged  40 41 42 43 44  'w40 w41 w42 w43 w44 '" in out
    assert "now     50 50 50 50 50  'w50 w50" in out


def test_a_server_with_a_tokenizer_that_is_not_here(server: _Server, log: Path) -> None:
    server.tokenizer = str(log.parent / "elsewhere")
    assert replay.main([str(log), "--url", server.url]) == 0
    status = replay.main([str(log), "--url", server.url, "--tokenizer", str(log.parent / "elsewhere")])
    assert status == replay.EXIT_INCOMPLETE
