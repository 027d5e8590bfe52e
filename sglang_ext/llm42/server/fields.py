"""Types and ranges of the fields of a deterministic request, checked before SGLang reads them.

SGLang trusts what ``POST /generate`` and ``sglang.Engine`` say: a value of the wrong type ends in a 500, or
it reaches the scheduler and ends the server. A deterministic request gets a 400 that names the field instead.
Unmarked requests are left to SGLang. No SGLang in here.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sglang_ext.llm42.server.marks import MARK_FIELD

#: SGLang puts some integers into tensors of 32 bits.
_INT32 = range(-(2**31), 2**31)

#: Sizes of int64, in which the sampling noise is keyed.
_SEEDS = range(-(2**63), 2**63)

#: Larger biases leave float32 once the temperature has divided them.
_MAX_BIAS = 1e30


@dataclass(frozen=True)
class Kind:
    """What a value must be.

    Attributes:
        what: completes "must be ...".
        holds: whether a value, not None, is that.
    """

    what: str
    holds: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a number that a float can hold (or NaN or infinity, which SGLang refuses)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return not isinstance(value, Integral) or abs(int(value)) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    """Whether ``value`` is text that tokenizers can read: without halves of surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset)


def _is_texts(value: Any) -> bool:
    return _is_text(value) or (_is_list(value) and all(map(_is_text, value)))


def _is_patterns(value: Any) -> bool:
    return _is_texts(value) and all(_compiles(p) for p in ([value] if isinstance(value, str) else value))


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_biases(value: Any) -> bool:
    """Whether ``value`` maps numbers of tokens, which SGLang compares with the vocabulary, to biases."""
    if not isinstance(value, Mapping):
        return False
    keys = all(_is_int(key) or (isinstance(key, str) and key.isdecimal()) for key in value)
    return keys and all(_is_number(bias) and abs(bias) <= _MAX_BIAS for bias in value.values())


