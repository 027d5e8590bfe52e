"""All-reduces of canonical passes between GPUs: the order of summation, and when it is ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext.llm42 import collectives
from sglang_ext.llm42.canonical_scope import canonical_scope

WORLD, ROWS, HIDDEN = 4, 6, 256


def _partials(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(WORLD, ROWS, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ranks_are_added_in_order_and_rounded_once(dtype: torch.dtype) -> None:
    partials = _partials(dtype)

    def all_gather(output: torch.Tensor, mine: torch.Tensor) -> None:
        assert torch.equal(mine, partials[2])
        output.copy_(partials.view(output.shape))

    result = collectives.sum_in_rank_order(partials[2], WORLD, all_gather)
    expected = ((partials[0].float() + partials[1].float()) + partials[2].float()) + partials[3].float()
    assert result.dtype is dtype and torch.equal(result, expected.to(dtype))
    backwards = ((partials[3].float() + partials[2].float()) + partials[1].float()) + partials[0].float()
    if dtype is torch.float32:
        assert not torch.equal(result, backwards), "the order does not show in these numbers"


class _Gpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def _coordinator(world: int) -> Any:
    def all_gather(output: torch.Tensor, mine: torch.Tensor) -> None:
        output.copy_(mine.repeat(world, 1))

    return SimpleNamespace(world_size=world, all_gather_into_tensor=all_gather)


def _reduced(world: int, canonical: bool, gpu: bool) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    calls: list[str] = []
    tensor = torch.ones(2, 3)
    if gpu:
        tensor = tensor.as_subclass(_Gpu)

    def out_place(coordinator: Any, tensor: torch.Tensor, method: str) -> torch.Tensor:
        calls.append(method)
        return tensor * 10

    def in_place(coordinator: Any, tensor: torch.Tensor) -> None:
        calls.append("in place")
        tensor *= 10

    def run() -> torch.Tensor:
        out = collectives.all_reduce_out_place(out_place, _coordinator(world), tensor, "ca")
        collectives.all_reduce_in_place(in_place, _coordinator(world), tensor)
        return out

    if not canonical:
        return calls, run(), tensor
    with canonical_scope():
        return calls, run(), tensor


def test_canonical_passes_of_three_ranks_and_more_use_the_ordered_sum() -> None:
    calls, out, tensor = _reduced(world=3, canonical=True, gpu=True)
    assert calls == []
    assert out.unique().tolist() == tensor.unique().tolist() == [3.0]


@pytest.mark.parametrize(("world", "canonical", "gpu"), [(3, False, True), (2, True, True), (3, True, False)])
def test_others_use_sglangs(world: int, canonical: bool, gpu: bool) -> None:
    calls, out, tensor = _reduced(world, canonical, gpu)
    assert calls == ["ca", "in place"]
    assert out.unique().tolist() == tensor.unique().tolist() == [10.0]


def test_canonical_passes_do_not_fuse() -> None:
    assert collectives.fused_all_reduce(lambda rows: rows > 0, 1)
    assert not collectives.fused_all_reduce(lambda rows: rows > 0, 0)
    with canonical_scope():
        assert not collectives.fused_all_reduce(lambda rows: rows > 0, 1)
