"""Every place where sglang_ext reaches into SGLang's internals, in one table.

SGLang applies plugin hooks by dotted path and only *logs* a hook that fails, so a renamed function would
leave a server that looks deterministic and is not. Hence this table, the version pin, and :func:`install`,
which puts one feature's hooks in place and then looks whether each of them really is there.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from types import CodeType
from typing import Any

from sglang_ext.cpu.hook_table import HOOKS as CPU_HOOKS
from sglang_ext.hook_table import HOOKS as FLAG_HOOKS
from sglang_ext.hook_types import Feature, Hook, Kind
from sglang_ext.llm42.hook_table import HOOKS as LLM42_HOOKS
from sglang_ext.llm42.server.hook_table import HOOKS as LLM42_SERVER_HOOKS
from sglang_ext.ray.hook_table import HOOKS as RAY_HOOKS
from sglang_ext.tokenweave.hook_table import HOOKS as TOKENWEAVE_HOOKS

__all__ = [
    "CHECKED_SGLANG_VERSIONS",
    "HOOKS",
    "Feature",
    "Hook",
    "HookError",
    "Kind",
    "check",
    "install",
    "install_hooks",
]

#: SGLang releases against which every target below was read and tested.
CHECKED_SGLANG_VERSIONS = ("0.5.17",)


class HookError(RuntimeError):
    """A hook of ours is not in place: the feature that needs it must not run."""


#: Every row of every feature.
HOOKS: tuple[Hook, ...] = (
    *FLAG_HOOKS,
    *CPU_HOOKS,
    *LLM42_HOOKS,
    *LLM42_SERVER_HOOKS,
    *TOKENWEAVE_HOOKS,
    *RAY_HOOKS,
)


def sglang_version() -> str | None:
    """Version of the installed SGLang, or None if it is not installed."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def unsupported_version_reason() -> str | None:
    """One sentence saying why the installed SGLang is not supported, or None if it is."""
    installed = sglang_version()
    if installed in CHECKED_SGLANG_VERSIONS:
        return None
    return (
        f"sglang_ext is off: it was checked on SGLang {', '.join(CHECKED_SGLANG_VERSIONS)} and this is "
        f"{installed or 'no installed SGLang'}; install that version to use --enable-llm42 and "
        "--enable-tokenweave (stock SGLang runs as usual)."
    )


def hooks_of(feature: Feature) -> tuple[Hook, ...]:
    """The rows of the table that belong to ``feature``."""
    return tuple(hook for hook in HOOKS if hook.feature is feature)


@functools.cache
def install(feature: Feature) -> None:
    """Put every hook of ``feature`` in place in this process; a second call does nothing.

    Raises:
        HookError: the SGLang version is not a checked one, or a hook is not in place afterwards. The
            message names every target concerned.
    """
    if reason := unsupported_version_reason():
        raise HookError(reason)
    install_hooks(hooks_of(feature))


def install_hooks(hooks: Iterable[Hook]) -> None:
    """Register ``hooks`` with SGLang's registry, apply them and check that each is in place.

    Raises:
        HookError: naming every target whose hook is missing, with the reason.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = tuple(hook for hook in hooks if hook.if_imported is None or hook.if_imported in sys.modules)
    for hook in hooks:
        if hook.target in HookRegistry._patched:
            raise HookError(
                f"{hook.target} was already patched by another plugin or feature; SGLang applies hooks "
                "to a target once, so ours would be skipped silently."
            )
        HookRegistry.register(hook.target, pkgutil.resolve_name(hook.replacement), HookType(hook.kind.value))
    HookRegistry.apply_hooks()
    if missing := [problem for hook in hooks if (problem := _problem(hook))]:
        raise HookError("sglang_ext hooks are not in place: " + "; ".join(missing))


def check(feature: Feature) -> None:
    """Look again whether the hooks of ``feature`` are in place, for instance after all is built.

    Rows that depend on an imported module are left out: it may have come after the installation.

    Raises:
        HookError: naming every target whose hook is missing.
    """
    rows = [hook for hook in hooks_of(feature) if hook.if_imported is None]
    if missing := [problem for hook in rows if (problem := _problem(hook))]:
        raise HookError(f"sglang_ext hooks of {feature} are not in place: " + "; ".join(missing))


def _problem(hook: Hook) -> str | None:
    """Why ``hook`` is not in place, or None if it is."""
    try:
        current = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError) as error:
        return f"{hook.target} ({error})"
    replacement = pkgutil.resolve_name(hook.replacement)
    if current is replacement or any(replacement in _closure(layer) for layer in _layers(current)):
        return None
    return f"{hook.target} (present, but {hook.replacement} is not called by it)"


def _layers(function: Any) -> Iterable[Any]:
    """``function`` and everything it wraps, outermost first."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _closure(function: Callable[..., Any]) -> list[Any]:
    """Objects that ``function`` holds in its closure."""
    function = getattr(function, "__func__", function)
    if not isinstance(getattr(function, "__code__", None), CodeType):
        return []
    return [cell.cell_contents for cell in function.__closure__ or ()]
