"""A process for each tensor-parallel rank.

A module of its own: new processes do not load a package's ``__main__`` again and would not find in it what
they are to run.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from sglang_ext.doctor.certify import CertificationError
from sglang_ext.doctor.report import Certificate

if TYPE_CHECKING:
    from sglang.srt.server_args import PortArgs

    from sglang_ext.server_args import ServerArgs


def run(server_args: ServerArgs, port_args: PortArgs, quick: bool) -> Certificate:
    """Certify ``server_args`` in a process per tensor-parallel rank.

    Raises:
        CertificationError: a process ended without a result; its own message stands on standard error.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    ranks = [
        context.Process(
            target=_run_rank,
            args=(server_args, port_args, rank, quick, sender if rank == 0 else None),
            daemon=True,
        )
        for rank in range(server_args.tp_size)
    ]
    for rank in ranks:
        rank.start()
    sender.close()
    try:
        certificate: Certificate = receiver.recv()
    except EOFError:
        raise CertificationError("a tensor-parallel rank ended without a result, see above") from None
    finally:
        for rank in ranks:
            rank.join(timeout=30)
            rank.kill()
    return certificate


def _run_rank(
    server_args: ServerArgs, port_args: PortArgs, rank: int, quick: bool, result: Connection | None
) -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils import kill_itself_when_parent_died

    from sglang_ext.doctor.worker import certify_configuration

    kill_itself_when_parent_died()
    load_plugins()
    certificate = certify_configuration(server_args, port_args, rank, quick)
    if result is not None:
        result.send(certificate)
