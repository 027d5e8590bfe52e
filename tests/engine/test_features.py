"""What requests can ask for: each gives the same output alone and in a crowd whose candidates are wrong.

One server with a random Llama. Every request runs alone on an empty cache; then all run at once, beside
unmarked ones, while the test-only plugin replaces one candidate in six, so that all are rolled back.
"""

from __future__ import annotations

import json
import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from live_server import Output, Request, SabotagedServer, at_once, running
from models import make_tokenizer, write_tiny_llama
from workloads import LLM42_FLAGS, ONE_THREAD, VOCABULARY, random_prompts

#: Most positions of a sequence of the model.
CONTEXT = 512

NEW_TOKENS = 40
LOGPROBS = (
    "output_token_logprobs",
    "output_top_logprobs",
    "output_token_ids_logprobs",
    "input_token_logprobs",
    "input_top_logprobs",
    "input_token_ids_logprobs",
)
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " "
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 999}},
    "required": ["name", "age"],
}

Outputs = list[Output]


@dataclass(frozen=True)
class Feature:
    """Something that a request asks for.

    Attributes:
        sampling: its sampling parameters; greedy unless they say otherwise.
        fields: fields of the request beside them.
        prompt: its prompt; by default the one that all features share.
        shows: whether the output, compared with that of the plain request, has what was asked for.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    prompt: tuple[int, ...] | None = None
    shows: Callable[[Outputs, Output], bool] = lambda outputs, plain: outputs[0].token_ids != plain.token_ids


@dataclass(frozen=True)
class Run:
    """What all features gave: alone, and in each of several crowds."""

    plain: Output
    features: Mapping[str, Feature]
    alone: Mapping[str, Outputs]
    crowds: Sequence[Mapping[str, Outputs]]
    rollbacks: int


[PROMPT] = random_prompts(1, 60, 60, seed=8)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[SabotagedServer]:
    """A server whose tokens are characters, so that they can spell JSON, and words."""
    folder = tmp_path_factory.mktemp("characters")
    write_tiny_llama(folder, vocab=VOCABULARY, max_positions=CONTEXT, sensitive=True)
    pieces = ["<s>", "</s>", *CHARACTERS]
    make_tokenizer([*pieces, *(f"w{i} " for i in range(len(pieces), VOCABULARY))]).save_pretrained(folder)
    flags = (*LLM42_FLAGS, "--max-total-tokens", "16384", "--enable-custom-logit-processor")
    flags += ("--stream-interval", "3")
    with running(SabotagedServer(folder, logs / "features.log", flags, ONE_THREAD)) as server:
        yield server


def features_of(plain: Output) -> dict[str, Feature]:
    """The features; some refer to the output of the plain request."""
    ids, words = plain.token_ids, plain.text.split(" ")
    two_words = " ".join(words[6:8])
    return {
        "output log-probabilities": Feature(
            fields={"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [5, 6]},
            shows=lambda outputs, plain: _logprob_counts(outputs[0]) == [NEW_TOKENS] * 3,
        ),
        "prompt log-probabilities": Feature(
            fields={"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2},
            shows=lambda outputs, plain: len(outputs[0].meta["input_token_logprobs"]) == len(PROMPT),
        ),
        "sampled log-probabilities": Feature(
            {"temperature": 1.0, "top_p": 0.9}, {"return_logprob": True, "top_logprobs_num": 2}
        ),
        "log-probabilities and penalties": Feature({"frequency_penalty": 1.5}, {"return_logprob": True}),
        "several samples": Feature(
            {"n": 3, "temperature": 1.0},
            shows=lambda outputs, plain: len({o.token_ids for o in outputs}) == 3,
        ),
        "stop token": Feature(
            {"stop_token_ids": [ids[17]]}, shows=lambda outputs, plain: _stopped(outputs[0], ids[17])
        ),
        "stop string": Feature(
            {"stop": [two_words]}, shows=lambda outputs, plain: _stopped(outputs[0], two_words)
        ),
        "stop string kept": Feature(
            {"stop": [two_words], "no_stop_trim": True},
            shows=lambda outputs, plain: outputs[0].text.endswith(two_words),
        ),
        "stop regex": Feature(
            {"stop_regex": f"{words[7]}|never"},
            shows=lambda outputs, plain: outputs[0].finish["type"] == "stop",
        ),
        "fewest tokens": Feature(
            {"stop_token_ids": [ids[3]], "min_new_tokens": 30},
            shows=lambda outputs, plain: len(outputs[0].token_ids) >= 30,
        ),
        "end of sequence ignored": Feature(
            {"ignore_eos": True, "logit_bias": {"1": 30.0}},
            shows=lambda outputs, plain: outputs[0].token_ids == (1,) * NEW_TOKENS,
        ),
        "end of sequence": Feature(
            {"logit_bias": {"1": 0.5}, "temperature": 1.3},
        ),
        "frequency penalty": Feature({"frequency_penalty": 2.0}),
        "presence penalty": Feature({"presence_penalty": 2.0, "temperature": 1.0}),
        "repetition penalty": Feature({"repetition_penalty": 1.8}),
        "bias": Feature({"logit_bias": {str(ids[0]): -100.0}}),
        "top_k": Feature({"temperature": 1.5, "top_k": 8}),
        "top_p": Feature({"temperature": 1.5, "top_p": 0.6}),
        "min_p": Feature({"temperature": 1.5, "min_p": 0.05}),
        "regex": Feature(
            {"regex": "(w4[0-9]+ ){12}[a-c]{9}"},
            shows=lambda outputs, plain: outputs[0].text.count("w4") == 12 and outputs[0].text[-1] in "abc",
        ),
        "JSON schema": Feature(
            {"json_schema": json.dumps(SCHEMA), "temperature": 1.0},
            shows=lambda outputs, plain: set(json.loads(outputs[0].text)) == {"name", "age"},
        ),
        "custom logit processor": Feature(
            {"custom_params": {"token_ids": list(ids[:5])}},
            {"custom_logit_processor": _disallowed_tokens()},
            shows=lambda outputs, plain: not set(outputs[0].token_ids) & set(plain.token_ids[:5]),
        ),
        "end of the context": Feature(
            # SGLang cuts the length two positions before the end.
            {"max_new_tokens": 21, "ignore_eos": True},
            prompt=random_prompts(1, CONTEXT - 21, CONTEXT - 21, seed=9)[0],
            shows=lambda outputs, plain: len(outputs[0].token_ids) == 19,
        ),
        "one token": Feature(
            {"max_new_tokens": 1}, shows=lambda outputs, plain: outputs[0].token_ids == plain.token_ids[:1]
        ),
    }


def _disallowed_tokens() -> str:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    return DisallowedTokensLogitsProcessor.to_str()


def _logprob_counts(output: Output) -> list[int]:
    return [len(output.meta[name]) for name in LOGPROBS[:3]]


def _stopped(output: Output, matched: int | str) -> bool:
    return output.finish == {"type": "stop", "matched": matched}


def _request(feature: Feature) -> Request:
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "sampling_seed": 5, **feature.sampling}
    return Request(feature.prompt or PROMPT, True, sampling)


def _run(server: SabotagedServer, feature: Feature) -> Outputs:
    answer = server.post("/generate", {**_request(feature).body(), **feature.fields})
    assert answer.status_code == 200, answer.text
    answers = answer.json()
    return [Output.of(a) for a in (answers if isinstance(answers, list) else [answers])]


def _together(server: SabotagedServer, features: Mapping[str, Feature]) -> dict[str, Outputs]:
    """All features at once, with unmarked neighbours that use min_p and penalties."""
    calls: list[Callable[[], Any]] = [lambda f=feature: _run(server, f) for feature in features.values()]
    sampling = {"max_new_tokens": 60, "temperature": 1.0, "min_p": 0.1, "presence_penalty": 0.5}
    calls += [
        lambda p=prompt: server.generate(Request(p, False, sampling)) for prompt in random_prompts(6, 20, 90)
    ]
    return dict(zip(features, at_once(calls, gap_s=0.02), strict=False))


@pytest.fixture(scope="module")
def results(server: SabotagedServer) -> Run:
    """Every feature alone, then all of them twice at once: with an empty cache and with a full one."""
    plain = _run(server, Feature())[0]
    features = features_of(plain)
    alone = {}
    for name, feature in features.items():
        server.flush_cache()
        alone[name] = _run(server, feature)
    server.flush_cache()
    server.reset_statistics()
    with server.broken("corrupt_candidates"):
        crowds = [_together(server, features) for _ in range(2)]
        rollbacks = server.statistics()["rollbacks"]
    return Run(plain, features, alone, crowds, rollbacks)


FEATURES = tuple(features_of(Output(tuple(range(NEW_TOKENS)), "x " * NEW_TOKENS, None, {})))


@pytest.mark.parametrize("name", FEATURES)
def test_same_output_alone_and_in_a_crowd_that_is_rolled_back(results: Run, name: str) -> None:
    alone = results.alone[name]
    assert results.features[name].shows(alone, results.plain)
    for crowd in results.crowds:
        assert crowd[name] == alone
        for mine, reference in zip(crowd[name], alone, strict=True):
            for kind in LOGPROBS:
                assert mine.meta.get(kind) == reference.meta.get(kind), kind
    assert results.rollbacks > len(FEATURES)


@pytest.mark.parametrize(
    "name", ["several samples", "stop string", "stop string kept", "end of sequence", "JSON schema", "top_p"]
)
def test_streamed_text_is_the_text(server: SabotagedServer, results: Run, name: str) -> None:
    """No text is lost, repeated or shown that is taken back, though candidates are rejected all the time."""
    feature = results.features[name]
    if name == "several samples":
        feature = Feature({**feature.sampling, "n": 1})
    request = _request(feature)
    expected = server.generate(request, **feature.fields)
    with server.broken("corrupt_candidates"):
        messages = list(server.stream(request, **feature.fields))
    assert messages[-1] == expected
    for earlier, later in pairwise(messages):
        assert later.text.startswith(earlier.text)
        assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids


def test_next_turn_finds_prompt_and_answer_in_the_cache(server: SabotagedServer) -> None:
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True}
    first = Request(PROMPT, True, sampling)
    server.flush_cache()
    answer = server.generate(first).token_ids
    second = Request((*PROMPT, *answer, 7, 8, 9), True, sampling)
    warm = server.generate(second)
    # The last token of an answer is never fed.
    assert warm.meta["cached_tokens"] == len(PROMPT) + len(answer) - 1
    edited = Request((*PROMPT, *answer[:20], 7, 8, 9), True, sampling)
    assert server.generate(edited).meta["cached_tokens"] == len(PROMPT) + 20
    server.flush_cache()
    cold = server.generate(second)
    assert cold.meta["cached_tokens"] == 0
    assert cold == warm


def test_unmarked_requests_use_canonical_prefixes(server: SabotagedServer) -> None:
    """What marked requests leave serves unmarked ones, as a copy with the right bytes that spoils nothing."""
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True}
    first = Request(PROMPT, True, sampling)
    server.flush_cache()
    answer = server.generate(first)
    prefix = (*PROMPT, *answer.token_ids)
    asked = {"return_logprob": True, "top_logprobs_num": 20}
    turn = Request((*prefix, 7, 8, 9), False, {"max_new_tokens": 1, "temperature": 0.0})
    server.reset_statistics()
    warm = server.generate(turn, **asked)
    assert warm.meta["cached_tokens"] == len(prefix) - 1
    assert server.statistics()["shared_prefix_tokens"] == len(prefix) - 1
    edited = Request((*prefix[:-10], 7, 8, 9), False, sampling)
    assert server.generate(edited).meta["cached_tokens"] == len(prefix) - 10
    assert server.statistics()["shared_prefix_tokens"] == len(prefix) - 1, "the copy was there already"
    again = server.generate(Request((*prefix, 7, 8, 9), True, sampling))
    assert again.meta["cached_tokens"] == len(prefix) - 1

    server.flush_cache()
    cold = server.generate(turn, **asked)
    assert cold.meta["cached_tokens"] == 0
    top = {token: value for value, token, _ in warm.meta["output_top_logprobs"][0]}
    for value, token, _ in cold.meta["output_top_logprobs"][0][:8]:
        assert top[token] == pytest.approx(value, abs=0.2)  # SGLang's prefill rounds otherwise
    assert server.generate(first) == answer
    server.flush_cache()
    assert server.generate(Request((*prefix, 7, 8, 9), True, sampling)) == again


def test_an_abort_is_not_lost_in_a_rollback(server: SabotagedServer) -> None:
    """In the original a mismatch took the abort back, and the request ran on."""
    endless = Request(PROMPT, True, {"max_new_tokens": 400, "ignore_eos": True, "temperature": 1.0})
    with server.broken("corrupt_candidates"):
        for number in range(5):
            rid = f"abort-{number}"
            start = time.monotonic()
            output = None
            for output in server.stream(endless, rid=rid):
                if len(output.token_ids) > 10 * number:
                    server.abort(rid)
            assert output is not None
            assert output.finish["type"] == "abort"
            assert len(output.token_ids) < 400
            assert time.monotonic() - start < 30


def test_flushing_the_cache_spoils_nothing(server: SabotagedServer, results: Run) -> None:
    """In the original, slots that verification writes to were given to requests after a flush."""
    for _ in range(2):
        server.flush_cache()
        assert _together(server, results.features) == dict(results.alone)


def test_no_log_probability_is_missing(server: SabotagedServer, results: Run) -> None:
    """In the original those of verified tokens were lost, and comparisons of empty lists passed."""
    asked = {"return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": [5]}
    ends = [{}, {"stop_token_ids": [results.plain.token_ids[17]]}, {"stop_regex": "w[0-9]*7 "}]
    with server.broken("corrupt_candidates"):
        for end in ends:
            request = _request(Feature(end))
            for output in (server.generate(request, **asked), list(server.stream(request, **asked))[-1]):
                assert len(output.token_ids) > 0
                assert _logprob_counts(output) == [len(output.token_ids)] * 3, end


def test_a_rolled_back_end_of_sequence_cuts_no_text(server: SabotagedServer, results: Run) -> None:
    """In the original text was lost behind an end of sequence that verification had refused."""
    names = ("top_p", "stop string", "fewest tokens", "output log-probabilities")
    server.reset_statistics()
    with server.broken("end_candidates"):
        for name in names:
            feature = results.features[name]
            assert _run(server, feature) == results.alone[name], name
            streamed = list(server.stream(_request(feature), **feature.fields))
            assert [streamed[-1]] == results.alone[name], name
        assert server.statistics()["rollbacks"] > len(names)


def test_min_p_of_anybody_is_served(server: SabotagedServer, results: Run) -> None:
    """In the original it ended the server, whoever asked for it."""
    asked = Feature({"temperature": 1.5, "min_p": 0.05})
    other = Request(random_prompts(1, 30, 30)[0], False, {"max_new_tokens": 20, "min_p": 0.2})
    together = at_once([lambda: _run(server, asked), lambda: server.generate(other)], gap_s=0.0)
    assert together[0] == results.alone["min_p"]
    assert len(together[1].token_ids) > 0


def test_aborts_beside_a_request_shift_none_of_its_tokens(server: SabotagedServer, results: Run) -> None:
    """In the original a request that left while a pass was being put together misaligned the others."""
    endless = Request(PROMPT[:30], True, {"max_new_tokens": 400, "ignore_eos": True, "temperature": 1.0})

    def leave(rid: str) -> None:
        for number, _ in enumerate(server.stream(endless, rid=rid)):
            if number == 1:
                server.abort(rid)

    subjects = ("top_k", "bias", "JSON schema")
    calls: list[Callable[[], Any]] = [lambda n=n: leave(f"leaves-{n}") for n in range(6)]
    calls += [lambda name=name: _run(server, results.features[name]) for name in subjects]
    with server.broken("corrupt_candidates"):
        assert at_once(calls, gap_s=0.02)[6:] == [results.alone[name] for name in subjects]
