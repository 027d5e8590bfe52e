"""The canonical pass: one model forward whose shape never changes.

Always G segments of W rows, the same kernels, the same number of logit rows. What varies is only which
request's positions stand in which segment; every operator must give a row the same bits wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from sglang_ext.llm42.canonical_scope import canonical_scope
from sglang_ext.llm42.lane import SegmentKind
from sglang_ext.llm42.row_padding import RowPadding
from sglang_ext.llm42.transfer import to_device
from sglang_ext.tokenweave.canonical import HalvedAttention

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

#: Token id of padded rows. Any valid id will do: no row attends to another request's rows.
PADDING_TOKEN = 0


class CanonicalAttention(Protocol):
    """An attention backend whose rows are invariant for G segments of W rows."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the attention of ``forward_batch`` before the layers run."""


AttentionFactory = Callable[["ModelRunner", int, int], CanonicalAttention]


@dataclass(frozen=True)
class PassSegment:
    """One segment as the pass sees it.

    Attributes:
        kind: whether its token ids are known on the host or stand in the candidate table.
        pool_index: the request's row in SGLang's ``req_to_token`` table.
        start: absolute position of the first row.
        token_ids: ids of a prompt segment's rows; for a verification segment the ids come from the table.
        rows: rows in use, 1..W.
    """

    kind: SegmentKind
    pool_index: int
    start: int
    token_ids: Sequence[int]
    rows: int


