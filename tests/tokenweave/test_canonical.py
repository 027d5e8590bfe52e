"""Canonical passes in two equal halves: where they are cut, what a half sees, when they are not cut."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sglang_ext.tokenweave.batch import BatchCutError
from sglang_ext.tokenweave.canonical import BLOCK_FIELDS, ROW_FIELDS, HalvedAttention
from sglang_ext.tokenweave.paths import Path
from sglang_ext.tokenweave.runtime import Runtime

SEGMENTS, ROWS = 4, 3


@dataclass
class Batch:
    """The fields of SGLang's batch that a canonical pass fills."""

    batch_size: int = SEGMENTS
    input_ids: torch.Tensor = field(default_factory=lambda: torch.arange(SEGMENTS * ROWS))
    positions: torch.Tensor = field(default_factory=lambda: torch.arange(SEGMENTS * ROWS) + 100)
    out_cache_loc: torch.Tensor = field(default_factory=lambda: torch.arange(SEGMENTS * ROWS) + 200)
    req_pool_indices: torch.Tensor = field(default_factory=lambda: torch.arange(SEGMENTS))
    rids: list[str] = field(default_factory=lambda: [str(number) for number in range(SEGMENTS)])
    seq_lens: torch.Tensor = field(default_factory=lambda: torch.arange(SEGMENTS) + 3)
    seq_lens_cpu: torch.Tensor = field(default_factory=lambda: torch.arange(SEGMENTS) + 3)
    orig_seq_lens: torch.Tensor = field(default_factory=lambda: torch.arange(SEGMENTS) + 3)
    extend_seq_lens: torch.Tensor = field(default_factory=lambda: torch.full((SEGMENTS,), ROWS))
    extend_seq_lens_cpu: list[int] = field(default_factory=lambda: [ROWS] * SEGMENTS)
    extend_prefix_lens: torch.Tensor = field(default_factory=lambda: torch.arange(SEGMENTS))
    extend_prefix_lens_cpu: list[int] = field(default_factory=lambda: list(range(SEGMENTS)))
    seq_lens_sum: int = 18
    extend_num_tokens: int = SEGMENTS * ROWS
    num_token_non_padded_cpu: int = SEGMENTS * ROWS
    lora_ids: torch.Tensor | None = None


class Backend:
    """Keeps the batch that it planned."""

    def __init__(self, segments: int) -> None:
        self.segments = segments
        self.planned: Any = None

    def init_forward_metadata(self, batch: Any) -> None:
        self.planned = batch


def halved() -> HalvedAttention:
    return HalvedAttention(Backend, SEGMENTS, ROWS)


def test_each_half_has_half_of_the_blocks_in_order() -> None:
    attention, batch = halved(), Batch()
    assert attention.cut == 6 and [backend.segments for backend in attention.backends] == [2, 2]
    attention.init_forward_metadata(batch)
    first, second = (backend.planned for backend in attention.backends)
    assert first.input_ids.tolist() == [0, 1, 2, 3, 4, 5] and second.input_ids.tolist() == [
        6,
        7,
        8,
        9,
        10,
        11,
    ]
    assert second.positions.tolist() == [106, 107, 108, 109, 110, 111]
    assert first.extend_prefix_lens_cpu == [0, 1] and second.extend_prefix_lens_cpu == [2, 3]
    assert first.rids == ["0", "1"] and second.rids == ["2", "3"]
    for half, total in ((first, 7), (second, 11)):
        assert (half.batch_size, half.extend_num_tokens, half.num_token_non_padded_cpu) == (2, 6, 6)
        assert half.seq_lens_sum == total
    assert batch.batch_size == SEGMENTS and batch.seq_lens_sum == 18, "the whole stays as it was"


def test_halves_are_views_so_that_a_graph_reads_what_is_copied_in() -> None:
    batch = Batch()
    first, second = halved().cut_batch(batch)
    for name in (*ROW_FIELDS, *BLOCK_FIELDS):
        whole = getattr(batch, name)
        if isinstance(whole, torch.Tensor):
            whole += 1000
            assert torch.equal(torch.cat((getattr(first, name), getattr(second, name))), whole)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="no equal halves"):
        HalvedAttention(Backend, 3, ROWS)
    with pytest.raises(BatchCutError, match="not one of 2 and 6"):
        halved().cut_batch(halved().cut_batch(Batch())[0])
    with pytest.raises(BatchCutError, match="lora_ids"):
        halved().cut_batch(Batch(lora_ids=torch.zeros(SEGMENTS)))


def runtime(split: str = "equal", stock_reason: str | None = None, fits: bool = True) -> Runtime:
    communicator = SimpleNamespace(fits=lambda tokens: fits)
    weaver = SimpleNamespace(observed=True, stock_reason=stock_reason, communicator=communicator)
    return Runtime(cast("Any", weaver), None, Path.COLLECTIVE, split)


@pytest.mark.parametrize(
    ("started", "segments", "reason"),
    [
        (runtime(), 8, None),
        (runtime(), 2, None),
        (runtime(), 7, "7 segments have no equal halves"),
        (runtime(split="never"), 8, "--tokenweave-canonical-split never"),
        (runtime(stock_reason="no norms"), 8, "no norms"),
        (runtime(fits=False), 8, "128 rows do not fit the buffers"),
    ],
)
def test_why_passes_run_whole(started: Runtime, segments: int, reason: str | None) -> None:
    given = started.why_canonical_whole(segments, 16)
    assert given is None if reason is None else reason in (given or "")


def test_a_stack_that_is_given_embeddings_only_runs_whole() -> None:
    started = runtime()
    started.weaver.run_whole = lambda tokens, call: (tokens, call())  # type: ignore[method-assign]
    started.weaver.cut_for = lambda tokens: None  # type: ignore[method-assign]

    def stack(input_ids: torch.Tensor | None, forward_batch: Any) -> str:
        return "hidden states"

    mode = SimpleNamespace(is_extend=lambda: False, is_mixed=lambda: False)
    batch = SimpleNamespace(input_ids=torch.zeros(5), forward_mode=mode)
    bound = inspect.signature(stack).bind(None, batch)
    assert started.forward(stack, bound) == (5, "hidden states")


def test_nothing_is_fixed_before_a_model_was_observed() -> None:
    started = runtime()
    started.weaver.observed = False  # type: ignore[misc]
    with pytest.raises(AssertionError, match="before it is known"):
        started.why_canonical_whole(8, 16)
