"""``python -m sglang_ext.launch_server``: SGLang's server with every flag of SGLang and ours.

The same flags work with ``python -m sglang.launch_server`` and ``sglang serve``, which load this package as a
plugin. This launcher adds short messages for wrong arguments, the demo model, and does not start without the
plugin.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from sglang_ext import hooks
from sglang_ext.ray import requirements as ray_requirements
from sglang_ext.ray import serve as ray_serve

if TYPE_CHECKING:
    from sglang_ext.server_args import ServerArgs

PROGRAM = "sglang_ext.launch_server"

#: Value of ``--model`` that stands for the demo model (``./smollm2`` is a local folder of that name).
DEMO_MODEL = "smollm2"

MODEL_FLAGS = ("--model", "--model-path")
NAME_FLAG = "--served-model-name"

EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv`` (the command line's by default), then serve until interrupted.

    Returns:
        The exit status: 2 with one line on standard error where the arguments are wrong or SGLang's version
        is not supported; those of sglang_ext.ray.status with --use-ray.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if ray_serve.wants_supervisor(arguments):
        ray_serve.become_supervisor(ray_serve.max_restarts_in(arguments), arguments)
    if reason := hooks.unsupported_version_reason():
        return _refuse(reason)
    try:
        server_args = parse(arguments)
    except (hooks.HookError, ValueError, OSError) as error:
        return _refuse(str(error))
    if server_args.use_ray:
        return ray_serve.serve(PROGRAM, server_args, arguments)
    _serve(server_args)
    return 0


def parse(arguments: Sequence[str]) -> ServerArgs:
    """Server arguments from a command line, with SGLang's plugins loaded.

    Raises:
        HookError: our flags cannot be put in place.
        ValueError: an argument is refused, the message names it; or the demo model cannot be made.
        OSError: the model cannot be read.
        SystemExit: ``--help``, or an argument that argparse refuses (status 2).
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    hooks.install(hooks.Feature.FLAGS)  # where the package is not installed but only on the path
    from sglang.srt.server_args import prepare_server_args

    with _errors_without_usage():
        server_args = prepare_server_args(with_demo_model(arguments))
    _check_ray(server_args)
    return server_args


def _check_ray(server_args: ServerArgs) -> None:
    wrong = ray_requirements.needing_ray(server_args)
    if server_args.use_ray:
        wrong += ray_requirements.unsupported(server_args)
    if wrong:
        raise ValueError(" ".join(wrong))


def with_demo_model(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the demo model's name replaced by its folder, which is made on first use."""
    replaced = list(arguments)
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in MODEL_FLAGS:
            continue
        if equals and value == DEMO_MODEL:
            replaced[index] = f"{flag}={_demo_model_folder()}"
        elif not equals and list(arguments[index + 1 : index + 2]) == [DEMO_MODEL]:
            replaced[index + 1] = _demo_model_folder()
    named = any(argument.partition("=")[0] == NAME_FLAG for argument in arguments)
    if replaced != list(arguments) and not named:
        replaced += [NAME_FLAG, DEMO_MODEL]
    return replaced


def _demo_model_folder() -> str:
    from sglang_ext import demo_model

    try:
        return str(demo_model.resolve(DEMO_MODEL))
    except demo_model.FolderError as error:
        raise ValueError(f"--model {DEMO_MODEL}: {error}") from error


@contextmanager
def _errors_without_usage() -> Iterator[None]:
    """Let argparse name the wrong argument only: the usage of SGLang's server is hundreds of lines long."""

    def error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        parser.exit(EXIT_USAGE, f"{PROGRAM}: {message}\n")

    original = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = original  # type: ignore[method-assign]


def _serve(server_args: ServerArgs) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    # Until SGLang's own handler is in place, SIGTERM would end this process without the lines below.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _refuse(reason: str) -> int:
    print(f"{PROGRAM}: {reason}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
