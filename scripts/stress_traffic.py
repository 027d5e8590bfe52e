"""The traffic of the stress run: clients that ask, abort, hang up and compare."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests
import stress_catalogue as catalogue
from serving import Server, ServingError
from stress_catalogue import Answer, Model, Sample, Subject

#: Seconds until an answer counts as missing.
ANSWER_TIMEOUT_S = 180

#: Longest random pause of a client between two requests, and delay of an abort or disconnect.
PAUSE_S = 0.4
DELAY_S = 2.5


class RequestError(RuntimeError):
    """The server refused a request or sent what is no answer."""


def _post(server: Server, body: Mapping[str, Any], stream: bool = False, **options: Any) -> requests.Response:
    options.setdefault("timeout", ANSWER_TIMEOUT_S)
    return requests.post(f"{server.client.url}/generate", json=body, stream=stream, **options)


def ask(server: Server, body: Mapping[str, Any]) -> Answer:
    """The whole answer of one request.

    Raises:
        RequestError: it was refused.
    """
    reply = _post(server, body)
    if reply.status_code != 200:
        raise RequestError(f"{reply.status_code} {reply.text[:300]}")
    answers = reply.json()
    return tuple(Sample.of(answer) for answer in (answers if isinstance(answers, list) else [answers]))


def stream(server: Server, body: Mapping[str, Any]) -> Iterator[tuple[int, Sample]]:
    """The messages of a stream: index of the sample, and what has come of it so far.

    Raises:
        RequestError: the stream holds an error, or ended before its last message.
    """
    with _post(server, {**body, "stream": True}, stream=True) as reply:
        if reply.status_code != 200:
            raise RequestError(f"{reply.status_code} {reply.text[:300]}")
        for line in reply.iter_lines():
            data = line.removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            if data:
                message = json.loads(data)
                if "error" in message:
                    raise RequestError(json.dumps(message["error"])[:300])
                yield message.get("index", 0), Sample.of(message)
    raise RequestError("the stream ended without [DONE]")


@dataclass
class Seen:
    """What one client saw in a round.

    Attributes:
        counts: by name.
        features: compared answers by feature of their request.
        finishes: compared samples by how they ended.
        differences: answers that are not their reference, each with its request.
        failures: requests that ended in no answer.
    """

    counts: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    finishes: Counter[str] = field(default_factory=Counter)
    differences: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        """Take over what another client saw."""
        self.counts += other.counts
        self.features += other.features
        self.finishes += other.finishes
        self.differences += other.differences
        self.failures += other.failures


class Client:
    """Sends requests of the catalogue, one after the other, in a random order that its seed fixes.

    Args:
        server: where to.
        subjects: the catalogue, with the reference of each.
        model: the model.
        name: unique among the clients of all rounds; request ids begin with it.
        seed: of everything that it draws.
    """

    def __init__(
        self, server: Server, subjects: Sequence[tuple[Subject, Answer]], model: Model, name: str, seed: int
    ) -> None:
        self.seen = Seen()
        self._server = server
        self._subjects = subjects
        self._model = model
        self._name = name
        self._chance = random.Random(f"{seed}-{name}")

    def run(self, until: float) -> Seen:
        """Send requests until the clock shows ``until``."""
        number = 0
        while time.monotonic() < until:
            self._one(f"{self._name}-{number:05}")
            number += 1
            # Now and then several clients arrive together.
            if self._chance.random() < 0.7:
                time.sleep(self._chance.uniform(0, PAUSE_S))
        return self.seen

    def _one(self, rid: str) -> None:
        subject, reference = self._chance.choice(self._subjects)
        marked = self._chance.random() < 0.72
        manner = self._chance.choices(MANNERS, WEIGHTS)[0]
        body = dict(subject.body) if marked else catalogue.unmarked_body(subject)
        try:
            manner(self, _Call(subject, reference if marked else None, {**body, "rid": rid}))
        except (RequestError, requests.RequestException, KeyError, ValueError) as error:
            if self._server.process.poll() is not None:
                raise ServingError(f"the server ended:\n{self._server.tail()}") from error
            row = {"subject": subject.name, "manner": manner.__name__, "error": repr(error), "body": body}
            self.seen.failures.append(row)

    # The manners of asking

    def whole(self, call: _Call) -> None:
        """Wait for the answer."""
        self._check(call, ask(self._server, call.body))

    def streamed(self, call: _Call) -> None:
        """Read a stream to its end; each message continues the one before."""
        last: dict[int, Sample] = {}
        for index, sample in stream(self._server, call.body):
            self._check_message(call, index, last.get(index), sample)
            last[index] = sample
        self._check(call, tuple(last[index] for index in sorted(last)))
        self.seen.counts["streams compared"] += call.marked

    def aborted(self, call: _Call) -> None:
        """Ask for the end of the request after a while."""
        timer = threading.Timer(self._chance.uniform(0, DELAY_S), self._abort, [call.body["rid"]])
        timer.start()
        try:
            answer = ask(self._server, call.body)
        except RequestError as error:
            if "bort" not in str(error):
                raise
            self.seen.counts["aborts"] += 1  # before it was running
            return
        finally:
            timer.cancel()
            timer.join()
        self._check(call, answer, may_be_cut=True)

    def aborted_stream(self, call: _Call) -> None:
        """Ask for the end of the request after some messages."""
        messages = self._chance.randint(1, 6)
        last: dict[int, Sample] = {}
        for number, (index, sample) in enumerate(stream(self._server, call.body), 1):
            # The last message of a stream that was aborted in the waiting queue holds one token only.
            if sample.finish_type != "abort":
                self._check_message(call, index, last.get(index), sample)
            last[index] = sample
            if number == messages:
                self._abort(call.body["rid"])
        finished = all(sample.finish_type not in ("", "abort") for sample in last.values())
        self.seen.counts["aborts"] += any(sample.finish_type == "abort" for sample in last.values())
        if finished and len(last) == call.subject.samples:
            self._check(call, tuple(last[index] for index in sorted(last)))

    def left(self, call: _Call) -> None:
        """Hang up without waiting for the answer."""
        try:
            reply = _post(self._server, call.body, timeout=(10, self._chance.uniform(0.02, DELAY_S)))
        except requests.Timeout:
            self.seen.counts["disconnects"] += 1
            return
        if reply.status_code != 200:
            raise RequestError(f"{reply.status_code} {reply.text[:300]}")
        self.seen.counts["too late to disconnect"] += 1

    def left_stream(self, call: _Call) -> None:
        """Hang up after some messages."""
        messages = self._chance.randint(1, 5)
        last: dict[int, Sample] = {}
        for number, (index, sample) in enumerate(stream(self._server, call.body), 1):
            self._check_message(call, index, last.get(index), sample)
            last[index] = sample
            if number == messages:
                unfinished = any(not other.finish_type for other in last.values())
                self.seen.counts["disconnects" if unfinished else "too late to disconnect"] += 1
                return

    def _abort(self, rid: str) -> None:
        requests.post(f"{self._server.client.url}/abort_request", json={"rid": rid}, timeout=ANSWER_TIMEOUT_S)

    # Comparing

    def _check(self, call: _Call, answer: Answer, may_be_cut: bool = False) -> None:
        """Compare a finished answer with its reference, if it is marked."""
        aborted = any(sample.finish_type == "abort" for sample in answer)
        if aborted and may_be_cut:
            self.seen.counts["aborts"] += 1
            for index, sample in enumerate(answer):
                self._check_message(call, index, None, sample)
            return
        if aborted:
            raise RequestError(f"aborted by the server: {answer[0].finish}")
        if call.reference is None:
            self.seen.counts["unmarked answers"] += 1
            return
        self.seen.counts["answers compared"] += 1
        self.seen.features.update(call.subject.features)
        for index, (sample, expected) in enumerate(zip(answer, call.reference, strict=True)):
            self.seen.finishes[call.subject.finish_kind(sample, self._model.end)] += 1
            self._count(sample)
            if what := sample.differences(expected):
                self._differs(call, index, what, expected, sample)

    def _check_message(self, call: _Call, index: int, before: Sample | None, sample: Sample) -> None:
        """A message, or an answer that was cut off, must be the beginning of the reference."""
        if call.reference is None:
            return
        self.seen.counts["beginnings compared"] += 1
        if not sample.begins(call.reference[index]):
            self._differs(call, index, ("beginning",), call.reference[index], sample)
        if before is not None and not before.begins(sample):
            self._differs(call, index, ("order of messages",), before, sample)

    def _count(self, sample: Sample) -> None:
        meta = sample.meta
        self.seen.counts["cached prompt tokens"] += meta["cached_tokens"]
        self.seen.counts["answers with cached prompt tokens"] += meta["cached_tokens"] > 0
        self.seen.counts["retractions of compared answers"] += meta.get("num_retractions", 0)
        self.seen.counts["answers with rollbacks"] += meta["llm42_num_rollbacks"] > 0

    def _differs(
        self, call: _Call, index: int, what: Sequence[str], expected: Sample, sample: Sample
    ) -> None:
        self.seen.differences.append(
            {
                "subject": call.subject.name,
                "sample": index,
                "what": list(what),
                "token": sample.first_difference(expected),
                "body": dict(call.subject.body),
                "expected": expected.row(),
                "got": sample.row(),
            }
        )


@dataclass(frozen=True)
class _Call:
    """One request on its way.

    Attributes:
        subject: of the catalogue.
        reference: what it must give, None for an unmarked request.
        body: what is posted.
    """

    subject: Subject
    reference: Answer | None
    body: Mapping[str, Any]

    @property
    def marked(self) -> bool:
        """Whether it is deterministic."""
        return self.reference is not None


MANNERS: tuple[Callable[[Client, _Call], None], ...] = (
    Client.whole,
    Client.streamed,
    Client.aborted,
    Client.aborted_stream,
    Client.left,
    Client.left_stream,
)
WEIGHTS = (40, 32, 8, 7, 7, 6)
