"""Ranks meet at a store that listens on one address only."""

from __future__ import annotations

import importlib
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from sglang_ext.ray import rendezvous

TIMEOUT = timedelta(seconds=20)


@pytest.mark.parametrize("use_libuv", [True, False])
def test_the_store_serves_its_address_and_no_other(use_libuv: bool) -> None:
    original = importlib.import_module("torch.distributed.rendezvous")._create_c10d_store
    with rendezvous.listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:  # each waits for the other
        futures = [
            pool.submit(rendezvous.create_store, original, "127.0.0.1", port, rank, 2, TIMEOUT, use_libuv)
            for rank in range(2)
        ]
        first, second = [future.result() for future in futures]
    first.set("a", "b")
    assert second.get("a") == b"b"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_an_address_of_another_host_is_an_error() -> None:
    with pytest.raises(OSError):
        rendezvous.listen("192.0.2.77", 0)
