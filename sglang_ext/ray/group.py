"""The ranks of one server: room for them, their actors, whether they agree, and their end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sglang_ext.ray import agreement, cluster, environment, placement
from sglang_ext.ray.rank import SchedulerActor, packages
from sglang_ext.ray.requirements import RaySettings

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(__name__)

#: Seconds in which ranks that are up must report.
REPORT_TIMEOUT_S = 120.0

#: Seconds in which a rank that still lives answers.
ANSWER_TIMEOUT_S = 2.0

#: Name of the HTTP server or engine among the ranks, in messages.
SERVER = "the server's process"


class StartError(RuntimeError):
    """The ranks of the server did not come up; the message says why."""


class Group:
    """Ranks of one server, and the placement group that they run in.

    Attributes:
        server_args: of the server.
        settings: our flags of ``--use-ray``.
        actors: Ray's handles, by rank.
        block_until_lost: returns when a rank has ended, set once all are up.
    """

    def __init__(self, server_args: Any) -> None:
        self.server_args = server_args
        self.settings = RaySettings.from_server_args(server_args)
        self.placement_group: PlacementGroup | None = None
        self.actors: dict[str, Any] = {}
        self.block_until_lost: Callable[[], None] = lambda: None
        self._reports: dict[str, Any] = {}
        self._owns_placement_group = False
        self._out_of_time = False

    # Start

    def reserve(self) -> None:
        """Find or make room for all ranks.

        Raises:
            PlacementError: there is none.
        """
        self.placement_group, self._owns_placement_group = placement.reserve(self.server_args, self.settings)

    def add(self, rank: str, name: str, bundle: int, arguments: dict[str, Any]) -> Any:
        """Create the actor of one rank.

        Args:
            rank: such as ``dp0 pp0 tp1``.
            name: of the actor, in Ray's lists.
            bundle: of the placement group.
            arguments: of SGLang's actor.

        Returns:
            Ray's handle.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self.placement_group is not None, "reserve() comes first"
        on_cpu = self.server_args.device == "cpu"
        strategy = PlacementGroupSchedulingStrategy(self.placement_group, placement_group_bundle_index=bundle)
        actor_class: Any = ray.remote(SchedulerActor)
        actor = actor_class.options(
            num_cpus=0,
            num_gpus=0 if on_cpu else 1,
            name=name,
            max_restarts=0,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": self._variables(on_cpu)},
        ).remote(**arguments)
        self.actors[rank] = actor
        self._reports[rank] = actor.report.remote()
        return actor

    def _variables(self, on_cpu: bool) -> dict[str, str]:
        import torch

        variables = environment.handed_on(os.environ, self.settings.env)
        if on_cpu:
            # Ray would set 1, and the number of threads changes the bits of matrix products.
            return {"OMP_NUM_THREADS": str(torch.get_num_threads()), **variables}
        return {**environment.KEEP_ALL_GPUS, **variables}

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """End the ranks, so that the wait for them ends, when ``--ray-start-timeout`` has passed."""

        def end() -> None:
            self._out_of_time = True
            self.kill()

        timer = threading.Timer(self.settings.start_timeout, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def check(self) -> None:
        """Compare the ranks with each other and with this process.

        Raises:
            Disagreement: they differ.
        """
        import ray

        answers: list[dict[str, Any]] = ray.get([*self._reports.values()], timeout=REPORT_TIMEOUT_S)
        reports = dict(zip(self._reports, answers, strict=True))
        named = {f"{rank} ({report.pop('node')})": report for rank, report in reports.items()}
        agreement.require(named, "ranks")
        first = next(iter(named))
        agreement.require(
            {SERVER: {"packages": packages()}, first: {"packages": named[first]["packages"]}},
            "processes",
        )
        logger.info("%d ranks agree: %s", len(named), ", ".join(named))

    def why_not_started(self, error: BaseException) -> str:
        """What to tell whoever started the server."""
        if self._out_of_time:
            seconds = self.settings.start_timeout
            return f"the ranks were not ready within --ray-start-timeout {seconds:g} s."
        if "No module named 'sglang_ext'" in str(error):
            return (
                "sglang_ext is not installed on a node of the cluster: all nodes need the same environment."
            )
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__

    # End

    def lost_ranks(self) -> list[str]:
        """Ranks whose process or node is gone."""
        import ray

        answers = {actor.get_info.remote(): rank for rank, actor in self.actors.items()}
        done, _ = ray.wait([*answers], num_returns=len(answers), timeout=ANSWER_TIMEOUT_S)
        lost = []
        for answer in done:
            try:
                ray.get(answer)
            except ray.exceptions.RayError:
                lost.append(answers[answer])
        return sorted(lost)

    def kill(self) -> None:
        """End the processes of all ranks."""
        import ray

        for rank, actor in self.actors.items():
            try:
                ray.kill(actor)
            except Exception:
                logger.exception("Rank %s could not be ended; Ray does when this process ends", rank)

    def close(self) -> None:
        """End all ranks and give their room back; a second call does nothing."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():
            return
        self.kill()
        self.actors.clear()
        if self._owns_placement_group and self.placement_group is not None:
            with suppress(ray.exceptions.RayError):
                remove_placement_group(self.placement_group)
        self.placement_group = None


_current: Group | None = None


def current() -> Group | None:
    """The group of this process, None where none runs."""
    return _current


def close_current() -> None:
    """Close the group of this process, if there is one."""
    global _current
    group, _current = _current, None
    if group is not None:
        group.close()


# Hooks


def launch_scheduler_processes(
    original: Callable[..., tuple[Any, None]], engine: type, server_args: Any, *args: Any, **kwargs: Any
) -> tuple[Any, None]:
    """Around ``RayEngine._launch_scheduler_processes``: in bounded time all ranks, alike, or none.

    Raises:
        StartError: saying why there is no server.
    """
    global _current
    cluster.connect(RaySettings.from_server_args(server_args), server_args.nnodes)
    group = _current = Group(server_args)
    try:
        if getattr(server_args, "placement_group", None) is None:
            group.reserve()
        else:
            group.placement_group = server_args.placement_group
        with group.deadline():
            result, processes = original(engine, server_args, *args, **kwargs)
            group.check()
    except (placement.PlacementError, agreement.Disagreement) as error:
        close_current()
        raise StartError(str(error)) from error
    except Exception as error:
        logger.exception("The ranks did not start")
        close_current()
        raise StartError(group.why_not_started(error)) from error
    except BaseException:
        close_current()
        raise
    group.block_until_lost = result.block_until_scheduler_exits
    return result, processes


def create_scheduler_actor(
    pg: PlacementGroup,
    bundle_idx: int,
    gpu_id: int,
    server_args: Any,
    port_args: Any,
    tp_rank: int,
    pp_rank: int,
    dp_rank: int,
    dist_init_addr: str,
    rank0_node_ip: str,
) -> Any:
    """In place of ``sglang.srt.ray.engine._create_scheduler_actor``: the same arguments, our actor."""
    from sglang.srt.ray.engine import _compute_parallelism_ranks

    assert _current is not None, "ranks are created by launch_scheduler_processes"
    attn_cp_rank, moe_dp_rank, moe_ep_rank = _compute_parallelism_ranks(server_args, tp_rank)
    rank = f"dp{dp_rank} pp{pp_rank} tp{tp_rank}"
    return _current.add(
        rank,
        f"sglang_scheduler_{rank.replace(' ', '_')}_{pg.id.hex()[:8]}",
        bundle_idx,
        {
            "server_args": server_args,
            "port_args": port_args,
            "gpu_id": gpu_id,
            "tp_rank": tp_rank,
            "attn_cp_rank": attn_cp_rank,
            "moe_dp_rank": moe_dp_rank,
            "moe_ep_rank": moe_ep_rank,
            "pp_rank": pp_rank,
            "dp_rank": dp_rank,
            "dist_init_addr": dist_init_addr,
        },
    )


def current_placement_group(original: Callable[[], PlacementGroup | None]) -> PlacementGroup | None:
    """Around ``ray.util.get_current_placement_group``: while ranks are being started, theirs."""
    if _current is not None and _current.placement_group is not None:
        return _current.placement_group
    return original()


def after_shutdown(result: None, engine: Any) -> None:
    """After ``RayEngine.shutdown``: give the room back."""
    close_current()
