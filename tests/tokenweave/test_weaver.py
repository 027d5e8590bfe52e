"""The schedule over a small decoder in a gloo group of two ranks, without SGLang.

The decoder is written as SGLang's models are (all-reduce behind both blocks, norms with residual); its
outputs must equal the unsplit, unfused ones bit for bit for every cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_ext.tokenweave import reference
from sglang_ext.tokenweave.collective import gather_rows
from sglang_ext.tokenweave.communicator import CollectiveCommunicator, NormCall
from sglang_ext.tokenweave.lazy import materialized
from sglang_ext.tokenweave.split import Decision
from sglang_ext.tokenweave.weaver import Weaver

HIDDEN, LAYERS, TOKENS, WORLD = 64, 3, 11, 2
EPSILON = 1e-6


class Norm:
    """RMSNorm whose residual form may be fused."""

    def __init__(self, weaver: Weaver, generator: torch.Generator) -> None:
        self.weaver = weaver
        self.weight = torch.randn(HIDDEN, generator=generator).to(torch.bfloat16)

    def plain(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.add_rmsnorm(x, residual, self.weight, EPSILON)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        call = NormCall(self.weight, EPSILON, 0.0, self.plain)
        fused = self.weaver.norm(x, residual, call)
        return fused if fused is not None else self.plain(materialized(x), materialized(residual))


class Decoder:
    """Layers of (attention-like mix of the rows so far) and MLP, each followed by an all-reduce.

    The "KV cache" is filled in row order, so that a second half sees the first half's rows of its layer.
    """

    def __init__(self, weaver: Weaver, rank: int, scaled: bool, captures: bool) -> None:
        generator = torch.Generator().manual_seed(5)

        def weight() -> torch.Tensor:
            shards = torch.randn(WORLD, HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
            return shards[rank].to(torch.bfloat16)

        self.weaver, self.scaled, self.captures = weaver, scaled, captures
        self.blocks = [
            (weight(), Norm(weaver, generator), weight(), Norm(weaver, generator)) for _ in range(LAYERS)
        ]
        self.cache: list[torch.Tensor] = [
            torch.full((TOKENS, HIDDEN), float("nan")).bfloat16() for _ in range(LAYERS)
        ]

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(tensor)
            return tensor

        reduced = self.weaver.all_reduce(partial, all_reduce)
        return reduced * 0.5 if self.scaled else reduced

    def __call__(self, x: torch.Tensor, first: int) -> Any:
        captured = []
        residual = self.reduce(x / WORLD) + 0  # an embedding whose sum is used at once
        x = residual
        for layer, (mix, post_norm, project, next_norm) in enumerate(self.blocks):
            self.cache[layer][first : first + x.shape[0]] = materialized(x)
            seen = torch.stack(
                [self.cache[layer][: first + row + 1].float().mean(0) for row in range(x.shape[0])]
            )
            x, residual = post_norm(self.reduce(seen.to(torch.bfloat16) @ mix), residual)
            x = torch.tanh(x) @ project
            if self.captures and layer == 1:
                captured.append(self.reduce(x.clone()) + residual)
            x, residual = next_norm(self.reduce(x), residual)
        return (x, captured) if self.captures else x


def _weaver(rank: int) -> Weaver:
    group = dist.group.WORLD
    assert group is not None
    return Weaver(
        rank=rank,
        world=WORLD,
        hidden=HIDDEN,
        communicator=CollectiveCommunicator(group, torch.device("cpu")),
        decide=lambda tokens: Decision(tokens, tokens // 2, 0.0, 0.0, "test"),
        save_state=lambda: lambda: None,
        poison_residual=True,
    )


def _rank(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    inputs = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    results: dict[str, Any] = {}

    def flat(output: Any) -> list[torch.Tensor]:
        return [output[0], *output[1]] if isinstance(output, tuple) else [output]

    for name, scaled, captures in (
        ("fusable", False, False),
        ("scaled", True, False),
        ("captures", False, True),
    ):
        stock = Decoder(_weaver(rank), rank, scaled, captures)
        expected = flat(stock(inputs.clone(), 0))
        assert stock.weaver.statistics.fused == 0

        weaver = _weaver(rank)
        whole = Decoder(weaver, rank, scaled, captures)
        assert weaver.cut_for(TOKENS) is None  # nothing is cut before a whole batch was observed
        outputs = {0: flat(weaver.run_whole(TOKENS, lambda d=whole: d(inputs.clone(), 0)))}  # type: ignore[misc]
        observed = weaver.statistics.fused
        for cut in range(1, TOKENS):
            with weaver.cut_at(cut):
                chosen = weaver.cut_for(TOKENS)
            if chosen is None:
                continue
            decoder = Decoder(weaver, rank, scaled, captures)
            pieces = ((inputs[:cut].clone(), 0), (inputs[cut:].clone(), cut))
            halves = [lambda d=decoder, p=piece: d(*p) for piece in pieces]  # type: ignore[misc]
            outputs[cut] = flat(weaver.run_halves(cut, TOKENS, halves))
        results[name] = (expected, outputs, observed, vars(weaver.statistics), weaver.stock_reason)
    # Where the fused step does not pay, it is done once, to see whether the model has norms to fuse.
    unfused = _weaver(rank)
    unfused.fuse_whole = lambda tokens: False
    decoder, counts = Decoder(unfused, rank, False, False), []
    for _ in range(3):
        unfused.run_whole(TOKENS, lambda: decoder(inputs.clone(), 0))
        counts.append(unfused.statistics.fused)
    results["unfused"] = counts
    # Uneven rows gather right, too: the residual's way to a consumer of all rows.
    group = dist.group.WORLD
    assert group is not None
    results["gathered"] = gather_rows(torch.full((2 - rank, 3), float(rank)), 3, group)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("weaver")
    mp.start_processes(_rank, (str(folder / "store"), str(folder)), nprocs=WORLD, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_every_cut_equals_stock(results: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        expected, outputs, observed, statistics, stock_reason = results[rank]["fusable"]
        assert sorted(outputs) == list(range(TOKENS)) and stock_reason is None
        for cut, output in outputs.items():
            assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True)), f"cut at {cut}"
        assert observed == 2 * LAYERS
        assert statistics["fused"] == 2 * LAYERS * (1 + 2 * (TOKENS - 1))
        assert statistics["woven"] == TOKENS - 1 and statistics["gathered"] == 0


def test_a_consumer_of_the_whole_residual_gets_it(results: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        expected, outputs, _, statistics, _ = results[rank]["captures"]
        assert len(expected) == 2 and sorted(outputs) == list(range(TOKENS))
        for cut, output in outputs.items():
            assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True)), f"cut at {cut}"
        assert statistics["gathered"] == 1 + 2 * (TOKENS - 1)


def test_a_model_without_fusable_norms_runs_stock(results: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        expected, outputs, observed, statistics, stock_reason = results[rank]["scaled"]
        assert observed == 0 and statistics["woven"] == 0 and list(outputs) == [0]
        assert torch.equal(outputs[0][0], expected[0])
        assert stock_reason is not None and "norm" in stock_reason


def test_where_it_does_not_pay_only_the_first_batch_is_fused(results: list[dict[str, Any]]) -> None:
    for result in results:
        first, *later = result["unfused"]
        assert first > 0 and later == [first, first]


def test_uneven_rows_are_gathered_in_order(results: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        assert results[rank]["gathered"][:, 0].tolist() == [0.0, 0.0, 1.0]
