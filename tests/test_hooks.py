"""The hook table: complete on the installed SGLang, loud when a target is missing or SGLang another one."""

from __future__ import annotations

import inspect
import pkgutil
import sys
import types
from collections.abc import Iterator

import pytest

from sglang_ext import activation, hooks, plugin
from sglang_ext.hook_types import Feature, Hook, Kind


def _around(original, *args, **kwargs):  # type: ignore[no-untyped-def]
    return original(*args, **kwargs) * 10


@pytest.fixture
def registry() -> Iterator[type]:
    """SGLang's hook registry, empty, and as it was afterwards."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    saved = dict(HookRegistry._hooks), set(HookRegistry._patched)
    HookRegistry.reset()
    yield HookRegistry
    HookRegistry.reset()
    HookRegistry._hooks.update(saved[0])
    HookRegistry._patched.update(saved[1])


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with something to hook, new each time: the registry also patches names that refer to it."""

    def sample(value: int) -> int:
        return value + 1

    class Target:
        def method(self, value: int) -> int:
            return value

    made = types.ModuleType("hooked_module")
    made.sample = sample  # type: ignore[attr-defined]
    made.Target = Target  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hooked_module", made)
    return made


def _hook(target: str, kind: Kind = Kind.AROUND, **more: str) -> Hook:
    return Hook(target, kind, f"{__name__}:_around", Feature.FLAGS, "test", **more)


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=lambda hook: hook.target)
def test_every_row_resolves_on_the_installed_sglang(hook: Hook) -> None:
    if hook.feature in (Feature.RAY, Feature.RAY_RANK):
        pytest.importorskip("ray")
    assert pkgutil.resolve_name(hook.target) is not None
    replacement = pkgutil.resolve_name(hook.replacement)
    assert callable(replacement)
    assert isinstance(replacement, type) == (hook.kind is Kind.REPLACE and inspect.isclass(replacement))


def test_targets_are_hooked_once() -> None:
    targets = [hook.target for hook in hooks.HOOKS]
    assert len(targets) == len(set(targets)), "SGLang applies hooks to a target once"
    assert {hook.feature for hook in hooks.HOOKS} >= {Feature.FLAGS, Feature.MARKS, Feature.LLM42_SERVER}


def test_hooks_are_put_in_place(registry: type, module: types.ModuleType) -> None:
    hooks.install_hooks([_hook("hooked_module.sample"), _hook("hooked_module.Target.method")])
    assert module.sample(1) == 20
    assert module.Target().method(3) == 30


def test_renamed_target_is_named(registry: type, module: types.ModuleType) -> None:
    with pytest.raises(hooks.HookError, match=r"hooked_module\.renamed"):
        hooks.install_hooks([_hook("hooked_module.sample"), _hook("hooked_module.renamed")])


def test_target_of_another_plugin_is_named(registry: type, module: types.ModuleType) -> None:
    hooks.install_hooks([_hook("hooked_module.sample")])
    with pytest.raises(hooks.HookError, match=r"hooked_module\.sample was already patched"):
        hooks.install_hooks([_hook("hooked_module.sample")])


def test_hook_undone_by_another_plugin_is_noticed(
    registry: type, module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "apply_hooks", lambda: None)
    with pytest.raises(hooks.HookError, match=r"hooked_module\.sample \(present, but"):
        hooks.install_hooks([_hook("hooked_module.sample")])


def test_hook_undone_later_is_noticed(
    registry: type, module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [_hook("hooked_module.sample"), _hook("hooked_module.Target.method")]
    monkeypatch.setattr(hooks, "HOOKS", tuple(rows))
    hooks.install_hooks(rows)
    hooks.check(Feature.FLAGS)
    module.Target.method = module.Target.method.__wrapped__
    with pytest.raises(hooks.HookError, match=r"hooks of flags .*Target\.method \(present, but"):
        hooks.check(Feature.FLAGS)
    hooks.check(Feature.RAY)  # has no rows here


def test_row_of_an_absent_module_is_left_out(registry: type, module: types.ModuleType) -> None:
    hooks.install_hooks([_hook("no_such_module.function", if_imported="no_such_module")])
    with pytest.raises(hooks.HookError, match=r"hooked_module\.renamed"):
        hooks.install_hooks([_hook("hooked_module.renamed", if_imported="hooked_module")])


def test_another_sglang_version_gives_one_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "sglang_version", lambda: "0.6.0")
    monkeypatch.setattr(hooks, "install_hooks", lambda rows: pytest.fail("SGLang was touched"))
    plugin.register()
    (record,) = caplog.records
    assert "0.6.0" in record.message and "0.5.17" in record.message and "\n" not in record.message
    with pytest.raises(hooks.HookError, match=r"0\.6\.0"):
        hooks.install.__wrapped__(Feature.LLM42)


class _Arguments:
    def __init__(self, enable_llm42: bool) -> None:
        self.enable_llm42 = enable_llm42


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Feature]:
    """Features that would have been installed."""
    features: list[Feature] = []
    monkeypatch.setattr(hooks, "install", features.append)
    monkeypatch.setattr(plugin, "install_platform", lambda: None)
    return features


@pytest.mark.parametrize(
    ("role", "enabled", "expected"),
    [
        ("scheduler", True, [Feature.LLM42]),
        ("scheduler", False, []),
        ("tokenizer", True, [Feature.MARKS, Feature.LLM42_SERVER]),
        ("tokenizer", False, [Feature.MARKS]),
        ("dp_controller", True, []),
    ],
)
def test_processes_get_the_features_of_their_role(
    installed: list[Feature], role: str, enabled: bool, expected: list[Feature]
) -> None:
    activation.before_publish(_Arguments(enabled), role=role)  # type: ignore[arg-type]
    assert installed == expected


def test_missing_hook_stops_a_server_with_the_flag_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(feature: Feature) -> None:
        raise hooks.HookError(f"no {feature}")

    monkeypatch.setattr(hooks, "install", missing)
    monkeypatch.setattr(plugin, "install_platform", lambda: None)
    for role in ("scheduler", "tokenizer"):
        with pytest.raises(hooks.HookError):
            activation.before_publish(_Arguments(True), role=role)  # type: ignore[arg-type]
        activation.before_publish(_Arguments(False), role=role)  # type: ignore[arg-type]
