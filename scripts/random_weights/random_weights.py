"""A second SGLang plugin, for benchmarks only: what ``--load-format dummy`` fills a Llama with.

Loaded where this folder is on ``PYTHONPATH``. SGLang's own dummy weights, and Llama's initialisation, give
logits that are nearly equal: rounding alone decides every few tokens, so that verification would reject far
more than with a trained model. Here each token has one likely successor, except for a share of tokens after
which the logits are as random as usual: there rounding decides now and then.
"""

from __future__ import annotations

import os
import sys
import zlib
from typing import Any

import torch

#: Share of tokens without a likely successor.
OPEN_SHARE_VARIABLE = "RANDOM_WEIGHTS_OPEN_SHARE"
OPEN_SHARE = 0.2

#: The successor of token t is (t * STRIDE + OFFSET) modulo the vocabulary.
STRIDE, OFFSET = 48_271, 11

#: Of the matrices inside the layers; the embedding has 1, so that a token's own embedding stays visible.
LAYER_STD = 0.01


def register() -> None:
    """Replace SGLang's initialisation, wherever it was imported already."""
    from sglang.srt.model_loader import weight_utils

    weight_utils.initialize_dummy_weights = fill
    loader = sys.modules.get("sglang.srt.model_loader.loader")
    if loader is not None:
        loader.initialize_dummy_weights = fill  # type: ignore[attr-defined]


def fill(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Fill the weights of ``model``, a Llama, in place; the same for the same shapes."""
    weights = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    embedding = next(value for name, value in weights.items() if "embed_tokens" in name)
    for name, value in weights.items():
        if "norm" in name:
            value.fill_(1)
        elif "lm_head" not in name:
            value.normal_(0, 1 if value is embedding else LAYER_STD, generator=_generator(name, value))
    for name, value in weights.items():
        if "lm_head" in name:
            _fill_head(value, embedding)


def _fill_head(head: torch.Tensor, embedding: torch.Tensor) -> None:
    tokens = torch.arange(len(head), device=head.device)
    successors = (tokens * STRIDE + OFFSET) % len(head)
    head.normal_(0, 1, generator=_generator("lm_head", head))
    share = float(os.environ.get(OPEN_SHARE_VARIABLE, OPEN_SHARE))
    settled = torch.rand(len(head), device=head.device, generator=_generator("settled", head)) >= share
    head[successors[settled]] = embedding[tokens[settled]]


def _generator(name: str, value: torch.Tensor) -> torch.Generator:
    # Ranks hold different shards; a token's successor stands in the token's own shard of the vocabulary.
    seed = zlib.crc32(name.encode()) + _tensor_parallel_rank()
    return torch.Generator(device=value.device).manual_seed(seed)


def _tensor_parallel_rank() -> int:
    from sglang.srt.distributed import get_tensor_model_parallel_rank, model_parallel_is_initialized

    return get_tensor_model_parallel_rank() if model_parallel_is_initialized() else 0
