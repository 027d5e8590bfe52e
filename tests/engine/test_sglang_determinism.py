"""SGLang's own test of deterministic inference, unchanged, against a server that marks every request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from live_server import Server, running
from sglang.test import test_deterministic as program
from workloads import DEMO_FLAGS


@pytest.fixture(scope="module")
def server(smollm2: Path, logs: Path) -> Iterator[Server]:
    """The demo model, every request deterministic."""
    flags = (*DEMO_FLAGS, "--llm42-mark-all")
    with running(Server(smollm2, logs / "sglang.log", flags)) as server:
        yield server


@pytest.fixture
def cached_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prefix-cache hits of all requests that the program sends from now on."""
    hits: list[int] = []
    post = program.requests.post

    def recording_post(url: str, *args: Any, **kwargs: Any) -> Any:
        if url.endswith("/flush_cache"):
            url += "?timeout=30"  # a server that has just answered may not be idle yet, and refuses
        response = post(url, *args, **kwargs)
        if url.endswith("/generate"):
            assert response.status_code == 200, response.text
            answers = response.json()
            for answer in answers if isinstance(answers, list) else [answers]:
                assert "llm42_digest" in answer["meta_info"], "the request was not deterministic"
                hits.append(answer["meta_info"]["cached_tokens"])
        return response

    monkeypatch.setattr(program.requests, "post", recording_post)
    return hits


def arguments(server: Server, mode: str, **values: Any) -> program.BenchArgs:
    """Arguments of the program's command line."""
    port = urlsplit(server.url).port
    return program.BenchArgs(host="127.0.0.1", port=port, test_mode=mode, max_new_tokens=20, **values)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_single(server: Server, cached_tokens: list[int], temperature: float) -> None:
    assert program.test_deterministic(arguments(server, "single", n_trials=5, temperature=temperature)) == [1]
    assert max(cached_tokens) > 0


def test_prefix(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """No hits here: the program empties the cache before each batch, whose requests then begin together."""
    args = arguments(server, "prefix", n_start=3, n_trials=2, return_logprob=True)
    assert all(unique <= 1 for unique in program.test_deterministic(args))
    assert "Logprobs are identical across all batch sizes" in capsys.readouterr().out


def test_prefix_with_a_filled_cache(
    server: Server,
    cached_tokens: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same, where the cache keeps what the batches before have left."""
    post = program.requests.post

    def post_unless_flush(url: str, **kwargs: Any) -> Any:
        return None if url.endswith("/flush_cache") else post(url, **kwargs)

    monkeypatch.setattr(program.requests, "post", post_unless_flush)
    args = arguments(server, "prefix", n_start=3, n_trials=3, return_logprob=True)
    assert all(unique <= 1 for unique in program.test_deterministic(args))
    assert "Logprobs are identical across all batch sizes" in capsys.readouterr().out
    assert max(cached_tokens[-5:]) > 0, "nothing was found in the cache"


def test_radix_cache(server: Server, cached_tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # The program draws token ids up to 50000; the demo model ends at 49151.
    draw = program.random.randint
    monkeypatch.setattr(program.random, "randint", lambda low, high: draw(low, min(high, 49151)))
    assert program.test_deterministic(arguments(server, "radix_cache")) == [1]
    assert cached_tokens[-3:] == [0, 100, 0]


def test_prefill_against_decode(server: Server) -> None:
    """No hits here either: log-probabilities of a whole prompt need all of its rows."""
    results = program.test_deterministic(arguments(server, "p_vs_d", n_trials=3))
    assert results == [1] * 6
