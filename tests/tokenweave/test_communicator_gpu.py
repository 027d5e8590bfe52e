"""The schedule on a GPU: the kernel on its own stream beside the other half's compute, a single rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_ext.tokenweave import reference
from sglang_ext.tokenweave.communicator import KernelCommunicator, NormCall
from sglang_ext.tokenweave.fused_sizes import always
from sglang_ext.tokenweave.kernel import virtual_ranks
from sglang_ext.tokenweave.lazy import materialized
from sglang_ext.tokenweave.split import Decision
from sglang_ext.tokenweave.weaver import Weaver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

HIDDEN, LAYERS, MAX_TOKENS = 4096, 6, 1600
EPSILON = 1e-6


class Decoder:
    """Blocks whose rows do not depend on the number of rows, so that halves must give the same bits.

    Products of random size beside the rows' own work keep the streams out of step.
    """

    def __init__(self, weaver: Weaver) -> None:
        generator = torch.Generator(device="cuda").manual_seed(3)
        self.weaver = weaver
        self.weights = torch.randn(4 * LAYERS, HIDDEN, generator=generator, device="cuda").to(torch.bfloat16)
        self.cache = torch.full((LAYERS, MAX_TOKENS, HIDDEN), float("nan"), device="cuda").to(torch.bfloat16)
        self.ballast = torch.randn(2048, 2048, device="cuda").to(torch.bfloat16)

    def norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        def plain(rows: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return reference.add_rmsnorm(rows, kept, weight, EPSILON)

        fused = self.weaver.norm(x, residual, NormCall(weight, EPSILON, 0.0, plain))
        return fused if fused is not None else plain(materialized(x), materialized(residual))

    def __call__(self, x: torch.Tensor, first: int) -> torch.Tensor:
        residual = x
        for layer in range(LAYERS):
            mix, post, project, following = self.weights[4 * layer : 4 * layer + 4]
            for _ in range((layer + first) % 3):
                self.ballast @ self.ballast
            self.cache[layer, first : first + x.shape[0]] = x
            x = torch.tanh(x + self.cache[layer, 0]) * mix  # row 0 belongs to the first half
            x, residual = self.norm(self.weaver.all_reduce(x, lambda tensor: tensor), residual, post)
            x = torch.tanh(x) * project
            x, residual = self.norm(self.weaver.all_reduce(x, lambda tensor: tensor), residual, following)
        return x


@pytest.fixture(scope="module")
def weaver() -> Weaver:
    buffers = virtual_ranks(1, 2 * MAX_TOKENS, HIDDEN, torch.bfloat16)
    return Weaver(
        rank=0,
        world=1,
        hidden=HIDDEN,
        communicator=KernelCommunicator(buffers, MAX_TOKENS, None, ctas=4, fused=always(16), timeout_s=20.0),
        decide=lambda tokens: Decision(tokens, tokens // 2, 0.0, 0.0, "test"),
        save_state=lambda: lambda: None,
    )


@pytest.mark.parametrize("tokens", [2, 777, 1600])
def test_whole_and_halves_equal_stock(weaver: Weaver, tokens: int) -> None:
    for repeat in range(4):
        x = torch.randn(tokens, HIDDEN, device="cuda").to(torch.bfloat16)
        decoder = Decoder(weaver)
        expected = decoder(x.clone(), 0)
        before = weaver.statistics.fused
        whole = weaver.run_whole(tokens, lambda d=decoder, x=x: d(x.clone(), 0))  # type: ignore[misc]
        assert weaver.statistics.fused - before == 2 * LAYERS
        assert torch.equal(whole, expected)
        for cut in sorted({1, tokens // 3 or 1, tokens // 2, tokens - 1}):
            decoder.cache.fill_(float("nan"))
            parts = ((x[:cut].clone(), 0), (x[cut:].clone(), cut))
            halves = [lambda d=decoder, p=part: d(*p) for part in parts]  # type: ignore[misc]
            assert torch.equal(weaver.run_halves(cut, tokens, halves), expected), (repeat, cut)


def test_whole_batches_replay_in_a_graph(weaver: Weaver) -> None:
    decoder = Decoder(weaver)
    x = torch.randn(8, HIDDEN, device="cuda").to(torch.bfloat16)
    weaver.run_whole(8, lambda: decoder(x.clone(), 0))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        output = weaver.run_whole(8, lambda: decoder(x.clone(), 0))
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(output, decoder(x.clone(), 0))


def test_a_batch_beyond_the_buffers_runs_stock(weaver: Weaver) -> None:
    before = weaver.statistics.fused
    assert weaver.cut_for(MAX_TOKENS + 1) is None
    assert weaver.run_whole(MAX_TOKENS + 1, lambda: "stock") == "stock"
    assert weaver.statistics.fused == before
