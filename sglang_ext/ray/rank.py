"""A rank of the server in a Ray actor: SGLang's own actor, with our plugin in place and checked."""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang_ext import hooks
from sglang_ext.hook_types import Feature
from sglang_ext.llm42.observability import configuration
from sglang_ext.ray import environment

#: Server arguments that SGLang sets on some rank or replica only.
OF_A_RANK = ("dist_init_addr", "nccl_port")


class SchedulerActor:
    """One scheduler: rank ``dp_rank``, ``pp_rank``, ``tp_rank``.

    Args:
        arguments: of SGLang's ``SchedulerActor``.

    Raises:
        HookError: a hook of a feature that was asked for is not in place in this process.
    """

    def __init__(self, **arguments: Any) -> None:
        prepare_process()
        from sglang.srt.ray import scheduler_actor

        self._actor = _undecorated(scheduler_actor.SchedulerActor)(**arguments)
        self._features = _features_asked_for(self._actor.scheduler.server_args)
        for feature in self._features:
            hooks.check(feature)

    def get_info(self) -> dict[str, Any]:
        """What SGLang's engine asks a rank that is ready."""
        return dict(self._actor.get_info())

    def report(self) -> dict[str, Any]:
        """What this rank computes with; all ranks must say the same (:mod:`sglang_ext.ray.agreement`).

        Under ``node`` its node's address, which of course differs and is not compared.
        """
        import ray

        scheduler = self._actor.scheduler
        model_runner = scheduler.tp_worker.model_runner
        return {
            "node": ray.util.get_node_ip_address(),
            "packages": packages(),
            "features": [str(feature) for feature in self._features],
            "flags": _flags(scheduler.server_args),
            "environment": environment.compared(os.environ),
            "configuration": configuration.describe(scheduler.server_args, model_runner),
            "canonical_fingerprint": getattr(scheduler, "llm42_fingerprint", None),
        }

    def run_event_loop(self) -> None:
        """Serve until the process is ended."""
        self._actor.run_event_loop()


def prepare_process() -> None:
    """Load SGLang's plugins, which Ray actors do not do, and look whether ours is in place.

    Raises:
        HookError: it is not, or SGLang on this node is of another version.
    """
    from sglang.srt.plugins import load_plugins

    from sglang_ext.plugin import install_platform

    load_plugins()
    hooks.install(Feature.FLAGS)  # where the package is not installed but only on the path
    install_platform()
    hooks.install(Feature.RAY_RANK)


def packages() -> dict[str, str | None]:
    """Versions of Python and of what computes or carries tokens, in this process."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*configuration.PACKAGES, "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _undecorated(actor_class: Any) -> Any:
    """The class under ``@ray.remote``, which cannot be called in the actor's own process otherwise."""
    return actor_class.__ray_metadata__.modified_class


def _features_asked_for(server_args: Any) -> list[Feature]:
    features = [Feature.FLAGS, Feature.RAY_RANK]
    if server_args.enable_llm42:
        features.append(Feature.LLM42)
    if server_args.enable_tokenweave:
        features.append(Feature.TOKENWEAVE)
    return features


def _flags(server_args: Any) -> dict[str, str]:
    """Server arguments as they were resolved on this node."""
    return {
        field.name: repr(getattr(server_args, field.name, None))
        for field in dataclasses.fields(server_args)
        if field.name not in OF_A_RANK
    }
