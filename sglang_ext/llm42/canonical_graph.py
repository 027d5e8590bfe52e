"""The canonical pass of a GPU: captured once in a CUDA graph, never run eagerly afterwards.

What a pass reads stands in buffers whose addresses never change. A small eager part fills them (token ids,
positions, KV slots, FlashInfer's plan), then the graph is replayed: the same kernels in the same order, which
no heuristic of a library can change between two passes. The memory pool is the graph's own. SGLang's graphs
share theirs with each other because they never run at the same time; a canonical pass runs beside them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sglang_ext.llm42.canonical_pass import AttentionFactory, CandidateTable, CanonicalPass, PassSegment
from sglang_ext.llm42.pass_sizes import PassSizes, smaller_sizes
from sglang_ext.llm42.row_padding import find_padding
from sglang_ext.tokenweave import runtime as tokenweave

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_ext.llm42.lane import LaneConfig

logger = logging.getLogger(__name__)

#: Tensors of a pass's batch that its kernels may read.
INPUTS = (
    "input_ids",
    "positions",
    "out_cache_loc",
    "req_pool_indices",
    "seq_lens",
    "orig_seq_lens",
    "extend_seq_lens",
    "extend_prefix_lens",
)

#: Eager passes before the capture: kernels are compiled and loaded, libraries have their workspaces.
WARM_UP_PASSES = 2

GIB = 1 << 30


class CaptureError(RuntimeError):
    """The canonical pass could not be captured in a CUDA graph."""


class Replay(NamedTuple):
    """A captured forward, and the logits that each replay overwrites."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class CapturedCanonicalPass:
    """A canonical pass as a CUDA graph, and as a second one with logits of a few chosen rows.

    Args:
        eager: the pass to capture; its attention must keep what it plans at fixed addresses.
        stream: captured on this one, None for one of its own; a graph keeps its priority.
        larger: a captured pass that never runs at the same time: stream, event, memory pool and the memory of
            logits are shared with it.

    Attributes:
        eager: the same pass, operator by operator. For the capture, and for the certification to find which
            operator fails; never for tokens.
        stream: where it was captured, and should run when other work goes on beside it.
        inputs_read: recorded in every run once SGLang's tables and the candidates have been read.
        memory_gib: device memory that the capture took.

    Raises:
        CaptureError: the capture failed, for want of memory or because an operator cannot be captured.
    """

    def __init__(
        self,
        eager: CanonicalPass,
        stream: torch.cuda.Stream | None = None,
        larger: CapturedCanonicalPass | None = None,
    ) -> None:
        self.eager = eager
        self.model_runner = eager.model_runner
        self.segments = eager.segments
        self.rows = eager.rows
        self.block_rows = eager.block_rows
        self.total_rows = eager.total_rows
        self.few_rows = eager.few_rows
        self.device = eager.device
        self.inputs_read: torch.cuda.Event = torch.cuda.Event() if larger is None else larger.inputs_read
        self.memory_gib = 0.0
        self._batch = eager.forward_batch((), CandidateTable(1, self.rows, self.device))
        self._chosen = torch.zeros(self.few_rows, dtype=torch.int64, device=self.device)
        if larger is not None:
            stream = larger.stream
        self.stream: torch.cuda.Stream = own_stream(self.model_runner) if stream is None else stream
        self._logits: torch.Tensor | None = None
        if eager.cut is None:
            self._logits = self._logits_memory() if larger is None else larger._logits
        self._all: Replay = self._capture(None if larger is None else larger._all.graph.pool())
        self._few = self._capture(self._all.graph.pool(), self._chosen) if self.few_rows else None

    @torch.no_grad()
    def run(self, segments: Sequence[PassSegment], candidates: CandidateTable) -> torch.Tensor:
        """As :meth:`CanonicalPass.run`, on the current stream; the logits are overwritten by the next run."""
        self._fill(self.eager.forward_batch(segments, candidates))
        self.inputs_read.record()
        self._all.graph.replay()
        return self._all.logits

    @torch.no_grad()
    def run_few(
        self, segments: Sequence[PassSegment], candidates: CandidateTable, chosen: torch.Tensor
    ) -> torch.Tensor:
        """As :meth:`CanonicalPass.run_few`, on the current stream; the next run overwrites the logits."""
        if self._few is None:
            raise ValueError("this canonical pass computes the logits of all its rows")
        self._fill(self.eager.forward_batch(segments, candidates))
        self._chosen[: len(chosen)].copy_(chosen, non_blocking=True)
        self.inputs_read.record()
        self._few.graph.replay()
        return self._few.logits[: len(chosen)]

    @torch.no_grad()
    def run_rows(self, decode: ForwardBatch, positions: Sequence[int]) -> torch.Tensor:
        """As :meth:`CanonicalPass.run_rows`, on the current stream; the next run overwrites the logits."""
        self._fill(self.eager.batch_of_rows(decode, positions))
        # SGLang's scheduler lets its next changes of these tables wait for this event, or for the whole step.
        read = torch.cuda.Event()
        read.record()
        self.model_runner.war_fastpath_read_done_event = read
        self._all.graph.replay()
        return self._all.logits[: len(positions)]

    def _logits_memory(self) -> torch.Tensor:
        """Memory that SGLang copies logits to, ``[rows, vocabulary]``; that of a graph would stay taken."""
        shape = (self.total_rows, int(self.model_runner.model_config.vocab_size))
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _fill(self, batch: ForwardBatch) -> None:
        """Bring to the graph's addresses what it reads of ``batch``."""
        self.eager.attention.init_forward_metadata(batch)
        for name in INPUTS:
            getattr(self._batch, name).copy_(getattr(batch, name), non_blocking=True)

    @torch.no_grad()
    def _capture(self, pool: Any, chosen: torch.Tensor | None = None) -> Replay:
        from sglang.srt.distributed.parallel_state import graph_capture

        graph = torch.cuda.CUDAGraph()
        if self._logits is not None:
            rows = self.total_rows if chosen is None else len(chosen)
            self._batch.next_token_logits_buffer = self._logits[:rows]
        started = time.perf_counter()
        free, _ = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        try:
            with graph_capture(stream=self.stream):
                self.eager.attention.init_forward_metadata(self._batch)
                for _ in range(WARM_UP_PASSES):
                    self.eager.forward(self._batch, chosen)
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                    logits = self.eager.forward(self._batch, chosen)
            torch.cuda.synchronize()
        except Exception as error:
            raise CaptureError(
                f"--enable-llm42: the canonical pass of {self.segments} segments of {self.rows} rows could "
                f"not be captured in a CUDA graph ({free / GIB:.1f} GiB were free): {type(error).__name__}: "
                f"{error}. If memory ran out, lower --mem-fraction-static or --llm42-verify-batch-size, or "
                "start with --llm42-canonical-decode never."
            ) from error
        taken = (torch.cuda.memory_reserved() - reserved) / GIB
        self.memory_gib += taken
        logger.info(
            "Canonical pass of %d x %d rows%s captured in a CUDA graph: %.2f GiB, %.1f s, %.1f GiB left",
            self.segments,
            self.rows,
            "" if chosen is None else f" with logits of {len(chosen)}",
            taken,
            time.perf_counter() - started,
            torch.cuda.mem_get_info()[0] / GIB,
        )
        return Replay(graph, logits)