class CandidateTable:
    """Device table of the last committed token and the candidates of every running request.

    A ring per ``req_pool_idx``, indexed by absolute position: committing tokens moves nothing.

    Args:
        pool_size: rows of SGLang's ``req_to_token`` table.
        capacity: candidates a request may hold.
    """

    def __init__(self, pool_size: int, capacity: int, device: str) -> None:
        self._length = capacity + 2
        self._tokens = torch.zeros(pool_size, self._length, dtype=torch.int64, device=device)

    def read(self, pool_indices: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids at ``positions`` (same shape as the result) of the requests at ``pool_indices``."""
        return self._tokens[pool_indices, positions % self._length]

    def write(self, pool_indices: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Put ``token_ids`` at ``positions``; the (request, position) pairs must differ."""
        self._tokens[pool_indices, positions % self._length] = token_ids.to(torch.int64)


class CanonicalPass:
    """Builds and runs canonical passes of one fixed shape.

    Args:
        model_runner: SGLang's model runner, with pools allocated and weights loaded.
        segments: G.
        rows: W, of each segment.
        attention: factory of the row-invariant attention backend.
        halves: whether TokenWeave runs the pass as two equal halves.
        padding: products of more rows than the pass has.

    Attributes:
        cut: rows of the first half, None for a pass that runs whole.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        segments: int,
        rows: int,
        attention: AttentionFactory,
        halves: bool = False,
        padding: RowPadding | None = None,
    ) -> None:
        self.model_runner = model_runner
        self.segments = segments
        self.rows = rows
        self.device = model_runner.device
        self._req_to_token = model_runner.req_to_token_pool.req_to_token
        self._padding = RowPadding() if padding is None else padding
        self.cut: int | None = None
        self.attention: CanonicalAttention
        if halves:
            halved = HalvedAttention(lambda count: attention(model_runner, count, rows), segments, rows)
            self.attention, self.cut = halved, halved.cut
        else:
            self.attention = attention(model_runner, segments, rows)
        self._row = torch.arange(self.rows, device=self.device)
        # Positions of padded rows may run past the end of the sequence; they must stay inside the tables.
        self._last_position = (
            min(self._req_to_token.shape[1], int(model_runner.model_config.context_len) + 1) - 1
        )

    @property
    def eager(self) -> CanonicalPass:
        """The pass operator by operator: this one."""
        return self

    @torch.no_grad()
    def run(self, segments: Sequence[PassSegment], candidates: CandidateTable) -> torch.Tensor:
        """Run one pass and return the logits of all rows, padding included.

        Args:
            segments: at most G; those of one request in ascending position, since each layer writes its
                keys and values before attention reads them.
            candidates: where verification segments find their token ids.

        Returns:
            Logits, shape ``[G, W, vocabulary]``, in the model's logit dtype.
        """
        batch = self.forward_batch(segments, candidates)
        self.attention.init_forward_metadata(batch)
        return self.forward(batch)

    @torch.no_grad()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """The model's layers over ``batch``, whose attention was planned; logits ``[G, W, vocabulary]``."""
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        attention = forward_context(ForwardContext(attn_backend=self.attention))
        with canonical_scope(), self._padding.applied(), attention:
            output = self.model_runner.model.forward(batch.input_ids, batch.positions, batch)
        return output.next_token_logits.view(self.segments, self.rows, -1)

    def forward_batch(self, segments: Sequence[PassSegment], candidates: CandidateTable) -> ForwardBatch:
        """The batch of a pass: token ids, positions and KV slots of all rows, as :meth:`forward` takes it."""
        free = self.segments - len(segments)
        starts_cpu = [s.start for s in segments] + [0] * free
        # One copy: on a GPU each costs more than what it carries.
        pool, starts, rows, verify = to_device(
            [
                [s.pool_index for s in segments] + [0] * free,
                starts_cpu,
                [s.rows for s in segments] + [0] * free,
                [s.kind is SegmentKind.VERIFY for s in segments] + [0] * free,
            ],
            self.device,
            torch.int64,
        )
        positions = (starts[:, None] + self._row).clamp_(max=self._last_position)
        used = self._row < rows[:, None]
        slots = self._req_to_token[pool[:, None], positions].to(torch.int64)
        # Padded rows write their keys and values into SGLang's padding slot 0.
        slots = torch.where(used, slots, 0)
        ids = self._token_ids(segments, candidates, pool, positions, used & verify.to(torch.bool)[:, None])
        return self._batch(ids, pool, starts, starts_cpu, positions.reshape(-1), slots.reshape(-1))

    @torch.no_grad()
    def run_rows(self, decode: ForwardBatch, positions: Sequence[int]) -> torch.Tensor:
        """Run a pass of one row per segment whose rows are those of a decode batch of SGLang's.

        Args:
            decode: at most G rows: token ids, places in ``req_to_token`` and KV slots are read. A row without
                a request of its own stands at position 0 and writes to slot 0.
            positions: of these rows, on the host.

        Returns:
            Logits of these rows, ``[rows, vocabulary]``.
        """
        batch = self.batch_of_rows(decode, positions)
        self.attention.init_forward_metadata(batch)
        return self.forward(batch)[: len(positions), 0]

    def batch_of_rows(self, decode: ForwardBatch, positions: Sequence[int]) -> ForwardBatch:
        """The batch of :meth:`run_rows`, padded to G rows."""
        if self.rows != 1 or len(positions) > self.segments:
            raise ValueError(f"{len(positions)} rows do not fit {self.segments} segments of {self.rows} rows")
        free = self.segments - len(positions)
        ids, pool, lengths, slots = (
            torch.nn.functional.pad(tensor.to(torch.int64), (0, free))
            for tensor in (decode.input_ids, decode.req_pool_indices, decode.seq_lens, decode.out_cache_loc)
        )
        starts = (lengths - 1).clamp_(min=0)
        return self._batch(ids, pool, starts, [*positions, *([0] * free)], starts, slots)

    def _batch(
        self,
        token_ids: torch.Tensor,
        pool: torch.Tensor,
        starts: torch.Tensor,
        starts_cpu: list[int],
        positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> ForwardBatch:
        """The batch of G segments.

        Args:
            token_ids, positions, slots: int64 ``[G * W]``.
            pool, starts: int64 ``[G]``; ``starts_cpu`` holds the latter on the host.
        """
        from sglang.srt.model_executor.forward_batch_info import (
            CaptureHiddenMode,
            ForwardBatch,
            ForwardMode,
        )

        total = self.segments * self.rows
        seq_lens_cpu = torch.tensor(starts_cpu, dtype=torch.int64) + self.rows
        batch = ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=self.segments,
            input_ids=token_ids,
            req_pool_indices=pool,
            seq_lens=starts + self.rows,
            out_cache_loc=slots,
            seq_lens_sum=int(seq_lens_cpu.sum()),
            seq_lens_cpu=seq_lens_cpu,
            orig_seq_lens=(starts + self.rows).to(torch.int32),
            positions=positions,
            extend_num_tokens=total,
            extend_seq_lens=torch.full((self.segments,), self.rows, dtype=torch.int32, device=self.device),
            extend_prefix_lens=starts.to(torch.int32),
            extend_seq_lens_cpu=[self.rows] * self.segments,
            extend_prefix_lens_cpu=starts_cpu,
            num_token_non_padded_cpu=total,
            spec_algorithm=self.model_runner.spec_algorithm,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )
        batch.mark_forward_metadata_ready()
        return batch

    def _token_ids(
        self,
        segments: Sequence[PassSegment],
        candidates: CandidateTable,
        pool: torch.Tensor,
        positions: torch.Tensor,
        from_table: torch.Tensor,
    ) -> torch.Tensor:
        """Token ids of all rows, shape ``[G * W]``: the table's where ``from_table``, else the known ones."""
        if any(s.token_ids for s in segments):
            known = torch.full((self.segments, self.rows), PADDING_TOKEN, dtype=torch.int64)
            for row, segment in zip(known, segments, strict=False):
                row[: len(segment.token_ids)] = torch.tensor(list(segment.token_ids), dtype=torch.int64)
            ids = to_device(known, self.device)
        else:
            ids = torch.full(positions.shape, PADDING_TOKEN, dtype=torch.int64, device=self.device)
        if any(s.kind is SegmentKind.VERIFY for s in segments):
            ids = torch.where(from_table, candidates.read(pool[:, None], positions), ids)
        return ids.reshape(-1)
