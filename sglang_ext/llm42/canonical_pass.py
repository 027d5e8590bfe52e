"""The canonical pass: one model forward whose shape never changes.

Always G times W rows and the same kernels. What varies is only which request's positions stand in which row;
every operator must give a row the same bits wherever it stands.

Rows come in *blocks*. A segment, consecutive positions of one request, takes whole blocks, the last of them
padded; a window of W rows is W rows of blocks, and the end of a prompt may be a single one::

    block   0        1        2        3        4        5
            aaaaaaaa aaaaaaaa aaaa.... bbbbbbbb bb...... cccccccc      8 rows each

Attention sees blocks as requests of SGLang's. Where neighbours follow each other in one request, it may
compute them together (``rids`` and positions say so).

Logits are wanted of few rows: those that judge a candidate or end a prompt. The output head of a large
vocabulary is a good part of a pass, so there is a version of each pass that computes it for a quarter of the
rows, chosen anew for each run; like everything else about a pass, whether it gives the same bits is found
out by the certification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from sglang_ext.llm42.canonical_scope import canonical_scope
from sglang_ext.llm42.chosen_rows import ChosenRows
from sglang_ext.llm42.lane import SegmentKind, first_rows
from sglang_ext.llm42.row_padding import RowPadding
from sglang_ext.llm42.transfer import to_device
from sglang_ext.tokenweave.canonical import HalvedAttention

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

#: Token id of padded rows. Any valid id will do: no row attends to another request's rows.
PADDING_TOKEN = 0

#: Share of a pass's rows whose logits can be computed alone.
FEW_ROWS = 1 / 4


class CanonicalAttention(Protocol):
    """An attention backend whose rows are invariant for so many blocks of so many rows."""

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
        rows: at least 1; they take whole blocks.
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
        segments: G, segments of W rows that fill the pass.
        rows: W.
        attention: factory of the row-invariant attention backend, called with blocks and their rows.
        halves: whether TokenWeave runs the pass as two equal halves.
        padding: products of more rows than the pass has.
        block_rows: a divisor of W; W itself if None.

    Attributes:
        total_rows: of the pass.
        blocks: likewise.
        few_rows: of how many chosen rows :meth:`run_few` computes the logits; 0 where it cannot.
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
        block_rows: int | None = None,
    ) -> None:
        self.model_runner = model_runner
        self.segments = segments
        self.rows = rows
        self.block_rows = rows if block_rows is None else block_rows
        self.total_rows = segments * rows
        self.blocks = self.total_rows // self.block_rows
        # Every row of a decode step is wanted; TokenWeave's halves have logits of their own.
        whole = rows == 1 or halves
        self._chosen = None if whole else ChosenRows.of(getattr(model_runner, "model", None))
        self.few_rows = int(self.total_rows * FEW_ROWS) if self._chosen is not None else 0
        self.device = model_runner.device
        self._req_to_token = model_runner.req_to_token_pool.req_to_token
        self._padding = RowPadding() if padding is None else padding
        self.cut: int | None = None
        self.attention: CanonicalAttention
        if halves:
            halved = HalvedAttention(
                lambda count: attention(model_runner, count, self.block_rows), self.blocks, self.block_rows
            )
            self.attention, self.cut = halved, halved.cut
        else:
            self.attention = attention(model_runner, self.blocks, self.block_rows)
        self._row = torch.arange(self.block_rows, device=self.device)
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
            segments: as many as there are blocks for; those of one request in ascending position, since each
                layer writes its keys and values before attention reads them.
            candidates: where verification segments find their token ids.

        Returns:
            Logits, shape ``[rows of the pass, vocabulary]``, in the model's logit dtype; where a segment's
            rows are, :func:`first_rows` says.

        Raises:
            ValueError: there are not enough blocks.
        """
        batch = self.forward_batch(segments, candidates)
        self.attention.init_forward_metadata(batch)
        return self.forward(batch)

    @torch.no_grad()
    def run_few(
        self, segments: Sequence[PassSegment], candidates: CandidateTable, chosen: torch.Tensor
    ) -> torch.Tensor:
        """As :meth:`run`, with logits of chosen rows alone.

        Args:
            chosen: rows of the pass, int64 ``[n]`` on its device, ``n`` at most ``few_rows``.

        Returns:
            Logits, shape ``[n, vocabulary]``.
        """
        batch = self.forward_batch(segments, candidates)
        self.attention.init_forward_metadata(batch)
        padded = torch.nn.functional.pad(chosen, (0, self.few_rows - len(chosen)))
        return self.forward(batch, padded)[: len(chosen)]

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """The model's layers over ``batch``, whose attention was planned.

        Returns:
            Logits of all rows, or of ``few_rows`` ``chosen`` ones, ``[rows, vocabulary]``.
        """
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        attention = forward_context(ForwardContext(attn_backend=self.attention))
        head = nullcontext() if chosen is None or self._chosen is None else self._chosen.applied(chosen)
        with canonical_scope(), self._padding.applied(), attention, head:
            output = self.model_runner.model.forward(batch.input_ids, batch.positions, batch)
        logits: torch.Tensor = output.next_token_logits
        return logits

    def forward_batch(self, segments: Sequence[PassSegment], candidates: CandidateTable) -> ForwardBatch:
        """The batch of a pass: token ids, positions and KV slots of all rows, as :meth:`forward` takes it.

        Raises:
            ValueError: there are not enough blocks for ``segments``.
        """
        firsts = first_rows((s.rows for s in segments), self.block_rows)
        if (taken := firsts[-1] // self.block_rows) > self.blocks:
            raise ValueError(f"a pass of {self.blocks} blocks cannot hold {taken}")
        free = self.blocks - taken
        blocks = [
            (s.pool_index, s.start + done, min(self.block_rows, s.rows - done), s.kind is SegmentKind.VERIFY)
            for s in segments
            for done in range(0, s.rows, self.block_rows)
        ]
        blocks += [(0, 0, 0, False)] * free
        # One copy: on a GPU each costs more than what it carries.
        pool, starts, rows, verify = to_device(list(zip(*blocks, strict=True)), self.device, torch.int64)
        positions = (starts[:, None] + self._row).clamp_(max=self._last_position)
        used = self._row < rows[:, None]
        slots = self._req_to_token[pool[:, None], positions].to(torch.int64)
        # Padded rows write their keys and values into SGLang's padding slot 0.
        slots = torch.where(used, slots, 0)
        from_table = used & verify.to(torch.bool)[:, None]
        ids = self._token_ids(segments, firsts, candidates, pool, positions, from_table)
        starts_cpu, rids = [block[1] for block in blocks], [str(block[0]) for block in blocks]
        return self._batch(ids, pool, starts, starts_cpu, positions.reshape(-1), slots.reshape(-1), rids)

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
        return self.forward(batch)[: len(positions)]

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
        rids: list[str] | None = None,
    ) -> ForwardBatch:
        """The batch, in which each block is a request of SGLang's.

        Args:
            token_ids, positions, slots: int64 ``[rows of the pass]``.
            pool, starts: int64 ``[blocks]``; ``starts_cpu`` holds the latter on the host.
            rids: of each block; those of one request have the same.
        """
        from sglang.srt.model_executor.forward_batch_info import (
            CaptureHiddenMode,
            ForwardBatch,
            ForwardMode,
        )

        seq_lens_cpu = torch.tensor(starts_cpu, dtype=torch.int64) + self.block_rows
        extends = torch.full((self.blocks,), self.block_rows, dtype=torch.int32, device=self.device)
        batch = ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=self.blocks,
            input_ids=token_ids,
            req_pool_indices=pool,
            seq_lens=starts + self.block_rows,
            out_cache_loc=slots,
            seq_lens_sum=int(seq_lens_cpu.sum()),
            seq_lens_cpu=seq_lens_cpu,
            orig_seq_lens=(starts + self.block_rows).to(torch.int32),
            positions=positions,
            extend_num_tokens=self.total_rows,
            extend_seq_lens=extends,
            extend_prefix_lens=starts.to(torch.int32),
            extend_seq_lens_cpu=[self.block_rows] * self.blocks,
            extend_prefix_lens_cpu=starts_cpu,
            num_token_non_padded_cpu=self.total_rows,
            rids=rids,
            spec_algorithm=self.model_runner.spec_algorithm,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )
        batch.mark_forward_metadata_ready()
        return batch

    def _token_ids(
        self,
        segments: Sequence[PassSegment],
        firsts: Sequence[int],
        candidates: CandidateTable,
        pool: torch.Tensor,
        positions: torch.Tensor,
        from_table: torch.Tensor,
    ) -> torch.Tensor:
        """Token ids of all rows, shape ``[rows of the pass]``: the table's where ``from_table``, ``[blocks,
        rows of a block]`` like ``positions``, else the known ones."""
        if any(s.token_ids for s in segments):
            known = torch.full((self.total_rows,), PADDING_TOKEN, dtype=torch.int64)
            for first, segment in zip(firsts, segments, strict=False):
                tokens = torch.tensor(list(segment.token_ids), dtype=torch.int64)
                known[first : first + len(tokens)] = tokens
            ids = to_device(known, self.device).view(positions.shape)
        else:
            ids = torch.full(positions.shape, PADDING_TOKEN, dtype=torch.int64, device=self.device)
        if any(s.kind is SegmentKind.VERIFY for s in segments):
            ids = torch.where(from_table, candidates.read(pool[:, None], positions), ids)
        return ids.reshape(-1)
