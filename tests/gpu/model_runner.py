"""SGLang's model runner on one GPU, without an engine around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def small_runner(model: Path) -> Iterator[Any]:
    """The runner of ``model`` with few KV slots and FlashInfer, this package's hooks in place."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs

    from sglang_ext import launch_server, plugin
    from sglang_ext.doctor import worker

    load_plugins()
    plugin.register()
    flags = (
        "--skip-tokenizer-init --attention-backend flashinfer --max-total-tokens 8192 --context-length 1024"
    )
    arguments = ["--model", str(model), "--max-running-requests", "16", "--mem-fraction-static", "0.1"]
    server_args = launch_server.parse([*arguments, *flags.split()])
    yield worker.load(server_args, PortArgs.init_new(server_args), 0)
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
