"""The rows of the hook table that are in place in every process (feature :attr:`Feature.FLAGS`)."""

from __future__ import annotations

from sglang_ext.hook_types import Feature, Hook, Kind

HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.server_args.ServerArgs",
        Kind.REPLACE,
        "sglang_ext.server_args:ServerArgs",
        Feature.FLAGS,
        "our command-line flags, and the same as keyword arguments of sglang.Engine",
    ),
    Hook(
        "sglang.srt.entrypoints.engine.Engine.server_args_class",
        Kind.REPLACE,
        "sglang_ext.server_args:ServerArgs",
        Feature.FLAGS,
        "an Engine class that was imported before holds SGLang's own ServerArgs",
        if_imported="sglang.srt.entrypoints.engine",
    ),
    Hook(
        "sglang.srt.runtime_context.publish",
        Kind.BEFORE,
        "sglang_ext.activation:before_publish",
        Feature.FLAGS,
        "every SGLang process announces arguments and role here before it builds what we hook",
    ),
)
