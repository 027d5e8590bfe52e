"""Pure parts of ``scripts/stress_llm42.py``: catalogue, comparing, resuming, reporting; no server."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import state_file
import stress_catalogue as catalogue
import stress_llm42 as stress
import stress_traffic as traffic
from serving import ServingError
from stress_catalogue import Answer, Model, Sample, Subject
from stress_llm42 import Settings, State
from stress_traffic import Client, RequestError

MODEL = Model([list(range(100, 260)), list(range(300, 420))], 1000, 1, ({"regex": "a+"},))
BASES = 60
CONFIGURATION: dict[str, Any] = {"server": ["--model", "m"], "clients": 3, "seed": 1}


def _answer(
    ids: tuple[int, ...] = tuple(range(40, 60)), finish: str = "length", **meta: Any
) -> dict[str, Any]:
    """An answer of ``POST /generate``."""
    reason = {"type": finish} if finish else None
    meta = {"cached_tokens": 3, "llm42_num_rollbacks": 1, "llm42_tokens_rolled_back": 2, **meta}
    text = "".join(map(chr, ids))
    return {"output_ids": list(ids), "text": text, "meta_info": {"finish_reason": reason, **meta}}


def _references(subjects: list[Subject]) -> dict[str, Answer]:
    return {subject.name: (Sample.of(_answer()),) * subject.samples for subject in subjects}


# Catalogue


def test_the_catalogue_is_the_same_in_every_run_and_another_with_another_seed() -> None:
    first = catalogue.bases(MODEL, BASES, 1)
    assert first == catalogue.bases(MODEL, BASES, 1) != catalogue.bases(MODEL, BASES, 2)
    second = catalogue.derived(MODEL, first, _references(first), 1)
    assert second == catalogue.derived(MODEL, first, _references(first), 1)
    names = [subject.name for subject in (*first, *second)]
    assert len(set(names)) == len(names) > BASES * 1.4


def test_every_feature_is_in_the_catalogue() -> None:
    first = catalogue.bases(MODEL, BASES, 1)
    second = catalogue.derived(MODEL, first, _references(first), 1)
    features = {feature for subject in (*first, *second) for feature in subject.features}
    assert features == {*catalogue.OPTIONS, *catalogue.DERIVATIONS, "greedy", "sampled"}
    params = [subject.body["sampling_params"] for subject in (*first, *second)]
    assert all(p["is_deterministic"] is True for p in params)
    for name in ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"):
        assert any(name in p for p in params), name
    assert any("sampling_seed" not in p and p["temperature"] > 0 for p in params), "the default seed"


def test_derived_stops_match_inside_the_known_output() -> None:
    first = catalogue.bases(MODEL, BASES, 1)
    known = Sample.of(_answer())
    for subject in catalogue.derived(MODEL, first, _references(first), 1):
        params = subject.body["sampling_params"]
        if "stop string" in subject.features:
            assert params["stop"][0] in known.text
        if subject.features[0] == "stop token":
            assert set(params["stop_token_ids"]) <= set(known.ids) and "ignore_eos" not in params
        if subject.features[0] == "next turn":
            base = next(s for s in first if subject.name.endswith(s.name))
            continued = [*base.body["input_ids"], *known.ids]
            assert subject.body["input_ids"][: len(continued)] == continued
            assert len(subject.body["input_ids"]) > len(continued)


def test_short_outputs_have_no_second_generation() -> None:
    first = catalogue.bases(MODEL, 5, 1)
    short = {subject.name: (Sample.of(_answer((1, 2))),) * subject.samples for subject in first}
    assert catalogue.derived(MODEL, first, short, 1) == []


def test_a_neighbour_is_the_same_without_the_mark() -> None:
    subject = catalogue.bases(MODEL, 1, 1)[0]
    body = catalogue.unmarked_body(subject)
    assert "is_deterministic" not in body["sampling_params"]
    assert {**body["sampling_params"], "is_deterministic": True} == subject.body["sampling_params"]


@pytest.mark.parametrize(
    ("matched", "params", "kind"),
    [
        (1, {}, "end of sequence"),
        (7, {}, "stop token"),
        ("a", {"stop": ["a"]}, "stop string"),
        ("a", {"stop_regex": "a"}, "stop_regex"),
        (None, {}, "length"),
    ],
)
def test_kinds_of_finish_reasons(matched: Any, params: dict[str, Any], kind: str) -> None:
    reason = {"type": "stop", "matched": matched} if matched else {"type": "length", "length": 3}
    sample = Sample((1,), "a", json.dumps(reason))
    assert Subject("s", (), {"sampling_params": params}).finish_kind(sample, 1) == kind


# Comparing


def _logprobs(value: float) -> Sample:
    return Sample.of(
        _answer(output_token_logprobs=[[value, 5, None]], output_top_logprobs=[[[value, 5, None]]])
    )


def test_log_probabilities_are_compared_bit_by_bit() -> None:
    value = -0.1234567
    assert _logprobs(value).differences(_logprobs(value)) == ()
    names = ("output_token_logprobs", "output_top_logprobs")
    assert _logprobs(value).differences(_logprobs(value + 2**-50)) == names
    assert _logprobs(0.0).differences(_logprobs(-0.0)) == ("log-probabilities",)
    assert Sample.of(_answer()).differences(_logprobs(value)) == names


def test_a_sample_survives_its_row() -> None:
    sample = _logprobs(-0.1)
    again = Sample.from_row(json.loads(json.dumps(sample.row())))
    assert again == sample and again.meta == sample.meta


# Clients


def _client(monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, Any]]) -> Client:
    """A client whose server answers with ``messages``: the last one, or all of them as a stream."""

    def ask(server: Any, body: Any) -> Answer:
        return (Sample.of(messages[-1]),)

    def stream(server: Any, body: Any) -> Iterator[tuple[int, Sample]]:
        return iter([(0, Sample.of(message)) for message in messages])

    monkeypatch.setattr(traffic, "ask", ask)
    monkeypatch.setattr(traffic, "stream", stream)
    monkeypatch.setattr(Client, "_abort", lambda self, rid: None)
    server: Any = types.SimpleNamespace(process=types.SimpleNamespace(poll=lambda: None), tail=lambda: "log")
    return Client(server, [], MODEL, "client", 1)


def _call(marked: bool = True) -> traffic._Call:
    subject = Subject("s", ("plain",), {"input_ids": [1], "sampling_params": {"is_deterministic": True}})
    reference = (Sample.of(_answer()),) if marked else None
    return traffic._Call(subject, reference, {**subject.body, "rid": "r"})


RIGHT = tuple(range(40, 60))
WRONG = (*RIGHT[:7], 99, *RIGHT[8:])


@pytest.mark.parametrize("manner", [Client.whole, Client.streamed, Client.aborted, Client.aborted_stream])
def test_a_wrong_token_is_found_whatever_the_manner(monkeypatch: pytest.MonkeyPatch, manner: Any) -> None:
    good = _client(monkeypatch, [_answer(RIGHT[:9], ""), _answer(RIGHT)])
    manner(good, _call())
    assert good.seen.counts["answers compared"] == 1 and not good.seen.differences
    bad = _client(monkeypatch, [_answer(RIGHT[:5], ""), _answer(WRONG)])
    manner(bad, _call())
    assert bad.seen.differences[-1]["what"][0] in ("tokens", "beginning")
    assert {row["token"] for row in bad.seen.differences} == {7}
    assert bad.seen.differences[0]["body"] == _call().subject.body


@pytest.mark.parametrize("manner", [Client.aborted, Client.aborted_stream, Client.left_stream])
def test_what_was_cut_off_must_be_the_beginning(monkeypatch: pytest.MonkeyPatch, manner: Any) -> None:
    good = _client(monkeypatch, [*[_answer(RIGHT[:9], "")] * 6, _answer(RIGHT[:12], "abort")])
    manner(good, _call())
    assert not good.seen.differences and not good.seen.counts["answers compared"]
    assert good.seen.counts["aborts"] + good.seen.counts["disconnects"] == 1
    bad = _client(monkeypatch, [*[_answer(WRONG[:9], "")] * 6, _answer(WRONG[:12], "abort")])
    manner(bad, _call())
    assert bad.seen.differences[0]["what"] == ["beginning"]


def test_a_stream_that_takes_back_a_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    client = _client(monkeypatch, [_answer(RIGHT[:9], ""), _answer(RIGHT[:8], ""), _answer(RIGHT)])
    client.streamed(_call())
    assert [row["what"] for row in client.seen.differences] == [["order of messages"]]


def test_an_abort_that_nobody_asked_for_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    client = _client(monkeypatch, [_answer(RIGHT[:9], "abort")])
    with pytest.raises(RequestError, match="aborted by the server"):
        client.whole(_call())


def test_unmarked_answers_are_counted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    client = _client(monkeypatch, [_answer(WRONG)])
    client.streamed(_call(marked=False))
    assert dict(client.seen.counts) == {"unmarked answers": 1, "streams compared": 0}


def test_failures_are_kept_and_a_dead_server_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    client = _client(monkeypatch, [])
    client._subjects = [(_call().subject, _call().reference or ())]

    def refuse(server: Any, body: Any, *args: Any, **kwargs: Any) -> Any:
        raise requests.ConnectionError("gone")

    for name in ("ask", "stream", "_post"):
        monkeypatch.setattr(traffic, name, refuse)
    client._one("rid")
    assert [row["subject"] for row in client.seen.failures] == ["s"]
    client._server.process.poll = lambda: -9  # type: ignore[method-assign]
    with pytest.raises(ServingError, match="the server ended"):
        client._one("rid")


# State and report


def _round(**counts: int) -> dict[str, Any]:
    counts = dict.fromkeys(stress.NEEDED, 1) | counts
    features = [*catalogue.OPTIONS, *catalogue.DERIVATIONS, "greedy", "sampled"]
    return {
        "seconds": 45.0,
        "counts": counts,
        "features": dict.fromkeys(features, 2),
        "finishes": {"length": 3},
        "statistics": {"rollbacks": 5},
        "differences": [],
        "failures": [],
    }


def test_references_and_rounds_survive_a_restart_of_the_program(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "state.jsonl"
    subject = catalogue.bases(MODEL, 1, 1)[0]
    state = State.open(path, CONFIGURATION)
    state.add_reference(subject, (_logprobs(-0.5),))
    state.add_round(0, _round())
    path.write_text(path.read_text() + '{"round": 1, "se')  # killed while it wrote
    again = State.open(path, json.loads(json.dumps(CONFIGURATION)))
    assert again.reference(subject) == (_logprobs(-0.5),)
    assert list(again.rounds) == [0]
    again.add_round(1, _round())
    assert list(State.open(path, CONFIGURATION).rounds) == [0, 1]


def test_a_reference_is_not_that_of_another_request_of_the_same_name(tmp_path: Path) -> None:
    state = State.open(tmp_path / "state", CONFIGURATION)
    subject = catalogue.bases(MODEL, 1, 1)[0]
    state.add_reference(subject, (_logprobs(-0.5),))
    changed = Subject(subject.name, subject.features, {**subject.body, "input_ids": [1]})
    assert state.reference(changed) is None


@pytest.mark.parametrize("text", ["not json\n", "\n", '{"server": 1}\n'])
def test_a_state_file_that_does_not_fit_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state"
    path.write_text(text)
    with pytest.raises(state_file.StateError, match="--state"):
        State.open(path, CONFIGURATION)


def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all references and rounds there, no server is started."""
    monkeypatch.setattr(stress.serving, "server", lambda *args: pytest.fail("a server was started"))
    settings = Settings("m", (), bases=4)
    state = State.open(tmp_path / "state", CONFIGURATION)
    first = catalogue.bases(MODEL, 4, 1)
    references = _references(first)
    for subject in [*first, *catalogue.derived(MODEL, first, references, 1)]:
        state.add_reference(subject, (Sample.of(_answer()),) * subject.samples)
    state.add_round(0, _round())
    stress.run(settings, MODEL, state, range(1))
    with pytest.raises(pytest.fail.Exception):
        stress.run(settings, MODEL, state, range(2))


