"""State of one deterministic request on the scheduler's side."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_ext.llm42.commit_log import CommitLog
from sglang_ext.llm42.config import CANONICAL_NAMESPACE, REQUEST_KEY
from sglang_ext.llm42.lane import LaneRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

#: Seed of a request that names none.
DEFAULT_SEED = 42


@dataclass(frozen=True)
class Verdict:
    """What one canonical pass decided for one request: tokens that wait to be committed.

    Attributes:
        tokens: canonical token ids, at least one.
        matched: how many of them are candidates that agreed.
        candidates: candidates outstanding when the pass was applied.
        ends_prefill: whether the (single) token follows the prompt rather than a window.
    """

    tokens: tuple[int, ...]
    matched: int
    candidates: int
    ends_prefill: bool


@dataclass(eq=False)
class DeterministicRequest:
    """Attached to SGLang's ``Req`` as ``req.llm42``; None there means an unmarked request.

    Attributes:
        seed: seed of the sampling noise.
        seed_is_default: whether the client named none.
        log: the authority on what is committed.
        lane: positions in the canonical lane while the request holds memory, else None.
        verdicts: tokens decided by passes but not yet committed to the request's output.
        stashed_finish: finish reason and length found while committing token by token, until SGLang asks.
        committing: whether tokens are being checked right now.
        insert_prompt: whether the prompt's canonical KV is complete but not yet in the radix cache.
    """

    seed: int
    seed_is_default: bool
    log: CommitLog = field(default_factory=CommitLog)
    lane: LaneRequest | None = None
    verdicts: deque[Verdict] = field(default_factory=deque)
    stashed_finish: tuple[Any, int | None] | None = None
    committing: bool = False
    insert_prompt: bool = False

    def admit(self, req: Req) -> LaneRequest:
        """Enter the lane: memory for all known tokens is allocated, canonical KV stands for the cached prefix."""
        cached = len(req.prefix_indices)
        self.lane = LaneRequest(
            known_end=len(req.full_untruncated_fill_ids),
            max_end=len(req.origin_input_ids) + req.sampling_params.max_new_tokens,
            canonical_end=cached,
        )
        return self.lane

    def leave(self) -> None:
        """Leave the lane: the request gives its memory back. What was decided but not committed is dropped;
        it will be decided again, alike, should the request return."""
        self.lane = None
        self.verdicts.clear()
        self.insert_prompt = False


def of(req: Req) -> DeterministicRequest | None:
    """The deterministic state of ``req``, or None if it is unmarked."""
    return getattr(req, "llm42", None)


def attach(req: Req) -> None:
    """Give a marked ``req`` its state and the radix-cache namespace of canonical KV.

    The namespace is composed with whatever ``extra_key`` carries already (cache salt, LoRA), so that
    marked requests meet canonical entries only, and unmarked ones never do.
    """
    settings = (req.sampling_params.custom_params or {}).get(REQUEST_KEY)
    if not settings:
        req.llm42 = None
        return
    seed = req.sampling_params.sampling_seed
    req.llm42 = DeterministicRequest(
        seed=DEFAULT_SEED if seed is None else int(seed),
        seed_is_default=seed is None,
    )
    req.extra_key = (req.extra_key or "") + CANONICAL_NAMESPACE
