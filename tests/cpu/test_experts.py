"""Experts of canonical passes: what SGLang's compute, with the same bits for a row wherever it stands."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native as hooked
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.runtime_context import get_context

from sglang_ext.cpu import experts, platform
from sglang_ext.llm42.canonical_scope import canonical_scope

#: SGLang's function, also where our hook is in place in this process.
stock = getattr(hooked, "__wrapped__", hooked)

HIDDEN, INTERMEDIATE = 64, 96

Experts = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def arguments_of_a_server() -> Iterator[None]:
    """SGLang's activations look at the server's arguments."""
    with get_context().override_server_args():
        yield


def layer_of(number: int, dtype: torch.dtype, seed: int = 0) -> Any:
    """What the functions read of an expert layer; ``intermediate`` is this rank's part."""
    generator = torch.Generator().manual_seed(seed)
    return types.SimpleNamespace(
        num_experts=number,
        w13_weight=torch.randn(number, 2 * INTERMEDIATE, HIDDEN, generator=generator).to(dtype) / 8,
        w2_weight=torch.randn(number, HIDDEN, INTERMEDIATE, generator=generator).to(dtype) / 8,
    )


def routed(rows: int, number: int, top_k: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, Any]:
    """Random rows and their choice of experts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    weights, ids = torch.randn(rows, number, generator=generator).softmax(-1).topk(top_k)
    return x, StandardTopKOutput(weights, ids, None)


def invariant(layer: Any, x: torch.Tensor, choice: Any, config: Any) -> torch.Tensor:
    return experts.invariant_experts(stock, layer, x, choice, config)


def part(choice: Any, rows: Any) -> Any:
    return StandardTopKOutput(choice.topk_weights[rows], choice.topk_ids[rows], None)


def differing_rows(function: Experts, dtype: torch.dtype, number: int, top_k: int, seed: int) -> int:
    """Rows of a pass of 40 whose bits change when they are computed with fewer rows or in another order."""
    layer, config = layer_of(number, dtype), MoeRunnerConfig(activation="silu")
    x, choice = routed(40, number, top_k, dtype, seed)
    whole = function(layer, x, choice, config)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    differing = 0
    for rows in (order, order[:1], order[1:4], order[4:21], order[21:]):
        again = function(layer, x[rows], part(choice, rows), config)
        differing += int((again != whole[rows]).any(1).sum())
    return differing


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([(4, 2), (8, 2), (16, 8), (60, 4), (1, 1)]),
    st.integers(0, 10_000),
)
def test_rows_do_not_depend_on_each_other(dtype: torch.dtype, shape: tuple[int, int], seed: int) -> None:
    assert differing_rows(invariant, dtype, *shape, seed) == 0


def test_rows_of_sglangs_experts_do() -> None:
    """Else the test above could not fail."""
    assert differing_rows(stock, torch.float32, 8, 2, seed=0) > 0


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_same_result_as_sglangs_up_to_rounding(activation: str, rows: int) -> None:
    layer, config = layer_of(8, torch.float32), MoeRunnerConfig(activation=activation)
    x, choice = routed(rows, 8, 2, torch.float32, seed=rows)
    expected = stock(layer, x, choice, config)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(invariant(layer, x, choice, config), expected, rtol=1e-5, atol=1e-5)


def test_biases_are_added() -> None:
    layer = layer_of(4, torch.bfloat16)
    layer.w13_weight_bias = torch.randn(4, 2 * INTERMEDIATE)
    layer.w2_weight_bias = torch.randn(4, HIDDEN)
    config = MoeRunnerConfig(activation="silu")
    x, choice = routed(50, 4, 2, torch.bfloat16, seed=1)
    expected = stock(layer, x, choice, config)
    torch.testing.assert_close(invariant(layer, x, choice, config), expected, rtol=0.02, atol=0.02)


def test_poisoned_rows_stay_alone() -> None:
    layer, config = layer_of(4, torch.bfloat16), MoeRunnerConfig(activation="silu")
    x, choice = routed(20, 4, 2, torch.bfloat16, seed=2)
    clean = invariant(layer, x, choice, config)
    x[7] = float("nan")
    poisoned = invariant(layer, x, choice, config)
    others = [row for row in range(20) if row != 7]
    assert torch.equal(poisoned[others], clean[others]) and poisoned[7].isnan().all()


def test_every_product_has_the_same_rows() -> None:
    """However the rows are spread over the experts: all to one, and evenly."""
    seen: list[int] = []

    def watched(layer: Any, x: torch.Tensor, choice: Any, config: Any) -> torch.Tensor:
        seen.extend(choice.topk_ids.unique(return_counts=True)[1].tolist())
        return stock(layer, x, choice, config)

    layer, config = layer_of(8, torch.bfloat16), MoeRunnerConfig(activation="silu")
    x, even = routed(40, 8, 2, torch.bfloat16, seed=3)
    lopsided = StandardTopKOutput(even.topk_weights, torch.tensor([[5, 1]]).expand(40, 2), None)
    for choice in (even, lopsided):
        experts.invariant_experts(watched, layer, x, choice, config)
    assert len(seen) > 10 and set(seen) == {experts.BLOCK}


def test_in_canonical_passes_only() -> None:
    layer, config = layer_of(8, torch.float32), MoeRunnerConfig(activation="silu")
    x, choice = routed(3, 8, 2, torch.float32, seed=4)
    arguments = (layer, x, choice, config)
    calls: list[int] = []

    def original(layer: Any, x: torch.Tensor, choice: Any, config: Any) -> torch.Tensor:
        calls.append(len(x))
        return stock(layer, x, choice, config)

    assert torch.equal(experts.moe_forward(original, *arguments), stock(*arguments))
    assert calls == [3]
    with canonical_scope():
        inside = experts.moe_forward(original, *arguments)
    assert torch.equal(inside, invariant(*arguments))
    assert all(rows % experts.BLOCK == 0 for rows in calls[1:]) and len(calls) > 1


def test_padding_of_expert_weights_is_zero() -> None:
    layer = layer_of(4, torch.bfloat16)
    layer.w13_weight[:, 5] = float("nan")
    platform.zero_expert_weights(None, object(), layer=layer, num_experts=4)
    assert not layer.w13_weight.any() and not layer.w2_weight.any()
