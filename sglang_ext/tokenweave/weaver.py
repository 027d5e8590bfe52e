"""The schedule: one decoder stack run as two interleaved halves, or whole with the fused step.

Knows tensors, norms and halves, but neither SGLang nor streams: what runs where is the communicator's
business, how a batch is cut that of the caller.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sglang_ext.tokenweave.communicator import Communicator, NormCall, Rows
from sglang_ext.tokenweave.interleave import Interleaver, SaveState
from sglang_ext.tokenweave.lazy import (
    PendingAllReduce,
    ShardedResidual,
    materialized,
    pending_all_reduce,
    plain,
    sharded_residual,
)
from sglang_ext.tokenweave.rows import owned_rows
from sglang_ext.tokenweave.split import Decision

logger = logging.getLogger(__name__)


@dataclass
class Statistics:
    """Counts since start.

    Attributes:
        fused: fused steps.
        resolved: all-reduces put off and then done plainly.
        gathered: residuals that had to be gathered for a consumer of all rows.
        woven: batches run as two halves.
        whole: batches run whole with the fused step.
    """

    fused: int = 0
    resolved: int = 0
    gathered: int = 0
    woven: int = 0
    whole: int = 0


@dataclass
class _Turn:
    """The half that is running; ``give_turn`` is None where the batch runs whole."""

    rows: Rows
    give_turn: Callable[[], None] | None


@dataclass
class Weaver:
    """Runs the decoder stack of one model on one rank.

    Attributes:
        rank: this rank in the tensor-parallel group.
        world: ranks in the group.
        hidden: hidden size.
        communicator: does the fused step.
        decide: the cut for a number of tokens; the same on every rank.
        save_state: saves the caller's global state at a switch between halves.
        fuse_whole: whether a batch of so many tokens that is not cut takes the fused step.
        poison_residual: fill residual rows of others with NaN.
        stock_reason: why the model runs stock from now on, or None.
        launched: when the host launched each fused step of the last batch in two halves, in seconds.
    """

    rank: int
    world: int
    hidden: int
    communicator: Communicator
    decide: Callable[[int], Decision]
    save_state: SaveState
    fuse_whole: Callable[[int], bool] = lambda tokens: True
    poison_residual: bool = False
    stock_reason: str | None = None
    statistics: Statistics = field(default_factory=Statistics)
    launched: list[float] = field(default_factory=list)
    _turn: _Turn | None = None
    _fixed_cut: int | None = None
    _observed: bool = False

    @property
    def observed(self) -> bool:
        """Whether it is known if this model has norms to fuse."""
        return self._observed

    @property
    def running_half(self) -> int | None:
        """The half (0 or 1) that is running; None outside of woven batches."""
        turn = self._turn
        return None if turn is None or turn.give_turn is None else turn.rows.half

    def cut_for(self, tokens: int) -> int | None:
        """Tokens of the first half of a batch of ``tokens``, or None to run it whole."""
        if self.stock_reason or not self._observed or not self.communicator.fits(tokens):
            return None
        if self._fixed_cut is not None:
            return self._fixed_cut if self._fixed_cut < tokens else None
        return self.decide(tokens).cut

    @contextlib.contextmanager
    def cut_at(self, cut: int) -> Iterator[None]:
        """Cut every prefill batch in this scope at ``cut``, whatever the rule says."""
        previous, self._fixed_cut = self._fixed_cut, cut
        try:
            yield
        finally:
            self._fixed_cut = previous

    def run_whole(self, tokens: int, forward: Callable[[], Any]) -> Any:
        """Run ``forward`` on ``tokens`` rows with the fused step in place of all-reduce and norm.

        The first such run also observes whether the model has any norm to fuse; if not, the model runs
        stock from then on.
        """
        # Even where fusing whole batches does not pay, one must be observed before any is cut.
        wanted = self.fuse_whole(tokens) or not self._observed
        if self.stock_reason or not wanted or not self.communicator.fits(tokens):
            return forward()
        before = self.statistics.fused
        with self._running(_Turn(Rows(0, 0, tokens), None)):
            output = materialized(forward())
        self.statistics.whole += 1
        if not self._observed:
            self._observe(self.statistics.fused - before)
        # A copy: the rows of the fused step's buffer are used again by the next forward pass.
        return _map_tensors(output, lambda tensor: tensor.clone())

    def run_halves(self, cut: int, tokens: int, halves: Sequence[Callable[[], Any]]) -> Any:
        """Run the first ``cut`` rows and the rest as two interleaved halves and join their outputs."""
        interleaver = Interleaver(self._save_all)
        places = (Rows(0, 0, cut), Rows(1, cut, tokens - cut))

        def start(half: Callable[[], Any], rows: Rows) -> Callable[[], Any]:
            def run() -> Any:
                self._turn = _Turn(rows, interleaver.give_turn)
                return materialized(half())

            return run

        before = replace(self.statistics)
        self.launched.clear()
        with self.communicator.beside_compute():
            first, second = interleaver.run(
                [start(half, rows) for half, rows in zip(halves, places, strict=True)]
            )
        self.statistics.woven += 1
        if self.statistics.woven == 1:
            logger.info(
                "TokenWeave: first batch run as two halves, %d of %d tokens first; %d fused steps, %d plain "
                "all-reduces",
                cut,
                tokens,
                self.statistics.fused - before.fused,
                self.statistics.resolved - before.resolved,
            )
        return _join(first, second)

    def all_reduce(
        self, partial: torch.Tensor, plain_all_reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Put the all-reduce of ``partial`` off, if it is one of the hidden states of the running half."""
        turn = self._turn
        if turn is None or partial.dim() != 2 or partial.shape != (turn.rows.tokens, self.hidden):
            return plain_all_reduce(partial)

        def resolve(tensor: torch.Tensor) -> torch.Tensor:
            self.statistics.resolved += 1
            return plain_all_reduce(tensor)

        return pending_all_reduce(partial, resolve)

    def norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: NormCall | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The fused step for a norm with residual; None if this norm must run as it is.

        The caller then passes :func:`sglang_ext.tokenweave.lazy.materialized` arguments to the module.
        """
        turn = self._turn
        if turn is None or norm is None or residual is None or not isinstance(x, PendingAllReduce):
            return None
        rows = owned_rows(turn.rows.tokens, self.world, self.rank)
        if x.shape != (turn.rows.tokens, self.hidden) or residual.shape != x.shape:
            return None
        if isinstance(residual, PendingAllReduce):
            residual = residual.materialize()
        partial = x.take_partial()
        if partial is None:
            return None
        kept = self._keep_own_rows(residual, rows)
        join = self.communicator.launch(
            partial, kept.shard, norm, turn.rows, overlap=turn.give_turn is not None
        )
        self.statistics.fused += 1
        if turn.give_turn is not None:
            self.launched.append(time.perf_counter())
            turn.give_turn()
        return join(), kept

    def _keep_own_rows(self, residual: torch.Tensor, rows: slice) -> ShardedResidual:
        """``residual`` as a row shard: as it is, or the own rows of a whole one in new memory."""
        if isinstance(residual, ShardedResidual):
            return residual
        kept = torch.empty_like(residual)
        if self.poison_residual:
            kept.fill_(float("nan"))
        kept[rows] = residual[rows]
        return sharded_residual(kept, rows, self._gather)

    def _gather(self, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        self.statistics.gathered += 1
        return self.communicator.gather(rows, tokens)

    def _observe(self, fused: int) -> None:
        """Judge the first whole run."""
        self._observed = True
        if fused:
            return
        self.stock_reason = "none of the model's all-reduces is followed by a norm that takes a residual"
        if self.rank == 0:
            logger.warning("TokenWeave is off for this model: %s; it runs stock", self.stock_reason)

    @contextlib.contextmanager
    def _running(self, turn: _Turn) -> Iterator[None]:
        previous, self._turn = self._turn, turn
        try:
            yield
        finally:
            self._turn = previous

    def _save_all(self) -> Callable[[], None]:
        restore, turn = self.save_state(), self._turn

        def put_back() -> None:
            restore()
            self._turn = turn

        return put_back


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(plain(value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def _join(first: Any, second: Any) -> Any:
    """Outputs of the two halves as that of the whole: tensors row after row, also within tuples and lists.

    Raises:
        TypeError: an output is neither.
    """
    if first is None and second is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat((plain(first), plain(second)))
    if isinstance(first, (list, tuple)):
        return type(first)(_join(a, b) for a, b in zip(first, second, strict=True))
    raise TypeError(f"cannot join outputs of type {type(first).__name__}; start without --enable-tokenweave")
