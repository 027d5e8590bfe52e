"""Joining a Ray cluster, or starting a fresh one on this machine."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_ext.ray.requirements import RaySettings

logger = logging.getLogger(__name__)

#: Variable with the address of the Ray node that a server belongs to. Where several nodes run on one machine,
#: Ray would connect it to the head or to any of them.
NODE_ADDRESS = "SGLANG_EXT_RAY_NODE_ADDRESS"

#: Of a fresh local cluster. Ranks talk through sockets and collectives, not through Ray's object store.
OBJECT_STORE_BYTES = 80 * 2**20


class ClusterError(RuntimeError):
    """There is no Ray cluster to run on; the message says what to start or which flag to give."""


def connect(settings: RaySettings, nnodes: int) -> None:
    """Make this process a driver of the cluster, unless it is one (a Ray job's task, a program with Ray).

    Without an address and without a cluster on this machine, one node gets a fresh cluster that listens on
    loopback only and ends with this process.

    Raises:
        ClusterError: naming ``--ray-address`` or ``--nnodes``.
    """
    import ray

    if ray.is_initialized():
        return
    address = settings.address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        ray.init(
            address=address,
            namespace=settings.namespace,
            logging_level=logging.WARNING,
            _node_ip_address=os.environ.get(NODE_ADDRESS),
        )
        return
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address != "auto":
            raise ClusterError(f"--ray-address {address}: {_first_line(error)}") from error
    if nnodes > 1:
        raise ClusterError(
            f"--nnodes {nnodes} needs a Ray cluster and none runs on this machine: start one (`ray start "
            "--head` here, `ray start --address=...` on the others) or give --ray-address."
        )
    logger.info("No Ray cluster on this machine: starting one for this server")
    _start_on_loopback(settings)


def _start_on_loopback(settings: RaySettings) -> None:
    """Start a cluster of this machine alone.

    Ray takes 127.0.0.1 for the address of a network interface, unless clusters are switched off as a whole:
    its switch for systems where it supports none, in this process and in those that it starts.
    """
    import ray
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(
        address="local",
        namespace=settings.namespace,
        logging_level=logging.WARNING,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )


def disconnect() -> None:
    """Leave the cluster; a fresh local one ends. Ray removes what this driver still owns."""
    import ray

    ray.shutdown()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
