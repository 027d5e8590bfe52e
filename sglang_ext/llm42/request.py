"""State of one deterministic request on the scheduler's side."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_ext.llm42 import logit_processing
from sglang_ext.llm42.commit_log import CommitLog
from sglang_ext.llm42.config import CANONICAL_NAMESPACE
from sglang_ext.llm42.lane import LaneRequest
from sglang_ext.llm42.sampling import DEFAULT_SEED, RowParams
from sglang_ext.llm42.server.marks import is_marked

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ext.llm42.logprobs import TokenLogprobs


@dataclass(frozen=True)
class Verdict:
    """What one canonical pass or decode step decided for one request: tokens that wait to be committed.

    Attributes:
        tokens: canonical token ids, at least one.
        matched: how many of them are candidates that agreed.
        candidates: candidates outstanding when the pass was applied.
        ends_prefill: whether the (single) token follows the prompt rather than a window.
        logprobs: one entry per token if the request asked for log-probabilities, else empty.
        by_decode: whether a canonical decode step decided the (single) token.
    """

    tokens: tuple[int, ...]
    matched: int
    candidates: int
    ends_prefill: bool
    logprobs: tuple[TokenLogprobs, ...] = ()
    by_decode: bool = False


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
        unchecked: whether SGLang is about to check the one token that was committed.
        insert_prompt: whether the prompt's canonical KV is complete but not yet in the radix cache.
        prompt_logprobs: log-probabilities of prompt tokens found so far, in order of position.
        output_logprobs: those of committed output tokens that SGLang has not taken over yet.
        decided: all output tokens that passes have decided, committed or not.
        grammar: SGLang's grammar object as it was before it accepted a token, None without a grammar.
        matcher: grammar matcher that has accepted ``decided``, None without a grammar or once it refused one.
        committed: one that follows the committed output, None without a grammar or if the request came back
            from a retraction only to be ended.
        row_params: the sampling parameters of each of its rows, once a row was sampled.
        stop_tokens: ids that ``min_new_tokens`` holds back, once a row's logits were processed.
        decidable: whether canonical decode steps may decide its tokens: what is drawn hangs on the model's
            logits alone, not on earlier tokens, the last of which the host does not know yet.
    """

    seed: int
    seed_is_default: bool
    log: CommitLog = field(default_factory=CommitLog)
    lane: LaneRequest | None = None
    verdicts: deque[Verdict] = field(default_factory=deque)
    stashed_finish: tuple[Any, int | None] | None = None
    committing: bool = False
    unchecked: bool = False
    insert_prompt: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    decided: array[int] = field(default_factory=lambda: array("q"))
    grammar: Any = None
    matcher: logit_processing.Matcher | None = None
    committed: logit_processing.Matcher | None = None
    row_params: RowParams | None = None
    stop_tokens: tuple[int, ...] | None = None
    decidable: bool = False

    def admit(self, req: Req) -> LaneRequest:
        """Enter the lane: all known tokens have memory, the cached prefix has canonical KV in it."""
        cached = len(req.prefix_indices)
        self.prompt_logprobs.clear()
        self.decidable = not logit_processing.required(req)
        self.decided = array("q", req.output_ids)
        self.follow_grammar(req)
        self.lane = LaneRequest(
            known_end=len(req.full_untruncated_fill_ids),
            max_end=len(req.origin_input_ids) + req.sampling_params.max_new_tokens,
            canonical_end=cached,
            streamed=req.stream,
        )
        return self.lane

    def follow_grammar(self, req: Req) -> None:
        """Start the matchers behind the output so far, if ``req`` has a grammar.

        A request that is about to be ended commits nothing more, so it gets none: its output may end with a
        token that the grammar refused.
        """
        self.matcher = self.committed = None
        if self.grammar is None and req.grammar is not None:
            # The first admission: nothing is committed, so SGLang's own has accepted nothing.
            self.grammar = req.grammar.copy()
        if self.grammar is not None and req.to_finish is None:
            self.matcher = logit_processing.Matcher(self.grammar, self.decided)
            self.committed = logit_processing.Matcher(self.grammar, self.decided)

    def decide(self, verdict: Verdict) -> None:
        """A pass or a canonical decode step decided the request's next tokens."""
        self.verdicts.append(verdict)
        self.decided.extend(verdict.tokens)
        for token in verdict.tokens:
            if self.matcher is not None:
                self.matcher.follow(token)
                if self.matcher.refused:
                    # No token was allowed (a contradictory grammar): SGLang ends the request when it commits.
                    self.matcher = None

    def take_verdicts(self) -> list[Verdict]:
        """What was decided and is committed now."""
        taken = list(self.verdicts)
        self.verdicts.clear()
        return taken

    def leave(self) -> None:
        """Leave the lane: the request gives its memory back. What was decided but not committed is dropped;
        it will be decided again, alike, should the request return."""
        self.lane = None
        self.verdicts.clear()
        self.insert_prompt = self.unchecked = False


def of(req: Req) -> DeterministicRequest | None:
    """The deterministic state of ``req``, or None if it is unmarked."""
    return getattr(req, "llm42", None)


def lane_of(req: Req) -> LaneRequest | None:
    """Positions of ``req`` in the lane; None if it is unmarked or holds no memory."""
    state = of(req)
    return None if state is None else state.lane


def has_state(req: Req) -> bool:
    """Whether ``req`` is marked and has its state."""
    return of(req) is not None


def attach(req: Req, weights_generation: int) -> None:
    """Give a marked ``req`` its state and the radix-cache namespace of canonical KV.

    The namespace is composed with whatever ``extra_key`` carries already (cache salt, LoRA), so that
    marked requests meet canonical entries of the present weights only, and unmarked ones never do.

    Args:
        weights_generation: how often the server's weights were updated.
    """
    if not is_marked(req.sampling_params.custom_params):
        req.llm42 = None
        return
    seed = req.sampling_params.sampling_seed
    req.llm42 = DeterministicRequest(
        seed=DEFAULT_SEED if seed is None else int(seed),
        seed_is_default=seed is None,
    )
    req.extra_key = canonical_key(req.extra_key, weights_generation)


def canonical_key(extra_key: str | None, weights_generation: int) -> str:
    """Where the radix cache holds canonical KV of requests with ``extra_key``."""
    return (extra_key or "") + f"{CANONICAL_NAMESPACE}{weights_generation}"


def renew_namespace(req: Req, weights_generation: int) -> None:
    """Let a marked ``req`` that has not begun meet canonical entries of new weights only."""
    if has_state(req):
        assert req.extra_key is not None
        req.extra_key = canonical_key(req.extra_key.rpartition(CANONICAL_NAMESPACE)[0], weights_generation)
