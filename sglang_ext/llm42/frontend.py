"""Deterministic SGLang frontend programs (``@sgl.function``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglSamplingParams

from sglang_ext.llm42.server.marks import MARK_FIELD


@dataclasses.dataclass
class _MarkedSamplingParams(SglSamplingParams):
    """Sampling parameters of ``sgl.gen`` with what it has no argument for."""

    sampling_seed: int | None = None

    def to_srt_kwargs(self) -> dict[str, Any]:
        return {**super().to_srt_kwargs(), MARK_FIELD: True, "sampling_seed": self.sampling_seed}


class DeterministicEndpoint(RuntimeEndpoint):
    """A server as the backend of frontend programs that marks every ``sgl.gen``, or some, deterministic.

    ``sgl.set_default_backend(DeterministicEndpoint("http://localhost:30000", seed=1))`` marks all. With
    ``scope="deterministic"`` only what stands inside of ``with s.var_scope("deterministic"):`` is marked,
    forks made there included. ``sgl.select`` is answered by SGLang's log-probabilities of the prompt and is
    never marked.

    Forks with equal text give equal answers, as the seed is the same: let their prompts differ.

    Args:
        seed: seed of every marked generation; None means the server's default.
        scope: name of the ``var_scope`` whose generations are marked; None marks all.
        args, kwargs: as for ``RuntimeEndpoint``.
    """

    def __init__(self, *args: Any, seed: int | None = None, scope: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.scope = scope

    def generate(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> tuple[str, dict[str, Any]]:
        return super().generate(s, self._marked(s, sampling_params))

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        return super().generate_stream(s, self._marked(s, sampling_params))

    def _marked(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> SglSamplingParams:
        # A scope's variable is where its text begins until the scope ends, and then that text.
        if self.scope is not None and not isinstance(s.variables.get(self.scope), int):
            return sampling_params
        values = {f.name: getattr(sampling_params, f.name) for f in dataclasses.fields(SglSamplingParams)}
        return _MarkedSamplingParams(**values, sampling_seed=self.seed)