def canonical_passes_for(
    model_runner: ModelRunner, config: LaneConfig, attention: AttentionFactory
) -> PassSizes:
    """The canonical passes of a server: CUDA graphs on a GPU.

    Args:
        model_runner: SGLang's model runner, with pools allocated, weights loaded and its own graphs captured.
        config: G, W, rows of a block, and whether there are smaller passes.
        attention: factory of the row-invariant attention backend.

    Raises:
        CaptureError: a capture failed.
    """
    sizes = smaller_sizes(config.verify_batch_size, model_runner.device) if config.smaller_passes else ()
    woven = _woven_sizes(model_runner, config, sizes, attention)
    rows, total = config.window_size, config.window_size * config.verify_batch_size
    full, *smaller = (
        CanonicalPass(
            model_runner,
            size,
            rows,
            attention,
            halves=size in woven,
            padding=None if woven else find_padding(model_runner.model, size * rows, total),
            block_rows=config.block_rows,
        )
        for size in (config.verify_batch_size, *sizes)
    )
    if torch.device(full.device).type != "cuda":
        return PassSizes(full, smaller)
    captured = CapturedCanonicalPass(full)
    return PassSizes(captured, [CapturedCanonicalPass(each, larger=captured) for each in smaller])


def own_stream(model_runner: ModelRunner) -> torch.cuda.Stream:
    """A stream that none of SGLang's forwards or graphs use.

    torch hands out 32 streams in turn, and cuBLAS has a workspace per stream: two graphs that were captured
    on the same one must not run at the same time.
    """
    runners = (getattr(model_runner, f"{phase}_cuda_graph_runner", None) for phase in ("decode", "prefill"))
    streams = [model_runner.forward_stream, *(getattr(runner, "stream", None) for runner in runners)]
    taken = {stream.cuda_stream for stream in streams if stream is not None}
    stream = torch.cuda.Stream()
    while stream.cuda_stream in taken:
        stream = torch.cuda.Stream()
    return stream


def _woven_sizes(
    model_runner: ModelRunner, config: LaneConfig, smaller: Sequence[int], attention: AttentionFactory
) -> set[int]:
    """Numbers of segments whose passes TokenWeave cuts in halves, fixed from here on."""
    started = tokenweave.current()
    if started is None:
        return set()
    full, rows = config.verify_batch_size, config.window_size
    if not started.weaver.observed:
        # Whether this model can be woven shows in its first forward pass: an empty one will do.
        table = CandidateTable(1, rows, model_runner.device)
        CanonicalPass(model_runner, full, rows, attention).run((), table)
    reason = started.why_canonical_whole(full, rows)
    if model_runner.ps.tp_rank == 0:
        how = f"run whole: {reason}" if reason else f"run as two halves of {full * rows // 2} rows"
        logger.info("TokenWeave: canonical passes of %d x %d rows %s", full, rows, how)
    return {size for size in (full, *smaller) if started.why_canonical_whole(size, rows) is None}
