"""Models for tests: tiny ones with random weights, made in a second and small enough for any machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_tiny_llama(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 512,
    max_positions: int = 1024,
    seed: int = 0,
    sensitive: bool = False,
) -> Path:
    """Write a random bf16 Llama without tokenizer to ``folder`` and return it.

    Token ids go in and come out (``skip_tokenizer_init``, ``input_ids``). ``heads`` and ``kv_heads`` that
    TP=2 divides are the default. The initializer is 25 times wider than Llama's, which would make all
    logits nearly equal and greedy decoding repeat one token.

    Args:
        folder: made if absent.
        layers, hidden, intermediate, heads, kv_heads, vocab, max_positions: Llama's dimensions.
        seed: of the weights; equal arguments give equal weights.
        sensitive: make rounding differences visible. Tokens 2k and 2k+1 get nearly the same logit, so that
            which of them wins hangs on rounding; attention spreads over many keys, so that their order of
            summation matters (with wide random weights it would look at one).
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=max_positions,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        if sensitive:
            _make_sensitive(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_tiny_experts(
    folder: Path,
    *,
    family: str,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    experts: int = 8,
    experts_per_token: int = 2,
    expert_intermediate: int = 128,
    vocab: int = 512,
    seed: int = 0,
) -> Path:
    """Write a random bf16 mixture of experts without tokenizer to ``folder`` and return it.

    As a ``sensitive`` :func:`write_tiny_llama`: tokens 2k and 2k+1 get nearly the same logit, and attention
    spreads over many keys, so that rounding differences soon become other tokens.

    Args:
        folder: made if absent.
        family: ``mixtral`` or ``qwen3_moe``.
        layers, hidden, heads, kv_heads, experts, experts_per_token, expert_intermediate, vocab: dimensions.
        seed: of the weights; equal arguments give equal weights.
    """
    import torch
    import transformers

    shape: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "num_experts_per_tok": experts_per_token,
        "vocab_size": vocab,
        "max_position_embeddings": 1024,
        "initializer_range": 0.5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "dtype": "bfloat16",
    }
    config: Any
    if family == "mixtral":
        config = transformers.MixtralConfig(
            **shape, num_local_experts=experts, intermediate_size=expert_intermediate
        )
    elif family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **shape,
            num_experts=experts,
            moe_intermediate_size=expert_intermediate,
            intermediate_size=2 * hidden,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
    else:
        raise ValueError(f"no family of experts is called {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        _make_sensitive(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _make_sensitive(model: Any) -> None:
    """Let rounding differences show in the tokens of ``model``."""
    rows = model.lm_head.weight.data
    rows[1::2] = rows[::2] + 0.005 * rows[1::2]
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 0.1
        layer.self_attn.k_proj.weight.data *= 0.1


def make_tokenizer(pieces: Sequence[str]) -> Any:
    """A tokenizer in which id ``i`` stands for the text ``pieces[i]``; texts are simply joined.

    Args:
        pieces: one text per token id, all different; the first two are beginning and end of sequence.

    Returns:
        A ``transformers`` tokenizer; it decodes any ids and encodes only what is one piece.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=pieces[0],
        eos_token=pieces[1],
        clean_up_tokenization_spaces=False,
    )
