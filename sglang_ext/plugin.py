"""Entry point of group ``sglang.srt.plugins``: SGLang calls :func:`register` in every process it starts."""

from __future__ import annotations

import logging

from sglang_ext import hooks

logger = logging.getLogger(__name__)


def register() -> None:
    """Add our command-line flags, and the CPU platform where torch sees no accelerator.

    The features behind the flags install their own hooks when a server asks for them. On an SGLang
    version that was not checked, one warning is logged and nothing is touched.
    """
    if reason := hooks.unsupported_version_reason():
        logger.warning(reason)
        return
    hooks.install(hooks.Feature.FLAGS)
    install_platform()


def install_platform() -> None:
    """Let SGLang serve on a CPU where torch sees no accelerator.

    Raises:
        HookError: as :func:`sglang_ext.hooks.install`.
    """
    import torch

    if not torch.accelerator.is_available():
        hooks.install(hooks.Feature.CPU)
