"""Recording the operators of passes that run whole and as two halves by turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_ext.doctor.operators import Recorder
from sglang_ext.tokenweave.interleave import Interleaver
from sglang_ext.tokenweave.lazy import PendingAllReduce, pending_all_reduce

ROWS, WIDTH = 8, 4


class Give(torch.nn.Module):
    """Gives the turn to the other half in the middle of its work, as the fused step does."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        partial = x.take_partial() if isinstance(x, PendingAllReduce) else x
        assert partial is not None
        if self._turns.half is not None:
            self._turns.give_turn()
        return partial * 2


class Turns:
    """Which half is running."""

    def __init__(self) -> None:
        self.half: int | None = None
        self._interleaver = Interleaver(self._save)

    def give_turn(self) -> None:
        self._interleaver.give_turn()

    def run(self, model: torch.nn.Module, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        def start(half: int) -> Any:
            def run() -> torch.Tensor:
                self.half = half
                return model(pieces[half])

            return run

        return self._interleaver.run([start(0), start(1)])

    def _save(self) -> Any:
        half = self.half

        def restore() -> None:
            self.half = half

        return restore


class PutOff(torch.nn.Module):
    """An operator whose all-reduce is put off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pending_all_reduce(x + 1, _must_not_run)


def _must_not_run(partial: torch.Tensor) -> torch.Tensor:
    raise AssertionError("to watch a put-off all-reduce must not perform it")


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def model(turns: Turns) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.ReLU(), PutOff(), Give(turns), torch.nn.Tanh(), Give(turns))


@pytest.fixture
def recorder(model: torch.nn.Module, turns: Turns) -> Iterator[Recorder]:
    pytest.importorskip("sglang")
    recorder = Recorder(model, ROWS, running_half=lambda: turns.half)
    with recorder.recording():
        yield recorder


def test_halves_by_turns_are_recorded_as_the_whole_pass(
    model: torch.nn.Module, turns: Turns, recorder: Recorder
) -> None:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    whole_output = model(x)
    whole = recorder.take()
    halves_output = turns.run(model, [x[: ROWS // 2], x[ROWS // 2 :]])
    halves = recorder.take()
    assert torch.equal(torch.cat(halves_output), whole_output) and turns.half is None
    assert [(e.operator, e.path) for e in halves] == [(e.operator, e.path) for e in whole]
    assert [e.operator for e in halves] == ["ReLU", "PutOff", "all-reduce + Give", "Tanh", "Give"]
    assert [e.fused for e in halves] == [e.collective for e in halves] == [False, False, True, False, False]
    for one, other in zip(whole, halves, strict=True):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.outputs, other.outputs)
        assert one.nested == other.nested == []
    assert len(set(whole[0].inputs.tolist())) == ROWS


def test_halves_that_differ_are_no_pass(model: torch.nn.Module, turns: Turns, recorder: Recorder) -> None:
    first, second, *_ = model.children()
    turns.half = 0
    first(torch.zeros(ROWS // 2, WIDTH))
    turns.half = 1
    second(torch.zeros(ROWS // 2, WIDTH))
    turns.half = None
    with pytest.raises(RuntimeError, match="different operators"):
        recorder.take()
