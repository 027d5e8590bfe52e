"""Which operator is blamed for a difference, from the digests of two computations of the same positions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_ext.doctor.comparison import BETWEEN, WHOLE_PASS, Comparison
from sglang_ext.doctor.operators import ALL_REDUCE, Event
from sglang_ext.doctor.probes import PROBE, Placement, ProbeRequest, Trial

ROWS = 4
TRIAL = Trial("test", (ProbeRequest(PROBE),), ((Placement(0, 0, ROWS),),))
SAME = torch.arange(ROWS)
#: Another digest in the last row.
CHANGED = torch.tensor([0, 1, 2, 99])


def _layer(
    inputs: torch.Tensor = SAME,
    own: torch.Tensor = SAME,
    combined: torch.Tensor = SAME,
    result: torch.Tensor = SAME,
    following: torch.Tensor = SAME,
) -> list[Event]:
    """An all-reduce inside of a linear layer, and a norm behind it.

    Args:
        inputs: of the linear layer.
        own, combined: inputs of the all-reduce on this rank, and on all ranks.
        result: of the all-reduce.
        following: inputs of the norm.
    """
    reduced = Event(ALL_REDUCE, "after o_proj", combined, result)
    reduced.own_inputs = own
    linear = Event("linear o_proj", "o_proj", inputs, result, nested=[0])
    return [reduced, linear, Event("norm", "norm", following, following)]


def _faulty(second: Callable[[], list[Event]]) -> str | None:
    comparison = Comparison(ROWS, ROWS)
    comparison.add_pass(TRIAL, TRIAL.passes[0], SAME, _layer(), {})
    comparison.add_pass(TRIAL, TRIAL.passes[0], CHANGED, second(), {})
    return comparison.faulty()


def test_operator_that_changes_its_output_is_blamed() -> None:
    assert _faulty(lambda: _layer(own=CHANGED, combined=CHANGED, result=CHANGED)) == "linear o_proj"
    assert _faulty(lambda: _layer(result=CHANGED)) == ALL_REDUCE
    assert _faulty(lambda: _layer(following=CHANGED)) == BETWEEN


def test_what_another_rank_put_in_is_blamed_there() -> None:
    """This rank says only that its logits changed; the linear layer holds the all-reduce."""
    changed = {"combined": CHANGED, "result": CHANGED, "following": CHANGED}
    assert _faulty(lambda: _layer(**changed)) == WHOLE_PASS
    assert _faulty(lambda: _layer(own=CHANGED, **changed)) == "linear o_proj"
