"""Types and ranges of a deterministic request's fields: the right ones pass, each wrong one is named."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ext.llm42.server import fields
from sglang_ext.llm42.server.marks import MARK_FIELD

VOCABULARY = 100

#: What SGLang derives from the fields that clients set.
DERIVED = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}

GOOD: dict[str, list[Any]] = {
    "max_new_tokens": [0, 10**30],
    "min_new_tokens": [0, 2**31 - 1],
    "stop": ["", "a", ["a", "ä🙂"], []],
    "stop_regex": ["a+", ["[0-9]", "b"]],
    "stop_token_ids": [[], [0, VOCABULARY - 1], {5}],
    "temperature": [0, 1.5, math.nan],
    "top_k": [-1, 1, 2**31 - 1],
    "n": [1, 3],
    "logit_bias": [{}, {"5": -1e30, "99": 2}],
    "sampling_seed": [0, -(2**63), 2**63 - 1],
    "custom_params": [{}, {"mine": {"deep": [1, {}]}}],
    "json_schema": ["{}"],
    "stream_interval": [1],
    "ignore_eos": [True],
}

BAD: dict[str, list[Any]] = {
    "max_new_tokens": ["5", 2.0, True, [5], {}],
    "min_new_tokens": ["5", 2**31],
    "stop": [5, [5], [["a"]], {"a": 1}, "\ud800", [None]],
    "stop_regex": ["(", ["a", "["], 5, "a{2,1}"],
    "stop_token_ids": [5, ["5"], [-1], [VOCABULARY], [1.0], [[1]], [True]],
    "temperature": ["0", True, [0.5], {}, 10**400],
    "top_p": ["1"],
    "min_p": [[]],
    "frequency_penalty": ["x"],
    "presence_penalty": [{}],
    "repetition_penalty": [True],
    "top_k": [2**31, 1.5, "3"],
    "n": [0, -1, "2", 1.0],
    "json_schema": [{}, 5, "\udfff"],
    "regex": [["a"]],
    "ebnf": [1],
    "structural_tag": [{}],
    "ignore_eos": ["yes", 1],
    "skip_special_tokens": ["no"],
    "spaces_between_special_tokens": [0],
    "no_stop_trim": [[]],
    "stream_interval": [0, -1, "1"],
    "logit_bias": [[], "5", {"x": 1}, {"-1": 1}, {"5": "1"}, {"5": 1e31}, {"5": math.nan}, {"5": None}],
    "sampling_seed": ["7", True, 2**63, -(2**63) - 1, 7.0, [7]],
    "custom_params": ["text", 5, [1], {5: 1}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, vs in GOOD.items() for value in vs])
def test_what_is_right_passes(name: str, value: Any) -> None:
    fields.check_sampling({name: value}, VOCABULARY)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, vs in BAD.items() for value in vs])
def test_what_is_wrong_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        fields.check_sampling({"temperature": 0.5, name: value}, VOCABULARY)


def test_every_parameter_of_sglang_is_known_and_tried() -> None:
    known = {*fields.SAMPLING, *fields.SAMPLING_BY_VOCABULARY}
    assert known == {*SamplingParams.__struct_fields__, MARK_FIELD} - DERIVED
    assert set(BAD) == known - {MARK_FIELD}


@pytest.mark.parametrize("name", [*sorted(DERIVED), "temprature", ""])
def test_other_parameters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no field '{name}'"):
        fields.check_sampling({name: None}, VOCABULARY)


def test_null_is_the_default() -> None:
    fields.check_sampling(dict.fromkeys(BAD), VOCABULARY)
    fields.check_request(SimpleNamespace(), [1], VOCABULARY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("return_logprob", "yes"),
        ("return_logprob", [True]),
        ("logprob_start_len", -2),
        ("logprob_start_len", "0"),
        ("top_logprobs_num", -1),
        ("top_logprobs_num", VOCABULARY + 1),
        ("top_logprobs_num", [1]),
        ("token_ids_logprob", [[1]]),
        ("token_ids_logprob", [True]),
        ("token_ids_logprob", [VOCABULARY]),
        ("stream", 1),
        ("rid", "\ud800"),
        ("return_hidden_states", []),
        ("return_hidden_states", "first"),
        ("custom_logit_processor", []),
        ("custom_logit_processor", ""),
        ("custom_logit_processor", "text"),
        ("custom_logit_processor", '{"callable": "text"}'),
        ("custom_logit_processor", '{"callable": 5}'),
        ("custom_logit_processor", "[" * 100_000),
        ("custom_logit_processor", "5"),
        ("extra_key", ["a"]),
        ("priority", "high"),
    ],
)
def test_wrong_fields_beside_the_sampling_parameters_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        fields.check_request(SimpleNamespace(**{name: value}), [1], VOCABULARY)


def test_right_fields_beside_the_sampling_parameters_pass() -> None:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    processor = DisallowedTokensLogitsProcessor.to_str()
    for values in ({"custom_logit_processor": processor}, {"return_hidden_states": "last"}):
        fields.check_request(SimpleNamespace(**values), [1], VOCABULARY)


@pytest.mark.parametrize("ids", [[-1], [1, VOCABULARY], [2**62]])
def test_prompts_are_token_ids(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^input_ids must be "):
        fields.check_request(SimpleNamespace(), ids, VOCABULARY)


def test_a_prompt_is_not_empty() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        fields.check_request(SimpleNamespace(), [], VOCABULARY)
    fields.check_request(SimpleNamespace(), None, VOCABULARY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(BAD)), JSON)
def test_no_value_ends_in_another_error(name: str, value: Any) -> None:
    try:
        fields.check_sampling({name: value}, VOCABULARY)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{name} must be ") and len(message) < 1000
        message.encode()
