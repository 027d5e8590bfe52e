"""What one row of the hook table says; apart from the table so that each feature can declare its own rows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Feature(StrEnum):
    """What a hook belongs to; a feature's hooks are installed together or not at all."""

    FLAGS = "flags"  # command-line flags, always installed
    CPU = "cpu"  # serving on a CPU without AMX, installed where torch sees no GPU
    MARKS = "marks"  # reading deterministic marks of requests; without --enable-llm42 refusing them
    LLM42 = "llm42"  # deterministic requests in the scheduler, installed by --enable-llm42
    LLM42_SERVER = "llm42_server"  # the same in the HTTP server's or engine's own process
    TOKENWEAVE = "tokenweave"  # communication overlap, installed by --enable-tokenweave
    RAY = "ray"  # the process that starts ranks as Ray actors, installed by --use-ray
    RAY_RANK = "ray_rank"  # such a rank


class Kind(StrEnum):
    """How the replacement is called; the same words as SGLang's ``HookType``."""

    BEFORE = "before"  # replacement(*args, **kwargs) -> (args, kwargs) | None
    AFTER = "after"  # replacement(result, *args, **kwargs) -> result | None
    AROUND = "around"  # replacement(original, *args, **kwargs) -> result
    REPLACE = "replace"  # a function or class that takes the target's place


@dataclass(frozen=True)
class Hook:
    """One reach into SGLang.

    Attributes:
        target: dotted path of SGLang's function, method or class.
        kind: how ``replacement`` is called.
        replacement: ``package.module:name`` of ours, imported on installation.
        feature: the feature that needs it.
        why: one line for the reader.
        if_imported: a module without which the target is left alone: it then needs no hook, because it does
            not run in this process or, imported later, picks up what another row replaced.
    """

    target: str
    kind: Kind
    replacement: str
    feature: Feature
    why: str
    if_imported: str | None = None
