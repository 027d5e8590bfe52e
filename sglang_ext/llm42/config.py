"""Settings of LLM-42, read once from the server's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_ext.llm42.decode_policy import DecodeMode
from sglang_ext.llm42.lane import LaneConfig

if TYPE_CHECKING:
    from sglang_ext.server_args import ServerArgs

#: Key inside ``SamplingParams.custom_params`` that carries our per-request settings to the scheduler.
REQUEST_KEY = "llm42"

#: Appended to a deterministic request's ``extra_key``, followed by the number of weight updates so far: the
#: radix-cache namespace of canonical KV.
CANONICAL_NAMESPACE = "\x1fllm42"


@dataclass(frozen=True)
class Llm42Config:
    """What the scheduler side of LLM-42 needs to know.

    Attributes:
        window_size: most rows of a segment (W), ``--llm42-window-size``.
        verify_batch_size: such segments that a canonical pass holds (G), ``--llm42-verify-batch-size``.
        max_wait_steps: decode steps a due segment may wait, ``--llm42-max-wait-steps``.
        overlap_verification: whether passes may run beside decode on a GPU, unless
            ``--llm42-disable-overlap-verification``.
        smaller_passes: whether passes of fewer segments run where they give the same bits, unless
            ``--llm42-disable-smaller-passes``.
        canonical_decode: when decode steps run in a canonical shape, ``--llm42-canonical-decode``.
    """

    window_size: int
    verify_batch_size: int
    max_wait_steps: int
    overlap_verification: bool = True
    smaller_passes: bool = True
    canonical_decode: DecodeMode = DecodeMode.AUTO

    @classmethod
    def from_server_args(cls, server_args: ServerArgs) -> Llm42Config:
        """The settings behind the server's ``--llm42-*`` flags."""
        return cls(
            window_size=server_args.llm42_window_size,
            verify_batch_size=server_args.llm42_verify_batch_size,
            max_wait_steps=server_args.llm42_max_wait_steps,
            overlap_verification=not server_args.llm42_disable_overlap_verification,
            smaller_passes=not server_args.llm42_disable_smaller_passes,
            canonical_decode=DecodeMode(server_args.llm42_canonical_decode),
        )

    def lane(self, block_rows: int) -> LaneConfig:
        """The same as the lane's configuration, with blocks of so many rows."""
        return LaneConfig(
            self.window_size,
            self.verify_batch_size,
            self.max_wait_steps,
            smaller_passes=self.smaller_passes,
            block_rows=block_rows,
        )
