"""Which attention the canonical pass uses on which device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_ext.llm42.canonical_pass import AttentionFactory


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
