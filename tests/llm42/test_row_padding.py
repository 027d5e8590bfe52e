"""Products of few rows, padded to the number of rows at which a library gives them the full pass's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from sglang_ext.llm42.row_padding import RowPadding, find_padding

INPUTS, FULL = 48, 512


def split_below(rows: int, monkeypatch: pytest.MonkeyPatch, computed: list[int]) -> None:
    """Let products of fewer than ``rows`` rows be summed in two parts, as cuBLAS does with split-K."""

    def apply(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        computed.append(len(x))
        if len(x) >= rows or not layer.splits:
            return (x[:, :, None] * layer.weight.T).sum(1)
        half = INPUTS // 2
        parts = [
            (x[:, part, None] * layer.weight.T[part]).sum(1) for part in (slice(half), slice(half, None))
        ]
        return parts[0] + parts[1]

    monkeypatch.setattr(UnquantizedLinearMethod, "apply", apply)


def model() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict()
    for name, outputs, splits in (("split", 8, True), ("twin", 8, True), ("whole", 4, False)):
        layer: Any = torch.nn.Linear(INPUTS, outputs, bias=False)
        layer.quant_method, layer.splits = UnquantizedLinearMethod(), splits
        layers[name] = layer
    layers["norm"] = torch.nn.LayerNorm(INPUTS)
    return layers


@pytest.mark.parametrize(
    ("rows", "threshold", "padded"), [(256, 300, 320), (100, 300, 320), (100, 128, 128), (256, 500, 512)]
)
def test_rows_of_the_full_pass(
    rows: int, threshold: int, padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_below(threshold, monkeypatch, [])
    layers = model()
    padding = find_padding(layers, rows, FULL)
    assert padding.rows == {layers["split"]: padded, layers["twin"]: padded}
    x = torch.randn(FULL, INPUTS)
    split: Any = layers["split"]
    wanted = split.quant_method.apply(split, x)[:rows]
    assert not torch.equal(split.quant_method.apply(split, x[:rows]), wanted)
    with padding.applied():
        assert torch.equal(split.quant_method.apply(split, x[:rows]), wanted)


def test_one_layer_of_a_shape_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    split_below(0, monkeypatch, computed)
    assert find_padding(model(), 64, FULL).rows == {}
    assert computed == [FULL, 64] * 2


def test_products_are_tried_with_the_bias_that_they_add(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def apply(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(bias)
        return x @ layer.weight.T

    monkeypatch.setattr(UnquantizedLinearMethod, "apply", apply)
    layers = model()
    bias = torch.nn.Parameter(torch.ones(8))
    layers["twin"].bias = bias
    find_padding(layers, 64, FULL)
    assert [each is bias for each in seen] == [False, False, True, True, False, False]


def test_a_full_pass_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    split_below(10_000, monkeypatch, computed)
    assert find_padding(model(), FULL, FULL).rows == {}
    assert computed == []


def test_methods_are_put_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model()
    layer: Any = layers["split"]
    before = layer.quant_method
    with pytest.raises(RuntimeError, match="in the middle"), RowPadding([(layer, 128)]).applied():
        assert layer.quant_method is not before
        # SGLang looks for more than apply, such as apply_into.
        assert layer.quant_method.create_weights == before.create_weights
        raise RuntimeError("in the middle")
    assert layer.quant_method is before
