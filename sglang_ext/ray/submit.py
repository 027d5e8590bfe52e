"""``python -m sglang_ext.ray.submit``: the server as a Ray job.

    python -m sglang_ext.ray.submit [OPTIONS] -- --model-path ... --nnodes 2 --tp-size 16 ...

What stands behind ``--`` is the command line of ``sglang_ext.launch_server``; ``--use-ray`` is added. The
same by hand: ``ray job submit -- python -m sglang_ext.launch_server --use-ray ...``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_ext.ray.environment import handed_on
from sglang_ext.ray.requirements import NOT_INSTALLED, ray_is_installed
from sglang_ext.ray.status import refuse

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PROGRAM = "sglang_ext.ray.submit"

#: Ray's own default: its dashboard, which takes jobs, listens on loopback of the head node.
DASHBOARD = "http://127.0.0.1:8265"

USE_RAY = "--use-ray"

#: Flags whose value must not stand in a job's command line, which everybody with the dashboard can read.
SECRET_FLAGS = ("--api-key", "--admin-api-key")


def main(argv: Sequence[str] | None = None) -> int:
    """Submit a job, follow its output, and return 0 if it succeeded (or, with --no-wait, was taken)."""
    options, server_flags = parse(sys.argv[1:] if argv is None else argv)
    if not ray_is_installed():
        return refuse(PROGRAM, NOT_INSTALLED)
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(options.dashboard)
        job = client.submit_job(**request(options, server_flags))
    except (ConnectionError, RuntimeError, ValueError) as error:
        return refuse(PROGRAM, f"--dashboard {options.dashboard}: {error}")
    print(f"{PROGRAM}: job {job}; end it with: ray job stop --address {options.dashboard} {job}", flush=True)
    return 0 if options.no_wait else follow(client, job)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the server's flags behind ``--``.

    Raises:
        SystemExit: an option is wrong (status 2); the message names it.
    """
    parser = argparse.ArgumentParser(PROGRAM, usage="%(prog)s [OPTIONS] -- FLAGS OF sglang_ext.launch_server")
    parser.add_argument("--dashboard", default=os.environ.get("RAY_API_SERVER_ADDRESS", DASHBOARD))
    parser.add_argument("--submission-id", help="name of the job (default: Ray makes one)")
    parser.add_argument("--working-dir", help="folder that Ray copies to the job's node")
    parser.add_argument("--python", default="python", help="on the nodes (default: %(default)s)")
    parser.add_argument(
        "--entrypoint-resources",
        type=_resources,
        metavar="JSON",
        help="where the HTTP server and rank 0 run, such as '{\"accelerator_type:H100\": 0.001}' (default: "
        "the head node, which must then have room for rank 0)",
    )
    parser.add_argument("--no-wait", action="store_true", help="return once the job is taken")
    own, behind = _split(argv)
    options = parser.parse_args(own)
    if not behind:
        parser.error("give the server's flags behind --")
    for flag in behind:
        if flag.partition("=")[0] in SECRET_FLAGS:
            parser.error(
                f"{flag.partition('=')[0]}: Ray shows a job's command line to everybody who reaches its "
                "dashboard; put the flag into a YAML file on the node and give --config"
            )
    return options, [*behind] if USE_RAY in behind else [USE_RAY, *behind]


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return list(argv), []
    at = list(argv).index("--")
    return list(argv[:at]), list(argv[at + 1 :])


def _resources(text: str) -> dict[str, float]:
    try:
        return {str(name): float(amount) for name, amount in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object of numbers") from error


def request(options: argparse.Namespace, server_flags: Sequence[str]) -> dict[str, Any]:
    """Arguments of Ray's ``submit_job``."""
    runtime_env: dict[str, Any] = {"env_vars": handed_on(os.environ)}
    if options.working_dir is not None:
        runtime_env["working_dir"] = options.working_dir
    return {
        "entrypoint": shlex.join([options.python, "-m", "sglang_ext.launch_server", *server_flags]),
        "submission_id": options.submission_id,
        "runtime_env": runtime_env,
        "entrypoint_resources": options.entrypoint_resources,
    }


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print the job's output until it ends; Ctrl-C stops the job."""
    try:
        asyncio.run(_print_logs(client, job))
    except KeyboardInterrupt:
        client.stop_job(job)
        return 130
    status = client.get_job_info(job)
    print(f"{PROGRAM}: job {job} {status.status}: {status.message}", flush=True)
    return 0 if status.status == "SUCCEEDED" else 1


async def _print_logs(client: JobSubmissionClient, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
