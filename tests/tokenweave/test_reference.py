"""The PyTorch twin of the fused kernel: rounding points, order of additions, row ownership."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.tokenweave import reference
from sglang_ext.tokenweave.rows import owned_rows, rows_per_rank

EPSILON = 1e-5


@given(tokens=st.integers(0, 5000), world=st.integers(1, 16))
def test_every_row_has_one_owner_in_ascending_order(tokens: int, world: int) -> None:
    owned = [owned_rows(tokens, world, rank) for rank in range(world)]
    assert [row for rows in owned for row in range(rows.start, rows.stop)] == list(range(tokens))
    assert max(rows.stop - rows.start for rows in owned) == rows_per_rank(tokens, world)


@given(hidden=st.integers(1, 2048).map(lambda vectors: 8 * vectors))
def test_layout_covers_the_row(hidden: int) -> None:
    layout = reference.row_layout(hidden)
    assert layout.threads % 32 == 0 and layout.threads <= 1024 and layout.vectors in (1, 2)
    assert layout.threads * layout.vectors * 8 >= hidden


@pytest.mark.parametrize("hidden", [0, 4, 1028, 16392])
def test_layout_refuses_what_the_kernel_cannot_hold(hidden: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8 up to 16384"):
        reference.row_layout(hidden)


def test_sum_rounds_once() -> None:
    # 256 + 1 is not a bf16 number: rounding after each addition would lose both ones.
    parts = [torch.full((1, 8), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    assert reference.reduce_in_rank_order(parts).float().eq(258.0).all()


@pytest.mark.parametrize("hidden", [1024, 1032, 5120, 8192, 8200, 16384])
def test_square_sum_adds_every_element_once(hidden: int) -> None:
    rows = torch.arange(1, hidden + 1).remainder(7).float().expand(3, hidden)
    assert reference.square_sum(rows).eq(rows.double().pow(2).sum(-1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_close_to_fp64(dtype: torch.dtype, weight_bias: float, world: int) -> None:
    torch.manual_seed(world)
    tokens, hidden = 13, 1024
    partials = [torch.randn(tokens, hidden).to(dtype) for _ in range(world)]
    residual = torch.randn(tokens, hidden).to(dtype)
    weight = torch.randn(hidden).to(dtype)
    shards = [residual[owned_rows(tokens, world, rank)] for rank in range(world)]
    output, shards = reference.allreduce_rmsnorm(partials, shards, weight, EPSILON, weight_bias)

    total = torch.stack(partials).double().sum(0) + residual.double()
    exact = (
        total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPSILON) * (weight_bias + weight.double())
    )
    # Two roundings to 16 bit (of the sum and of the output) stay under two units in the last place.
    limit = 2 * torch.finfo(dtype).eps
    assert (output.double() - exact).norm() / exact.norm() < limit
    assert (torch.cat(shards).double() - total).norm() / total.norm() < limit


def test_equals_sglang_native_norm_up_to_the_order_of_the_mean() -> None:
    layernorm = pytest.importorskip("sglang.srt.layers.layernorm")
    torch.manual_seed(0)
    x, residual = torch.randn(2, 64, 1024).to(torch.bfloat16)
    norm = layernorm.RMSNorm(1024, eps=EPSILON).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    expected, expected_residual = norm.forward_native(x.clone(), residual.clone())
    output, new_residual = reference.add_rmsnorm(x, residual, norm.weight.data, EPSILON)
    assert torch.equal(new_residual, expected_residual)
    # The mean may differ in its last bits, which moves a rounding now and then by one unit.
    assert (output != expected).float().mean() < 1e-3
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=0)
