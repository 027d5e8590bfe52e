"""What the stress run asks: a fixed catalogue of deterministic requests of all sorts. No server in here.

The catalogue has two generations. The first is drawn from prompts and options. The second follows from what
the first answered: stop conditions that match in the middle of a known output, whatever the model, and next
turns of conversations.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving import Output

#: Log-probabilities in ``meta_info``, all of them.
LOGPROBS = tuple(
    f"{side}_{what}"
    for side in ("input", "output")
    for what in ("token_logprobs", "top_logprobs", "token_ids_logprobs")
)

#: Part of ``meta_info`` that is kept beside what is compared.
META = ("cached_tokens", "llm42_num_rollbacks", "llm42_tokens_rolled_back", "num_retractions")

#: Longest prompt of the first generation and lengths of outputs, in tokens: some end inside the first window.
MAX_PROMPT = 140
NEW_TOKENS = (1, 7, 16, 24, 33, 48, 64)

#: An output must have this many tokens for a stop condition inside it or a next turn.
LONG_ENOUGH = 8


@dataclass(frozen=True)
class Model:
    """What the catalogue knows of the model.

    Attributes:
        prompts: token ids.
        vocab_size: number of token ids.
        end: id of the end of sequence.
        grammars: sampling parameters with a grammar each, satisfiable with the model's tokens.
    """

    prompts: Sequence[Sequence[int]]
    vocab_size: int
    end: int
    grammars: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Subject:
    """One request of the catalogue.

    Attributes:
        name: unique, and the same in every run.
        features: what it tries.
        body: of ``POST /generate``, without ``rid`` and ``stream``.
    """

    name: str
    features: tuple[str, ...]
    body: Mapping[str, Any]

    def finish_kind(self, sample: Sample, end: int) -> str:
        """How ``sample`` of it ended, with what was matched; ``end`` is the id of the end of sequence."""
        reason = json.loads(sample.finish)
        matched = reason.get("matched")
        if matched is None:
            return str(reason["type"])
        if isinstance(matched, int):
            return "end of sequence" if matched == end else "stop token"
        return "stop_regex" if "stop_regex" in self.body["sampling_params"] else "stop string"

    @property
    def samples(self) -> int:
        """How many answers there are."""
        return int(self.body["sampling_params"].get("n", 1))


@dataclass(frozen=True)
class Sample(Output):
    """One answer: what :class:`Output` holds, and log-probabilities as JSON, in which no bit is lost."""

    logprobs: str = "{}"

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Sample:
        """From an answer of ``POST /generate``, be it a message of a stream."""
        meta = answer["meta_info"]
        return cls(
            ids=tuple(answer["output_ids"]),
            text=answer.get("text") or "",
            finish=json.dumps(meta["finish_reason"], sort_keys=True),
            meta={name: meta[name] for name in META if name in meta},
            logprobs=json.dumps({name: meta[name] for name in LOGPROBS if name in meta}),
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sample:
        """From :meth:`row`."""
        return cls(**{**row, "ids": tuple(row["ids"])})

    def row(self) -> dict[str, Any]:
        """As it stands in files."""
        return {
            "ids": list(self.ids),
            "text": self.text,
            "finish": self.finish,
            "meta": self.meta,
            "logprobs": self.logprobs,
        }

    @property
    def finish_type(self) -> str:
        """Kind of the finish reason; empty while there is none."""
        reason = json.loads(self.finish)
        return str(reason["type"]) if reason else ""

    def differences(self, reference: Output) -> tuple[str, ...]:
        """Which of tokens, text, finish reason and log-probabilities differ from those of ``reference``."""
        found = super().differences(reference)
        if not isinstance(reference, Sample) or self.logprobs == reference.logprobs:
            return found
        mine, theirs = json.loads(self.logprobs), json.loads(reference.logprobs)
        # Equal values in other JSON text differ in bits: 0.0 and -0.0.
        names = [name for name in LOGPROBS if mine.get(name) != theirs.get(name)] or ["log-probabilities"]
        return (*found, *names)

    def begins(self, reference: Output) -> bool:
        """Whether the output tokens are the first ones of ``reference``."""
        return self.ids == reference.ids[: len(self.ids)]


#: All samples of an answer.
Answer = tuple[Sample, ...]


# First generation


def bases(model: Model, count: int, seed: int) -> list[Subject]:
    """The first generation: options are drawn, and each stands in turn in every len(OPTIONS)-th request."""
    return [_base(model, number, random.Random(f"{seed}-base-{number}")) for number in range(count)]


def _base(model: Model, number: int, chance: random.Random) -> Subject:
    start = chance.randrange(8)
    prompt = list(chance.choice(model.prompts))[start : start + chance.randint(12, MAX_PROMPT)]
    sampling: dict[str, Any] = {"max_new_tokens": chance.choice(NEW_TOKENS), **_style(chance)}
    body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling}
    names = list(OPTIONS)
    chosen = {names[number % len(names)], *(name for name in names if chance.random() < 0.12)}
    for name in names:
        if name in chosen:
            OPTIONS[name](model, chance, body)
    style = "greedy" if sampling["temperature"] == 0.0 else "sampled"
    return _subject(f"base-{number:03}", (style, *(name for name in names if name in chosen)), body)


def _subject(name: str, features: Iterable[str], body: Mapping[str, Any]) -> Subject:
    marked = {**body, "sampling_params": {**body["sampling_params"], "is_deterministic": True}}
    return Subject(name, tuple(features), marked)


def _style(chance: random.Random) -> dict[str, Any]:
    """How tokens are chosen: greedy, or sampled in any combination, with a seed or the default one."""
    if chance.random() < 0.4:
        return {"temperature": 0.0}
    style: dict[str, Any] = {"temperature": chance.choice((0.6, 0.8, 1.0, 1.3))}
    for name, values in (("top_p", (0.7, 0.95)), ("top_k", (5, 40)), ("min_p", (0.02, 0.1))):
        if chance.random() < 0.4:
            style[name] = chance.choice(values)
    if chance.random() < 0.8:
        style["sampling_seed"] = chance.choice((0, -1, chance.randrange(2**31), chance.randrange(2**63)))
    return style


def _penalties(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    choices = {"frequency_penalty": 0.7, "presence_penalty": 0.9, "repetition_penalty": 1.2}
    names = chance.sample(list(choices), chance.randint(1, 2))
    body["sampling_params"].update({name: choices[name] for name in names})


def _logit_bias(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    """Some tokens more or less likely, the end of sequence among them."""
    some = {str(chance.randrange(model.vocab_size)): chance.uniform(-5, 5) for _ in range(4)}
    body["sampling_params"]["logit_bias"] = {**some, str(model.end): chance.choice((2.0, 5.0, 8.0))}


def _grammar(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    body["sampling_params"].update(chance.choice(model.grammars))


def _samples(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    body["sampling_params"]["n"] = chance.randint(2, 3)


def _output_logprobs(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    body["return_logprob"] = True


def _top_logprobs(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    body.update(return_logprob=True, top_logprobs_num=chance.randint(1, 5))


def _chosen_logprobs(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    body.update(return_logprob=True, token_ids_logprob=[chance.randrange(model.vocab_size) for _ in range(3)])


def _prompt_logprobs(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    body.update(return_logprob=True, logprob_start_len=chance.choice((0, len(body["input_ids"]) // 2)))


def _ignore_eos(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    body["sampling_params"]["ignore_eos"] = True


def _stop_tokens(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    """Many stop tokens: one of them is sampled soon, also by a candidate that verification rejects."""
    step = chance.randint(23, 47)
    body["sampling_params"]["stop_token_ids"] = list(range(chance.randrange(step), model.vocab_size, step))


def _minimum(model: Model, chance: random.Random, body: dict[str, Any]) -> None:
    if any(name in body["sampling_params"] for grammar in model.grammars for name in grammar):
        return  # where the grammar allows the end only, and that is forbidden, stock SGLang's scheduler ends
    _stop_tokens(model, chance, body)
    longest = body["sampling_params"]["max_new_tokens"]
    body["sampling_params"]["min_new_tokens"] = chance.randint(1, longest)


Option = Callable[[Model, random.Random, dict[str, Any]], None]

OPTIONS: Mapping[str, Option] = {
    "plain": lambda model, chance, body: None,
    "penalties": _penalties,
    "logit_bias": _logit_bias,
    "grammar": _grammar,
    "several samples": _samples,
    "output log-probabilities": _output_logprobs,
    "top log-probabilities": _top_logprobs,
    "chosen log-probabilities": _chosen_logprobs,
    "prompt log-probabilities": _prompt_logprobs,
    "ignore_eos": _ignore_eos,
    "stop_token_ids": _stop_tokens,
    "min_new_tokens": _minimum,
}


# Second generation


def derived(
    model: Model, first: Sequence[Subject], answers: Mapping[str, Answer], seed: int
) -> list[Subject]:
    """The second generation, from what the first answered.

    Args:
        model: the model.
        first: the first generation.
        answers: what each of them gave, by name.
        seed: of what is drawn.
    """
    usable = [
        subject
        for subject in first
        if subject.samples == 1
        and "grammar" not in subject.features
        and len(answers[subject.name][0].ids) >= LONG_ENOUGH
    ]
    found = []
    for number, subject in enumerate(usable):
        chance = random.Random(f"{seed}-{subject.name}")
        names = list(DERIVATIONS)
        # Next turns for all, for they alone find long prefixes in the cache.
        for name in {names[number % len(names)], NEXT_TURN}:
            body = json.loads(json.dumps(subject.body))
            if DERIVATIONS[name](model, chance, body, answers[subject.name][0]):
                found.append(_subject(f"{name}-{subject.name}", (name, *subject.features), body))
    return sorted(found, key=lambda subject: subject.name)


def _stop_at_token(model: Model, chance: random.Random, body: dict[str, Any], answer: Sample) -> bool:
    body["sampling_params"]["stop_token_ids"] = [chance.choice(answer.ids[1:])]
    body["sampling_params"].pop("ignore_eos", None)
    return True


def _piece(chance: random.Random, text: str) -> str:
    """A few characters from the middle of ``text``."""
    start = chance.randrange(len(text) // 4, max(len(text) // 4 + 1, len(text) - 3))
    return text[start : start + chance.randint(1, 6)]


def _stop_at_string(model: Model, chance: random.Random, body: dict[str, Any], answer: Sample) -> bool:
    piece = _piece(chance, answer.text)
    if not piece or "�" in piece:
        return False
    body["sampling_params"].update(stop=[piece, "never in any output"], no_stop_trim=chance.random() < 0.5)
    return True


def _stop_at_regex(model: Model, chance: random.Random, body: dict[str, Any], answer: Sample) -> bool:
    piece = _piece(chance, answer.text)
    if not piece or "�" in piece:
        return False
    body["sampling_params"]["stop_regex"] = re.escape(piece[:-1]) + r"[\s\S]"
    return True


def _late_stop(model: Model, chance: random.Random, body: dict[str, Any], answer: Sample) -> bool:
    """A stop token that comes before the least length, which therefore must not be sampled there."""
    body["sampling_params"].update(
        stop_token_ids=[answer.ids[len(answer.ids) // 3]], min_new_tokens=len(answer.ids) // 2
    )
    body["sampling_params"].pop("ignore_eos", None)
    return True


def _next_turn(model: Model, chance: random.Random, body: dict[str, Any], answer: Sample) -> bool:
    """The conversation goes on: prompt, answer and something new."""
    new = list(chance.choice(model.prompts))[: chance.randint(1, 20)]
    body["input_ids"] += [*answer.ids, *new]
    return True


NEXT_TURN = "next turn"

Derivation = Callable[[Model, random.Random, dict[str, Any], Sample], bool]

DERIVATIONS: Mapping[str, Derivation] = {
    "stop token": _stop_at_token,
    "stop string": _stop_at_string,
    "stop_regex": _stop_at_regex,
    "late stop": _late_stop,
    NEXT_TURN: _next_turn,
}


def unmarked_body(subject: Subject) -> dict[str, Any]:
    """The same request without the mark: a neighbour."""
    params = {k: v for k, v in subject.body["sampling_params"].items() if k != "is_deterministic"}
    return {**subject.body, "sampling_params": params}
