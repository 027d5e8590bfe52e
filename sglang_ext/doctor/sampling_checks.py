"""The operators behind the logits: log-softmax and the canonical sampler, row by row and in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sglang_ext.doctor.digest import row_digests
from sglang_ext.doctor.report import Difference, OperatorReport
from sglang_ext.llm42 import sampling
from sglang_ext.llm42.sampling import RowParams, SamplingRows

LOG_SOFTMAX = "log-softmax"
SAMPLER = "canonical sampler"

#: One parameter set per path through the sampler; they stand side by side in a batch.
PARAMS = (
    RowParams(temperature=0.0),
    RowParams(temperature=0.8, seed=1),
    RowParams(temperature=1.0, top_p=0.9, seed=2),
    RowParams(temperature=1.2, top_k=20, seed=3),
    RowParams(temperature=0.7, top_k=50, top_p=0.8, min_p=0.02, seed=4),
    RowParams(temperature=1.0, min_p=0.05, seed=-5),
)


def check(logits: torch.Tensor, window: int) -> list[OperatorReport]:
    """Compare each row alone with the same row among others.

    Args:
        logits: ``[rows, vocabulary]``, canonical logits of the positions ``0 .. rows-1``.
        window: rows of a segment, for the report.
    """
    alone = torch.cat([row_digests(sampling.log_softmax(row[None]), 1) for row in logits])
    tokens = torch.cat([_sample(logits[i : i + 1], [i]) for i in range(len(logits))])
    found = {LOG_SOFTMAX: OperatorReport(LOG_SOFTMAX, 0, 0), SAMPLER: OperatorReport(SAMPLER, 0, 0)}
    for name, order in _batches(len(logits)):
        batch = logits[order]
        digests = row_digests(sampling.log_softmax(batch), len(order))
        _count(found, LOG_SOFTMAX, name, order, alone[order] != digests, window)
        _count(found, SAMPLER, name, order, tokens[order] != _sample(batch, order), window)
    return list(found.values())


def _batches(rows: int) -> Iterator[tuple[str, list[int]]]:
    """Ways to put the rows into a batch."""
    everything = list(range(rows))
    yield "all rows in one batch", everything
    yield "rows in another order", everything[::-1]
    yield "rows in a smaller batch", everything[1::2] or everything
    yield "other rows in front", everything[rows // 2 :] + everything[: rows // 2]


def _sample(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Tokens of ``rows``, each with the parameters and position that belong to its number."""
    params = SamplingRows.from_params([PARAMS[row % len(PARAMS)] for row in rows], logits.device)
    positions = torch.tensor([row + 1 for row in rows], device=logits.device)
    return sampling.sample(logits, params, positions)


def _count(
    found: dict[str, OperatorReport],
    operator: str,
    batch: str,
    order: Sequence[int],
    different: torch.Tensor,
    window: int,
) -> None:
    before = found[operator]
    first = before.first
    count = int(different.sum())
    if count and first is None:
        place = int(different.nonzero()[0])
        position = order[place]
        segment, row = divmod(position, window)
        first = Difference(batch, "logits", position, segment, row, segment * window)
    found[operator] = OperatorReport(
        operator, before.comparisons + len(order), before.differences + count, first
    )
