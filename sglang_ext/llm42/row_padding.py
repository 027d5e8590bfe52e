"""Rows that products of small canonical passes are padded to, so that they have the full pass's bits.

A library sums a matrix product over its inner dimension in an order that hangs on the product's shape: cuBLAS
splits a long one among thread blocks where few rows would leave multiprocessors idle. On an H200, of the
products of Llama-3.1-8B with 256 rows only the MLP's last one has other bits than with 1,024; with 320 rows
all are equal. Padding that one product is cheaper than a larger pass. What is found here on random numbers is
a guess; whether a pass's bits are those of the full one, the certification decides.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: Numbers of rows between that of a pass and that of the full one are tried in such steps.
STEP = 64


class RowPadding:
    """Pads some of a model's linear layers while a pass runs.

    Args:
        layers: each with the number of rows to compute.
    """

    def __init__(self, layers: Sequence[tuple[Any, int]] = ()) -> None:
        self._layers = [(layer, _Padded(layer.quant_method, rows)) for layer, rows in layers]

    @property
    def rows(self) -> dict[torch.nn.Module, int]:
        """Rows that each padded layer computes."""
        return {layer: padded.rows for layer, padded in self._layers}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside of the context these layers compute padded products."""
        for layer, padded in self._layers:
            layer.quant_method = padded
        try:
            yield
        finally:
            for layer, padded in self._layers:
                layer.quant_method = padded.method


class _Padded:
    """SGLang's method of a linear layer, on padded rows."""

    def __init__(self, method: Any, rows: int) -> None:
        self.method = method
        self.rows = rows

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product of ``x``, ``[rows, inputs]``."""
        missing = max(0, self.rows - len(x))
        output: torch.Tensor = self.method.apply(layer, torch.nn.functional.pad(x, (0, 0, 0, missing)), bias)
        return output[: len(x)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)


@torch.no_grad()
def find_padding(model: torch.nn.Module, rows: int, full: int) -> RowPadding:
    """The padding with which products of ``rows`` rows have the bits that they have among ``full`` rows.

    Only linear layers that are not quantized are looked at, one of each shape.
    """
    if rows >= full:
        return RowPadding()
    needed: dict[tuple[Any, ...], int] = {}
    padded = []
    for layer in _linear_layers(model):
        kind = (tuple(layer.weight.shape), layer.weight.dtype, _bias(layer) is not None)
        if kind not in needed:
            needed[kind] = _rows_needed(layer, rows, full)
            if needed[kind] > rows:
                shape = "x".join(map(str, kind[0]))
                logger.debug("Products with %s weights: %d rows instead of %d", shape, needed[kind], rows)
        if needed[kind] > rows:
            padded.append((layer, needed[kind]))
    return RowPadding(padded)


def _linear_layers(model: torch.nn.Module) -> Iterator[Any]:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        # Weights that SGLang packed for AMX do not have the product's shape.
        packed = getattr(layer, "use_intel_amx_backend", False)
        if type(method) is UnquantizedLinearMethod and not packed:
            yield layer


def _rows_needed(layer: Any, rows: int, full: int) -> int:
    """The smallest number of rows with which the first ``rows`` have the bits of a product of ``full``."""
    weight = layer.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(full, weight.shape[1], dtype=weight.dtype, device=weight.device, generator=generator)
    bias = _bias(layer)
    wanted = layer.quant_method.apply(layer, x, bias)[:rows]
    for count in (rows, *range(rows // STEP * STEP + STEP, full, STEP)):
        if torch.equal(layer.quant_method.apply(layer, x[:count], bias)[:rows], wanted):
            return count
    return full


def _bias(layer: Any) -> torch.Tensor | None:
    """What the layer's product adds itself: a library may choose another kernel with it."""
    return None if getattr(layer, "skip_bias_add", False) else getattr(layer, "bias", None)
