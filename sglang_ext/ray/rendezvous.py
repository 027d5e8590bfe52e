"""Where the ranks of a server meet: PyTorch's store, on one address instead of all interfaces."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

#: Connections that may wait to be accepted: all ranks come at once.
BACKLOG = 2048


def create_store(
    original: Callable[..., Any],
    hostname: str,
    port: int,
    rank: int,
    world_size: int,
    timeout: timedelta,
    use_libuv: bool = True,
) -> Any:
    """Around ``_create_c10d_store``: rank 0's store listens on ``hostname`` only.

    PyTorch's own listens on all interfaces, and whoever reaches a store can read and write it.
    """
    if rank != 0:
        return original(hostname, port, rank, world_size, timeout, use_libuv)
    from torch.distributed import TCPStore

    listener = listen(hostname, port)
    return TCPStore(
        host_name=hostname,
        port=port,
        world_size=world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listener.detach(),  # the store closes it
        use_libuv=use_libuv,
    )


def listen(hostname: str, port: int) -> socket.socket:
    """A socket that listens on one address.

    Raises:
        OSError: the address is not of this host, or the port is taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
