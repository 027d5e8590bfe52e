"""Logits of chosen rows alone, of any of SGLang's models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ChosenRows:
    """Lets a model's logits processor see chosen rows of the last hidden states.

    Args:
        processor: SGLang's ``LogitsProcessor`` of the model.
    """

    def __init__(self, processor: torch.nn.Module) -> None:
        self._processor = processor

    @classmethod
    def of(cls, model: torch.nn.Module | None) -> ChosenRows | None:
        """That of ``model``; None if it has no logits processor of SGLang's, or several."""
        from sglang.srt.layers.logits_processor import LogitsProcessor

        modules = () if model is None else model.modules()
        processors = [module for module in modules if isinstance(module, LogitsProcessor)]
        return cls(processors[0]) if len(processors) == 1 else None

    @contextmanager
    def applied(self, rows: torch.Tensor) -> Iterator[None]:
        """Inside of the context a forward of the model returns the logits of ``rows``, int64 ``[n]``."""

        def choose(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # LogitsProcessor.forward(input_ids, hidden_states, ...)
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": kwargs["hidden_states"][rows]}
            return (args[0], args[1][rows], *args[2:]), kwargs

        handle = self._processor.register_forward_pre_hook(choose, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
