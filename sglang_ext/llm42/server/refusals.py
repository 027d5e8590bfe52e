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


_NO_THINKING_BUDGET = "the budget is counted in SGLang's own sampler"
_NO_MEDIA = "only text prompts are computed canonically"
_NOT_RETURNED = "canonical passes do not return it"

REFUSED_PER_REQUEST: tuple[Refusal, ...] = (
    Refusal("input_embeds", lambda obj, req: req.input_embeds is not None, "canonical passes take token ids"),
    Refusal(
        "positional_embed_overrides",
        lambda obj, req: req.positional_embed_overrides is not None,
        "canonical passes take token ids",
    ),
    Refusal("image_data", lambda obj, req: _has(obj.image_data), _NO_MEDIA),
    Refusal("video_data", lambda obj, req: _has(obj.video_data), _NO_MEDIA),
    Refusal("audio_data", lambda obj, req: _has(obj.audio_data), _NO_MEDIA),
    Refusal("return_sampling_mask", lambda obj, req: req.return_sampling_mask, _NOT_RETURNED),
    Refusal("return_entropy", lambda obj, req: obj.return_entropy, _NOT_RETURNED),
    Refusal("return_hidden_states", lambda obj, req: req.return_hidden_states, _NOT_RETURNED),
    Refusal("return_routed_experts", lambda obj, req: req.return_routed_experts, _NOT_RETURNED),
    Refusal("return_indexer_topk", lambda obj, req: req.return_indexer_topk, _NOT_RETURNED),
    Refusal("multi_item_delimiter_indices", lambda obj, req: req.multi_item_delimiter_indices, _NOT_RETURNED),
    Refusal(
        "max_thinking_tokens",
        lambda obj, req: "thinking_budget" in (req.sampling_params.custom_params or {}),
        _NO_THINKING_BUDGET,
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
