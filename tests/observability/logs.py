"""Commit logs for tests, made as the scheduler makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_ext.llm42.commit_log import CommitLog
from sglang_ext.llm42.observability.log_line import FinishedRequest


def released_log(prompt_tokens: int, output: Sequence[int], reason: str = "length") -> CommitLog:
    """A log that committed ``output`` in windows of up to 3 tokens and was released."""
    log = CommitLog()
    if output:
        log.commit_prefill(prompt_tokens, 0, output[0])
    for start in range(1, len(output), 3):
        tokens = output[start : start + 3]
        log.commit_window(start, tokens, matched=len(tokens) - 1, candidates=len(tokens))
    log.release(reason, len(output))
    return log


def finished(
    output: Sequence[int],
    *,
    rid: str = "r",
    prompt: Sequence[int] = (5, 6, 7),
    finish_reason: Mapping[str, Any] | None = None,
    further: Mapping[str, Any] | None = None,
    **params: Any,
) -> FinishedRequest:
    """A finished request with these output token ids and sampling parameters."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(**{"max_new_tokens": len(output), "custom_params": {"llm42": True}, **params})
    sampling.normalize(_Tokenizer())
    finish = finish_reason or {"type": "length", "length": len(output)}
    return FinishedRequest(
        rid=rid,
        prompt=prompt,
        sampling_params=sampling,
        seed=7,
        log=released_log(len(prompt), output, finish["type"]),
        finish_reason=finish,
        weight_version="w1",
        configuration="c1",
        finished_at=1.5,
        further=further or {},
    )


class _Tokenizer:
    """As much of one as SGLang's normalisation of stop strings needs."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [0] * len(text)
