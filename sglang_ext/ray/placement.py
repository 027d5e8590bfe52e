"""Room for the ranks: which resources on which nodes, as a Ray placement group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang_ext.ray.requirements import world_size

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from sglang_ext.ray.requirements import RaySettings

#: Share of a node's own resource, which Ray calls ``node:ADDRESS``, that ties a bundle to the node.
NODE_SHARE = 0.001


class PlacementError(RuntimeError):
    """The cluster has no room for the server; the message says what is needed and what there is."""


def bundle(ranks: int, device: str) -> dict[str, float]:
    """Resources of one node's ranks: a GPU each, or on CPU nodes a core each."""
    if device == "cpu":
        return {"CPU": float(ranks)}
    return {"CPU": 1.0, "GPU": float(ranks)}


def bundles(ranks: int, nnodes: int, device: str, own_node: str) -> list[dict[str, float]]:
    """Resources of every node, the first of them on the HTTP server's node, where rank 0 must be.

    Args:
        ranks: of the whole server.
        nnodes: nodes, each with the same number of ranks.
        device: SGLang's name of the device.
        own_node: address of the HTTP server's node.
    """
    each = [bundle(ranks // nnodes, device) for _ in range(nnodes)]
    each[0][f"node:{own_node}"] = NODE_SHARE
    return each


def why_not_fitting(specs: Sequence[Mapping[str, float]], ranks: int, nnodes: int, device: str) -> str | None:
    """Why a placement group with these bundles does not fit the server, None if it does."""
    if len(specs) < nnodes:
        return f"it has {len(specs)} bundles and --nnodes is {nnodes}"
    for index, spec in enumerate(specs[:nnodes]):
        for name, amount in bundle(ranks // nnodes, device).items():
            if (name != "CPU" or device == "cpu") and spec.get(name, 0) < amount:
                return f"bundle {index} has {spec.get(name, 0):g} {name} and needs {amount:g}"
    return None


def reserve(server_args: Any, settings: RaySettings) -> tuple[PlacementGroup, bool]:
    """The placement group to run in: the named one, the one that this process runs in, or a new one.

    Returns:
        The group, and whether it is new and therefore ours to remove.

    Raises:
        PlacementError: the named group does not exist or does not fit, or there is no room in time.
    """
    import ray

    ranks, nnodes, device = world_size(server_args), server_args.nnodes, server_args.device
    group: PlacementGroup | None
    if settings.placement_group is not None:
        group, source = _named(settings.placement_group), f"--ray-placement-group {settings.placement_group}"
    else:
        group, source = ray.util.get_current_placement_group(), "the placement group of this Ray task"
    if group is None:
        return _make(ranks, nnodes, device, settings.start_timeout), True
    if reason := why_not_fitting(group.bundle_specs, ranks, nnodes, device):
        raise PlacementError(f"{source}: {reason}.")
    if not group.wait(settings.start_timeout):
        raise PlacementError(f"{source} is not ready after {settings.start_timeout:g} s.{_inventory()}")
    return group, False


def _named(name: str) -> PlacementGroup:
    import ray

    try:
        return ray.util.get_placement_group(name)
    except ValueError as error:
        raise PlacementError(
            f"--ray-placement-group {name}: there is none of that name in this Ray namespace "
            "(--ray-namespace)."
        ) from error


def _make(ranks: int, nnodes: int, device: str, timeout: float) -> PlacementGroup:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    own_node = ray.util.get_node_ip_address()
    wanted = bundles(ranks, nnodes, device, own_node)
    group = placement_group(wanted, strategy="STRICT_PACK" if nnodes == 1 else "STRICT_SPREAD")
    try:
        if group.wait(timeout):
            return group
    except BaseException:
        remove_placement_group(group)
        raise
    remove_placement_group(group)
    each = " and ".join(f"{amount:g} {name}" for name, amount in bundle(ranks // nnodes, device).items())
    raise PlacementError(
        f"--nnodes {nnodes}: no room within --ray-start-timeout {timeout:g} s. Needed: {nnodes} node(s) with "
        f"{each} free, one of them {own_node}, where the HTTP server runs.{_inventory()}"
    )


def _inventory() -> str:
    """What the cluster has, in words."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    listed = "; ".join(
        f"{node['NodeManagerAddress']}: "
        + ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        for node in alive
    )
    free = ray.available_resources()
    unused = ", ".join(f"{free.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    return f" The cluster has {len(alive)} node(s) ({listed}), of which {unused} are free."
