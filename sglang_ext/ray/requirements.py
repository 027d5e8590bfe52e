"""Settings of ``--use-ray``, and what a server on Ray must not be started with."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

EXIT = "exit"
RESTART = "restart"

#: What the server does when a rank or a node is lost.
ON_FAILURE = (EXIT, RESTART)

NOT_INSTALLED = (
    "--use-ray needs Ray, which is not installed: pip install '/path/to/sglang_ext[ray]' (a checkout of this "
    "package, which is on no index), or pip install 'ray[default]'."
)

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class RaySettings:
    """Our flags of ``--use-ray``.

    Attributes:
        address: of the cluster; None means ``RAY_ADDRESS``, the cluster that runs on this machine, or, for a
            single node, a fresh one.
        namespace: Ray namespace to join; None means one of our own.
        placement_group: name of an existing placement group in that namespace.
        env: names of environment variables that ranks get beside the fixed list.
        start_timeout: seconds for the nodes to be found, and again for the ranks to be ready.
        on_failure: one of :data:`ON_FAILURE`.
        max_restarts: restarts in a row before the server gives up.
    """

    address: str | None = None
    namespace: str | None = None
    placement_group: str | None = None
    env: tuple[str, ...] = ()
    start_timeout: float = 1800.0
    on_failure: str = EXIT
    max_restarts: int = 3

    @classmethod
    def from_server_args(cls, args: Any) -> RaySettings:
        """Read from server arguments that :func:`nonsense` found no fault with."""
        return cls(
            address=args.ray_address,
            namespace=args.ray_namespace,
            placement_group=args.ray_placement_group,
            env=tuple(args.ray_env or ()),
            start_timeout=float(args.ray_start_timeout),
            on_failure=args.ray_on_failure,
            max_restarts=args.ray_max_restarts,
        )


def nonsense(args: Any) -> list[str]:
    """One sentence for each flag of ours whose value makes no sense."""
    settings = RaySettings.from_server_args(args) if _is_number(args.ray_start_timeout) else None
    if settings is None or settings.start_timeout <= 0:
        return [f"--ray-start-timeout must be a number of seconds above 0, not {args.ray_start_timeout!r}."]
    found = []
    if settings.on_failure not in ON_FAILURE:
        found.append(f"--ray-on-failure must be {' or '.join(ON_FAILURE)}, not {settings.on_failure!r}.")
    if not isinstance(settings.max_restarts, int) or settings.max_restarts < 1:
        found.append(f"--ray-max-restarts must be at least 1, not {settings.max_restarts!r}.")
    found += [
        f"--ray-env {name!r}: give names of environment variables, not values."
        for name in settings.env
        if not _VARIABLE.fullmatch(name)
    ]
    if (settings.address or "").startswith("ray://"):
        found.append(
            f"--ray-address {settings.address}: the server runs on a node of the cluster, not through Ray's "
            "client; start it there, or with python -m sglang_ext.ray.submit."
        )
    return found


def needing_ray(args: Any) -> list[str]:
    """One sentence for each flag of ours that was given without ``--use-ray``."""
    defaults = RaySettings()
    settings = RaySettings.from_server_args(args)
    if args.use_ray:
        return []
    return [
        f"--ray-{name.replace('_', '-')} needs --use-ray."
        for name in RaySettings.__dataclass_fields__
        if getattr(settings, name) != getattr(defaults, name)
    ]


def unsupported(args: Any) -> list[str]:
    """One sentence for each flag that cannot be used together with ``--use-ray``."""
    found = []
    if not ray_is_installed():
        found.append(NOT_INSTALLED)
    if args.node_rank != 0:
        found.append("--node-rank does not work with --use-ray: one command starts the ranks of all nodes.")
    if args.dist_init_addr:
        found.append("--dist-init-addr does not work with --use-ray: ranks meet on the HTTP server's node.")
    if args.base_gpu_id != 0 or args.gpu_id_step != 1:
        found.append("--base-gpu-id and --gpu-id-step do not work with --use-ray: Ray chooses the GPUs.")
    if args.tokenizer_worker_num > 1:
        found.append(
            "--tokenizer-worker-num > 1 does not work with --use-ray: requests in other processes would not "
            "learn that a rank is lost."
        )
    if args.encoder_only or args.smg_grpc_mode or args.grpc_mode:
        found.append("--use-ray serves HTTP only, not --encoder-only, --smg-grpc-mode or --grpc-mode.")
    return found + _sizes(args)


def _sizes(args: Any) -> list[str]:
    ranks = world_size(args)
    if args.nnodes < 1:
        return [f"--nnodes must be at least 1, not {args.nnodes}."]
    if ranks % args.nnodes:
        return [f"--nnodes {args.nnodes}: {ranks} ranks (--tp-size x --pp-size x --dp-size) do not divide."]
    group = args.tp_size * args.pp_size
    if group % args.nnodes:
        return [
            f"--nnodes {args.nnodes} does not divide the {group} ranks of a replica (--tp-size x --pp-size): "
            "each replica spans all nodes. For replicas on nodes of their own use sglang_ext.ray.replicas."
        ]
    return []


def world_size(args: Any) -> int:
    """Ranks of the server, each of them a Ray actor."""
    dp_size = 1 if args.enable_dp_attention else args.dp_size
    return int(dp_size * args.tp_size * args.pp_size)


def ray_is_installed() -> bool:
    """Whether Ray can be imported (the folder of this package does not count)."""
    return importlib.util.find_spec("ray") is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