def _is_processor(value: Any) -> bool:
    """Whether ``value`` has the form of a serialized processor; only the scheduler loads it."""
    try:
        bytes.fromhex(json.loads(value)["callable"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return False
    return isinstance(value, str)


def _integer(low: int | None = None, high: int | None = None) -> Kind:
    limits = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
    return Kind(
        " ".join(["an integer", " and ".join(limits)]).strip(),
        lambda value: _is_int(value) and (low is None or value >= low) and (high is None or value <= high),
    )


def _token_ids(vocab_size: int) -> Kind:
    return Kind(
        f"a list of token ids from 0 to {vocab_size - 1}",
        lambda value: _is_list(value) and all(_is_int(i) and 0 <= i < vocab_size for i in value),
    )


_ANYTHING = Kind("anything", lambda value: True)
_BOOL = Kind("true or false", lambda value: isinstance(value, bool))
_NUMBER = Kind("a number", _is_number)
_TEXT = Kind("a string of valid Unicode", _is_text)
_TEXTS = Kind("a string or a list of strings, of valid Unicode", _is_texts)
_PATTERNS = Kind("a regular expression of Python or a list of them", _is_patterns)
_SEED = Kind("a 64-bit integer", lambda value: _is_int(value) and value in _SEEDS)
_OBJECT = Kind(
    "an object with string keys", lambda value: isinstance(value, dict) and all(map(_is_text, value))
)
_HIDDEN_STATES = Kind('true, false or "last"', lambda value: isinstance(value, bool) or value == "last")
_PROCESSOR = Kind("what to_str() of a CustomLogitProcessor returns", _is_processor)
_BIASES = Kind(f"an object that gives token ids a bias between -{_MAX_BIAS:g} and {_MAX_BIAS:g}", _is_biases)

#: Sampling parameters that clients set; ranges that SGLang checks are left to it.
SAMPLING: Mapping[str, Kind] = {
    # Every interface checks the mark itself.
    MARK_FIELD: _ANYTHING,
    "max_new_tokens": _integer(),
    "min_new_tokens": _integer(high=_INT32.stop - 1),
    "stop": _TEXTS,
    "stop_regex": _PATTERNS,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _integer(high=_INT32.stop - 1),
    "min_p": _NUMBER,
    "frequency_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "repetition_penalty": _NUMBER,
    "n": _integer(1),
    "json_schema": _TEXT,
    "regex": _TEXT,
    "ebnf": _TEXT,
    "structural_tag": _TEXT,
    "ignore_eos": _BOOL,
    "skip_special_tokens": _BOOL,
    "spaces_between_special_tokens": _BOOL,
    "no_stop_trim": _BOOL,
    "stream_interval": _integer(1),
    "logit_bias": _BIASES,
    "sampling_seed": _SEED,
    "custom_params": _OBJECT,
}

#: Those that SGLang computes with as soon as a request arrives.
READ_FIRST = ("n", "max_new_tokens")

#: Those that depend on the vocabulary's size.
SAMPLING_BY_VOCABULARY: Mapping[str, Callable[[int], Kind]] = {"stop_token_ids": _token_ids}

#: Further fields of ``POST /generate``, of one request of a batch.
REQUEST: Mapping[str, Kind] = {
    "return_logprob": _BOOL,
    "logprob_start_len": _integer(-1),
    "stream": _BOOL,
    "rid": _TEXT,
    "return_hidden_states": _HIDDEN_STATES,
    "custom_logit_processor": _PROCESSOR,
    "extra_key": _TEXT,
    "priority": _integer(),
}

REQUEST_BY_VOCABULARY: Mapping[str, Callable[[int], Kind]] = {
    "top_logprobs_num": lambda vocab_size: _integer(0, vocab_size),
    "token_ids_logprob": _token_ids,
}


def check_first(params: Mapping[str, Any]) -> None:
    """Check the sampling parameters that SGLang computes with before it tokenizes a request.

    Raises:
        ValueError: as :func:`check_sampling`.
    """
    if "n" in params and params["n"] is None:
        raise ValueError(f"n must be {SAMPLING['n'].what}, not None.")
    _check({name: params.get(name) for name in READ_FIRST}, SAMPLING)


def check_sampling(params: Mapping[str, Any], vocab_size: int) -> None:
    """Check the sampling parameters of a deterministic request as its client wrote them.

    None stands for a parameter's default everywhere (``n`` has been looked at by :func:`check_first`).

    Raises:
        ValueError: a parameter is unknown, or its value is of the wrong type or out of range; the message
            names it.
    """
    kinds = _kinds(SAMPLING, SAMPLING_BY_VOCABULARY, vocab_size)
    unknown = [name for name in params if name not in kinds]
    if unknown:
        raise ValueError(f"sampling_params has no field {reprlib.repr(unknown[0])}.")
    _check(params, kinds)


def check_request(obj: Any, input_ids: Collection[int] | None, vocab_size: int) -> None:
    """Check a single deterministic request.

    Args:
        obj: SGLang's ``GenerateReqInput``.
        input_ids: the prompt, tokenized; None without one.
        vocab_size: number of token ids.

    Raises:
        ValueError: as :func:`check_sampling`, or the prompt is empty or not made of token ids.
    """
    kinds = _kinds(REQUEST, REQUEST_BY_VOCABULARY, vocab_size)
    _check({name: getattr(obj, name, None) for name in kinds}, kinds)
    if input_ids is None:
        return
    if not input_ids:
        raise ValueError("The prompt of a deterministic request must hold at least one token.")
    if min(input_ids) < 0 or max(input_ids) >= vocab_size:
        raise ValueError(f"input_ids must be {_token_ids(vocab_size).what}.")


def _kinds(
    fixed: Mapping[str, Kind], by_vocabulary: Mapping[str, Callable[[int], Kind]], vocab_size: int
) -> dict[str, Kind]:
    return {**fixed, **{name: kind(vocab_size) for name, kind in by_vocabulary.items()}}


def _check(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    for name, value in values.items():
        if value is not None and not kinds[name].holds(value):
            raise ValueError(f"{name} must be {kinds[name].what}, not {reprlib.repr(value)}.")
