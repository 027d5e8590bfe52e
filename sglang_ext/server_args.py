"""SGLang's server arguments with ours added; every SGLang process sees this class."""

from __future__ import annotations

import argparse
import dataclasses

from sglang.srt.arg_groups.arg_utils import A, Arg
from sglang.srt.server_args import ServerArgs as SGLangServerArgs

from sglang_ext import hooks

#: The original's mode numbers: it had three ways to make GEMMs invariant, ours has one that needs no choice.
LLM42_MODES = (1, 2, 3)


def _llm42_mode(text: str) -> bool:
    """Value of ``--enable-llm42`` when one is given: a mode number of the original, all alike here."""
    if text.isdigit() and int(text) in LLM42_MODES:
        return True
    raise argparse.ArgumentTypeError(
        f"{text!r} is none of {', '.join(map(str, LLM42_MODES))} (or leave it out)"
    )


@dataclasses.dataclass
class ServerArgs(SGLangServerArgs):
    """SGLang's ``ServerArgs`` plus the flags of this package."""

    enable_llm42: A[
        bool | None,
        Arg(
            help="Serve deterministic requests by decode, verify and roll back (LLM-42). Takes an optional "
            "mode number of the original implementation, which makes no difference here.",
            type_parser=_llm42_mode,
            nargs="?",
            const=True,
        ),
    ] = False
    llm42_window_size: A[int, "Rows of a verification segment: candidates that are verified at once."] = 64
    llm42_verify_batch_size: A[int, "Segments of a canonical pass: its shape is window size times this."] = 8
    llm42_max_wait_steps: A[
        int, "Decode steps that a full window may wait for other requests to fill the canonical pass."
    ] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable_llm42:
            hooks.install(hooks.Feature.LLM42_SERVER)