@pytest.mark.parametrize("name", stress.NEEDED)
def test_a_run_without_any_of_what_it_is_for_is_too_tame(tmp_path: Path, name: str) -> None:
    state = State.open(tmp_path / "state", CONFIGURATION)
    state.add_round(0, _round())
    assert stress.too_tame(state) == [] and stress.verdict(state) == 0
    state = State.open(tmp_path / "tame", CONFIGURATION)
    state.add_round(0, _round(**{name: 0}))
    assert stress.too_tame(state) == [name] and stress.verdict(state) == 2
    assert f"says nothing about: {name}" in stress.report(state, "command", {})


def test_differences_and_failures_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = _client(monkeypatch, [_answer(WRONG)])
    client.whole(_call())
    row = _round() | {"differences": client.seen.differences, "failures": [{"subject": "s", "error": "e"}]}
    state = State.open(tmp_path / "state", CONFIGURATION)
    state.add_round(7, row)
    assert stress.verdict(state) == 1
    assert "DIFFERENT" in capsys.readouterr().err
    text = stress.report(state, "the command", {"CPU": "a processor"})
    assert "**1 differences in 1 compared answers**, 1 failed requests" in text
    assert "first differing token 7" in text and "--only-round 7" in text
    assert json.dumps(_call().subject.body) in text, "what it takes to ask again"


def test_files_are_not_part_of_the_command() -> None:
    words = ["--minutes", "2", "--state", "/a", "--report=/b", "--", "--page-size", "16"]
    assert stress._options(words) == ["--minutes", "2", "--", "--page-size", "16"]
