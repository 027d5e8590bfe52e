"""Two halves by turns on one thread."""

from __future__ import annotations

import contextvars
from collections.abc import Callable

import pytest

from sglang_ext.tokenweave.interleave import Interleaver

_variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="caller")


class State:
    """A global as SGLang has them."""

    value = "caller"

    @classmethod
    def save(cls) -> Callable[[], None]:
        saved = cls.value
        return lambda: setattr(cls, "value", saved)


@pytest.fixture(autouse=True)
def _reset() -> None:
    State.value = "caller"


def _half(name: str, turns: int, log: list[str], interleaver: Interleaver) -> Callable[[], str]:
    def run() -> str:
        State.value = name
        _variable.set(name)
        for turn in range(turns):
            log.append(f"{name}{turn}")
            interleaver.give_turn()
            assert State.value == name and _variable.get() == name
        return name.upper()

    return run


def test_halves_alternate_and_keep_their_state() -> None:
    log: list[str] = []
    interleaver = Interleaver(State.save)
    results = interleaver.run([_half("a", 3, log, interleaver), _half("b", 3, log, interleaver)])
    assert results == ["A", "B"]
    assert log == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert State.value == "caller" and _variable.get() == "caller"


def test_halves_may_differ_in_turns() -> None:
    log: list[str] = []
    interleaver = Interleaver(State.save)
    assert interleaver.run([_half("a", 0, log, interleaver), _half("b", 2, log, interleaver)]) == ["A", "B"]
    assert log == ["b0", "b1"]


def test_an_error_in_one_half_ends_the_other_and_restores_the_caller() -> None:
    interleaver = Interleaver(State.save)
    ended = []

    def waits() -> None:
        State.value = "waiting"
        try:
            interleaver.give_turn()
        finally:
            ended.append(True)

    def fails() -> None:
        State.value = "failing"
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        interleaver.run([waits, fails])
    assert ended == [True] and State.value == "caller"
