"""SGLang's kernels between logits and sampler, in PyTorch: capping, grammar masks, the hash of seeds."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bit, start value 0) of the 16 bytes (seed, position, column), row by column.

    Bit-equal to SGLang's Triton kernel of the same name (``sglang/kernels/ops/sampling/murmur_hash.py``),
    so that a seed draws the same tokens on a CPU and on a GPU from the same probabilities.

    Args:
        seed: ``[rows]`` 64-bit integers, low word hashed first.
        positions: ``[rows]`` integers, taken modulo 2**32.
        col_indices: ``[columns]`` integers (token ids), taken modulo 2**32.

    Returns:
        ``[rows, columns]`` uint32.
    """
    if seed.shape != positions.shape or seed.dim() != 1 or col_indices.dim() != 1:
        raise ValueError(
            f"murmur_hash32 needs seed [n], positions [n] and col_indices [m], got {tuple(seed.shape)}, "
            f"{tuple(positions.shape)} and {tuple(col_indices.shape)}"
        )
    seed = seed.to(torch.int64)
    # Only the last block differs between columns: everything before is hashed once per row.
    state = torch.zeros_like(seed)
    for block in (seed, seed >> 32, positions.to(torch.int64)):
        state = _mix(state, _scramble(block & _MASK))
    scrambled = _scramble(col_indices.to(torch.int64) & _MASK)
    return _finish(_mix(state[:, None], scrambled[None, :])).to(torch.uint32)


# int64 arithmetic wraps modulo 2**64, so the low 32 bits of every product are exact.


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def _scramble(block: torch.Tensor) -> torch.Tensor:
    block = (block * 0xCC9E2D51) & _MASK
    return (_rotate_left(block, 15) * 0x1B873593) & _MASK


def _mix(state: torch.Tensor, scrambled: torch.Tensor) -> torch.Tensor:
    return (_rotate_left(state ^ scrambled, 13) * 5 + 0xE6546B64) & _MASK


def _finish(state: torch.Tensor) -> torch.Tensor:
    state = state ^ 16  # length of the hashed message in bytes
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK
    return state ^ (state >> 16)


def cap_logits(full_logits: torch.Tensor, final_logit_softcapping: float) -> torch.Tensor:
    """``cap * tanh(logits / cap)`` in place, as SGLang's Triton kernel ``softcap_inplace_logits``."""
    return full_logits.div_(final_logit_softcapping).tanh_().mul_(final_logit_softcapping)


def apply_grammar_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """In place of the xgrammar backend's ``apply_vocab_mask``, which knows accelerators only.

    Args:
        logits: ``[rows, vocabulary]``; tokens that the grammar forbids become -inf in place.
        vocab_mask: ``[rows, vocabulary / 32]`` int32, a bit per token.
    """
    import xgrammar

    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)


def apply_grammar_mask_of(grammar: object, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """The same as a method of SGLang's grammar object."""
    apply_grammar_mask(logits, vocab_mask)


def allocate_grammar_mask(vocab_size: int, batch_size: int) -> torch.Tensor:
    """In place of the xgrammar backend's allocation, which pins memory for a GPU.

    Returns:
        ``[batch_size, vocab_size / 32]`` int32, every token allowed.
    """
    import xgrammar

    return xgrammar.allocate_token_bitmask(batch_size, vocab_size)
