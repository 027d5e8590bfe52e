"""The determinism check: the same marked requests under changing conditions, compared with each run alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from live_server import Output, Request, Server


@dataclass(frozen=True)
class Condition:
    """What the marked requests meet.

    Attributes:
        name: for messages.
        crowd: requests sent together; what the marked ones leave free, unmarked neighbours fill.
        marked: marked requests in each crowd.
        cold: whether the prefix cache is emptied before each crowd.
        twins_first: whether unmarked requests with the same prompts run to their end before each crowd.
    """

    name: str
    crowd: int
    marked: int
    cold: bool = True
    twins_first: bool = False


ALONE_WARM = Condition("alone, warm cache", 1, 1, cold=False)
CROWD_OF_3 = Condition("crowd of 3", 3, 2)
CROWD_OF_8 = Condition("crowd of 8, warm cache", 8, 4, cold=False)
CROWD_OF_17 = Condition("crowd of 17", 17, 8)
AFTER_TWINS = Condition("crowd of 8 after unmarked requests with the same prompts", 8, 8, twins_first=True)


@dataclass(frozen=True)
class Mismatch:
    """A marked request whose output was not that of its reference run."""

    condition: Condition
    request: Request
    expected: Output
    got: Output

    def __str__(self) -> str:
        pairs = enumerate(zip(self.expected.token_ids, self.got.token_ids, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        where = "same tokens so far" if first is None else f"first difference at token {first}"
        return (
            f"{self.condition.name}: {dict(self.request.sampling)} {where}; expected "
            f"{len(self.expected.token_ids)} tokens, {self.expected.finish}, got {len(self.got.token_ids)}, "
            f"{self.got.finish}"
        )


def run_alone(server: Server, subjects: Sequence[Request]) -> list[Output]:
    """Each of ``subjects`` alone on an idle server with an empty prefix cache."""
    outputs = []
    for subject in subjects:
        server.flush_cache()
        outputs.append(server.generate(subject))
    return outputs


def run_condition(
    server: Server, subjects: Sequence[Request], condition: Condition, neighbours: Sequence[Request] = ()
) -> list[Output]:
    """Outputs of ``subjects`` under ``condition``."""
    outputs: list[Output] = []
    for number, group in enumerate(_groups(subjects, condition.marked)):
        if condition.cold:
            server.flush_cache()
        if condition.twins_first:
            server.together([unmarked(subject) for subject in group])
        room = condition.crowd - len(group)
        crowd = list(group) + [neighbours[(number + i) % len(neighbours)] for i in range(room)]
        order = random.Random(number).sample(range(len(crowd)), len(crowd))
        shuffled = server.together([crowd[i] for i in order])
        by_place = dict(zip(order, shuffled, strict=True))
        outputs += [by_place[i] for i in range(len(group))]
    return outputs


def mismatches(
    server: Server,
    subjects: Sequence[Request],
    expected: Sequence[Output],
    condition: Condition,
    neighbours: Sequence[Request] = (),
) -> list[Mismatch]:
    """Run ``subjects`` under ``condition`` and return those that differ from ``expected``."""
    got = run_condition(server, subjects, condition, neighbours)
    return [
        Mismatch(condition, *row) for row in zip(subjects, expected, got, strict=True) if row[1] != row[2]
    ]


def unmarked(request: Request) -> Request:
    """The same request without the mark."""
    return replace(request, marked=False)


def _groups(subjects: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(subjects), size):
        yield subjects[start : start + size]
