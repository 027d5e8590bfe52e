"""Which attention the canonical pass uses on which device."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_ext.llm42.canonical_pass import AttentionFactory


#: Rows of a block on a GPU, where attention computes neighbouring blocks of a request together.
GPU_BLOCK_ROWS = 8


def block_rows(device: str, window_size: int) -> int:
    """Rows of the blocks that segments of a canonical pass take, a divisor of ``window_size``.

    On a CPU attention reads the whole prefix anew for every block, so there a block is a window; so it is
    where an odd window would leave blocks of single rows.
    """
    rows = math.gcd(window_size, GPU_BLOCK_ROWS) if device == "cuda" else 1
    return rows if rows > 1 else window_size


def canonical_attention_factory(model_runner: ModelRunner) -> AttentionFactory:
    """The row-invariant attention for ``model_runner``.

    Raises:
        NotImplementedError: there is none for this device yet.
    """
    if model_runner.device == "cpu":
        from sglang_ext.cpu.backend import CanonicalCpuAttnBackend

        return CanonicalCpuAttnBackend
    if model_runner.device == "cuda":
        from sglang_ext.llm42.flashinfer_attention import CanonicalFlashInferBackend

        return CanonicalFlashInferBackend
    raise NotImplementedError(
        f"--enable-llm42 has no row-invariant attention for device {model_runner.device!r}; "
        "it runs with --device cpu or cuda"
    )


def decode_attention_factory(model_runner: ModelRunner, window_size: int) -> AttentionFactory:
    """The same for canonical decode steps, which never run at the same time: on a GPU they share memory.

    Args:
        window_size: rows of a segment of the passes whose bits theirs are to be.

    Raises:
        NotImplementedError: there is none for this device yet.
    """
    if model_runner.device == "cpu":
        from sglang_ext.cpu.backend import CanonicalCpuAttnBackend

        return partial(CanonicalCpuAttnBackend, product_rows=window_size)
    if model_runner.device != "cuda":
        return canonical_attention_factory(model_runner)
    from sglang_ext.llm42.flashinfer_attention import CanonicalFlashInferBackend, Scratch

    scratch: Scratch | None = None

    def make(model_runner: ModelRunner, segments: int, rows: int) -> CanonicalFlashInferBackend:
        nonlocal scratch
        backend = CanonicalFlashInferBackend(model_runner, segments, rows, scratch)
        scratch = backend.scratch
        return backend

    return make
