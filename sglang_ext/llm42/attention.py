"""Which attention the canonical pass uses on which device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_ext.llm42 import requirements

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_ext.llm42.canonical_pass import AttentionFactory


def canonical_attention_factory(model_runner: ModelRunner) -> AttentionFactory:
    """The row-invariant attention for ``model_runner``.

    Raises:
        NotImplementedError: there is none for this device or this GPU yet.
    """
    if model_runner.device == "cpu":
        from sglang_ext.cpu.backend import CanonicalCpuAttnBackend

        return CanonicalCpuAttnBackend
    if model_runner.device == "cuda":
        _refuse(gpu())
        from sglang_ext.llm42.flashinfer_attention import CanonicalFlashInferBackend

        return CanonicalFlashInferBackend
    raise NotImplementedError(
        f"--enable-llm42 has no row-invariant attention for device {model_runner.device!r}; "
        "it runs with --device cpu or cuda"
    )


def gpu(index: int | None = None) -> requirements.Gpu | None:
    """The GPU of that index (by default the current one); None if there is none in this machine.

    A server on Ray may be started from a machine without GPUs.
    """
    if (index or 0) >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(index)
    return requirements.Gpu(
        properties.name, (properties.major, properties.minor), rocm=torch.version.hip is not None
    )


def _refuse(found: requirements.Gpu | None) -> None:
    """On every rank: the server's arguments were checked against one GPU of one node."""
    if found is not None and (reasons := requirements.unsupported_gpu(found)):
        raise NotImplementedError(" ".join(reasons))
