"""Tensors that stand for work not done yet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_ext.tokenweave.lazy import (
    PendingAllReduce,
    ShardedResidual,
    materialized,
    pending_all_reduce,
    plain,
    sharded_residual,
)


class CountedReduce:
    """Stands for an all-reduce of two equal ranks, out of place as on CUDA."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, partial: torch.Tensor) -> torch.Tensor:
        assert type(partial) is torch.Tensor
        self.calls += 1
        return partial * 2


@pytest.fixture
def reduce() -> CountedReduce:
    return CountedReduce()


@pytest.fixture
def pending(reduce: CountedReduce) -> PendingAllReduce:
    return pending_all_reduce(torch.arange(12.0).view(3, 4), reduce)


def test_metadata_asks_for_no_values(pending: PendingAllReduce, reduce: CountedReduce) -> None:
    assert pending.shape == (3, 4) and pending.size(1) == 4 and pending.dim() == 2 and len(pending) == 3
    assert pending.dtype is torch.float32 and pending.device.type == "cpu" and pending.is_contiguous()
    assert pending.numel() == 12 and not pending.is_cuda and pending.stride() == (4, 1)
    assert reduce.calls == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: x[:2],
        lambda x: torch.cat([x, x]),
        lambda x: x.to(torch.float64),
        lambda x: torch.nn.functional.linear(x, torch.ones(5, 4)),
        lambda x: x.clone(),
        lambda x: x.data,
        lambda x: x.t(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.view(4, 3),
        lambda x: torch.ops.aten.mul.Tensor(x, 3),
        lambda x: torch.add(input=x, other=x),
        lambda x: x.__dlpack__(),
        lambda x: torch.from_dlpack(x),
    ],
)
def test_any_use_of_the_values_reduces_first(
    use: Callable[[torch.Tensor], object], pending: PendingAllReduce, reduce: CountedReduce
) -> None:
    expected = use(torch.arange(12.0).view(3, 4) * 2)
    got = use(pending)
    assert reduce.calls == 1
    assert not isinstance(got, PendingAllReduce)
    if isinstance(got, torch.Tensor):
        assert isinstance(expected, torch.Tensor) and torch.equal(got, expected)
    elif isinstance(got, list):
        assert got == expected


def test_pointer_is_that_of_the_sum(pending: PendingAllReduce, reduce: CountedReduce) -> None:
    assert pending.data_ptr() != plain(pending).data_ptr()
    assert pending.data_ptr() == pending.materialize().data_ptr()
    assert reduce.calls == 1


def test_views_of_whole_rows_stay_pending_and_share_the_reduction(
    pending: PendingAllReduce, reduce: CountedReduce
) -> None:
    view = pending.view(-1, 4).reshape(1, 3, 4)
    assert isinstance(view, PendingAllReduce) and reduce.calls == 0
    assert torch.equal(view + 0, torch.arange(12.0).view(1, 3, 4) * 2)
    assert torch.equal(pending + 0, torch.arange(12.0).view(3, 4) * 2)
    assert reduce.calls == 1


def test_in_place_changes_reach_the_sum(pending: PendingAllReduce) -> None:
    pending.add_(1)
    assert torch.equal(pending + 0, torch.arange(12.0).view(3, 4) * 2 + 1)


def test_taken_sums_are_not_reduced_again(pending: PendingAllReduce, reduce: CountedReduce) -> None:
    partial = pending.take_partial()
    assert partial is not None and type(partial) is torch.Tensor
    assert torch.equal(partial, torch.arange(12.0).view(3, 4))
    assert pending.take_partial() is None and reduce.calls == 0
    with pytest.raises(RuntimeError, match="reads the output of an all-reduce again"):
        pending + 1


def test_reduced_sums_are_not_taken(pending: PendingAllReduce) -> None:
    pending + 1
    assert pending.take_partial() is None


def test_residual_is_gathered_for_whoever_needs_all_rows() -> None:
    whole = torch.full((4, 2), float("nan"))
    whole[1:3] = 5.0
    calls = []

    def gather(rows: torch.Tensor, tokens: int) -> torch.Tensor:
        calls.append(tokens)
        assert torch.equal(rows, torch.full((2, 2), 5.0))
        return torch.full((tokens, 2), 5.0)

    residual = sharded_residual(whole, slice(1, 3), gather)
    assert residual.shape == (4, 2) and not calls
    residual.shard.add_(0)
    assert not calls
    assert torch.equal(torch.ones(4, 2) + residual, torch.full((4, 2), 6.0))
    assert calls == [4]
    assert isinstance(residual, ShardedResidual)


def test_materialized_reaches_into_containers(pending: PendingAllReduce, reduce: CountedReduce) -> None:
    made = materialized(({"x": [pending]}, 3, None))
    assert type(made[0]["x"][0]) is torch.Tensor and made[1:] == (3, None) and reduce.calls == 1


def test_an_observer_brings_nothing_about(pending: PendingAllReduce, reduce: CountedReduce) -> None:
    partial = torch.arange(12.0).view(3, 4)
    assert torch.equal(pending.observed(), partial)
    assert reduce.calls == 0 and not pending.reduction.done
    assert torch.equal(pending.materialize(), partial * 2)
    assert pending.reduction.done and torch.equal(pending.observed(), partial * 2)


def test_a_watched_all_reduce_runs_through_the_watcher(
    pending: PendingAllReduce, reduce: CountedReduce
) -> None:
    seen = []

    def around(all_reduce: Callable[[torch.Tensor], torch.Tensor], partial: torch.Tensor) -> torch.Tensor:
        seen.append(partial.shape)
        return all_reduce(partial)

    pending.reduction.watch(around)
    assert seen == []
    pending.materialize()
    pending.materialize()
    assert seen == [(3, 4)] and reduce.calls == 1
