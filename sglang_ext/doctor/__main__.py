"""``python -m sglang_ext.doctor``: certify that a model and an engine configuration are row-invariant.

Takes every flag of the server, with the same meaning, and two of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_ext import hooks, launch_server
from sglang_ext.doctor import probes
from sglang_ext.doctor.certify import CertificationError
from sglang_ext.doctor.fingerprint import RankMismatch
from sglang_ext.doctor.report import Certificate
from sglang_ext.doctor.workspace import slots_needed
from sglang_ext.llm42 import requirements

if TYPE_CHECKING:
    from sglang_ext.server_args import ServerArgs

PROGRAM = "sglang_ext.doctor"

EXIT_OK, EXIT_FAILS, EXIT_USAGE = 0, 1, 2

#: Requests of a run without --max-running-requests.
DEFAULT_REQUESTS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Certify the configuration of a command line and print the report.

    Returns:
        0 if every row has the same bits wherever it stands, 1 if not, 2 for wrong arguments.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if reason := hooks.unsupported_version_reason():
        return _refuse(reason)
    ours, rest = _parser().parse_known_args(arguments)
    try:
        server_args = launch_server.parse(with_small_pools(rest))
        _check(server_args)
        certificate = run(server_args, ours.quick)
    except (hooks.HookError, ValueError, OSError, NotImplementedError) as error:
        return _refuse(str(error))
    except (CertificationError, RankMismatch) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return EXIT_FAILS
    certificate = with_unsupported(certificate, server_args)
    print(certificate.as_table(), end="")
    if ours.json is not None:
        ours.json.write_text(certificate.as_json())
    return EXIT_OK if certificate.passed else EXIT_FAILS


def run(server_args: ServerArgs, quick: bool) -> Certificate:
    """Certify ``server_args``, in a process per tensor-parallel rank if there are several.

    Raises:
        CertificationError: the memory pools are too small, or a process ended without a result; its own
            message stands on standard error.
        RankMismatch: the ranks computed different logits.
    """
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.server_args import PortArgs

    from sglang_ext.doctor import ranks
    from sglang_ext.doctor.worker import certify_configuration

    _set_envs_and_config(server_args)
    port_args = PortArgs.init_new(server_args)
    if server_args.tp_size == 1:
        return certify_configuration(server_args, port_args, 0, quick)
    return ranks.run(server_args, port_args, quick)


def with_unsupported(certificate: Certificate, server_args: ServerArgs) -> Certificate:
    """The certificate with a note for everything that ``--enable-llm42`` would refuse anyway."""
    refused = requirements.unsupported(server_args) + requirements.unsupported_model(server_args)
    return dataclasses.replace(certificate, notes=(*certificate.notes, *refused))


def _check(server_args: ServerArgs) -> None:
    for flag, value in (("--dp-size", server_args.dp_size), ("--pp-size", server_args.pp_size)):
        if value > 1:
            raise ValueError(f"{flag} must be 1: one replica on one pipeline stage is certified.")
    if server_args.nnodes > 1:
        raise ValueError("--nnodes must be 1: the certification starts its processes on this machine.")


def with_small_pools(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with memory for the probes only, unless they say how much."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--llm42-window-size", type=int, default=64)
    parser.add_argument("--llm42-verify-batch-size", type=int, default=8)
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--max-running-requests")
    parser.add_argument("--max-total-tokens")
    known, _ = parser.parse_known_args(arguments)
    segments, rows, page = known.llm42_verify_batch_size, known.llm42_window_size, known.page_size
    if segments < 1 or rows < 1 or page < 1:
        return list(arguments)  # refused by the server's own parser, with its message
    added = []
    if known.max_running_requests is None:
        added += ["--max-running-requests", str(max(DEFAULT_REQUESTS, segments))]
    if known.max_total_tokens is None:
        tokens = slots_needed(segments, rows, probes.full_length(segments, rows), page)
        added += ["--max-total-tokens", str(tokens + 2 * page)]
    return [*arguments, *added]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Certify that rows of canonical passes have the same bits wherever they stand. Other "
        "flags are those of the server (python -m sglang_ext.launch_server --help).",
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="what a server checks at start, and no more")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the report to PATH as JSON")
    return parser


def _refuse(reason: str) -> int:
    print(f"{PROGRAM}: {reason}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
