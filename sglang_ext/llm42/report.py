"""What a deterministic request says about itself in ``meta_info``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_ext.llm42.request import DeterministicRequest


class Report:
    """Stands in ``Req.customized_info``; whichever slice SGLang takes of it yields the newest figures.

    SGLang slices customised information like a list with one entry per output token; ours is one entry per
    message.
    """

    def __init__(self, state: DeterministicRequest) -> None:
        self._state = state

    def __getitem__(self, index: slice) -> list[dict[str, Any]]:
        log = self._state.log
        return [
            {
                "llm42_num_rollbacks": log.num_rollbacks,
                "llm42_tokens_rolled_back": log.tokens_rolled_back,
                "llm42_num_verification_windows": log.num_verification_windows,
                "llm42_digest": log.digest,
                "llm42_seed": self._state.seed,
                "llm42_seed_is_default": self._state.seed_is_default,
            }
        ]
