"""The rows of the hook table that let SGLang serve on Ray.

:attr:`Feature.RAY` in the process that starts the ranks (HTTP server or engine), :attr:`Feature.RAY_RANK` in
the Ray actors.
"""

from __future__ import annotations

from sglang_ext.hook_types import Feature, Hook, Kind

HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.ray.engine.RayEngine._launch_scheduler_processes",
        Kind.AROUND,
        "sglang_ext.ray.group:launch_scheduler_processes",
        Feature.RAY,
        "waits for ever for nodes and ranks, does not compare ranks, leaves actors behind when it fails",
    ),
    Hook(
        "sglang.srt.ray.engine._create_scheduler_actor",
        Kind.REPLACE,
        "sglang_ext.ray.group:create_scheduler_actor",
        Feature.RAY,
        "actors load no plugins, get no environment and demand a GPU on CPU nodes",
    ),
    Hook(
        "ray.util.get_current_placement_group",
        Kind.AROUND,
        "sglang_ext.ray.group:current_placement_group",
        Feature.RAY,
        "where SGLang's engine looks for a placement group before it makes its own, unbounded one",
    ),
    Hook(
        "sglang.srt.ray.engine.RayEngine.shutdown",
        Kind.AFTER,
        "sglang_ext.ray.group:after_shutdown",
        Feature.RAY,
        "leaves the placement group",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.set_startup_time",
        Kind.AFTER,
        "sglang_ext.ray.watch:start",
        Feature.RAY,
        "called once all ranks are up: from here on a lost rank must end the requests in flight",
    ),
    Hook(
        "ray.runtime_context.RuntimeContext.get_accelerator_ids",
        Kind.AFTER,
        "sglang_ext.ray.devices:as_ordinals",
        Feature.RAY_RANK,
        "SchedulerActor takes Ray's id of a GPU for its ordinal",
    ),
    Hook(
        "torch.cuda.set_device",
        Kind.AROUND,
        "sglang_ext.ray.devices:set_device",
        Feature.RAY_RANK,
        "SchedulerActor sets a CUDA device on CPU nodes, too",
    ),
    Hook(
        "torch.distributed.rendezvous._create_c10d_store",
        Kind.AROUND,
        "sglang_ext.ray.rendezvous:create_store",
        Feature.RAY_RANK,
        "the store where ranks meet listens on all interfaces",
    ),
)
