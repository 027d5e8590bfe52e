"""What a deterministic request cannot ask for yet; such a request gets a 400 instead of a wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput


@dataclass(frozen=True)
class Refusal:
    """One thing that a deterministic request cannot have.

    Attributes:
        field: name under which clients ask for it.
        applies: whether a request asks for it: its input and what the scheduler would get.
        reason: completes "... because".
    """

    field: str
    applies: Callable[[GenerateReqInput, TokenizedGenerateReqInput], object]
    reason: str


_NO_LOGPROBS = "canonical log-probabilities are not returned yet"
_NO_PENALTIES = "canonical logits are not penalised yet"
_NO_GRAMMAR = "canonical logits are not constrained by grammars yet"
_NO_MEDIA = "only text prompts are computed canonically"
_NOT_RETURNED = "canonical passes do not return it"

#: Sizes of int64, in which the sampling noise is keyed.
_SEEDS = range(-(2**63), 2**63)

REFUSED_PER_REQUEST: tuple[Refusal, ...] = (
    Refusal(
        "sampling_seed",
        lambda obj, req: not _is_seed(req.sampling_params.sampling_seed),
        "a seed is a 64-bit integer",
    ),
    Refusal("input_embeds", lambda obj, req: req.input_embeds is not None, "canonical passes take token ids"),
    Refusal(
        "positional_embed_overrides",
        lambda obj, req: req.positional_embed_overrides is not None,
        "canonical passes take token ids",
    ),
    Refusal("image_data", lambda obj, req: _has(obj.image_data), _NO_MEDIA),
    Refusal("video_data", lambda obj, req: _has(obj.video_data), _NO_MEDIA),
    Refusal("audio_data", lambda obj, req: _has(obj.audio_data), _NO_MEDIA),
    Refusal("return_logprob", lambda obj, req: req.return_logprob, _NO_LOGPROBS),
    Refusal("return_sampling_mask", lambda obj, req: req.return_sampling_mask, _NO_LOGPROBS),
    Refusal("return_entropy", lambda obj, req: obj.return_entropy, _NOT_RETURNED),
    Refusal("return_hidden_states", lambda obj, req: req.return_hidden_states, _NOT_RETURNED),
    Refusal("return_routed_experts", lambda obj, req: req.return_routed_experts, _NOT_RETURNED),
    Refusal("return_indexer_topk", lambda obj, req: req.return_indexer_topk, _NOT_RETURNED),
    Refusal("multi_item_delimiter_indices", lambda obj, req: req.multi_item_delimiter_indices, _NO_LOGPROBS),
    Refusal("json_schema", lambda obj, req: req.sampling_params.json_schema, _NO_GRAMMAR),
    Refusal("regex", lambda obj, req: req.sampling_params.regex, _NO_GRAMMAR),
    Refusal("ebnf", lambda obj, req: req.sampling_params.ebnf, _NO_GRAMMAR),
    Refusal("structural_tag", lambda obj, req: req.sampling_params.structural_tag, _NO_GRAMMAR),
    Refusal("frequency_penalty", lambda obj, req: req.sampling_params.frequency_penalty != 0, _NO_PENALTIES),
    Refusal("presence_penalty", lambda obj, req: req.sampling_params.presence_penalty != 0, _NO_PENALTIES),
    Refusal(
        "repetition_penalty", lambda obj, req: req.sampling_params.repetition_penalty != 1, _NO_PENALTIES
    ),
    Refusal("logit_bias", lambda obj, req: req.sampling_params.logit_bias, _NO_PENALTIES),
    Refusal("min_new_tokens", lambda obj, req: req.sampling_params.min_new_tokens > 0, _NO_PENALTIES),
    Refusal("custom_logit_processor", lambda obj, req: req.custom_logit_processor, _NO_PENALTIES),
    Refusal(
        "max_thinking_tokens",
        lambda obj, req: "thinking_budget" in (req.sampling_params.custom_params or {}),
        _NO_GRAMMAR,
    ),
    Refusal("lora_path", lambda obj, req: req.lora_id, "canonical passes do not apply adapters yet"),
    Refusal(
        "session_params",
        lambda obj, req: req.session_params is not None,
        "sessions carry KV from turn to turn that need not be canonical",
    ),
)


def refuse_unsupported(obj: GenerateReqInput, req: TokenizedGenerateReqInput) -> None:
    """Check a deterministic request before it is sent to the scheduler.

    Raises:
        ValueError: it asks for something that deterministic requests cannot have; the message names each
            field and the reason.
    """
    found = [row for row in REFUSED_PER_REQUEST if row.applies(obj, req)]
    if found:
        reasons = "; ".join(f"{row.field} ({row.reason})" for row in found)
        raise ValueError(f"A deterministic request does not support: {reasons}.")


def _has(data: object) -> bool:
    from sglang.srt.multimodal.mm_utils import has_valid_data

    return bool(has_valid_data(data))


def _is_seed(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value in _SEEDS)
