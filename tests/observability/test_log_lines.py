"""Lines of the commit log: what they hold, and reading them however they were cut."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import finished
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ext.llm42.observability import log_line, log_reader
from sglang_ext.llm42.observability.log_reader import Altered, Entry, Torn

TOKENS = st.lists(st.integers(0, 100_000), max_size=12)


def test_a_line_holds_what_is_needed_to_run_the_request_again() -> None:
    fields = json.loads(finished([10, 11, 12, 13, 14], rid="a", prompt=array("q", [5, 6])).line())
    assert fields["rid"] == "a" and fields["input_ids"] == [5, 6]
    assert fields["finish_reason"] == {"type": "length", "length": 5}
    assert fields["weight_version"] == "w1" and fields["configuration"] == "c1"
    assert fields["finished_at"] == 1.5
    assert fields["sampling_params"]["sampling_seed"] == 7
    tokens = [token for record in fields["records"] for token in record.get("tokens", ())]
    assert tokens == [10, 11, 12, 13, 14]
    assert len(fields["digest"]) == 64


PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "n": 4},
    {"stop": "end", "stop_token_ids": [9, 3, 3], "stop_regex": ["a+"], "no_stop_trim": True},
    {"stop": ["one", "two"], "min_new_tokens": 2, "max_new_tokens": 8, "ignore_eos": True},
    {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": -0.2},
    {"logit_bias": {"5": 1.0}, "json_schema": "{}"},
    {"custom_params": {"llm42": True, "mine": [1, 2], log_line.WEIGHT_VERSION_KEY: "w", "__req__": object()}},
]


@pytest.mark.parametrize("params", PARAMETERS, ids=lambda params: "-".join(params) or "defaults")
def test_parameters_sent_again_give_the_scheduler_the_same(params: dict[str, Any]) -> None:
    request = finished([1, 2], **params)
    sent = json.loads(request.line())["sampling_params"]
    again = finished([1, 2], **sent).sampling_params
    for name in SamplingParams.__struct_fields__:
        if name not in ("n", "sampling_seed", "custom_params"):
            assert getattr(again, name) == getattr(request.sampling_params, name), name
    assert again.n == 1, "samples of one request reach the scheduler one by one"
    mine = params.get("custom_params", {}).get("mine")
    assert sent["custom_params"] == ({"mine": mine} if mine else None)


def test_no_parameter_of_sglang_is_forgotten() -> None:
    sent = set(log_line.client_params(SamplingParams()))
    assert sent == set(SamplingParams.__struct_fields__) - log_line._LEFT_OUT


def _read(path: Path) -> list[Entry | Torn | Altered]:
    return list(log_reader.read(path))


@settings(max_examples=60, deadline=None)
@given(outputs=st.lists(TOKENS, min_size=1, max_size=5), data=st.data())
def test_a_log_cut_anywhere_loses_only_the_cut_line(
    tmp_path_factory: pytest.TempPathFactory, outputs: list[list[int]], data: st.DataObject
) -> None:
    lines = [finished(output, rid=str(i)).line() + "\n" for i, output in enumerate(outputs)]
    whole = "".join(lines).encode()
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(whole[:cut])
    read = _read(path)
    entries = [line for line in read if isinstance(line, Entry)]
    # A line whose newline alone is missing is whole.
    expected = sum(len("".join(lines[: i + 1])) - 1 <= cut for i in range(len(lines)))
    assert [entry.log.tokens for entry in entries] == [tuple(output) for output in outputs[:expected]]
    assert len(read) - len(entries) <= 1
    assert all(isinstance(line, Torn) for line in read[len(entries) :])


@settings(deadline=None)
@given(junk=st.lists(st.binary(max_size=30), max_size=5))
def test_junk_between_lines_is_passed_over(
    tmp_path_factory: pytest.TempPathFactory, junk: list[bytes]
) -> None:
    line = finished([1, 2, 3]).line().encode()
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(b"\n".join([line, *junk, line]))
    entries = [entry for entry in _read(path) if isinstance(entry, Entry)]
    assert [entry.log.tokens for entry in entries] == [(1, 2, 3)] * 2
    assert log_reader.count(path) == path.read_bytes().count(b"\n") + 1


@pytest.mark.parametrize("piece", [b"[1]", b"3", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object_is_torn(piece: bytes) -> None:
    assert isinstance(log_reader.parse(piece, "here"), Torn)


def _altered(**fields: Any) -> bytes:
    return json.dumps({**json.loads(finished([1, 2, 3]).line()), **fields}).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (_altered(digest="0" * 64), "digest"),
        (_altered(records=[]), "digest"),
        (_altered(version=99), "version"),
        (_altered(input_ids=[]), "input_ids"),
        (_altered(input_ids=["5"]), "input_ids"),
        (_altered(sampling_params=None), "sampling_params"),
        (_altered(finish_reason="length"), "finish_reason"),
    ],
)
def test_what_does_not_fit_together_is_named(line: bytes, reason: str) -> None:
    found = log_reader.parse(line, "log:3")
    assert isinstance(found, Altered) and found.where == "log:3"
    assert reason in found.reason


def test_requests_without_output_are_entries_too() -> None:
    line = finished([], finish_reason={"type": "abort", "message": "m"}, max_new_tokens=4).line()
    entry = log_reader.parse(line.encode(), "here")
    assert isinstance(entry, Entry) and entry.log.tokens == ()
