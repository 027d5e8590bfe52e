"""Which features a process gets: decided when it announces its role, from the server's arguments."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang_ext import hooks
from sglang_ext.hook_types import Feature

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


def before_publish(server_args: ServerArgs, *, role: str, hf_config: Any = None) -> None:
    """Before ``runtime_context.publish``: install what ``server_args`` asks for in a process of this role.

    Schedulers (also in Ray actors) publish just before they are built, a tokenizer manager (HTTP server or
    engine) in its constructor before its methods are bound.

    Raises:
        HookError: a feature was asked for and a hook of it is not in place. The process then ends, and with
            it the server: better none than one that looks deterministic and is not.
    """
    if role == "scheduler":
        _activate_in_scheduler(server_args)
    elif role == "tokenizer":
        _activate_in_server(server_args)


def _activate_in_scheduler(server_args: ServerArgs) -> None:
    from sglang_ext.plugin import install_platform

    install_platform()
    if getattr(server_args, "enable_llm42", False):
        hooks.install(Feature.LLM42)
    if getattr(server_args, "enable_tokenweave", False):
        hooks.install(Feature.TOKENWEAVE)


def _activate_in_server(server_args: ServerArgs) -> None:
    if getattr(server_args, "enable_llm42", False):
        hooks.install(Feature.MARKS)
        hooks.install(Feature.LLM42_SERVER)
        return
    try:
        hooks.install(Feature.MARKS)
    except hooks.HookError as error:
        # Nothing of ours was asked for: SGLang runs as usual, only our refusal of marked requests is missing.
        logger.warning("%s", error)
