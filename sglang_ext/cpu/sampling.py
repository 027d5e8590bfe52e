"""The hash behind SGLang's seeded sampling, in PyTorch."""

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
